"""Paths through keyframes: the reference's B-spline, a curve that meets every key, and how frames are spread over them."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .camera import (
    Cameras,
    check,
    from_corner_origin,
    quaternion_to_rotation,
    rotation_to_quaternion,
    to_corner_origin,
)

TREMBLE = 2e-3  # scene units in all: less travel than this comes of rounding, more so far from the origin


@dataclass(frozen=True)
class PathKey:
    """A camera that a path is drawn by."""

    c2w: Tensor                 # (3, 4) camera-to-world, OpenCV axes, scene units
    fov: float                  # vertical, degrees
    timestamp: float = 0.0      # seconds
    up: tuple[float, float, float] = (0.0, 1.0, 0.0)    # kept for the file format; nothing here depends on it
    pixel_aspect: float = 1.0   # fx over fy
    # how far right of and below the picture's middle the principal point is, in picture heights: a lens shift, or a crop
    shift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class CameraPath:
    """Keys and how to go from one to the next."""

    keys: tuple[PathKey, ...]
    spline_order: int = 3       # uniform B-spline: 0 jumps, 1 is straight, 2 and 3 round the corners off
    loop: bool = False
    through_keys: bool = False  # instead of the B-spline a curve through every key
    before: PathKey | None = None   # from where an open curve through keys came: its direction bends the first tangent
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)    # as that of Cameras

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
    """A path with one key per camera, straight from each to the next; ValueError for a skew, which keys have not."""
    K = to_corner_origin(cameras.K.double().cpu())
    if (K[:, 0, 1].abs() > 1e-6 * K[:, 0, 0]).any():
        raise ValueError(f"a camera path has no place for a skew of {float(K[:, 0, 1].abs().max()):.4g}; save an npz")
    height, width = cameras.size
    aspects = _exact(K[:, 0, 0] / K[:, 1, 1], 1.0)
    shifts = _exact((K[:, :2, 2] - K.new_tensor([width / 2, height / 2])) / height, 0.0)
    keys = tuple(PathKey(c2w[:3], math.degrees(fov), (i + 1) / fps, pixel_aspect=aspect, shift=tuple(shift))
                 for i, (c2w, fov, aspect, shift) in enumerate(
                     zip(cameras.c2w, cameras.fov.tolist(), aspects.tolist(), shifts.tolist(), strict=True)))
    return CameraPath(keys, spline_order=1, origin=cameras.origin)


def _exact(values: Tensor, usual: float) -> Tensor:
    """What differs from the usual value by rounding alone is that value."""
    return torch.where((values - usual).abs() < 1e-6, usual, values)


def evaluate(path: CameraPath, t: Tensor) -> tuple[Tensor, Tensor]:
    """Camera-to-world (T, 4, 4) and vertical field of view (T,) in degrees at the moments t (T,) from 0 to 1.

    Key i has its turn at t = timestamp[i-1] / timestamp[n-2], the first at 0; a loop is back there at 1.
    """
    c2w, lenses = _sample(path, t)
    return c2w.float(), lenses[:, 0].float()


def _sample(path: CameraPath, t: Tensor) -> tuple[Tensor, Tensor]:
    """Camera-to-world (T, 4, 4), and fov, pixel aspect, shift across and down (T, 4), at the moments t (T,); float64."""
    segment, u = _segments(path, t)
    curve = _through_keys if path.through_keys else _b_spline
    q, values = curve(path, segment, u)
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(t), 1, 1)
    c2w[:, :3, :3], c2w[:, :3, 3] = quaternion_to_rotation(q), values[:, :3]
    return c2w, values[:, 3:]


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
    """Quaternions (T, 4), and x, y, z and the lens (T, 7) of the keys at the indices (T,), which may run over the ends."""
    index = index % len(path.keys) if path.loop else index.clamp(0, len(path.keys) - 1)
    c2w = torch.stack([key.c2w for key in path.keys]).double().cpu()
    lenses = torch.tensor([(key.fov, key.pixel_aspect, *key.shift) for key in path.keys], dtype=torch.float64)
    return rotation_to_quaternion(c2w[:, :, :3])[index], torch.cat([c2w[:, :, 3], lenses], 1)[index]


def _b_spline(path: CameraPath, segment: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Quaternions (T, 4) and values (T, 7): weighted means of neighbouring keys."""
    first, weights = _b_spline_weights(path.spline_order, u)
    q, values = torch.zeros(len(u), 4, dtype=u.dtype), torch.zeros(len(u), 7, dtype=u.dtype)
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
    """Quaternions (T, 4) and values (T, 7) on a curve through every key: squad, and Catmull-Rom."""
    (q0, p0), (q1, p1), (q2, p2), (q3, p3) = (_keys_at(path, segment + offset) for offset in (-1, 0, 1, 2))
    if not path.loop:       # beyond the ends the path goes on as it came, unless it is known how it did
        begins, ends = (segment == 0)[:, None], (segment >= len(path.keys) - 2)[:, None]
        came_q, came_p = _product(q1, _product(_inverse(q2), q1)), 2 * p1 - p2
        if path.before is not None:
            came_q, came_p = _came_from(path.before, q1, p1, q2, p2)
        q0, p0 = torch.where(begins, came_q, q0), torch.where(begins, came_p, p0)
        p3 = torch.where(ends, 2 * p2 - p1, p3)
        q3 = torch.where(ends, _product(q2, _product(_inverse(q1), q2)), q3)
    u = u[:, None]
    inner = slerp(_lean(q0, q1, q2), _lean(q1, q2, q3), u)
    return slerp(slerp(q1, q2, u), inner, 2 * u * (1 - u)), _catmull_rom(p0, p1, p2, p3, u)


def _came_from(before: PathKey, q1: Tensor, p1: Tensor, q2: Tensor, p2: Tensor) -> tuple[Tensor, Tensor]:
    """Quaternions (T, 4) and values (T, 7) of a key in the direction of `before`, as far from 1 as 2 is.

    Only the direction counts: a step of a few frames beside a first leg of many, or of none, would make it swing.
    """
    q0, p0 = _keys_at(CameraPath((before,)), torch.zeros(len(q1), dtype=torch.long))
    back = normalize(p0[:, :3] - p1[:, :3], dim=-1) * (p2 - p1)[:, :3].norm(dim=-1, keepdim=True)
    half_turn = normalize(_log(_product(_inverse(q1), q0)), dim=-1) * _log(_product(_inverse(q1), q2)).norm(
        dim=-1, keepdim=True)
    return _product(q1, _exp(half_turn)), torch.cat([p1[:, :3] + back, p0[:, 3:]], 1)


def _catmull_rom(p0: Tensor, p1: Tensor, p2: Tensor, p3: Tensor, u: Tensor) -> Tensor:
    """x, y, z and the lens (T, 7) from p1 to p2 as u (T, 1) goes from 0 to 1."""
    # centripetal in space, which makes no loops where keys are unevenly far apart; the lens has no say in that
    places = torch.stack([p0, p1, p2, p3])[..., :3]
    gaps = places.diff(dim=0).norm(dim=-1, keepdim=True).sqrt()
    widest = gaps.amax(0)
    gaps = torch.where(widest > 0, torch.maximum(gaps, widest / 10), torch.ones_like(gaps)).expand(3, -1, 3)
    before, here, after = torch.cat([gaps, torch.ones_like(p0[:, 3:]).expand(3, -1, -1)], -1)
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


def slerp(a: Tensor, b: Tensor, u: Tensor) -> Tensor:
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
    c2w, _ = _sample(path, dense)
    moments = even_index(motion(c2w, by, scale), frames) / (10 * frames - 1)
    return torch.cat([even[:1], moments[1:-1], even[-1:]])


def path_cameras(path: CameraPath, size: tuple[int, int], frames: int, by: str = "uniform motion",
                 scale: float | None = None, holds: int = 1) -> Cameras:
    """The path as `frames` cameras of this size, which sees as much from top to bottom as the keys say.

    An open B-spline starts and ends at its keys by `holds` repetitions of them. See `resample` for the rest.
    """
    if not (path.loop or by == "time"):
        # only the shape counts then; equal spacing makes sure that no key is left out, whatever its time stamp says
        path = spaced(path, path.duration or 1.0) if path.through_keys or holds == 0 else held(path, holds)
    c2w, lenses = _sample(path, resample(path, frames, by, scale))
    c2w, (fov, pixel_aspect, across, down) = c2w.float(), lenses.float().unbind(1)
    K = torch.eye(3).repeat(frames, 1, 1)
    K[:, 1, 1] = 0.5 * size[0] / torch.tan(torch.deg2rad(fov) / 2)
    K[:, 0, 0] = K[:, 1, 1] * pixel_aspect
    K[:, 0, 2], K[:, 1, 2] = size[1] / 2 + across * size[0], size[0] / 2 + down * size[0]
    return check(Cameras(torch.linalg.inv(c2w), from_corner_origin(K), size, path.origin), "the camera path")


def motion(c2w: Tensor, by: str, scale: float | None) -> Tensor:
    """How much happens in each step (F - 1,), float64."""
    if by not in ("arc length", "uniform motion"):
        raise ValueError(f"motion can be evened by 'arc length' or by 'uniform motion'; found {by!r}")
    travel = c2w[:, :3, 3].double().diff(dim=0).norm(dim=1)
    if by == "arc length":
        return travel
    q = rotation_to_quaternion(c2w[:, :3, :3].double())
    turn = 2 * _log(_product(_inverse(q[:-1]), q[1:])).norm(dim=1)
    if scale is None:       # poses tremble by rounding; below 3 degrees, or a few thousandths, it is nothing to be weighed
        least = TREMBLE * (1 + float(c2w[:, :3, 3].abs().max()))
        scale = max(float(travel.sum()), least) / max(float(turn.sum()), 0.05)
    return turn + (travel / scale if scale > 0 else 0)


def even_index(steps: Tensor, frames: int) -> Tensor:
    """Indices (frames,) into F poses that cut the F - 1 steps between them into equal shares, float64."""
    amount = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    if amount[-1] <= 1e-8:
        return torch.linspace(0, len(steps), frames, dtype=torch.float64)
    wanted = torch.linspace(0, 1, frames, dtype=torch.float64) * amount[-1]
    before = (torch.searchsorted(amount, wanted, right=True) - 1).clamp(0, len(steps) - 1)
    return before + ((wanted - amount[before]) / steps[before].clamp(min=1e-12)).clamp(max=1)
