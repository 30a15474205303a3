"""New depth gets the scale of the world: from what is remembered, or from cameras as the reference does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole, unproject
from lyra_core.memory.depth import room_box
from lyra_core.memory.depth_alignment import (
    OVERLAP,
    Estimate,
    camera_scale,
    in_scene_units,
    known_depth,
    memory_scale,
    stretched,
    to_one_scale,
)
from lyra_core.memory.retrieval import Keyframe

SIZE = (96, 144)
FOCAL = 150.0
ROOM = (3.0, 2.0, 5.0)  # half width, half height, distance of the back wall; scene units


def rotation(axis, angle):
    axis = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0)
    x, y, z = axis.tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.matrix_exp(cross * angle)


def cameras_at(centers, yaws=None):
    """Cameras with these centres, turned about the vertical axis."""
    centers = torch.as_tensor(centers, dtype=torch.float64)
    yaws = [0.0] * len(centers) if yaws is None else yaws
    w2c = torch.eye(4, dtype=torch.float64).repeat(len(centers), 1, 1)
    for i, yaw in enumerate(yaws):
        w2c[i, :3, :3] = rotation((0, 1, 0), -yaw)
        w2c[i, :3, 3] = -w2c[i, :3, :3] @ centers[i]
    start = pinhole(SIZE, FOCAL, len(centers))
    return Cameras(w2c.float(), start.K, SIZE)


def room_depth(cameras):
    """(F, H, W): depth of the inside of a box around the origin, by intersecting every ray with every wall."""
    walls = torch.tensor([ROOM[0], ROOM[1], ROOM[2]])
    ones = torch.ones(len(cameras), *SIZE)
    directions = unproject(ones, cameras) - cameras.centers[:, None, None]
    reach = torch.where(directions > 0, walls, -walls) - cameras.centers[:, None, None]
    return (reach / directions).amin(-1)


PATHS = {
    "pure rotation": cameras_at(torch.zeros(10, 3), [0.03 * i for i in range(1, 11)]),
    "straight dolly": cameras_at([[0, 0, 0.12 * i] for i in range(1, 11)]),
    "still camera": cameras_at(torch.zeros(10, 3)),
    "loop": cameras_at(
        [[0.8 * math.sin(a), 0.3 * math.cos(a), 0.6 * (1 - math.cos(a))] for a in torch.linspace(0, 6, 10).tolist()],
        [0.1 * math.sin(i) for i in range(10)],
    ),
}


def start():
    camera = cameras_at([[0.0, 0, 0]])
    return [Keyframe(0, room_depth(camera)[0], camera)]


def predicted(cameras, scale, noise=0.0, seed=0):
    """What an estimator might say of the cameras: another world, another scale, each centre a little wrong."""
    R, t = rotation((1, 2, 3), 0.7).float(), torch.tensor([4.0, -1.0, 2.0])
    random = torch.Generator().manual_seed(seed)
    centers = scale * cameras.centers @ R.T + t + noise * torch.randn(len(cameras), 3, generator=random)
    w2c = cameras.w2c.clone()
    w2c[:, :3, :3] = cameras.w2c[:, :3, :3] @ R.T
    w2c[:, :3, 3:] = -w2c[:, :3, :3] @ centers[..., None]
    return Cameras(w2c, cameras.K, cameras.size)


def repainted(depth, share=0.2, factor=0.4, seed=0):
    """A share of every frame replaced by something nearer: what the memory doesn't know yet."""
    depth = depth.clone()
    columns = round(share * depth.shape[-1])
    first = int(torch.randint(0, depth.shape[-1] - columns, (), generator=torch.Generator().manual_seed(seed)))
    depth[..., first : first + columns] *= factor
    return depth


def noisy(depth, amount, seed=0):
    return depth * torch.exp(amount * torch.randn(depth.shape, generator=torch.Generator().manual_seed(seed)))


def wavy(depth, amount, seed=0):
    """Errors as estimators make them: smooth, and other ones in every frame."""
    random = torch.Generator().manual_seed(seed)
    coarse = amount * torch.randn(len(depth), 1, 6, 9, generator=random)
    return depth * torch.exp(torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic"))[:, 0]


# the room of these tests


def test_the_room_is_the_one_that_the_layout_draws():
    fractions = [
        0.5 + side * extent * FOCAL / ROOM[2] / (pixels - 1)
        for side in (-1, 1)
        for extent, pixels in ((ROOM[0], SIZE[1]), (ROOM[1], SIZE[0]))
    ]
    camera = pinhole(SIZE, FOCAL)
    drawn = room_box(SIZE, camera.K[0], (0.5, 0.5), tuple(fractions), ROOM[2])
    assert_close(room_depth(camera)[0], drawn.depth, rtol=1e-4, atol=1e-4)


# what is known


@pytest.mark.parametrize("name", PATHS)
def test_known_depth_is_the_true_depth_where_a_view_was_seen_before(name):
    cameras = PATHS[name]
    known, true = known_depth(start(), cameras), room_depth(cameras)
    assert known.shape == true.shape
    seen = known > 0
    assert seen.float().mean() > 0.6
    wrong = (known / true - 1).abs()[seen]
    assert wrong.median() < 1e-3 and (wrong > 0.02).float().mean() < 0.01


def test_known_depth_of_the_remembered_view_itself_is_what_is_remembered():
    keyframe = start()[0]
    assert_close(known_depth([keyframe], keyframe.camera)[0], keyframe.depth, rtol=1e-4, atol=0)


def test_what_no_keyframe_saw_is_unknown():
    behind = cameras_at([[0.0, 0, 0]], [math.pi])
    assert not known_depth(start(), behind).any()
    assert torch.equal(known_depth([], PATHS["loop"]), torch.zeros(10, *SIZE))
    nothing = Keyframe(0, torch.zeros(SIZE), cameras_at([[0.0, 0, 0]]))
    assert torch.equal(known_depth([nothing], PATHS["loop"]), torch.zeros(10, *SIZE))
    half = start()[0].depth.clone()
    half[:, : SIZE[1] // 2] = 0
    known = known_depth([Keyframe(0, half, nothing.camera)], nothing.camera)[0]
    assert not known[:, : SIZE[1] // 2 - 1].any() and (known[:, SIZE[1] // 2 :] > 0).all()


def test_every_keyframe_adds_to_what_is_known_and_the_nearest_surface_is_in_front():
    turned = cameras_at([[0.0, 0, 0]], [1.2])
    both = [*start(), Keyframe(8, room_depth(turned)[0], turned)]
    between = cameras_at([[0.0, 0, 0]], [0.6])
    one, two = (known_depth(some, between)[0] for some in (both[:1], both))
    assert (two > 0).float().mean() > (one > 0).float().mean() + 0.2
    board = Keyframe(16, torch.full(SIZE, 1.0), cameras_at([[0.0, 0, 0]]))
    assert_close(known_depth([*start(), board], board.camera)[0], board.depth, rtol=2e-2, atol=0)


def test_of_two_memories_of_a_surface_the_first_counts():
    photo = start()[0]
    for factor in (0.95, 1.05):
        again = Keyframe(8, photo.depth * factor, photo.camera)
        alone = known_depth([photo], PATHS["loop"])
        both = known_depth([photo, again], PATHS["loop"])
        assert torch.equal(both[alone > 0], alone[alone > 0])
    for factor in (0.7, 0.87):  # that is another surface, in front
        other = Keyframe(8, photo.depth * factor, photo.camera)
        for order in ([photo, other], [other, photo]):
            assert_close(known_depth(order, photo.camera)[0], other.depth, rtol=1e-3, atol=0)


def test_what_is_known_of_a_view_does_not_depend_on_the_other_views():
    cameras = PATHS["loop"]
    together = known_depth(start(), cameras)
    assert torch.equal(together[3], known_depth(start(), cameras[3])[0])


def test_a_silhouette_that_an_estimator_blurred_does_not_float_in_what_is_known():
    camera = cameras_at([[0.0, 0, 0]])
    blurred = torch.full(SIZE, 6.0)
    blurred[:, :70], blurred[:, 70] = 2.0, 3.5
    known = known_depth([Keyframe(0, blurred, camera)], cameras_at([[0.3, 0, 0]]))
    assert not ((known > 2.6) & (known < 5.4)).any()


# the memory's scale


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("scale", [0.05, 1.0, 37.0])
@pytest.mark.parametrize("error", [noisy, wavy])
def test_the_memory_finds_the_scale_whatever_the_camera_does(name, scale, error):
    cameras = PATHS[name]
    true = room_depth(cameras)
    estimate = Estimate(error(repainted(true), 0.05) / scale)
    depth, how = in_scene_units(estimate, cameras, known_depth(start(), cameras))
    found = (depth / estimate.depth).flatten()
    assert found.max() / found.min() < 1 + 1e-5, "one scale for all frames"
    assert found[0] == pytest.approx(scale, rel=0.01)
    assert f"scale {found[0]:.4g} from the memory" in how and "ratios spread by" in how


@pytest.mark.parametrize("factor", [0.3, 0.85, 1.2, 4.0])
def test_outliers_on_one_side_do_not_pull_the_scale(factor):
    cameras = PATHS["loop"]
    known = known_depth(start(), cameras)
    found = memory_scale(noisy(repainted(room_depth(cameras), 0.2, factor), 0.01) / 2, known)
    assert found.scale == pytest.approx(2, rel=0.01)


def test_perfect_depth_has_its_exact_scale_and_no_spread():
    cameras = PATHS["still camera"]
    true = room_depth(cameras)
    found = memory_scale(true / 3, true)
    assert found.scale == pytest.approx(3, rel=1e-5) and found.spread < 1e-5 and found.overlap > 0.8


def test_the_spread_tells_how_well_the_depths_agree():
    true = torch.full((2, *SIZE), 4.0)
    wave = torch.exp(0.1 * torch.sin(torch.arange(SIZE[1]) / 20.0))
    found = memory_scale(true * wave, true)
    assert 0.05 < found.spread < 0.15
    assert found.scale == pytest.approx(1, rel=0.05)


def test_the_scale_does_not_jump_between_the_photo_and_chunk_after_chunk():
    """Each chunk's depth is estimated at another scale and aligned to what was remembered before it."""
    keyframes, factors = start(), []
    for chunk in range(4):
        cameras = cameras_at([[0.1 * i, 0, 0.05 * i] for i in range(3 * chunk, 3 * chunk + 3)], [0.1 * chunk] * 3)
        true = room_depth(cameras)
        depth, _ = in_scene_units(
            Estimate(wavy(true, 0.03, chunk) * (0.1 + chunk)), cameras, known_depth(keyframes, cameras)
        )
        factors.append(float((depth / true).median()))
        keyframes += [Keyframe(8 * (3 * chunk + i + 1), d, cameras[i]) for i, d in enumerate(depth)]
    assert np.allclose(factors, 1, atol=0.01)


def test_pixels_at_jumps_or_unknown_in_either_depth_are_not_compared():
    known = torch.full((1, *SIZE), 4.0)
    known[:, :, :40] = 0
    depth = torch.full((1, *SIZE), 2.0)
    depth[:, :30] = 0
    found = memory_scale(depth, known)
    inside = (SIZE[0] - 30 - 2) * (SIZE[1] - 40 - 2)
    assert found.scale == pytest.approx(2)
    assert inside - 4 * sum(SIZE) <= found.overlap * depth.numel() <= inside
    nowhere = memory_scale(torch.zeros_like(depth), known)
    assert (nowhere.overlap, nowhere.scale) == (0, 1)


def test_a_near_object_with_jumps_all_around_does_not_count_at_its_rim():
    known = torch.full((1, *SIZE), 4.0)
    rough = known.clone()
    rough[:, ::4] = 1.0  # a comb of jumps: nothing of it is reliable
    assert memory_scale(rough, known).overlap < OVERLAP
    assert memory_scale(known, rough).overlap < OVERLAP


# the reference's scale


def test_cameras_find_the_scale_on_a_loop_and_on_a_dolly():
    for name in ("loop", "straight dolly"):
        cameras = PATHS[name]
        true = room_depth(cameras)
        for frames in (slice(0, 10), slice(0, 5)):  # by RANSAC and without
            some = cameras[frames]
            estimate = Estimate(true[frames] * 0.3, predicted(some, 0.3))
            depth, how = in_scene_units(estimate, some, torch.zeros_like(true[frames]), "cameras")
            assert_close(depth, true[frames], rtol=1e-3, atol=0)
            assert "scale 3.333 from the cameras" in how and "0.0% elsewhere" in how


def test_cameras_that_only_turn_have_no_scale_where_the_memory_has():
    cameras = PATHS["pure rotation"]
    true = room_depth(cameras)
    estimate = Estimate(true * 0.3, predicted(cameras, 0.3, noise=0.01))
    known = known_depth(start(), cameras)
    with pytest.raises(ValueError, match="10 cameras stand still.*vary by"):
        in_scene_units(estimate, cameras, known, "cameras")
    depth, _ = in_scene_units(estimate, cameras, known, "memory")
    assert (depth / true - 1).abs().max() < 0.01


def test_cameras_that_hardly_move_are_scaled_by_the_noise_of_the_estimate():
    """What the reference does: right by chance at most."""
    turning = cameras_at([[1e-4 * i, 0, 0] for i in range(10)], [0.03 * i for i in range(10)])
    scale, off = camera_scale(turning, predicted(turning, 0.3, noise=0.01))
    assert not 0.2 < scale < 0.4
    assert off > 0.3  # and the report says so


def test_one_view_far_off_does_not_count_from_ten_views_on():
    cameras = PATHS["loop"]
    wrong = predicted(cameras, 0.3, noise=1e-4)
    w2c = wrong.w2c.clone()
    w2c[4, :3, 3] += 3
    astray = Cameras(w2c, wrong.K, wrong.size)
    assert camera_scale(cameras, astray)[0] == pytest.approx(0.3, rel=0.05)
    nine = [i for i in range(10) if i != 7]
    assert camera_scale(cameras[nine], astray[nine])[0] != pytest.approx(0.3, rel=0.05)
    unsure = predicted(cameras, 0.3, noise=0.1)
    assert len({camera_scale(cameras, unsure) for _ in range(5)}) == 1  # chance, but always the same


def test_the_similarity_is_the_least_squares_one():
    from lyra_core.memory.depth_alignment import similarity

    random = np.random.default_rng(0)
    source = random.normal(size=(7, 3))
    target = 1.7 * source @ rotation((1, -1, 2), 2.0).numpy().T + [1, 2, 3] + 0.3 * random.normal(size=(7, 3))

    def residual(scale, R, t):
        return ((scale * source @ R.T + t - target) ** 2).sum()

    scale, R, t = similarity(source, target)
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
    best = residual(scale, R, t)
    for step in (1e-3, -1e-3):
        assert residual(scale + step, R, t) > best
        for axis in np.eye(3):
            assert residual(scale, rotation(axis, step).numpy() @ R, t) > best
            assert residual(scale, R, t + step * axis) > best


def test_a_mirrored_path_is_turned_but_never_mirrored():
    from lyra_core.memory.depth_alignment import similarity

    source = np.random.default_rng(1).normal(size=(8, 3))
    scale, R, _ = similarity(source, source * [1, 1, -1])
    assert np.linalg.det(R) == pytest.approx(1) and scale < 0.95


def test_cameras_are_refused_with_the_reason():
    loop = PATHS["loop"]
    with pytest.raises(ValueError, match="doesn't say where"):
        camera_scale(loop, None)
    with pytest.raises(ValueError, match="sees no movement in 10 frames"):
        camera_scale(loop, PATHS["still camera"])


# which of them


def test_too_little_overlap_falls_back_to_the_cameras_and_says_so():
    cameras = PATHS["loop"]
    true = room_depth(cameras)
    known = torch.zeros_like(true)
    known[0, :20, :30] = true[0, :20, :30]
    estimate = Estimate(true * 0.3, predicted(cameras, 0.3))
    depth, how = in_scene_units(estimate, cameras, known)
    assert_close(depth, true, rtol=1e-3, atol=0)
    share = memory_scale(estimate.depth, known).overlap
    assert 0 < share < OVERLAP
    assert how.startswith(f"{share:.2%} of the pixels can be compared with the memory; scale 3.333 from the cameras")


def test_without_overlap_and_without_cameras_there_is_no_scale():
    cameras = PATHS["pure rotation"]
    true = room_depth(cameras)
    with pytest.raises(ValueError, match=r"these 10 frames: only 0.00% .* 2% are needed, and .*doesn't say where"):
        in_scene_units(Estimate(true), cameras, torch.zeros_like(true))
    with pytest.raises(ValueError, match="only 0.00% .* and the 10 cameras stand still"):
        in_scene_units(Estimate(true, predicted(cameras, 1.0, 0.01)), cameras, torch.zeros_like(true))


def test_none_leaves_the_estimate_alone_and_so_does_an_estimator_that_knows_the_scale():
    cameras = PATHS["loop"]
    true = room_depth(cameras)
    depth, how = in_scene_units(Estimate(true * 5), cameras, true, "none")
    assert torch.equal(depth, true * 5) and "as the estimator gave it" in how
    for alignment in ("memory", "cameras", "none"):
        depth, how = in_scene_units(Estimate(true * 5, scaled=True), cameras, true, alignment)
        assert torch.equal(depth, true * 5) and "in scene units already" in how


def test_unknown_stays_unknown_and_no_input_is_changed():
    cameras = PATHS["loop"]
    true = room_depth(cameras)
    holed = true * 0.5
    holed[:, :9] = 0
    before = holed.clone()
    known = known_depth(start(), cameras)
    depth, _ = in_scene_units(Estimate(holed), cameras, known)
    assert torch.equal(depth == 0, holed == 0) and torch.equal(holed, before)
    assert torch.equal(known, known_depth(start(), cameras))


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda d: d.index_put((torch.tensor(2), torch.tensor(3), torch.tensor(4)), torch.tensor(math.nan)),
            "1 NaN .*2",
        ),
        (lambda d: d.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(math.inf)), "144 infinite .*frame 1"),
        (lambda d: -d, f"{10 * 96 * 144} negative depths, the first in frame 0"),
        (lambda d: d[:9], r"depth \(9, 96, 144\) for frames \(10, 96, 144\)"),
        (lambda d: d[:, ::2], r"depth \(10, 48, 144\) for frames \(10, 96, 144\)"),
        (lambda d: d[..., None], r"\(10, 96, 144, 1\)"),
        (lambda d: d * 0, "knows no depth in any of these 10 frames"),
    ],
)
def test_what_is_no_depth_is_refused_by_what_was_found(change, says):
    cameras = PATHS["loop"]
    true = room_depth(cameras)
    for estimate in (Estimate(change(true)), Estimate(change(true), scaled=True)):
        for alignment in ("memory", "none"):
            with pytest.raises(ValueError, match=says):
                in_scene_units(estimate, cameras, true, alignment)


def test_cameras_that_do_not_fit_are_refused():
    cameras = PATHS["loop"]
    true = room_depth(cameras)
    with pytest.raises(ValueError, match="9 cameras for 10 frames"):
        in_scene_units(Estimate(true, cameras[:9]), cameras, true)
    broken = Cameras(cameras.w2c * math.nan, cameras.K, SIZE)
    with pytest.raises(ValueError, match="cameras with NaN"):
        in_scene_units(Estimate(true, broken), cameras, true)
    with pytest.raises(ValueError, match=r"known depth is \(9, 96, 144\), but the estimate \(10,"):
        in_scene_units(Estimate(true), cameras, true[:9])
    with pytest.raises(ValueError, match="alignment 'best': expected one of 'memory', 'cameras', 'none'"):
        in_scene_units(Estimate(true), cameras, true, "best")


def test_frames_estimated_one_by_one_come_to_one_scale():
    cameras = PATHS["loop"]
    true = room_depth(cameras)
    known = known_depth(start(), cameras)
    factors = torch.logspace(-1, 1, 10)
    found = to_one_scale(true * factors[:, None, None], known)
    assert_close(found, true, rtol=0.01, atol=0)
    known[6] = 0  # of this frame nothing is known: it takes the middle of the others
    found = to_one_scale(true * 2, known)
    assert_close(found, true, rtol=0.01, atol=0)
    known = true.clone()
    known[2:] = 0
    known[1] *= 16
    assert_close(to_one_scale(true, known)[2:], 4 * true[2:])  # as far from one as from the other
    known[:] = 0
    assert torch.equal(to_one_scale(true * 2, known), true * 2)


def test_stretched_depth_samples_pixel_areas():
    ramp = torch.arange(6.0).expand(1, 4, 6)
    found = stretched(ramp, (4, 12))
    assert found.shape == (1, 4, 12)
    assert_close(found[0, 0, 1:-1], (torch.arange(12.0)[1:-1] + 0.5) / 2 - 0.5)
