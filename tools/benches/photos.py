"""What photos become in the geometry preview: how a walk holds together, what is made up beyond the photo, which frames are found.

The photos are the pictures that the command is given, or those in a folder that it is given; without, the demo's room.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lyra_core.cameras import camera_files, trajectory
from lyra_core.cameras.camera import Cameras
from lyra_core.cameras.presets import preset
from lyra_core.memory.depth import assumed_lens
from lyra_core.memory.layout import automatic
from lyra_core.metrics import textures
from lyra_core.metrics.pictures import psnr
from lyra_core.world import consistency, made_up, preview
from lyra_core.world.world import CHUNK_FRAMES, World, append, begin, in_chunks, plan

from . import Result

TOOLS = Path(__file__).resolve().parents[1]
SMALL, SMALLER = (240, 416), (128, 224)  # pixels, height first: of walks that are measured, of views that are counted
FIELD_OF_VIEW, CAMERA_HEIGHT = 60.0, 1.6  # as Lyra 2 Depth takes them by itself
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
given: list[Path] = []  # by the command


@dataclass(frozen=True)
class Photo:
    name: str
    image: Tensor  # (H, W, 3) 0..1
    depth: Tensor  # (H, W), by the photo's lines
    camera: Cameras


def photos(size: tuple[int, int]) -> Iterator[Photo]:
    """Each cropped around its middle to `size`."""
    files = [file for path in given for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    for file in [file for file in files if file.suffix.lower() in ENDINGS] or [TOOLS / "demo" / "room.png"]:
        with Image.open(file) as opened:
            picture = ImageOps.fit(opened.convert("RGB"), size[::-1], Image.LANCZOS)
        image = torch.from_numpy(np.array(picture)).float() / 255
        found = automatic(image, assumed_lens(size, FIELD_OF_VIEW), CAMERA_HEIGHT)
        yield Photo(file.stem, image, found.depth, found.camera)


def there_and_back(photo: Photo, frames: int) -> Cameras:
    """The arc of the shipped workflow, and the same way back."""
    arc = preset("orbit_horizontal", photo.camera, frames, trajectory.center_depth(photo.depth), "right", 0.35)
    return trajectory.chain(arc, trajectory.reverse(arc))


def bench_consistency() -> Iterator[Result]:
    """320 frames out and back. The nearest public table has 15.4 dB for a memory of points at 250 frames and more."""
    for photo in photos(SMALL):
        start = time.process_time()
        world = preview.explore(begin(photo.image, photo.depth, photo.camera), there_and_back(photo, 161))
        made, start = time.process_time() - start, time.process_time()
        found = consistency.measure(world)
        took = time.process_time() - start
        for line in consistency.table(found).splitlines():
            yield Result(f"consistency: {photo.name}: {line}", "")
        yield Result(f"consistency: {photo.name}, CPU time of the walk, of the measuring a chunk", f"{made:.0f} s, {took / 4:.1f} s")
        scores = found.whole
        held = scores.revisit_psnr > 30 and scores.tsed[2.0] > 0.9 and scores.registered > 0.9
        value = f"{scores.revisit_psnr:.1f} dB, {scores.revisit_ssim:.3f}"
        yield Result(f"consistency: {photo.name}, revisits, TSED and cameras", value, "> 30 dB, > 90 %", held)


# --------------------------------------------------------------------------------------------------- views to retrieve for

CHOICES = (1, 2, 3, 5, 8)
LOOKED_AT = 8  # frames of a chunk in which it is counted what is found


def shipped_paths(photo: Photo) -> dict[str, Cameras]:
    """Those of the shipped workflows that have more than one chunk."""
    size, arc = photo.camera.size, preset("orbit_horizontal", photo.camera, 161, trajectory.center_depth(photo.depth), "right", 0.35)
    inward = trajectory.zoom(photo.camera, photo.depth, "in", 0.5, 81)
    steps = trajectory.zoom(photo.camera, photo.depth, "in", 0.3, 81)
    turn = preset("orbit_horizontal", steps[-1:], 81, trajectory.center_depth(photo.depth), "right", 0.25)
    return {
        "zoom out": trajectory.zoom(photo.camera, photo.depth, "out", 1.5, 241, upward_ratio=0.15),
        "custom": camera_files.load_cameras(TOOLS / "demo" / "path.json", frames=161, size=size),
        "there and back": trajectory.chain(inward, trajectory.reverse(inward)),
        "arc": arc,
        "step by step": trajectory.chain(steps, turn),
    }


def bench_views() -> Iterator[Result]:
    """Of what all of the memory shows of a chunk after the first, how much do the retrieved frames show?"""
    shares = {views: [] for views in CHOICES}
    for photo in photos(SMALLER):
        for name, path in shipped_paths(photo).items():
            here = _found(begin(photo.image, photo.depth, path[0]), path)
            for views, found in here.items():
                shares[views] += found
            values = ", ".join(f"{np.mean(found):.2%}" for found in here.values())
            yield Result(f"views: {photo.name}, {name}: {', '.join(map(str, CHOICES))} cameras find", values)
    for views, found in shares.items():
        value = f"{np.mean(found):.2%}, {min(found):.2%}"
        yield Result(f"views: frames retrieved for {views} camera{'s' * (views > 1)} show, mean and least", value)


def _found(world: World, path: Cameras) -> dict[int, list[float]]:
    """For each choice, of each frame looked at, the share that retrieved frames show of what any does."""
    shares = {views: [] for views in CHOICES}
    for target in in_chunks(path[1:], CHUNK_FRAMES):
        asked = plan(world, target, views=preview.VIEWS)
        if world.chunks:
            everything = preview.remembered_sources(world, plan(world, target, count=len(world.memory.frames)))
            looked = [target[i] for i in range(LOOKED_AT - 1, len(target), len(target) // LOOKED_AT)]
            shown = [preview.look_up(everything, camera, make_up=False).found for camera in looked]
            for views in CHOICES:
                sources = preview.remembered_sources(world, plan(world, target, views=views))
                for camera, whole in zip(looked, shown, strict=True):
                    part = preview.look_up(sources, camera, make_up=False).found & whole
                    shares[views].append(float(part.sum() / whole.sum().clamp_min(1)))
        made = preview.generate(world, asked)
        world = append(world, asked, made.frames, made.invented, made.depths)
    return shares


# ------------------------------------------------------------------------------------------------------- what is made up

WHOLE, HIDDEN = (480, 832), 1 / 8  # pixels, height first; of each side: in all a quarter of the width and of the height


def bench_fill() -> Iterator[Result]:
    """Photos whose border is hidden: how like the real one is what is made up?"""
    for photo in photos(WHOLE):
        known = torch.zeros(WHOLE, dtype=torch.bool)
        known[tuple(slice(round(side * HIDDEN), round(side * (1 - HIDDEN))) for side in WHOLE)] = True
        depth = torch.where(known, photo.depth, 0.0)
        depth[~known] = made_up.continued(depth[..., None], depth, known)[:, 0]
        soft = torch.where(known[..., None], photo.image, 0.0)
        soft[~known] = made_up.softly(soft, depth, known)
        start, cpu = time.perf_counter(), time.process_time()
        surfaces = made_up.beyond(depth, known)
        image = made_up.by_example(soft, known, surfaces, photo.camera)
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        scores = [_likeness(made, photo.image, ~known) for made in (soft, image)]
        for (name, before), after in zip(scores[0].items(), scores[1].values(), strict=True):
            asked = "less" if "distance" in name else ""
            what, value = f"fill: {photo.name}, {name}: carried on softly, by example", f"{before:.2f}, {after:.2f}"
            yield Result(what, value, asked, not asked or after < before)
        off = [float(((made - photo.depth).abs() / photo.depth)[~known].mean()) for made in (depth, surfaces.depth)]
        yield Result(f"fill: {photo.name}, depth off the whole photo's layout", f"{off[0]:.1%}, {off[1]:.1%}", "less", off[1] < off[0])
        yield Result(f"fill: {photo.name}, time by the clock, of the processor", f"{took:.1f} s, {cpu:.1f} s")


def _likeness(made: Tensor, real: Tensor, where: Tensor) -> dict[str, float]:
    return {
        "distance of gradients": textures.gradient_distance(made, real, where),
        "distance of patches": textures.patch_distance(made, real, where),
        "PSNR, which a blur wins": psnr(made, real, where),
    }


BENCHES = {"fill": bench_fill, "consistency": bench_consistency, "views": bench_views}
