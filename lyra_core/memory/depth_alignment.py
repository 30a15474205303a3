"""Depth of generated frames: what is known of them, and how an estimate gets the scale of the world.

An estimator sees pictures and answers up to a scale. The reference finds that scale by comparing the cameras it asked for
with those the estimator believes in, which says nothing where the camera only turns, and where it moves the result need
not agree with the depth the world began with. The default here compares depth with depth: what the estimator says of a
pixel with what the memory knows of it. All frames of one call share one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import Cameras
from .depth import sharpened
from .retrieval import Keyframe
from .warp import lift, reliable, splat_views

ALIGNMENTS = ("memory", "cameras", "none")
SAME = 0.1  # relative depth by which two memories of one surface may differ
OVERLAP = 0.02  # share of all pixels that must be comparable before the memory's scale is trusted
JUMP = 0.3  # relative range of depth in a 5x5 window that no surface has, however slanted or noisy
TRIM = 2.5  # robust standard deviations from the middle within which a ratio counts
STILL = 1e-10  # summed variance of camera centres, scene units squared, below which cameras count as standing still
LEAST = 1e-6  # factors below are no movement
RANSAC_VIEWS, RANSAC_ROUNDS, RANSAC_SEED = 10, 10, 42


class NoScaleError(ValueError):
    """An estimate that can't be brought into scene units; the message says what was tried."""


@dataclass(frozen=True)
class Estimate:
    """What an estimator says of F frames."""

    depth: Tensor  # (F, H, W) along z, up to one scale for all frames; 0 = unknown
    cameras: Cameras | None = None  # where it believes they were taken, in its own scale; None if it doesn't say
    scaled: bool = False  # the depth is in scene units already


class DepthEstimator(Protocol):
    """Frames to depth: the one contract of every estimator."""

    def __call__(
        self, frames: Tensor, cameras: Cameras, known: Tensor, on_step: Callable[[int, int], None] = ...
    ) -> Estimate:
        """Depth of frames (F, H, W, 3) in 0..1.

        cameras: the F cameras they were generated for, scene units; known (F, H, W): what the memory knows of these
        views, 0 = unknown. on_step(done, total) is called between steps, and may raise to stop.
        """
        ...


# ---------------------------------------------------------------------------------------------- which frames, what known


def known_depth(keyframes: Iterable[Keyframe], cameras: Cameras) -> Tensor:
    """What the memory knows of F views: depth (F, H, W) of the nearest remembered surface, 0 where nothing is.

    Where keyframes differ by little about a surface the first of them counts; give the oldest first. (Always taking the
    nearer would shrink the world a little with every chunk that is aligned to the ones before.)
    """
    known = torch.zeros(len(cameras), *cameras.size, device=cameras.w2c.device)
    for keyframe in keyframes:
        depth = sharpened(keyframe.depth.to(known))
        points = lift(depth, keyframe.camera.to(known.device), depth.new_zeros(*depth.shape, 0), continuity=None)
        # one view per batch: what is known of a view must not depend on which others are asked for
        for view, warp in zip(known, splat_views(points, cameras, batch=1), strict=True):
            seen = warp.depth[0]
            in_front = (seen > 0) & ((view == 0) | (seen < (1 - SAME) * view))
            view.copy_(torch.where(in_front, seen, view))
    return known


# ---------------------------------------------------------------------------------------------------- the scale


def in_scene_units(
    estimate: Estimate, cameras: Cameras, known: Tensor, alignment: str = "memory"
) -> tuple[Tensor, str]:
    """Depth (F, H, W) in scene units, and one line that says how its scale was found.

    cameras: the F cameras the frames were generated for; known (F, H, W) from `known_depth`. alignment "memory": the
    depth that is known already, or the cameras where too little of it is seen; "cameras": the cameras, as the reference;
    "none": as the estimator gave it. ValueError for estimates that are no depth, and where no scale can be found.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment {alignment!r}: expected one of {', '.join(map(repr, ALIGNMENTS))}")
    depth = _checked(estimate, cameras)
    if known.shape != depth.shape:
        raise ValueError(f"the known depth is {tuple(known.shape)}, but the estimate {tuple(depth.shape)}")
    if estimate.scaled:
        return depth, "in scene units already, as the estimator says"
    if alignment == "none":
        return depth, "scale as the estimator gave it"
    found = memory_scale(depth, known.to(depth)) if alignment == "memory" else None
    if found is not None and found.overlap >= OVERLAP:
        return depth * found.scale, (
            f"scale {found.scale:.4g} from the memory: {found.overlap:.0%} of the pixels can be compared, "
            f"their ratios spread by {found.spread:.1%}"
        )
    before = "" if found is None else f"{found.overlap:.2%} of the pixels can be compared with the memory; "
    try:
        scale, off = camera_scale(cameras, estimate.cameras)
    except ValueError as reason:
        needed = "" if found is None else f"only {before}{OVERLAP:.0%} are needed, and "
        raise NoScaleError(f"no scale for the depth of these {len(depth)} frames: {needed}{reason}") from None
    return (
        depth / scale,
        f"{before}scale {1 / scale:.4g} from the cameras, which the estimator sees {off:.1%} elsewhere",
    )


def _checked(estimate: Estimate, cameras: Cameras) -> Tensor:
    """The estimate's depth as float32, or a ValueError that says what is wrong with it."""
    depth, expected = estimate.depth, (len(cameras), *cameras.size)
    if tuple(depth.shape) != expected:
        raise ValueError(f"the estimator gave depth {tuple(depth.shape)} for frames {expected}")
    depth = depth.float()
    for what, wrong in (("NaN", depth.isnan()), ("infinite", depth.isinf()), ("negative", depth < 0)):
        if wrong.any():
            frame = int(wrong.flatten(1).any(1).nonzero()[0])
            raise ValueError(f"the estimator gave {int(wrong.sum())} {what} depths, the first in frame {frame}")
    if not depth.any():
        raise ValueError(f"the estimator knows no depth in any of these {len(depth)} frames")
    if estimate.cameras is not None and len(estimate.cameras) != len(cameras):
        raise ValueError(f"the estimator gave {len(estimate.cameras)} cameras for {len(cameras)} frames")
    if estimate.cameras is not None and not torch.isfinite(estimate.cameras.w2c).all():
        raise ValueError("the estimator gave cameras with NaN or infinite numbers")
    return depth


@dataclass(frozen=True)
class MemoryScale:
    """How estimated depth compares with known depth."""

    scale: float  # known over estimated
    overlap: float  # share of all pixels that were compared
    spread: float  # robust standard deviation of the ratios, relative


def memory_scale(depth: Tensor, known: Tensor) -> MemoryScale:
    """The one factor that brings depth (F, H, W) closest to known (F, H, W), by their middle ratio.

    Pixels at jumps of either depth don't count, and ratios far from the middle are dropped: what was painted anew, and
    surfaces that the memory sees through.
    """
    comparable = torch.stack([reliable(d, JUMP) & reliable(k, JUMP) for d, k in zip(depth, known, strict=True)])
    comparable &= (depth > 0) & (known > 0)
    ratios = torch.log(known[comparable] / depth[comparable])
    if not len(ratios):
        return MemoryScale(1.0, 0.0, 0.0)
    middle, spread = _middle(ratios)
    return MemoryScale(float(middle.exp()), len(ratios) / depth.numel(), float(spread))


def _middle(values: Tensor) -> tuple[Tensor, Tensor]:
    """Median of values (N,) without those far from it, and their robust standard deviation."""
    middle, kept = values.median(), values
    for _ in range(8):
        spread = 1.4826 * (kept - middle).abs().median()
        kept = values[(values - middle).abs() <= (TRIM * spread).clamp_min(1e-6)]
        before, middle = middle, kept.median()
        if before == middle:
            break
    return middle, 1.4826 * (kept - middle).abs().median()


def to_one_scale(depth: Tensor, known: Tensor) -> Tensor:
    """Frames (F, H, W) that were estimated one by one, each brought to the scale of what is known of it.

    Frames of which too little is known take the middle factor of the others; if there are none, all stay as they are.
    """
    found = [memory_scale(d[None], k[None].to(d)) for d, k in zip(depth, known, strict=True)]
    trusted = [f.scale for f in found if f.overlap >= OVERLAP]
    if not trusted:
        return depth
    others = float(np.exp(np.median(np.log(trusted))))
    factors = [f.scale if f.overlap >= OVERLAP else others for f in found]
    return depth * depth.new_tensor(factors)[:, None, None]


# --------------------------------------------------------------------------------------------- the reference's cameras


def camera_scale(cameras: Cameras, predicted: Cameras | None) -> tuple[float, float]:
    """By which factor `predicted` cameras are farther apart than `cameras`, and how badly they agree after that.

    The second number is the mean distance after alignment over the standard deviation of the predicted centres.
    ValueError if nothing was predicted or the cameras stand still, where the reference divides noise by noise.
    """
    if predicted is None:
        raise ValueError("the estimator doesn't say where the frames were taken")
    source, target = (np.asarray(c.centers.double().cpu()) for c in (cameras, predicted))
    if source.var(0).sum() < STILL:
        raise ValueError(f"the {len(source)} cameras stand still (their centres vary by {source.var(0).sum():.2g})")
    fit = _robust_similarity(source, target) if len(source) >= RANSAC_VIEWS else similarity(source, target)
    if fit[0] < LEAST:
        raise ValueError(f"the estimator sees no movement in {len(source)} frames of a moving camera")
    apart = float(np.sqrt(target.var(0).sum()))
    return fit[0], float(_distances(fit, source, target).mean()) / apart


def similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Umeyama's scale, rotation (3, 3) and translation (3,): least squares of target ~ scale R source + t."""
    middle, goal = source.mean(0), target.mean(0)
    left, strengths, right = np.linalg.svd((target - goal).T @ (source - middle) / len(source))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    R = left * signs @ right
    scale = float(strengths @ signs / max(source.var(0).sum(), 1e-300))
    return scale, R, goal - scale * R @ middle


def _distances(fit, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    scale, R, t = fit
    return np.linalg.norm(scale * source @ R.T + t - target, axis=1)


def _robust_similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The fit to the views that agree best, found by fitting random halves, always the same ones, as Depth Anything 3."""
    scale, R, t = similarity(source, target)
    across = np.linalg.norm((scale * source @ R.T + t)[:, None] - target, axis=2)
    limit = np.median(across.min(1))
    random = np.random.default_rng(RANSAC_SEED)
    best, fit, agreeing = (-1, -np.inf), None, None
    for _ in range(RANSAC_ROUNDS):
        some = random.choice(len(source), size=max(3, (len(source) + 1) // 2), replace=False)
        tried = similarity(source[some], target[some])
        distances = _distances(tried, source, target)
        close = distances <= limit
        score = (int(close.sum()), -distances[close].mean() if close.any() else -np.inf)
        if score > best:
            best, fit, agreeing = score, tried, close
    return similarity(source[agreeing], target[agreeing]) if best[0] >= 3 else fit


# -------------------------------------------------------------------------------------------------- sizes


def stretched(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth (F, h, w) at another size, bilinear between pixel areas, as the reference brings it to the frames' size."""
    return F.interpolate(depth[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
