"""What the Gaussian head says of every pixel, as gaussians in the world.

The head answers in units of pixels, of distance and of pixel footprints, so its answer means nothing without cameras
and depth. All formulas are those the weights were trained with, odd ones too: distance goes along the ray, not along z,
and quaternions are read in another order than they are written.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..cameras.camera import (
    Cameras,
    quaternion_to_rotation,
    rotation_to_quaternion,
)
from .gaussians import Gaussians

CHANNELS = (2, 3, 4, 27, 1)  # shift in pixels, sizes, quaternion, spherical harmonics (3, 9), shift of the distance
SMALLEST, LARGEST = 1e-5, 30.0  # standard deviations in FOOTPRINT pixels
FOOTPRINT = 0.1  # of a pixel's width plus its height
BANDS = ((1, 4, 0.025), (4, 9, 0.00625))  # first and last harmonic of degrees 1 and 2, and how much of them counts
AXES = ((1, -1.0), (2, 1.0), (0, -1.0))  # degree 1 of 3DGS files: -y, z, -x


def nearest(depth: Tensor, grid: tuple[int, int]) -> Tensor:
    """Depth (F, H, W) at rows 0, H/h, 2 H/h .. and columns alike, rounded down, not averaged; (F, h, w) for `grid` (h, w)."""
    sides = depth.shape[1:]
    if grid[0] > sides[0] or grid[1] > sides[1]:
        raise ValueError(f"a grid of {grid} gaussians is finer than the depth {tuple(sides)} under it")
    rows, columns = (torch.arange(n, device=depth.device) * side // n for n, side in zip(grid, sides, strict=True))
    return depth[:, rows[:, None], columns]


def from_head(
    raw: Tensor, density: Tensor, depth: Tensor, cameras: Cameras, scale: float = 1.0, largest: float = LARGEST
) -> Gaussians:
    """One gaussian per pixel of the head's grid, N = F h w in the order of views, rows and columns.

    raw (F, h, w, 37) and density (F, h, w) in 0..1: what the head says; depth (F, H, W) in the network's units, of which
    `scale` make one scene unit; cameras: F of any size, in the world. Where depth and its correction add up to a
    distance below zero, the gaussian lies behind the camera with negative scales, as in the reference.
    ValueError if the shapes don't fit each other.
    """
    if raw.ndim != 4 or raw.shape[-1] != sum(CHANNELS):
        raise ValueError(f"the head's answer is {tuple(raw.shape)}, but must be (F, h, w, {sum(CHANNELS)})")
    views, grid = len(raw), tuple(raw.shape[1:3])
    if density.shape != raw.shape[:3] or len(depth) != views or len(cameras) != views:
        raise ValueError(
            f"{views} views of {grid} don't fit density {tuple(density.shape)}, depth {tuple(depth.shape)} "
            f"and {len(cameras)} cameras"
        )
    cameras = cameras.resized(grid)
    shift, sizes, turns, sh, farther = raw.flatten(1, 2).split(CHANNELS, -1)
    distance = (nearest(depth, grid).flatten(1)[..., None] + farther) / scale
    pixel = FOOTPRINT * cameras.K_inverse[:, :2, :2].sum((1, 2))[:, None, None]
    scales = (SMALLEST + (largest - SMALLEST) * sizes.sigmoid()) * distance * pixel
    R = cameras.c2w[:, None, :3, :3]
    return Gaussians(
        _means(shift, distance, cameras).flatten(0, 1),
        _quats(turns, R).flatten(0, 1),
        scales.flatten(0, 1),
        density.flatten(),
        turned_sh(_damped(sh.unflatten(-1, (3, 9)).mT), R).flatten(0, 1),
    )


def _means(shift: Tensor, distance: Tensor, cameras: Cameras) -> Tensor:
    """Points (F, P, 3) at a distance (F, P, 1) on the rays through pixels that are moved by `shift` (F, P, 2)."""
    height, width = cameras.size
    pixel = torch.arange(height * width, device=shift.device)
    u, v = shift[..., 0] + pixel % width, shift[..., 1] + pixel.div(width, rounding_mode="floor")
    rays = torch.stack([u, v, torch.ones_like(u)], -1) @ cameras.K_inverse.mT
    c2w = cameras.c2w
    return torch.nn.functional.normalize(rays, dim=-1) @ c2w[:, :3, :3].mT * distance + c2w[:, None, :3, 3]


def _quats(turns: Tensor, R: Tensor) -> Tensor:
    """Unit quaternions (F, P, 4) as they are stored, of the head's four numbers (F, P, 4).

    It says y, z, w, x of a rotation in the camera; the rotation in the world is stored as x, y, z, w, which every
    renderer takes for w, x, y, z. The weights were trained through that renderer, so this is the right place of each.
    """
    y, z, w, x = turns.unbind(-1)
    return rotation_to_quaternion(R @ quaternion_to_rotation(torch.stack([w, x, y, z], -1)))[..., [1, 2, 3, 0]]


def _damped(sh: Tensor) -> Tensor:
    """Spherical harmonics (..., 9, 3) with the bands above the plain colour as weak as the weights expect."""
    weight = torch.ones_like(sh[..., :1])
    for first, last, share in BANDS:
        weight[..., first:last, :] = share
    return sh * weight


def turned_sh(sh: Tensor, R: Tensor) -> Tensor:
    """Spherical harmonics (..., K, 3) in the order of 3DGS files, of a gaussian turned by R (..., 3, 3); K is 1, 4 or 9."""
    count = sh.shape[-2]
    if count not in (1, 4, 9):
        raise ValueError(f"{count} spherical harmonics can't be turned, only 1, 4 or 9; keep `sh[:, :9]`")
    parts = [sh[..., :1, :]]
    for (first, last, _), matrix in zip(BANDS, (_turn_of_lines, _turn_of_planes), strict=True):
        if last <= count:
            parts.append(matrix(R) @ sh[..., first:last, :])
    return torch.cat(parts, -2)


def _turn_of_lines(R: Tensor) -> Tensor:
    """How the three harmonics of degree 1 mix (..., 3, 3): they are the axes themselves."""
    axes, signs = [axis for axis, _ in AXES], R.new_tensor([sign for _, sign in AXES])
    return R[..., axes, :][..., axes] * signs * signs[:, None]


def _turn_of_planes(R: Tensor) -> Tensor:
    """How the five harmonics of degree 2 mix (..., 5, 5): each is a symmetric form, which turns on both of its sides."""
    forms = _forms().to(R)
    turned = R[..., None, :, :] @ forms @ R[..., None, :, :].mT
    return forms.flatten(1) @ turned.flatten(-2).mT


@cache
def _forms() -> Tensor:
    """xy, -yz, 2zz - xx - yy, -xz and xx - yy as symmetric matrices (5, 3, 3) of length 1."""
    forms = torch.zeros(5, 3, 3, dtype=torch.float64)
    for form, (a, b), sign in ((0, (0, 1), 1), (1, (1, 2), -1), (3, (0, 2), -1)):
        forms[form, a, b] = forms[form, b, a] = sign * 0.5**0.5
    forms[2] = torch.diag(torch.tensor([-1.0, -1.0, 2.0], dtype=torch.float64)) / 6**0.5
    forms[4] = torch.diag(torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)) / 2**0.5
    return forms
