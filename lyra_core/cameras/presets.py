"""The reference's camera moves, by name, with its numbers and its oddities (`PRESET_NOTES` names them)."""
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
)

DIRECTIONS = ("left", "right", "up", "down")


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


def poses(R: Tensor, t: Tensor) -> Tensor:
    """World-to-camera (F, 4, 4) of rotations (F, 3, 3) and translations (F, 3)."""
    w2c = torch.eye(4, dtype=R.dtype, device=R.device).repeat(len(R), 1, 1)
    w2c[:, :3, :3], w2c[:, :3, 3] = R, t
    return w2c


def standing(R: Tensor, centers: Tensor) -> Tensor:
    """World-to-camera (F, 4, 4) of rotations (F, 3, 3) and camera centres (F, 3)."""
    return poses(R, -(R @ centers[..., None]).squeeze(-1))


def _at(x: Tensor | float = 0.0, y: Tensor | float = 0.0, z: Tensor | float = 0.0) -> Tensor:
    """Points (F, 3) or one point (3,), of coordinates that are numbers or (F,)."""
    parts = torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float32) for value in (x, y, z)))
    return torch.stack(parts, -1)


def _look(centers: Tensor, target: Tensor) -> Tensor:
    """World-to-camera of cameras at (F, 3) looking at (F, 3) or (3,), level with the world's x-z plane."""
    forward = normalize(target - centers, dim=-1)
    right = normalize(torch.linalg.cross(_at(y=1.0).expand_as(forward), forward), dim=-1)
    return standing(torch.stack([right, torch.linalg.cross(forward, right), forward], 1), centers)


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
    return poses(torch.eye(3).repeat(move.frames, 1, 1), -offset if axis == 0 else offset)


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
        around = poses(around[:, :3, :3], centers)
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
    return poses(R, -(R.mT @ (along[:, None] * R[:, 2])[..., None]).squeeze(-1))


def _rotate_spot(move: Move) -> Tensor:
    return poses(_turn(math.radians(move.strength) * move.side * move.progress), torch.zeros(move.frames, 3))


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
