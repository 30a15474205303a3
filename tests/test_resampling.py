"""Frames become what the reference's preparation makes of them."""

from __future__ import annotations

import cv2
import pytest
import torch
from torch.testing import assert_close

from lyra_core.memory.resampling import DEVIATION, MEAN, prepared, resized, rounded, seen_size


def picture(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(
    ("size", "longest", "first", "second"),
    [
        ((480, 832), 832, (480, 832), (476, 826)),
        ((832, 480), 832, (832, 480), (826, 476)),
        ((480, 832), 504, (291, 504), (294, 504)),
        ((21, 35), 35, (21, 35), (28, 42)),  # halves go up
        ((20, 34), 34, (20, 34), (14, 28)),
        ((6, 100), 100, (6, 100), (14, 98)),
        ((3, 1000), 100, (1, 100), (14, 98)),
    ],
)
def test_sides_are_whole_patches_nearest_to_the_asked_length(size, longest, first, second):
    assert seen_size(size, longest) == (first, second)


@pytest.mark.parametrize("size", [(5, 7), (9, 4), (10, 12), (3, 12)])
def test_a_smaller_picture_has_the_mean_over_each_pixel_s_area(size):
    before, fine = picture(10, 12), 60
    found = resized(before, size)
    # every old pixel cut into so many parts that new ones are whole numbers of parts
    parts = before.repeat_interleave(fine, 1).repeat_interleave(fine, 2)
    if (10 * fine) % size[0] == 0 and (12 * fine) % size[1] == 0:
        exact = parts.unflatten(1, (size[0], -1)).unflatten(3, (size[1], -1)).mean((2, 4))
        assert (found - exact).abs().max() <= 0.5 + 1e-4
    assert torch.equal(found, found.round()) and found.shape == (3, *size)


def test_halves_are_rounded_up():
    assert rounded(torch.tensor([0.5, 1.5, 2.49, -3.0, 300.0])).tolist() == [1, 2, 2, 0, 255]
    two = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert resized(two, (1, 1)).item() == 1


def test_a_picture_that_grows_on_one_side_is_interpolated_and_a_flat_one_stays_flat():
    flat = torch.full((3, 20, 34), 77.0)
    assert (resized(flat, (28, 28)) == 77).all() and (resized(flat, (14, 28)) == 77).all()
    ramp = torch.arange(0, 200, 10.0).expand(1, 8, 20)
    grown = resized(ramp, (8, 40))[0, 4]
    assert_close(grown[8:32], 2.5 + 5 * torch.arange(7.0, 31), atol=0.51, rtol=0)


def test_the_same_size_changes_nothing_but_the_normalisation():
    frames = picture(28, 42)[None].movedim(1, -1) / 255
    found = prepared(frames, 42)
    expected = (frames - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    assert_close(found, expected.movedim(-1, 1))


def test_frames_are_prepared_alone():
    frames = torch.rand(3, 30, 50, 3, generator=torch.Generator().manual_seed(1))
    assert_close(prepared(frames, 50)[1:2], prepared(frames[1:2], 50))


@pytest.mark.parametrize("size", [(118, 206), (60, 104), (126, 210), (126, 200), (1, 1), (14, 208)])
def test_opencv_makes_exactly_the_same(size):
    before = picture(120, 208)
    how = cv2.INTER_CUBIC if size[0] > 120 or size[1] > 208 else cv2.INTER_AREA
    theirs = cv2.resize(before.movedim(0, -1).byte().numpy(), size[::-1], interpolation=how)
    assert torch.equal(resized(before, size), torch.from_numpy(theirs).float().reshape(*size, 3).movedim(-1, 0))


def test_one_channel_stays_one_channel():
    assert resized(picture(20, 30)[:1], (10, 15)).shape == (1, 10, 15)
