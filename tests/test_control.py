"""What any video model is shown of a chunk, and what becomes of its frames: holes are grey, colours stay the photo's."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole, quaternion_to_rotation
from lyra_core.memory.depth import room_box
from lyra_core.world import world_files
from lyra_core.world.control import ControlViews, MaskRule, Tint, anchored, control_views, fit_tint, uncertain
from lyra_core.world.world import World, append, begin, plan, rewind, to_float, to_uint8

SIZE, FOCAL = (64, 96), 80.0


def camera_at(position=(0.0, 0.0, 0.0), yaw=0.0) -> Cameras:
    w2c = torch.eye(4)
    w2c[:3, :3] = quaternion_to_rotation(torch.tensor([math.cos(yaw / 2), 0.0, math.sin(yaw / 2), 0.0]))
    w2c[:3, 3] = -w2c[:3, :3] @ torch.tensor(position)
    return Cameras(w2c[None], pinhole(SIZE, FOCAL).K, SIZE)


def walk(count: int, first: int = 1, yaw: float = 0.03) -> Cameras:
    """Frames `first` on of an endless walk ahead and to the side, turning."""
    cameras = [camera_at((0.02 * i, 0.0, 0.03 * i), yaw * math.sin(i / 5)) for i in range(first, first + count)]
    return Cameras(torch.cat([c.w2c for c in cameras]), torch.cat([c.K for c in cameras]), SIZE)


def photo() -> World:
    noise = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    image = 0.25 + 0.5 * torch.nn.functional.interpolate(noise, SIZE, mode="bilinear")[0].movedim(0, -1)
    depth = room_box(SIZE, pinhole(SIZE, FOCAL).K[0], (0.5, 0.5), (0.2, 0.15, 0.8, 0.85), 5.0).depth
    depth[24:44, 40:60] = 1.5
    return begin(image, depth, camera_at())


@pytest.fixture(scope="module")
def world() -> World:
    return photo()


@pytest.fixture(scope="module")
def views(world) -> ControlViews:
    return control_views(world, plan(world, walk(16)))


@pytest.fixture(scope="module")
def generation(comfy_host):
    return importlib.import_module("lyra_core.models.generation")


# --------------------------------------------------------------------------------------------------------- control views


def test_known_frames_come_first_and_holes_are_exactly_grey(world, views):
    assert views.video.shape == (17, *SIZE, 3) and views.overlap == 1
    assert torch.equal(to_uint8(views.video[0]), world.frame(0)) and not views.generate[0].any()
    assert 0.02 < views.generate[-1].float().mean() < 0.9
    assert (views.video[views.generate] == 0.5).all()
    assert not (views.video[~views.generate] == 0.5).all(-1).any()


def test_a_camera_that_stays_is_shown_the_photo_and_paints_only_its_edges(world):
    still = Cameras(camera_at().w2c.repeat(4, 1, 1), camera_at().K.repeat(4, 1, 1), SIZE)
    views = control_views(world, plan(world, still), rule=MaskRule(bend=0))
    assert not views.generate.any()
    assert_close(views.video, to_float(world.frame(0)).expand_as(views.video), rtol=0, atol=2e-3)
    edges = control_views(world, plan(world, still)).generate[1]
    assert edges[22:46, 38:62].any() and edges.float().mean() < 0.35
    assert not edges[28:40, 46:54].any() and not edges[28:40, 10:14].any()  # inside the square, on a wall


def test_a_world_with_fewer_frames_than_the_overlap_gives_what_it_has(world):
    assert control_views(world, plan(world, walk(4)), overlap=5).overlap == 1
    target = plan(world, walk(4))
    frames = torch.full((4, *SIZE, 3), 128, dtype=torch.uint8)
    depth = {4: torch.full(SIZE, 4.0)}
    grown = append(world, target, frames, torch.zeros(4, *SIZE, dtype=torch.bool), depth)
    views = control_views(grown, plan(grown, walk(4, 5)), overlap=5)
    assert views.overlap == 5 and len(views.video) == 9 and not views.generate[:5].any()
    assert torch.equal(to_uint8(views.video[0]), world.frame(0)) and torch.equal(to_uint8(views.video[4]), frames[3])


def test_every_retrieved_frame_is_looked_up_not_the_newest_alone(world):
    target = plan(world, walk(8))
    frames = torch.zeros(8, *SIZE, 3, dtype=torch.uint8)
    nothing = {8: torch.zeros(SIZE)}  # the newest frame's depth is unknown
    nothing[8][:1, :1] = 3.0
    grown = append(world, target, frames, torch.zeros(8, *SIZE, dtype=torch.bool), nothing)
    again = plan(grown, walk(8, 9))
    assert 0 in again.retrieved
    assert control_views(grown, again).generate[1:].float().mean() < 0.6


def test_planes_have_no_edges_and_silhouettes_have():
    found = torch.ones(SIZE, dtype=torch.bool)
    rows = torch.arange(SIZE[0], dtype=torch.float32)[:, None].expand(SIZE)
    floor = 60 / (rows + 1)  # however slanted
    assert not uncertain(found, floor, MaskRule()).any()
    floor = floor.clone()
    floor[10:20, 30:40] = 0.5
    holes = uncertain(found, floor, MaskRule(widening=0))
    assert holes[10:20, 28:30].all() and holes[10:20, 30:32].all() and not holes[13:17, 33:37].any()
    wider = uncertain(found, floor, MaskRule(widening=3))
    assert wider.sum() > holes.sum() and (wider | ~holes).all()
    assert not uncertain(found, floor, MaskRule(bend=0)).any()


def test_holes_grow_by_as_many_pixels_as_asked():
    found, depth = torch.ones(SIZE, dtype=torch.bool), torch.full(SIZE, 2.0)
    found[30, 40] = False
    for pixels in (0, 1, 4):
        assert uncertain(found, depth, MaskRule(dilation=pixels)).sum() == (2 * pixels + 1) ** 2


def test_the_depth_video_is_disparity_with_the_nearest_point_white(views):
    assert views.disparity.shape == (17, *SIZE)
    for frame in views.disparity:
        assert frame.min() == 0 and frame.max() == 1
    assert views.disparity[0][30:40, 46:54].min() > 0.95  # the square is nearest
    far = 1 / 5.0
    assert views.disparity[0][5, 5] > views.disparity[0][32, 30] and far < 1


def test_a_plan_of_another_world_and_no_overlap_are_refused(world):
    other = plan(world, walk(4))
    grown = append(
        world,
        other,
        torch.zeros(4, *SIZE, 3, dtype=torch.uint8),
        torch.zeros(4, *SIZE, dtype=torch.bool),
        {4: torch.ones(SIZE)},
    )
    with pytest.raises(ValueError, match="made for another world"):
        control_views(grown, other)
    with pytest.raises(ValueError, match="overlap of 0 frames"):
        control_views(world, other, overlap=0)


# ---------------------------------------------------------------------------------------------------------------- colours


def filled(views: ControlViews) -> torch.Tensor:
    """A generator that paints all holes in one colour."""
    return torch.where(views.generate[..., None], torch.tensor([0.3, 0.4, 0.5]), views.video)


GAIN, OFFSET = torch.tensor([1.15, 0.9, 1.05]), torch.tensor([0.04, -0.03, 0.02])


def test_a_tint_is_found_and_taken_out(views):
    painted = filled(views) * GAIN + OFFSET
    painted[:, :16] = 0.9  # where the model painted something else altogether
    tint, share = fit_tint(painted[1:], views, range(1, 17))
    assert_close(torch.tensor(tint.gain), GAIN, rtol=0, atol=5e-3)
    assert_close(torch.tensor(tint.offset), OFFSET, rtol=0, atol=5e-3)
    assert 0.2 < share < 1
    assert_close(tint.removed(painted[:, 20:]), filled(views)[:, 20:], rtol=0, atol=5e-3)


def test_colours_that_hardly_vary_say_nothing_of_contrast(views):
    flat = ControlViews(torch.full_like(views.video, 0.4), torch.zeros_like(views.generate), views.disparity, 1)
    noisy = flat.video + 0.1 + 0.01 * torch.randn(flat.video.shape, generator=torch.Generator().manual_seed(0))
    tint, _ = fit_tint(noisy[1:], flat, range(1, 17))
    assert tint.gain == pytest.approx((1, 1, 1), abs=0.05)
    assert [g * 0.4 + o for g, o in zip(tint.gain, tint.offset, strict=True)] == pytest.approx([0.5] * 3, abs=0.005)


def test_with_too_little_known_the_last_fit_counts(world, views):
    nothing = ControlViews(views.video, torch.ones_like(views.generate), views.disparity, 1)
    assert fit_tint(views.video[1:], nothing, range(1, 17)) == (None, 0.0)
    away = plan(world, Cameras(camera_at(yaw=3.1).w2c.repeat(8, 1, 1), camera_at().K.repeat(8, 1, 1), SIZE))
    frames = torch.full((8, *SIZE, 3), 0.5)
    same, tint, report = anchored(world, away, frames)
    assert torch.equal(same, frames) and tint == Tint() and "as before, because only 0.0%" in report
    settings = {"tint": {"gain": [2.0, 1.0, 1.0], "offset": [0.1, 0.0, 0.0]}}
    depth = {8: torch.full(SIZE, 4.0)}
    invented = torch.zeros(8, *SIZE, dtype=torch.bool)
    grown = append(world, away, to_uint8(frames), invented, depth, settings=settings)
    back = plan(grown, Cameras(camera_at(yaw=1.5).w2c.repeat(8, 1, 1), camera_at().K.repeat(8, 1, 1), SIZE))
    assert anchored(grown, back, frames)[1].gain == (2.0, 1.0, 1.0)


# ----------------------------------------------------------------------------------------------------------- frames in


def one_more(generation, world: World, paint=filled, overlap=1, anchor=True, count=16, **options):
    from lyra_core.models.depth_estimators import MemoryEstimator

    the_plan = plan(world, walk(count, len(world)), views=3)
    views = control_views(world, the_plan, overlap)
    return generation.append_frames(world, the_plan, paint(views), MemoryEstimator(), anchor=anchor, **options)


@pytest.mark.parametrize("overlap", [1, 5])
def test_any_model_grows_a_world_between_the_two(generation, world, overlap):
    grown, report = one_more(generation, world, prompt="a room", settings={"generator": "stand-in"})
    grown, report = one_more(generation, grown, overlap=overlap, prompt="more")
    assert len(grown) == 33 and [c.prompt for c in grown.chunks] == ["a room", "more"]
    assert f"{overlap} known frame" in report and "gain 1.0" in report
    assert grown.memory.frames == (0, 8, 16, 24, 32) and grown.chunks[1].latents is None
    expected = plan(world, walk(16))
    shown = filled(control_views(world, expected))[1:]
    assert (grown.chunks[0].frames.int() - to_uint8(shown).int()).abs().max() <= 2
    assert torch.equal(to_uint8(grown.exact(32) * 0.5 + 0.5), grown.frame(32))
    assert 0 < grown.chunks[0].invented.float().mean() < 1


def test_colours_that_drift_with_every_chunk_are_held_by_the_photo(generation, world):
    def tinted(views):
        return (filled(views) * 1.08 + 0.02).clamp(0, 1)

    offs = []
    for anchor in (True, False):
        grown = world
        for _ in range(3):
            grown, _ = one_more(generation, grown, tinted, anchor=anchor, count=8)
        truth = world
        for _ in range(3):
            truth, _ = one_more(generation, truth, anchor=False, count=8)
        offs.append(float((to_float(grown.frame(24)) - to_float(truth.frame(24))).abs().mean()))
    assert offs[0] < 0.005 and offs[1] > 0.05


def test_what_was_taken_out_is_kept_with_the_chunk_but_does_not_make_it_another(generation, world, tmp_path):
    settings = {"generator": "wan vace", "quality": {"steps": 4}}
    grown, _ = one_more(generation, world, lambda views: filled(views) * 0.9, settings=settings)
    assert grown.chunks[0].settings["tint"]["gain"] == pytest.approx([0.9] * 3, abs=0.01)
    world_files.save(grown, tmp_path)
    found = world_files.made_before(tmp_path, world, "", settings)
    assert found is not None and found.key == grown.key
    assert world_files.made_before(tmp_path, world, "", {**settings, "quality": {"steps": 5}}) is None
    assert rewind(found, 0).key == world.key


@pytest.mark.parametrize(
    "frames, says",
    [
        (torch.zeros(15, *SIZE, 3), "asks for 16 frames, found 15"),
        (torch.zeros(18, *SIZE, 3), "found 18; up to 13 known ones"),
        (torch.zeros(17, 32, 96, 3), "the frames are 96x32 with 3 channels, the world is 96x64"),
        (torch.full((16, *SIZE, 3), math.nan), "NaN or infinite pixels"),
    ],
)
def test_frames_that_are_not_the_plan_s_are_refused(generation, world, frames, says):
    with pytest.raises(ValueError, match=says):
        one_more(generation, world, lambda views: frames)


# ------------------------------------------------------------------------------------------------------------- as nodes


def test_the_two_nodes_are_wired_around_any_model(pack, world):
    estimator = pack.depth_estimator.MemoryEstimator.execute().args[0]
    the_plan = plan(world, walk(16))
    out = pack.control.ControlViews.execute(world, the_plan, 1, 2, 0.05, 2).args
    video, mask, depth, retrieved, length = out
    assert video.shape == depth.shape == (17, *SIZE, 3) and mask.shape == (17, *SIZE) and length == 17
    assert set(mask.unique().tolist()) == {0.0, 1.0} and (video[mask == 1] == 0.5).all()
    assert (depth[..., 0] == depth[..., 2]).all() and torch.equal(to_uint8(retrieved[-1]), world.frame(0))
    painted = torch.where(mask[..., None] == 1, 0.3, video)
    settings = json.dumps({"generator": "stand-in", "steps": 4})
    grown, report = pack.control.AppendFrames.execute(
        world, the_plan, painted, estimator, "memory", True, "a room", "", settings, "before"
    ).args
    assert len(grown) == 17 and report.startswith("before\n1 known frame in front dropped; colours: gain 1.0")
    assert grown.chunks[0].settings["generator"] == "stand-in" and grown.chunks[0].settings["steps"] == 4


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("lora", ["none", "lightx2v.safetensors"])
def test_vace_is_sampled_by_the_host_s_own_nodes(pack, models, lora, monkeypatch):
    monkeypatch.setattr(pack.control.folder_paths, "get_filename_list", lambda _: ["lightx2v.safetensors"])
    quality = {"quality": "Wan VACE distilled", "lora": lora, "lora_strength": 0.8, "steps": 6, "cfg": 1.0, "shift": 5.0}
    links = [[name, 0] for name in ("model", "positive", "negative", "latent")]
    low = {"low_noise_model": ["low", 0]} if models == 2 else {}
    graph = pack.control.SampleVace.execute(*links, ["told", 3], {**quality, "boundary": 0.875}, 3, 7, **low).expand
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("ModelSamplingSD3") == kinds.count("CFGGuider") == kinds.count("Lyra2TrustKnown") == models
    assert kinds.count("LoraLoaderModelOnly") == models * (lora != "none")
    assert kinds.count("Lyra2LeftoverNoise") == kinds.count("Lyra2ExpertSigmas") == models - 1
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert by_kind["KSamplerSelect"] == {"sampler_name": "euler"} and by_kind["RandomNoise"] == {"noise_seed": 7}
    assert by_kind["TrimVideoLatent"]["trim_amount"] == ["told", 3]
    latents = [n["inputs"]["latent_image"] for n in graph.values() if n["class_type"] == "SamplerCustomAdvanced"]
    assert latents == [["latent", 0]] * models  # the clean one, also for the second expert
