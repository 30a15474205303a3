"""What the geometry costs and what it is worth: warp, retrieval, preview, control views, coming back, memory."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lyra_core.cameras import camera_files, presets, trajectory
from lyra_core.cameras.camera import Cameras, pinhole
from lyra_core.memory.depth import room_box
from lyra_core.memory.retrieval import Keyframe, retrieve
from lyra_core.memory.warp import lift, merge, splat, splat_views
from lyra_core.metrics.pictures import psnr, revisit_psnr
from lyra_core.world import preview
from lyra_core.world.world import World, append, begin, plan, to_float, to_uint8

from . import Result, peak_mib, scenes, seconds

TOOLS = Path(__file__).resolve().parents[1]
SIZE = (480, 832)
FOCAL = 700.0
SOURCES, VIEWS = 6, 80
PLAIN_VIEWS = 16  # in one call of the plain way, as in the reference; it is timed on the first source only


def walk(frames: int, size: tuple[int, int] = SIZE, focal: float = FOCAL, way: float = 1.0) -> Cameras:
    """An orbit of a room, as the presets make it."""
    return presets.preset("orbit_horizontal", pinhole(size, focal), frames, 4.0, "left", way)


def room(size: tuple[int, int], focal: float) -> Tensor:
    """Depth of a room with a box standing in it, all known, with some relief on the walls."""
    depth = room_box(size, pinhole(size, focal).K[0], (0.5, 0.5), (0.3, 0.3, 0.7, 0.7), 6.0).depth
    rows, columns = (torch.linspace(0, 40, s) for s in size)
    depth = depth * (1 + 0.01 * torch.sin(rows)[:, None] * torch.cos(columns))
    depth[size[0] // 2 : size[0] * 3 // 4, size[1] // 3 : size[1] // 2] = 2.0
    return depth


def picture(size: tuple[int, int]) -> Tensor:
    noise = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size, mode="bilinear")[0].permute(1, 2, 0)


# ---------------------------------------------------------------------------------------------------------------- warp


def plain_warp(depth: Tensor, features: Tensor, source: Cameras, targets: Cameras) -> tuple[Tensor, Tensor]:
    """The straightforward way: everything again for every target, every channel scattered alone, depth in a second pass.

    depth (H, W), features (H, W, C) -> features (F, H, W, C) with holes -1, depth (F, H, W) with holes 0.
    """
    count, (height, width) = len(targets), targets.size
    depths = depth.repeat(count, 1, 1).nan_to_num(nan=1e4).clamp(0, 1e4)
    spread = F.max_pool2d(depths[:, None], 5, 1, 2) + F.max_pool2d(-depths[:, None], 5, 1, 2)
    valid = (depths > 0) & (spread / (F.avg_pool2d(depths[:, None], 5, 1, 2) + 1e-6) < 0.05)[:, 0]
    frame, row, column = valid.nonzero(as_tuple=True)
    inverse_K = torch.linalg.inv(source.K.repeat(count, 1, 1))[frame]
    c2w = torch.linalg.inv(source.w2c.repeat(count, 1, 1))[frame]
    pixels = torch.stack([column, row, torch.ones_like(row)], 1).float()[..., None]
    local = inverse_K @ pixels * depths[valid][:, None, None]
    world = torch.zeros(count, height, width, 3)
    world[valid] = (c2w @ torch.cat([local, torch.ones_like(local[:, :1])], 1))[:, :3, 0]
    seen = world @ targets.w2c[:, None, :3, :3].mT + targets.w2c[:, None, None, :3, 3]
    projected = seen @ targets.K[:, None].mT
    z = projected[..., 2]
    mask = (valid & (z > 0)).float()
    xy = projected[..., :2] / (z + 1e-7)[..., None]
    colours = features.repeat(count, 1, 1, 1)
    picture, covered = _plain_splat(colours, z, mask, xy)
    rendered, _ = _plain_splat(z[..., None].clone(), z, mask, xy)
    return torch.where(covered, picture, -1.0).clamp(-1, 1), rendered[..., 0]


def _plain_splat(values: Tensor, z: Tensor, mask: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    count, height, width, channels = values.shape
    logarithm = torch.log1p(z.clamp_min(0))
    steep = torch.exp((50 * logarithm / (logarithm.max() + 1e-7)).clamp(max=80)) + 1e-7
    x, y = (xy[..., 0] + 1).clamp(0, width + 1), (xy[..., 1] + 1).clamp(0, height + 1)
    frame = torch.arange(count)[:, None, None].expand_as(z)
    total, weights = torch.zeros(count, height + 2, width + 2, channels), torch.zeros(count, height + 2, width + 2)
    for px in (x.floor(), x.ceil()):
        for py in (y.floor(), y.ceil()):
            weight = (1 - (x - px).abs()) * (1 - (y - py).abs()) * mask / steep
            index = frame, py.long(), px.long()
            weights.index_put_(index, weight, accumulate=True)
            for channel in range(channels):
                total[..., channel].index_put_(index, values[..., channel] * weight, accumulate=True)
    total, weights = total[:, 1:-1, 1:-1], weights[:, 1:-1, 1:-1, None]
    return torch.where(weights > 0, total / weights.clamp_min(1e-38), 0.0), weights > 0


def bench_warp() -> Iterator[Result]:
    cameras, depth, colours = walk(VIEWS), room(SIZE, FOCAL), picture(SIZE)
    sources = [cameras[i * VIEWS // SOURCES] for i in range(SOURCES)]

    def ours() -> None:
        for source in sources:
            for _ in splat_views(lift(depth, source, colours), cameras):
                pass

    def plain() -> None:
        plain_warp(depth, colours, sources[0], cameras[-PLAIN_VIEWS:])

    ours_alike = splat(lift(depth, sources[0], colours), cameras[-PLAIN_VIEWS:])
    plain_alike, _ = plain_warp(depth, colours, sources[0], cameras[-PLAIN_VIEWS:])
    wrong = (torch.where(ours_alike.seen[..., None], ours_alike.features, -1.0) - plain_alike).abs().amax(-1) > 1e-4
    share = float(wrong.float().mean())
    yield Result("warp: pixels that differ from the plain way", f"{share:.1e}", "<= 1e-3", share <= 1e-3)
    pair = seconds(plain) / PLAIN_VIEWS
    whole = seconds(ours)
    yield Result(
        f"warp: the plain way, per source and view ({torch.get_num_threads()} threads)", f"{1000 * pair:.1f} ms"
    )
    yield Result("warp: ours, per source and view", f"{1000 * whole / SOURCES / VIEWS:.1f} ms")
    yield Result(f"warp: ours, {SOURCES} sources into {VIEWS} views of {SIZE[1]}x{SIZE[0]}", f"{whole:.1f} s")
    ratio = pair * SOURCES * VIEWS / whole
    yield Result("warp: times faster", f"{ratio:.1f}", ">= 10", ratio >= 10)


# ----------------------------------------------------------------------------------------------------------- retrieval


def loop(frames: int) -> list[Keyframe]:
    """Keyframes of a long walk round a loop that looks ahead; they share the numbers of one depth map."""
    depth, cameras = room(SIZE, FOCAL), pinhole(SIZE, FOCAL, frames)
    turn = torch.linspace(0, 2 * math.pi, frames + 1)[:-1]
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, 0, 0], w2c[:, 0, 2], w2c[:, 2, 0], w2c[:, 2, 2] = turn.cos(), -turn.sin(), turn.sin(), turn.cos()
    radius = frames * 0.4 / (2 * math.pi)  # a keyframe every 0.4 scene units, however many there are
    w2c[:, 0, 3] = radius
    cameras = Cameras(w2c, cameras.K, SIZE)
    return [Keyframe(8 * i, depth, cameras[i]) for i in range(frames)]


def bench_retrieval() -> Iterator[Result]:
    took = {}
    for frames in (500, 1000, 2000):
        keyframes = loop(frames)
        times = [
            seconds(partial(retrieve, keyframes, keyframes[at].camera))
            for at in range(frames // 8, frames, frames // 5)
        ]
        took[frames] = statistics.median(times)
        yield Result(
            f"retrieval: among {frames} keyframes of {SIZE[1]}x{SIZE[0]}, median and worst of {len(times)} views",
            f"{took[frames]:.2f} s {max(times):.2f} s",
            "< 1 s" if frames == 2000 else "",
            max(times) < 1 or frames < 2000,
        )
    growth = took[2000] / took[500]
    yield Result("retrieval: four times the keyframes take, times as long", f"{growth:.1f}", "<= 6", growth <= 6)


# ------------------------------------------------------------------------------------------------------------- preview


def first_world(size: tuple[int, int] = SIZE, focal: float = FOCAL) -> World:
    return begin(picture(size), room(size, focal), pinhole(size, focal))


def one_more(world: World, target: Cameras) -> World:
    the_plan = plan(world, target)
    made = preview.generate(world, the_plan)
    return append(world, the_plan, made.frames, made.invented, made.depths)


def bench_preview(frames: int = 16) -> Iterator[Result]:
    spent, original = [], preview.surface_depth

    def timed(*arguments, **options):
        start = time.perf_counter()
        found = original(*arguments, **options)
        spent.append(time.perf_counter() - start)
        return found

    path, world = walk(2 * frames + 1), first_world()
    preview.surface_depth = timed
    try:
        for number, target in enumerate((path[1 : frames + 1], path[frames + 1 :]), 1):
            spent.clear()
            start = time.perf_counter()
            world = one_more(world, target)
            whole = time.perf_counter() - start
            yield Result(f"preview: chunk {number}, per frame of {SIZE[1]}x{SIZE[0]}", f"{whole / frames:.2f} s")
            yield Result(f"preview: chunk {number}, share of it in the surfaces' depth", f"{100 * sum(spent) / whole:.0f} %")
    finally:
        preview.surface_depth = original


# -------------------------------------------------------------------------------------------------------------- control

CONTROL_FRAMES, CONTROL_STEP = 80, 12  # of a chunk; every how many of the second chunk's are looked at


def into_the_room(frames: int) -> Cameras:
    """Ahead between the columns, swaying: what stands near is magnified a few times."""
    share = torch.linspace(0, 1, frames)
    yaw, cameras = 0.3 * torch.sin(2.2 * share), pinhole(SIZE, 620.0, frames)
    centers = torch.stack([0.5 * torch.sin(2.6 * share), -0.15 * share, 2.6 * share], 1)
    w2c = cameras.w2c.clone()
    w2c[:, 0, 0], w2c[:, 0, 2], w2c[:, 2, 0], w2c[:, 2, 2] = yaw.cos(), yaw.sin(), -yaw.sin(), yaw.cos()
    w2c[:, :3, 3] = -(w2c[:, :3, :3] @ centers[..., None])[..., 0]
    return Cameras(w2c, cameras.K, SIZE)


def one_point_a_pixel(sources: list[preview.Source], camera: Cameras) -> Tensor:
    """What `preview.surface_depth` was: of every pixel that shows something new one point, through the transformer's warp."""
    points = [lift(torch.where(s.new, s.depth, 0.0), s.camera, s.image[..., :0], continuity=None) for s in sources]
    return splat(merge(*points), camera).depth[0]


def bench_control() -> Iterator[Result]:
    """The second chunk of a room of which everything is known: what its control views show, and whether that is there."""
    path, end = into_the_room(2 * CONTROL_FRAMES + 1), CONTROL_FRAMES
    keyframes = [0, *range(8, end + 1, 8)]
    pictures, depths = scenes.traced(scenes.FURNISHED, path[keyframes])
    world = begin(pictures[0], depths[0], path[0])
    first = plan(world, path[1 : end + 1])
    frames = torch.zeros(end, *SIZE, 3, dtype=torch.uint8)
    frames[7::8] = to_uint8(pictures[1:])
    seen = torch.zeros(frames.shape[:3], dtype=torch.bool)
    world = append(world, first, frames, seen, dict(zip(keyframes[1:], depths[1:], strict=True)))
    sources = preview.remembered_sources(world, plan(world, path[end + 1 :], views=preview.VIEWS))
    asked = path[list(range(end + CONTROL_STEP, len(path), CONTROL_STEP))]
    truth = scenes.traced(scenes.FURNISHED, asked)
    spent, original = {}, preview.surface_depth
    for name, way in (("one point a pixel", one_point_a_pixel), ("surfaces", original)):
        preview.surface_depth = way
        try:
            preview.look_up(sources, asked[0])
            start = time.process_time()
            looks = [preview.look_up(sources, asked[i]) for i in range(len(asked))]
            spent[name] = (time.process_time() - start) / len(asked)
        finally:
            preview.surface_depth = original
        wrong, decibels, holes = _against(truth, looks)
        better = name == "surfaces"
        yield Result(f"control: {name}, known pixels of wrong depth", f"{wrong:.2%}", "<= 1.5 %" * better, not better or wrong <= 0.015)
        yield Result(f"control: {name}, known pixels against the truth", f"{decibels:.1f} dB")
        yield Result(f"control: {name}, holes", f"{holes:.1%}")
        yield Result(f"control: {name}, CPU time a frame of {SIZE[1]}x{SIZE[0]}", f"{spent[name]:.2f} s")
    ratio = spent["surfaces"] / spent["one point a pixel"]
    yield Result("control: surfaces take, times as long", f"{ratio:.2f}", "<= 1.5", ratio <= 1.5)


def _against(truth: tuple[Tensor, Tensor], looks: list[preview.Look]) -> tuple[float, float, float]:
    """Share of known pixels whose depth is off by more than 5 %, PSNR of the known pixels, share of holes."""
    images, depth, found = (torch.stack([getattr(look, n) for look in looks]) for n in ("image", "depth", "found"))
    wrong = ((depth - truth[1]).abs() > 0.05 * truth[1])[found].float().mean()
    return float(wrong), psnr(images, truth[0], found), float((~found).float().mean())


# -------------------------------------------------------------------------------------------------------------- revisit


def bench_revisit() -> Iterator[Result]:
    """There and back through the demo's picture: what the way back shows of what the way out saw."""
    size = (240, 416)
    with Image.open(TOOLS / "demo" / "room.png") as opened:
        photo = torch.from_numpy(np.array(opened.convert("RGB").resize(size[::-1], Image.LANCZOS))).float() / 255
    way_out = camera_files.load_cameras(TOOLS / "demo" / "path.json", frames=81, size=size)
    path = trajectory.chain(way_out, trajectory.reverse(way_out))
    walls = room_box(size, way_out.K[0], (0.5, 0.55), (0.2, 0.1, 0.8, 0.72), 6.0)
    scores = {}
    for count in (5, 0):
        world = preview.explore(begin(photo, walls.depth, way_out[0]), path, count=count)
        frames = [to_float(world.frame(i)) for i in range(len(world))]
        seen = [~world.invented(i) for i in range(len(world))]
        scores[count] = revisit_psnr(frames, world.cameras, seen, tolerance=1e-4).pooled
        whole = revisit_psnr(frames, world.cameras, tolerance=1e-4).pooled
        name = "with retrieval" if count else "retrieval switched off"
        yield Result(f"revisit: {name}, PSNR of what the way out saw", f"{scores[count]:.1f} dB")
        yield Result(f"revisit: {name}, PSNR of whole frames", f"{whole:.1f} dB")
    yield Result(
        "revisit: lost without retrieval", f"{scores[5] - scores[0]:.1f} dB", "> 3 dB", scores[5] - scores[0] > 3
    )


# -------------------------------------------------------------------------------------------------------------- memory

MEMORY_SIZE, MEMORY_FOCAL, MEMORY_FRAMES = (240, 416), 350.0, 16
MARGIN = 64  # MiB by which the peak may differ between runs for reasons of the allocator


def stored_mib(world: World) -> float:
    tensors = [t for c in (world.first, *world.chunks) for t in (c.frames, c.invented_bits)]
    tensors += [keyframe.depth for keyframe in world.memory.keyframes]
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


def report_memory(chunks: int) -> None:
    """Grow a world and print the peak of this process, and what the world stores, in MiB."""
    world = first_world(MEMORY_SIZE, MEMORY_FOCAL)
    path = walk(8 * MEMORY_FRAMES + 1, MEMORY_SIZE, MEMORY_FOCAL)
    for number in range(chunks):
        world = one_more(world, path[1 + number * MEMORY_FRAMES : 1 + (number + 1) * MEMORY_FRAMES])
    print(peak_mib(), stored_mib(world))


def bench_memory() -> Iterator[Result]:
    beyond = {}
    for chunks in (2, 4, 8):
        done = subprocess.run(
            [sys.executable, str(TOOLS / "bench.py"), "--peak", str(chunks)], capture_output=True, text=True, check=True
        )
        peak, stored = map(float, done.stdout.split())
        beyond[chunks] = peak - stored
        yield Result(
            f"memory: {chunks} preview chunks of {MEMORY_FRAMES} frames of {MEMORY_SIZE[1]}x{MEMORY_SIZE[0]}, peak",
            f"{peak:.0f} MiB",
        )
        yield Result("memory: of that stored in the world, per chunk", f"{stored / chunks:.1f} MiB")
    growth = beyond[8] - beyond[2]
    yield Result(
        "memory: growth from 2 to 8 chunks beyond what is stored",
        f"{growth:.0f} MiB",
        f"<= {MARGIN} MiB",
        growth <= MARGIN,
    )


BENCHES = {
    "warp": bench_warp,
    "retrieval": bench_retrieval,
    "preview": bench_preview,
    "control": bench_control,
    "revisit": bench_revisit,
    "memory": bench_memory,
}
