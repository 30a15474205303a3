"""Forward warp: what pixels with known depth look like from somewhere else.

A *soft* z-buffer, exactly the reference's: each point is spread over its four neighbouring pixels with bilinear weights,
divided by a steep exponential of its depth, and the weighted mean is taken. How steep depends on the farthest point of
all views that are warped together, so the batching (16 consecutive views) is part of the definition.

A source is lifted to world points once; all its features and its depth go through one scatter per view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .camera import Cameras, unproject

FAR = 1e4  # scene units; deeper values and NaN count as this far away, as in the reference
CONTINUITY = 0.05  # relative depth range of a 5x5 window above which a pixel is not warped
VIEWS_PER_BATCH = 16  # the reference's warp chunk
STEEPNESS = 50.0


@dataclass(frozen=True)
class Points:
    """Pixels lifted to the world, ready to be seen from anywhere."""

    xyz: Tensor  # (N, 3) world, scene units
    features: Tensor  # (N, C) whatever travels with them: colours, coordinates
    complete: bool  # False if a source pixel was left out; the reference then counts the world's origin as a point


@dataclass(frozen=True)
class Warp:
    """Points as seen by F cameras."""

    features: Tensor  # (F, H, W, C), 0 where nothing was seen
    depth: Tensor  # (F, H, W) along z, 0 where nothing was seen
    seen: Tensor  # (F, H, W) bool


def reliable(depth: Tensor, threshold: float = CONTINUITY) -> Tensor:
    """Pixels (H, W) of a depth map (H, W) away from jumps: (max - min) / mean of the 5x5 window below `threshold`.

    The mean pads with zeros (so borders are judged stricter), the extremes do not: as in the reference.
    """
    d = depth[None, None]
    spread = F.max_pool2d(d, 5, 1, 2) + F.max_pool2d(-d, 5, 1, 2)
    return (spread / (F.avg_pool2d(d, 5, 1, 2) + 1e-6) < threshold)[0, 0]


def lift(depth: Tensor, camera: Cameras, features: Tensor, continuity: float | None = CONTINUITY) -> Points:
    """The pixels of one view as world points.

    depth (H, W) along z, 0 = unknown; features (H, W, C); `continuity` None keeps pixels at depth jumps.
    """
    depth = torch.nan_to_num(depth, nan=FAR, posinf=FAR, neginf=0.0).clamp(0, FAR)
    valid = depth > 0
    if continuity is not None:
        valid &= reliable(depth, continuity)
    return Points(unproject(depth[None], camera)[0][valid], features[valid], bool(valid.all()))


def merge(*points: Points) -> Points:
    """Points of several views as one set, to be warped together."""
    return Points(
        torch.cat([p.xyz for p in points]), torch.cat([p.features for p in points]), all(p.complete for p in points)
    )


def splat(points: Points, cameras: Cameras, batch: int = VIEWS_PER_BATCH) -> Warp:
    """`points` seen by every camera, `batch` consecutive views sharing one depth scale."""
    warps = list(splat_batches(points, cameras, batch))
    return Warp(*(torch.cat([getattr(w, name) for w in warps]) for name in ("features", "depth", "seen")))


def splat_batches(points: Points, cameras: Cameras, batch: int = VIEWS_PER_BATCH) -> Iterator[Warp]:
    """`splat`, one batch of views at a time, so that a long path never has to fit in memory."""
    values = torch.cat(
        [points.features, points.features.new_zeros(len(points.xyz), 1), points.features.new_ones(len(points.xyz), 1)],
        1,
    )
    for start in range(0, len(cameras), batch):
        views = cameras[start : start + batch]
        scale = _depth_scale(points, views)
        yield _stack(
            [_splat_one(points.xyz, values, views.w2c[i], views.K[i], views.size, scale) for i in range(len(views))]
        )


def _stack(views: list[tuple[Tensor, Tensor, Tensor]]) -> Warp:
    return Warp(*(torch.stack(parts) for parts in zip(*views, strict=True)))


def _depth_scale(points: Points, cameras: Cameras) -> float:
    """log1p of the largest z of any point in any of the cameras (at least 0)."""
    farthest = [cameras.w2c[:, 2, 3].max()] if not points.complete else []
    farthest += [(points.xyz @ row[:3] + row[3]).max() for row in cameras.w2c[:, 2] if len(points.xyz)]
    return float(torch.log1p(torch.stack(farthest).max().clamp_min(0))) if farthest else 0.0


def _splat_one(xyz: Tensor, values: Tensor, w2c: Tensor, K: Tensor, size: tuple[int, int], scale: float):
    """One view. `values` (N, C + 2): features, a column for depth, a column of ones that gathers the weights."""
    height, width = size
    local = torch.addmm(w2c[:3, 3], xyz, w2c[:3, :3].T)
    z = local[:, 2].contiguous()
    pixels = (local @ K.T)[:, :2] / (z + 1e-7)[:, None]
    nearness = torch.exp(-(STEEPNESS / (scale + 1e-7) * torch.log1p(z.clamp_min(0))).clamp_max_(80)) * (z > 0)
    # a ring of one pixel around the picture takes what falls beside it
    x = torch.nan_to_num(pixels[:, 0] + 1).clamp_(0, width + 1)
    y = torch.nan_to_num(pixels[:, 1] + 1).clamp_(0, height + 1)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    cell = (y0 * (width + 2) + x0).int()
    right, below = (fx > 0).int(), (fy > 0).int() * (width + 2)
    # on an exact pixel floor and ceil are the same and the reference counts it twice
    wx, wy = torch.where(fx > 0, fx, 1.0), torch.where(fy > 0, fy, 1.0) * nearness
    vx, vy = 1 - fx, (1 - fy) * nearness
    values[:, -2] = z
    cells = torch.stack([cell, cell + right, cell + below, cell + right + below], 1)
    weights = torch.stack([vx * vy, wx * vy, vx * wy, wx * wy], 1)
    total = _scatter(cells, weights, values, (height + 2) * (width + 2)).view(height + 2, width + 2, -1)[1:-1, 1:-1]
    weight = total[..., -1:]
    seen = weight > 0
    mean = torch.where(seen, total[..., :-1] / torch.where(seen, weight, 1.0), 0.0)
    return mean[..., :-1], mean[..., -1], seen[..., 0]


def _scatter(cells: Tensor, weights: Tensor, values: Tensor, count: int) -> Tensor:
    """out[cells[n, k]] += weights[n, k] * values[n], out (count, C)."""
    if values.device.type == "cpu":
        # a transposed sparse product is the fastest scatter of rows that a CPU has, and always adds in the same order
        from scipy.sparse import csc_matrix

        starts = np.arange(0, cells.numel() + 1, cells.shape[1], dtype=np.int32)
        matrix = csc_matrix((weights.reshape(-1).numpy(), cells.reshape(-1).numpy(), starts), (count, len(cells)))
        return torch.from_numpy(matrix @ values.numpy())
    out = values.new_zeros(count, values.shape[1])
    for k in range(cells.shape[1]):
        out.index_add_(0, cells[:, k], weights[:, k : k + 1] * values)
    return out
