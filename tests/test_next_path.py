"""The plan of the next path: read, turned into cameras, made from cameras; and a curve that goes on as it came."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras import camera_files, next_path, presets
from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.cameras.camera_path import CameraPath, PathKey, evaluate, path_cameras, resample, spaced

SIZE = (64, 96)


def key(x: float, z: float, yaw: float = 0.0, fov: float = 42.0) -> PathKey:
    c, s = math.cos(yaw), math.sin(yaw)
    return PathKey(torch.tensor([[c, 0, s, x], [0, 1, 0, 0], [-s, 0, c, z]]), fov)


WALKED = (key(0, 0), key(0, 2), key(2, 2, math.pi / 2), key(2, 0, math.pi))


def start_of(path: CameraPath, step: float = 1e-2) -> tuple[torch.Tensor, float]:
    """In which direction (3,) a path sets out, and by how many radians it turns on its first steps."""
    c2w, _ = evaluate(spaced(path, 1.0), torch.tensor([0.0, step]))
    yaw = torch.atan2(c2w[:, 0, 2], c2w[:, 2, 2])
    return torch.nn.functional.normalize(c2w[1, :3, 3] - c2w[0, :3, 3], dim=0), float(yaw[1] - yaw[0])


def test_a_path_that_is_continued_sets_out_more_as_it_came():
    onwards = CameraPath(WALKED[1:], through_keys=True)
    bent = start_of(onwards)[0]
    kept = start_of(replace(onwards, before=key(0, 1.5)))[0]
    came = torch.tensor([0.0, 0, 1])
    assert float(kept @ came) > 0.6 > 0.3 > float(bent @ came), "without it the curve bends sharply"


def test_only_the_direction_that_it_came_from_counts():
    onwards = spaced(CameraPath(WALKED[1:], through_keys=True), 1.0)
    t = torch.linspace(0, 1, 50)
    near, far = (evaluate(replace(onwards, before=key(0, z, -0.01 * (2 - z))), t) for z in (1.9, -20.0))
    assert_close(near[0], far[0], atol=1e-4, rtol=0)
    first, _ = evaluate(onwards, t)
    second_leg = t > 0.5
    assert_close(near[0][second_leg], first[second_leg], atol=1e-5, rtol=0)


def test_turning_on_goes_on_turning():
    onwards = CameraPath((key(0, 0, 0.5), key(0, 0, 0.7), key(0, 0, 0.8)), through_keys=True)
    from_left, from_right = (start_of(replace(onwards, before=key(0, 0, yaw)))[1] for yaw in (0.45, 0.55))
    assert from_left > 1.5 * from_right > 0


def test_where_nothing_moves_after_a_walk_nothing_swings():
    onwards = CameraPath((key(0, 2), key(0, 2, 0.2), key(0, 2, 0.4)), through_keys=True, before=key(0, 1))
    c2w, _ = evaluate(spaced(onwards, 1.0), torch.linspace(0, 1, 100))
    assert (c2w[:, :3, 3] - onwards.keys[0].c2w[:, 3]).abs().max() < 1e-6


def test_standing_still_before_and_other_curves_leave_the_path_finite_or_as_it_was():
    t = torch.linspace(0, 1, 20)
    onwards = spaced(CameraPath(WALKED[1:], through_keys=True), 1.0)
    c2w, fov = evaluate(replace(onwards, before=WALKED[1]), t)
    assert torch.isfinite(c2w).all() and torch.isfinite(fov).all()
    for path in (replace(onwards, loop=True), replace(onwards, through_keys=False)):
        assert_close(evaluate(replace(path, before=key(0, 1)), t), evaluate(path, t))


def test_a_turn_far_from_the_origin_is_spread_evenly_though_its_place_trembles():
    g = torch.Generator().manual_seed(0)
    keys = []
    for i in range(11):
        turned = key(3.0, -2.0, 0.05 * i)
        turned.c2w[:, 3] += 2e-6 * (torch.rand(3, generator=g) - 0.5)
        keys.append(turned)
    path = CameraPath(tuple(replace(k, timestamp=i + 1.0) for i, k in enumerate(keys)), through_keys=True)
    moments = resample(path, 81)
    assert (moments - torch.linspace(0, 1, 81, dtype=torch.float64)).abs().max() < 2e-3


def test_a_plan_becomes_cameras_and_cameras_become_the_plan_again():
    standing = pinhole(SIZE, 80.0)
    cameras = presets.preset("orbit_horizontal", standing, 161, 5.0, "left", 0.5)
    text = next_path.text_of(cameras, "ab" * 32, standing, captions={"0": "a door", "81": "a hall"}, seed=2**60)
    plan = next_path.read(text)
    assert (plan.state, plan.frames, plan.chunks, plan.seed) == ("ab" * 32, 161, 2, 2**60)
    assert plan.captions == {0: "a door", 81: "a hall"} and plan.path.through_keys and plan.path.before is not None
    assert len(plan.path.keys) == 21
    found = next_path.cameras_of(plan, standing)
    assert (found.centers - cameras.centers).abs().max() < 0.01 and (found.w2c - cameras.w2c).abs().max() < 0.01
    assert_close(found.K, cameras.K, atol=1e-3, rtol=0)
    numbers = json.loads(text)["path"][3]
    assert all(round(value, 6) == value for value in [*numbers["R"], *numbers["T"], numbers["fov"]])


def test_a_saved_plan_is_a_camera_path_like_any_other(tmp_path):
    standing = pinhole(SIZE, 80.0)
    cameras = presets.preset("orbit_horizontal", standing, 81, 5.0, "left", 0.5)
    (tmp_path / "plan.json").write_text(text := next_path.text_of(cameras, "", standing))
    loaded = camera_files.load_cameras(tmp_path / "plan.json", 81, size=SIZE)
    assert_close(loaded.w2c[1:], next_path.cameras_of(next_path.read(text), standing).w2c[1:])
    record = json.loads(text)
    record["lyra2"]["before"] = {"R": [0, 0, 0, 0], "T": [0, 0, 0], "fov": 42}
    with pytest.raises(ValueError, match="lyra2.before: R is the zero quaternion"):
        camera_files.load_camera_path(json.dumps(record))


def test_a_long_way_becomes_at_most_a_hundred_keys_and_ends_where_it_ended():
    cameras = presets.preset("horizontal_zoom", pinhole(SIZE, 80.0), 2001, 5.0, "right", 0.5)
    plan = next_path.read(next_path.text_of(cameras))
    assert len(plan.path.keys) <= 100 and plan.frames == 2001
    assert_close(plan.path.keys[-1].c2w, cameras.c2w[-1, :3], atol=1e-5, rtol=0)


def test_cameras_are_moved_as_a_whole_and_not_at_all_where_they_begin_there():
    cameras = presets.preset("orbit_horizontal", pinhole(SIZE, 80.0), 9, 5.0, "left", 0.5)
    assert next_path.moved_to(cameras, cameras[0]) is cameras
    elsewhere = presets.preset("rotate_spot", pinhole(SIZE, 80.0), 2, 5.0, "left", 90.0)[1:]
    moved = next_path.moved_to(cameras, elsewhere)
    assert_close(moved.w2c[0], elsewhere.w2c[0])
    step = lambda c: c.w2c[1:] @ torch.linalg.inv(c.w2c[:-1])  # noqa: E731
    assert_close(step(moved), step(cameras), atol=1e-5, rtol=0)


def test_an_empty_text_plans_nothing():
    for text in ("", "  \n", '{"path": []}', '{"path": [], "lyra2": {"frames": 161}}'):
        plan = next_path.read(text)
        assert plan.path is None and plan.chunks == 0
        standing = pinhole(SIZE, 80.0)
        assert next_path.cameras_of(plan, standing) is standing


def test_the_lens_of_the_standing_camera_is_kept_but_for_its_length():
    standing = pinhole(SIZE, 80.0)
    standing.K[0, 0, 0], standing.K[0, 0, 2], standing.K[0, 1, 2] = 90.0, 40.0, 35.0
    keys = tuple(replace(key(0, i, fov=30.0), timestamp=i + 1.0) for i in range(3))
    cameras = next_path.cameras_of(next_path.NextPath(CameraPath(keys, through_keys=True), frames=9), standing)
    plain = path_cameras(CameraPath(keys, through_keys=True), SIZE, 9)
    assert_close(cameras.fov[1:], plain.fov[1:])
    assert_close(cameras.K[1:, 0, 0] / cameras.K[1:, 1, 1], torch.full((8,), 90 / 80))
    assert isinstance(cameras, Cameras) and cameras.K[:, 0, 2].eq(40).all() and cameras.K[:, 1, 2].eq(35).all()
