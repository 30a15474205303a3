from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.world import consistency, consistency_picture
from lyra_core.world.world import World, append, as_bits, begin, plan, to_float, to_uint8

SIZE, FOCAL, DEPTH = (144, 208), 200.0, 3.0
WALL = F.interpolate(torch.rand(1, 3, 70, 110, generator=torch.Generator().manual_seed(3)), (280, 440), mode="bicubic").clamp(0, 1)


def aside(places) -> Cameras:
    """Cameras that look ahead from places along the x axis."""
    cameras = pinhole(SIZE, FOCAL, len(places))
    w2c = cameras.w2c.clone()
    w2c[:, 0, 3] = -torch.as_tensor(places, dtype=torch.float32)
    return Cameras(w2c, cameras.K, SIZE)


def pictures(cameras: Cameras) -> torch.Tensor:
    """A painted wall, three units ahead, (F, H, W, 3)."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in SIZE), indexing="ij")
    left = cameras.centers[:, 0] * FOCAL / DEPTH + 100
    x, y = columns[None] + left[:, None, None], (rows + 60).expand(len(cameras), *SIZE)
    grid = torch.stack([2 * x / 439 - 1, 2 * y / 279 - 1], -1)
    return F.grid_sample(WALL.expand(len(cameras), -1, -1, -1), grid, align_corners=True).permute(0, 2, 3, 1)


def grown(world: World, cameras: Cameras, frames: torch.Tensor) -> World:
    the_plan = plan(world, cameras)
    depths = {frame: torch.full(SIZE, DEPTH) for frame in range(the_plan.first_frame, the_plan.first_frame + len(cameras))}
    return append(world, the_plan, to_uint8(frames), torch.zeros(frames.shape[:3], dtype=torch.bool), depths)


OUT = aside(torch.linspace(0, 0.4, 17)[1:])
BACK = aside(torch.linspace(0.4, 0, 17)[1:])


@pytest.fixture(scope="module")
def first():
    return begin(pictures(aside([0.0]))[0], torch.full(SIZE, DEPTH), aside([0.0]))


@pytest.fixture(scope="module")
def true(first):
    """Out and back, painted as the wall is."""
    return grown(grown(first, OUT, pictures(OUT)), BACK, pictures(BACK))


@pytest.fixture(scope="module")
def found(true):
    return consistency.measure(true, 2)


def test_a_world_painted_as_it_is_agrees_with_itself_in_every_number(found):
    whole = found.whole
    assert whole.frames == (8, 16, 24, 32) and len(found.chunks) == 2
    assert whole.psnr > 40 and whole.drift < 2e-3 and whole.flicker < 5e-3
    assert whole.tsed == {1.0: 1.0, 2.0: 1.0, 4.0: 1.0} and whole.pairs == 4
    assert whole.registered == 1 and whole.degrees < 0.1 and whole.distance < 0.01 and whole.ate < 0.01
    assert (whole.revisits, found.chunks[0].revisits) == (2, 0)
    assert whole.revisit_psnr == consistency.MOST and whole.revisit_ssim == pytest.approx(1, abs=1e-6)
    assert 0.7 < whole.known < 1


def test_gain_and_offset_of_a_chunk_are_told_and_taken_out(first, found):
    world = grown(first, OUT, pictures(OUT) * 0.8 + 0.05)
    tinted = consistency.measure(world, 2).whole
    chunk = consistency.measure(world, 2).chunks[0]
    assert tinted.psnr < 30 < 40 < tinted.psnr_fitted
    assert chunk.gain == pytest.approx((0.8,) * 3, abs=0.01) and chunk.offset == pytest.approx((0.05,) * 3, abs=0.01)
    assert tinted.drift > 0.01 > found.whole.drift


def test_frames_seen_from_elsewhere_than_commanded_are_told_by_pose_and_epipolar_lines(first):
    lifted = pictures(OUT)
    lifted[8:] = lifted[8:].roll(6, 1)  # six pixels down: the camera has risen by 6 * 3 / 200
    whole = consistency.measure(grown(first, OUT, lifted), 2).whole
    assert whole.tsed[4.0] == 0.5 and whole.tsed[1.0] == 0.5
    assert whole.registered == 1 and whole.ate == pytest.approx(0.09 / 2**0.5, abs=0.01)
    assert whole.distance == pytest.approx(0.09 / 2, abs=0.01), "one of two is off by 6 pixels at 3 units"


def test_frames_of_nothing_known_have_no_camera_and_say_so(first):
    noise = torch.rand(16, *SIZE, 3, generator=torch.Generator().manual_seed(5))
    found = consistency.measure(grown(first, OUT, noise), 2)
    assert found.whole.registered == 0 and found.whole.degrees is None and found.whole.flicker > 0.1
    assert "  RotErr, degrees, median" in consistency.table(found) and json.dumps(found.as_plain())


def test_a_frame_that_comes_back_otherwise_lowers_psnr_and_ssim_and_is_the_worst(first, true):
    other = pictures(BACK)
    other[-1] = (other[-1] + 0.1).clamp(0, 1)
    found = consistency.measure(grown(grown(first, OUT, pictures(OUT)), BACK, other), 2)
    assert found.whole.revisit_psnr < 30 and found.whole.revisit_ssim < 0.999
    assert (found.worst[1].back, found.worst[1].first) == (32, 0) and found.worst[0].back is None


def test_what_the_first_frame_invented_is_not_compared(true):
    invented = torch.ones(16, *SIZE, dtype=torch.bool)
    chunks = (replace(true.chunks[0], invented_bits=as_bits(invented)), true.chunks[1])
    whole = consistency.measure(World(true.first, chunks, true.memory), 2).whole
    assert whole.revisits == 1, "only the photo is left to come back to"


def test_a_world_that_is_only_a_photo_has_nothing_to_compare(first):
    with pytest.raises(ValueError, match="photo alone"):
        consistency.measure(first)


def test_the_pictures_are_of_one_size_and_show_the_worst_frame(true, found):
    drawn = consistency_picture.draw(true, found)
    assert drawn.shape[0] == 2 and drawn.shape[-1] == 3 and drawn.shape[1] > 500
    tall = round(416 * SIZE[0] / SIZE[1])
    shown = drawn[0, 44 : 44 + tall, 432:848]
    frame = F.interpolate(to_float(true.frame(found.worst[0].frame)).permute(2, 0, 1)[None], (tall, 416))[0].permute(1, 2, 0)
    assert float((shown - frame).abs().mean()) < 0.05


def test_the_table_has_a_column_for_each_chunk(found):
    lines = consistency.table(found).splitlines()
    assert lines[0].split() == ["all", "chunk", "0", "chunk", "1"] and len(lines) == 20
    assert all(len(line) <= len(lines[0]) for line in lines)


def test_the_node_gives_table_pictures_and_numbers(pack, true, first):
    from lyra_pack.nodes.consistency import Consistency

    report, psnr, drawn, scores = Consistency.execute(true, 1).args
    assert "TSED at 2 px" in report and psnr == consistency.MOST and len(drawn) == 2
    assert json.loads(scores)["whole"]["revisits"] == 1 and len(json.loads(scores)["chunks"]) == 2
    report, psnr, drawn, scores = Consistency.execute(first).args
    assert "nothing has grown" in report.lower() and psnr == 0 and scores == "{}" and tuple(drawn.shape) == (1, *SIZE, 3)
