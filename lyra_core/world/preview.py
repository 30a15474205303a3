"""The geometry preview: a generator without weights.

Each frame is looked up in the memory instead of being painted. Remembered points give its depth; every pixel is then
traced back into the past frames that show the same surface, oldest first, because those were resampled least. What no
frame shows is made up: holes behind silhouettes continue the farther side, what lies beyond the photo continues its
planes, with texture that looks like the photo's (see made_up.py).

Frames of a chunk are made coarse to fine (the last, the middle, the quarters, ...), and the keyframes among them become
sources at once, so that what is made up in one frame stays where it is in all others. Only keyframes are filled by example;
the slivers that no keyframe shows are carried on softly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..cameras.camera import Cameras
from ..memory.depth import sharpened
from ..memory.patches import Patches, draw, merge, patches
from . import world_files
from .made_up import beyond, by_example, continued, deep, sample, softly
from .world import (
    CHUNK_FRAMES,
    KEYFRAME_STRIDE,
    ChunkPlan,
    World,
    append,
    continuation,
    fingerprint,
    in_chunks,
    keyframe_ids,
    plan,
    to_float,
    to_uint8,
)

VIEWS = 3  # target cameras per chunk that past frames are retrieved for: also what is only seen on the way

AGREEMENT = 0.04  # relative disparity by which two views of the same surface may differ
NEIGHBOURS = 3  # frames of the running chunk that a new one looks back to in any case, the nearest
TELLING = 0.005  # share of new pixels from which on all frames of the chunk look back to one
PUSHES, PUSH = 24, 1.15  # how often, and times how far each time, what is made up is moved out of what was looked through


@dataclass(frozen=True)
class Source:
    """A past frame, ready to be looked up."""

    image: Tensor  # (H, W, 3) 0..1
    invented: Tensor  # (H, W) bool
    depth: Tensor  # (H, W), 0 = unknown, no pixels floating at silhouettes
    disparity: Tensor  # (H, W) 1 / depth, 0 = unknown
    camera: Cameras  # length 1
    new: Tensor  # (H, W) bool: shows what no earlier source does
    surface: Patches  # of those pixels


@dataclass(frozen=True)
class Look:
    """One new view, looked up."""

    image: Tensor  # (H, W, 3) 0..1
    invented: Tensor  # (H, W) bool: made up, here or in the frame that shows it
    depth: Tensor  # (H, W), complete
    found: Tensor  # (H, W) bool: some frame shows it


@dataclass(frozen=True)
class Preview:
    """One chunk, ready for `append`."""

    frames: Tensor  # (F, H, W, 3) uint8
    invented: Tensor  # (F, H, W) bool
    depths: Mapping[int, Tensor]  # of its keyframes


def explore(
    world: World,
    trajectory: Cameras,
    *,
    chunk_frames: int = CHUNK_FRAMES,
    count: int = 5,
    prompts: Callable[[int], str] = lambda chunk: "",
    folder: Path | None = None,
    device: torch.device | None = None,
    on_frame: Callable[[int, int, Tensor | None], None] = lambda done, total, image: None,
    on_chunk: Callable[[World], None] = lambda world: None,
    afford: Callable[[int, str], None] = lambda needed, what: None,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> World:
    """The world grown along a trajectory whose first camera is where it stands.

    `count` past frames at most help with each chunk (0: only the newest). `prompts(chunk)` is kept with each chunk. With a
    `folder` the world is saved there after every chunk, and chunks that were already made there in the same way are taken
    from it instead of made again, so an interrupted exploration goes on where it was. `on_chunk` is given the world after
    every chunk, `afford` the bytes that the rest of the walk takes, before a chunk is made; `on_file(done, total)` is called
    for every file of the folder that is looked through.
    """
    target, _ = continuation(world, trajectory)
    for index, cameras in enumerate(in_chunks(target, chunk_frames)):
        settings = {"generator": "geometry preview", "retrieved": count, "filled": "by example", "path": fingerprint(cameras)}
        grown = None if folder is None else world_files.made_before(folder, world, prompts(index), settings, on_file)
        if grown is not None:
            on_frame((index + 1) * chunk_frames, len(target), grown.frame(len(grown) - 1))
        else:
            left = len(target) - index * chunk_frames
            afford(memory_needed(world.size, left, chunk_frames), f"a walk of {left} frames of {world.size[1]}x{world.size[0]}")
            chunk_plan = plan(world, cameras, count, VIEWS, device)
            preview = generate(
                world, chunk_plan, lambda done, _, image, i=index: on_frame(i * chunk_frames + done, len(target), image), device
            )
            grown = append(
                world, chunk_plan, preview.frames, preview.invented, preview.depths, prompts(index), settings
            )
        if folder is not None:
            world_files.save(grown, folder, on_chunk=on_file)
        on_chunk(grown)
        world = grown
    return world


def memory_needed(size: tuple[int, int], frames: int, chunk_frames: int) -> int:
    """Bytes that a walk takes at least: what is kept of its frames, and what is looked up while one chunk is made."""
    keyframe, source = 4, 22  # bytes a pixel: its depth; as a `Source`, without its surface
    kept = frames * (3 + 1 / 8) + frames / KEYFRAME_STRIDE * keyframe
    return int(size[0] * size[1] * (kept + chunk_frames + chunk_frames / KEYFRAME_STRIDE * source))


def generate(
    world: World,
    plan: ChunkPlan,
    on_frame: Callable[[int, int, Tensor], None] = lambda done, total, image: None,
    device: torch.device | None = None,
) -> Preview:
    """The frames of `plan`, from what the world remembers. Deterministic. `on_frame(done, total, (H, W, 3) uint8)`.

    Looked up on `device` (None: the CPU); the result is on the CPU.
    """
    count = len(plan.target)
    frames = torch.empty(count, *world.size, 3, dtype=torch.uint8)
    invented = torch.empty(count, *world.size, dtype=torch.bool)
    depths: dict[int, Tensor] = {}
    keyframes = keyframe_ids(plan)
    sources = remembered_sources(world, plan, device)
    cameras = plan.target.to(sources[0].depth.device)
    fresh: dict[int, Source] = {}
    telling: set[int] = set()
    for done, index in enumerate(coarse_to_fine(plan)):
        near = sorted(fresh, key=lambda i: abs(i - index))[:NEIGHBOURS]
        camera = cameras[index]
        # first those that were made first: others look back to them
        known = [*sources, *(made for i, made in fresh.items() if i in near or i in telling)]
        look, frame = look_up(known, camera), plan.first_frame + index
        if frame in keyframes:
            look = filled(look, camera, known, seed=frame)
        frames[index], invented[index] = to_uint8(look.image), look.invented.cpu()
        if frame in keyframes:
            depths[frame] = look.depth.cpu()
            earlier = [*sources, *fresh.values()]
            image = to_float(frames[index]).to(look.depth.device)
            fresh[index] = _source(image, look.invented, look.depth, camera, earlier)
            telling |= {index} if fresh[index].new.float().mean() > TELLING else set()
        on_frame(done + 1, count, frames[index])
    return Preview(frames, invented, depths)


def coarse_to_fine(plan: ChunkPlan) -> list[int]:
    """Every index of the chunk once: its keyframes from the last by halving, then the frames in between."""
    keyframes = [f - plan.first_frame for f in keyframe_ids(plan)]
    order, spans = [keyframes[-1]], [(-1, len(keyframes) - 1)]
    while spans:
        low, high = spans.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            order.append(keyframes[middle])
            spans += [(low, middle), (middle, high)]
    return order + sorted(set(range(len(plan.target))) - set(order))


def remembered_sources(world: World, plan: ChunkPlan, device: torch.device | None = None) -> list[Source]:
    """The photo and the retrieved frames, oldest first, then the newest frame; that one alone if none was retrieved.

    Retrieval leaves the photo out where later frames show all that it does; but those were resampled from it. They are put
    on `device`; None: the CPU, where worlds are.
    """
    photo = {0} if plan.retrieved else set()
    frames = sorted({*photo, *plan.retrieved, max(world.memory.frames)}, key=lambda f: (f != 0, f >= 0, abs(f)))
    sources: list[Source] = []
    for frame in frames:
        keyframe = world.memory[frame]
        image, invented, depth = to_float(world.frame(frame)), world.invented(frame), sharpened(keyframe.depth)
        image, invented, depth = (part.to(device or image.device) for part in (image, invented, depth))
        sources.append(_source(image, invented, depth, keyframe.camera.to(depth.device), sources))
    return sources


def _source(image: Tensor, invented: Tensor, depth: Tensor, camera: Cameras, earlier: list[Source]) -> Source:
    new = depth > 0
    left = new.view(-1).nonzero()[:, 0]
    points = _lifted(depth, camera, left)
    for source in earlier:
        which, *_ = _trace(points, source)
        new.view(-1)[left[which]] = False
        left, points = (_without(which, part) for part in (left, points))
    disparity = torch.where(depth > 0, 1 / depth.clamp_min(1e-12), 0.0)
    return Source(image, invented, depth, disparity, camera, new, patches(depth, camera, new))


def look_up(sources: list[Source], camera: Cameras, make_up: bool = True) -> Look:
    """One new view. What no source shows is made up, or left black; its depth is made up either way."""
    depth = surface_depth(sources, camera)
    covered = depth > 0
    if covered.any():
        depth[~covered] = continued(depth[..., None], depth, covered)[:, 0]
    else:
        depth.fill_(float(max(s.depth.max() for s in sources)))
    image = depth.new_zeros(*depth.shape, 3)
    invented = torch.ones_like(covered)
    found = torch.zeros_like(covered)
    _find(sources, camera, depth, image, invented, found)
    if make_up and not found.any():
        image[:] = sources[0].image.mean((0, 1))  # looking away from all that is known
    elif found.any() and not found.all():
        # beside a silhouette the foreground reaches half a pixel too far; what lies behind may be known after all
        depth[~found] = continued(depth[..., None], depth, found)[:, 0]
        _find(sources, camera, depth, image, invented, found)
        if make_up and not found.all():
            image[~found] = softly(image, depth, found)
    return Look(image, invented, depth, found)


def filled(look: Look, camera: Cameras, sources: list[Source], seed: int) -> Look:
    """A look-up with texture where it made up its pixels softly, on planes that go on. Same seed, same pixels.

    Where such a plane, or what lies behind what a source looked through, is shown by a source after all, it is taken from there.
    """
    if not look.found.any() or not deep(~look.found):
        return look
    device, cpu = look.depth.device, torch.device("cpu")
    surfaces = beyond(look.depth.to(cpu), look.found.to(cpu), seed)
    depth = _out_of_sight(surfaces.depth.to(device), ~look.found, camera, sources)
    image, invented, found = look.image.clone(), look.invented.clone(), look.found.clone()
    _find(sources, camera, depth, image, invented, found)
    if not found.all():
        image = by_example(image.to(cpu), found.to(cpu), surfaces, camera.to(cpu), seed).to(device)
    return Look(image, invented, depth, found)


def _out_of_sight(depth: Tensor, hole: Tensor, camera: Cameras, sources: list[Source]) -> Tensor:
    """A depth (H, W) whose hole (H, W) is pushed back where a source saw something known behind it: there is nothing there.

    A pixel stays where it is if a source looked through all that it could show.
    """
    before, depth, left = depth, depth.clone(), hole.view(-1).nonzero()[:, 0]
    for _ in range(PUSHES):
        points = _lifted(depth, camera, left)
        through = torch.zeros_like(left, dtype=torch.bool)
        for source in sources:
            which, expected, nearest, _, _ = _inside(points, source)
            seen, known = source.disparity.view(-1)[nearest], ~source.invented.view(-1)[nearest]
            through[which[known & (seen > 0) & (seen < (1 - AGREEMENT) * expected)]] = True
        left = left[through]
        if not len(left):
            break
        depth.view(-1)[left] *= PUSH
    depth.view(-1)[left] = before.view(-1)[left]
    return depth


def surface_depth(sources: list[Source], camera: Cameras) -> Tensor:
    """Depth (H, W) of the nearest remembered surface in each pixel of a new view, 0 where there is none."""
    return draw(merge(*(s.surface for s in sources)), camera)


def _find(
    sources: list[Source], camera: Cameras, depth: Tensor, image: Tensor, invented: Tensor, found: Tensor
) -> None:
    """Fill `image`, `invented` and `found` where the surface at `depth` is shown by a source, the first one that does."""
    left = (~found).view(-1).nonzero()[:, 0]
    points = _lifted(depth, camera, left)
    for source in sources:
        which, colours, made_up = _trace(points, source)
        target = left[which]
        image.view(-1, 3)[target], invented.view(-1)[target], found.view(-1)[target] = colours, made_up, True
        left, points = (_without(which, part) for part in (left, points))


def _lifted(depth: Tensor, camera: Cameras, pixels: Tensor) -> Tensor:
    """World points (3, N) of pixels (N,) of a depth map (H, W), counted row by row."""
    width = depth.shape[1]
    grid = torch.stack([pixels % width, pixels // width, torch.ones_like(pixels)]).to(depth)
    rays = (camera.c2w[0, :3, :3] @ camera.K_inverse[0]) @ grid
    return rays.mul_(depth.view(-1)[pixels]).add_(camera.centers[0][:, None])


def _without(which: Tensor, values: Tensor) -> Tensor:
    """Values (..., N) but those at `which` (M,)."""
    kept = torch.ones(values.shape[-1], dtype=torch.bool, device=values.device)
    kept[which] = False
    return values[..., kept.nonzero()[:, 0]]


def _trace(points: Tensor, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Where world points (3, N) appear in a source.

    Returns which (M,) are shown (inside the picture and on the surface that is there), their colours (M, 3) and whether
    those were made up (M,).
    """
    which, expected, nearest, u, v = _inside(points, source)
    # disparity is linear on planes, so interpolating it is exact on them; across a silhouette it matches neither side,
    # and the nearest pixel decides
    smooth = sample(source.disparity[..., None], u, v)[:, 0]
    limit = AGREEMENT * expected
    agrees = (smooth - expected).abs() < limit
    agrees |= (source.disparity.view(-1)[nearest] - expected).abs() < limit
    agrees = agrees.nonzero()[:, 0]
    colours = sample(source.image, u[agrees], v[agrees])
    return which[agrees], colours, source.invented.view(-1)[nearest[agrees]]


def _inside(points: Tensor, source: Source) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which (M,) of world points (3, N) lie in a source's picture, their disparity there, nearest pixel, and place u, v."""
    height, width = source.depth.shape
    w2c, K = source.camera.w2c[0], source.camera.K[0]
    x, y, z = (K @ w2c[:3, :3]) @ points + (K @ w2c[:3, 3:])
    u, v = x / z, y / z
    inside = (z > 0) & (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5)
    which = inside.nonzero()[:, 0]
    u, v, expected = u[which].clamp_(0, width - 1), v[which].clamp_(0, height - 1), 1 / z[which]
    return which, expected, v.round().long() * width + u.round().long(), u, v
