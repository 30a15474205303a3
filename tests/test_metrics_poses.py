from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lyra_core.cameras.camera import Cameras, pinhole, project
from lyra_core.metrics import poses

SIZE = (240, 320)


def camera(turn: float = 0.0, centre=(0.0, 0.0, 0.0)) -> Cameras:
    """Turned to the right by so many degrees, standing there."""
    at, angle = pinhole(SIZE, 300.0), math.radians(turn)
    w2c = torch.eye(4)
    w2c[0, 0] = w2c[2, 2] = math.cos(angle)
    w2c[0, 2], w2c[2, 0] = -math.sin(angle), math.sin(angle)
    w2c[:3, 3] = -w2c[:3, :3] @ torch.tensor(centre)
    return Cameras(w2c[None], at.K, SIZE)


@pytest.fixture(scope="module")
def world():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(200, 3, generator=generator) * torch.tensor([2.0, 1.5, 3.0]) + torch.tensor([-1.0, -0.75, 3.0])


def pixels(world, at):
    return project(world, at)[0][0].double().numpy()


def test_pixels_of_one_place_lie_on_each_others_epipolar_lines_and_those_moved_across_do_not(world):
    a, b = camera(), camera(4, (0.6, 0.0, 0.1))
    seen_a, seen_b = pixels(world, a), pixels(world, b)
    assert poses.epipolar_distances(seen_a, seen_b, a, b).max() < 1e-2
    moved = poses.epipolar_distances(seen_a, seen_b + [0, 3], a, b)  # the lines are nearly level
    assert np.median(moved) == pytest.approx(3, abs=0.2)


def test_a_camera_that_only_turns_gives_every_pixel_one_place(world):
    a, b = camera(), camera(6)
    seen_a, seen_b = pixels(world, a), pixels(world, b)
    assert poses.epipolar_distances(seen_a, seen_b, a, b).max() < 1e-2
    assert np.median(poses.epipolar_distances(seen_a, seen_b + [2, 0], a, b)) == pytest.approx(2, abs=0.1)


def test_the_camera_that_took_a_picture_is_found_and_its_distance_to_the_commanded_one_is_told(world):
    taken, commanded = camera(5, (0.3, 0.0, 0.2)), camera(2, (0.3, 0.1, 0.2))
    seen = pixels(world, taken)
    seen[::5] += 40  # wrong matches
    error = poses.pose_error(world.double().numpy(), seen, commanded)
    assert error.degrees == pytest.approx(3, abs=1e-2) and error.distance == pytest.approx(0.1, abs=1e-3)
    assert error.inliers == 160
    assert poses.pose_error(world.double().numpy(), seen, taken).degrees < 1e-2


def test_a_camera_that_too_few_points_agree_on_is_not_found(world):
    seen = pixels(world, camera())
    assert poses.pose_error(world[:29].double().numpy(), seen[:29], camera()) is None
    scattered = np.random.default_rng(0).uniform(0, 240, seen.shape)
    assert poses.pose_error(world.double().numpy(), scattered, camera()) is None


def test_places_are_where_the_depth_says_and_unknown_ones_are_told():
    at, depth = camera(20, (1.0, 2.0, 3.0)), torch.full(SIZE, 4.0)
    depth[:, :100] = 0
    asked = np.array([[50.0, 60.0], [150.5, 60.25], [319.0, 239.0]])
    there, known = poses.places(asked, depth, at)
    assert known.tolist() == [False, True, True]
    back, z = project(torch.from_numpy(there).float(), at)
    np.testing.assert_allclose(back[0, 1:].numpy(), asked[1:], atol=1e-2)
    np.testing.assert_allclose(z[0, 1:].numpy(), 4, atol=1e-4)


@pytest.fixture(scope="module")
def texture():
    coarse = torch.rand(1, 3, 60, 90, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (300, 450), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1)


def test_points_of_a_shifted_picture_are_matched_by_that_shift(texture):
    a, b = (poses.points(part) for part in (texture[:240, :320], texture[20:260, 30:350]))
    i, j = poses.matches(a, b)
    shift = a.pixels[i] - b.pixels[j]
    assert len(i) > 100 and np.abs(np.median(shift, axis=0) - [30, 20]).max() < 0.1
    assert np.mean(np.abs(shift - [30, 20]).max(1) < 1) > 0.95


def test_pictures_of_nothing_and_of_other_things_are_no_pair(texture):
    something, nothing = poses.points(texture[:240, :320]), poses.points(torch.full((*SIZE, 3), 0.5))
    assert len(nothing.pixels) == 0
    assert poses.pair_distance(something, nothing, camera(), camera(5)) is None
    assert poses.pair_distance(something, something, camera(), camera()) < 1e-6
