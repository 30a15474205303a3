"""From frames to gaussians in one world: which frames a network looks at, whose cameras count, how long videos join.

A network is known here only as `Look`. The steps of one chunk are those of `alignment`: the network is told of cameras, what
it believes is aligned to them, and from the second chunk on what two chunks both saw is laid over each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..cameras.camera import Cameras
from ..memory.depth import METRIC_FOCAL
from . import alignment as fits
from .gaussian_adapter import LARGEST
from .gaussians import Gaussians, merge

POSES = ("auto", "given", "network")
FEWEST = 2  # views; one has no second camera to measure against
FRAMES_AT_ONCE = 500  # of a video that one chunk spans; farther apart they blur, the weights weren't tuned on it
DRIFT, TURN = 0.05, 3.0  # of the path's length, and degrees: beyond, a video doesn't follow its cameras
SHORT_PATH = 0.1  # of the median depth; drift on shorter paths is measured against it
OWNERSHIP = 0.1  # of the median depth; the reference says 1, for worlds in metres
BORDER = 8 / 256  # of a view's height and width, where gaussians are worst
SKY = 0.3  # probability from which on a pixel is sky
FARTHEST_SKY, SKY_QUANTILE = 200.0, 0.99  # metres; of the depths that are none
LEAST_METRIC, LEAST_DEPTH = 1e-2, 1e-3  # below, depth is no measurement


@dataclass(frozen=True)
class Views:
    """What a network says of F frames, in a world of its own."""

    depth: Tensor  # (F, H, W) its units
    confidence: Tensor  # (F, H, W) 1 and above
    cameras: Cameras  # F
    raw: Tensor | None = None  # (F, h, w, 37) as `gaussian_adapter.from_head` takes it
    density: Tensor | None = None  # (F, h, w) in 0..1


# frames (F, H, W, 3) in 0..1, the cameras that it is told of, and whether gaussians are wanted
Look = Callable[[Tensor, Cameras | None, bool], Views]


@dataclass(frozen=True)
class Reconstruction:
    """Gaussians; and of the V frames that were looked at, where they are and how far what they show is."""

    gaussians: Gaussians
    frames: tuple[int, ...]  # V, growing
    cameras: Cameras  # V in the world
    depth: Tensor  # (V, H, W) scene units, in the size that the network saw
    report: tuple[str, ...]  # lines for the user


@dataclass(frozen=True)
class _Part:
    """One chunk, in the world."""

    gaussians: Gaussians  # view by view, pixel by pixel
    cameras: Cameras  # F
    depth: Tensor  # (F, H, W)
    grid: tuple[int, int]  # rows and columns of each view's gaussians
    note: str
    follows: bool  # whether the frames are where the given cameras were

    @property
    def means(self) -> Tensor:
        """(F, P, 3)"""
        return self.gaussians.means.unflatten(0, (len(self.cameras), -1))

    def moved(self, to: fits.Similarity) -> _Part:
        return replace(
            self,
            gaussians=to.gaussians(self.gaussians),
            cameras=to.cameras(self.cameras),
            depth=to.scale * self.depth,
        )

    def without(self, first: int) -> _Part:
        """Without the first views."""
        gaussians = self.gaussians.select(slice(first * self.means.shape[1], None))
        return replace(self, gaussians=gaussians, cameras=self.cameras[first:], depth=self.depth[first:])


# ----------------------------------------------------------------------------------------------------------- the run


def chunks_of(total: int, views: int = 128, count: int = 0, overlap: int = 10) -> list[list[int]]:
    """The frames of each chunk of a video of `total`: at most `views` of them, evenly in one chunk or `count` that overlap.

    count 0: as many as it takes for none to span more than FRAMES_AT_ONCE frames. ValueError if that doesn't fit.
    """
    if min(total, views) < FEWEST:
        raise ValueError(f"{min(total, views)} view has no second camera to measure against; give {FEWEST} or more")
    parts = count or -(-total // FRAMES_AT_ONCE)
    if parts == 1:
        return [fits.evenly(0, total - 1, views)]
    if not count:  # not more views than there are frames for
        views = min(views, (total + (parts - 1) * overlap) // parts)
    return fits.uniform_chunks(total, parts, views, overlap)


def reconstruct(
    look: Look,
    frames: Callable[[Sequence[int]], Tensor],
    chunks: Sequence[Sequence[int]],
    cameras: Cameras | None = None,
    known: Callable[[Sequence[int]], Tensor | None] = lambda frames: None,
    poses: str = "auto",
    alignment: str = "orientation",
    follow: str = "predicted",
    trim: bool = True,
    largest: float = LARGEST,
    harmonics: bool = False,
    to_metres: Callable[[Tensor, Views], Views] | None = None,
) -> Reconstruction:
    """Gaussians of a video and the cameras that see them, in the world of the given cameras if there are any.

    frames: those of the given numbers (F, H, W, 3) in 0..1. chunks: which are looked at together, each beginning with the
    last ones of the one before (`chunks_of`). cameras: of the whole video. known: their depth (F, H, W) in scene units, 0
    where unknown, which gives the scale where cameras stand still.
    poses "given": the network is told of the cameras; "network": it finds its own in a first look, in metres with
    `to_metres`, and what comes out is laid over the given cameras; "auto": given, unless the frames don't follow them.
    alignment, follow, largest: as of `alignment.align` and `alignment.in_world`. trim: leave the border of every view away.
    harmonics: keep how colours change with the direction they are seen from. ValueError for what doesn't fit.
    """
    _check(chunks, cameras, poses, alignment)
    notes: list[str] = []

    def given(chunk: Sequence[int]) -> _Part:
        told = cameras[list(chunk)]
        return _placed(look(frames(chunk), told, True), told, known(chunk), alignment, follow, largest, harmonics)

    def found(chunk: Sequence[int]) -> _Part:
        pictures = frames(chunk)
        first = look(pictures, None, False)
        first = first if to_metres is None else to_metres(pictures, first)
        again = look(pictures, first.cameras, True)
        return _placed(again, first.cameras, first.depth, alignment, follow, largest, harmonics)

    parts = None
    if cameras is not None and poses != "network":
        parts = _chained(given, chunks, alignment, notes, leave=poses == "auto")
    if parts is None:
        parts = _chained(found, chunks, alignment, notes, leave=False)
        if cameras is not None:
            parts = _brought_back(parts, chunks, cameras, notes)
    return _merged(parts, chunks, trim, notes)


def _check(chunks: Sequence[Sequence[int]], cameras: Cameras | None, poses: str, how: str) -> None:
    for name, value, known in (("poses", poses, POSES), ("alignment", how, fits.ALIGNMENTS)):
        if value not in known:
            raise ValueError(f"{name} {value!r}: expected one of {', '.join(map(repr, known))}")
    if cameras is None and poses == "given":
        raise ValueError("there are no cameras to follow; connect them, or let the network find its own")
    last = max(frame for chunk in chunks for frame in chunk)
    if cameras is not None and last >= len(cameras):
        raise ValueError(f"the video has a frame {last}, but there are {len(cameras)} cameras; each frame needs one")


def _chained(
    look_at: Callable[[Sequence[int]], _Part], chunks: Sequence[Sequence[int]], how: str, notes: list[str], leave: bool
) -> list[_Part] | None:
    """All chunks in the world of the first; None if they are to `leave` when frames don't follow their cameras."""
    parts: list[_Part] = []
    for chunk, overlap in zip(chunks, _overlaps(chunks), strict=True):
        part = look_at(chunk)
        where = f"frames {chunk[0]} to {chunk[-1]}"
        notes.append(f"{where}: {part.note}")
        if leave and not part.follows:
            notes.append(f"{where} don't follow the given cameras; the network finds its own for the whole video")
            return None
        if parts:
            fit = _join(parts[-1], part, overlap, how)
            part = part.moved(fit)
            gap = (part.means[:overlap] - parts[-1].means[-overlap:]).norm(dim=2).median()
            notes.append(f"{where}: joined, {fit.scale:.4g} times as large, {gap:.3g} apart in the overlap (median)")
        parts.append(part)
    return parts


def _overlaps(chunks: Sequence[Sequence[int]]) -> list[int]:
    """How many frames each chunk shares with the one before."""
    return [0, *(len({*a} & {*b}) for a, b in zip(chunks, chunks[1:], strict=False))]


# --------------------------------------------------------------------------------------------------------- one chunk


def _placed(
    views: Views, told: Cameras, known: Tensor | None, how: str, follow: str, largest: float, harmonics: bool
) -> _Part:
    """What the network says of frames, in the world of the cameras it was told of."""
    predicted, note = views.cameras, ""
    told = replace(told, w2c=told.w2c.to(views.depth), K=told.K.to(views.depth))  # the network's precision and device
    if fits.stand_still(told):
        how = "orientation"  # their centres say nothing, and this one says so
    try:
        fit = fits.align(told, predicted, how)
    except ValueError as problem:
        scale = _scale(views.depth, known)
        fit = fits.align(told, predicted, "orientation", scale or 1.0)
        note = f"{problem}: {'scale from depth' if scale else 'the scale is the one of the network'}; "
    depth = views.depth / fit.scale
    drift, turn = fits.disagreement(predicted, told, fit.inverse, SHORT_PATH * float(depth.median()))
    gaussians, seen = fits.in_world(
        views.raw, views.density, views.depth, predicted, told, fit, follow, largest, 9 if harmonics else 1
    )
    note += f"cameras {100 * drift:.2g} % of the path and {turn:.2g} degrees off, scale {fit.scale:.4g}"
    return _Part(gaussians, seen, depth, tuple(views.raw.shape[1:3]), note, drift <= DRIFT and turn <= TURN)


def _scale(depth: Tensor, known: Tensor | None) -> float | None:
    """How many of the network's units make one scene unit, from depth (F, H, W) of the same frames in any two sizes."""
    if known is None:
        return None
    known = torch.nn.functional.interpolate(known[:, None].to(depth), depth.shape[1:], mode="nearest")[:, 0]
    shared = (known > 0) & (depth > 0)
    return float((depth[shared] / known[shared]).median()) if shared.any() else None


def _join(before: _Part, part: _Part, overlap: int, how: str) -> fits.Similarity:
    """What lays the first views of a part over the last ones of the part before, which are the same frames."""
    settled = before.cameras[-overlap:]
    pairs = fits.same_pixels(part.means[:overlap], before.means[-overlap:], settled)
    return fits.fit_chunk(*pairs, part.cameras[:overlap], settled, how)


def _brought_back(
    parts: list[_Part], chunks: Sequence[Sequence[int]], cameras: Cameras, notes: list[str]
) -> list[_Part]:
    """Parts in the network's world, laid over the given cameras as well as they fit."""
    seen, frames = _unique(parts, chunks)
    try:
        fit = fits.align(seen, cameras[list(frames)])
    except ValueError as problem:
        notes.append(f"{problem}: the gaussians stay in the network's own world")
        return parts
    rms, turn = fits.disagreement(seen, cameras[list(frames)], fit)
    notes.append(f"laid over the given cameras: {100 * rms:.2g} % of the path and {turn:.2g} degrees off")
    return [part.moved(fit) for part in parts]


# ---------------------------------------------------------------------------------------------------------- together


def _unique(parts: Sequence[_Part], chunks: Sequence[Sequence[int]]) -> tuple[Cameras, tuple[int, ...]]:
    """The cameras of all frames, and which frames these are; the first chunk that saw a frame places it."""
    overlaps = _overlaps(chunks)
    w2c = [part.cameras.w2c[overlap:] for part, overlap in zip(parts, overlaps, strict=True)]
    K = [part.cameras.K[overlap:] for part, overlap in zip(parts, overlaps, strict=True)]
    frames = (frame for chunk, overlap in zip(chunks, overlaps, strict=True) for frame in chunk[overlap:])
    return Cameras(torch.cat(w2c), torch.cat(K), parts[0].cameras.size), tuple(frames)


def _merged(parts: list[_Part], chunks: Sequence[Sequence[int]], trim: bool, notes: list[str]) -> Reconstruction:
    """One set of gaussians: every frame's once, without borders, and where chunks meet those that are seen best."""
    cameras, frames = _unique(parts, chunks)
    parts = [part.without(overlap) for part, overlap in zip(parts, _overlaps(chunks), strict=True)]
    depth = torch.cat([part.depth for part in parts]) if len(parts) > 1 else parts[0].depth
    views = [part.cameras for part in parts]
    kept = []
    for owner, part in enumerate(parts):
        gaussians = part.gaussians
        if trim:
            gaussians = gaussians.select(inside_border(part.grid).flatten().repeat(len(part.cameras)))
        if len(parts) > 1:
            tolerance = OWNERSHIP * float(parts[0].depth.median())
            gaussians = gaussians.select(fits.owned(gaussians.means, owner, views, tolerance))
        kept.append(gaussians)
    total = sum(len(part.gaussians) for part in parts)
    whole = merge(*kept) if len(kept) > 1 else kept[0]
    notes.append(f"{len(whole):,} gaussians of {total:,}, from {len(frames)} frames in {len(parts)} chunks")
    return Reconstruction(whole, frames, cameras, depth, tuple(notes))


def inside_border(grid: tuple[int, int]) -> Tensor:
    """(h, w) bool: the gaussians of a view but those at its border; all of them on grids too coarse for one."""
    rows, columns = (int(BORDER * side) for side in grid)
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[rows : grid[0] - rows, columns : grid[1] - columns] = True
    return mask


# ------------------------------------------------------------------------------------------------------------ metres


def in_metres(views: Views, metric: Tensor, sky: Tensor) -> tuple[Views, float]:
    """Views as large as a metric network says, and their metres per unit of before.

    metric (F, H, W): its depth for a camera of METRIC_FOCAL pixels; sky (F, H, W): its probability. The scale is the one with
    least squares over what is neither sky nor uncertain; sky is put behind everything and believed least.
    ValueError if nothing is left to compare.
    """
    metric = metric * (views.cameras.K[:, 0, 0] + views.cameras.K[:, 1, 1])[:, None, None] / 2 / METRIC_FOCAL
    ground = sky < SKY
    sure = ground & (metric > LEAST_METRIC) & (views.depth > LEAST_DEPTH)
    if ground.any():
        sure &= views.confidence >= _quantile(views.confidence[ground], 0.5)
    if not sure.any():
        raise ValueError(f"these {len(sky)} frames are sky or uncertain everywhere; nothing in them tells their size")
    scale = float((metric[sure].double() @ views.depth[sure].double()) / views.depth[sure].double().square().sum())
    w2c = views.cameras.w2c.clone()
    w2c[:, :3, 3] *= scale
    depth, confidence = scale * views.depth, views.confidence
    if not ground.all():
        farthest = min(_quantile(depth[ground], SKY_QUANTILE), FARTHEST_SKY)
        depth, confidence = torch.where(ground, depth, farthest), torch.where(ground, confidence, 1.0)
    return replace(views, depth=depth, confidence=confidence, cameras=replace(views.cameras, w2c=w2c)), scale


def _quantile(values: Tensor, share: float) -> float:
    """torch's own refuses more than 16 million values."""
    return float(np.quantile(values.detach().cpu().numpy(), share))
