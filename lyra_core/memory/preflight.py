"""What a planned path will meet, before anything is made: how much of each view is known, how near surfaces come, how
much happens in each chunk. In numpy, on one thread, from the points that the browser draws (see `point_cloud`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cameras.camera import Cameras
from . import point_cloud

VIEW_STRIDE = 8  # frames between the views whose coverage is told
CENTER_STRIDE = 4  # frames between the centres that are kept clear: 21 a chunk
CELL = 4  # a cell of the grid is so many strides wide; with less, near surfaces come apart and look open
LEVELS = 3  # of the points that are counted: all but the finest
TRAVEL, TURNING = 0.5, 22.0  # depths, degrees: what the reference's paths do in a chunk


@dataclass(frozen=True)
class Preflight:
    """The numbers of a path of F cameras, the first of which is where the world stands."""

    views: tuple[int, ...]  # frames whose coverage is told
    coverage: tuple[float, ...]  # of each of them, 0 to 1
    clearance: tuple[float, ...]  # of each of them: to the nearest known point, in depths of the scene
    nearest: float  # scene units from the path to a known point
    nearest_frame: int
    effort: tuple[float, ...]  # of each chunk; 1 is what the reference's paths do


def preflight(cameras: Cameras, points: np.ndarray, depth: float, chunk_frames: int = 80) -> Preflight:
    """What the path meets among known points (N, 3); `depth` is how far away the scene is, in scene units."""
    last = len(cameras) - 1
    views = sorted({*range(VIEW_STRIDE, last + 1, VIEW_STRIDE), last})
    centers = sorted({*range(0, last + 1, CENTER_STRIDE), *views})
    gaps = distances(points, cameras.centers.numpy()[centers])
    near = dict(zip(centers, gaps.tolist(), strict=True))
    closest = min(centers, key=near.__getitem__)
    return Preflight(
        tuple(views),
        tuple(coverage(points, cameras[views]).tolist()),
        tuple(near[view] / depth for view in views),
        near[closest],
        closest,
        tuple(effort(cameras, depth, chunk_frames)),
    )


def grid_of(size: tuple[int, int], stride: int | None = None) -> tuple[int, int]:
    """Rows and columns of the grid in which points `stride` pixels apart are counted; by default of the first LEVELS."""
    stride = stride or point_cloud.finest_stride(size[1]) << (point_cloud.LEVELS - LEVELS)
    return max(1, round(size[0] / (CELL * stride))), max(1, round(size[1] / (CELL * stride)))


def coverage(points: np.ndarray, cameras: Cameras, grid: tuple[int, int] | None = None) -> np.ndarray:
    """(F,) share of the cells of a grid (rows, columns) over each picture in which a known point (N, 3) lies."""
    height, width = cameras.size
    rows, columns = grid or grid_of(cameras.size)
    across = np.ascontiguousarray(points.T, dtype=np.float32)
    P = (cameras.K.double() @ cameras.w2c[:, :3].double()).numpy().astype(np.float32)
    shares = np.empty(len(cameras))
    for number, (for_x, for_y, for_z) in enumerate(P):
        x, y, z = (p[0] * across[0] + p[1] * across[1] + p[2] * across[2] + p[3] for p in (for_x, for_y, for_z))
        (front,) = (z > 0).nonzero()
        z = z[front]
        # integer centres: the picture reaches from -0.5 to its width - 0.5
        column = (x[front] / z + np.float32(0.5)) * np.float32(columns / width)
        row = (y[front] / z + np.float32(0.5)) * np.float32(rows / height)
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        cells = row[inside].astype(np.int32) * columns + column[inside].astype(np.int32)
        shares[number] = (np.bincount(cells, minlength=rows * columns) > 0).mean()
    return shares


def distances(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(F,) from each centre (F, 3) to the nearest point (N, 3); infinity where nothing is known."""
    across = np.ascontiguousarray(points.T, dtype=np.float32)
    if not across.size:
        return np.full(len(centers), np.inf)
    gaps = [sum(np.square(across[i] - center[i]) for i in range(3)).min() for center in centers.astype(np.float32)]
    return np.sqrt(np.array(gaps, dtype=np.float64))


def effort(cameras: Cameras, depth: float, chunk_frames: int = 80) -> list[float]:
    """How much happens in each chunk of new frames: its travel or its turning, the larger, beside the reference's."""
    c2w = cameras.c2w.double().numpy()
    travel = np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1)
    turn = np.swapaxes(c2w[:-1, :3, :3], 1, 2) @ c2w[1:, :3, :3]
    # by sine and cosine: the cosine alone loses small turns to rounding
    sine = 0.5 * np.linalg.norm([turn[:, 2, 1] - turn[:, 1, 2], turn[:, 0, 2] - turn[:, 2, 0], turn[:, 1, 0] - turn[:, 0, 1]], axis=0)
    turning = np.degrees(np.arctan2(sine, 0.5 * (np.trace(turn, axis1=1, axis2=2) - 1)))
    chunks = range(0, len(travel), chunk_frames)
    parts = [(travel[i : i + chunk_frames].sum(), turning[i : i + chunk_frames].sum()) for i in chunks]
    return [max(float(t) / (TRAVEL * depth), float(r) / TURNING) for t, r in parts]
