"""From a network's views to one world: how its cameras lie in the given ones, and how chunks of a long video join.

A network sees frames in a world of its own, which differs from the given one by a similarity. The reference finds it
from where the cameras stand, which leaves the roll around a straight path to chance; the default here asks how they are
turned, and uses where they stand for the scale alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..cameras.camera import Cameras, project, quaternion_to_rotation, rotation_to_quaternion
from ..cameras.trajectory import between
from ..memory.depth_alignment import LEAST, STILL, similarity
from .gaussian_adapter import LARGEST, from_head, turned_sh
from .gaussians import Gaussians, merge

ALIGNMENTS = ("orientation", "centers")
NUDGE, WAVES = 1e-6, (0.07, 0.11, 0.13)  # scene units, turns per frame: how the reference leaves a straight path
CLOSEST_MEDIAN = 0.1  # scene units; paths closer together than this are not spread to unit size
FROM_POINTS, FROM_CAMERAS = 1.0, 10.0  # what all points and all cameras weigh in a joint fit
KEPT, REFITS, ENOUGH = 0.8, 3, 1000  # share of the points kept after each of the fits, and fewest points to fit
PER_FRAME = 4096  # points of a frame that take part in a joint fit
NEAR, NEAREST_SHARE = 1e-3, 0.98  # scene units below which a point has no say; quantile above which none has more
VIEWS_AT_ONCE = 4  # that become gaussians together: on the way they take ten times as much memory as in the end
IN_FRONT = (0.01, 1e6)  # scene units of z-depth within which a camera sees a point


@dataclass(frozen=True)
class Similarity:
    """From one world to another: x becomes scale R x + t."""

    scale: float
    R: Tensor  # (3, 3) rotation, float64 on the CPU
    t: Tensor  # (3,) units of the other world, float64 on the CPU

    @property
    def inverse(self) -> Similarity:
        return Similarity(1 / self.scale, self.R.mT, -(self.R.mT @ self.t) / self.scale)

    def points(self, points: Tensor) -> Tensor:
        """Points (..., 3) in the other world."""
        return self.scale * points @ self.R.to(points).mT + self.t.to(points)

    def cameras(self, cameras: Cameras) -> Cameras:
        """The same views of the other world."""
        w2c = cameras.w2c.clone()
        w2c[:, :3, :3] = cameras.w2c[:, :3, :3] @ self.R.to(w2c).mT
        w2c[:, :3, 3] = self.scale * cameras.w2c[:, :3, 3] - w2c[:, :3, :3] @ self.t.to(w2c)
        return replace(cameras, w2c=w2c)

    def gaussians(self, gaussians: Gaussians) -> Gaussians:
        """The same gaussians in the other world, with 1, 4 or 9 spherical harmonics."""
        R = self.R.to(gaussians.means)
        return replace(
            gaussians,
            means=self.points(gaussians.means),
            scales=self.scale * gaussians.scales,
            quats=rotation_to_quaternion(R @ quaternion_to_rotation(gaussians.quats)),
            sh=turned_sh(gaussians.sh, R),
        )


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _fitted(scale: float, R: np.ndarray, t: np.ndarray) -> Similarity:
    return Similarity(float(scale), torch.from_numpy(np.ascontiguousarray(R)), torch.from_numpy(t))


# ------------------------------------------------------------------------------------------------- cameras to cameras


def align(source: Cameras, target: Cameras, how: str = "orientation", scale: float | None = None) -> Similarity:
    """The similarity that brings `source` closest to `target`, camera by camera.

    how "orientation": R from the directions the cameras look in, `scale` (target units per source unit) from their
    centres unless it is given; "centers": all of it from the centres, as the reference.
    ValueError if the numbers of cameras differ, or if nothing is known about the scale because the cameras stand still;
    the centres of such cameras give any similarity, as with the reference.
    """
    if how not in ALIGNMENTS:
        raise ValueError(f"alignment {how!r}: expected one of {', '.join(map(repr, ALIGNMENTS))}")
    if len(source) != len(target) or not len(source):
        raise ValueError(f"{len(source)} cameras can't be aligned to {len(target)}; one to one is needed")
    if how == "orientation":
        return _by_orientation(source, target, scale)
    if scale is not None:
        raise ValueError(f"the centres have a scale of their own; {scale:.4g} can only be used with 'orientation'")
    return _by_centers(_array(source.centers), _array(target.centers))


def stand_still(cameras: Cameras) -> bool:
    """Whether all of them are in one place."""
    return bool(_array(cameras.centers).var(0).sum() < STILL)


def _by_orientation(source: Cameras, target: Cameras, scale: float | None) -> Similarity:
    # c2w of the target is R times that of the source; the rotation closest to all these quotients
    quotients = target.w2c[:, :3, :3].cpu().double().mT @ source.w2c[:, :3, :3].cpu().double()
    left, _, right = np.linalg.svd(_array(quotients.sum(0)))
    R = left * [1.0, 1.0, np.linalg.det(left) * np.linalg.det(right)] @ right
    here, there = _array(source.centers), _array(target.centers)
    middle, goal = here.mean(0), there.mean(0)
    if scale is None:
        if stand_still(source):
            raise ValueError(f"the {len(here)} cameras stand still, so they have no scale; give one, found from depth")
        turned = (here - middle) @ R.T
        scale = float((turned * (there - goal)).sum() / np.square(turned).sum())
    if not scale > LEAST:
        raise ValueError(f"a factor of {scale:.3g} between the {len(here)} cameras; give a scale, found from depth")
    return _fitted(scale, R, goal - scale * R @ middle)


def _by_centers(here: np.ndarray, there: np.ndarray) -> Similarity:
    """Umeyama; where the centres leave the rotation open both paths are bent by a hair first, as the reference does."""
    covariance = (there - there.mean(0)).T @ (here - here.mean(0)) / len(here)
    if (np.linalg.svd(covariance, compute_uv=False) > np.finfo(float).eps).sum() < 2:
        phases = 2 * np.pi * np.arange(len(here))[:, None] * WAVES
        bend = NUDGE * np.stack([np.sin(phases[:, 0]), np.cos(phases[:, 1]), np.sin(phases[:, 2])], 1)
        here, there = here + bend, there + bend
    scale, R, t = similarity(here, there)
    return _fitted(max(scale, LEAST), R, t)


def disagreement(
    source: Cameras, target: Cameras, similarity: Similarity, shortest: float = 0.0
) -> tuple[float, float]:
    """How far apart the cameras still are: rms of the centres over the length of the target's path, mean degrees.

    Both are 0 for the same video; above about 5 % or 3 degrees it doesn't follow the cameras. A target that stands
    still has no length: then the first is infinite, or 0 if the source stands in the same place. A path shorter than
    `shortest` (the target's units) is taken to be that long.
    """
    moved = similarity.cameras(source)
    here, there = _array(moved.centers), _array(target.centers)
    rms = float(np.sqrt(np.square(here - there).sum(1).mean()))
    length = max(float(np.linalg.norm(np.diff(there, axis=0), axis=1).sum()), shortest)
    between = (moved.w2c[:, :3, :3].mT @ target.w2c[:, :3, :3].to(moved.w2c)).cpu().double()
    twist = torch.stack([between[:, 2, 1] - between[:, 1, 2], between[:, 0, 2] - between[:, 2, 0],
                         between[:, 1, 0] - between[:, 0, 1]], 1).norm(dim=1)  # fmt: skip
    turn = torch.atan2(twist, between.diagonal(dim1=1, dim2=2).sum(1) - 1)
    return rms / length if length > 0 else (float("inf") if rms > 0 else 0.0), float(turn.rad2deg().mean())


def seen_from_first(cameras: Cameras) -> Cameras:
    """As the network is told of cameras: from the first one, half of them within one unit of it.

    Paths that stay closer than CLOSEST_MEDIAN are divided by that.
    """
    w2c = cameras.w2c @ torch.linalg.inv(cameras.w2c[:1])
    away = replace(cameras, w2c=w2c).centers.norm(dim=1).median()
    w2c[:, :3, 3] /= away.clamp_min(CLOSEST_MEDIAN)
    return replace(cameras, w2c=w2c)


def on_all_frames(cameras: Cameras, frames: Sequence[int], total: int) -> Cameras:
    """Cameras of all `total` frames, from those of some; before the first and after the last they stand still.

    frames: which frame each camera belongs to, growing. Centres and K go straight, rotations along the arc.
    """
    if len(frames) != len(cameras) or (np.diff(frames) <= 0).any():
        raise ValueError(f"{len(cameras)} cameras need one frame each, growing; found {list(frames)}")
    return between(cameras, torch.from_numpy(np.interp(np.arange(total), frames, np.arange(len(frames)))))


def in_world(
    raw: Tensor,
    density: Tensor,
    depth: Tensor,
    predicted: Cameras,
    given: Cameras | None = None,
    alignment: Similarity | None = None,
    follow: str = "predicted",
    largest: float = LARGEST,
    bands: int = 9,
) -> tuple[Gaussians, Cameras]:
    """Gaussians of what the network says of F views, and the cameras that see them.

    raw (F, h, w, 37), density (F, h, w), depth (F, H, W): its answer, in the world of the `predicted` cameras.
    given: the cameras it was told of, with the K that counts; None leaves everything in the network's world.
    alignment: from the given world to the predicted one, by default `align`. follow: whether frames are taken to be
    where the network saw them, brought into the given world ("predicted"), or where the "given" cameras are.
    bands: spherical harmonics that are kept, 1, 4 or 9.
    """
    if follow not in ("predicted", "given"):
        raise ValueError(f"cameras can follow the 'predicted' or the 'given' ones; found {follow!r}")
    scale, seen = 1.0, predicted
    if given is not None:
        alignment = alignment or align(given, predicted)
        scale = alignment.scale
        seen = replace(given, w2c=alignment.inverse.cameras(predicted).w2c) if follow == "predicted" else given
    parts = []
    for start in range(0, len(raw), VIEWS_AT_ONCE):
        part = slice(start, start + VIEWS_AT_ONCE)
        found = from_head(raw[part], density[part], depth[part], seen[part], scale, largest)
        parts.append(replace(found, sh=found.sh[:, :bands].clone()))
    return merge(*parts), seen


# ------------------------------------------------------------------------------------------------ chunks of long videos


def evenly(first: int, last: int, count: int) -> list[int]:
    """`count` frames from the first to the last; all of them where there are not more."""
    if last - first < count:
        return list(range(first, last + 1))
    return [first + int(step) for step in np.floor(np.linspace(0, last - first, count))]


def uniform_chunks(total: int, count: int, size: int = 128, overlap: int = 10) -> list[list[int]]:
    """`count` chunks of `size` frames, evenly over a video of `total`, each beginning with the last ones of the one before.

    ValueError for a video too short for that many, and for overlaps that fill a chunk.
    """
    _check_overlap(size, overlap)
    needed = count * size - (count - 1) * overlap
    if total < needed:
        raise ValueError(f"{count} chunks of {size} frames need {needed}, the video has {total}; take fewer chunks")
    frames = evenly(0, total - 1, needed)
    return [frames[start : start + size] for start in range(0, count * (size - overlap), size - overlap)]


def split_chunks(total: int, splits: Sequence[int], size: int = 128, overlap: int = 10) -> list[list[int]]:
    """Chunks of `size` frames of a video of `total`, one for each part between `splits`, the last frames of parts.

    Each chunk after the first begins with the last `overlap` frames of the one before. ValueError where a part is too
    short.
    """
    _check_overlap(size, overlap)
    chunks: list[list[int]] = []
    first = 0
    for last in (*splits, total - 1):
        known = chunks[-1][-overlap:] if chunks else []
        needed = size - len(known)
        if last - first + 1 < needed:
            raise ValueError(f"frames {first} to {last} are fewer than the {needed} of a chunk; move the split")
        chunks.append(known + evenly(first, last, needed))
        first = last + 1
    return chunks


def _check_overlap(size: int, overlap: int) -> None:
    if not 3 <= overlap < size:
        raise ValueError(
            f"an overlap of {overlap} frames in chunks of {size}; it must be at least 3 and less than a chunk"
        )


def inverse_depth_weights(z: Tensor) -> Tensor:
    """How much points (N,) of one frame count by their z-depth: the nearer the more, 1 on average, 0 behind the camera."""
    seen = z > NEAR
    if not seen.any():
        return torch.zeros_like(z)
    weights = torch.where(seen, 1 / torch.where(seen, z, 1), 0)
    limit = np.quantile(_array(weights[seen]), NEAREST_SHARE)
    weights = weights.clamp(max=float(limit))
    return weights / weights[seen].mean()


def same_pixels(points: Tensor, settled: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of points (P, 3), (P, 3) that two chunks saw at the same pixels of the same frames, and weights (P,).

    points, settled (F, N, 3) in the order of pixels: of the chunk to be moved and of the one before, which stays;
    cameras: F of the latter. Not more than PER_FRAME of each frame, those that are finite in both.
    """
    pairs = []
    count = points.shape[1]
    some = torch.from_numpy(np.linspace(0, count - 1, min(count, PER_FRAME)).astype(np.int64)).to(points.device)
    for i in range(len(cameras)):
        a, b = points[i, some], settled[i, some]
        finite = torch.isfinite(a).all(1) & torch.isfinite(b).all(1)
        a, b = a[finite], b[finite]
        pairs.append((a, b, inverse_depth_weights(project(b, cameras[i])[1][0])))
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))


def fit_points(source: Tensor, target: Tensor, weights: Tensor) -> Similarity:
    """The similarity for which the weighted squares of distances between points (N, 3) and (N, 3) are least; w (N,)."""
    return _weighted(_array(source), _array(target), _array(weights))


def _weighted(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> Similarity:
    weights = weights / weights.sum()
    middle, goal = weights @ source, weights @ target
    a, b = (np.sqrt(weights)[:, None] * offset for offset in (source - middle, target - goal))
    # with their mirror images the weighted offsets have mean zero, which is what the plain fit would take off them
    scale, R, _ = similarity(np.concatenate([a, -a]), np.concatenate([b, -b]))
    return _fitted(scale, R, goal - scale * R @ middle)


def fit_chunk(
    source: Tensor, target: Tensor, weights: Tensor, cameras: Cameras, settled: Cameras, how: str = "orientation"
) -> Similarity:
    """The similarity that joins a chunk to those before it, from points and cameras that both of them have.

    source, target (P, 3) and weights (P,) as of `same_pixels`; cameras, settled: the same frames in the chunk and in the
    world. Points that fit badly for their weight are left out of up to REFITS further fits, cameras never. With less
    than ENOUGH points of any weight it is `align` of the cameras, `how` being its option.
    """
    useful = weights > 0
    if useful.sum() < ENOUGH:
        return align(cameras, settled, how)
    source, target, weights = (_array(values[useful]) for values in (source, target, weights))
    here, there = _array(cameras.centers), _array(settled.centers)
    kept = np.ones(len(source), dtype=bool)
    for refits in range(REFITS + 1):
        shares = [FROM_POINTS * weights[kept] / weights[kept].sum(), np.full(len(here), FROM_CAMERAS / len(here))]
        fit = _weighted(
            np.concatenate([source[kept], here]), np.concatenate([target[kept], there]), np.concatenate(shares)
        )
        distances = np.linalg.norm(_array(fit.points(torch.from_numpy(source))) - target, axis=1)
        scores = distances / np.sqrt(weights)
        before, kept = kept, scores <= np.quantile(scores, KEPT)
        if refits == REFITS or kept.sum() < ENOUGH or (kept == before).all():
            break
    return fit


def owned(means: Tensor, owner: int, chunks: Sequence[Cameras], tolerance: float = 1.0) -> Tensor:
    """(N,) bool: which gaussians of chunk `owner`, by their means (N, 3), no other chunk sees better.

    chunks: the cameras of every chunk, in the world. Kept are those that the owner sees from nearest, those that only
    one other chunk sees from nearer, by less than `tolerance` scene units, and those that none sees.
    """
    distances = torch.stack([_nearest_view(means, cameras) for cameras in chunks])
    mine = distances[owner]
    nearer = (distances < mine).sum(0)
    return (nearer == 0) | ((nearer == 1) & (mine - distances.amin(0) < tolerance))


def _nearest_view(means: Tensor, cameras: Cameras) -> Tensor:
    """(N,) distance to the nearest camera whose picture has the point in it; infinite where none has."""
    height, width = cameras.size
    nearest = torch.full_like(means[:, 0], torch.inf)
    for i in range(len(cameras)):  # one at a time: millions of means
        pixels, z = project(means, cameras[i])
        u, v, z = *pixels[0].unbind(-1), z[0]
        seen = (
            (z > IN_FRONT[0]) & (z < IN_FRONT[1]) & (u >= -0.5) & (u < width - 0.5) & (v >= -0.5) & (v < height - 0.5)
        )
        distance = (means - cameras.centers[i].to(means)).norm(dim=1)
        nearest = torch.where(seen, nearest.minimum(distance), nearest)
    return nearest
