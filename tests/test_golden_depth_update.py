"""What tools/golden_checks/depth_update.py does as the reference and the product has no use for."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.memory.depth_alignment import Estimate

SIZE = (96, 144)


@pytest.fixture
def checks(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project / "tools"))
    return importlib.import_module("golden_checks.depth_update")


def walk(frames: int, step: float) -> Cameras:
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, 2, 3] = -step * torch.arange(frames)
    return Cameras(w2c, pinhole(SIZE, 150.0, frames).K, SIZE)


@pytest.mark.parametrize("newest", [0, 7, 8, 80, 240])
@pytest.mark.parametrize("interval, count", [(8, 10), (4, 40), (1, 1), (5, 7)])
@pytest.mark.parametrize("ends", [False, True])
def test_a_window_is_the_last_frames_at_its_interval_and_the_ends_of_chunks(checks, newest, interval, count, ends):
    expected = {newest - interval * k for k in range(count) if newest - interval * k >= 0}
    expected |= {i for i in range(newest + 1) if i % 16 == 0} if ends else set()
    assert checks.depth_window(newest, interval, count, ends, 16) == sorted(expected)


def test_the_first_window_is_the_references(checks):
    assert checks.depth_window(80) == list(range(8, 81, 8))
    assert checks.depth_window(160, chunk_ends=True) == [0, 80, *range(88, 161, 8)]


@pytest.mark.parametrize("wrong", [(-1, 8, 10), (80, 0, 10), (80, 8, 0), (80, 8, 10, True, 0)])
def test_an_impossible_window_is_refused(checks, wrong):
    with pytest.raises(ValueError, match=f"frame {wrong[0]} with interval {wrong[1]}, count {wrong[2]}"):
        checks.depth_window(*wrong)


def test_only_cameras_that_stand_still_are_moved_apart_and_hardly(checks):
    for step, moves in ((0.1, True), (3e-5, True), (3e-6, False), (0.0, False)):
        cameras = walk(5, step)
        assert (checks.moved_apart(cameras) is cameras) == moves
    many = checks.moved_apart(pinhole(SIZE, 150.0, 20_000))
    i = 2 * math.pi * 15_000
    expected = [math.sin(i * 1e-5), math.cos(i * 1.3e-5), math.sin(i * 7e-6)]
    assert_close(many.centers[15_000], 1e-6 * torch.tensor(expected), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("history", [1, 2, 6])
def test_followed_cameras_stand_in_the_world_where_the_estimator_saw_them(checks, history):
    cameras, seen = walk(10, 0.2), walk(10, 0.6)  # the truth in another scale: following it restores the depth
    moved, depth = checks.follow_predicted_cameras(Estimate(torch.full((10, *SIZE), 6.0), seen), cameras, history)
    assert_close(moved.w2c, cameras.w2c, atol=1e-5, rtol=0)
    assert_close(depth, torch.full((10, *SIZE), 2.0))


def test_followed_cameras_hang_at_the_last_settled_one(checks):
    cameras, estimate = walk(10, 0.2), Estimate(torch.ones(10, *SIZE), walk(10, 0.0))
    moved, depth = checks.follow_predicted_cameras(estimate, cameras, 3)
    assert_close(moved.w2c, cameras.w2c[2].expand(10, 4, 4))
    assert torch.equal(depth, torch.ones_like(depth))  # it saw no movement and keeps its scale
    for history in (0, 11):
        with pytest.raises(ValueError, match=f"{history} of 10 frames are settled"):
            checks.follow_predicted_cameras(estimate, cameras, history)
    with pytest.raises(ValueError, match="doesn't say"):
        checks.follow_predicted_cameras(Estimate(depth), cameras, 1)


def test_predictions_are_believed_of_the_first_chunk_or_of_all(checks):
    assert [checks.believes_prediction(c, False) for c in range(3)] == [True, False, False]
    assert all(checks.believes_prediction(c, True) for c in range(3))


def test_the_photos_depth_is_kept_as_the_reference_keeps_it(checks):
    raw = torch.tensor([[1.0, math.nan], [math.inf, 999.95]])
    depth, surfaces = checks.single_depth(raw, (2, 2))
    assert_close(depth, torch.tensor([[1.0, 1e4], [1e4, 999.95]]))
    assert surfaces.tolist() == [[True, False], [False, False]]
    assert checks.single_depth(torch.full((2, 2), -3.0), (4, 4))[0].tolist() == [[0.0] * 4] * 4


def test_new_depth_counts_as_reliable_up_to_fifteen_percent(checks):
    step = torch.full((2, *SIZE), 4.0)
    step[0, :, 60:] = 4.0 * 1.12
    step[1, :, 60:] = 4.0 * 1.2
    found = checks.shown_as_reliable(step)[:, 10:-10, 10:-10]
    assert found[0].all() and not found[1].all()
