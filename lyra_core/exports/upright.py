"""Which way is down in a world: photos are taken aslant, and what stands on a floor slides if gravity is the camera's.

Floors are across the vertical and walls along it. The vertical is the direction that most of what was seen agrees to, floors,
ceilings and walls together, so a ramp between walls stays a ramp; of a floor alone it is the floor's own. World axes (OpenCV).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..cameras.camera import Cameras
from .surface import Mesh

FARTHEST = 40.0  # degrees from the cameras' own vertical: further off a wall would do for a floor
GRID = 2.0  # degrees between directions that are tried
NEARLY = 3.0  # degrees by which a floor or a wall may be off
LEVEL_ENOUGH = 0.2  # degrees: nothing rolls on that
PRIOR = 60.0  # degrees: how slowly the cameras' own vertical loses to what was seen
FACES, SEED = 5_000, 0


def level(mesh: Mesh, cameras: Cameras) -> Tensor:
    """Rotation (3, 3) float32 from world axes to level ones, where y is straight down; the identity where it is already.

    The least rotation that does it: what is ahead stays ahead.
    """
    normals, beside = _seen(mesh, cameras)
    prior = -cameras.c2w[:, :3, 1].double().cpu().numpy().mean(0)
    up = _settled(normals, beside, _chosen(normals, beside, prior / np.linalg.norm(prior)))
    if math.degrees(math.acos(min(1.0, -float(up[1])))) < LEVEL_ENOUGH:
        return torch.eye(3)
    return torch.from_numpy(_turn(up, np.array([0.0, -1.0, 0.0]))).float()


def turned(mesh: Mesh, rotation: Tensor) -> Mesh:
    """A mesh in the axes that a rotation (3, 3) leads to."""
    return Mesh(mesh.vertices @ rotation.to(mesh.vertices).T, mesh.faces, mesh.colors)


def turned_cameras(cameras: Cameras, rotation: Tensor) -> Cameras:
    """Cameras in the axes that a rotation (3, 3) leads to."""
    back = torch.eye(4, dtype=cameras.w2c.dtype, device=cameras.w2c.device)
    back[:3, :3] = rotation.to(back).T
    return Cameras(cameras.w2c @ back, cameras.K, cameras.size)


def _seen(mesh: Mesh, cameras: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """Normals (N, 3) of faces, those that look large from the nearest camera more often, and which of them lie how (N, 3) to it."""
    corners = mesh.vertices.double().cpu().numpy()[mesh.faces.cpu().numpy()]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(normals, axis=1)
    places, centers = corners.mean(1), cameras.centers.double().cpu().numpy()
    away, nearest = cKDTree(centers).query(places)
    weights = area / away.clip(max(np.quantile(away, 0.02), 1e-6)) ** 2
    some = np.random.default_rng(SEED).choice(len(area), FACES, p=weights / weights.sum())
    return normals[some] / area[some, None], (places - centers[nearest])[some]


def _votes(normals: np.ndarray, beside: np.ndarray, ups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much each face (U, N) is a floor or ceiling, and how much a wall, if up is each of `ups` (U, 3)."""
    along = np.clip(ups @ normals.T, -1, 1)
    flat = np.degrees(np.arccos(np.abs(along)))
    flat = np.where((along > 0) == (ups @ beside.T < 0), np.exp(-((flat / NEARLY) ** 2)), 0.0)  # a floor is below, a ceiling above
    return flat, np.exp(-((np.degrees(np.arcsin(along)) / NEARLY) ** 2))


def _chosen(normals: np.ndarray, beside: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The direction (3,), among those not far from the prior, that most faces agree to be up."""
    right = np.cross(prior, [0.0, 0.0, 1.0] if abs(prior[2]) < 0.9 else [1.0, 0.0, 0.0])
    right /= np.linalg.norm(right)
    sides = np.stack([right, np.cross(prior, right)])
    steps = np.arange(-FARTHEST, FARTHEST + GRID / 2, GRID)
    tilts = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    tilts = tilts[np.hypot(*tilts.T) <= FARTHEST]
    angle = np.hypot(*tilts.T)
    aside = np.radians(tilts) @ sides
    ups = np.cos(np.radians(angle))[:, None] * prior + np.sinc(angle / 180)[:, None] * aside
    scores = [sum(kind.sum(1) for kind in _votes(normals, beside, part)) for part in np.array_split(ups, len(ups) // 16)]
    return ups[np.argmax(np.concatenate(scores) * np.exp(-((angle / PRIOR) ** 2)))]


def _settled(normals: np.ndarray, beside: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The direction (3,) that is the most along the normals of floors and the most across those of walls, least squares."""
    for _ in range(6):
        (flat,), (upright,) = _votes(normals, beside, up[None])
        pull = (normals * (upright - flat)[:, None]).T @ normals
        best = np.linalg.eigh(pull)[1][:, 0]
        up = best * np.sign(best @ up)
    return up


def _turn(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The least rotation (3, 3) that takes a direction to another, not the opposite one."""
    axis, cosine = np.cross(one, other), float(one @ other)
    across = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + across + across @ across / (1 + cosine)
