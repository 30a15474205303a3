"""What a surface costs and how exact it is, in a room whose every point is known."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lyra_core.cameras.camera import Cameras, pinhole, pixel_grid, unproject
from lyra_core.exports import surface, tsdf

from . import Result, peak_mib, seconds

TOOLS = Path(__file__).resolve().parents[1]
SIZE, FOCAL = (480, 832), 520.0
VIEWS, VOXEL = 12, 0.021  # walls lie anywhere between voxels
LOW, HIGH = torch.tensor([-3.05, -1.43, -2.57]), torch.tensor([3.11, 1.37, 4.23])  # of the room
PILLAR = torch.tensor([0.83, -0.31, 1.57]), torch.tensor([1.71, 1.37, 2.43])
FLOATS = 6  # per voxel
MARGIN = 256.0  # MiB of one view and what is made of it


def cameras() -> Iterator[Cameras]:
    """From all over the room, each turned on by the golden angle."""
    for i in range(VIEWS):
        turn, yaw = 2 * math.pi * i / VIEWS, 2 * math.pi * 0.618 * i
        c2w = torch.eye(4)
        c2w[0, 0] = c2w[2, 2] = math.cos(yaw)
        c2w[0, 2], c2w[2, 0] = math.sin(yaw), -math.sin(yaw)
        c2w[:3, 3] = torch.tensor([1.2 * math.cos(turn) - 0.4, 0.1 * math.sin(3 * i), 0.6 + math.sin(turn)])
        yield Cameras(torch.linalg.inv(c2w)[None], pinhole(SIZE, FOCAL).K, SIZE)


def depth_of(camera: Cameras) -> Tensor:
    """Where the pixels' rays end, by intersection with the room and the pillar."""
    rays = pixel_grid(SIZE) @ camera.K_inverse[0].T @ camera.c2w[0, :3, :3].T
    inverse, origin = 1 / torch.where(rays.abs() < 1e-12, 1e-12, rays), camera.centers[0]
    walls = torch.maximum((LOW - origin) * inverse, (HIGH - origin) * inverse).amin(-1)
    first, second = ((side - origin) * inverse for side in PILLAR)
    enter, leave = torch.minimum(first, second).amax(-1), torch.maximum(first, second).amin(-1)
    return torch.where((enter < leave) & (enter > 0), enter, walls)


def views() -> Iterator[tuple]:
    for camera in cameras():
        depth = depth_of(camera)
        yield (unproject(depth[None], camera)[0] / 10 + 0.5).clamp(0, 1), depth, camera


def off_surface(points: Tensor) -> Tensor:
    walls = torch.minimum((points - LOW).abs(), (points - HIGH).abs()).amin(-1)
    beyond = torch.maximum(PILLAR[0] - points, points - PILLAR[1])
    outside = beyond.clamp_min(0).norm(dim=-1)
    return torch.minimum(walls, torch.where(outside > 0, outside, -beyond.amax(-1)))


def dense_voxels(voxel: float) -> float:
    """Of a grid that holds the room and the distances behind its walls."""
    return float(((HIGH - LOW) / voxel + 2 * tsdf.TRUNCATION).prod())


def report_peak() -> None:
    """Print by how many MiB fusing raises this process's peak memory, and how many blocks came of it."""
    for _ in views():  # loads what every view needs
        break
    tsdf.fuse([next(views())], 0.2)
    before = peak_mib()
    blocks = len(tsdf.fuse(views(), VOXEL))
    print(peak_mib() - before, blocks)


def bench_surface() -> Iterator[Result]:
    made: list = []
    fusing = seconds(lambda: made.append(tsdf.fuse(views(), VOXEL)))
    extracting = seconds(lambda: made.append(surface.extract(made[0])))
    volume, mesh = made
    what = f"surface: {VIEWS} views of {SIZE[1]}x{SIZE[0]}, voxels of {VOXEL:g}"
    yield Result(f"{what}, per view", f"{fusing / VIEWS:.2f} s")
    yield Result(f"surface: {len(mesh)} faces out of {len(volume)} blocks", f"{extracting:.1f} s")
    error = off_surface(mesh.vertices) / VOXEL
    middle, most = float(error.median()), float(error[:: len(error) // 10**6 + 1].quantile(0.95))
    yield Result("surface: vertices off the truth, median, voxels", f"{middle:.4f}", "<= 0.1", middle <= 0.1)
    yield Result("surface: vertices off the truth, 95 of 100, voxels", f"{most:.3f}", "<= 0.5", most <= 0.5)
    directed = torch.cat([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    _, uses = torch.unique(directed.sort(1)[0], dim=0, return_counts=True)
    crowded, border = int((uses > 2).sum()), float((uses == 1).float().mean())
    yield Result("surface: edges of more than two faces", f"{crowded}", "0", crowded == 0)
    yield Result("surface: edges at the border of what was seen", f"{100 * border:.1f} %", "<= 3 %", border <= 0.03)
    share = len(volume) * tsdf.VOXELS / dense_voxels(VOXEL)
    yield Result("surface: voxels kept, of those of a dense grid", f"{100 * share:.0f} %", "<= 40 %", share <= 0.4)
    growth = len(volume) / len(tsdf.fuse(views(), 2 * VOXEL))
    yield Result("surface: voxels half as wide are, times the blocks", f"{growth:.1f}", "<= 5", growth <= 5)
    yield from memory()


def memory() -> Iterator[Result]:
    """In a process of its own: a peak is never forgotten."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import benches, host; host.boot(); "
    program += "from benches.surface import report_peak; report_peak()"
    done = subprocess.run([sys.executable, "-c", program, str(TOOLS)], capture_output=True, text=True, check=True)
    above, blocks = (float(word) for word in done.stdout.split()[-2:])
    kept = blocks * tsdf.VOXELS * FLOATS * 4 / 2**20
    dense = dense_voxels(VOXEL) * FLOATS * 4 / 2**20
    yield Result(
        "surface: peak memory of fusing", f"{above:.0f} MiB", f"<= blocks + {MARGIN:.0f} MiB", above <= kept + MARGIN
    )
    yield Result("surface: of that blocks; a dense grid would be", f"{kept:.0f} MiB {dense:.0f} MiB")
