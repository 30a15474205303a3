"""The spatial memory: depth and camera of past frames, and which of them see most of a new view.

Retrieval is the reference's greedy coverage: project the remembered points of every keyframe into the target views,
keep those within a tolerance of the nearest surface, and pick the keyframe that adds most pixels, again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..cameras.camera import Cameras, unproject

STRIDE = 4  # one remembered point per 4x4 pixels
ROUNDING = 1e-4  # by which numbers that were computed in two ways may differ
TOLERANCE = 0.1  # scene units behind the nearest surface at which a point still counts as visible


@dataclass(frozen=True)
class Keyframe:
    """One remembered frame."""

    frame: int  # pixel-frame id; negative for further seed views
    depth: Tensor  # (H, W) along z, scene units, 0 = unknown
    camera: Cameras  # length 1
    image: Tensor | None = None  # (H, W, 3) uint8, only for seed views, which are in no chunk
    latent: Tensor | None = None  # (16, h, w) the frame encoded alone by the host's VAE, if one was at hand

    @cached_property
    def reach(self) -> tuple[float, float]:
        """The nearest and the farthest depth that is remembered; infinity and 0 if none is known."""
        depth = self.depth[::STRIDE, ::STRIDE].contiguous()
        return float(torch.where(depth > 0, depth, float("inf")).min()), float(depth.max())


@dataclass(frozen=True)
class SpatialMemory:
    """Keyframes in the order they were remembered."""

    keyframes: tuple[Keyframe, ...] = ()

    @property
    def frames(self) -> tuple[int, ...]:
        return tuple(k.frame for k in self.keyframes)

    def __getitem__(self, frame: int) -> Keyframe:
        """The keyframe with this frame id; KeyError names the ids there are."""
        for keyframe in self.keyframes:
            if keyframe.frame == frame:
                return keyframe
        raise KeyError(f"frame {frame} is not in the memory, which holds {list(self.frames)}")

    def remember(self, *keyframes: Keyframe) -> SpatialMemory:
        """With these keyframes added; a frame that is already known keeps its first depth, as in the reference."""
        known: dict[int, Keyframe] = {}
        for keyframe in (*self.keyframes, *keyframes):
            known.setdefault(keyframe.frame, keyframe)
        return replace(self, keyframes=tuple(known.values()))


def retrieve(
    memory: SpatialMemory | Sequence[Keyframe],
    targets: Cameras,
    count: int = 5,
    *,
    tolerance: float = TOLERANCE,
    skip_last: int = 0,
    by: str = "coverage",
    unknown_at_origin: bool = False,
) -> list[int]:
    """Frame ids of the keyframes that see most of the target views, the best one LAST; at most `count`.

    The newest frame counts as seen already (its own warp conditions the chunk) and is never returned by coverage.
    `by="ownership"` ranks by how many pixels a keyframe is the nearest in, without the greedy steps.
    `unknown_at_origin` treats pixels of unknown depth as points at the world's origin, as the reference does by accident.
    """
    if by not in ("coverage", "ownership"):
        raise ValueError(f"by={by!r}: expected 'coverage' or 'ownership'")
    keyframes = list(memory.keyframes if isinstance(memory, SpatialMemory) else memory)
    if skip_last:
        keyframes = keyframes[:-skip_last]
    if not keyframes or count < 1:
        return []
    sightings, nearest = _sightings(keyframes, targets.subsampled(STRIDE), tolerance, unknown_at_origin)
    if not sightings:
        return []
    select = _greedy_coverage if by == "coverage" else _most_owned
    return [keyframes[c].frame for c in select(keyframes, sightings, nearest, count, tolerance)][::-1]


def coverage(
    memory: SpatialMemory | Sequence[Keyframe], targets: Cameras, *, tolerance: float = TOLERANCE
) -> dict[int, int]:
    """How many cells of the target views each keyframe sees, by its frame id; a cell is STRIDE x STRIDE pixels.

    What another one sees too counts for both: a nearer surface of any of them hides the others'.
    """
    keyframes = list(memory.keyframes if isinstance(memory, SpatialMemory) else memory)
    seen = dict.fromkeys((keyframe.frame for keyframe in keyframes), 0)
    if keyframes:
        sightings, nearest = _sightings(keyframes, targets.subsampled(STRIDE), tolerance, False)
        for candidate, (cells, z) in sightings.items():
            seen[keyframes[candidate].frame] = len(cells[z <= nearest[cells] + tolerance].unique())
    return seen


def _greedy_coverage(keyframes, sightings, nearest: Tensor, count: int, tolerance: float) -> list[int]:
    """Candidates in the order they are picked: each adds the most cells not yet covered, the earliest one wins ties."""
    candidates = sorted(sightings)
    sees = torch.zeros(len(candidates), len(nearest), dtype=torch.bool, device=nearest.device)
    for row, candidate in enumerate(candidates):
        cells, z = sightings[candidate]
        sees[row, cells[z <= nearest[cells] + tolerance]] = True
    uncovered = torch.ones_like(sees[0])
    newest = max(range(len(keyframes)), key=lambda c: keyframes[c].frame)
    free = set(range(len(candidates)))
    if keyframes[newest].frame > 0 and newest in sightings:
        row = candidates.index(newest)
        uncovered &= ~sees[row]
        free.discard(row)
    picked: list[int] = []
    while free and len(picked) < count:
        gains = (sees & uncovered).sum(1).tolist()
        best = max(sorted(free), key=lambda row: gains[row])
        if gains[best] <= 0:
            break
        uncovered &= ~sees[best]
        free.discard(best)
        picked.append(candidates[best])
    return picked


def _most_owned(keyframes, sightings, nearest: Tensor, count: int, _tolerance: float) -> list[int]:
    """Candidates by how many cells they are the first to touch within 1e-6 of the nearest surface, most first."""
    owner = torch.full((len(nearest),), len(keyframes), device=nearest.device)
    for candidate in sorted(sightings, reverse=True):
        cells, z = sightings[candidate]
        owner[cells[z <= nearest[cells] + 1e-6]] = candidate
    owned = torch.bincount(owner, minlength=len(keyframes) + 1)[:-1].tolist()
    ranked = sorted((c for c in range(len(keyframes)) if owned[c]), key=lambda c: -owned[c])
    return ranked[:count]


def _sightings(keyframes: list[Keyframe], targets: Cameras, tolerance: float, unknown_at_origin: bool):
    """Per candidate that some target may see: flat cell indices (view, row, column) and z of its points in them.

    And the z (V * H * W,) of the nearest surface in each cell. Candidates are taken near to far, and those that lie behind
    what is already there by more than the tolerance are not even unprojected: they could change nothing.
    """
    height, width = targets.size
    device = targets.w2c.device
    nearest = torch.full((len(targets), height, width), float("inf"), device=device)
    closest, boxes = _outlines(keyframes, targets, unknown_at_origin)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for candidate in closest.amin(0).argsort().tolist():
        views = [
            v
            for v, (top, bottom, left, right) in enumerate(boxes[:, candidate].tolist())
            if top < bottom
            and left < right
            and closest[v, candidate] * (1 - ROUNDING)
            <= nearest[v, top:bottom, left:right].max() + max(tolerance, ROUNDING)
        ]
        if not views:
            continue
        keyframe = keyframes[candidate]
        depth, camera = keyframe.depth[::STRIDE, ::STRIDE].to(device), keyframe.camera.to(device).subsampled(STRIDE)
        known = depth > 0
        points = unproject(depth[None], camera)[0]
        if known.all():
            points = points.reshape(-1, 3)
        else:
            points = torch.where(known[..., None], points, 0.0).reshape(-1, 3) if unknown_at_origin else points[known]
        cells, zs = [], []
        for view in views:
            x, y, z = ((points @ targets.w2c[view, :3, :3].T + targets.w2c[view, :3, 3]) @ targets.K[view].T).unbind(1)
            along = z + 1e-7
            px, py = (x / along).round_(), (y / along).round_()
            inside = (px >= 0) & (px < width) & (py >= 0) & (py < height) & (z > 0)
            inside = inside.nonzero()[:, 0]  # a choice by index is several times faster than one by mask
            cells.append((view * height + py[inside]).mul_(width).add_(px[inside]).long())
            zs.append(z[inside])
        if sum(len(c) for c in cells):
            found[candidate] = torch.cat(cells), torch.cat(zs)
            nearest.view(-1).scatter_reduce_(0, *found[candidate], "amin")
    return found, nearest.view(-1)


def _outlines(keyframes: list[Keyframe], targets: Cameras, unknown_at_origin: bool) -> tuple[Tensor, Tensor]:
    """Where the points of each keyframe (C) can lie in each view (V): z (V, C) of the nearest, and box (V, C, 4) of cells.

    Boxes are (top, bottom, left, right), ends excluded, and empty where nothing can be seen. The points of a keyframe lie
    inside its own frustum between its nearest and farthest depth, so whatever holds for all corners of that holds for them.
    """
    device = targets.w2c.device
    c2w = torch.linalg.inv(torch.cat([k.camera.w2c for k in keyframes])).to(device)
    inverse_K = torch.linalg.inv(torch.cat([k.camera.K for k in keyframes])).to(device)
    reach = torch.tensor([k.reach for k in keyframes], device=device)  # (C, 2)
    height, width = keyframes[0].depth.shape
    corners = torch.tensor(
        [[0, 0, 1], [width - 1, 0, 1], [0, height - 1, 1], [width - 1, height - 1, 1]],
        dtype=torch.float32,
        device=device,
    )
    local = ((corners @ inverse_K.mT)[:, None] * reach[:, :, None, None]).flatten(1, 2)  # (C, 8, 3)
    world = local @ c2w[:, :3, :3].mT + c2w[:, None, :3, 3]
    empty = reach[:, 1] <= 0
    if unknown_at_origin:
        unknown = torch.tensor([bool((k.depth[::STRIDE, ::STRIDE] <= 0).any()) for k in keyframes], device=device)
        world = torch.cat(
            [torch.where(empty[:, None, None], 0.0, world), torch.where(unknown[:, None, None], 0.0, world[:, :1])], 1
        )
        empty = empty & ~unknown
    x, y, z = (
        (world[None] @ targets.w2c[:, None, :3, :3].mT + targets.w2c[:, None, None, :3, 3]) @ targets.K[:, None].mT
    ).unbind(-1)  # (V, C, 8)
    rows, columns = targets.size
    margin = 1.0  # pixels; rounding moves a point by at most half of one
    outside = [
        z <= 0,
        x + margin * z < 0,
        x - (columns - 1 + margin) * z > 0,
        y + margin * z < 0,
        y - (rows - 1 + margin) * z > 0,
    ]
    gone = torch.stack([plane.all(-1) for plane in outside]).any(0) | empty
    # a frustum that reaches behind the camera has no outline; it may be anywhere
    bounded = (z > 1e-3).all(-1)
    edges = []
    for pixel, size in ((y / z, rows), (x / z, columns)):
        low, high = pixel.amin(-1) - margin, pixel.amax(-1) + margin + 1
        edges += [
            torch.where(bounded, low, 0.0).clamp(0, size).floor().long(),
            torch.where(bounded, high, size).clamp(0, size).ceil().long(),
        ]
    boxes = torch.stack(edges, -1)
    return z.amin(-1).nan_to_num(), torch.where(gone[..., None], 0, boxes)
