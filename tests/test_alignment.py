"""A network's answer becomes gaussians in the given world, and chunks of a long video become one world."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pixel_grid, project, quaternion_to_rotation, to_corner_origin
from lyra_core.memory.depth_alignment import similarity as umeyama
from lyra_core.splats.alignment import (
    ENOUGH,
    LEAST,
    PER_FRAME,
    Similarity,
    align,
    disagreement,
    evenly,
    fit_chunk,
    fit_points,
    in_world,
    inverse_depth_weights,
    on_all_frames,
    owned,
    same_pixels,
    seen_from_first,
    split_chunks,
    uniform_chunks,
)
from lyra_core.splats.gaussian_adapter import LARGEST, from_head, nearest, turned_sh
from lyra_core.splats.gaussians import Gaussians

GRID = (6, 8)
SIZE = (12, 16)


@pytest.fixture
def random():
    return np.random.default_rng(7)


def tensor(values):
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def cameras_from(R, centers, size=SIZE, focal=14.0):
    """Cameras, float64, of camera-to-world rotations (F, 3, 3) and centres (F, 3); the principal point is off the middle."""
    R, centers = tensor(R), tensor(centers)
    w2c = torch.eye(4, dtype=torch.float64).repeat(len(R), 1, 1)
    w2c[:, :3, :3] = R.mT
    w2c[:, :3, 3] = -(R.mT @ centers[..., None]).squeeze(-1)
    K = tensor([[focal, 0, size[1] / 2 - 1.2], [0, 1.1 * focal, size[0] / 2 + 0.3], [0, 0, 1]])
    return Cameras(w2c, K.repeat(len(R), 1, 1), size)


def wandering(random, frames, size=SIZE):
    """A path without symmetry."""
    turns = Rotation.from_rotvec(random.normal(0, 0.4, (frames, 3))).as_matrix()
    return cameras_from(turns, random.normal(0, 1, (frames, 3)), size)


def similarity(random, scale=1.7):
    R = Rotation.from_rotvec(random.normal(0, 1, 3)).as_matrix()
    return Similarity(scale, tensor(R), tensor(random.normal(0, 2, 3)))


def head(random, frames, grid=GRID, size=SIZE):
    """What a network might say: raw, density, depth; no distance is negative."""
    raw = random.normal(0, 1, (frames, *grid, 37))
    raw[..., -1] *= 0.1
    return tensor(raw), tensor(random.uniform(0, 1, (frames, *grid))), tensor(random.uniform(1, 3, (frames, *size)))


def silent(frames, grid=GRID):
    """A head that corrects nothing."""
    raw = torch.zeros(frames, *grid, 37, dtype=torch.float64)
    raw[..., 5] = 1
    return raw


def degrees_between(a, b):
    return math.degrees(float(np.linalg.norm(Rotation.from_matrix((a.mT @ b).numpy()).as_rotvec())))


def assert_same_similarity(found, expected, tolerance=1e-9):
    assert_close(found.R, expected.R, atol=tolerance, rtol=0)
    assert_close(found.t, expected.t, atol=tolerance, rtol=0)
    assert found.scale == pytest.approx(expected.scale, rel=tolerance)


# ---------------------------------------------------------------------------------------------------------- the adapter


def test_a_silent_head_puts_every_gaussian_on_its_pixel_at_the_depth_as_distance(random):
    views, depth = wandering(random, 3), tensor(random.uniform(1, 3, (3, *SIZE)))
    found = from_head(silent(3, SIZE), torch.ones(3, *SIZE), depth, views)
    for i, means in enumerate(found.means.view(3, -1, 3)):
        pixels, z = project(means, views[i])
        assert_close(pixels[0].view(*SIZE, 2), pixel_grid(SIZE)[..., :2].double(), atol=1e-5, rtol=0)
        assert (z > 0).all()
        assert_close((means - views.centers[i]).norm(dim=1), depth[i].flatten())


def test_the_first_two_numbers_move_a_gaussian_by_pixels_of_the_grid(random):
    views, raw = wandering(random, 2, GRID), silent(2)
    raw[..., 0], raw[..., 1] = 0.75, -1.5
    found = from_head(raw, torch.ones(2, *GRID), torch.ones(2, *GRID, dtype=torch.float64), views)
    pixels, _ = project(found.means.view(2, -1, 3)[1], views[1])
    expected = pixel_grid(GRID)[..., :2].double() + tensor([0.75, -1.5])
    assert_close(pixels[0].view(*GRID, 2), expected, atol=1e-5, rtol=0)


def test_every_gaussian_is_what_the_formulas_say_of_it_alone(random):
    views, (raw, density, depth) = wandering(random, 2), head(random, 2)
    found = from_head(raw, density, depth, views, largest=45.0)
    corner, c2w = to_corner_origin(views.K).numpy(), views.c2w.numpy()
    number = 0
    for f in range(2):
        normalized = corner[f] / np.array([[SIZE[1]], [SIZE[0]], [1]])
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                said = raw[f, row, column].numpy()
                z = depth[f, 2 * row, 2 * column].item() + said[36]
                place = [(column + 0.5 + said[0]) / GRID[1], (row + 0.5 + said[1]) / GRID[0], 1]
                ray = np.linalg.solve(normalized, place)
                mean = c2w[f, :3, 3] + c2w[f, :3, :3] @ ray / np.linalg.norm(ray) * z
                pixel = 0.1 * (np.linalg.inv(normalized[:2, :2]) @ [1 / GRID[1], 1 / GRID[0]]).sum()
                sizes = (1e-5 + (45 - 1e-5) / (1 + np.exp(-said[2:5]))) * z * pixel
                local = Rotation.from_quat(said[[8, 5, 6, 7]])  # scalar last
                world = (Rotation.from_matrix(c2w[f, :3, :3]) * local).as_quat(canonical=True)
                assert_close(found.means[number], tensor(mean))
                assert_close(found.scales[number], tensor(sizes))
                assert_close(found.quats[number], tensor(world))
                assert found.opacities[number] == density[f, row, column]
                number += 1
    assert len(found) == number


def test_depth_and_its_correction_are_divided_by_the_scale(random):
    views, (raw, density, depth) = wandering(random, 2), head(random, 2)
    larger = raw.clone()
    larger[..., 36] *= 4
    found, expected = from_head(larger, density, 4 * depth, views, scale=4.0), from_head(raw, density, depth, views)
    assert_close(found.means, expected.means)
    assert_close(found.scales, expected.scales)


def test_moving_the_cameras_moves_places_sizes_and_colours_like_gaussians(random):
    views, (raw, density, depth) = wandering(random, 2), head(random, 2)
    motion = similarity(random, 1.0)
    found = from_head(raw, density, depth, motion.cameras(views))
    expected = motion.gaussians(from_head(raw, density, depth, views))
    for field in ("means", "scales", "sh", "opacities"):
        assert_close(getattr(found, field), getattr(expected, field))


def test_single_precision_is_kept(random):
    views = wandering(random, 2)
    views = replace(views, w2c=views.w2c.float(), K=views.K.float())
    found = from_head(*(part.float() for part in head(random, 2)), views)
    assert {getattr(found, field).dtype for field in ("means", "quats", "scales", "sh")} == {torch.float32}


def harmonics(directions):
    """The nine functions (N, 9) of 3DGS viewers, from their own constants."""
    x, y, z = directions.unbind(-1)
    one, two = 0.4886025119029199, 1.0925484305920792
    rows = [torch.full_like(x, 0.28209479177387814), -one * y, one * z, -one * x, two * x * y, -two * y * z]
    rows += [0.31539156525252005 * (2 * z * z - x * x - y * y), -two * x * z, 0.5462742152960396 * (x * x - y * y)]
    return torch.stack(rows, -1)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_turned_gaussian_shows_each_direction_what_it_showed_before(random, count):
    sh, directions = tensor(random.normal(0, 1, (5, count, 3))), tensor(random.normal(0, 1, (20, 3)))
    directions = torch.nn.functional.normalize(directions, dim=-1)
    R = tensor(Rotation.random(5, random_state=3).as_matrix())
    turned = turned_sh(sh, R)
    for i in range(5):
        after = harmonics(directions @ R[i].mT)[:, :count] @ turned[i]
        assert_close(after, harmonics(directions)[:, :count] @ sh[i])


def test_more_than_nine_harmonics_are_refused():
    with pytest.raises(ValueError, match="16 spherical harmonics"):
        turned_sh(torch.zeros(2, 16, 3), torch.eye(3))


def test_higher_bands_count_little_and_the_plain_colour_fully(random):
    raw = silent(1)
    raw[..., 9:36] = 1
    still = cameras_from(np.eye(3)[None], np.zeros((1, 3)))
    found = from_head(raw, torch.ones(1, *GRID), torch.ones(1, *SIZE, dtype=torch.float64), still).sh
    expected = tensor([1] + 3 * [0.025] + 5 * [0.00625])[:, None].expand(9, 3)
    assert_close(found, expected.expand_as(found))


def test_the_harmonics_come_colour_by_colour(random):
    raw = silent(1)
    raw[..., [9, 18, 27]] = tensor([1, 2, 3])
    found = from_head(raw, torch.ones(1, *GRID), torch.ones(1, *SIZE, dtype=torch.float64), wandering(random, 1)).sh
    assert_close(found[:, 0], tensor([1, 2, 3]).expand(len(found), 3))
    assert_close(found[:, 1:], torch.zeros_like(found[:, 1:]))


def test_nearest_takes_depth_and_never_mixes_it():
    depth = torch.arange(2 * 6 * 8.0).view(2, 6, 8)
    assert_close(nearest(depth, (3, 2)), depth[:, [0, 2, 4]][:, :, [0, 4]])
    assert_close(nearest(depth, (4, 3)), depth[:, [0, 1, 3, 4]][:, :, [0, 2, 5]])
    with pytest.raises(ValueError, match="finer than the depth"):
        nearest(depth, (12, 8))


def test_another_grid_sees_the_same_area(random):
    views, points = wandering(random, 1), tensor(random.normal(0, 1, (9, 3)))
    pixels, coarse = project(points, views)[0], project(points, views.resized((3, 8)))[0]
    assert_close(coarse + 0.5, (pixels + 0.5) * tensor([0.5, 0.25]))


@pytest.mark.parametrize("broken", ["raw", "density", "depth", "cameras"])
def test_answers_that_do_not_fit_each_other_are_refused(random, broken):
    raw, density, depth = head(random, 3)
    parts = {"raw": raw, "density": density, "depth": depth, "cameras": wandering(random, 3)}
    parts[broken] = parts[broken][..., :-1] if broken == "raw" else parts[broken][:2]
    with pytest.raises(ValueError, match=r"must be \(F, h, w, 37\)|don't fit"):
        from_head(**parts)


# -------------------------------------------------------------------------------------------------------- similarities


def test_the_inverse_leads_back(random):
    there, points = similarity(random), tensor(random.normal(0, 1, (9, 3)))
    assert_close(there.inverse.points(there.points(points)), points)
    assert_same_similarity(there.inverse.inverse, there)


def test_moved_cameras_see_moved_points_at_the_same_pixels(random):
    views, points, motion = wandering(random, 4), tensor(random.normal(0, 1, (9, 3))), similarity(random, 3.0)
    pixels, z = project(points, views)
    moved, moved_z = project(motion.points(points), motion.cameras(views))
    assert_close(moved, pixels, atol=1e-5, rtol=1e-5)
    assert_close(moved_z, 3 * z)
    assert_close(motion.cameras(views).centers, motion.points(views.centers))


def test_moved_gaussians_have_moved_covariances(random):
    count, motion = 7, similarity(random, 2.5)
    parts = (random.normal(0, 1, (count, size)) for size in (3, 4))
    means, quats = (tensor(part) for part in parts)
    before = Gaussians(
        means, quats, tensor(random.uniform(1, 2, (count, 3))), torch.ones(count), torch.zeros(count, 1, 3)
    )
    after = motion.gaussians(before)

    def covariance(gaussians):
        axes = quaternion_to_rotation(gaussians.quats) * gaussians.scales[:, None]
        return axes @ axes.mT

    assert_close(covariance(after), 2.5**2 * motion.R @ covariance(before) @ motion.R.mT)
    assert_close(after.means, motion.points(means))
    assert (after.quats[:, 0] >= 0).all()
    assert after.opacities is before.opacities


# ---------------------------------------------------------------------------------------------------- cameras to cameras


@pytest.mark.parametrize("how", ["orientation", "centers"])
def test_the_similarity_between_two_worlds_is_found_again(random, how):
    given, motion = wandering(random, 12), similarity(random)
    assert_same_similarity(align(given, motion.cameras(given), how), motion)


PATHS = {
    "dolly": lambda u: (0 * u, 0 * u, 0 * u, 3 * u),
    "pure rotation": lambda u: (u, 0 * u, 0 * u, 0 * u),
    "loop": lambda u: (2 * np.pi * u, np.sin(2 * np.pi * u), 0.1 * np.sin(4 * np.pi * u), np.cos(2 * np.pi * u)),
    "arc": lambda u: (0.8 * u, np.sin(u), 0.2 * u, np.cos(u)),
}
# path, noise of the predicted centres as a share of the path, noise of its rotations in degrees, whether centres fail
CASES = [
    ("dolly", 0.0, 0.0, True),
    ("dolly", 0.002, 0.1, True),
    ("pure rotation", 0.0, 0.0, True),
    ("pure rotation", 0.002, 0.1, True),
    ("loop", 0.0, 0.0, False),
    ("loop", 0.01, 0.1, True),
    ("arc", 0.0, 0.0, False),
    ("arc", 0.01, 0.1, True),
]


def path(name, random, frames=40):
    """Cameras of a path, turned about a random axis near the vertical."""
    yaw, x, y, z = PATHS[name](np.linspace(0, 1, frames))
    return cameras_from(
        Rotation.from_rotvec(np.stack([0.1 * yaw, yaw, 0 * yaw], 1)).as_matrix(), np.stack([x, y, z], 1)
    )


def predicted(given, motion, random, apart, degrees):
    """What a network sees of given cameras: another world, with noise."""
    seen = motion.cameras(given)
    turns = (
        seen.c2w[:, :3, :3].numpy()
        @ Rotation.from_rotvec(random.normal(0, math.radians(degrees), (len(seen), 3)) / math.sqrt(3)).as_matrix()
    )
    noise = random.normal(0, motion.scale * apart * 3 / math.sqrt(3), (len(seen), 3))
    return replace(cameras_from(turns, seen.centers.numpy() + noise), K=seen.K)


@pytest.mark.parametrize("name, apart, degrees, centers_fail", CASES)
def test_orientations_give_the_rotation_where_centres_do_not(name, apart, degrees, centers_fail):
    errors = {"orientation": [], "centers": []}
    for seed in range(20):
        random = np.random.default_rng(seed)
        given, motion = path(name, random), similarity(random)
        seen = predicted(given, motion, random, apart, degrees)
        for how, found in errors.items():
            scale = motion.scale if how == "orientation" and name == "pure rotation" else None
            found.append(degrees_between(align(given, seen, how, scale).R, motion.R))
    middle, worst = ({how: f(found) for how, found in errors.items()} for f in (np.median, max))
    print(f"{name}, noise {apart:.1%} {degrees:g} deg: degrees off, median and worst:", middle, worst)
    assert worst["orientation"] < 0.1
    assert (middle["centers"] > 0.1) == centers_fail
    if name in ("dolly", "pure rotation"):
        assert middle["centers"] > 10


@pytest.mark.parametrize("name", ["dolly", "loop", "arc"])
def test_the_scale_of_noisy_paths_is_within_a_percent(name):
    for seed in range(10):
        random = np.random.default_rng(seed)
        given, motion = path(name, random), similarity(random)
        found = align(given, predicted(given, motion, random, 0.002, 0.1))
        assert found.scale == pytest.approx(motion.scale, rel=0.01)


def test_a_scale_that_is_given_is_taken_and_the_middle_of_the_cameras_stays_where_it_is(random):
    given, motion = wandering(random, 9), similarity(random)
    found = align(given, motion.cameras(given), scale=5.0)
    assert found.scale == 5.0
    assert_close(found.points(given.centers.mean(0)), motion.points(given.centers.mean(0)))


def test_a_mirrored_guess_is_never_made(random):
    """Half a turn about each axis: the orthogonal matrix closest to all three is the point reflection."""
    given = wandering(random, 3)
    turns = Rotation.from_rotvec(math.pi * np.eye(3)).as_matrix()
    seen = cameras_from(turns @ given.c2w[:, :3, :3].numpy(), given.centers)
    assert torch.linalg.det(align(given, seen, scale=1.0).R) == pytest.approx(1)


def test_cameras_that_cannot_be_aligned_are_refused(random):
    given = wandering(random, 4)
    still = replace(given, w2c=cameras_from(given.c2w[:, :3, :3], np.ones((4, 3))).w2c)
    away = cameras_from(given.c2w[:, :3, :3], -given.centers)
    for arguments, reason in [
        ((given, given[:3]), "4 cameras can't be aligned to 3"),
        ((given[[]], given[[]]), "0 cameras"),
        ((given, given, "points"), "alignment 'points'"),
        ((given, given, "centers", 2.0), "scale of their own"),
        ((still, given), "stand still"),
        ((given, still), "factor of .*e-1"),
        ((given, away), "factor of -1"),
        ((given, given, "orientation", 0.0), "factor of 0"),
    ]:
        with pytest.raises(ValueError, match=reason):
            align(*arguments)


def test_the_reference_bends_a_straight_path_instead_of_failing(random):
    given, motion = path("dolly", random), similarity(random)
    seen = motion.cameras(given)
    found = align(given, seen, "centers")
    assert found.scale == pytest.approx(motion.scale, rel=1e-5)
    assert_close(found.points(given.centers), seen.centers, atol=1e-5, rtol=0)
    i = 2 * math.pi * np.arange(40)
    bend = 1e-6 * np.stack([np.sin(0.07 * i), np.cos(0.11 * i), np.sin(0.13 * i)], 1)
    _, R, _ = umeyama(given.centers.numpy() + bend, seen.centers.numpy() + bend)
    assert degrees_between(found.R, tensor(R)) < 0.1


def test_the_reference_never_shrinks_to_nothing(random):
    given = wandering(random, 5)
    onto_one_point = cameras_from(given.c2w[:, :3, :3], np.zeros((5, 3)))
    assert align(given, onto_one_point, "centers").scale >= LEAST


def test_disagreement_is_none_for_the_same_video_and_says_how_much_otherwise(random):
    given, motion = wandering(random, 6), similarity(random)
    seen = motion.cameras(given)
    assert disagreement(given, seen, motion) == pytest.approx((0, 0), abs=1e-9)
    twisted = cameras_from(
        seen.c2w[:, :3, :3].numpy() @ Rotation.from_rotvec([0, math.radians(5), 0]).as_matrix(),
        seen.centers + tensor([0.3, 0, 0.4]),
    )
    length = float(twisted.centers.diff(dim=0).norm(dim=1).sum())
    assert disagreement(given, twisted, motion) == pytest.approx((0.5 / length, 5))


def test_half_a_turn_is_180_degrees_and_a_target_without_length_is_infinitely_far(random):
    given, same = (
        cameras_from(np.eye(3)[None].repeat(2, 0), np.zeros((2, 3))),
        Similarity(1.0, torch.eye(3), torch.zeros(3)),
    )
    behind = cameras_from(np.diag([-1.0, 1, -1])[None].repeat(2, 0), np.ones((2, 3)))
    assert disagreement(given, behind, same) == pytest.approx((math.inf, 180))
    assert disagreement(given, given, same) == (0, 0)


def test_the_network_is_told_of_cameras_from_the_first_one_at_unit_distance(random):
    views = wandering(random, 6)
    told = seen_from_first(views)
    assert_close(told.w2c[0], torch.eye(4, dtype=torch.float64))
    away = told.centers.norm(dim=1).sort().values
    assert away[2] == pytest.approx(1)  # the lower of the two in the middle
    steps, expected = told.centers.diff(dim=0).norm(dim=1), views.centers.diff(dim=0).norm(dim=1)
    assert_close(steps / steps[0], expected / expected[0])
    assert_close(told.w2c[3, :3, :3] @ views.w2c[0, :3, :3], views.w2c[3, :3, :3])


def test_a_tiny_path_stays_tiny_for_the_network(random):
    views = cameras_from(np.eye(3)[None].repeat(3, 0), [[0, 0, 0], [0.004, 0, 0], [0.008, 0, 0]])
    assert_close(seen_from_first(views).centers[:, 0], tensor([0, 0.04, 0.08]))


def test_cameras_between_the_known_frames_lie_on_the_straight_line_and_the_arc(random):
    frames, total = [2, 5, 6, 11], 14
    views = wandering(random, 4)
    views = replace(views, K=views.K * tensor([1, 2, 3, 4])[:, None, None] / 4)
    found = on_all_frames(views, frames, total)
    times = np.clip(np.arange(total), 2, 11)
    expected = Slerp(frames, Rotation.from_matrix(views.c2w[:, :3, :3].numpy()))(times).as_matrix()
    assert_close(found.c2w[:, :3, :3], tensor(expected))
    for column in range(3):
        assert_close(found.centers[:, column], tensor(np.interp(times, frames, views.centers[:, column])))
    assert_close(found.K[:, 0, 0], tensor(np.interp(times, frames, views.K[:, 0, 0])))
    assert_close(found.w2c[frames], views.w2c, atol=0, rtol=0)


@pytest.mark.parametrize("frames", [[0, 1], [0, 2, 2], [3, 2, 1]])
def test_frames_that_do_not_grow_with_the_cameras_are_refused(random, frames):
    with pytest.raises(ValueError, match="one frame each"):
        on_all_frames(wandering(random, 3), frames, 9)


# ----------------------------------------------------------------------------------------------------------- in the world


@pytest.mark.parametrize("follow", ["predicted", "given"])
def test_gaussians_lie_in_the_given_world_at_its_scale(random, follow):
    given, motion = wandering(random, 4), similarity(random, 2.5)
    depth = tensor(random.uniform(1, 3, (4, *SIZE)))
    seen = motion.cameras(replace(given, K=given.K * 2))  # a K that doesn't count
    found, views = in_world(silent(4, SIZE), torch.ones(4, *SIZE), depth, seen, given, follow=follow)
    assert_close(views.w2c, given.w2c)
    assert_close(views.K, given.K)
    for i, means in enumerate(found.means.view(4, -1, 3)):
        assert_close(
            project(means, given[i])[0][0].view(*SIZE, 2), pixel_grid(SIZE)[..., :2].double(), atol=1e-5, rtol=0
        )
        assert_close((means - given.centers[i]).norm(dim=1), depth[i].flatten() / 2.5)


def test_frames_are_where_the_network_saw_them_or_where_the_cameras_are(random):
    given, motion, answer = path("arc", random), similarity(random), head(random, 40)
    seen = predicted(given, motion, random, 0.02, 1.0)
    there = align(given, seen, "centers")
    found, views = in_world(*answer, seen, given, there)
    assert_close(views.w2c, there.inverse.cameras(seen).w2c)
    assert not torch.allclose(views.w2c, given.w2c, atol=1e-3)
    assert_close(found.means, from_head(*answer, views, there.scale).means)
    kept, views = in_world(*answer, seen, given, there, "given")
    assert views is given
    assert not torch.allclose(kept.means, found.means, atol=1e-3)


def test_without_given_cameras_the_world_is_the_networks(random):
    seen, answer = wandering(random, 2), head(random, 2)
    found, views = in_world(*answer, seen, largest=60.0)
    assert views is seen
    assert_close(found.scales, from_head(*answer, seen, largest=60.0).scales)
    assert LARGEST == 30


def test_cameras_can_follow_nothing_else(random):
    with pytest.raises(ValueError, match="found 'none'"):
        in_world(*head(random, 2), wandering(random, 2), follow="none")


# ----------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("first, last, count", [(0, 480, 128), (3, 40, 7), (5, 9, 1), (0, 6, 7), (2, 5, 9)])
def test_frames_are_chosen_evenly_from_the_first_to_the_last(first, last, count):
    found = evenly(first, last, count)
    total = last - first + 1
    assert len(found) == min(count, total)
    assert found[0] == first
    if count > 1:
        assert found[-1] == last
        assert set(np.diff(found)) <= {(total - 1) // (len(found) - 1), -(-(total - 1) // (len(found) - 1))}
    for i, frame in enumerate(found):
        exact = i * (total - 1) / max(len(found) - 1, 1)
        assert exact - 1 < frame - first <= exact + 1e-9


@pytest.mark.parametrize(
    "total, count, size, overlap", [(481, 3, 128, 10), (364, 3, 128, 10), (100, 5, 12, 3), (30, 1, 30, 4)]
)
def test_uniform_chunks_cover_the_video_and_share_their_ends(total, count, size, overlap):
    chunks = uniform_chunks(total, count, size, overlap)
    assert [len(chunk) for chunk in chunks] == [size] * count
    assert chunks[0][0] == 0 and chunks[-1][-1] == total - 1
    for before, after in zip(chunks, chunks[1:], strict=False):
        assert after[:overlap] == before[-overlap:]
        assert not set(after[overlap:]) & set(before)


@pytest.mark.parametrize("total, splits, size, overlap", [(481, [150, 300], 64, 8), (60, [40], 20, 3), (50, [], 20, 3)])
def test_split_chunks_end_where_the_video_is_split(total, splits, size, overlap):
    chunks = split_chunks(total, splits, size, overlap)
    assert [chunk[-1] for chunk in chunks] == [*splits, total - 1]
    assert [len(chunk) for chunk in chunks] == [size] * (len(splits) + 1)
    for before, after, split in zip(chunks, chunks[1:], splits, strict=False):
        assert after[:overlap] == before[-overlap:]
        assert after[overlap] == split + 1
        assert sorted(set(after)) == after


def test_videos_too_short_for_their_chunks_are_refused():
    with pytest.raises(ValueError, match="need 364, the video has 363"):
        uniform_chunks(363, 3)
    with pytest.raises(ValueError, match="frames 41 to 49 are fewer than the 17"):
        split_chunks(50, [40], 20, 3)
    for chunks in (
        lambda overlap: uniform_chunks(99, 2, 10, overlap),
        lambda overlap: split_chunks(99, [50], 10, overlap),
    ):
        for overlap in (2, 10):
            with pytest.raises(ValueError, match=f"overlap of {overlap} frames"):
                chunks(overlap)


def test_near_points_count_more_and_points_behind_the_camera_not_at_all(random):
    z = tensor(random.uniform(-1, 4, 300))
    z[:2] = tensor([1e-3, 2e-3])
    weights = inverse_depth_weights(z)
    inverse = [1 / value if value > 1e-3 else 0 for value in z.tolist()]
    limit = np.quantile([value for value in inverse if value], 0.98)
    clipped = np.minimum(inverse, limit)
    assert_close(weights, tensor(clipped / clipped[clipped > 0].mean()))
    assert weights[0] == 0 and weights[1] > 0
    assert weights[weights > 0].mean() == pytest.approx(1)


def test_a_frame_with_nothing_in_front_counts_nothing():
    assert_close(inverse_depth_weights(tensor([-1, -2])), tensor([0, 0]))


def test_points_are_paired_by_their_pixels_where_both_chunks_know_them(random):
    views, points = wandering(random, 2), tensor(random.normal(0, 1, (2, 10, 3)))
    settled = points + 1
    points[0, 3] = torch.nan
    settled[1, 9, 1] = torch.inf
    a, b, weights = same_pixels(points, settled, views)
    assert len(a) == len(b) == len(weights) == 18
    assert_close(a + 1, b)
    assert_close(a[:9], points[0, [0, 1, 2, 4, 5, 6, 7, 8, 9]])
    z = project(settled[1, :9], views[1])[1][0]
    assert_close(weights[9:], inverse_depth_weights(z))


def test_of_large_frames_so_many_points_take_part_and_no_more(random):
    points = tensor(range(2 * PER_FRAME + 3))[None, :, None].expand(1, -1, 3)
    a, _, _ = same_pixels(points, points, cameras_from(np.eye(3)[None], np.zeros((1, 3))))
    assert len(a) == PER_FRAME
    assert a[0, 0] == 0 and a[-1, 0] == 2 * PER_FRAME + 2
    assert set(a[:, 0].diff().tolist()) == {2, 3}


def test_a_weighted_fit_is_the_plain_fit_of_so_many_copies(random):
    source, weights = random.normal(0, 1, (8, 3)), random.integers(0, 4, 8)
    target = source @ Rotation.random(random_state=2).as_matrix() + random.normal(0, 0.3, (8, 3))
    scale, R, t = umeyama(source.repeat(weights, 0), target.repeat(weights, 0))
    assert_same_similarity(
        fit_points(tensor(source), tensor(target), tensor(weights)), Similarity(scale, tensor(R), tensor(t))
    )


def test_no_similarity_beside_the_fit_is_better(random):
    source, weights = tensor(random.normal(0, 1, (30, 3))), tensor(random.uniform(0, 1, 30))
    target = similarity(random).points(source) + tensor(random.normal(0, 0.2, (30, 3)))
    fit = fit_points(source, target, weights)

    def loss(other):
        return float((weights * (other.points(source) - target).square().sum(1)).sum())

    for _ in range(60):
        turn = tensor(Rotation.from_rotvec(random.normal(0, 0.02, 3)).as_matrix())
        beside = Similarity(
            fit.scale * (1 + random.normal(0, 0.02)), turn @ fit.R, fit.t + tensor(random.normal(0, 0.02, 3))
        )
        assert loss(beside) > loss(fit)


def overlapping(random, points=2000, cameras=10, wrong=0.15):
    """Two chunks' points, weights and cameras of the same frames; a share of the points moved between them."""
    motion, views, source = similarity(random), wandering(random, cameras), tensor(random.normal(0, 1, (points, 3)))
    target = motion.points(source)
    target[: int(wrong * points)] += tensor(random.normal(1, 1, (int(wrong * points), 3)))
    return motion, source, target, tensor(random.uniform(0.5, 2, points)), views, motion.cameras(views)


def test_points_that_moved_between_two_chunks_do_not_move_the_chunk(random):
    motion, *overlap = overlapping(random)
    assert_same_similarity(fit_chunk(*overlap), motion, 1e-6)
    plain = fit_points(*overlap[:3])
    assert (plain.t - motion.t).norm() > 0.1


def test_three_more_fits_leave_out_the_fifth_that_fits_worst_for_its_weight(random):
    motion, source, target, weights, views, settled = overlapping(random, wrong=0.3)
    target = target + tensor(random.normal(0, 0.3, target.shape)) / weights[:, None]
    kept = torch.ones(len(source), dtype=torch.bool)
    for _ in range(4):
        shares = torch.cat([weights[kept] / weights[kept].sum(), torch.ones(len(views)) * 10 / len(views)])
        pairs = [torch.cat([a[kept], b.centers]) for a, b in ((source, views), (target, settled))]
        fit = fit_points(*pairs, shares)
        score = (fit.points(source) - target).norm(dim=1) / weights.sqrt()
        kept = score <= score.quantile(0.8)
    assert_same_similarity(fit_chunk(source, target, weights, views, settled), fit)


def test_points_without_weight_or_use_have_no_say(random):
    motion, source, target, weights, *views = overlapping(random, wrong=0)
    nothing = weights.clone()
    nothing[:500] = 0
    target[:500] = torch.nan
    assert_same_similarity(fit_chunk(source, target, nothing, *views), motion)


def test_all_cameras_count_ten_times_as_much_as_all_points(random):
    """The points say that the chunk stays, the cameras that it moves by 1.1."""
    half = random.normal(0, 1, (ENOUGH // 2, 3))  # just enough for the first fit, which is looked at
    source = tensor(np.concatenate([half, -half]))
    turns = Rotation.from_rotvec(random.normal(0, 0.1, (4, 3))).as_matrix()
    here = random.normal(0, 1, (2, 3))
    views = cameras_from(turns, np.concatenate([here, -here]))
    moved = cameras_from(turns, views.centers + tensor([1.1, 0, 0]))
    fit = fit_chunk(source, source, torch.ones(len(source)), views, moved)
    middle = fit.points(torch.zeros(3, dtype=torch.float64))
    assert_close(middle, tensor([1.0, 0, 0]))
    assert_close(fit.R, torch.eye(3, dtype=torch.float64))


def test_few_points_leave_the_cameras_alone_to_say(random):
    motion, source, target, weights, *views = overlapping(random, ENOUGH - 1, wrong=1.0)
    assert_same_similarity(fit_chunk(source, target, weights, *views), motion)
    assert_same_similarity(fit_chunk(source, target, weights, *views, "centers"), motion)


@pytest.mark.parametrize("tolerance", [0.0, 0.5, 3.0])
def test_a_gaussian_belongs_to_whom_exhaustive_search_says(random, tolerance):
    chunks = [wandering(random, 3) for _ in range(4)]
    means = tensor(random.normal(0, 2, (150, 3)))
    for owner in range(4):
        found = owned(means, owner, chunks, tolerance).tolist()
        for mean, keep in zip(means.numpy(), found, strict=True):
            distances = []
            for number, views in enumerate(chunks):
                best = 1e5 if number == owner else 1e6
                for w2c, K in zip(views.w2c.numpy(), to_corner_origin(views.K).numpy(), strict=True):
                    local = w2c[:3, :3] @ mean + w2c[:3, 3]
                    u, v, z = K @ local
                    if local[2] > 0.01 and 0 <= u / z < SIZE[1] and 0 <= v / z < SIZE[0]:
                        best = min(best, float(np.linalg.norm(local)))
                distances.append(best)
            ranked = sorted(distances)
            mine = distances[owner]
            near = mine == ranked[1] and mine - ranked[0] < tolerance
            assert keep == (mine == ranked[0] or near)


def test_what_no_chunk_sees_stays_with_each(random):
    chunks = [cameras_from(np.eye(3)[None], [[x, 0.0, 0]]) for x in (0, 1)]
    behind = tensor([[0, 0, -5]])
    assert owned(behind, 0, chunks).item() and owned(behind, 1, chunks).item()


def test_a_picture_ends_half_a_pixel_beyond_its_outermost_centres():
    view = cameras_from(np.eye(3)[None], np.zeros((1, 3)))
    other = cameras_from(np.eye(3)[None], [[0, 0, -50.0]], focal=1.0)  # sees everything, from far away
    K = view.K[0]
    for u, v, inside in [(-0.49, 5, True), (-0.51, 5, False), (15.49, 5, True), (15.51, 5, False),
                         (5, -0.49, True), (5, -0.51, False), (5, 11.49, True), (5, 11.51, False)]:  # fmt: skip
        point = torch.linalg.solve(K, tensor([u, v, 1]))[None]
        assert owned(point, 0, [view, other], 1.0).item() == inside
    for z, inside in [(0.0099, False), (0.0101, True)]:
        assert owned(tensor([[0, 0, z]]), 0, [view, other], 1.0).item() == inside


def test_inputs_are_left_as_they_were(random):
    views, motion, answer = wandering(random, 3), similarity(random), head(random, 3)
    seen = motion.cameras(views)
    before = [part.clone() for part in (views.w2c, views.K, seen.w2c, *answer)]
    in_world(*answer, seen, views)
    seen_from_first(views)
    on_all_frames(views, [0, 2, 5], 6)
    owned(views.centers, 0, [views, seen])
    for part, expected in zip((views.w2c, views.K, seen.w2c, *answer), before, strict=True):
        assert_close(part, expected, atol=0, rtol=0)
