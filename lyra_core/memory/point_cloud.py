"""What a chunk adds to the world, as points for a browser: found on one thread, in numpy, and packed into one block.

A block, version 1, little endian:

    at 0    LYPC, u16 version, u16 header bytes (40), u32 points N, u32 views V, u32 frames F, u32 levels L,
            u16 width, u16 height, u32 0, u64 0
    V x 80  i32 frame; f32 fx, fy, cx, cy; f32[12] c2w (3x4, row by row); f32 near, log_ratio; u16 stride of level 0; u16 0
    F x 52  f32[12] c2w; f32 vertical field of view in degrees
    L x V   u32 points of each level and view
    N       u16 x[N], y[N], d[N]; u8 rgb[3 N]; u8 flags[N] (bit 0: invented)

Points come level by level, inside a level view by view, inside a view row by row. Level l takes every (stride >> l)-th
pixel that no coarser level has, so that any beginning of the points is an even thinning of all. A point lies at pixel
x, y and depth near * exp(d / 65535 * log_ratio) of its view.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..cameras.camera import Cameras
from .retrieval import Keyframe

MAGIC, VERSION, HEADER = b"LYPC", 1, 40
LEVELS = 4
FINEST_AT = 416  # pixels of width at which the finest level has every pixel; twice as wide: every other
CAP = 120_000  # points of one block
AGREEMENT = 0.04  # relative depth by which two views of the same surface may differ
RESOLUTION = 0.5  # of a view's pixels per unit that an earlier one needs, to stand for it

_VIEW = np.dtype(
    [
        ("frame", "<i4"),
        ("lens", "<f4", 4),
        ("c2w", "<f4", (3, 4)),
        ("near", "<f4"),
        ("log_ratio", "<f4"),
        ("stride", "<u2"),
        ("zero", "<u2"),
    ]
)
_FRAME = np.dtype([("c2w", "<f4", (3, 4)), ("fov", "<f4")])
_HEAD = struct.Struct("<4sHHIIIIHHIQ")


@dataclass(frozen=True)
class View:
    """A frame whose depth is known; of those that only were there before, the pictures are not needed."""

    frame: int
    depth: np.ndarray  # (H, W) along z, scene units, 0 = unknown
    w2c: np.ndarray  # (4, 4)
    K: np.ndarray  # (3, 3) pixels, integer centres
    image: np.ndarray | None = None  # (H, W, 3) uint8
    invented: np.ndarray | None = None  # (H, W) bool

    @cached_property
    def projection(self) -> np.ndarray:
        """(3, 4) float32: from world points to homogeneous pixels."""
        return (self.K @ self.w2c[:3]).astype(np.float32)


@dataclass(frozen=True)
class Block:
    """The points that a chunk adds, and the cameras of its frames."""

    size: tuple[int, int]  # (height, width)
    views: np.ndarray  # (V,) records: frame, lens, c2w, near, log_ratio, stride
    frames: np.ndarray  # (F,) records: c2w, fov
    counts: np.ndarray  # (L, V) points of each level and view
    pixels: np.ndarray  # (N, 2) x, y
    depths: np.ndarray  # (N,) uint16
    rgb: np.ndarray  # (N, 3) uint8
    invented: np.ndarray  # (N,) bool

    def __len__(self) -> int:
        return len(self.depths)

    def points(self, levels: int = LEVELS) -> np.ndarray:
        """World points (M, 3) float32 of the first `levels` levels."""
        count = int(self.counts[:levels].sum())
        views = self.views[np.tile(np.arange(len(self.views)), levels).repeat(self.counts[:levels].reshape(-1))]
        z = views["near"] * np.exp(self.depths[:count] * (views["log_ratio"] / 65535))
        fx, fy, cx, cy = views["lens"].T
        x, y = self.pixels[:count].T
        local = np.stack([(x - cx) / fx * z, (y - cy) / fy * z, z, np.ones_like(z)], 1)
        return (views["c2w"] * local[:, None]).sum(2, dtype=np.float32)


def view_of(keyframe: Keyframe, image=None, invented=None) -> View:
    """A keyframe as numpy sees it, without copying its depth; `image` (H, W, 3) uint8, `invented` (H, W) bool tensors."""
    camera = keyframe.camera
    if float(camera.K[0, 0, 1]) != 0:
        raise ValueError(f"frame {keyframe.frame} has a skew of {float(camera.K[0, 0, 1]):.4g}, which can't be shown as points")
    return View(
        keyframe.frame,
        keyframe.depth.numpy(),
        camera.w2c[0].double().numpy(),
        camera.K[0].double().numpy(),
        None if image is None else image.numpy(),
        None if invented is None else invented.numpy(),
    )


def finest_stride(width: int) -> int:
    """Pixels between the points of the finest level."""
    return 2 ** max(0, round(np.log2(width / FINEST_AT)))


def block(views: Sequence[View], earlier: Sequence[View], cameras: Cameras, cap: int = CAP) -> Block:
    """What `views`, oldest first, add to what `earlier` ones show, and the cameras of all frames of their chunk.

    A pixel is left out if an earlier view shows the same surface at not less than half its resolution.
    """
    stride = finest_stride(cameras.size[1])
    found: list[list[np.ndarray]] = [[] for _ in range(LEVELS)]  # level -> per view (N, 2) of y, x
    for number, view in enumerate(views):
        new = _new(view, [*earlier, *views[:number]], stride)
        for level, pixels in enumerate(_levels(new, stride)):
            found[level].append(pixels)
    return _block(views, _capped(found, cap), cameras, stride << (LEVELS - 1))


def _new(view: View, earlier: Sequence[View], stride: int) -> np.ndarray:
    """(h, w) bool for every `stride`-th pixel: whether its surface is known and not shown before."""
    depth = view.depth[::stride, ::stride]
    new = depth > 0
    if not earlier:
        return new
    # every other pixel decides for those around it, unless they disagree
    coarse = _unseen(view, new[::2, ::2], 2 * stride, earlier)
    unsure = _spread(coarse | ~new[::2, ::2], new.shape)
    unsure[::2, ::2] = False
    new &= unsure
    new = _unseen(view, new, stride, earlier)
    new[::2, ::2] = coarse
    return new


def _spread(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (h, w) of every other pixel, for all of a picture of this size: true beside any that is."""
    wide = np.zeros((2 * mask.shape[0] + 1, 2 * mask.shape[1] + 1), dtype=bool)
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            wide[dy : dy + 2 * mask.shape[0] : 2, dx : dx + 2 * mask.shape[1] : 2] |= mask
    return wide[1 : 1 + size[0], 1 : 1 + size[1]]


def _unseen(view: View, candidates: np.ndarray, stride: int, earlier: Sequence[View]) -> np.ndarray:
    """Which of the candidates (h, w), each `stride` pixels apart, none of the earlier views shows well enough."""
    row, column = candidates.nonzero()
    left = np.arange(len(row))
    depth = view.depth[row * stride, column * stride]
    points = _lift(view, column * stride, row * stride, depth)
    needed = (RESOLUTION * view.K[0, 0] / depth).astype(np.float32)
    projections = np.stack([other.projection for other in earlier])
    may_see = _may_see(projections, points, view.depth.shape)
    for number in reversed(range(len(earlier))):  # those beside it in time show most of it
        if not len(left) or not may_see[number]:
            continue
        kept = ~_shown(points, needed, earlier[number])
        if kept.all():
            continue
        left, points, needed = left[kept], points[:, kept], needed[kept]
        # a smaller box is seen by no view that did not see the larger one
        waiting = may_see[:number].nonzero()[0]
        may_see[waiting] = _may_see(projections[waiting], points, view.depth.shape)
    unseen = np.zeros_like(candidates)
    unseen[row[left], column[left]] = True
    return unseen


def _lift(view: View, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """World points (3, N) float32 of pixels x, y (N,) at depth z (N,)."""
    c2w = np.linalg.inv(view.w2c).astype(np.float32)
    K = view.K.astype(np.float32)
    local = ((x - K[0, 2]) * (z / K[0, 0]), (y - K[1, 2]) * (z / K[1, 1]), z)
    return np.stack([sum(c2w[i, j] * local[j] for j in range(3)) + c2w[i, 3] for i in range(3)])


def _may_see(projections: np.ndarray, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(V,) bool of views' projections (V, 3, 4): false where the box around the points (3, N) lies outside of the view."""
    if not points.size:
        return np.zeros(len(projections), dtype=bool)
    low, high = points.min(1), points.max(1)
    corners = np.stack([np.append(np.where([i & 1, i & 2, i & 4], low, high), 1) for i in range(8)], 1)
    x, y, z = np.einsum("vij,jc->ivc", projections, corners)
    height, width = size
    planes = (z <= 0, x < -z, x > width * z, y < -z, y > height * z)
    return ~np.any([plane.all(1) for plane in planes], axis=0)


def _shown(points: np.ndarray, needed: np.ndarray, view: View) -> np.ndarray:
    """(N,) bool: whether a view shows world points (3, N) with at least the needed (N,) pixels per unit."""
    height, width = view.depth.shape
    # by hand: a matrix product of three rows would wake the threads of the host's BLAS
    x, y, z = (row[0] * points[0] + row[1] * points[1] + row[2] * points[2] + row[3] for row in view.projection)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = x / z + np.float32(0.5), y / z + np.float32(0.5)
        fine = np.float32(view.K[0, 0]) / z >= needed
    (inside,) = ((z > 0) & fine & (x >= 0) & (x < width) & (y >= 0) & (y < height)).nonzero()
    z = z[inside]
    there = view.depth[y[inside].astype(np.int32), x[inside].astype(np.int32)]
    shown = np.zeros(len(needed), dtype=bool)
    shown[inside[np.abs(there - z) < np.float32(AGREEMENT) * z]] = True
    return shown


def _levels(new: np.ndarray, stride: int) -> list[np.ndarray]:
    """Pixels (N, 2), y and x, of each level, row by row, of a mask (h, w) of every `stride`-th pixel."""
    levels, left = [], new.copy()
    for level in range(LEVELS):
        step = 1 << (LEVELS - 1 - level)
        levels.append(np.argwhere(left[::step, ::step]) * (step * stride))
        left[::step, ::step] = False
    return levels


def _capped(found: list[list[np.ndarray]], cap: int) -> list[list[np.ndarray]]:
    """With at most `cap` pixels in all: the finest levels are thinned evenly."""
    excess = sum(len(pixels) for level in found for pixels in level) - cap
    capped = list(found)
    for level in reversed(range(LEVELS)):
        count = sum(map(len, found[level]))
        if excess <= 0 or not count:
            continue
        kept = max(count - excess, 0)
        excess -= count - kept
        number = np.arange(count)
        # pixel n is kept where its share of `kept` passes a whole number
        keep = (number + 1) * kept // count > number * kept // count
        ends = np.cumsum([len(pixels) for pixels in found[level]])[:-1]
        capped[level] = [p[k] for p, k in zip(found[level], np.split(keep, ends), strict=True)]
    return capped


def _block(views: Sequence[View], found: list[list[np.ndarray]], cameras: Cameras, stride: int) -> Block:
    counts = np.array([[len(pixels) for pixels in level] for level in found], dtype=np.uint32)
    records = np.zeros(len(views), _VIEW)
    packed: list[list[tuple]] = [[] for _ in range(LEVELS)]
    for number, view in enumerate(views):
        K = view.K
        pixels = [level[number] for level in found]
        y, x = np.concatenate(pixels).T
        z = view.depth[y, x].astype(np.float64)
        near = np.float32(z.min()) if len(z) else np.float32(1)
        log_ratio = np.float32(np.log(z.max() / near)) if len(z) else np.float32(0)
        steps = np.log(z / near) * (65535 / log_ratio) if log_ratio > 0 else 0 * z
        d = np.clip(np.rint(steps), 0, 65535).astype(np.uint16)
        lens, c2w = (K[0, 0], K[1, 1], K[0, 2], K[1, 2]), np.linalg.inv(view.w2c)[:3]
        records[number] = (view.frame, lens, c2w, near, log_ratio, stride, 0)
        ends = np.cumsum([len(p) for p in pixels])[:-1]
        parts = (np.stack([x, y], 1).astype(np.uint16), d, view.image[y, x], view.invented[y, x])
        for level, part in zip(packed, zip(*(np.split(p, ends) for p in parts), strict=True), strict=True):
            level.append(part)
    columns = [np.concatenate(column) for column in zip(*(part for level in packed for part in level), strict=True)]
    return Block(cameras.size, records, _frames(cameras), counts, *columns)


def _frames(cameras: Cameras) -> np.ndarray:
    frames = np.zeros(len(cameras), _FRAME)
    frames["c2w"] = cameras.c2w[:, :3].numpy()
    frames["fov"] = np.degrees(cameras.fov.numpy())
    return frames


def encode(block: Block) -> bytes:
    """The block as the browser takes it."""
    (levels, views), (height, width) = block.counts.shape, block.size
    head = _HEAD.pack(MAGIC, VERSION, HEADER, len(block), views, len(block.frames), levels, width, height, 0, 0)
    x, y = block.pixels.T
    parts = (x, y, block.depths, block.rgb, block.invented.astype(np.uint8))
    tables = (block.views.tobytes(), block.frames.tobytes(), block.counts.astype("<u4").tobytes())
    return b"".join([head, *tables, *(part.tobytes() for part in parts)])


def decode(content: bytes) -> Block:
    """A block out of its bytes; ValueError if it is of another kind or version, or not whole."""
    if len(content) < HEADER or content[:4] != MAGIC:
        raise ValueError(f"not a point block: {len(content)} bytes that begin with {content[:4]!r}")
    _, version, header, points, views, frames, levels, width, height, _, _ = _HEAD.unpack_from(content)
    if version != VERSION:
        raise ValueError(f"a point block of version {version}; this pack reads version {VERSION}, update it")
    shapes = [(_VIEW, views), (_FRAME, frames), ("<u4", levels * views), ("<u2", points), ("<u2", points), ("<u2", points)]
    shapes += [("u1", 3 * points), ("u1", points)]
    whole = header + sum(np.dtype(kind).itemsize * count for kind, count in shapes)
    if len(content) != whole:
        raise ValueError(f"a point block of {len(content)} bytes that should have {whole}; it was cut off")
    found, at = [], header
    for kind, count in shapes:
        found.append(np.frombuffer(content, kind, count, at))
        at += found[-1].nbytes
    records, cameras, counts, x, y, d, rgb, flags = found
    return Block(
        (height, width), records, cameras, counts.reshape(levels, views), np.stack([x, y], 1), d, rgb.reshape(-1, 3), flags & 1 > 0
    )
