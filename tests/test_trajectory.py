import math

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras import camera_path, presets
from lyra_core.cameras import trajectory as tr
from lyra_core.cameras.camera import Cameras, check, join, pinhole, quaternion_to_rotation, unproject

SIZE = (48, 64)


def wander(frames=21, seed=0, size=SIZE):
    """A smooth path that turns, climbs and zooms."""
    generator = torch.Generator().manual_seed(seed)
    knots = torch.randn(4, 8, generator=generator)
    t = torch.linspace(0, 1, frames)
    curve = torch.stack([torch.ones_like(t), t, t ** 2, t ** 3], 1) @ knots
    q = torch.nn.functional.normalize(curve[:, :4] * 0.3 + torch.tensor([2.0, 0, 0, 0]), dim=1)
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, :3, :3], w2c[:, :3, 3] = quaternion_to_rotation(q), curve[:, 4:7]
    cameras = pinhole(size, 60.0, frames)
    K = cameras.K.clone()
    K[:, (0, 1), (0, 1)] *= torch.linspace(1, 1.5, frames)[:, None]
    return check(Cameras(w2c, K, size))


def straight(frames, end):
    """From the origin to `end`, looking along +z."""
    cameras = pinhole(SIZE, 60.0, frames)
    w2c = cameras.w2c.clone()
    w2c[:, :3, 3] = -torch.linspace(0, 1, frames)[:, None] * torch.tensor(end, dtype=torch.float32)
    return Cameras(w2c, cameras.K, SIZE)


def key(x, y, z, yaw=0.0, fov=50.0, timestamp=0.0):
    c, s = math.cos(yaw), math.sin(yaw)
    return camera_path.PathKey(torch.tensor([[c, 0, s, x], [0, 1, 0, y], [-s, 0, c, z]]), fov, timestamp)


KEYS = (key(0, 0, 0), key(1, 0.2, 1, 0.5, 60), key(1.1, 0, 1.3, 1.5, 55), key(-2, 1, 3, 2.5, 40))


def path(**settings):
    return camera_path.spaced(camera_path.CameraPath(KEYS, **settings), 4.0)


def same(a, b, tolerance=1e-5):
    assert a.size == b.size
    assert_close(a.w2c, b.w2c, atol=tolerance, rtol=0)
    assert_close(a.K, b.K, atol=tolerance * 100, rtol=0)


def turns(c2w):
    """Radians between successive rotations, by the trace."""
    R = c2w[:, :3, :3].double()
    return (((R[:-1].mT @ R[1:]).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos()


# presets

START = Cameras(wander().w2c[5:6], wander().K[5:6], SIZE)


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("direction", presets.DIRECTIONS)
def test_every_preset_gives_rigid_cameras_that_begin_at_the_start(name, direction):
    cameras = check(presets.preset(name, START, 12, 3.0, direction, 0.3))
    assert len(cameras) == (23 if name.startswith("back") else 12)
    near_start = {"spiral_center": 0.2, "rotate_spot_noise": 1e-3}.get(name, 3e-3 if "noise" in name else 1e-5)
    assert (cameras.w2c[0] - START.w2c[0]).abs().max() < near_start


def test_there_are_27_presets_and_every_note_is_about_one():
    assert len(presets.PRESETS) == 27
    assert presets.PRESET_NOTES.keys() <= presets.PRESETS.keys() and presets.FOCAL_FACTORS.keys() <= presets.PRESETS.keys()


def test_a_preset_moves_as_the_start_camera_sees_the_world():
    at_origin = Cameras(torch.eye(4)[None], START.K, SIZE)
    moved, plain = (presets.preset("orbit_horizontal", start, 9, 2.0, "left", 0.8) for start in (START, at_origin))
    assert_close(moved.w2c, plain.w2c @ START.w2c)


def test_an_orbit_keeps_its_distance_and_looks_at_the_centre():
    cameras = presets.preset("orbit_vertical", pinhole(SIZE, 60), 15, 2.5, "up", 1.2)
    centre = torch.tensor([0, 0, 2.5])
    assert_close((cameras.centers - centre).norm(dim=1), torch.full((15,), 2.5))
    local = cameras.w2c @ torch.tensor([0, 0, 2.5, 1.0])
    assert_close(local[:, :3], centre.expand(15, 3), atol=1e-5, rtol=0)
    assert cameras.centers[-1, 1] < 0      # up is -y


def test_a_turn_on_the_spot_takes_its_strength_in_degrees():
    cameras = presets.preset("rotate_spot", pinhole(SIZE, 60), 11, 2.0, "right", 40.0)
    assert_close(turns(cameras.c2w).sum().item(), math.radians(40), atol=1e-4, rtol=0)
    assert cameras.centers.abs().max() == 0


@pytest.mark.parametrize("name, sign", [("rotate_zoom_in", 1), ("rotate_zoom_out", -1)])
def test_a_rotate_zoom_turns_by_20_degrees_and_then_moves(name, sign):
    cameras = presets.preset(name, pinhole(SIZE, 60), 12, 2.0, "left", 0.5)
    angle = turns(cameras.c2w)
    assert_close(angle[:5].sum().item(), math.radians(20), atol=1e-4, rtol=0)
    assert angle[5:].max() < 1e-3 and cameras.centers[:7].abs().max() < 1e-6
    assert_close(cameras.centers[-1].norm().item(), 1.0)
    assert cameras.centers[-1, 2] * sign > 0


def test_noise_depends_on_the_generator_alone_and_spares_the_way_itself():
    draws = [presets.preset("horizontal_noise", START, 9, 2.0, generator=torch.Generator().manual_seed(seed))
             for seed in (1, 1, 2)]
    assert torch.equal(draws[0].w2c, draws[1].w2c) and not torch.equal(draws[0].w2c, draws[2].w2c)
    local = presets.preset("horizontal_noise", pinhole(SIZE, 60), 9, 2.0)
    assert_close(local.centers[:, 0], torch.arange(9) * (0.4 / 9), atol=1e-6, rtol=0)
    assert 0 < local.centers[:, 1:].abs().max() < 1e-3


def test_the_simple_presets_slide_to_where_their_name_says_without_turning():
    for name, direction, way in (
            ("horizontal_simple", "right", (1, 0, 0)), ("horizontal_simple", "left", (-1, 0, 0)),
            ("vertical_simple", "up", (0, -1, 0)), ("vertical_simple", "down", (0, 1, 0))):
        cameras = presets.preset(name, pinhole(SIZE, 60), 9, 2.0, direction, 0.5)
        assert_close(cameras.centers[-1], torch.tensor(way, dtype=torch.float32))
        assert_close(cameras.w2c[:, :3, :3], torch.eye(3).expand(9, 3, 3))


def test_a_bent_zoom_sags_by_a_fixed_share_of_its_way():
    for direction, share in (("right", 0.04), ("left", 0.12)):
        centers = presets.preset("horizontal_zoom_bend", pinhole(SIZE, 60), 9, 2.0, direction, 0.5).centers
        assert_close(centers[:, 1], share * centers[:, 2], atol=1e-6, rtol=0)


def test_dolly_zoom_alone_changes_the_lens():
    changed = {name for name in presets.PRESETS if not torch.equal(
        presets.preset(name, START, 6, 3.0).K, START.K.repeat(11 if name.startswith("back") else 6, 1, 1))}
    assert changed == {"dolly_zoom"}


@pytest.mark.parametrize("wrong, says", [
    (dict(name="sideways"), "no preset 'sideways'"), (dict(direction="forward"), "no direction 'forward'"),
    (dict(frames=1), "1 frames"), (dict(center_depth=0.0), "depth 0"), (dict(center_depth=math.nan), "depth nan"),
    (dict(start=wander()), "21 cameras"), (dict(strength=math.inf), "NaN or infinite")])
def test_a_preset_refuses_what_it_cannot_do(wrong, says):
    asked = dict(name="horizontal", start=START, frames=9, center_depth=2.0, direction="left", strength=0.2)
    with pytest.raises(ValueError, match=says):
        presets.preset(**asked | wrong)


# zoom

def slope():
    return torch.linspace(2, 10, SIZE[0])[:, None].expand(SIZE).clone()


def test_the_center_depth_is_a_quantile_of_what_is_known():
    depth = torch.arange(1.0, 10.0).view(3, 3)
    assert tr.center_depth(depth) == 3.0
    assert tr.center_depth(depth, quantile=0.3) == pytest.approx(3.4)
    depth[0] = torch.tensor([0.0, math.nan, 2000.0])
    assert tr.center_depth(depth) == 5.25
    assert tr.center_depth(depth, valid=depth == 8) == 8.0
    with pytest.raises(ValueError, match="none of the 9 pixels"):
        tr.center_depth(torch.zeros(3, 3))


def test_a_zoom_goes_in_and_out_along_the_view_and_rises_only_on_the_way_back():
    start = pinhole(SIZE, 60)
    d = tr.center_depth(slope())
    into, out = (tr.zoom(start, slope(), way, 0.5, 11, upward_ratio=0.2) for way in ("in", "out"))
    assert_close(into.centers[-1], torch.tensor([0, 0, 0.5 * d * 10 / 11]))
    assert_close(out.centers[-1], torch.tensor([0, -0.2, -1.0]) * (0.5 * d * 10 / 11))


def test_a_zoom_is_the_same_wherever_the_start_camera_stands():
    normal = torch.tensor([0.1, -1.0, -0.2])
    asked = dict(depth=slope(), direction="out", strength=1.0, frames=11, upward_ratio=0.2, ground_normal=normal,
                 upward_shift=0.1)
    at_origin = tr.zoom(Cameras(torch.eye(4)[None], START.K, SIZE), **asked)
    assert_close(tr.zoom(START, **asked).w2c, at_origin.w2c @ START.w2c)


def test_motion_along_the_ground_keeps_its_length_and_leaves_the_ground_by_the_shift_alone():
    normal = torch.nn.functional.normalize(torch.tensor([0.1, -1.0, -0.2]), dim=0)
    plain = tr.zoom(pinhole(SIZE, 60), slope(), "out", 1.0, 11)
    flat = tr.along_ground(plain, normal)
    assert_close(flat.centers @ normal, torch.zeros(11), atol=1e-5, rtol=0)
    assert_close(flat.centers.norm(dim=1), plain.centers.norm(dim=1))
    lifted = tr.along_ground(plain, normal, upward_shift=0.3)
    assert_close(lifted.centers @ normal, torch.linspace(0, 0.3, 11), atol=1e-5, rtol=0)


def test_the_ground_is_found_among_clutter_and_points_up():
    camera = pinhole((60, 80), 70.0)
    normal = torch.nn.functional.normalize(torch.tensor([0.05, -1.0, -0.2]), dim=0)
    rays = unproject(torch.ones(1, 60, 80), camera)[0]
    depth = (-1.5 / (rays @ normal)).clamp(0.1, 50)
    depth[40:, 10:25] *= 0.5                                                  # a box in the way
    depth *= 1 + 0.01 * torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    found = tr.ground_normal(depth, camera.K[0])
    assert torch.rad2deg(torch.acos((found @ normal).clamp(max=1))) < 2
    assert found[1] < 0


def test_there_is_no_ground_where_nothing_is_known():
    assert tr.ground_normal(torch.zeros(60, 80), pinhole((60, 80), 70).K[0]) is None


# paths through keyframes

def keys_of(p):
    return torch.stack([k.c2w for k in p.keys]), torch.tensor([k.fov for k in p.keys])


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("settings", [dict(spline_order=1), dict(through_keys=True)])
def test_a_curve_through_the_keys_meets_every_one(settings, loop):
    p = path(loop=loop, **settings)
    at_keys = torch.arange(4) / (4 if loop else 3)
    c2w, fov = camera_path.evaluate(p, at_keys)
    assert_close(c2w[:, :3], keys_of(p)[0], atol=2e-5, rtol=0)
    assert_close(fov, keys_of(p)[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("order", [2, 3])
def test_a_b_spline_cuts_corners_but_is_held_to_its_ends(order):
    p = path(spline_order=order)
    c2w, _ = camera_path.evaluate(p, torch.tensor([1 / 3]))
    assert (c2w[0, :3, 3] - KEYS[1].c2w[:, 3]).norm() > 0.03
    cameras = camera_path.path_cameras(p, SIZE, 30)
    assert_close(cameras.c2w[[0, -1], :3], keys_of(p)[0][[0, -1]], atol=1e-5, rtol=0)
    assert_close(cameras.fov[[0, -1]].rad2deg(), keys_of(p)[1][[0, -1]], atol=1e-3, rtol=0)


@pytest.mark.parametrize("settings", [dict(spline_order=1), dict(spline_order=3), dict(through_keys=True)])
def test_a_turn_past_half_a_circle_goes_the_short_way(settings):
    p = camera_path.spaced(camera_path.CameraPath(tuple(key(0, 0, i, 2.9 + 0.2 * i) for i in range(4)), **settings), 1)
    c2w, _ = camera_path.evaluate(p, torch.linspace(0, 1, 31))
    assert turns(c2w).sum() < 0.61 and turns(c2w).max() < 0.04


def test_the_curve_through_the_keys_has_no_kink():
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    c2w, _ = camera_path.evaluate(path(through_keys=True), t)
    direction = torch.nn.functional.normalize(c2w[::10, :3, 3].diff(dim=0), dim=1)
    assert (direction[1:] * direction[:-1]).sum(1).min() > 0.98
    rate = turns(c2w[::10])
    assert (rate.diff().abs() < 0.15 * rate.max()).all()


def test_keys_on_one_spot_leave_the_curve_there():
    keys = key(0, 0, 0), key(1, 0, 0), key(1, 0, 0, 1.5), key(2, 0, 0, 1.5)
    p = camera_path.spaced(camera_path.CameraPath(keys, through_keys=True), 1)
    c2w, fov = camera_path.evaluate(p, torch.linspace(1 / 3, 2 / 3, 20))
    assert (c2w[:, :3, 3] - torch.tensor([1.0, 0, 0])).norm(dim=1).max() < 0.1
    assert_close(fov, torch.full((20,), 50.0))


def test_one_key_and_two_keys_make_paths_too():
    for keys in (KEYS[:1], KEYS[:2]):
        for through in (True, False):
            cameras = camera_path.path_cameras(camera_path.CameraPath(keys, through_keys=through), SIZE, 7)
            assert len(check(cameras)) == 7
            assert_close(cameras.c2w[0, :3], KEYS[0].c2w, atol=1e-5, rtol=0)


def test_resampling_by_arc_length_makes_even_steps():
    steps = camera_path.path_cameras(path(), SIZE, 60, "arc length").centers.diff(dim=0).norm(dim=1)
    assert steps.max() / steps.min() < 1.05


def test_uniform_motion_does_not_rush_a_turn_on_the_spot():
    p = camera_path.spaced(camera_path.CameraPath((key(0, 0, 0), key(0, 0, 2), key(0, 0, 2, 1.5), key(2, 0, 2, 1.5)), 1), 4.0)
    rushed, even = (turns(camera_path.path_cameras(p, SIZE, 61, by, holds=0).c2w).max()
                    for by in ("arc length", "uniform motion"))
    assert rushed > 0.7          # most of a right angle from one frame to the next
    assert even < 0.06


def test_uniform_motion_weighs_travel_by_the_given_scale():
    p = camera_path.spaced(camera_path.CameraPath((key(0, 0, 0), key(0, 0, 4), key(0, 0, 4, 1.0)), 1), 3.0)
    t = camera_path.resample(p, 101, scale=4.0)       # the travel is worth one radian, as is the turn
    assert int((t < 0.5).sum()) in (50, 51)


def test_timing_is_kept_on_request():
    stamped = camera_path.CameraPath((key(0, 0, 0, timestamp=1), key(0, 0, 1, timestamp=2), key(0, 0, 9, timestamp=5)), 1)
    assert_close(camera_path.resample(stamped, 5, "time"), torch.linspace(0, 1, 5, dtype=torch.float64))
    c2w, _ = camera_path.evaluate(stamped, torch.tensor([0.25, 0.5, 1.0]))
    assert_close(c2w[:, 2, 3], torch.tensor([0.5, 1.0, 9.0]))       # times 0.5, 1 and 2 of stamps 1, 2


def test_a_path_of_cameras_leads_through_them():
    cameras = Cameras(wander().w2c, pinhole(SIZE, 60.0, 21).K, SIZE)
    again = camera_path.path_cameras(camera_path.path_of(cameras), SIZE, 21, "time")
    same(again, cameras, 2e-5)


@pytest.mark.parametrize("make, says", [
    (lambda: camera_path.CameraPath(()), "0 keys"), (lambda: camera_path.CameraPath(KEYS, 4), "order 4"),
    (lambda: camera_path.evaluate(camera_path.CameraPath((key(0, 0, 0, timestamp=2), key(0, 0, 1, timestamp=1), key(0, 0, 2))),
                         torch.zeros(1)), "must not decrease"),
    (lambda: camera_path.resample(path(), 1), "1 frames"), (lambda: camera_path.resample(path(), 9, "luck"), "'luck'")])
def test_impossible_paths_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# edits

def test_reversing_twice_changes_nothing():
    cameras = wander()
    back = tr.reverse(cameras)
    assert torch.equal(back.w2c[0], cameras.w2c[-1]) and torch.equal(back.K[0], cameras.K[-1])
    assert torch.equal(tr.reverse(back).w2c, cameras.w2c)


def test_scaling_moves_the_centres_and_turns_nothing():
    cameras = wander()
    first = cameras.centers[0]
    for about, fixed in (("first centre", first), ("origin", torch.zeros(3))):
        scaled = tr.scale(cameras, 1.7, about)
        assert_close(scaled.centers, fixed + 1.7 * (cameras.centers - fixed), atol=1e-5, rtol=1e-5)
        assert torch.equal(scaled.w2c[:, :3, :3], cameras.w2c[:, :3, :3])
    assert_close(tr.scale(tr.scale(cameras, 4.0), 0.25).w2c, cameras.w2c, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="'me'"):
        tr.scale(cameras, 2.0, "me")


def test_retiming_keeps_what_it_passes_and_comes_back():
    cameras = wander(21)
    slow = tr.retime(cameras, 41)
    assert torch.equal(slow.w2c[::2], cameras.w2c)
    same(tr.retime(slow, 21), cameras)
    check(slow)
    halfway = slow[1]
    assert_close(halfway.centers[0], (cameras.centers[0] + cameras.centers[1]) / 2, atol=1e-6, rtol=0)
    both = turns(join(cameras[0], halfway, cameras[1]).c2w)
    assert_close(both[0], both[1], atol=1e-3, rtol=0)
    assert_close(halfway.K[0], (cameras.K[0] + cameras.K[1]) / 2)


def test_one_camera_retimed_stands_still():
    assert torch.equal(tr.retime(START, 3).w2c, START.w2c.expand(3, 4, 4))


def test_retiming_by_uniform_motion_evens_out_a_stop():
    cameras = straight(11, (0, 0, 1))
    stopping = join(cameras[0:6], cameras[[5] * 20], cameras[6:])
    steps = tr.retime(stopping, 31, "uniform motion").centers.diff(dim=0).norm(dim=1)
    assert_close(steps, torch.full((30,), 1 / 30), atol=1e-4, rtol=0)


@pytest.mark.parametrize("frames, padded", [(1, 1), (2, 9), (8, 9), (9, 9), (10, 17)])
def test_padding_fills_whole_chunks_and_only_appends(frames, padded):
    cameras = wander(25)[:frames]
    hold, stretch = (tr.pad_to_chunks(cameras, 8, how) for how in ("hold", "stretch"))
    assert len(hold) == len(stretch) == padded
    assert torch.equal(hold.w2c[:frames], cameras.w2c)
    assert torch.equal(hold.w2c[frames:], cameras.w2c[-1:].expand(padded - frames, 4, 4))
    same(stretch[[0, -1]], cameras[[0, -1]])


def test_chaining_keeps_both_motions_and_has_the_seam_once():
    first, second = wander(9, 1), wander(7, 2)
    chained = tr.chain(first, second)
    assert len(chained) == 15
    assert torch.equal(chained.w2c[:9], first.w2c)
    relative = [c.w2c[1:] @ torch.linalg.inv(c.w2c[:-1]) for c in (chained[8:], second)]
    assert_close(relative[0], relative[1], atol=1e-5, rtol=0)
    assert len(tr.chain(first, second[0])) == 9


def test_edits_refuse_what_they_do_not_know():
    for call in (lambda: tr.pad_to_chunks(wander(), 8, "loop"), lambda: tr.retime(wander(), 0),
                 lambda: tr.retime(wander(), 5, "luck"),
                 lambda: tr.guard(wander(), torch.zeros(1, 3), 0.1, "jump"),
                 lambda: tr.guard(wander(), torch.zeros(1, 3), 0.0)):
        with pytest.raises(ValueError):
            call()


# guard

def brute_force_gap(cameras, points, between=40):
    """Smallest distance of densely sampled positions to the points."""
    centers = tr.retime(cameras, (len(cameras) - 1) * between + 1).centers
    return min(float((points - center).norm(dim=1).min()) for center in centers)


@pytest.mark.parametrize("how", ["shorten", "hold"])
@pytest.mark.parametrize("seed", range(8))
def test_a_guarded_path_never_comes_nearer_than_the_clearance_and_goes_as_far_as_it_can(seed, how):
    cameras = wander(25, seed)
    generator = torch.Generator().manual_seed(seed)
    points = cameras.centers[0] + 2.0 * torch.randn(60, 3, generator=generator)
    clearance = 0.4
    guarded, report = tr.guard(cameras, points, clearance, how)
    limit = min(clearance, float((points - cameras.centers[0]).norm(dim=1).min()))
    assert len(guarded) == len(cameras) == report.frames
    assert brute_force_gap(guarded, points) > limit * 0.999
    assert report.nearest == pytest.approx(float(torch.cdist(guarded.centers, points).min()), rel=1e-3)
    assert report.changed == (brute_force_gap(cameras, points) < limit * 0.999)
    if report.changed:
        assert report.safe_fraction < 1
        end = (points - guarded.centers[-1]).norm(dim=1).min()
        assert end == pytest.approx(limit, rel=1e-3)         # one step on, it would be too near
    else:
        assert guarded is cameras and report.safe_fraction == 1


def test_a_zoom_towards_an_obstacle_in_the_middle_stops_before_it():
    depth = torch.full(SIZE, 8.0)
    depth[14:34, 20:44] = 1.0
    start = pinhole(SIZE, 60.0)
    cameras = tr.zoom(start, depth, "in", 0.5, 41)
    assert cameras.centers[-1, 2] > 1.0         # unguarded it would go through
    points = unproject(depth[None], start)[0].reshape(-1, 3)
    for how in ("shorten", "hold"):
        guarded, report = tr.guard(cameras, points, 0.3, how)
        assert 0.6 < guarded.centers[-1, 2] < 0.7 + 0.01
        assert report.changed and f"{report.safe_fraction:.0%}" in str(report)
    assert torch.equal(guarded.w2c[:report.at_frame + 1], cameras.w2c[:report.at_frame + 1])


def test_shortening_takes_the_whole_time_and_holding_waits():
    cameras = straight(11, (0, 0, 10))
    wall = torch.tensor([[0, 0, 6.0]])
    short, report = tr.guard(cameras, wall, 1.0, "shorten")
    held, _ = tr.guard(cameras, wall, 1.0, "hold")
    assert report.safe_fraction == pytest.approx(0.5, abs=1e-3) and report.at_frame in (4, 5)
    assert_close(short.centers[:, 2], torch.linspace(0, 5, 11), atol=1e-2, rtol=0)
    assert_close(held.centers[:, 2], torch.arange(11.0).clamp(max=5), atol=1e-2, rtol=0)


def test_a_start_that_is_too_near_may_leave_but_not_come_nearer():
    near = torch.tensor([[0, 0, 0.1]])
    _, leaving = tr.guard(straight(11, (0, 0, -3)), near, 0.5)
    assert not leaving.changed
    # having left, it may pass other things as closely as it began
    _, passing = tr.guard(straight(11, (0, 0, -3)), torch.cat([near, torch.tensor([[0.3, 0, -2]])]), 0.5)
    assert not passing.changed
    approaching, report = tr.guard(straight(11, (0, 0, 3)), near, 0.5)
    assert report.changed and approaching.centers.abs().max() < 1e-3


def test_a_point_between_two_far_apart_cameras_counts():
    _, report = tr.guard(straight(2, (0, 0, 10)), torch.tensor([[0.1, 0, 5.0]]), 0.5)
    assert report.changed and 0.4 < report.safe_fraction < 0.5


def test_a_path_through_the_unknown_is_left_alone():
    cameras = wander()
    guarded, report = tr.guard(cameras, torch.full((4, 3), math.nan), 0.5)
    assert guarded is cameras and report.nearest == math.inf and "nothing is known" in str(report)
