"""Chunks by the transformer: what it is shown, what becomes of what it paints, and that nothing of it can be lost."""

from __future__ import annotations

import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import killed
import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, join, pinhole
from lyra_core.conditioning import schedules
from lyra_core.conditioning.correspondence import canonical_history, on_latents, ray_maps, warped_correspondences
from lyra_core.conditioning.framepack import LYRA2
from lyra_core.memory.depth import room_box
from lyra_core.memory.depth_alignment import Estimate
from lyra_core.world import preview, world_files
from lyra_core.world.world import World, begin, plan, rewind, to_float, to_uint8, warped_views

SIZE, LATENT, FOCAL = (32, 48), (4, 6), 40.0
CHUNK, NEW, STILL, CHUNKS = 80, 20, 25, 4
NET = {"rank": 8, "dim": 24, "ffn_dim": 48, "num_heads": 2, "num_layers": 1, "text_dim": 16, "freq_dim": 32}
KILLED, LAST = 2, CHUNKS  # chunks that are whole before the kills, and at the end


@pytest.fixture(autouse=True)
def inference():
    """As the host runs its nodes."""
    with torch.inference_mode():
        yield


# ----------------------------------------------------------------------------------------------- a loop, also of a child


def smooth(seed: int) -> torch.Tensor:
    noise = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, SIZE, mode="bilinear")[0].movedim(0, -1)


def photo_world(views: bool = False) -> World:
    room = room_box(SIZE, pinhole(SIZE, FOCAL).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    more = [(smooth(4), room.depth, walk(40)[39])] if views else []
    return begin(smooth(3), room.depth, room.camera, more)


def walk(frames: int, first: int = 1) -> Cameras:
    """Frames `first` on of an endless walk: forward, aside and looking around."""
    cameras, step = pinhole(SIZE, FOCAL, frames), torch.arange(first, first + frames) / CHUNK
    yaw = 0.7 * torch.sin(1.5 * step)
    cameras.w2c[:, 0, 0], cameras.w2c[:, 0, 2] = yaw.cos(), -yaw.sin()
    cameras.w2c[:, 2, 0], cameras.w2c[:, 2, 2] = yaw.sin(), yaw.cos()
    centers = torch.stack([0.3 * torch.sin(step), torch.zeros(frames), 0.25 * step], 1)
    cameras.w2c[:, :3, 3] = -(cameras.w2c[:, :3, :3] @ centers[..., None])[..., 0]
    return cameras


def estimator(frames: torch.Tensor, cameras: Cameras, known: torch.Tensor, on_step=None) -> Estimate:
    """Sees what is known at half its size, and colours as relief."""
    depth = torch.where(known > 0, known, 3.0) * (1 + 0.02 * frames.mean(-1))
    return Estimate(depth / 2)


def ignore(done: int, total: int, picture: torch.Tensor | None = None) -> None:
    """Hears of progress."""


class Clip:
    """Stands for CLIP vision: means of what it is shown, widened."""

    def __init__(self):
        import comfy.model_patcher

        self.load_device = torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), self.load_device, self.load_device)
        self.shown = []

    def model(self, pixel_values, intermediate_output):
        assert intermediate_output == -2
        self.shown.append(pixel_values)
        patches = torch.nn.functional.avg_pool2d(pixel_values, 14).flatten(2).mT
        tokens = torch.cat([pixel_values.mean((2, 3))[:, None], patches], 1)
        return None, tokens @ torch.randn(3, 1280, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Loop:
    """The networks of one folder, and a chunk by them."""

    folder: Path

    @cached_property
    def vae(self):
        import comfy.sd
        from safetensors.torch import load_file

        with torch.inference_mode(False):
            return comfy.sd.VAE(sd=load_file(self.folder / "vae.safetensors"))

    @cached_property
    def model(self):
        import comfy.sd

        with torch.inference_mode(False):
            path = str(self.folder / "lyra2.safetensors")
            return comfy.sd.load_diffusion_model(path, {"dtype": torch.float32})

    @property
    def generation(self):
        from lyra_core.models import generation

        return generation

    def plan(self, world: World, frames: int = CHUNK):
        return plan(world, walk(frames, len(world)), views=3)

    def pack(self, world: World):
        return self.generation.pack(world, self.plan(world), self.vae)

    def sample(self, world: World, history, on_step=None) -> torch.Tensor:
        """By the host's own sampling, two steps."""
        import comfy.sample
        import comfy.samplers

        from lyra_core.models import lyra2_host

        image = self.generation.look(Clip(), world)
        text = torch.randn(1, 512, 16, generator=torch.Generator().manual_seed(5))
        prompt = [[text, {**lyra2_host.conditioning(history), "clip_vision_output": image}]]
        noise = schedules.initial_noise((1, *history.warped.shape), len(world.chunks))
        sampler, empty = comfy.samplers.ksampler("euler"), torch.zeros_like(noise)
        args = (self.model, noise, 1.0, sampler, schedules.full(2), prompt, prompt, empty)
        return comfy.sample.sample_custom(*args, callback=on_step, disable_pbar=True)[0]

    def grow(self, world: World, latents: torch.Tensor, on_step=None, depth_of=None) -> World:
        return self.grow_and_tell(world, latents, on_step, depth_of)[0]

    def grow_and_tell(self, world: World, latents: torch.Tensor, on_step=None, depth_of=None) -> tuple[World, str]:
        options = (depth_of or estimator, "memory", "on", {"generator": "lyra 2"}, on_step or ignore)
        return self.generation.grow(world, self.plan(world), latents, self.vae, *options)

    def chunk(self, world: World) -> World:
        return self.grow(world, self.sample(world, self.pack(world)))


def random_latents(seed: int, count: int = NEW) -> torch.Tensor:
    return torch.randn(16, count, *LATENT, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def loop(comfy_host, tiny_models) -> Loop:
    folder = comfy_host / "models" / "of_generation"
    tiny_models.write_vae(folder / "vae.safetensors", dim=2)
    tiny_models.write_lyra2(folder / "lyra2.safetensors", {**tiny_models.LYRA2_14B, **NET})
    return Loop(folder)


@pytest.fixture(scope="module")
def run(loop) -> SimpleNamespace:
    """A run of four chunks that never stopped: its worlds after 0 .. 4 chunks, and what happened on the way."""
    made = SimpleNamespace(worlds=[photo_world()], histories=[], asked=[], steps=[], reports=[])

    def watch(frames, cameras, known, on_step=None):
        made.asked.append((frames, cameras, known))
        return estimator(frames, cameras, known)

    with torch.inference_mode():
        for _ in range(CHUNKS):
            world = made.worlds[-1]
            made.histories.append(loop.pack(world))
            made.steps.append([])
            latents = loop.sample(world, made.histories[-1])
            grown, report = loop.grow_and_tell(world, latents, lambda *step: made.steps[-1].append(step), watch)
            made.worlds.append(grown)
            made.reports.append(report)
    made.last = made.worlds[-1]
    return made


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory) -> Path:
    """The run on disk. To be read only."""
    folder = tmp_path_factory.mktemp("saved") / "w"
    world_files.save(run.last, folder)
    return folder


def equal(ours: World, theirs: World) -> bool:
    """Frames, latents, exact last frames and prompts by their keys; the memory one by one."""
    return ours.keys == theirs.keys and all(
        a.frame == b.frame
        and torch.equal(a.depth, b.depth)
        and torch.equal(a.camera.w2c, b.camera.w2c)
        and (a.latent is None) == (b.latent is None)
        and (a.latent is None or torch.equal(a.latent, b.latent))
        for a, b in zip(ours.memory.keyframes, theirs.memory.keyframes, strict=True)
    )


def alike(ours, theirs) -> bool:
    """Two histories, guides included."""
    pairs = zip(
        (ours.latents, ours.warped, *ours.guides()), (theirs.latents, theirs.warped, *theirs.guides()), strict=True
    )
    return all(torch.equal(a, b) for a, b in pairs)


# -------------------------------------------------------------------------------------------------- what it is shown


def test_the_first_chunk_is_shown_the_still_photo(loop, run):
    network, history, photo = loop.vae.first_stage_model, run.histories[0], smooth(3) * 2 - 1
    still = photo.movedim(-1, 0)[None, :, None].expand(1, 3, 97, *SIZE)
    latents = network.encode(still)[0]
    alone = network.encode(still[:, :, :1])[0]
    retrieved = list(loop.plan(run.worlds[0]).retrieved)
    assert retrieved == [0]
    expected = torch.cat([alone] + [alone] * 5 + [latents[:, 6:]], 1)
    assert_close(history.latents, expected, rtol=0, atol=2e-6)


def test_slots_hold_the_anchor_the_retrieved_and_the_latest(loop, run):
    """Of a world of two chunks: latent 0, five frames from memory, latents 46 to 64 of 65."""
    world, history = run.worlds[2], run.histories[2]
    planned = loop.plan(world)
    assert 2 <= len(planned.retrieved) <= 5 and len(set(planned.retrieved)) > 1
    network, photo = loop.vae.first_stage_model, (smooth(3) * 2 - 1).movedim(-1, 0)[None, :, None]
    anchor = network.encode(photo)[0, :, 0]
    known = {k.frame: anchor if k.frame == 0 else k.latent for k in world.memory.keyframes}
    spatial = [known[frame] for frame in [0] * (5 - len(planned.retrieved)) + list(planned.retrieved)]
    recent = world.chunks[1].latents.history[:, 1:]
    expected = torch.cat([torch.stack([anchor, *spatial], 1), recent], 1)
    assert_close(history.latents, expected, rtol=0, atol=2e-6)
    assert torch.equal(history.latents[:, 6:], recent)
    frames = [0] + [0] * (5 - len(planned.retrieved)) + list(planned.retrieved) + list(range(88, 161, 4))
    guides, target = history.guides(), planned.target
    cameras = join(world.cameras[frames], target[3::4])
    rays = on_latents(ray_maps(cameras, world.cameras[160]))
    assert_close(guides.rays, rays, rtol=0, atol=1e-5)
    keyframes = [world.memory[frame] for frame in planned.retrieved]
    seen = [canonical_history(LYRA2, SIZE), warped_correspondences(LYRA2, keyframes, target)]
    assert torch.equal(guides.correspondences, torch.cat(seen, 1))


def test_latents_that_the_memory_keeps_are_not_encoded_again(loop, run, monkeypatch):
    streaming, encoded = loop.generation.streaming_vae, []
    original = streaming.encode_alone
    monkeypatch.setattr(
        streaming, "encode_alone", lambda v, pictures: encoded.append(pictures) or original(v, pictures)
    )
    monkeypatch.setattr(streaming, "prime", None)  # nor is the photo encoded 97 times over
    steps = []
    again = loop.generation.pack(run.worlds[2], loop.plan(run.worlds[2]), loop.vae, on_step=lambda *s: steps.append(s))
    assert alike(again, run.histories[2])
    for pictures in encoded:
        assert torch.equal(pictures, (smooth(3) * 2 - 1)[None])
    assert steps == [(1, 3), (2, 3)]


def test_the_warped_views_are_encoded_with_the_first_one_repeated(loop, run):
    world, planned = run.worlds[2], loop.plan(run.worlds[2])
    views = warped_views(world, planned.target)[0]
    assert (views == 0).all(-1).any()  # holes are black
    video = torch.cat([views[:1], views])
    expected = loop.vae.encode(video)[0][:, 1:]
    assert_close(run.histories[2].warped, expected, rtol=0, atol=2e-6)


def test_a_further_view_fills_a_slot_with_its_own_picture_and_camera(loop):
    world = photo_world(views=True)
    planned = replace(loop.plan(world), retrieved=(-1, 0))
    history = loop.generation.pack(world, planned, loop.vae)
    view = to_float(to_uint8(smooth(4))) * 2 - 1
    expected = loop.vae.first_stage_model.encode(view.movedim(-1, 0)[None, :, None])[0, :, 0]
    assert_close(history.latents[:, 4], expected, rtol=0, atol=2e-6)
    rays = on_latents(ray_maps(world.memory[-1].camera, world.first.cameras))
    assert_close(history.guides().rays[:, 4:5], rays, rtol=0, atol=1e-5)


def test_clip_looks_at_the_whole_newest_frame_as_it_was_made(loop, run):
    from lyra_core.models import generation

    clip = Clip()
    seen = generation.look(clip, run.worlds[1])
    newest = run.worlds[1].chunks[0].newest.movedim(-1, 0)[None]
    square = torch.nn.functional.interpolate(newest, (224, 224), mode="bicubic", align_corners=False)
    mean, spread = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    prepared = ((square[0].movedim(0, -1) * 0.5 + 0.5 - mean) / spread).movedim(-1, 0)
    assert_close(clip.shown[0][0], prepared, rtol=0, atol=1e-5)
    assert seen.penultimate_hidden_states.shape == (1, 257, 1280)


def test_the_host_makes_room_before_the_vae_runs(loop, run, monkeypatch):
    streaming, asked = loop.generation.streaming_vae, []

    def load(vae, size):
        asked.append((vae, size))
        raise InterruptedError

    monkeypatch.setattr(streaming, "load", load)
    for verb in (loop.pack, lambda world: loop.grow(world, random_latents(0))):
        with pytest.raises(InterruptedError):
            verb(run.worlds[2])
    assert asked == [(loop.vae, LATENT)] * 2


# ------------------------------------------------------------------------------------------------- what becomes of it


def test_a_chunk_holds_what_was_sampled_and_what_was_made_of_it(loop, run):
    """The host's network on everything at once says the same of the second chunk."""
    network, world = loop.vae.first_stage_model, run.worlds[2]
    still = (smooth(3) * 2 - 1).movedim(-1, 0)[None, :, None].expand(1, 3, 97, *SIZE)
    sampled = [chunk.latents.sampled for chunk in world.chunks]
    video = network.decode(torch.cat([network.encode(still)[0], *sampled], 1)[None])[:, :, 97:]
    history = network.encode(torch.cat([still, video], 2))[0, :, STILL:]
    second, made = world.chunks[1], video[0].movedim(0, -1)[CHUNK:]
    assert_close(second.latents.history, history[:, NEW:], rtol=0, atol=2e-5)
    assert (second.frames.int() - to_uint8(made * 0.5 + 0.5).int()).abs().max() <= 1
    assert_close(second.newest, made[-1], rtol=0, atol=2e-5)
    assert second.frames.float().std() > 10  # a picture at all
    assert second.prompt == "on" and second.settings == {"generator": "lyra 2"}
    for frame in range(88, 161, 8):
        alone = network.encode(made[None, frame - 81].movedim(-1, 0)[None])[0, :, 0]
        assert_close(world.memory[frame].latent, alone, rtol=0, atol=2e-5)
    assert world.memory.frames == (0, *range(8, 161, 8))


def test_depth_is_asked_of_the_keyframes_and_brought_to_scene_units(loop, run):
    from lyra_core.memory.depth_alignment import known_depth

    world, grown, steps = run.worlds[1], run.worlds[2], run.steps[1]
    frames, cameras, known = run.asked[1]
    assert len(frames) == 10 and frames.min() >= 0 and frames.max() <= 1
    for index, frame in enumerate(range(88, 161, 8)):
        assert (to_uint8(frames[index]).int() - grown.frame(frame).int()).abs().max() <= 1
        assert torch.equal(cameras.w2c[index], walk(1, frame).w2c[0])
    helpers = [k for k in world.memory.keyframes if k.frame in {*loop.plan(world).retrieved, 80}]
    assert torch.equal(known, known_depth(helpers, cameras))  # oldest first, the newest frame among them
    assert known[-1].count_nonzero() > 0.3 * known[-1].numel()
    ratio = grown.memory[160].depth / estimator(frames, cameras, known).depth[-1]
    assert 1.8 < ratio.median() < 2.1 and "from the memory" in run.reports[1]
    assert [step[:2] for step in steps] == [(i, 11) for i in range(1, 12)]
    assert all(torch.equal(steps[i][2], grown.frame(88 + 8 * i)) for i in range(10))


def test_the_way_of_finding_the_scale_can_be_chosen(loop, run, monkeypatch):
    generation, chosen = loop.generation, []
    original = generation.in_scene_units
    monkeypatch.setattr(generation, "in_scene_units", lambda *args: chosen.append(args[3]) or original(*args))
    world = photo_world()
    world.stream.append(short_stream(loop))
    generation.grow(world, loop.plan(world), random_latents(1), loop.vae, estimator, "none")
    assert chosen == ["none"]


def test_depth_without_a_scale_is_replaced_by_the_memory_s_with_a_word_and_ends_no_walk(loop, run, caplog):
    def jumps(frames, cameras, known, on_step=None):
        """Nothing that could be compared with what is known, and no cameras."""
        return Estimate(torch.rand(known.shape, generator=torch.Generator().manual_seed(0)) * 50 + 0.01)

    from lyra_core.models.depth_estimators import MemoryEstimator

    depths = []
    for depth_of in (jumps, MemoryEstimator()):
        world = photo_world()
        world.stream.append(short_stream(loop))
        grown, report = loop.generation.grow(world, loop.plan(world), random_latents(9), loop.vae, depth_of)
        assert {"key", "sums"} <= vars(grown.chunks[-1]).keys()  # hashed already, beside the depths
        depths.append([keyframe.depth for keyframe in grown.memory.keyframes])
        if depth_of is jumps:
            assert "no scale" in report and "memory's own depth" in report and report in caplog.text
    assert all(torch.equal(ours, memorys) for ours, memorys in zip(*depths, strict=True))


def test_on_a_gpu_geometry_is_looked_up_beside_what_is_done_meanwhile(loop, monkeypatch):
    seen, stream = {}, SimpleNamespace(wait_stream=lambda other: seen.update(waited=other))
    monkeypatch.setattr(loop.generation, "_second_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the first")
    monkeypatch.setattr(torch.cuda, "stream", lambda given: nullcontext(seen.update(stream=given)))
    gpu, release = torch.device("cuda"), threading.Event()

    def work():
        assert release.wait(30)
        return threading.current_thread(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    for mode in (True, False):
        release.clear()
        with torch.inference_mode(mode), loop.generation.beside(gpu, work) as found:
            assert not found.done()
            release.set()
        thread, inference, grad = found.result()
        assert thread is not threading.current_thread() and inference is mode and not grad
    assert seen == {"waited": "the first", "stream": stream}
    with loop.generation.beside(gpu, lambda: 1 / 0) as found:
        pass
    with pytest.raises(ZeroDivisionError):
        found.result()
    with loop.generation.beside(torch.device("cpu"), threading.current_thread) as found:
        assert found.result() is threading.current_thread()


@pytest.mark.parametrize("yaw", [0.0, 0.4, -2.0])
def test_invented_is_what_the_photo_does_not_show(loop, yaw):
    """Turning on the spot: a pixel is seen if and only if its ray leaves through the photo."""
    world, camera = photo_world(), pinhole(SIZE, FOCAL)
    rotation = torch.tensor([[math.cos(yaw), 0, -math.sin(yaw)], [0, 1, 0], [math.sin(yaw), 0, math.cos(yaw)]])
    camera.w2c[0, :3, :3] = rotation
    found = loop.generation.invented(world, camera)[0]
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    K = camera.K[0]
    u, v, w = (torch.stack([x, y, torch.ones_like(x)], -1) @ (K @ rotation.T @ K.inverse()).T).unbind(-1)
    u, v = u / w, v / w
    inside = (w > 0) & (u >= 1) & (u <= 46) & (v >= 1) & (v <= 30)
    outside = (w <= 0) | (u <= -2) | (u >= 49) | (v <= -2) | (v >= 33)
    assert found[outside].all() and not found[inside].any()
    assert (found.any(), found.all()) == (yaw != 0, yaw == -2.0)


def test_made_up_pixels_are_marked_in_the_world_too(loop, run):
    for index, chunk in enumerate(run.last.chunks):
        target = walk(CHUNK, 1 + CHUNK * index)
        assert torch.equal(chunk.invented, loop.generation.invented(run.last, target)) and 0 < chunk.invented.float().mean() < 1


def test_what_the_photo_shows_is_not_invented_where_it_is_magnified(loop):
    """Nearer by, a point a pixel leaves gaps; the surface between them has none."""
    world, near = begin(smooth(3), torch.full(SIZE, 2.0), pinhole(SIZE, FOCAL)), pinhole(SIZE, FOCAL)
    near.w2c[0, 2, 3] = -1.4
    assert not loop.generation.invented(world, near).any()


# ------------------------------------------------------------------------------------------------ going on, from anywhere


def test_a_reopened_and_rewound_world_goes_on_as_if_it_had_never_stopped(loop, run, saved):
    world = world_files.load(saved, chunks=1)
    assert equal(world, run.worlds[1]) and not world.stream
    history = loop.pack(world)
    assert alike(history, run.histories[1])
    latents = loop.sample(world, history)
    assert torch.equal(latents, run.last.chunks[1].latents.sampled)
    assert equal(loop.grow(world, latents), run.worlds[2])


def test_two_branches_from_one_world_are_what_each_would_be_alone(loop, run):
    """The first takes the stream; the second has it made again."""
    begun = rewind(run.last, 0)
    loop.pack(begun)
    assert len(begun.stream) == 1
    before = [chunk.key for chunk in run.last.chunks]
    other = loop.grow(begun, random_latents(9))
    assert not begun.stream and len(other.stream) == 1
    assert other.keys[0] == run.last.keys[0] and other.key != run.worlds[1].key
    again = loop.grow(begun, run.last.chunks[0].latents.sampled)
    assert len(again.stream) == 1 and again.stream[0] is not other.stream[0]
    assert equal(again, run.worlds[1])
    assert [replace(chunk).key for chunk in run.last.chunks] == before


def test_a_stream_is_of_use_to_its_own_vae_only(loop, monkeypatch):
    import copy

    generation, world = loop.generation, photo_world()
    monkeypatch.setattr(generation.streaming_vae, "rebuild", lambda vae, *_args: vae)
    world.stream.append(short_stream(loop))
    mine = world.stream[0]
    assert generation.take_stream(world, loop.vae) is mine and not world.stream
    other = copy.copy(loop.vae)
    other.first_stage_model = copy.deepcopy(loop.vae.first_stage_model)
    world.stream.append(mine)
    assert generation.take_stream(world, other) is other


@pytest.mark.parametrize("chunk_frames, chunks", [(80, 1), (16, 2)])
def test_a_world_of_the_geometry_preview_is_continued(loop, chunk_frames, chunks):
    """As if its frames had come from the VAE: the host's network on all of them says the same."""
    count, network = chunk_frames * chunks, loop.vae.first_stage_model
    begun = photo_world()
    path = join(begun.last_camera, walk(count))
    world = preview.explore(begun, path, chunk_frames=chunk_frames)
    assert len(world.chunks) == chunks and world.chunks[0].latents is None
    history = loop.pack(world)
    photo = (smooth(3) * 2 - 1)[None]
    shown = torch.stack([to_float(world.frame(frame)) * 2 - 1 for frame in range(1, count + 1)])
    video = torch.cat([photo.expand(97, *photo.shape[1:]), shown]).movedim(-1, 0)[None]
    latents = network.encode(video)[0]
    assert_close(history.latents[:, 6:], latents[:, -19:], rtol=0, atol=2e-6)
    chosen = [world.cameras[max(0, 4 * (latent - 24))] for latent in range(latents.shape[1] - 19, latents.shape[1])]
    rays = on_latents(ray_maps(join(*chosen), world.last_camera))
    assert_close(history.guides().rays[:, 6:25], rays, rtol=0, atol=1e-5)
    sampled = loop.sample(world, history)
    grown = loop.grow(world, sampled)
    made = network.decode(torch.cat([latents, sampled], 1)[None])[0].movedim(0, -1)[-CHUNK:]
    assert (grown.chunks[-1].frames.int() - to_uint8(made * 0.5 + 0.5).int()).abs().max() <= 1
    assert_close(grown.chunks[-1].newest, made[-1], rtol=0, atol=2e-5)
    assert len(grown) == 1 + count + CHUNK


def test_a_preview_far_into_a_world_is_encoded_with_as_much_before_it_as_counts(loop, run):
    """Bit by bit what encoding everything gives, though not everything is encoded."""
    base = rewind(run.last, 2)
    path = join(base.last_camera, walk(16, len(base)))
    world = preview.explore(base, path, chunk_frames=16)
    streaming, lengths = loop.generation.streaming_vae, []
    original = streaming.encode

    def encode(vae, frames, stream):
        lengths.append(len(frames))
        return original(vae, frames, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "encode", encode)
        found = loop.generation.recent_latents(world, loop.vae, STILL + 2 * NEW - 3, "history")
    assert lengths == [1 + 112 + 16]
    everything = torch.stack([world.exact(max(0, frame)) for frame in range(-96, len(world))])
    stream = streaming.fresh(loop.vae)
    whole = torch.cat(list(original(loop.vae, everything, stream)), 1)
    assert torch.equal(found[:, 3:], whole[:, -4:])
    assert torch.equal(found[:, :3], run.last.chunks[1].latents.history[:, -3:])


# --------------------------------------------------------------------------------------------------- mistakes cost nothing


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the saved run."""
    return Path(shutil.copytree(saved, tmp_path / "w"))


def unchanged(world: World, before: World) -> bool:
    return equal(world, before) and replace(world.chunks[-1]).key == before.chunks[-1].key


def of_nan(frames, cameras, known, on_step=None):
    return Estimate(torch.full_like(known, math.nan))


def of_another_size(frames, cameras, known, on_step=None):
    return Estimate(known[:, ::2, ::2])


def broken(latents: torch.Tensor, value: float) -> torch.Tensor:
    latents = latents.clone()
    latents[3, 7, 1, 2] = value
    return latents


@pytest.mark.parametrize(
    "change, words",
    [
        ({"latents": random_latents(1, 19)}, r"expected finite latents \(16, 20, 4, 6\), found \(16, 19, 4, 6\)"),
        ({"latents": random_latents(1)[..., :4]}, r"found \(16, 20, 4, 4\)"),
        ({"latents": random_latents(1)[None]}, r"found \(1, 16, 20, 4, 6\)"),
        ({"latents": broken(random_latents(1), math.nan)}, "finite latents"),
        ({"latents": broken(random_latents(1), math.inf)}, "finite latents"),
        ({"frames": 12}, r"3 latents can't be streamed .* multiple of 2"),
        ({"planned_for": 3}, "plan again"),
        ({"estimator": of_nan}, "15360 NaN depths"),
        ({"estimator": of_another_size}, r"\(10, 16, 24\) for frames \(10, 32, 48\)"),
        ({"vae_fails": True}, "the VAE made NaN"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named_and_leaves_the_world_as_it_was(loop, run, saved, monkeypatch, change, words):
    generation, world = loop.generation, run.worlds[1]
    before, files = rewind(run.last, 1), sorted(saved.iterdir())
    planned = loop.plan(run.worlds[change.get("planned_for", 1)], change.get("frames", CHUNK))
    latents = change.get("latents", random_latents(1, len(planned.target) // 4))
    if "vae_fails" in change:
        monkeypatch.setattr(generation.streaming_vae, "advance", lambda v, z, s, on_frames: fails(z, on_frames))
    world.stream[:] = [short_stream(loop)]
    with pytest.raises(ValueError, match=words):
        generation.grow(world, planned, latents, loop.vae, change.get("estimator", estimator))
    world.stream.clear()
    assert unchanged(world, before) and sorted(saved.iterdir()) == files


def fails(latents, on_frames):
    for _ in range(len(latents[0]) // 2):
        on_frames(torch.zeros(8, *SIZE, 3))
    return torch.full_like(latents, math.nan)


def short_stream(loop):
    """A stream that is quickly made, where the numbers don't matter."""
    return loop.generation.streaming_vae.prime(loop.vae, smooth(3), 3)[1]


def test_a_plan_that_is_not_the_transformer_s_is_refused_before_anything_runs(loop, run, monkeypatch):
    monkeypatch.setattr(loop.generation.streaming_vae, "load", None)
    world = run.worlds[1]
    with pytest.raises(ValueError, match="makes 80 frames at a time, this plan asks for 12"):
        loop.generation.pack(world, loop.plan(world, 12), loop.vae)
    for verb in (
        loop.generation.pack,
        lambda *args: loop.generation.grow(*args[:2], random_latents(1), args[2], estimator),
    ):
        with pytest.raises(ValueError, match="made for another world.*plan again"):
            verb(world, loop.plan(run.worlds[2]), loop.vae)


def test_chunks_that_are_no_whole_groups_of_the_vae_are_refused_in_words(loop):
    begun = photo_world()
    world = preview.explore(begun, join(begun.last_camera, walk(12)), chunk_frames=12)
    for verb in (loop.pack, lambda w: loop.grow(w, random_latents(1))):
        with pytest.raises(ValueError, match="chunk 0 has 12 frames.*multiple of 8"):
            verb(world)


def test_a_full_disk_leaves_the_old_world_to_read_and_the_new_one_to_use(loop, run, saved, tmp_path, monkeypatch):
    folder, world = tmp_path / "w", run.worlds[3]
    world_files.save(run.worlds[2], folder)
    before = sorted(file.name for file in folder.iterdir())

    def full(_handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(world_files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            world_files.save(world, folder)
    assert sorted(file.name for file in folder.iterdir()) == before
    assert equal(world_files.load(folder), run.worlds[2])
    assert alike(loop.pack(world), run.histories[3])
    world_files.save(world, folder)
    assert equal(world_files.load(folder), run.worlds[3])


# ------------------------------------------------------------------------------------------------------------ kill -9

CHILD = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    tests, base, models, folder, task = sys.argv[1:]
    sys.path.insert(0, tests)
    import conftest
    conftest.load_tool("host").boot(Path(base))
    from lyra_core.models import lyra2_host
    lyra2_host.register()
    import test_generation
    with test_generation.torch.inference_mode():
        getattr(test_generation, task)(test_generation.Loop(Path(models)), Path(folder))
""")


def child(loop: Loop, folder: Path, task: str, base: Path) -> subprocess.CompletedProcess:
    """A process of its own that runs one of the functions below."""
    tests = Path(__file__).parent
    arguments = [str(tests), str(base), str(loop.folder), str(folder), task]
    paths = os.pathsep.join([str(tests.parent / "tools"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    script = folder.parent / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def die(*_anything) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_killed(loop: Loop, folder: Path) -> None:
    """The third chunk of a saved world, killed in every stage of it."""
    world = world_files.load(folder)
    assert len(world.chunks) == KILLED
    listed = (folder / "world.json").read_bytes()

    def whole(name: str) -> None:
        assert (folder / "world.json").read_bytes() == listed, name
        assert equal(world_files.load(folder), world), name

    history = loop.pack(world)
    assert killed.by(signal.SIGKILL, lambda: loop.sample(world, history, on_step=lambda step, *_: step == 1 and die()))
    whole("sampling")
    latents = loop.sample(world, history)
    world.stream.append(loop.generation.take_stream(world, loop.vae))
    assert killed.by(signal.SIGKILL, lambda: loop.grow(world, latents, on_step=lambda done, *_: done == 5 and die()))
    whole("vae")
    grown = loop.grow(world, latents)
    for name in ("fsync", "replace"):
        for time in (0, 1):  # the chunk, then the list of chunks
            assert killed.by(signal.SIGKILL, lambda name=name, time=time: saving(grown, folder, name, time))
            whole(f"{name} {time}")
    print("killed six times")


def saving(world: World, folder: Path, name: str, time: int) -> None:
    original, calls = getattr(os, name), iter(range(100))
    setattr(world_files.os, name, lambda *args: die() if next(calls) == time else original(*args))
    world_files.save(world, folder)


def resume(loop: Loop, folder: Path) -> None:
    """Whatever is missing, chunk after chunk."""
    world = world_files.load(folder)
    while len(world.chunks) < LAST:
        world = loop.chunk(world)
        world_files.save(world, folder)
    print("resumed")


@killed.needs_fork
def test_a_process_killed_at_any_moment_loses_one_chunk_and_a_new_one_ends_where_it_would_have(
    loop, run, tmp_path, comfy_host
):
    folder = tmp_path / "w"
    world_files.save(run.worlds[KILLED], folder)
    ended = child(loop, folder, "be_killed", comfy_host)
    assert ended.stdout.endswith("killed six times\n"), ended.stderr
    assert any(file.suffix == ".partial" for file in folder.iterdir())  # left behind, and in nobody's way
    resumed = child(loop, folder, "resume", comfy_host)
    assert resumed.stdout.endswith("resumed\n"), resumed.stderr
    assert equal(world_files.load(folder), run.last)


# -------------------------------------------------------------------------------------------------------------- memory


def stored(world: World, index: int) -> dict[str, torch.Tensor]:
    return world_files._tensors(world, index, (world.first, *world.chunks)[index])


def test_a_chunk_at_480x832_takes_at_most_150_megabytes(run):
    times = (480 * 832) // (SIZE[0] * SIZE[1])
    small = {"first_frame", "w2c", "K"}
    sizes = {name: t.nbytes * (1 if name in small else times) for name, t in stored(run.last, 2).items()}
    assert 100e6 < sum(sizes.values()) <= 150e6


def live() -> dict[int, int]:
    """Bytes of every tensor's storage that is alive, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.layout == torch.strided:
            with suppress(RuntimeError):  # what torch.compile leaves behind has no memory
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_memory_grows_by_what_is_kept_and_nothing_else(loop, run):
    """From the second chunk to the fifth, in one process."""
    world = rewind(run.last, 1)
    world.stream[:] = [short_stream(loop)]
    world = loop.grow(world, random_latents(5))
    kept = sum(t.nbytes for t in stored(run.last, 2).values())
    start, before = live(), resident() if Path("/proc/self/statm").exists() else None
    for seed in range(3):
        world = loop.grow(world, random_latents(seed))
    end = live()
    grown = sum(end.values()) - sum(start.values())
    assert grown <= 3 * kept * 1.05
    assert len(world.stream) == 1
    if before is not None:
        assert resident() - before <= 3 * kept + 24e6  # what allocators keep for later
