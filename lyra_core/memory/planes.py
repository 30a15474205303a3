"""The planes that a view shows, and how they go on where nothing is known.

On a plane disparity is a linear function of the pixel, however the plane is turned: found on known pixels, it holds beyond them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 4  # pixels between those that planes are looked for among
GUESSES, REACH = 400, 60  # triples of pixels that are tried, and how far apart they may lie
CLOSE = 0.02  # relative disparity by which a pixel of a plane may be off
LEAST_SHARE, MOST = 0.03, 8  # of the known pixels that make a plane, and how many planes there may be
BESIDE, JUMP = 2, 0.1  # pixels between planes that touch, relative disparity by which one of them ends before the other
NONE = -1  # label of what lies on no plane


@dataclass(frozen=True)
class Planes:
    """P planes of one view."""

    disparity: Tensor  # (P, 3) a, b, c: 1 / depth = a u + b v + c
    label: Tensor  # (H, W) which one a known pixel lies on; NONE: on none, or unknown

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """(P, N) disparities of all planes at pixels (N,)."""
        return self.disparity[:, :1] * column + self.disparity[:, 1:2] * row + self.disparity[:, 2:]


def planes(depth: Tensor, known: Tensor, seed: int = 0) -> Planes:
    """The planes that most known pixels (H, W) of a depth map (H, W) lie on, the largest first. Same seed, same planes."""
    generator = torch.Generator().manual_seed(seed)
    row, column = known[::STRIDE, ::STRIDE].nonzero().unbind(1)
    at = torch.stack([column, row, torch.ones_like(row)], 1).float() * depth.new_tensor([STRIDE, STRIDE, 1])
    disparity = 1 / depth[::STRIDE, ::STRIDE][row, column]
    found, left, whole = [], torch.ones(len(at), dtype=torch.bool, device=depth.device), len(at)
    while len(found) < MOST and int(left.sum()) > LEAST_SHARE * whole:
        plane, on = _largest(at[left], disparity[left], generator)
        if plane is None or len(on) < LEAST_SHARE * whole:
            break
        found.append(plane)
        left[left.nonzero()[on, 0]] = False
    planes = Planes(torch.stack(found) if found else depth.new_zeros(0, 3), torch.full(depth.shape, NONE, device=depth.device))
    if found:
        row, column = known.nonzero().unbind(1)
        its = 1 / depth[known]
        off, best = ((planes.at(row, column) - its).abs() / its).min(0)
        planes.label[known] = torch.where(off < CLOSE, best, NONE)
    return planes


def _largest(at: Tensor, disparity: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor]:
    """Of pixels (N, 3; u, v, 1) with their disparity (N,) the plane (3,) that most lie on, and which (M,) do."""
    anchors = torch.randint(len(at), (GUESSES, 3), generator=generator).to(at.device)
    # the other two of a triple near the first: pixels are in the order of rows, so a few rows up or down
    rows = torch.randint(-REACH // STRIDE, REACH // STRIDE + 1, (GUESSES, 2), generator=generator).to(at.device)
    per_row = max(1, round(len(at) / max(1.0, float((at[-1, 1] - at[0, 1]) / STRIDE + 1))))
    aside = torch.randint(-REACH // STRIDE, REACH // STRIDE + 1, (GUESSES, 2), generator=generator).to(at.device)
    anchors[:, 1:] = (anchors[:, :1] + rows * per_row + aside).clamp(0, len(at) - 1)
    triples = at[anchors]
    sound = torch.linalg.det(triples.double()).abs() > STRIDE**2
    if not sound.any():
        return None, anchors[:0, 0]
    guesses = torch.linalg.solve(triples[sound].double(), disparity[anchors[sound]].double()).to(at)
    close = (guesses @ at.T - disparity).abs() < CLOSE * disparity
    plane, on = guesses[close.sum(1).argmax()], close[close.sum(1).argmax()]
    for _ in range(2):
        weight = 1 / disparity[on]
        plane = torch.linalg.lstsq((at[on] * weight[:, None]).double().cpu(), (disparity[on] * weight).double().cpu()[:, None])
        plane = plane.solution[:, 0].to(at)
        on = (at @ plane - disparity).abs() < CLOSE * disparity
        if on.sum() < 3:
            return None, anchors[:0, 0]
    return plane, on.nonzero()[:, 0]


def in_front(found: Planes) -> Tensor:
    """(P, P) bool: whether of two planes the nearer one is seen where both go on, as in the corner of a room.

    Else the farther one is: outside of a corner, and behind what ends before it. What is known of both decides.
    """
    count = len(found.disparity)
    nearer = torch.ones(count, count, dtype=torch.bool, device=found.label.device)
    at = [found.at(*(found.label == p).nonzero().unbind(1)) for p in range(count)]
    around = [F.max_pool2d((found.label == p)[None].float(), 2 * BESIDE + 1, 1, BESIDE)[0] > 0 for p in range(count)]
    for p in range(count):
        for q in range(p + 1, count):
            border = found.at(*(around[p] & around[q]).nonzero().unbind(1))[[p, q]]
            # planes that meet are still apart by their slopes, so many pixels from the line where they do
            slope = BESIDE * float((found.disparity[p] - found.disparity[q])[:2].norm())
            jump = (border[0] - border[1]).abs() > JUMP * border.amax(0) + slope
            apart = border.shape[1] > 0 and bool(2 * jump.sum() > border.shape[1])
            agree = (at[p][p] >= at[p][q]).sum() + (at[q][q] >= at[q][p]).sum()
            nearer[p, q] = nearer[q, p] = not apart and bool(2 * agree >= at[p].shape[1] + at[q].shape[1])
    return nearer
