"""Forward warp: what pixels with known depth look like from somewhere else.

A *soft* z-buffer, exactly the reference's: each point is spread over its four neighbouring pixels with bilinear weights,
divided by a steep exponential of its depth, and the weighted mean is taken. How steep depends on the farthest point of
all views that are warped together, so the batching (16 consecutive views) is part of the definition.

A source is lifted to world points once; all its features and its depth go through one scatter per view. On a GPU, views are
made several at once and nothing waits for any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import Cameras, product, unproject

FAR = 1e4  # scene units; deeper values and NaN count as this far away, as in the reference
CONTINUITY = 0.05  # relative depth range of a 5x5 window above which a pixel is not warped
VIEWS_PER_BATCH = 16  # the reference's warp chunk
STEEPNESS = 50.0
BLOCK = 2**17  # points computed at once: what stays in the cache
WORKERS = 4  # views splatted at once on a CPU; more would only wait for memory
AT_ONCE = 2**25  # numbers scattered at once on a GPU


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
    """`points` seen by every camera, `batch` consecutive views sharing one depth scale; on the cameras' device."""
    views = list(splat_views(points, cameras, batch))
    return Warp(*(torch.cat([getattr(view, name) for view in views]) for name in ("features", "depth", "seen")))


def splat_views(
    points: Points, cameras: Cameras, batch: int = VIEWS_PER_BATCH, features_of: Callable[[int], bool] = lambda view: True
) -> Iterator[Warp]:
    """`splat`, one view at a time, so that a long path never has to fit in memory.

    Where not `features_of(view)` only depth is wanted: the features of that view are (1, H, W, 0).
    """
    xyz = points.xyz.T.contiguous()
    make = _on_processor if xyz.device.type == "cpu" else _on_gpu
    yield from make(points, xyz, cameras, batch, [bool(features_of(view)) for view in range(len(cameras))])


def _depth_scale(xyz: Tensor, cameras: Cameras, complete: bool) -> Tensor:
    """log1p of the largest z of any point (3, N) in any of the cameras (at least 0), in double precision."""
    farthest = [cameras.w2c[:, 2, 3].max()] if not complete else []
    farthest += [torch.addmm(w2c[2:3, 3:], w2c[2:3, :3], xyz).max() for w2c in cameras.w2c if xyz.numel()]
    return torch.log1p(torch.stack(farthest).max().clamp_min(0)).double() if farthest else xyz.new_zeros((), dtype=torch.double)


# ---------------------------------------------------------------------------------------------------------- on a GPU


def _on_gpu(points: Points, xyz: Tensor, cameras: Cameras, batch: int, wanted: list[bool]) -> Iterator[Warp]:
    rows = torch.cat([points.features, xyz.new_empty(len(points.xyz), 1), xyz.new_ones(len(points.xyz), 1)], 1)
    for start in range(0, len(cameras), batch):
        views = cameras[start : start + batch]
        steepness = STEEPNESS / (_depth_scale(xyz, views, points.complete) + 1e-7)
        asked = wanted[start : start + batch]
        made: dict[int, Warp] = {}
        for some, values in ((True, rows), (False, rows[:, -2:])):
            chosen = [view for view in range(len(views)) if asked[view] is some]
            at_once = max(1, AT_ONCE // max(1, values.numel()))
            for first in range(0, len(chosen), at_once):
                group = chosen[first : first + at_once]
                warped = _splat_together(xyz, values, views[group], steepness)
                made |= {view: Warp(*(part[i : i + 1] for part in warped)) for i, view in enumerate(group)}
        yield from (made[view] for view in range(len(views)))


def _splat_together(xyz: Tensor, values: Tensor, cameras: Cameras, steepness: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, depth and mask of V views of points (3, N) with rows (N, C + 2) of features, place for a depth, and 1."""
    (height, width), count = cameras.size, len(cameras)
    local = product(cameras.w2c[:, :3, :3], xyz).add_(cameras.w2c[:, :3, 3:])
    z = local[:, 2]
    ahead = z.clamp_min(0)
    nearness = ahead.log1p().mul_(-steepness.to(ahead)).clamp_min_(-80).exp_().mul_(ahead.sign())
    x, y = product(cameras.K[:, :2], local).div_((z + 1e-7)[:, None]).add_(1).nan_to_num_().unbind(1)
    x.clamp_(0, width + 1)
    y.clamp_(0, height + 1)
    rows = values.expand(count, *values.shape).clone()
    rows[..., -2] = z
    ring = (height + 2) * (width + 2)  # as on the processor: a ring around the picture takes what falls beside it
    total = values.new_zeros(count * ring, values.shape[1])
    begin = torch.arange(count, device=z.device)[:, None] * ring
    for down, by_y in _neighbours(y):
        for across, by_x in _neighbours(x):
            cells = begin + down * (width + 2) + across
            weights = by_x * (by_y * nearness)
            total.index_add_(0, cells.view(-1), (weights[..., None] * rows).flatten(0, 1))
    total = total.view(count, height + 2, width + 2, -1)[:, 1:-1, 1:-1]
    return _mean(total)


def _neighbours(at: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The pixels before and after places on an axis, and how much they count; on a pixel both are that one."""
    low, high = at.floor(), at.ceil()
    return (low.long(), (low - at) + 1), (high.long(), (at - high) + 1)


def _mean(total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, depth and mask of what was gathered (V, H, W, C + 2); where nothing was, all are 0."""
    weight = total[..., -1]
    seen = weight > 0
    share = torch.where(seen, weight, 1.0).reciprocal_()
    return total[..., :-2] * share[..., None], total[..., -2] * share, seen


# ---------------------------------------------------------------------------------------------------- on a processor


def _on_processor(points: Points, xyz: Tensor, cameras: Cameras, batch: int, wanted: list[bool]) -> Iterator[Warp]:
    workers = min(WORKERS, torch.get_num_threads(), batch, len(cameras))
    with ThreadPoolExecutor(workers) as pool:
        # made by the threads that write on them, because inference mode belongs to a thread and marks its tensors
        desks = list(pool.map(_Desk, [points] * workers))
        for start in range(0, len(cameras), batch):
            views = cameras[start : start + batch]
            steepness = float(STEEPNESS / (_depth_scale(xyz, views, points.complete) + 1e-7))
            for first in range(0, len(views), workers):
                some = range(first, min(first + workers, len(views)))
                each = [xyz] * len(some), desks, [views[i] for i in some], [steepness] * len(some), wanted[start + first :]
                yield from pool.map(_splat_one, *each)


class _Desk:
    """What one worker writes on, block after block and view after view: fresh memory would cost more than the arithmetic."""

    def __init__(self, points: Points):
        count, empty = len(points.xyz), points.xyz.new_empty
        block = min(BLOCK, count)
        # features, a column for depth, a column of ones that gathers the weights; and the same without the features
        self.thin = torch.stack([points.xyz.new_zeros(count), points.xyz.new_ones(count)], 1)
        self.values = torch.cat([points.features, self.thin], 1)
        self.cells, self.weights = empty(count, 4, dtype=torch.int32), empty(count, 4)
        self.local, self.products = empty(3, block), empty(4, block)
        self.pixels, self.low, self.high = empty(2, block), empty(2, block), empty(2, block)
        self.nearness, self.other = empty(block), empty(block)


def _splat_one(xyz: Tensor, desk: _Desk, camera: Cameras, steepness: float, features: bool) -> Warp:
    """One view of points (3, N)."""
    height, width = camera.size
    values = desk.values if features else desk.thin
    for start in range(0, xyz.shape[1], BLOCK):
        _corners(xyz, slice(start, start + BLOCK), desk, values, camera, steepness)
    total = _scatter(desk.cells, desk.weights, values, (height + 2) * (width + 2))
    return Warp(*_mean(total.view(1, height + 2, width + 2, -1)[:, 1:-1, 1:-1]))


def _corners(xyz: Tensor, some: slice, desk: _Desk, values: Tensor, camera: Cameras, steepness: float) -> None:
    """For some points (3, N), onto the desk and into `values`: their z, their four neighbours on a picture with a ring around it, and weights."""
    height, width = camera.size
    xyz = xyz[:, some]
    local, pixels, low, high, products = (
        scratch[:, : xyz.shape[1]] for scratch in (desk.local, desk.pixels, desk.low, desk.high, desk.products)
    )
    nearness, other = desk.nearness[: xyz.shape[1]], desk.other[: xyz.shape[1]]
    # not addmm: it adds the translation first, and then rounds differently from everybody else
    torch.mm(camera.w2c[0, :3, :3], xyz, out=local).add_(camera.w2c[0, :3, 3:])
    values[some, -2] = z = local[2]
    # the factor 0 or 1 is for what is behind the camera
    torch.sign(torch.clamp_min(z, 0, out=nearness), out=other)
    nearness.log1p_().mul_(-steepness).clamp_min_(-80).exp_().mul_(other)
    torch.mm(camera.K[0, :2], local, out=pixels)
    pixels.div_(torch.add(z, 1e-7, out=other)).add_(1).nan_to_num_()
    # a ring of one pixel around the picture takes what falls beside it
    pixels[0].clamp_(0, width + 1)
    pixels[1].clamp_(0, height + 1)
    # on an exact pixel floor and ceil are the same and count it twice, as in the reference
    torch.floor(pixels, out=low)
    torch.ceil(pixels, out=high)
    (left, above), (right, below) = low.int(), high.int()
    above.mul_(width + 2)
    below.mul_(width + 2)
    torch.stack([above + left, above + right, below + left, below + right], 1, out=desk.cells[some])
    low.sub_(pixels).add_(1)
    torch.sub(pixels, high, out=high).add_(1)
    low[1].mul_(nearness)
    high[1].mul_(nearness)
    for weight, x, y in zip(products, (low[0], high[0]) * 2, (low[1], low[1], high[1], high[1]), strict=True):
        torch.mul(x, y, out=weight)
    # torch interleaves integers several times faster than floats
    torch.stack(products.view(torch.int32).unbind(), 1, out=desk.weights[some].view(torch.int32))


def _scatter(cells: Tensor, weights: Tensor, values: Tensor, count: int) -> Tensor:
    """out[cells[n, k]] += weights[n, k] * values[n], out (count, C).

    A transposed sparse product is the fastest scatter of rows that a CPU has, and always adds in the same order.
    """
    from scipy.sparse import csc_matrix

    starts = np.arange(0, cells.numel() + 1, cells.shape[1], dtype=np.int32)
    matrix = csc_matrix((weights.reshape(-1).numpy(), cells.reshape(-1).numpy(), starts), (count, len(cells)))
    return torch.from_numpy(matrix @ values.numpy())
