"""What a path will meet: coverage beside an exact z-buffer, distances, effort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lyra_core.cameras import presets, trajectory
from lyra_core.cameras.camera import Cameras, pinhole, unproject
from lyra_core.memory import point_cloud, preflight
from lyra_core.memory.depth import room_box
from lyra_core.memory.preflight import coverage, distances, effort, grid_of
from lyra_core.memory.retrieval import Keyframe
from lyra_core.memory.warp import lift, splat

SIZE, FOCAL, DEPTH = (240, 416), 346.0, 5.0


def room():
    camera = pinhole(SIZE, FOCAL)
    return room_box(SIZE, camera.K[0], (0.5, 0.5), (0.15, 0.12, 0.85, 0.88), DEPTH).depth, camera


def known_points(levels: int = preflight.LEVELS) -> np.ndarray:
    depth, camera = room()
    blank = torch.zeros(*SIZE, 3, dtype=torch.uint8)
    view = point_cloud.view_of(Keyframe(0, depth, camera), blank, blank[..., 0].bool())
    return point_cloud.block([view], [], camera).points(levels)


def exact_coverage(cameras: Cameras) -> np.ndarray:
    """Of every pixel of the photo, warped: what share of the views it fills."""
    depth, camera = room()
    warp = splat(lift(depth, camera, torch.zeros(*SIZE, 0), continuity=None), cameras)
    return warp.seen.float().mean((1, 2)).numpy()


TURNS = presets.preset("rotate_spot", pinhole(SIZE, FOCAL), 9, DEPTH, "right", 60.0)
STEPS = presets.preset("horizontal_zoom", pinhole(SIZE, FOCAL), 5, DEPTH, "left", 1.5)
SIDE = presets.preset("horizontal_simple", pinhole(SIZE, FOCAL), 5, DEPTH, "left", 0.5)


@pytest.mark.parametrize(("levels", "stride", "bar"), [(3, 2, 0.03), (2, 4, 0.05)], ids=["settled", "live"])
def test_coverage_agrees_with_the_exact_one_in_views_that_are_covered_in_part(levels, stride, bar):
    points = known_points(levels)
    for path in (TURNS, STEPS, SIDE):
        exact = exact_coverage(path)
        found = coverage(points, path, grid_of(SIZE, stride))
        assert np.abs(found - exact).max() < bar
    assert exact_coverage(TURNS).min() < 0.2, "some views are nearly empty"


def test_the_grid_belongs_to_the_stride_of_the_points():
    assert grid_of((480, 832), 4) == grid_of((480, 832)) == (30, 52) and grid_of((480, 832), 8) == (15, 26)
    assert grid_of((240, 416)) == (30, 52) and grid_of((64, 96)) == (8, 12) and grid_of((16, 16), 8) == (1, 1)


def test_what_lies_behind_or_beside_a_view_covers_nothing():
    camera = pinhole(SIZE, FOCAL)
    behind = np.array([[0, 0, -1.0], [0, 0, 0]])
    beside = np.array([[10.0, 0, 1], [0, -10, 1], [-10, 0, 1], [0, 10, 1]])
    assert coverage(np.concatenate([behind, beside]), camera).tolist() == [0]
    assert coverage(np.zeros((0, 3)), camera).tolist() == [0]
    middle = coverage(np.array([[0, 0, 1.0]]), camera)
    assert middle.tolist() == [1 / (30 * 52)]


def test_a_pixel_s_cell_is_the_one_it_lies_in():
    camera, (rows, columns) = pinhole(SIZE, FOCAL), (3, 4)
    grid = torch.zeros(SIZE)
    for row, column in ((0, 0), (79, 103), (80, 104), (239, 415)):
        depth = grid.clone()
        depth[row, column] = 2.0
        point = unproject(depth[None], camera)[0][depth > 0].numpy()
        seen = [coverage(np.concatenate([point, cell]), camera, (rows, columns))[0] for cell in cells(camera, rows, columns)]
        own = (row // 80) * columns + column // 104
        assert [i for i, share in enumerate(seen) if share == 1 / 12] == [own]


def cells(camera: Cameras, rows: int, columns: int):
    """A point in the middle of each cell."""
    depth = torch.ones(SIZE)
    points = unproject(depth[None], camera)[0]
    return [points[80 * r + 40, 104 * c + 52][None].numpy() for r in range(rows) for c in range(columns)]


def test_distances_are_those_of_an_exhaustive_search():
    g = torch.Generator().manual_seed(1)
    points, centers = torch.randn(5000, 3, generator=g), torch.randn(21, 3, generator=g)
    expected = torch.cdist(centers.double(), points.double()).amin(1)
    assert np.abs(distances(points.numpy(), centers.numpy()) - expected.numpy()).max() < 1e-5
    assert np.isinf(distances(np.zeros((0, 3)), centers.numpy())).all()
    far = points.numpy() + np.float32(300)
    assert distances(far, far[:5]).tolist() == [0] * 5, "also far from the origin"


def test_effort_counts_travel_or_turning_whichever_is_more():
    camera = pinhole(SIZE, FOCAL)
    turned = presets.preset("rotate_spot", camera, 81, DEPTH, "left", 44.0)
    assert effort(turned, DEPTH) == [pytest.approx(2.0, abs=1e-3)]
    moved = presets.preset("horizontal_simple", camera, 161, DEPTH, "left", 1.0)
    assert effort(moved, DEPTH) == [pytest.approx(1.0, abs=1e-3)] * 2
    both = Cameras(torch.cat([moved.w2c, moved.w2c[:41]]), torch.cat([moved.K, moved.K[:41]]), SIZE)
    assert len(effort(both, DEPTH)) == 3 and len(effort(both, DEPTH, 300)) == 1
    assert effort(camera, DEPTH) == []


def test_travel_and_turning_at_once_are_not_added_up():
    moved = presets.preset("horizontal_simple", pinhole(SIZE, FOCAL), 81, DEPTH, "left", 0.5)
    turned = presets.preset("rotate_spot", pinhole(SIZE, FOCAL), 81, DEPTH, "left", 11.0)
    assert effort(Cameras(turned.w2c @ moved.w2c, moved.K, SIZE), DEPTH) == [pytest.approx(1.0, abs=1e-3)]


def test_standing_still_is_no_effort_of_rounding():
    for degrees in range(10, 180, 10):
        turned = presets.preset("rotate_spot", pinhole(SIZE, FOCAL), 2, DEPTH, "left", float(degrees))[1:]
        still = Cameras(turned.w2c.repeat(81, 1, 1), turned.K.repeat(81, 1, 1), SIZE)
        assert effort(still, DEPTH)[0] < 1e-4


def test_a_preflight_looks_at_every_eighth_view_and_keeps_every_fourth_centre_clear():
    points = known_points()
    path = presets.preset("horizontal_zoom", pinhole(SIZE, FOCAL), 86, DEPTH, "right", 0.9)
    found = preflight.preflight(path, points, DEPTH)
    assert found.views == (*range(8, 81, 8), 85) and len(found.coverage) == len(found.clearance) == 11
    assert found.coverage[0] > 0.95 and found.coverage[-1] < found.coverage[0] + 0.05
    assert found.nearest == pytest.approx(min(distances(points, path.centers.numpy()[[*range(0, 86, 4), 85]])))
    assert found.nearest_frame == 85 and found.clearance[-1] == pytest.approx(found.nearest / DEPTH)
    assert len(found.effort) == 2 and found.effort[0] == pytest.approx(0.9 * 80 / 86 / 0.5, abs=1e-3)


def test_the_nearest_point_is_where_the_guard_of_trajectories_finds_it():
    points = known_points()
    path = presets.preset("horizontal_simple", pinhole(SIZE, FOCAL), 81, DEPTH, "right", 0.3)
    report = trajectory.guard(path, torch.from_numpy(points), 1e-6)[1]
    found = preflight.preflight(path, points, DEPTH)
    assert found.nearest == pytest.approx(report.nearest, rel=1e-2) and abs(found.nearest_frame - report.at_frame) <= 4


def test_no_thread_of_torch_is_asked_for(monkeypatch):
    """The settled numbers come while the host's own work fills its threads."""
    monkeypatch.setattr(torch, "cdist", None)
    path = presets.preset("spiral", pinhole(SIZE, FOCAL), 81, DEPTH)
    assert math.isfinite(preflight.preflight(path, known_points(), DEPTH).nearest)
