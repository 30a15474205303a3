"""The loop around the network, with one that knows the truth but sees it in another world at every look."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole, pixel_grid
from lyra_core.splats import alignment
from lyra_core.splats.alignment import Similarity, align, disagreement
from lyra_core.splats.gaussian_adapter import LARGEST
from lyra_core.splats.reconstruct import BORDER, FRAMES_AT_ONCE, Views, chunks_of, in_metres, inside_border, reconstruct

SIZE, GRID = (48, 64), (24, 32)
RADIUS = 3.0  # everything lies on a sphere around the origin, seen from inside
PIXELS = GRID[0] * GRID[1]
SAME = Similarity(1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def path(kind: str, frames: int) -> Cameras:
    """Cameras near the origin, float64."""
    time = torch.linspace(0, 1, frames, dtype=torch.float64)
    turn = 2 * math.pi * time
    centers, angles = torch.zeros(frames, 3, dtype=torch.float64), torch.zeros(frames, 3, dtype=torch.float64)
    if kind == "dolly":
        centers[:, 2] = time
    elif kind == "rotation":
        angles[:, 1] = turn
    elif kind == "loop":
        centers = torch.stack([turn.cos(), 0.3 * turn.sin(), turn.sin()], 1)
        angles[:, 1] = -turn
    R = torch.from_numpy(Rotation.from_rotvec(angles.numpy()).as_matrix())
    w2c = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    w2c[:, :3, :3], w2c[:, :3, 3] = R.mT, -(R.mT @ centers[..., None])[..., 0]
    K = pinhole(SIZE, 50.0, frames).K.double()
    return Cameras(w2c, K, SIZE)


def distances(cameras: Cameras) -> torch.Tensor:
    """(F, h, w) along the ray of every gaussian to the sphere."""
    grid = cameras.resized(GRID)
    rays = torch.nn.functional.normalize(pixel_grid(GRID).double() @ grid.K_inverse[:, None].mT, dim=-1)
    rays = rays @ grid.c2w[:, None, :3, :3].mT
    inner = (rays * grid.centers[:, None, None]).sum(-1)
    return -inner + (inner**2 + RADIUS**2 - grid.centers.square().sum(1)[:, None, None]).sqrt()


class Oracle:
    """A `Look` at frames that are full of their own number; every look is into another world."""

    def __init__(self, truth: Cameras, seed: int = 0):
        self.truth, self.asked = truth, []
        self.random = torch.Generator().manual_seed(seed)

    def frames(self, wanted):
        return torch.tensor(list(wanted), dtype=torch.float64)[:, None, None, None].expand(-1, *SIZE, 3)

    def __call__(self, frames, told, gaussians):
        seen = self.truth[frames[:, 0, 0, 0].long().tolist()]
        self.asked.append((len(frames), told, gaussians))
        R = torch.from_numpy(Rotation.from_rotvec(torch.randn(3, generator=self.random).numpy()).as_matrix())
        scale = 0.5 + float(torch.rand(1, generator=self.random))
        world = Similarity(scale, R.double(), torch.randn(3, generator=self.random).double())
        depth = scale * distances(seen).repeat_interleave(2, 1).repeat_interleave(2, 2)
        views = Views(depth, torch.full_like(depth, 2.0), world.cameras(seen))
        if not gaussians:
            return views
        raw = torch.zeros(len(seen), *GRID, 37, dtype=torch.float64)
        raw[..., 5], raw[..., 9] = 1, 0.5
        return replace(views, raw=raw, density=torch.full((len(seen), *GRID), 0.7, dtype=torch.float64))


def turned(cameras: Cameras, degrees: float) -> Cameras:
    """Every other camera looks that far to the side, so no common turn makes up for it."""
    sign = torch.where(torch.arange(len(cameras)) % 2 == 0, 1.0, -1.0)
    turns = Rotation.from_rotvec(torch.stack([0 * sign, sign * math.radians(degrees), 0 * sign], 1).numpy())
    w2c = cameras.w2c.clone()
    w2c[:, :3] = torch.from_numpy(turns.as_matrix()) @ w2c[:, :3]
    return replace(cameras, w2c=w2c)


def aside(cameras: Cameras, degrees: float) -> Cameras:
    """Every camera looks that far to the same side."""
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = torch.from_numpy(Rotation.from_rotvec([0, math.radians(degrees), 0]).as_matrix())
    return replace(cameras, w2c=turn @ cameras.w2c)


class Askew(Oracle):
    """Takes the frames of cameras it is told of to look aside, every time to the other one."""

    def __call__(self, frames, told, gaussians):
        views = super().__call__(frames, told, gaussians)
        looks = sum(known is not None for _, known, _ in self.asked)
        return views if told is None else replace(views, cameras=aside(views.cameras, -2.0 if looks % 2 else 2.0))


def assert_on_sphere(found, radius=RADIUS):
    assert_close(found.gaussians.means.norm(dim=1), torch.full((len(found.gaussians),), radius, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------ given cameras


@pytest.mark.parametrize("kind", ["dolly", "loop"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_everything_lies_where_it_is_in_the_world_of_the_given_cameras(kind, chunks):
    truth = path(kind, 22)
    oracle = Oracle(truth)
    plan = chunks_of(22, 10 if chunks > 1 else 22, chunks, 4)
    found = reconstruct(oracle, oracle.frames, plan, truth, poses="given", trim=False)
    assert_on_sphere(found)
    assert found.frames == tuple(range(22))
    assert_close(found.cameras.w2c, truth.w2c)
    assert_close(found.depth[:, ::2, ::2], distances(truth))
    assert [told is not None for _, told, _ in oracle.asked] == [True] * chunks
    if chunks == 1:
        assert len(found.gaussians) == 22 * PIXELS


def test_the_reference_s_fit_does_as_well_on_a_loop():
    truth = path("loop", 20)
    oracle = Oracle(truth)
    assert_on_sphere(reconstruct(oracle, oracle.frames, [range(20)], truth, alignment="centers", trim=False))


def test_the_network_is_told_of_the_cameras_of_the_frames_it_sees():
    truth = path("loop", 30)
    oracle = Oracle(truth)
    reconstruct(oracle, oracle.frames, chunks_of(30, 10, 1), truth)
    (count, told, gaussians) = oracle.asked[0]
    assert count == 10 and gaussians
    assert_close(told.w2c, truth[[0, 3, 6, 9, 12, 16, 19, 22, 25, 29]].w2c)


def test_each_frame_s_gaussians_are_there_once_although_chunks_overlap():
    truth = path("loop", 16)
    oracle = Oracle(truth)
    plan = chunks_of(16, 10, 2, 4)
    one = reconstruct(oracle, oracle.frames, [range(16)], truth, poses="given", trim=False)
    two = reconstruct(oracle, oracle.frames, plan, truth, poses="given", trim=False)
    assert 0.3 * len(one.gaussians) < len(two.gaussians) <= len(one.gaussians)
    scale, gap = re.search(r"joined, (\S+) times as large, (\S+) apart", "".join(two.report)).groups()
    assert float(scale) == 1 and float(gap) < 1e-6
    together = torch.cat([one.gaussians.means, two.gaussians.means]).mul(1e4).round()
    assert len(together.unique(dim=0)) == len(one.gaussians.means.mul(1e4).round().unique(dim=0))


def test_where_chunks_meet_those_are_kept_that_are_seen_from_nearest_or_nearly_so():
    truth = path("dolly", 12)
    zoom = torch.linspace(1, 1.3, 12, dtype=torch.float64)[:, None, None]
    truth = replace(truth, K=truth.K * torch.cat([zoom, zoom, torch.ones_like(zoom)], 1))
    oracle = Oracle(truth)
    one = reconstruct(oracle, oracle.frames, [range(12)], truth, poses="given", trim=False).gaussians.means
    two = reconstruct(oracle, oracle.frames, [range(6), range(4, 12)], truth, poses="given", trim=False)

    def expected(tolerance):
        views, parts = [truth[:6], truth[6:]], one.split(6 * PIXELS)
        kept = [alignment.owned(means, owner, views, tolerance) for owner, means in enumerate(parts)]
        return one[torch.cat(kept)]

    assert_close(two.gaussians.means, expected(0.1 * float(distances(truth[:6]).median())))
    assert len({len(expected(tolerance)) for tolerance in (0.0, 0.1, 0.1 * RADIUS, RADIUS)}) == 4
    assert_close(two.cameras.K, truth.K)
    assert two.report[-1].startswith(f"{len(two.gaussians):,} gaussians of {12 * PIXELS:,}, from 12 frames in 2 chunks")


@pytest.mark.parametrize("how", ["orientation", "centers"])
@pytest.mark.parametrize("kind", ["rotation", "still"])
def test_where_cameras_stand_still_the_known_depth_gives_the_scale(kind, how):
    truth = path(kind, 12)
    oracle = Oracle(truth)
    depth = distances(truth).repeat_interleave(2, 1).repeat_interleave(2, 2)
    depth[3:, :, 20:] = 0  # only a part is known
    found = reconstruct(
        oracle,
        oracle.frames,
        [range(12)],
        truth,
        lambda wanted: depth[list(wanted)],
        alignment=how,
        poses="given",
        trim=False,
    )
    assert_on_sphere(found)
    assert found.report[0].startswith("frames 0 to 11: ") and "scale from depth" in found.report[0]


def test_where_cameras_stand_still_and_no_depth_is_known_the_scale_is_the_network_s_and_the_report_says_so():
    truth = path("rotation", 12)
    oracle = Oracle(truth, seed=3)
    found = reconstruct(oracle, oracle.frames, [range(12)], truth, trim=False)
    radii = found.gaussians.means.norm(dim=1)
    assert_close(radii, radii.mean().expand_as(radii))
    assert radii.mean() != pytest.approx(RADIUS, rel=0.05)
    assert "stand still" in found.report[0] and "the scale is the one of the network" in found.report[0]


def test_frames_are_taken_to_be_where_the_network_saw_them_or_where_the_cameras_are():
    truth = path("loop", 12)
    oracle, told = Oracle(truth), turned(truth, 1.0)
    predicted = reconstruct(oracle, oracle.frames, [range(12)], told, poses="given", trim=False)
    given = reconstruct(oracle, oracle.frames, [range(12)], told, poses="given", follow="given", trim=False)
    assert_on_sphere(predicted)
    assert disagreement(predicted.cameras, truth, SAME)[1] < 1e-3
    assert_close(given.cameras.w2c, told.w2c)


@pytest.mark.parametrize("poses", ["given", "network"])
@pytest.mark.parametrize("alignment", ["orientation", "centers"])
def test_what_is_aligned_is_where_cameras_look_or_where_they_stand(alignment, poses):
    truth = path("loop", 6)
    oracle = Askew(truth)
    cameras = truth if poses == "given" else None
    found = reconstruct(oracle, oracle.frames, [range(6)], cameras, alignment=alignment, trim=False)
    told = oracle.asked[-1][1]
    away = (found.cameras.centers - told.centers).norm(dim=1).max()
    away = away / (told.centers - told.centers.mean(0)).norm(dim=1).max()
    turn = disagreement(found.cameras, told, SAME)[1]
    expected = (0, 2.0) if alignment == "centers" else (2 * math.sin(math.radians(1)), 0)
    assert (float(away), turn) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("poses", ["given", "network"])
def test_chunks_with_few_points_join_by_the_same_alignment(poses, monkeypatch):
    monkeypatch.setattr(alignment, "ENOUGH", 10**9)
    truth = path("loop", 12)
    oracle = Askew(truth)
    cameras = truth if poses == "given" else None
    found = reconstruct(oracle, oracle.frames, [range(7), range(4, 12)], cameras, alignment="centers", trim=False)
    assert disagreement(found.cameras, truth, align(found.cameras, truth, "centers"))[0] < 1e-8


@pytest.mark.parametrize("poses", ["given", "network"])
def test_whoever_finds_the_cameras_the_options_of_the_gaussians_hold(poses):
    truth = path("loop", 4)
    oracle = Askew(truth)
    cameras = truth if poses == "given" else None
    options = {"follow": "given", "largest": 2 * LARGEST, "harmonics": True}
    found = reconstruct(oracle, oracle.frames, [range(4)], cameras, **options)
    assert_close(found.cameras.w2c, oracle.asked[-1][1].w2c)
    assert found.gaussians.sh.shape[1] == 9
    oracle = Askew(truth)
    small = reconstruct(oracle, oracle.frames, [range(4)], cameras, follow="given")
    assert_close(found.gaussians.scales, 2 * small.gaussians.scales, rtol=1e-6, atol=0)


def test_cameras_come_in_the_precision_of_the_network():
    truth = path("loop", 4)
    told = replace(truth, w2c=truth.w2c.float(), K=truth.K.float())
    for follow in ("predicted", "given"):
        oracle = Oracle(truth)
        found = reconstruct(oracle, oracle.frames, [range(4)], told, poses="given", follow=follow, trim=False)
        assert found.cameras.w2c.dtype == found.cameras.K.dtype == torch.float64
        assert_close(found.gaussians.means.norm(dim=1).mean(), torch.tensor(RADIUS).double(), rtol=1e-5, atol=0)


def test_known_depth_may_have_another_size_and_be_wrong_here_and_there():
    truth = path("rotation", 4)
    oracle = Oracle(truth)
    depth = distances(truth).repeat_interleave(4, 1).repeat_interleave(4, 2)
    depth[:, 1::2], depth[:, :, 1::2] = 0, 0  # between the pixels that the network sees nothing is known
    depth[:, :10] *= 1e-3
    found = reconstruct(
        oracle, oracle.frames, [range(4)], truth, lambda wanted: depth[list(wanted)], poses="given", trim=False
    )
    assert_on_sphere(found)


# ------------------------------------------------------------------------------------------- cameras that don't fit


@pytest.mark.parametrize(("degrees", "looks"), [(2.0, 1), (4.0, 3)])
def test_auto_lets_the_network_find_the_cameras_if_the_frames_turn_otherwise(degrees, looks):
    truth = path("loop", 20)
    oracle = Oracle(truth)
    found = reconstruct(oracle, oracle.frames, [range(20)], turned(truth, degrees), trim=False)
    assert len(oracle.asked) == looks
    assert_on_sphere(found)  # what turns left and right is laid over its middle
    assert any("don't follow the given cameras" in line for line in found.report) == (looks > 1)


def test_auto_lets_the_network_find_the_cameras_if_the_frames_move_otherwise():
    truth = path("loop", 20)
    oracle = Oracle(truth)
    w2c = truth.w2c.clone()
    w2c[10:, 0, 3] += 2.0  # on a path of 6 scene units
    reconstruct(oracle, oracle.frames, [range(20)], replace(truth, w2c=w2c), trim=False)
    assert [told is None for _, told, _ in oracle.asked] == [False, True, False]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(("way", "looks"), [(0.012, 1), (0.018, 3)])
def test_cameras_that_stand_still_may_waver_by_a_share_of_the_depth(seed, way, looks):
    told = path("rotation", 4)
    w2c = told.w2c.clone()
    w2c[::2, 1, 3], w2c[1::2, 1, 3] = way, -way  # 5 % of a tenth of the depth are 0.015
    oracle, depth = Oracle(replace(told, w2c=w2c), seed), distances(told)
    reconstruct(oracle, oracle.frames, [range(4)], told, lambda wanted: depth[list(wanted)], trim=False)
    assert len(oracle.asked) == looks


def test_given_cameras_are_followed_whatever_the_frames_say_and_the_report_tells_how_far_off_they_are():
    truth = path("loop", 20)
    oracle = Oracle(truth)
    found = reconstruct(oracle, oracle.frames, [range(20)], turned(truth, 6.0), poses="given", trim=False)
    assert len(oracle.asked) == 1
    assert "6 degrees off" in found.report[0]


def test_a_late_chunk_that_does_not_follow_starts_the_whole_video_anew():
    truth = path("loop", 36)
    oracle = Oracle(truth)
    wrong = turned(truth, 5.0)
    told = replace(truth, w2c=torch.cat([truth.w2c[:20], wrong.w2c[20:]]))
    found = reconstruct(oracle, oracle.frames, chunks_of(36, 20, 2, 4), told, trim=False)
    assert [told is None for _, told, _ in oracle.asked] == [False, False, True, False, True, False]
    assert found.frames == tuple(range(36))


def test_without_cameras_the_network_finds_them_and_is_then_told_of_them():
    truth = path("loop", 28)
    oracle = Oracle(truth)
    found = reconstruct(oracle, oracle.frames, chunks_of(28, 16, 2, 4), trim=False)
    assert [(told is None, gaussians) for _, told, gaussians in oracle.asked] == [(True, False), (False, True)] * 2
    offset = found.gaussians.means - found.gaussians.means.mean(0)
    # still one sphere, whatever its place and size
    flat = torch.cat([2 * offset, torch.ones(len(offset), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(flat, offset.square().sum(1, keepdim=True)).solution[:, 0]
    radii = (offset - solution[:3]).norm(dim=1)
    assert_close(radii, radii.mean().expand_as(radii), rtol=1e-5, atol=0)


@pytest.mark.parametrize("plan", [[range(20)], [range(12), range(8, 20)]])
def test_what_the_network_finds_is_laid_over_the_given_cameras(plan):
    truth = path("loop", 20)
    oracle = Oracle(truth)
    found = reconstruct(oracle, oracle.frames, plan, truth, poses="network", trim=False)
    assert_on_sphere(found)
    assert_close(found.cameras.w2c, truth.w2c)
    assert_close(found.depth[:, ::2, ::2], distances(truth))


def test_metres_reach_the_world_through_the_cameras_of_the_first_look():
    truth = path("loop", 20)

    def to_metres(frames, views):
        seen = Similarity(7.0, SAME.R, SAME.t).cameras(views.cameras)
        return replace(views, depth=7 * views.depth, cameras=seen)

    plain = reconstruct(Oracle(truth), Oracle(truth).frames, [range(20)], trim=False)
    metric = reconstruct(Oracle(truth), Oracle(truth).frames, [range(20)], to_metres=to_metres, trim=False)
    assert_close(metric.cameras.centers, 7 * plain.cameras.centers)
    assert_close(metric.gaussians.means, 7 * plain.gaussians.means)
    assert_close(metric.gaussians.scales, 7 * plain.gaussians.scales)
    assert_close(metric.depth, 7 * plain.depth)


def test_metres_reach_the_world_through_the_depth_of_the_first_look_where_cameras_stand_still():
    truth = path("rotation", 4)
    oracle = Oracle(truth)

    def to_metres(frames, views):
        scale = float(distances(truth).median() / views.depth.median())
        return replace(views, depth=scale * views.depth)

    found = reconstruct(oracle, oracle.frames, [range(4)], trim=False, to_metres=to_metres)
    radii = (found.gaussians.means - found.cameras.centers[0]).norm(dim=1)
    assert_close(radii, torch.full_like(radii, RADIUS))
    assert_close(found.depth[:, ::2, ::2], distances(truth))


# ------------------------------------------------------------------------------------------------------ what is kept


def test_the_border_of_every_view_is_left_away():
    truth = path("loop", 12)
    oracle = Oracle(truth)
    found = reconstruct(oracle, oracle.frames, [range(12)], truth)
    whole = reconstruct(oracle, oracle.frames, [range(12)], truth, trim=False)
    assert_close(found.gaussians.means.view(12, 24, 30, 3), whole.gaussians.means.view(12, *GRID, 3)[:, :, 1:-1])
    assert len(found.gaussians) == 12 * (GRID[0] - 2 * int(BORDER * GRID[0])) * (GRID[1] - 2 * int(BORDER * GRID[1]))


def test_coarse_grids_have_no_border_and_the_reference_s_has_seven_rows_and_twelve_columns():
    assert inside_border((31, 31)).all()
    mask = inside_border((238, 413))
    assert not mask[:7].any() and not mask[-7:].any() and not mask[:, :12].any() and not mask[:, -12:].any()
    assert mask[7:-7, 12:-12].all() and mask.sum() == 87_136


@pytest.mark.parametrize(("harmonics", "bands"), [(False, 1), (True, 9)])
def test_colours_keep_or_lose_how_they_change_with_the_direction(harmonics, bands):
    truth = path("loop", 4)
    oracle = Oracle(truth)
    found = reconstruct(oracle, oracle.frames, [range(4)], truth, harmonics=harmonics)
    assert found.gaussians.sh.shape[1] == bands
    assert_close(found.gaussians.sh[:, 0, 0], torch.full((len(found.gaussians),), 0.5, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- chunks


def test_short_videos_are_looked_at_whole_and_long_ones_in_as_many_chunks_as_it_takes():
    assert chunks_of(60) == [list(range(60))]
    assert chunks_of(FRAMES_AT_ONCE) == [[int(i * (FRAMES_AT_ONCE - 1) / 127) for i in range(128)]]
    chunks = chunks_of(FRAMES_AT_ONCE + 1)
    assert [len(chunk) for chunk in chunks] == [128, 128]
    assert chunks[0][-10:] == chunks[1][:10] and chunks[1][-1] == FRAMES_AT_ONCE


def test_more_views_than_a_long_video_has_frames_for_are_as_many_as_it_has():
    chunks = chunks_of(600, 512)
    assert [len(chunk) for chunk in chunks] == [305, 305] and chunks[0][-10:] == chunks[1][:10]
    assert sorted({frame for chunk in chunks for frame in chunk}) == list(range(600))


@pytest.mark.parametrize("arguments", [(1,), (0,), (20, 1)])
def test_one_view_is_refused(arguments):
    with pytest.raises(ValueError, match="no second camera"):
        chunks_of(*arguments)


def test_more_chunks_than_a_video_has_frames_for_are_refused():
    with pytest.raises(ValueError, match="take fewer chunks"):
        chunks_of(100, 64, 2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poses": "vipe"}, "poses 'vipe': expected one of"),
        ({"poses": "given"}, "no cameras to follow"),
        ({"cameras": path("loop", 11)}, "a frame 11, but there are 11 cameras"),
        ({"cameras": path("loop", 12), "alignment": "icp"}, "alignment 'icp'"),
        ({"cameras": path("loop", 12), "follow": "both"}, "'predicted' or the 'given'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    oracle = Oracle(path("loop", 12))
    with pytest.raises(ValueError, match=message):
        reconstruct(oracle, oracle.frames, [range(12)], **options)


# ----------------------------------------------------------------------------------------------------------- metres


def metric_views(frames=3):
    depth = 1 + torch.rand(frames, 8, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Views(depth, 1 + depth, path("loop", frames))


def test_metres_are_the_metric_network_s_at_the_focal_length_of_the_cameras():
    views = metric_views()
    metric = 6 * views.depth * 300 / 50  # the cameras have 50 pixels
    moved, scale = in_metres(views, metric, torch.zeros_like(metric))
    assert scale == pytest.approx(6)
    assert_close(moved.depth, 6 * views.depth)
    assert_close(moved.cameras.centers, 6 * views.cameras.centers)


def test_uncertain_pixels_and_sky_have_no_say_and_sky_goes_behind_everything():
    views = metric_views()
    metric, sky = 6 * views.depth * 300 / 50, torch.zeros_like(views.depth)
    uncertain = views.confidence < views.confidence[:, 2:].quantile(0.5)
    metric[uncertain] *= 3
    sky[:, :2], metric[:, :2] = 0.9, 0.1
    moved, scale = in_metres(views, metric, sky)
    assert scale == pytest.approx(6)
    assert (moved.depth[:, :2] >= moved.depth[:, 2:].quantile(0.98)).all() and (moved.confidence[:, :2] == 1).all()
    assert_close(moved.confidence[:, 2:], views.confidence[:, 2:])


def test_metres_pixel_by_pixel():
    random = torch.Generator().manual_seed(2)
    depth, metric, sky, confidence = torch.rand(4, 3, 8, 10, generator=random, dtype=torch.float64)
    depth[0, 0] *= 20
    metric[1, 1] = 0
    confidence[sky >= 0.3] += 5  # sky is sure to be sky
    views = Views(
        depth, 1 + confidence, replace(path("loop", 3), K=path("loop", 3).K * torch.tensor([[1], [1.4], [1]]))
    )
    moved, scale = in_metres(views, metric, sky)
    pixels = list(zip(*(x.flatten().tolist() for x in (depth, metric * 60 / 300, 1 + confidence, sky)), strict=True))
    ground = [pixel for pixel in pixels if pixel[3] < 0.3]
    median = float(torch.tensor([pixel[2] for pixel in ground], dtype=torch.float64).quantile(0.5))
    sure = [(d, m) for d, m, c, _ in ground if c >= median and d > 1e-3 and m > 1e-2]
    assert scale == pytest.approx(sum(d * m for d, m in sure) / sum(d * d for d, _ in sure))
    farthest = scale * float(torch.tensor([pixel[0] for pixel in ground], dtype=torch.float64).quantile(0.99))
    behind = torch.where(sky < 0.3, scale * depth, min(farthest, 200.0))
    assert_close(moved.depth, behind)


def test_sky_is_no_farther_than_200_metres():
    views = metric_views()
    sky = torch.zeros_like(views.depth)
    sky[:, :2] = 0.9
    moved, _ = in_metres(views, 1e4 * views.depth, sky)
    assert_close(moved.depth[:, :2], torch.full((3, 2, 10), 200.0, dtype=torch.float64))


def test_nothing_but_sky_has_no_size():
    views = metric_views()
    with pytest.raises(ValueError, match="3 frames are sky or uncertain everywhere"):
        in_metres(views, views.depth, torch.ones_like(views.depth))
