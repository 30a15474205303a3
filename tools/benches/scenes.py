"""A room of which everything is known: its pictures and their depth are traced exactly, from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lyra_core.cameras.camera import Cameras, pinhole, pixel_grid


@dataclass(frozen=True)
class Room:
    """A box seen from inside and boxes that stand in it, each (2, 3): its lowest and highest corner, scene units, y down."""

    walls: Tensor
    things: tuple[Tensor, ...]


def box(*corners: float) -> Tensor:
    return torch.tensor(corners).view(2, 3)


# columns before and behind each other, a table, a cube that hangs in the air
FURNISHED = Room(
    box(-3, -1.5, -1, 3, 1.5, 8),
    (
        box(-1.1, -1.5, 3.2, -0.8, 1.5, 3.5),
        box(1.0, -1.5, 4.4, 1.35, 1.5, 4.75),
        box(-0.3, 0.7, 3.2, 0.7, 1.5, 4.2),
        box(-0.5, -0.9, 5.0, 0.1, -0.3, 5.6),
        box(-2.2, -0.2, 4.6, -1.7, 1.5, 5.1),
    ),
)


def standing(places: Sequence[tuple[float, ...]], size: tuple[int, int] = (480, 832), focal: float = 600.0) -> Cameras:
    """Cameras at places (x, y, z, degrees turned right, down): the last two may be left out."""
    cameras = pinhole(size, focal, len(places))
    for w2c, place in zip(cameras.w2c, places, strict=True):
        yaw, pitch = (math.radians(angle) for angle in (*place[3:], 0.0, 0.0)[:2])
        right = torch.tensor([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
        down = torch.tensor([[1, 0, 0], [0, math.cos(pitch), math.sin(pitch)], [0, -math.sin(pitch), math.cos(pitch)]])
        w2c[:3, :3] = (right @ down).T
        w2c[:3, 3] = -w2c[:3, :3] @ torch.tensor(place[:3], dtype=torch.float32)
    return cameras


def errors(found: Cameras, true: Cameras) -> tuple[float, float]:
    """The largest angle in degrees, and distance in scene units, between cameras that should be the same."""
    turn = (found.w2c[:, :3, :3].double() @ true.w2c[:, :3, :3].double().mT - torch.eye(3)).flatten(1).norm(dim=1)
    angle = torch.rad2deg(2 * torch.arcsin((turn / 8**0.5).clamp(max=1)))
    return float(angle.max()), float((found.centers - true.centers).norm(dim=1).max())


def traced(room: Room, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Pictures (F, H, W, 3) in 0..1 and their depth (F, H, W) along z."""
    pictures, depths = zip(*(_traced(room, camera) for camera in (cameras[i] for i in range(len(cameras)))), strict=True)
    return torch.stack(pictures), torch.stack(depths)


def _traced(room: Room, camera: Cameras) -> tuple[Tensor, Tensor]:
    return seen_along(room, camera.centers[0], (pixel_grid(camera.size) @ camera.K_inverse[0].T) @ camera.c2w[0, :3, :3].T)


def seen_along(room: Room, center: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Colours (H, W, 3) that rays (H, W, 3) from a point meet, and how many of their lengths away (H, W)."""
    depth = _crossings(room.walls, center, rays)[1]
    surface = torch.zeros(depth.shape, dtype=torch.long)
    for number, thing in enumerate(room.things, 1):
        enters, leaves = _crossings(thing, center, rays)
        hit = (enters < leaves) & (enters > 0) & (enters < depth)
        depth, surface = torch.where(hit, enters, depth), torch.where(hit, number, surface)
    return _painted(center + rays * depth[..., None], surface), depth


def _crossings(box: Tensor, center: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays (H, W, 3) enter and leave a box, in their lengths."""
    ends = (box - center)[:, None, None] / torch.where(rays.abs() < 1e-9, 1e-9, rays)
    return ends.amin(0).amax(-1), ends.amax(0).amin(-1)


def _painted(points: Tensor, surface: Tensor) -> Tensor:
    """Colours (H, W, 3) of points (H, W, 3): what belongs to each surface, with a grain that is fine enough to miss."""
    base = torch.tensor([[0.55, 0.5, 0.45], [0.75, 0.35, 0.3], [0.3, 0.45, 0.75], [0.4, 0.65, 0.35], [0.8, 0.7, 0.3]])
    waves = [(2.1, 1.3, 0.7), (5.3, 7.1, 4.9), (19.0, 17.0, 23.0)]
    grain = sum(torch.sin(points @ torch.tensor(wave) + i) / (i + 2) for i, wave in enumerate(waves))
    tiles = torch.sin(9 * points).prod(-1).sign() * 0.08
    return (base[surface % len(base)] + (0.2 * grain + tiles)[..., None]).clamp(0, 1)
