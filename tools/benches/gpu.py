"""What a GPU does: kernels, a whole chunk stage by stage, small cards. `TINY=1` rehearses it all on the processor.

Weights are random, of the released size. Every section begins only while there is time for it (LIMIT seconds, 360); what
there was none for is printed as not measured.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import comfy.clip_vision
import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import torch
from host import TOOLS, load
from torch import Tensor

from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.cameras.presets import preset
from lyra_core.conditioning import schedules
from lyra_core.conditioning.correspondence import guides
from lyra_core.conditioning.framepack import LYRA2
from lyra_core.memory.depth import room_box
from lyra_core.memory.warp import Warp, lift, splat
from lyra_core.models import attention, generation, lyra2_host, streaming_vae
from lyra_core.models.depth_estimators import MemoryEstimator
from lyra_core.models.planner import GIB
from lyra_core.world import control, world_files
from lyra_core.world.world import World, begin, plan

from . import Result
from . import model as transformer

tiny_models = load("tiny_models", TOOLS / "tiny_models.py")

TINY = os.environ.get("TINY") == "1"
LIMIT = float(os.environ.get("LIMIT", "360"))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CONFIG = tiny_models.SMALLEST if TINY else tiny_models.LYRA2_14B
SIZE = (64, 96) if TINY else (480, 832)
FULL_PASSES = 70  # 35 steps with both sides of CFG
CARDS = (("fp8", torch.float8_e4m3fn, 12), ("fp8", torch.float8_e4m3fn, 16), ("bf16", torch.bfloat16, 24))


@dataclass
class Bench:
    """What the sections share."""

    began: float = field(default_factory=time.perf_counter)
    weights: dict = field(default_factory=dict)
    model: object = None
    vae: object = None
    text: Tensor | None = None
    image: object = None
    world: World | None = None
    history: object = None
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return LIMIT - (time.perf_counter() - self.began)


def settle() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def peak() -> float:
    """GiB of the device since the last question."""
    if not CUDA:
        return 0.0
    found = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return found


@contextmanager
def stage(bench: Bench, name: str):
    settle()
    start = time.perf_counter()
    yield
    settle()
    bench.stages[name] = time.perf_counter() - start


def bar(name: str, value: float, limit: float, unit: str = "s") -> Result:
    """A bar for the card alone; a rehearsal only prints."""
    return Result(name, f"{value:.2f} {unit}", *((f"at most {limit:g} {unit}", value <= limit) if CUDA and not TINY else ()))


# ------------------------------------------------------------------------------------------------------------ kernels


def kernels(bench: Bench) -> Iterator[Result]:
    """The card's ceilings, and attention by each of torch's kernels; 769 keys are a prompt's and a picture's."""
    side, heads, width = (256, 2, 16) if TINY else (8192, 40, 128)
    length = 300 if TINY else 38_246
    dtype = torch.bfloat16 if CUDA else torch.float32
    matrix = torch.randn(side, side, device=DEVICE, dtype=dtype)
    product = min(timed(lambda: matrix @ matrix) for _ in range(4))
    yield Result("gpu: product of bf16 matrices", f"{2 * side**3 / product / 1e12:.0f} TFLOP/s")
    q = torch.randn(1, length, heads * width, device=DEVICE, dtype=dtype)
    kernel = attention.SDPBackend
    ways = {}
    for name, keys in (("self", q), ("cross, 769 keys", q[:, :769])):
        for backend in (kernel.FLASH_ATTENTION, kernel.CUDNN_ATTENTION) if CUDA else (kernel.MATH,):
            label = f"{name} attention, {backend.name.removesuffix('_ATTENTION')}"
            ways[label] = partial(attention.by_cudnn, q, keys, keys, heads, backend)
    if CUDA:
        ways["self attention, CUDNN in whole tiles"] = partial(attention.in_tiles, q, q, q, heads)
    for name, work in ways.items():
        try:
            yield Result(f"gpu: {name}", f"{1000 * min(timed(work) for _ in range(3)):.1f} ms")
        except RuntimeError as reason:
            yield Result(f"gpu: {name}", f"none: {str(reason)[:40]}")
    pixels, gamma = torch.randn(8, *SIZE, 96, device=DEVICE, dtype=dtype), torch.ones(96, device=DEVICE, dtype=dtype)
    for way in (streaming_vae.in_one_pass, streaming_vae.by_products):
        took = 1000 * min(timed(lambda way=way: way(pixels, gamma)) for _ in range(30))
        yield Result(f"gpu: a norm of the VAE, eight frames of 96 channels, {way.__name__}", f"{took:.2f} ms")


# ----------------------------------------------------------------------------------------------------------- geometry


def first_world() -> World:
    camera = pinhole(SIZE, 0.9 * SIZE[1])
    room = room_box(SIZE, camera.K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 4.0)
    photo = torch.rand(SIZE[0] // 16, SIZE[1] // 16, 3, generator=torch.Generator().manual_seed(1))
    return begin(photo.repeat_interleave(16, 0).repeat_interleave(16, 1), room.depth, room.camera)


def walk(frames: int) -> Cameras:
    return preset("orbit_horizontal", pinhole(SIZE, 0.9 * SIZE[1]), frames, 3.0, "left", 0.3)


def warped(world: World, target: Cameras, device: torch.device) -> Warp:
    """The photo in every view."""
    seed = world.memory[0]
    points = lift(seed.depth.to(device), seed.camera.to(device), (world.exact(0) * 0.5 + 0.5).to(device))
    return splat(points, target.to(device))


def geometry(bench: Bench) -> Iterator[Result]:
    """Guides of five sources and control views of a chunk; and against the processor's."""
    world, target = first_world(), walk(81)[1:]
    sources = [world.memory[0]] * 5
    cameras = walk(LYRA2.slots())
    there = target.to(DEVICE)
    guides(LYRA2, sources[:1], cameras, there)
    took = timed(lambda: guides(LYRA2, sources, cameras, there))
    yield bar("gpu: 5 sources into 80 views, with guides", took, 0.7)
    yield Result("gpu: memory of that", f"{peak():.1f} GiB")
    ours, theirs = (guides(LYRA2, sources[:1], cameras, target.to(device)) for device in (DEVICE, "cpu"))
    off = max(float((a.cpu() - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    yield Result("gpu: guides against the processor's", f"{off:.1e}", "at most 1e-5", off <= 1e-5)
    ours, theirs = (warped(world, target, device) for device in (DEVICE, torch.device("cpu")))
    off, differ = float((ours.features.cpu() - theirs.features).abs().max()), int((ours.seen.cpu() != theirs.seen).sum())
    found = f"{off:.1e}, {differ} of {theirs.seen.numel()} pixels seen by only one"
    yield Result("gpu: warped views against the processor's", found, "at most 1e-5, none", off <= 1e-5 and not differ)
    control.control_views(world, plan(world, target[:2]), device=DEVICE)
    took = timed(lambda: control.control_views(world, plan(world, target), device=DEVICE))
    yield bar("gpu: 80 control views", took, 1.0)


# -------------------------------------------------------------------------------------------------------- transformer


def networks(bench: Bench) -> Iterator[Result]:
    """Random weights, made on the device, through the host's loaders."""
    lyra2_host.register()
    generator = torch.Generator(DEVICE).manual_seed(0)
    for key, shape in lyra2_host.weight_shapes(CONFIG).items():
        value = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32, generator=generator)
        bench.weights[key] = tiny_models.scaled(key, value).cpu()
    bench.weights[lyra2_host.CONFIG_KEY] = lyra2_host.pack_config(CONFIG)
    bench.model = loaded(bench, torch.bfloat16 if CUDA else None)
    with tempfile.TemporaryDirectory() as folder:
        file = tiny_models.write_vae(Path(folder) / "vae.safetensors", 8 if TINY else 96)
        bench.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    clip = tiny_models._clip_weights("CLIPVisionModelProjection", "clip_vision_config_h.json", 2) if not TINY else None
    bench.image = comfy.clip_vision.load_clipvision_from_sd(clip) if clip else None
    bench.text = 0.1 * torch.randn(1, 512, CONFIG["text_dim"])
    size = sum(v.nbytes for v in bench.weights.values()) / GIB
    yield Result("gpu: weights of the transformer, random", f"{size:.1f} GiB")


def loaded(bench: Bench, dtype: torch.dtype | None, **options):
    options |= {"dtype": dtype} if dtype else {}
    return comfy.sd.load_diffusion_model_state_dict(dict(bench.weights), model_options=options)


def sampled(bench: Bench, steps: int = 0, cfg: float = 1.0, model=None) -> Tensor:
    """The latents of the current history: by DMD's four steps, or by some of full quality's."""
    seen = bench.image
    if isinstance(seen, comfy.clip_vision.ClipVisionModel):
        seen = generation.look(seen, bench.world)
    elif seen is None:
        seen = comfy.clip_vision.Output()
        seen["penultimate_hidden_states"] = torch.randn(1, 257, 1280)
    entries = {**lyra2_host.conditioning(bench.history), "clip_vision_output": seen}
    prompts = [[[bench.text, dict(entries)]] for _ in range(2)]
    noise = schedules.initial_noise((1, *bench.history.warped.shape), 1)
    sampler = comfy.samplers.sampler_object("lcm" if not steps else "euler")
    sigmas = schedules.full(steps) if steps else schedules.dmd()
    found = comfy.sample.sample_custom(
        model or bench.model, noise, cfg, sampler, sigmas, *prompts, torch.zeros_like(noise), disable_pbar=True
    )
    return torch.nan_to_num(found[0]).clamp(-4, 4)


def chunks(bench: Bench) -> Iterator[Result]:
    """Two whole DMD chunks; the second is what all others of a world cost. The transformer is on the card before."""
    bench.world, path, whole = first_world(), walk(161), []
    took = timed(lambda: management.load_models_gpu([bench.model]))
    yield Result("gpu: the transformer on its way to the card", f"{took:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            bench.stages.clear()
            start = time.perf_counter()
            with stage(bench, "plan"):
                planned = plan(bench.world, path[1 + 80 * number : 81 + 80 * number], device=generation.geometry_device(SIZE))
            with stage(bench, "pack"):
                bench.history = generation.pack(bench.world, planned, bench.vae)
            with stage(bench, "sample, CLIP and guides with it"):
                latents = sampled(bench)
            peaks = {"sample": peak()}
            with stage(bench, "grow"):
                world, _ = generation.grow(bench.world, planned, latents, bench.vae, MemoryEstimator())
            peaks["grow"] = peak()
            with stage(bench, "save"):
                world_files.save(world, Path(folder))
            whole.append(time.perf_counter() - start)
            if not number:
                bench.world = world
    yield from (Result(f"gpu: {name}", f"{took:.2f} s") for name, took in bench.stages.items())
    yield from (Result(f"gpu: peak memory, {name}", f"{gib:.1f} GiB") for name, gib in peaks.items())
    yield bar("gpu: a whole DMD chunk", whole[1], 18)
    yield bar("gpu: a world's first chunk, more", whole[0] - whole[1], 5)


def passes(bench: Bench) -> Iterator[Result]:
    """One forward pass, from runs of different length; a chunk of full quality is computed from it."""
    two, four = (timed(lambda n=n: sampled(bench, n)) for n in (2, 4))
    one = (four - two) / 2
    yield Result("gpu: one forward pass", f"{one:.2f} s")
    rest = sum(bench.stages.values()) - 4 * one
    yield bar("gpu: a chunk of full quality, computed from that", FULL_PASSES * one + rest, 260)
    with_cfg = timed(lambda: sampled(bench, 2, 5.0))
    yield Result("gpu: two steps with CFG", f"{with_cfg:.2f} s")


def small_cards(bench: Bench) -> Iterator[Result]:
    """Two steps with only so much memory allowed."""
    if not CUDA:
        yield Result("gpu: small cards", "not measured")
        return
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    before = management.EXTRA_RESERVED_VRAM
    release(bench)
    for name, options in (("", {}), (", the host's fast products", {"fp8_optimizations": True})):
        model = loaded(bench, torch.float8_e4m3fn, **options)
        one, three = (timed(lambda n=n, m=model: sampled(bench, n, model=m)) for n in (1, 3))
        yield Result(f"gpu: one forward pass, fp8 weights{name}", f"{(three - one) / 2:.2f} s")
        model = None
        release(bench)
    for name, dtype, gib in CARDS:
        release(bench)
        try:
            model = loaded(bench, dtype)
            management.EXTRA_RESERVED_VRAM = int((total - gib) * GIB) + before
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total))
            peak()
            took = timed(lambda m=model: sampled(bench, 2, model=m))
            yield Result(f"gpu: two steps, {name}, {gib} GiB allowed", f"{took:.1f} s, {peak():.1f} GiB")
        except torch.OutOfMemoryError as problem:
            yield Result(f"gpu: two steps, {name}, {gib} GiB allowed", str(problem)[:30], "runs", False)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            management.EXTRA_RESERVED_VRAM = before
            model = None


def release(bench: Bench) -> None:
    bench.model = None
    management.unload_all_models()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def wan(bench: Bench) -> Iterator[Result]:
    """Beside the host's own transformer, with as many tokens."""
    release(bench)
    latents = (8, 12) if TINY else transformer.LATENTS
    for result in transformer.beside_wan(CONFIG, latents, DEVICE, torch.bfloat16 if CUDA else torch.float32, repeats=2):
        if "over that of Wan" in result.what:
            yield bar(result.what, float(result.value), 0.8, "times")
        else:
            yield result


SECTIONS: tuple[tuple[Callable[[Bench], Iterator[Result]], float], ...] = (
    (networks, 60), (kernels, 15), (geometry, 15), (chunks, 90), (passes, 60), (wan, 50), (small_cards, 100),
)  # fmt: skip


def bench_gpu() -> Iterator[Result]:
    if not (CUDA or TINY):
        yield Result("gpu", "not measured: no GPU here")
        return
    bench = Bench()
    yield Result("gpu: on", torch.cuda.get_device_name(0) if CUDA else "no GPU: a rehearsal")
    for section, needed in SECTIONS:
        name = section.__name__.replace("_", " ")
        if bench.left < needed:
            yield Result(f"gpu: {name}", f"not measured: {bench.left:.0f} s left")
            continue
        with torch.inference_mode():
            yield from list(section(bench))


BENCHES = {"gpu": bench_gpu}
