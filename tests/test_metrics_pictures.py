"""Metrics obey the laws that make them metrics, and know a path that comes back."""
from __future__ import annotations

from dataclasses import replace
from math import inf, isclose, log10

import pytest
import torch

from lyra_core.cameras.camera import pinhole, unproject
from lyra_core.metrics.pictures import camera_distances, color_drift, psnr, reprojection_error, revisit_psnr, ssim

SIZE = (24, 32)


@pytest.fixture
def image():
    return torch.rand(*SIZE, 3, generator=torch.Generator().manual_seed(1))


def noisy(image, amount, seed=2):
    return image + amount * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


def dolly(positions, size=SIZE):
    """Cameras looking along z at the given heights of the z axis."""
    cameras = pinhole(size, 30.0, len(positions))
    w2c = cameras.w2c.clone()
    w2c[:, 2, 3] = -torch.tensor(positions)
    return replace(cameras, w2c=w2c)


def test_psnr_of_equal_images_is_infinite(image):
    assert psnr(image, image.clone()) == inf


def test_psnr_is_the_formula_and_symmetric(image):
    other = noisy(image, 0.1)
    expected = -10 * log10(float(((image - other).double() ** 2).mean()))
    assert isclose(psnr(image, other), expected, rel_tol=1e-9)
    assert psnr(image, other) == psnr(other, image)


def test_psnr_of_a_constant_error_of_a_tenth_is_twenty(image):
    assert psnr(image.double(), image.double() + 0.1) == pytest.approx(20, abs=1e-9)


def test_psnr_falls_as_noise_grows(image):
    values = [psnr(image, noisy(image, amount)) for amount in (0.01, 0.05, 0.2)]
    assert values == sorted(values, reverse=True)


def test_psnr_looks_at_masked_pixels_only(image):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[:5, :7] = True
    other = torch.where(mask[..., None], image + 0.1, image + 0.7)
    assert psnr(image, other, mask) == pytest.approx(20, abs=1e-4)
    with pytest.raises(ValueError, match="no pixel"):
        psnr(image, other, torch.zeros_like(mask))


def test_images_of_different_sizes_are_refused(image):
    with pytest.raises(ValueError, match=r"\(24, 32, 3\) and \(23, 32, 3\)"):
        psnr(image, image[1:])


def test_ssim_of_equal_images_is_one_and_noise_lowers_it(image):
    assert ssim(image, image) == pytest.approx(1, abs=1e-9)
    values = [ssim(image, noisy(image, amount)) for amount in (0.02, 0.1, 0.4)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.9
    assert ssim(image, noisy(image, 0.1)) == pytest.approx(ssim(noisy(image, 0.1), image), abs=1e-9)


def test_ssim_equals_the_definition_written_out_window_by_window(image):
    a, b = image[:13, :14], noisy(image, 0.1)[:13, :14]
    bell = torch.exp(-torch.arange(-5.0, 6) ** 2 / (2 * 1.5 ** 2)).double()
    window = bell[:, None] * bell / (bell.sum() ** 2)
    values = []
    for v in range(3):
        for u in range(4):
            for channel in range(3):
                x, y = (i[v:v + 11, u:u + 11, channel].double() for i in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(float(torch.stack(values).mean()), abs=1e-9)


def test_a_way_back_over_the_same_cameras_is_paired_frame_by_frame(image):
    frames = torch.stack([image * (1 - 0.1 * i) for i in (0, 1, 2, 3, 2, 1, 0)])
    result = revisit_psnr(frames, dolly([0.0, 1, 2, 3, 2, 1, 0]))
    assert result.outgoing == (2, 1, 0) and result.returning == (4, 5, 6)
    assert result.psnr == (inf, inf, inf) and result.mean == inf and result.pooled == inf


def test_a_frame_whose_camera_was_not_there_before_has_no_pair(image):
    frames = torch.stack([image] * 5)
    result = revisit_psnr(frames, dolly([0.0, 1, 3, 1.5, 0.01]))
    assert list(zip(result.outgoing, result.returning, strict=True)) == [(0, 4)]


def test_a_turn_on_the_spot_is_a_path_too(image):
    angle = torch.tensor([0.0, 0.3, 0.6, 0.3, 0.0])
    cameras = pinhole(SIZE, 30.0, 5)
    w2c = cameras.w2c.clone()
    w2c[:, 0, 0] = w2c[:, 2, 2] = angle.cos()
    w2c[:, 0, 2], w2c[:, 2, 0] = angle.sin(), -angle.sin()
    cameras = replace(cameras, w2c=w2c)
    torch.testing.assert_close(camera_distances(cameras)[0], angle.double(), atol=1e-6, rtol=0)
    assert revisit_psnr(torch.stack([image] * 5), cameras).returning == (3, 4)


def test_revisits_compare_what_the_way_out_saw_and_pool_by_pixels(image):
    frames = torch.stack([image, image, image, image + 0.1, image + 0.01]).double()
    seen = torch.ones(5, *SIZE, dtype=torch.bool)
    frames[4, :12] += 5             # invented on the way out, so it doesn't count
    seen[0, :12] = False
    seen[3] = False                 # forgotten on the way back: that is what the number shall show
    result = revisit_psnr(frames, dolly([0.0, 1, 2, 1, 0]), seen)
    assert result.psnr == pytest.approx((20, 40), abs=1e-4) and result.mean == pytest.approx(30, abs=1e-4)
    assert result.pooled == pytest.approx(-10 * log10((2 * 1e-2 + 1e-4) / 3), abs=1e-4)


def test_a_path_without_a_way_back_is_refused(image):
    with pytest.raises(ValueError, match="no pair"):
        revisit_psnr(torch.stack([image] * 3), dolly([0.0, 1, 2]))
    with pytest.raises(ValueError, match="no pair"):
        revisit_psnr(torch.stack([image] * 4), dolly([0.0, 1, 4, 2.5]))


def plane_picture(camera, depth):
    """A smooth pattern painted on the plane z = depth, as a camera that looks along z sees it."""
    points = unproject(torch.full((1, *camera.size), depth) - camera.centers[0, 2], camera)[0]
    return 0.5 + 0.4 * torch.stack([torch.sin(3 * points[..., 0]), torch.cos(3 * points[..., 1]),
                                    torch.sin(2 * points[..., 0] + points[..., 1])], -1)


def test_a_view_projected_into_itself_has_no_error(image):
    camera = pinhole(SIZE, 30.0)
    depth = 1 + torch.rand(SIZE, generator=torch.Generator().manual_seed(3))
    assert reprojection_error(image, depth, camera, image, camera, depth) < 1e-4


def test_views_of_one_plane_agree_and_a_wrong_depth_shows():
    a, b = dolly([0.0]), dolly([0.4])
    frame_a, frame_b = plane_picture(a, 2.0), plane_picture(b, 2.0)
    right = reprojection_error(frame_a, torch.full(SIZE, 2.0), a, frame_b, b)
    wrong = reprojection_error(frame_a, torch.full(SIZE, 4.0), a, frame_b, b)
    assert right < 1e-3 and wrong > 0.02


def test_what_is_hidden_in_the_second_view_is_not_compared(image):
    camera = pinhole(SIZE, 30.0)
    depth, depth_b, other = torch.full(SIZE, 2.0), torch.full(SIZE, 2.0), image.clone()
    depth_b[:, :10], other[:, :10] = 1.0, 0.0
    assert reprojection_error(image, depth, camera, other, camera) > 0.05
    assert reprojection_error(image, depth, camera, other, camera, depth_b) < 1e-4
    depth[:, 20:] = 0           # unknown, so it isn't compared, even from where the first camera itself is in sight
    assert reprojection_error(image, depth, camera, other, dolly([-2.0])) == pytest.approx(
        reprojection_error(image[:, :20], depth[:, :20], replace(camera, size=(24, 20)), other, dolly([-2.0])), abs=1e-6)
    with pytest.raises(ValueError, match="no pixel"):
        reprojection_error(image, torch.zeros(SIZE), camera, other, camera)


def test_colour_drift_is_zero_for_a_still_and_tells_tint_from_contrast(image):
    image = image.double()
    drift = color_drift(f for f in (image, image, image + torch.tensor([0.3, 0, 0.4]), 2 * (image - image.mean((0, 1)))
                                    + image.mean((0, 1))))
    assert drift.mean == pytest.approx((0, 0, 0.5, 0), abs=1e-6)
    assert drift.std[:3] == pytest.approx((0, 0, 0), abs=1e-6)
    assert drift.std[3] == pytest.approx(float(image.flatten(0, 1).std(0).norm()), abs=1e-6)
