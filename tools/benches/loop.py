"""What the generation loop costs besides the transformer, and whether it stays flat, with tiny networks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import comfy.sample
import comfy.sd
import torch
from host import TOOLS, load
from torch import Tensor

from lyra_core.cameras import presets
from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.conditioning import schedules
from lyra_core.files import write_partial
from lyra_core.models import generation, lyra2_host
from lyra_core.models.depth_estimators import MemoryEstimator
from lyra_core.models.sampling import UniPC
from lyra_core.world import world_files
from lyra_core.world.chunk_files import open_chunk
from lyra_core.world.world import CHUNK_FRAMES, World, append, begin, keyframe_ids, plan, rewind

from . import Result, peak_mib, seconds

tiny_models = load("tiny_models", TOOLS / "tiny_models.py")

SIZE, CHUNKS, STEPS = (64, 96), 10, 4
CONFIG = {
    **tiny_models.LYRA2_14B,
    "rank": 8,
    "dim": 96,
    "ffn_dim": 192,
    "num_heads": 3,
    "num_layers": 2,
    "text_dim": 64,
}
FLAT, MARGIN = 1.05, 16  # the last chunk's peak against the second's; MiB by which an allocator differs from run to run
LONG_SIZE, LONG, SECONDS = (480, 832), 40, 5.0  # a world with many chunks (5 GB while it runs), and the time to go on
FULL_PIXELS, STORED = 480 * 832, 150.0  # a chunk of the usual size, MB on disk
SAVED = 2.0  # times as long as writing and flushing the bytes


def first_world(size: tuple[int, int]) -> World:
    photo = torch.rand(*size, 3, generator=torch.Generator().manual_seed(0))
    return begin(photo, torch.full(size, 3.0), pinhole(size, 0.9 * size[1]))


def walk(frames: int, size: tuple[int, int]) -> Cameras:
    return presets.preset("orbit_horizontal", pinhole(size, 0.9 * size[1]), frames, 3.0, "left", 0.3)


class Loop:
    """The whole loop but CLIP, of which the host has no small size: its tokens are the same every time."""

    def __init__(self, folder: Path):
        lyra2_host.register()
        self.folder = folder
        path = tiny_models.write_lyra2(folder / "lyra2.safetensors", CONFIG)
        self.model = comfy.sd.load_diffusion_model(str(path))
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(tiny_models.write_vae(folder / "vae.safetensors"))))
        self.image = SimpleNamespace(penultimate_hidden_states=torch.randn(1, 257, 1280))
        self.text = torch.randn(1, 512, CONFIG["text_dim"])

    def sample(self, history) -> Tensor:
        entries = {**lyra2_host.conditioning(history), "clip_vision_output": self.image}
        prompts = [[[self.text, dict(entries)]] for _ in range(2)]
        noise = schedules.initial_noise((1, *history.warped.shape), 1)
        sampler, sigmas = UniPC(), schedules.full(STEPS)
        args = (self.model, noise, 5.0, sampler, sigmas, *prompts, torch.zeros_like(noise))
        return comfy.sample.sample_custom(*args, disable_pbar=True)[0]

    def chunk(self, world: World, target: Cameras) -> tuple[World, dict[str, float]]:
        taken, start = {}, time.perf_counter()

        def lap(name: str) -> None:
            nonlocal start
            now = time.perf_counter()
            taken[name], start = now - start, now

        planned = plan(world, target)
        history = generation.pack(world, planned, self.vae)
        lap("history")
        latents = self.sample(history)
        lap("transformer")
        world, _ = generation.grow(world, planned, latents, self.vae, MemoryEstimator())
        lap("decode, encode, depth")
        world_files.save(world, self.folder / "world")
        lap("save")
        return world, taken


def forget_peak() -> bool:
    """Start the process's peak memory anew; False where the system can't."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@torch.inference_mode()
def bench_loop() -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        yield from walk_on(Loop(Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        yield from reopen(Path(folder))


def walk_on(loop: Loop) -> Iterator[Result]:
    world, path = first_world(SIZE), walk(1 + CHUNKS * CHUNK_FRAMES, SIZE)
    laps, peaks = [], []
    known = forget_peak()
    for index in range(CHUNKS):
        first = 1 + index * CHUNK_FRAMES
        world, taken = loop.chunk(world, path[first : first + CHUNK_FRAMES])
        laps.append(taken)
        peaks.append(peak_mib())
        forget_peak()
    files = [file.stat().st_size for file in (loop.folder / "world").glob("*.safetensors")]
    stored = max(files) / 2**20
    name = f"loop: {CHUNKS} chunks of {SIZE[1]}x{SIZE[0]}"
    for part in laps[0]:
        share = sum(taken[part] for taken in laps) / sum(sum(taken.values()) for taken in laps)
        yield Result(f"loop: share of {part}, tiny networks, {STEPS} steps, no CLIP", f"{100 * share:.0f} %")
    rest = [sum(taken.values()) - taken["transformer"] for taken in laps]
    yield Result(f"{name}: all but the transformer, last over second", f"{rest[-1] / rest[1]:.2f}")
    if known:
        grown = peaks[-1] - peaks[1] - (CHUNKS - 2) * stored
        yield Result(f"{name}: peak of the second and the last", f"{peaks[1]:.0f}, {peaks[-1]:.0f} MiB")
        bar = (FLAT - 1) * peaks[1] + MARGIN
        yield Result(f"{name}: growth beyond the stored world", f"{grown:.0f} MiB", f"<= {bar:.0f} MiB", grown <= bar)
    per_pixel = max(files) / (SIZE[0] * SIZE[1])
    full = per_pixel * FULL_PIXELS / 1e6
    yield Result(
        "loop: a chunk on disk, at 832x480 in proportion", f"{full:.0f} MB", f"<= {STORED:.0f} MB", full <= STORED
    )


def reopen(folder: Path) -> Iterator[Result]:
    """A world with many chunks: open it, plan its next chunk, rewind it."""
    world, path, ratios = first_world(LONG_SIZE), walk(1 + (LONG + 1) * CHUNK_FRAMES, LONG_SIZE), []
    world_files.save(world, folder)
    for index in range(LONG):
        target = path[1 + index * CHUNK_FRAMES : 1 + (index + 1) * CHUNK_FRAMES]
        planned = plan(world, target, 0)
        shape = (CHUNK_FRAMES, *LONG_SIZE)
        frames, made_up = torch.zeros(*shape, 3, dtype=torch.uint8), torch.zeros(shape, dtype=torch.bool)
        depths = {frame: torch.full(LONG_SIZE, 3.0) for frame in keyframe_ids(planned)}
        world = append(world, planned, frames, made_up, depths, settings={"chunk": index})
        _ = world.key, world.chunks[-1].sums  # which a chunk that was sampled has by now
        took = seconds(lambda world=world: world_files.save(world, folder))
        content = (folder / f"{world.key[:24]}.safetensors").read_bytes()
        ratios.append(took / seconds(lambda content=content: write_partial(folder / "plain", content).unlink()))
    ratio = median(ratios)
    yield Result("loop: save a chunk, over writing and flushing its bytes", f"{ratio:.2f} times", f"<= {SAVED:g}", ratio <= SAVED)
    start, used = time.perf_counter(), time.process_time()
    world = world_files.load(folder)
    target = path[1 + LONG * CHUNK_FRAMES :]
    plan(world, target)
    rewind(world, LONG // 2)
    taken, used = time.perf_counter() - start, time.process_time() - used
    what = f"loop: open a world of {LONG} chunks of {LONG_SIZE[1]}x{LONG_SIZE[0]}, plan, rewind"
    # of the processor, which is at least what it takes where nothing else runs
    yield Result(what, f"{used:.1f} s of the processor, {taken:.1f} s by the clock", f"<= {SECONDS:.0f} s", used <= SECONDS)
    yield from checking(folder, world)


def checking(folder: Path, world: World) -> Iterator[Result]:
    """What it costs to compare all that is read with its sums."""
    files = [open_chunk(file) for file in sorted(folder.glob("*.safetensors"))]
    stored = sum(file.path.stat().st_size for file in files) / 1e6
    unchecked = [replace(file, record={}) for file in files]
    took = {}
    for name, some in (("with", files), ("without", unchecked)):
        start = time.perf_counter()
        for file in some[:10]:
            file.check()
        took[name] = (time.perf_counter() - start) / 10
    yield Result(
        "loop: read all of a chunk with and without comparing it with its sums",
        f"{took['with']:.2f}, {took['without']:.2f} s for {stored / len(files):.0f} MB",
    )
    laps = []
    for index in range(1, 41):
        start = time.perf_counter()
        world.frame(index)
        laps.append(time.perf_counter() - start)
    yield Result("loop: read and compare one frame", f"{1000 * sorted(laps)[20]:.1f} ms")
    laps = []
    for _ in range(2):
        start = time.perf_counter()
        world_files.save(world, folder)
        laps.append(time.perf_counter() - start)
    world_files._whole.clear()
    start = time.perf_counter()
    world_files.save(world, folder)
    yield Result(
        f"loop: save a world of {LONG} chunks that is there: again, and first in a process (looks through {stored:.0f} MB)",
        f"{laps[1]:.2f}, {time.perf_counter() - start:.1f} s",
    )


BENCHES = {"loop": bench_loop}
