"""Camera motion: presets, zooms, splines through keyframes, edits, and a guard that keeps clear of known surfaces.

The presets, the zoom and the B-spline give the reference's numbers, its oddities included (`PRESET_NOTES` names
them). What improves on it stands beside it under its own name: `through_keys`, "uniform motion", `guard`.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .camera import (
    Cameras,
    check,
    from_corner_origin,
    join,
    quaternion_to_rotation,
    rotation_to_quaternion,
    unproject,
)

DIRECTIONS = ("left", "right", "up", "down")
FAR = 999.9             # the reference's depth reaches 1000 where it knows nothing, the sky above all
GROUND_POINTS = 50      # fewer points than this say nothing about the ground


# --------------------------------------------------------------------------------------------------------- presets

@dataclass(frozen=True)
class Move:
    """What is asked of a preset."""

    frames: int
    depth: float                            # scene units; how far away the scene's centre is
    strength: float                         # travel in depths; radians for orbits, degrees for rotate_spot
    direction: str                          # one of DIRECTIONS
    generator: torch.Generator | None       # for the noise presets

    @property
    def side(self) -> float:
        """+1 to the right, -1 to anywhere else: most presets know no more than that."""
        return 1.0 if self.direction == "right" else -1.0

    @property
    def reach(self) -> float:
        """Travel in scene units, without sign."""
        return self.strength * self.depth

    @property
    def progress(self) -> Tensor:
        """(F,) from 0 to 1, the end included."""
        return torch.arange(self.frames, dtype=torch.float32) / max(self.frames - 1, 1)

    @property
    def travel(self) -> Tensor:
        """(F,) signed scene units; the last frame is one step short of the whole reach."""
        return torch.arange(self.frames, dtype=torch.float32) * (self.side * self.reach / self.frames)


def preset(name: str, start: Cameras, frames: int, center_depth: float, direction: str = "right",
           strength: float = 0.2, generator: torch.Generator | None = None) -> Cameras:
    """The preset's cameras, beginning at `start` (one camera); the `back` presets give 2 * frames - 1 of them.

    `center_depth` is in scene units. The noise presets draw from `generator` (None: a fresh one of seed 0).
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    if direction not in DIRECTIONS:
        raise ValueError(f"there is no direction {direction!r}; choose one of {', '.join(DIRECTIONS)}")
    if len(start) != 1 or frames < 2 or not 0 < float(center_depth) < math.inf:
        raise ValueError(f"a preset needs one start camera, two frames or more and a positive center depth; found "
                         f"{len(start)} cameras, {frames} frames, depth {float(center_depth):.4g}")
    move = Move(frames, float(center_depth), float(strength), direction, generator)
    relative = PRESETS[name](move).to(start.w2c)
    K = start.K.repeat(len(relative), 1, 1)
    if name in FOCAL_FACTORS:
        K[:, (0, 1), (0, 1)] *= FOCAL_FACTORS[name](move).to(K)[:, None]
    return check(Cameras(relative @ start.w2c, K, start.size), f"preset {name}")


def _poses(R: Tensor, t: Tensor) -> Tensor:
    """World-to-camera (F, 4, 4) of rotations (F, 3, 3) and translations (F, 3)."""
    w2c = torch.eye(4, dtype=R.dtype, device=R.device).repeat(len(R), 1, 1)
    w2c[:, :3, :3], w2c[:, :3, 3] = R, t
    return w2c


def _standing(R: Tensor, centers: Tensor) -> Tensor:
    """World-to-camera (F, 4, 4) of rotations (F, 3, 3) and camera centres (F, 3)."""
    return _poses(R, -(R @ centers[..., None]).squeeze(-1))


def _at(x: Tensor | float = 0.0, y: Tensor | float = 0.0, z: Tensor | float = 0.0) -> Tensor:
    """Points (F, 3) or one point (3,), of coordinates that are numbers or (F,)."""
    parts = torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float32) for value in (x, y, z)))
    return torch.stack(parts, -1)


def _look(centers: Tensor, target: Tensor) -> Tensor:
    """World-to-camera of cameras at (F, 3) looking at (F, 3) or (3,), level with the world's x-z plane."""
    forward = normalize(target - centers, dim=-1)
    right = normalize(torch.linalg.cross(_at(y=1.0).expand_as(forward), forward), dim=-1)
    return _standing(torch.stack([right, torch.linalg.cross(forward, right), forward], 1), centers)


def _turn(angle: Tensor) -> Tensor:
    """Rotations (F, 3, 3) about y by (F,) radians."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([_at(cos, 0, sin), _at(0 * cos, 1, 0), _at(-sin, 0, cos)], 1)


def _ellipse(move: Move, turns: int, width: float, height: float) -> Tensor:
    """(F, 3) `turns` times round an ellipse of these radii in x-y that begins and ends at the origin."""
    angle = 2 * math.pi * turns * move.progress
    return _at(width * move.side * (angle.cos() - 1), height * angle.sin())


def _noise(move: Move, axis: int) -> Tensor:
    """(F, 3) tiny offsets on the axes other than `axis`."""
    generator = move.generator or torch.Generator().manual_seed(0)
    # one value per call: longer draws come out of the generator in another order
    values = torch.stack([torch.randn(1, generator=generator) for _ in range(2 * move.frames)]).view(-1, 2)
    offsets = torch.zeros(move.frames, 3)
    offsets[:, [other for other in range(3) if other != axis]] = values * (1e-4 * move.reach)
    return offsets


def _original(move: Move) -> Tensor:
    return torch.eye(4).repeat(move.frames, 1, 1)


def _line(move: Move, axis: int, noise: bool = False, bend: bool = False) -> Tensor:
    """Straight along an axis, looking at the scene's centre; with `bend`, sagging in y on the way."""
    centers = torch.zeros(move.frames, 3)
    centers[:, axis] = move.travel
    if bend:
        centers[:, 1] = move.travel * (0.04 if move.side > 0 else 0.12)
    if noise:
        centers = centers + _noise(move, axis)
    # a zoom looks beyond the point it heads for, or it would turn round when it passed it
    return _look(centers, _at(z=move.depth + move.reach if axis == 2 else move.depth))


def _line_outward(move: Move) -> Tensor:
    centers = _at(move.travel)
    return _look(centers, _at(z=move.depth) + 2 * centers)


def _line_then_still(move: Move, axis: int) -> Tensor:
    moving = _line(replace(move, frames=move.frames // 2), axis)
    return torch.cat([moving, moving[-1:].expand(move.frames - len(moving), 4, 4)])


def _slide(move: Move, axis: int, toward: str) -> Tensor:
    """Sideways or up without turning, the whole reach."""
    offset = torch.zeros(move.frames, 3)
    offset[:, axis] = move.reach * move.progress * (1 if move.direction == toward else -1)
    # seen from the camera the world slides the other way; "right" is +x, "up" is -y
    return _poses(torch.eye(3).repeat(move.frames, 1, 1), -offset if axis == 0 else offset)


def _spiral(move: Move) -> Tensor:
    return _look(_ellipse(move, 2, 0.15 * move.reach, 0.10 * move.reach), _at(z=move.depth))


def _spiral_center(move: Move) -> Tensor:
    angle = 2 * math.pi * move.progress
    return _look(_at(0.03 * move.depth * angle.cos(), 0.02 * move.depth * angle.sin()), _at(z=move.depth))


def _spiral_outwards(move: Move) -> Tensor:
    target = _at(z=move.depth) + _ellipse(move, 1, 0.3 * move.reach, 0.2 * move.reach)
    return _look(torch.zeros_like(target), target)


def _spiral_along(move: Move) -> Tensor:
    around = _ellipse(move, 2, 0.15 / 8 * move.reach, 0.10 / 8 * move.reach)
    return _look(around + _at(z=move.side * move.reach * move.progress), _at(z=move.depth + move.reach))


def _back(move: Move, width: float, height: float, mistaken: bool) -> Tensor:
    """Still for all frames, then once round an ellipse; `mistaken` uses the centre as the translation."""
    centers = _ellipse(replace(move, frames=move.frames - 1), 1, width, height)
    around = _look(centers, _at(z=move.depth))
    if mistaken:
        around = _poses(around[:, :3, :3], centers)
    return torch.cat([_original(move), around])


def _orbit(move: Move, axis: int, positive: str) -> Tensor:
    """Round the scene's centre by `strength` radians; axis 0 sideways, axis 1 over or under it."""
    sign = -1 if axis == 0 else 1
    angle = math.pi + sign * (1 if move.direction == positive else -1) * move.strength * move.progress
    aside, z = move.depth * angle.sin(), move.depth + move.depth * angle.cos()
    return _look(_at(aside, 0, z) if axis == 0 else _at(0, aside, z), _at(z=move.depth))


DOLLY_TARGET, DOLLY_TRAVEL = 0.185, 3.0     # in depths; in scene units, whatever the depth


def _dolly_zoom(move: Move) -> Tensor:
    return _look(_at(z=DOLLY_TRAVEL * move.progress), _at(z=DOLLY_TARGET * move.depth))


def _dolly_focal(move: Move) -> Tensor:
    target = DOLLY_TARGET * move.depth
    return target / (target + DOLLY_TRAVEL * move.progress)


def _rotate_zoom(move: Move, sign: float) -> Tensor:
    """Turn by 20 degrees in the first half, move in the second."""
    half = move.frames // 2
    angle = math.radians(20) * move.side
    step = torch.arange(move.frames, dtype=torch.float32)
    R = _turn(angle * (step / max(half - 1, 1)).clamp(max=1))
    along = sign * move.reach * ((step - half) / max(move.frames - half - 1, 1)).clamp(min=0)
    # by the inverse rotation, as the reference has it: twice the turn away from where the camera looks
    return _poses(R, -(R.mT @ (along[:, None] * R[:, 2])[..., None]).squeeze(-1))


def _rotate_spot(move: Move) -> Tensor:
    return _poses(_turn(math.radians(move.strength) * move.side * move.progress), torch.zeros(move.frames, 3))


def _rotate_spot_noise(move: Move) -> Tensor:
    angle = 2 * math.pi * 0.001 * torch.arange(move.frames, dtype=torch.float32)
    radius = 1e-5 * move.depth
    return _rotate_spot(move) @ _look(_at(radius * angle.cos(), radius * angle.sin()), _at(z=move.depth))


PRESETS: dict[str, Callable[[Move], Tensor]] = {
    "original": _original,
    "spiral": _spiral,
    "spiral_center": _spiral_center,
    "spiral_outwards": _spiral_outwards,
    "horizontal": partial(_line, axis=0),
    "horizontal_lift": partial(_line, axis=1),
    "horizontal_zoom": partial(_line, axis=2),
    "horizontal_outward": _line_outward,
    "horizontal_noise": partial(_line, axis=0, noise=True),
    "horizontal_lift_noise": partial(_line, axis=1, noise=True),
    "horizontal_zoom_noise": partial(_line, axis=2, noise=True),
    "horizontal_zoom_bend": partial(_line, axis=2, bend=True),
    "horizontal_zoom_noise_bend": partial(_line, axis=2, noise=True, bend=True),
    "horizontal_still": partial(_line_then_still, axis=0),
    "horizontal_zoom_still": partial(_line_then_still, axis=2),
    "horizontal_simple": partial(_slide, axis=0, toward="right"),
    "vertical_simple": partial(_slide, axis=1, toward="up"),
    "back": partial(_back, width=0.3, height=0.2, mistaken=True),
    "back_simple": partial(_back, width=0.15, height=0.1, mistaken=False),
    "dolly_zoom": _dolly_zoom,
    "horizontal_spiral": _spiral_along,
    "orbit_horizontal": partial(_orbit, axis=0, positive="right"),
    "orbit_vertical": partial(_orbit, axis=1, positive="up"),
    "rotate_zoom_in": partial(_rotate_zoom, sign=1.0),
    "rotate_zoom_out": partial(_rotate_zoom, sign=-1.0),
    "rotate_spot": _rotate_spot,
    "rotate_spot_noise": _rotate_spot_noise,
}

FOCAL_FACTORS: dict[str, Callable[[Move], Tensor]] = {"dolly_zoom": _dolly_focal}

PRESET_NOTES: dict[str, str] = {
    "spiral_center": "Begins beside the start camera and ignores strength and direction.",
    "spiral_outwards": "Repaired: the reference crashes on it.",
    "horizontal_zoom": "The last camera is one step short of the whole distance.",
    "back": "Gives 2N-1 cameras, N of them still; its circle ignores the depth and drifts off its target.",
    "back_simple": "Gives 2N-1 cameras, N of them still; its circle ignores the depth.",
    "dolly_zoom": "Moves 3 scene units forward while the lens widens, whatever strength and direction say; "
                  "turns round if the depth is below 16.",
    "orbit_horizontal": "Strength is in radians.",
    "orbit_vertical": "Strength is in radians; flips when it passes straight above or below the centre.",
    "rotate_zoom_in": "Moves 40 degrees off the direction it looks in.",
    "rotate_zoom_out": "Moves 40 degrees off the direction it looks in.",
    "rotate_spot": "Strength is in degrees.",
    "rotate_spot_noise": "Strength is in degrees; the noise is a tiny fixed drift that keeps the centres apart.",
}


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
    return replace(cameras, w2c=_standing(cameras.w2c[:, :3, :3], lifted))


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
    return replace(cameras, w2c=_poses(cameras.w2c[:, :3, :3], t[0] + flat - rise))


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


# ----------------------------------------------------------------------------------------- paths through keyframes

@dataclass(frozen=True)
class PathKey:
    """A camera that a path is drawn by."""

    c2w: Tensor                 # (3, 4) camera-to-world, OpenCV axes, scene units
    fov: float                  # vertical, degrees
    timestamp: float = 0.0      # seconds
    up: tuple[float, float, float] = (0.0, 1.0, 0.0)    # kept for the file format; nothing here depends on it


@dataclass(frozen=True)
class CameraPath:
    """Keys and how to go from one to the next."""

    keys: tuple[PathKey, ...]
    spline_order: int = 3       # uniform B-spline: 0 jumps, 1 is straight, 2 and 3 round the corners off
    loop: bool = False
    through_keys: bool = False  # instead of the B-spline a curve through every key

    def __post_init__(self):
        if not self.keys or self.spline_order not in (0, 1, 2, 3):
            raise ValueError("a camera path needs at least one key and a spline order of 0 to 3; found "
                             f"{len(self.keys)} keys and order {self.spline_order!r}")

    @property
    def duration(self) -> float:
        """Seconds until the last key."""
        return self.keys[-1].timestamp


def spaced(path: CameraPath, duration: float) -> CameraPath:
    """The same keys at equal distances in time, the last at `duration` seconds."""
    stamps = (duration * (i + 1) / len(path.keys) for i in range(len(path.keys)))
    return replace(path, keys=tuple(replace(key, timestamp=stamp)
                                    for key, stamp in zip(path.keys, stamps, strict=True)))


def held(path: CameraPath, times: int = 1, duration: float | None = None) -> CameraPath:
    """With the first and last key repeated, so that a B-spline reaches them; equally spaced over the duration."""
    keys = path.keys[:1] * times + path.keys + path.keys[-1:] * times
    return spaced(replace(path, keys=keys), duration or path.duration or 1.0)


def path_of(cameras: Cameras, fps: float = 16.0) -> CameraPath:
    """A path with one key per camera, straight from each to the next."""
    return CameraPath(tuple(PathKey(c2w[:3], math.degrees(fov), (i + 1) / fps)
                            for i, (c2w, fov) in enumerate(zip(cameras.c2w, cameras.fov.tolist(), strict=True))),
                      spline_order=1)


def evaluate(path: CameraPath, t: Tensor) -> tuple[Tensor, Tensor]:
    """Camera-to-world (T, 4, 4) and vertical field of view (T,) in degrees at the moments t (T,) from 0 to 1.

    Key i has its turn at t = timestamp[i-1] / timestamp[n-2], the first at 0; a loop is back there at 1.
    """
    segment, u = _segments(path, t)
    curve = _through_keys if path.through_keys else _b_spline
    q, values = curve(path, segment, u)
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(t), 1, 1)
    c2w[:, :3, :3], c2w[:, :3, 3] = quaternion_to_rotation(q), values[:, :3]
    return c2w.float(), values[:, 3].float()


def _segments(path: CameraPath, t: Tensor) -> tuple[Tensor, Tensor]:
    """The key before each moment (T,) and how far (T,) from it to the next, 0 to 1."""
    # single precision, as in the reference: with order 0, rounding decides which key a moment halfway goes to
    t = t.float()
    if len(path.keys) == 1:
        return torch.zeros_like(t, dtype=torch.long), t.double()
    stamps = torch.tensor([key.timestamp for key in path.keys], dtype=torch.float32)
    if stamps[0] < 0 or (stamps.diff() < 0).any():
        raise ValueError("the timestamps of a camera path must not decrease; found "
                         f"{[round(stamp, 3) for stamp in stamps.tolist()]}, which `spaced` can replace")
    last = len(stamps) - (1 if path.loop else 2)
    now = t * stamps[last]
    segment = torch.searchsorted(stamps, now, right=True).clamp(0, last)
    begin = torch.cat([stamps.new_zeros(1), stamps])[segment]
    return segment, ((now - begin) / (stamps[segment] - begin).clamp(min=1e-12)).double()


def _keys_at(path: CameraPath, index: Tensor) -> tuple[Tensor, Tensor]:
    """Quaternions (T, 4) and x, y, z, fov (T, 4) of the keys at the indices (T,), which may run over the ends."""
    index = index % len(path.keys) if path.loop else index.clamp(0, len(path.keys) - 1)
    c2w = torch.stack([key.c2w for key in path.keys]).double().cpu()
    fov = torch.tensor([key.fov for key in path.keys], dtype=torch.float64)
    return rotation_to_quaternion(c2w[:, :, :3])[index], torch.cat([c2w[:, :, 3], fov[:, None]], 1)[index]


def _b_spline(path: CameraPath, segment: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Quaternions (T, 4) and x, y, z, fov (T, 4): weighted means of neighbouring keys."""
    first, weights = _b_spline_weights(path.spline_order, u)
    q = values = torch.zeros(len(u), 4, dtype=u.dtype)
    for offset, weight in enumerate(weights, first):
        key_q, key_values = _keys_at(path, segment + offset)
        same_half = torch.where((q * key_q).sum(1) < 0, -weight, weight)
        q, values = q + same_half[:, None] * key_q, values + weight[:, None] * key_values
    return q, values


def _b_spline_weights(order: int, u: Tensor) -> tuple[int, tuple[Tensor, ...]]:
    """Offset of the first key that counts, and the weight (T,) of each from there on."""
    v = 1 - u
    if order == 0:
        return 0, ((u < 0.5).to(u), (u >= 0.5).to(u))
    if order == 1:
        return 0, (v, u)
    if order == 2:
        return -1, (v * v / 2, 0.5 + u * v, u * u / 2)
    return -1, (v ** 3 / 6, (4 - 6 * u ** 2 + 3 * u ** 3) / 6, (4 - 6 * v ** 2 + 3 * v ** 3) / 6, u ** 3 / 6)


def _through_keys(path: CameraPath, segment: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Quaternions (T, 4) and x, y, z, fov (T, 4) on a curve through every key: squad, and Catmull-Rom."""
    (q0, p0), (q1, p1), (q2, p2), (q3, p3) = (_keys_at(path, segment + offset) for offset in (-1, 0, 1, 2))
    if not path.loop:       # beyond the ends the path goes on as it came
        begins, ends = (segment == 0)[:, None], (segment >= len(path.keys) - 2)[:, None]
        p0, p3 = torch.where(begins, 2 * p1 - p2, p0), torch.where(ends, 2 * p2 - p1, p3)
        q0 = torch.where(begins, _product(q1, _product(_inverse(q2), q1)), q0)
        q3 = torch.where(ends, _product(q2, _product(_inverse(q1), q2)), q3)
    u = u[:, None]
    inner = _slerp(_lean(q0, q1, q2), _lean(q1, q2, q3), u)
    return _slerp(_slerp(q1, q2, u), inner, 2 * u * (1 - u)), _catmull_rom(p0, p1, p2, p3, u)


def _catmull_rom(p0: Tensor, p1: Tensor, p2: Tensor, p3: Tensor, u: Tensor) -> Tensor:
    """x, y, z, fov (T, 4) from p1 to p2 as u (T, 1) goes from 0 to 1."""
    # centripetal in space, which makes no loops where keys are unevenly far apart; the fov has no say in that
    places = torch.stack([p0, p1, p2, p3])[..., :3]
    gaps = places.diff(dim=0).norm(dim=-1, keepdim=True).sqrt()
    widest = gaps.amax(0)
    gaps = torch.where(widest > 0, torch.maximum(gaps, widest / 10), torch.ones_like(gaps)).expand(3, -1, 3)
    before, here, after = torch.cat([gaps, torch.ones_like(gaps[..., :1])], -1)
    slope1 = (p1 - p0) / before - (p2 - p0) / (before + here) + (p2 - p1) / here
    slope2 = (p2 - p1) / here - (p3 - p1) / (here + after) + (p3 - p2) / after
    v = 1 - u
    return (p1 * (1 + 2 * u) * v * v + p2 * (3 - 2 * u) * u * u
            + here * (slope1 * u * v * v - slope2 * u * u * v))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of quaternions (..., 4), w x y z."""
    scalar = a[..., :1] * b[..., :1] - (a[..., 1:] * b[..., 1:]).sum(-1, keepdim=True)
    vector = a[..., :1] * b[..., 1:] + b[..., :1] * a[..., 1:] + torch.linalg.cross(a[..., 1:], b[..., 1:])
    return torch.cat([scalar, vector], -1)


def _inverse(q: Tensor) -> Tensor:
    """Of unit quaternions (..., 4)."""
    return torch.cat([q[..., :1], -q[..., 1:]], -1)


def _log(q: Tensor) -> Tensor:
    """Half the turn (..., 3), axis times radians, of unit quaternions (..., 4); the shorter way round."""
    q = torch.where(q[..., :1] < 0, -q, q)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    return q[..., 1:] * (torch.atan2(sine, q[..., :1]) / sine.clamp(min=1e-12))


def _exp(half_turn: Tensor) -> Tensor:
    """The inverse of `_log`."""
    angle = half_turn.norm(dim=-1, keepdim=True)
    return torch.cat([angle.cos(), half_turn * torch.special.sinc(angle / math.pi)], -1)


def _lean(before: Tensor, here: Tensor, after: Tensor) -> Tensor:
    """The control rotation at `here` that makes the turn go smoothly on from `before` to `after`."""
    back = _inverse(here)
    return _product(here, _exp(-(_log(_product(back, before)) + _log(_product(back, after))) / 4))


def _slerp(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """From unit quaternions a (..., 4) to b at a steady turn, u (..., 1) from 0 to 1; the shorter way round."""
    b = torch.where((a * b).sum(-1, keepdim=True) < 0, -b, b)
    angle = 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))
    sine = angle.sin().clamp(min=1e-12)
    steady = ((1 - u) * angle).sin() / sine * a + (u * angle).sin() / sine * b
    return normalize(torch.where(angle < 1e-6, (1 - u) * a + u * b, steady), dim=-1)


def resample(path: CameraPath, frames: int, by: str = "uniform motion", scale: float | None = None) -> Tensor:
    """Moments (frames,) of the path, 0 to 1, that make its motion even.

    "arc length" counts travel only, as the reference does: a turn on the spot is over in a frame. "uniform motion"
    counts turning too; `scale` scene units of travel are worth one radian (None: all travel as much as all
    turning). "time" keeps the timing of the keys.
    """
    if frames < 2:
        raise ValueError(f"a path can't be sampled in {frames} frames; ask for 2 or more")
    even = torch.linspace(0, 1, frames, dtype=torch.float64)
    if by == "time":
        return even
    dense = torch.linspace(0, 1, 10 * frames, dtype=torch.float64)
    c2w, _ = evaluate(path, dense)
    moments = _even_index(_motion(c2w, by, scale), frames) / (10 * frames - 1)
    return torch.cat([even[:1], moments[1:-1], even[-1:]])


def path_cameras(path: CameraPath, size: tuple[int, int], frames: int, by: str = "uniform motion",
                 scale: float | None = None, holds: int = 1) -> Cameras:
    """The path as `frames` cameras of this size, square pixels, principal point in the picture's middle.

    An open B-spline starts and ends at its keys by `holds` repetitions of them. See `resample` for the rest.
    """
    if not (path.loop or by == "time"):
        # only the shape counts then; equal spacing makes sure that no key is left out, whatever its time stamp says
        path = spaced(path, path.duration or 1.0) if path.through_keys or holds == 0 else held(path, holds)
    c2w, fov = evaluate(path, resample(path, frames, by, scale))
    K = torch.eye(3).repeat(frames, 1, 1)
    K[:, 0, 0] = K[:, 1, 1] = 0.5 * size[0] / torch.tan(torch.deg2rad(fov) / 2)
    K[:, 0, 2], K[:, 1, 2] = size[1] / 2, size[0] / 2
    return check(Cameras(torch.linalg.inv(c2w), from_corner_origin(K), size), "the camera path")


def _motion(c2w: Tensor, by: str, scale: float | None) -> Tensor:
    """How much happens in each step (F - 1,), float64."""
    if by not in ("arc length", "uniform motion"):
        raise ValueError(f"motion can be evened by 'arc length' or by 'uniform motion'; found {by!r}")
    travel = c2w[:, :3, 3].double().diff(dim=0).norm(dim=1)
    if by == "arc length":
        return travel
    q = rotation_to_quaternion(c2w[:, :3, :3].double())
    turn = 2 * _log(_product(_inverse(q[:-1]), q[1:])).norm(dim=1)
    if scale is None:       # float32 rotations tremble; below 3 degrees in all it is no turn to be weighed
        scale = float(travel.sum() / turn.sum().clamp(min=0.05))
    return turn + (travel / scale if scale > 0 else 0)


def _even_index(steps: Tensor, frames: int) -> Tensor:
    """Indices (frames,) into F poses that cut the F - 1 steps between them into equal shares, float64."""
    amount = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    if amount[-1] <= 1e-8:
        return torch.linspace(0, len(steps), frames, dtype=torch.float64)
    wanted = torch.linspace(0, 1, frames, dtype=torch.float64) * amount[-1]
    before = (torch.searchsorted(amount, wanted, right=True) - 1).clamp(0, len(steps) - 1)
    return before + ((wanted - amount[before]) / steps[before].clamp(min=1e-12)).clamp(max=1)


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
        return _between(cameras, torch.linspace(0, len(cameras) - 1, frames, dtype=torch.float64))
    return _between(cameras, _even_index(_motion(cameras.c2w.cpu(), by, scale), frames))


def _between(cameras: Cameras, index: Tensor) -> Cameras:
    """Cameras at fractional indices (T,): centres and intrinsics on the straight line, rotations on the arc."""
    index = index.to(cameras.w2c.device)
    before = index.floor().long().clamp(0, len(cameras) - 1)
    after = (before + 1).clamp(max=len(cameras) - 1)
    u = (index - before)[:, None]
    q = rotation_to_quaternion(cameras.w2c[:, :3, :3].double())
    centers, K = cameras.centers.double(), cameras.K.double()
    moved = _standing(quaternion_to_rotation(_slerp(q[before], q[after], u)),
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


def guard(cameras: Cameras, points: Tensor, clearance: float, how: str = "shorten") -> tuple[Cameras, GuardReport]:
    """As many cameras, none nearer than `clearance` to a known world point (N, 3), and what had to change.

    The way ends where it would first come too near: "shorten" takes all frames to get there, "hold" gets there as
    fast as before and stays. A start that is already nearer than `clearance` may move, but no nearer still.
    """
    if how not in ("shorten", "hold"):
        raise ValueError(f"a guarded path can 'shorten' or 'hold'; found {how!r}")
    if not clearance > 0:
        raise ValueError(f"the clearance must be a positive distance in scene units; found {clearance}")
    frames, centers = len(cameras), cameras.centers.double()
    points = points.reshape(-1, 3).to(centers)
    points = points[torch.isfinite(points).all(1)]
    gaps = _gaps(centers, points)
    limit = min(clearance, float(gaps[0])) * (1 - 1e-4)     # touching is allowed; rounding must not decide
    end = _last_clear_index(centers, points, limit)
    if end >= frames - 1:
        return cameras, GuardReport(frames, 1.0, float(gaps.min()), int(gaps.argmin()), False)
    index = torch.arange(frames, dtype=torch.float64)
    guarded = _between(cameras, index.clamp(max=end) if how == "hold" else index * (end / (frames - 1)))
    steps = centers.diff(dim=0).norm(dim=1)
    whole = int(end)
    fraction = float((steps[:whole].sum() + (end - whole) * steps[whole]) / steps.sum())
    nearest = float(_gaps(guarded.centers.double(), points).min())
    return guarded, GuardReport(frames, fraction, nearest, whole, True)


def _gaps(centers: Tensor, points: Tensor) -> Tensor:
    """(F,) distance from each centre (F, 3) to the nearest point (N, 3)."""
    if len(points) == 0:
        return centers.new_full((len(centers),), math.inf)
    # by differences: the faster way through a matrix product loses the small distances that matter here
    return torch.cat([torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
                      for some in centers.split(16)])


def _last_clear_index(centers: Tensor, points: Tensor, limit: float) -> float:
    """How far, in frames, the way along centres (F, 3) goes before a point (N, 3) is nearer than `limit`."""
    low, high = centers.amin(0) - limit, centers.amax(0) + limit
    points = points[((points >= low) & (points <= high)).all(1)]     # all others are out of reach
    for i, (here, step) in enumerate(zip(centers[:-1], centers.diff(dim=0), strict=True)):
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
