"""What a reconstruction costs and how right it is: fits of cameras, pictures from inside a room, surfaces, files, memory."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lyra_core.cameras.camera import Cameras, join, pinhole, quaternion_to_rotation, unproject
from lyra_core.metrics.pictures import psnr
from lyra_core.splats import alignment, gaussians, rasterize
from lyra_core.splats.reconstruct import Views, reconstruct

from . import Result, peak_mib, seconds, surface
from .splats import bench_splats

TOOLS = Path(__file__).resolve().parents[1]
# splats in sight, the strides of the pixels that become splats, and the least dB
SCENES = (("100 k", (2,), 25.0), ("500 k", (1, 2), 30.0))
PATH = 40  # cameras of each path
TRIES = 20  # of each path, with other noise
GRID = (238, 413)  # of the reference's gaussians at 832x480


def turning(yaw: Tensor, centers: Tensor) -> Cameras:
    """Cameras that look along yaw (F,), radians, from centres (F, 3)."""
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    R = torch.stack([yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos()], -1).view(-1, 3, 3)
    w2c = torch.eye(4, dtype=yaw.dtype).repeat(len(yaw), 1, 1)
    w2c[:, :3, :3], w2c[:, :3, 3] = R.mT, -(R.mT @ centers[..., None])[..., 0]
    return Cameras(w2c, pinhole(surface.SIZE, surface.FOCAL, len(yaw)).K.to(yaw.dtype), surface.SIZE)


# ---------------------------------------------------------------------------------------------------- fits of cameras


def paths() -> dict[str, Cameras]:
    """The ways of walking that matter, float64."""
    time = torch.linspace(0, 1, PATH, dtype=torch.float64)
    still, turn = torch.zeros_like(time), 2 * math.pi * time
    dolly = torch.stack([still, still, time], 1)
    loop = torch.stack([turn.cos(), 0.2 * turn.sin(), turn.sin()], 1)
    return {
        "straight dolly": turning(still, dolly),
        "pure rotation": turning(turn, 0 * dolly),
        "loop": turning(-turn, loop),
    }


def rotation(random: np.random.Generator, degrees: float | None, count: int = 1) -> Tensor:
    """Rotations (count, 3, 3) of about so many degrees about any axis, or any at all."""
    quats = random.normal(size=(count, 4))
    if degrees is not None:
        angle = random.normal(0, math.radians(degrees), (count, 1)) / 2
        axis = quats[:, 1:] / np.linalg.norm(quats[:, 1:], axis=1, keepdims=True)
        quats = np.concatenate([np.cos(angle), np.sin(angle) * axis], 1)
    return quaternion_to_rotation(torch.from_numpy(quats / np.linalg.norm(quats, axis=1, keepdims=True)))


def turned_by(cameras: Cameras, noise: float, degrees: float, seed: int) -> dict[str, float]:
    """Degrees by which each fit misses the true rotation, of a network's noisy cameras in a world of its own."""
    random = np.random.default_rng(seed)
    motion = alignment.Similarity(1.7, rotation(random, None)[0], torch.from_numpy(random.normal(0, 2, 3)))
    seen = motion.cameras(cameras)
    c2w = seen.c2w.clone()
    c2w[:, :3, :3] = c2w[:, :3, :3] @ rotation(random, degrees, len(seen))
    c2w[:, :3, 3] += motion.scale * noise * torch.from_numpy(random.normal(size=(len(seen), 3)))
    seen, errors = replace(seen, w2c=torch.linalg.inv(c2w)), {}
    for how in alignment.ALIGNMENTS:
        still = float(cameras.centers.var(0).sum()) < 1e-12
        # where cameras stand still, the scale comes from depth, not from them
        fit = alignment.align(cameras, seen, how, motion.scale if still and how == "orientation" else None)
        trace = float((fit.R.mT @ motion.R).diagonal().sum())
        errors[how] = math.degrees(math.acos(min(1.0, (trace - 1) / 2))) if trace < 3 else 0.0
    return errors


def bench_fits() -> Iterator[Result]:
    for name, cameras in paths().items():
        for kind, noise, degrees in (("exact", 0.0, 0.0), ("noisy", 0.002, 0.1)):
            errors = [turned_by(cameras, noise, degrees, seed) for seed in range(TRIES)]
            worst = max(error["orientation"] for error in errors)
            theirs = statistics.median(error["centers"] for error in errors)
            what = f"recon: {name}, {kind}: degrees off, worst; centres only, median"
            yield Result(what, f"{worst:.3f} {theirs:.3f}", "first < 0.1", worst < 0.1)


# -------------------------------------------------------------------------------------------------- pictures of a room


def painted(camera: Cameras, depth: Tensor) -> Tensor:
    """(H, W, 3) of walls with waves on them, wherever they are."""
    points = unproject(depth[None], camera)[0]
    waves = [torch.sin(7 * points[..., i] + i) * torch.cos(5 * points[..., i - 1]) for i in range(3)]
    return 0.5 + 0.3 * torch.stack(waves, -1)


def bench_pictures() -> Iterator[Result]:
    cameras = join(*surface.cameras())
    depths = [surface.depth_of(camera) for camera in surface.cameras()]
    images = [painted(cameras[i], depth) for i, depth in enumerate(depths)]
    for name, strides, least in SCENES:
        scene = gaussians.merge(*(gaussians.from_views(images, depths, cameras, stride) for stride in strides))
        camera = cameras[4]
        visible = len(rasterize._project(scene, camera, rasterize.NEAR).centers)
        took = min(seconds(partial(rasterize.render, scene, camera, backend="torch")) for _ in range(3))
        rendered = rasterize.render(scene, cameras, backend="torch")
        quality = min(psnr(found, truth) for found, truth in zip(rendered.images, images, strict=True))
        black = float((rendered.alpha < 0.5).float().mean((1, 2)).max())
        yield Result(f"recon: {len(scene):,} splats, {visible:,} in sight ({name}): a frame", f"{took:.2f} s")
        yield Result(f"recon: {name}: worst frame against the one it came from", f"{quality:.1f} dB", f"> {least:.0f}", quality > least)
        yield Result(f"recon: {name}: uncovered pixels of the worst frame", f"{black:.2%}", "< 0.1 %", black < 1e-3)


# -------------------------------------------------------------------------------------------------------------- memory


def report_peak(views: int) -> None:
    """Print by how many MiB a reconstruction raises this process's peak above the network's answer, and its gaussians."""
    time = torch.linspace(0, 1, views)
    cameras = turning(time, torch.stack([time, 0 * time, time], 1))
    raw = torch.zeros(views, *GRID, 37)
    raw[..., 5] = 1
    density, depth = torch.full((views, *GRID), 0.5), torch.full((views, 2 * GRID[0], 2 * GRID[1]), 2.0)
    answer = Views(depth, torch.ones_like(depth), cameras, raw, density)
    before = peak_mib()
    found = reconstruct(lambda *asked: answer, lambda frames: torch.zeros(1), [range(views)], cameras)
    print(peak_mib() - before, sum(field.nbytes for field in vars(found.gaussians).values()) / 2**20)


def bench_reconstruction() -> Iterator[Result]:
    """In processes of their own: a peak is never forgotten."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import benches, host; host.boot(); "
    program += "from benches.recon import report_peak; report_peak(int(sys.argv[2]))"
    peaks = {}
    for views in (8, 24):
        command = [sys.executable, "-c", program, str(TOOLS), str(views)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[views] = [float(value) for value in done.stdout.split()]
    above, kept = (peaks[24][i] - peaks[8][i] for i in (0, 1))
    ratio = above / kept
    what = "recon: peak memory of 16 more views, over their gaussians"
    yield Result(what, f"{above:.0f} MiB, {ratio:.1f}", "<= 5", ratio <= 5)


def bench_recon() -> Iterator[Result]:
    yield from bench_fits()
    yield from bench_pictures()
    yield from surface.bench_surface()
    yield from bench_reconstruction()
    yield from bench_splats()


BENCHES = {"recon": bench_recon}
