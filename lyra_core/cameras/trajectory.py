"""Camera motion: zooms, edits, and a guard that keeps clear of known surfaces. The named moves are in presets.py.

The zoom gives the reference's numbers; what improves on it stands beside it under its own name.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .camera import (
    Cameras,
    join,
    quaternion_to_rotation,
    rotation_to_quaternion,
    unproject,
)
from .camera_path import even_index, motion, slerp
from .presets import poses, preset, standing

FAR = 999.9             # the reference's depth reaches 1000 where it knows nothing, the sky above all
GROUND_POINTS = 50      # fewer points than this say nothing about the ground
LONGEST = 1_000_000     # cameras of a path: 17 hours of walking


# ------------------------------------------------------------------------------------------------------------ zoom

def known(depth: Tensor) -> Tensor:
    """Which pixels (H, W) have a depth: finite, positive, and nearer than where the sky begins."""
    return torch.isfinite(depth) & (depth > 0) & (depth < FAR)


def center_depth(depth: Tensor, valid: Tensor | None = None, quantile: float = 0.25) -> float:
    """How far away the scene is, in scene units: a quantile of depth (H, W) over its known, or `valid`, pixels."""
    values = depth[known(depth) if valid is None else valid.bool()]
    if values.numel() == 0:
        raise ValueError(f"none of the {depth.numel()} pixels has a known depth; without one there is no unit to "
                         "move by, so estimate the depth first")
    return float(torch.quantile(values.float(), quantile))


def zoom(start: Cameras, depth: Tensor, direction: str = "in", strength: float = 0.5, frames: int = 81,
         upward_ratio: float = 0.0, ground_normal: Tensor | None = None, upward_shift: float = 0.0,
         trajectory: str = "horizontal_zoom", generator: torch.Generator | None = None) -> Cameras:
    """Into or out of the picture whose depth (H, W; 0 = unknown) `start` sees.

    Going back it rises by `upward_ratio` of the way. With `ground_normal` (3,), up as `start` sees it, the motion
    runs parallel to the ground and ends `upward_shift` scene units off that; without one there is no shift.
    "in" and "out" are the preset's "right" and "left"; any of its directions will do.
    """
    at_origin = replace(start, w2c=torch.eye(4).to(start.w2c)[None])
    way = {"in": "right", "out": "left"}.get(direction, direction)
    local = preset(trajectory, at_origin, frames, center_depth(depth), way, strength, generator)
    if upward_ratio > 0:
        local = _rising(local, upward_ratio)
    if ground_normal is not None:
        local = along_ground(local, ground_normal, upward_shift)
    return replace(local, w2c=local.w2c @ start.w2c)


def _rising(cameras: Cameras, ratio: float) -> Cameras:
    """Lifted (towards -y) by `ratio` of how far each camera has backed off."""
    centers = cameras.centers
    back = (centers[0, 2] - centers[:, 2]).clamp(min=0)
    lifted = torch.stack([centers[:, 0], centers[:, 1] - ratio * back, centers[:, 2]], 1)
    return replace(cameras, w2c=standing(cameras.w2c[:, :3, :3], lifted))


def along_ground(cameras: Cameras, normal: Tensor, upward_shift: float = 0.0) -> Cameras:
    """The same motion laid parallel to the ground of this normal (3,), its steps as long as before.

    Works on the translations of w2c, which is right for cameras that don't turn.
    """
    n = normalize(normal.to(cameras.w2c), dim=0)
    t = cameras.w2c[:, :3, 3]
    moved = t - t[0]
    flat = moved - (moved @ n)[:, None] * n
    length, flat_length = moved.norm(dim=1, keepdim=True), flat.norm(dim=1, keepdim=True)
    flat = flat * (length / flat_length.clamp(min=1e-8))
    rise = torch.linspace(0, upward_shift, len(cameras)).to(t)[:, None] * n
    return replace(cameras, w2c=poses(cameras.w2c[:, :3, :3], t[0] + flat - rise))


def ground_normal(depth: Tensor, K: Tensor, generator: torch.Generator | None = None, bottom_fraction: float = 0.4,
                  valid: Tensor | None = None, trials: int = 200) -> Tensor | None:
    """Unit normal (3,), pointing up, of the plane most of the picture's bottom lies in, in the camera's axes.

    depth (H, W) in scene units, K (3, 3). None if too little of it is known.
    """
    size = tuple(depth.shape)
    usable = (depth > 0.01) & (depth < 500) & (known(depth) if valid is None else valid.bool())
    usable[:int(size[0] * (1 - bottom_fraction))] = False
    points = unproject(depth[None].float(), Cameras(torch.eye(4).to(K)[None], K[None], size))[0][usable]
    if len(points) < GROUND_POINTS:
        return None
    points = points[::-(-len(points) // 20_000)]
    generator = generator or torch.Generator().manual_seed(0)
    a, b, c = points[torch.randint(len(points), (3, trials), generator=generator).to(points.device)]
    normals = torch.linalg.cross(b - a, c - a)
    proper = normals.norm(dim=1) > 1e-8
    normals, a = normalize(normals[proper], dim=1), a[proper]
    if len(normals) == 0:
        return None
    off = (points @ normals.mT - (normals * a).sum(1)).abs()
    near = off < 0.05 * points[:, 2:].abs().clamp(min=0.1)
    inliers = points[near[:, near.sum(0).argmax()]]
    # three noisy points tilt a plane by degrees; all that agree with them do not
    normal = torch.linalg.svd(inliers - inliers.mean(0), full_matrices=False).Vh[2]
    return -normal if normal[1] > 0 else normal


# ----------------------------------------------------------------------------------------------------------- edits

def reverse(cameras: Cameras) -> Cameras:
    """The same way back."""
    return cameras[list(range(len(cameras) - 1, -1, -1))]


def scale(cameras: Cameras, factor: float, about: str = "first centre") -> Cameras:
    """All centres `factor` times as far from the first one, or from the world's "origin"; the views don't turn."""
    if about not in ("first centre", "origin"):
        raise ValueError(f"cameras can be scaled about 'first centre' or 'origin'; found {about!r}")
    w2c = cameras.w2c.clone()
    w2c[:, :3, 3] *= factor
    if about == "first centre":
        w2c[:, :3, 3] += (factor - 1) * (w2c[:, :3, :3] @ cameras.centers[0])
    return replace(cameras, w2c=w2c)


def retime(cameras: Cameras, frames: int, by: str = "time", scale: float | None = None) -> Cameras:
    """The same way in another number of frames; "time" leaves it fast and slow where it was, see `resample`."""
    if frames < 1:
        raise ValueError(f"a trajectory can't have {frames} frames; ask for 1 or more")
    if len(cameras) == 1 or frames == 1:
        return cameras[[0] * frames]
    if by == "time":
        return between(cameras, torch.linspace(0, len(cameras) - 1, frames, dtype=torch.float64))
    return between(cameras, even_index(motion(cameras.c2w.cpu(), by, scale), frames))


def between(cameras: Cameras, index: Tensor) -> Cameras:
    """Cameras at fractional indices (T,): centres and intrinsics on the straight line, rotations on the arc."""
    index = index.to(cameras.w2c.device)
    before = index.floor().long().clamp(0, len(cameras) - 1)
    after = (before + 1).clamp(max=len(cameras) - 1)
    u = (index - before)[:, None]
    q = rotation_to_quaternion(cameras.w2c[:, :3, :3].double())
    centers, K = cameras.centers.double(), cameras.K.double()
    moved = standing(quaternion_to_rotation(slerp(q[before], q[after], u)),
                      centers[before] + u * (centers[after] - centers[before]))
    on_frame = (u == 0)[..., None]      # as they were, to the last bit
    return replace(cameras, w2c=torch.where(on_frame, cameras.w2c[before], moved.to(cameras.w2c)),
                   K=(K[before] + u[..., None] * (K[after] - K[before])).to(cameras.K))


def pad_to_chunks(cameras: Cameras, chunk_frames: int, how: str = "hold") -> Cameras:
    """One camera and then whole chunks: the last camera repeated ("hold"), or the way slowed down ("stretch")."""
    frames = 1 - (1 - len(cameras)) // chunk_frames * chunk_frames
    if how == "hold":
        return cameras[list(range(len(cameras))) + [len(cameras) - 1] * (frames - len(cameras))]
    if how == "stretch":
        return retime(cameras, frames)
    raise ValueError(f"a trajectory can be padded by 'hold' or by 'stretch'; found {how!r}")


def chain(first: Cameras, second: Cameras) -> Cameras:
    """`first`, then the motion of `second` from where `first` ended; the camera they share comes once."""
    if len(first) + len(second) > LONGEST:
        raise ValueError(f"paths of {len(first):,} and {len(second):,} cameras can't be joined: a path has {LONGEST:,} at most")
    second = replace(second, origin=first.origin)   # only how it moves counts, wherever that was
    w2c = second.w2c.to(first.w2c)
    to_second = torch.linalg.inv(w2c[0].double()) @ first.w2c[-1].double()
    return join(first, replace(second, w2c=(w2c.double() @ to_second).to(w2c))[1:])


# ----------------------------------------------------------------------------------------------------------- guard

@dataclass(frozen=True)
class GuardReport:
    """What a guard found."""

    frames: int
    safe_fraction: float    # of the path's length
    nearest: float          # scene units from the returned cameras to a known point; inf if none is known
    at_frame: int           # of the path as given: the last safe one, or the nearest one if all are safe
    changed: bool

    def __str__(self) -> str:
        if math.isinf(self.nearest):
            return f"The path is as it was: nothing is known that its {self.frames} frames could come too near."
        nearest = f"nothing known is nearer than {self.nearest:.3g} scene units"
        if self.changed:
            return (f"The path was cut to {self.safe_fraction:.0%} of its length: it came too close to a surface "
                    f"after frame {self.at_frame} of {self.frames}; now {nearest}.")
        return f"The path is clear: in {self.frames} frames {nearest} (frame {self.at_frame})."


def guard(cameras: Cameras, points: Tensor, clearance: float, how: str = "shorten",
          on_step: Callable[[], None] = lambda: None) -> tuple[Cameras, GuardReport]:
    """As many cameras, none nearer than `clearance` to a known world point (N, 3), and what had to change.

    The way ends where it would first come too near: "shorten" takes all frames to get there, "hold" gets there as
    fast as before and stays. A start that is already nearer than `clearance` may move, but no nearer still.
    `on_step` is called every few cameras.
    """
    if how not in ("shorten", "hold"):
        raise ValueError(f"a guarded path can 'shorten' or 'hold'; found {how!r}")
    if not clearance > 0:
        raise ValueError(f"the clearance must be a positive distance in scene units; found {clearance}")
    frames, centers = len(cameras), cameras.centers.double()
    points = points.reshape(-1, 3).to(centers)
    points = points[torch.isfinite(points).all(1)]
    gaps = _gaps(centers, points, on_step)
    limit = min(clearance, float(gaps[0])) * (1 - 1e-4)     # touching is allowed; rounding must not decide
    end = _last_clear_index(centers, points, limit, on_step)
    if end >= frames - 1:
        return cameras, GuardReport(frames, 1.0, float(gaps.min()), int(gaps.argmin()), False)
    index = torch.arange(frames, dtype=torch.float64)
    guarded = between(cameras, index.clamp(max=end) if how == "hold" else index * (end / (frames - 1)))
    steps = centers.diff(dim=0).norm(dim=1)
    whole = int(end)
    fraction = float((steps[:whole].sum() + (end - whole) * steps[whole]) / steps.sum())
    nearest = float(_gaps(guarded.centers.double(), points, on_step).min())
    return guarded, GuardReport(frames, fraction, nearest, whole, True)


def _gaps(centers: Tensor, points: Tensor, on_step: Callable[[], None]) -> Tensor:
    """(F,) distance from each centre (F, 3) to the nearest point (N, 3)."""
    if len(points) == 0:
        return centers.new_full((len(centers),), math.inf)
    # by differences: the faster way through a matrix product loses the small distances that matter here
    gaps = []
    for some in centers.split(16):
        gaps.append(torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist").amin(1))
        on_step()
    return torch.cat(gaps)


def _last_clear_index(centers: Tensor, points: Tensor, limit: float, on_step: Callable[[], None]) -> float:
    """How far, in frames, the way along centres (F, 3) goes before a point (N, 3) is nearer than `limit`."""
    low, high = centers.amin(0) - limit, centers.amax(0) + limit
    points = points[((points >= low) & (points <= high)).all(1)]     # all others are out of reach
    for i, (here, step) in enumerate(zip(centers[:-1], centers.diff(dim=0), strict=True)):
        on_step()
        length = step.norm()
        if length == 0 or len(points) == 0:
            continue
        offset = points - here
        along = offset @ (step / length)
        aside = offset.square().sum(1) - along.square()
        # the way enters a point's ball this far along; behind us is behind us
        entry = along - (limit * limit - aside).clamp(min=0).sqrt()
        hit = (aside < limit * limit) & (along > 0) & (entry < length)
        if hit.any():
            return i + float((entry[hit].min() / length).clamp(min=0))
    return float(len(centers) - 1)
