"""What a depth map looks like from nearer by: surfaces without gaps, nothing where nothing was seen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole, quaternion_to_rotation, unproject
from lyra_core.memory import patches as patches_
from lyra_core.memory.depth import ground
from lyra_core.memory.patches import OVERLAP, draw, merge, patches

SIZE = (24, 36)
FOCAL = 30.0
CAMERA = pinhole(SIZE, FOCAL)


def camera_at(position=(0.0, 0.0, 0.0), yaw=0.0) -> Cameras:
    w2c = torch.eye(4)
    w2c[:3, :3] = quaternion_to_rotation(torch.tensor([math.cos(yaw / 2), 0.0, math.sin(yaw / 2), 0.0]))
    w2c[:3, 3] = -w2c[:3, :3] @ torch.tensor(position)
    return Cameras(w2c[None], CAMERA.K, SIZE)


def rough(seed=0) -> Tensor:
    """A depth map of hills, with a jump and an unknown corner."""
    coarse = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(seed))
    depth = 3 + torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")[0, 0]
    depth[8:16, 12:20] = 1.5
    depth[:6, :6] = 0
    return depth


def brute_force(found, camera: Cameras) -> Tensor:
    """The nearest parallelogram on every pixel's ray, each by its own linear system in the camera's axes."""
    rotation, offset = camera.w2c[0, :3, :3].double(), camera.w2c[0, :3, 3].double()
    corner = (rotation @ found.corner.double()).T + offset
    across, down = ((rotation @ side.double()).T for side in (found.across, found.down))
    depth = torch.zeros(SIZE, dtype=torch.double)
    for v in range(SIZE[0]):
        for u in range(SIZE[1]):
            ray = torch.linalg.inv(camera.K[0].double()) @ torch.tensor([u, v, 1.0], dtype=torch.double)
            solved = torch.linalg.solve(torch.stack([ray.expand_as(corner), -across, -down], -1), corner[..., None])
            z, s, t = solved[..., 0].unbind(1)
            inside = (torch.stack([s, t]) >= -OVERLAP).all(0) & (torch.stack([s, t]) <= 1 + OVERLAP).all(0)
            reached = z[inside & (z > 0)]
            depth[v, u] = reached.min() if len(reached) else 0
    return depth.float()


@pytest.mark.parametrize("view", [camera_at(), camera_at((0.4, 0.1, 0.6), 0.2), camera_at((-0.8, 0.0, 0.2), -0.4)])
def test_a_view_is_what_every_ray_meets_first(view):
    found = patches(rough(), CAMERA)
    expected = brute_force(found, view)
    drawn = draw(found, view)
    off = (drawn - expected).abs() > 1e-3
    assert off.float().mean() < 0.005  # rays that graze an edge
    assert 0.3 < (expected > 0).float().mean() < 1


def test_magnified_foreground_hides_all_that_is_behind():
    depth = torch.full(SIZE, 6.0)
    depth[8:16, 12:24] = 2.0
    near = camera_at((0.0, 0.0, 1.5))  # the square is four times as large
    drawn = draw(patches(depth, CAMERA), near)
    points = unproject(depth[None], CAMERA)[0] - near.centers[0]
    corners = [near.K[0] @ points[row, column] for row, column in ((8, 12), (15, 23))]
    (left, top), (right, bottom) = ((c[:2] / c[2]).tolist() for c in corners)
    inside = drawn[max(0, math.ceil(top)) : int(bottom) + 1, max(0, math.ceil(left)) : int(right) + 1]
    assert inside.numel() > 500
    assert_close(inside, torch.full_like(inside, 0.5))


def test_nothing_bridges_a_jump():
    depth = torch.full(SIZE, 6.0)
    depth[:, 18:] = 2.0
    drawn = draw(patches(depth, CAMERA), camera_at((0.8, 0.0, 0.0)))
    assert set(drawn.unique().round(decimals=3).tolist()) == {0.0, 2.0, 6.0}
    assert 0.1 < (drawn == 0).float().mean() < 0.5


def test_a_floor_is_one_surface_up_to_its_horizon():
    size, camera = (96, 64), pinhole((96, 64), 60.0)
    depth = ground(size, camera.K[0], 0.3, 1.0, 40.0).depth
    steep = (1 / depth).diff(dim=0).abs() > 0.05 / depth[:-1]
    assert steep.sum() > 64  # rows that differ by more than one surface may, but do not bend
    higher = replace(camera, w2c=camera.w2c.clone())
    higher.w2c[0, 1, 3] = 1.0
    drawn = draw(patches(depth, camera), higher)
    assert (drawn[36:] > 0).all()


def test_only_what_touches_a_wanted_pixel_is_kept():
    wanted = torch.zeros(SIZE, dtype=torch.bool)
    assert not len(patches(rough(), CAMERA, wanted))
    wanted[20, 20] = True
    assert len(patches(rough(), CAMERA, wanted)) == 4
    wanted[2, 2] = True  # its depth is unknown
    assert len(patches(rough(), CAMERA, wanted)) == 4


def test_a_lonely_pixel_keeps_its_place():
    depth = torch.zeros(SIZE)
    depth[10, 20] = 2.0
    drawn = draw(patches(depth, CAMERA), CAMERA)
    assert (drawn > 0).nonzero().tolist() == [[10, 20]] and drawn[10, 20] == pytest.approx(2.0)
    nearer = draw(patches(depth, CAMERA), camera_at((0.0, 0.0, 1.5)))
    assert 9 <= (nearer > 0).sum() <= 25  # magnified four times


def test_what_lies_behind_the_camera_is_not_seen():
    found = patches(torch.full(SIZE, 2.0), CAMERA)
    assert not draw(found, camera_at((0.0, 0.0, 2.5))).any()
    assert not draw(found, camera_at(yaw=math.pi)).any()


def test_how_many_are_drawn_at_once_changes_nothing(monkeypatch):
    found, view = patches(rough(), CAMERA), camera_at((0.3, 0.0, 1.0), 0.1)
    at_once = draw(found, view)
    monkeypatch.setattr(patches_, "BLOCK", 7)
    assert torch.equal(draw(found, view), at_once)


def test_the_nearest_of_several_views_counts():
    wall, square = torch.full(SIZE, 4.0), torch.zeros(SIZE)
    square[5:15, 5:15] = 2.0
    both = draw(merge(patches(wall, CAMERA), patches(square, CAMERA)), CAMERA)
    assert (both[5:15, 5:15] == 2).all() and (both[16:, 16:] == 4).all()


def test_nothing_is_made_on_another_device_than_the_depth_is_on():
    depth, view = rough(), camera_at((0.3, 0.0, 1.0), 0.1)
    with torch.device("meta"):  # whatever is made without naming a device lands there, and can't be mixed with the rest
        drawn = draw(patches(depth, CAMERA), view)
    assert drawn.device.type == "cpu" and drawn.any()
