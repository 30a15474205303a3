"""Surfaces between remembered pixels: what a depth map looks like from nearer by, without gaps.

Points leave gaps where a surface is magnified, and what lies behind shows through them. So every cell of four neighbouring
pixels on one surface becomes a parallelogram in the world, and a view of those is exact: every pixel's ray is cut with the
parallelograms that it may meet, and the nearest counts. A pixel beside a jump of depth keeps a quarter cell on that side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import Cameras, unproject

SAME_SURFACE = 0.05  # relative disparity over a cell, or by which a surface may bend at one, that still is one surface
OVERLAP = 0.02  # of a patch's sides: neighbours are parallelograms, the cells between them not quite
NEAREST = 1e-3  # scene units before a camera from which on a patch is seen
BLOCK = 2**17  # patches, and pixels that they may cover, computed at once: what stays in a processor's cache
BLOCK_ON_GPU = 2**22  # there what costs time is to begin


@dataclass(frozen=True)
class Patches:
    """N parallelograms in the world, scene units."""

    corner: Tensor  # (3, N)
    across: Tensor  # (3, N) from the corner to the next one
    down: Tensor  # (3, N) and to the one on the other side

    def __len__(self) -> int:
        return self.corner.shape[1]


def merge(*patches: Patches) -> Patches:
    """All of them, to be drawn together."""
    return Patches(*(torch.cat([getattr(p, name) for p in patches], 1) for name in ("corner", "across", "down")))


def patches(depth: Tensor, camera: Cameras, wanted: Tensor | None = None) -> Patches:
    """The surfaces that one view shows: depth (H, W) along z, 0 = unknown; only those that touch `wanted` pixels (H, W)."""
    known = depth > 0
    wanted = known if wanted is None else wanted & known
    whole = _same_surface(depth, known) & F.max_pool2d(wanted[None].float(), 2, 1)[0].bool()
    points = unproject(depth[None], camera)[0]
    a, b, c, d = (points[i : i - 1 or None, j : j - 1 or None][whole].T for i in (0, 1) for j in (0, 1))
    across, down = (b - a + d - c) / 2, (c - a + d - b) / 2
    parts = [Patches((a + b + c + d) / 4 - (across + down) / 2, across, down)]
    # half a pixel to the right and down, at this depth
    right, below = (camera.c2w[0, :3, :3] @ camera.K_inverse[0, :, :2] / 2).unbind(1)
    cells = F.pad(whole, (1, 1, 1, 1), value=True)  # beyond the picture's border there is nothing to reach for
    height, width = depth.shape
    for i, up in ((0, -1), (1, 1)):
        for j, left in ((0, -1), (1, 1)):
            alone = wanted & ~cells[i : i + height, j : j + width]
            at, z = points[alone].T, depth[alone]
            parts.append(Patches(at, left * right[:, None] * z, up * below[:, None] * z))
    return merge(*parts)


def _same_surface(depth: Tensor, known: Tensor) -> Tensor:
    """Which cells (H - 1, W - 1) of four pixels lie on one surface: nearly one disparity, or one that does not bend."""
    disparity = torch.where(known, 1 / depth.clamp_min(1e-12), 0.0)[None]
    near, far = F.max_pool2d(disparity, 2, 1), -F.max_pool2d(-disparity, 2, 1)
    across, down = (F.pad(disparity[0].diff(n=2, dim=dim).abs(), pad) for dim, pad in ((1, (1, 1)), (0, (0, 0, 1, 1))))
    bent = torch.maximum(across, down) > SAME_SURFACE * disparity[0]
    straight = F.max_pool2d(bent[None].float(), 2, 1)[0] == 0
    return (far[0] > 0) & (((near - far)[0] < SAME_SURFACE * near[0]) | straight)


def draw(patches: Patches, camera: Cameras) -> Tensor:
    """Depth (H, W) along z of the nearest patch in every pixel, 0 where there is none."""
    height, width = camera.size
    disparity = patches.corner.new_zeros(height * width)
    matrix = camera.K[0] @ camera.w2c[0, :3, :3]
    offset = (camera.K[0] @ camera.w2c[0, :3, 3:]).to(matrix)
    block = BLOCK if disparity.device.type == "cpu" else BLOCK_ON_GPU
    for start in range(0, len(patches), block):
        some = slice(start, start + block)
        corner = (matrix @ patches.corner[:, some]).add_(offset)
        _draw(corner, matrix @ patches.across[:, some], matrix @ patches.down[:, some], (height, width), disparity, block)
    return torch.where(disparity > 0, 1 / disparity.clamp_min(1e-12), 0.0).view(height, width)


def _draw(corner: Tensor, across: Tensor, down: Tensor, size: tuple[int, int], disparity: Tensor, block: int) -> None:
    """Into `disparity` (H * W,): patches (3, N) in homogeneous pixels, so that row 2 is the depth; `block` pixels at once."""
    first, sides = _boxes(corner, across, down, size)
    some = ((sides[0] > 0) & (sides[1] > 0)).nonzero()[:, 0]
    if not len(some):
        return
    corner, across, down, first, sides = (part[:, some] for part in (corner, across, down, first, sides))
    # the ray of pixel p meets corner + s across + t down at depth z: (1 / z, s / z, t / z) = equations @ (p, 1)
    normal = torch.linalg.cross(across, down, dim=0)
    equations = torch.cat([normal, torch.linalg.cross(down, corner, dim=0), torch.linalg.cross(corner, across, dim=0)])
    equations = (equations / (normal * corner).sum(0)).T.contiguous()
    count = sides[0] * sides[1]
    ends = count.cumsum(0)
    # parts that cover about a block of pixels each; told to the processor at once, because a GPU's answer takes its time
    steps = torch.arange(block, max(block, int(ends[-1])), block, device=ends.device)
    bounds = F.pad(torch.searchsorted(ends, steps), (1, 1))
    bounds[-1] = len(some)
    told = torch.stack([bounds, F.pad(ends, (1, 0))[bounds]], 1).tolist()
    for (begin, before), (end, after) in pairwise(told):
        part = slice(begin, end)
        _fill(equations[part], first[:, part], sides[0, part], count[part], after - before, size[1], disparity)


def _boxes(corner: Tensor, across: Tensor, down: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The pixels (columns, rows) that each of N patches may cover: the first (2, N) and how many (2, N), 0 if none."""
    opposite = corner + across
    points = (corner, opposite, corner + down, opposite + down)
    pixels = [point[:2] / point[2] for point in points]
    low, high = reduce(torch.minimum, pixels), reduce(torch.maximum, pixels)
    nearest = reduce(torch.minimum, (point[2] for point in points))
    margin = OVERLAP * (high - low)
    last = corner.new_tensor([size[1] - 1, size[0] - 1])[:, None]
    first = (low - margin).ceil().clamp_min(0)
    sides = torch.minimum((high + margin).floor(), last) - first + 1
    sides = torch.where(nearest > NEAREST, sides, 0).nan_to_num(0)
    return first.long(), sides.long().clamp_min(0)


def _fill(
    equations: Tensor, first: Tensor, columns: Tensor, count: Tensor, covered: int, width: int, disparity: Tensor
) -> None:
    """Into `disparity`: patches of equations (N, 9), each at the `count` pixels of its box, `columns` wide; `covered` in all."""
    which = torch.repeat_interleave(count, output_size=covered)
    place = torch.arange(covered, device=which.device) - (count.cumsum(0) - count)[which]
    row = place // columns[which]
    u = place - row * columns[which] + first[0][which]
    v = row + first[1][which]
    at = equations[which]
    x, y = u.to(at), v.to(at)
    near, s, t = (at[:, i] * x + at[:, i + 1] * y + at[:, i + 2] for i in (0, 3, 6))
    low, high = -OVERLAP * near, (1 + OVERLAP) * near
    meets = (near > 0) & (s >= low) & (s <= high) & (t >= low) & (t <= high)
    disparity.scatter_reduce_(0, v * width + u, torch.where(meets, near, 0), "amax")
