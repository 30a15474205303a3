"""Views cut out of a panorama: pictures and depth of pinhole cameras that all stand in its middle.

A panorama is equirectangular: twice as wide as high, longitudes across, latitudes down, its middle straight ahead. It has
distances along its rays, views have depth along their axes: depth = distance x cos(angle to the axis).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .camera import Cameras, pinhole, pixel_grid

FEWEST, MOST = 6, 12  # views
STEP = 15  # degrees between the directions among which views are chosen
SHARED = 0.03  # of a view's sides that counts as its border, so that neighbours overlap
SHAPE = 0.01  # by which a panorama may be off twice as wide as high
ONE_SURFACE = 0.05  # relative distance over four pixels that still are one surface
DIRECTIONS = 4000  # of the sphere, by which it is counted how much is seen


def check_panorama(picture: Tensor, what: str = "this panorama") -> Tensor:
    """The picture (H, 2H, ...) itself; ValueError if it is not twice as wide as high."""
    height, width = picture.shape[:2]
    if abs(width / (2 * height) - 1) > SHAPE:
        raise ValueError(
            f"{what} is {width}x{height}; a whole equirectangular panorama is twice as wide as high. A part of one, or a "
            "cylinder, can't be cut into views; a photo begins a world by Lyra 2 Depth"
        )
    return picture


def around(count: int, size: tuple[int, int], horizontal_fov: float, heading: float = 0.0) -> Cameras:
    """`count` cameras at the origin: level ones all around, the first towards `heading`, then up and down what sees most more.

    size (height, width) of each, horizontal_fov and heading in degrees; heading 90 is a quarter to the right. ValueError if
    so few can't look all around.
    """
    level = math.ceil(360 / (horizontal_fov * (1 - 2 * SHARED)))
    if not max(FEWEST, level) <= count <= MOST:
        raise ValueError(
            f"{count} views; choose {max(FEWEST, level)} to {MOST}: {level} of {horizontal_fov:g} degrees look all around"
        )
    one = pinhole(size, 0.5 * size[1] / math.tan(math.radians(horizontal_fov) / 2))
    chosen = [_looking(heading + 360 * i / level, 0.0) for i in range(level)]
    others = [
        _looking(heading + yaw, pitch) for pitch in range(-90, 91, STEP) for yaw in range(0, 360 if abs(pitch) < 90 else 1, STEP)
    ]
    sphere = _spread(DIRECTIONS)
    seen = torch.stack([_in_sight(sphere, Cameras(w2c[None], one.K, size)) for w2c in chosen]).any(0)
    sees = torch.stack([_in_sight(sphere, Cameras(w2c[None], one.K, size)) for w2c in others])
    while len(chosen) < count:
        best = int((sees & ~seen).sum(1).argmax())
        chosen.append(others[best])
        seen |= sees[best]
    return Cameras(torch.stack(chosen), one.K.expand(count, 3, 3).clone(), size)


def coverage(cameras: Cameras) -> float:
    """Which share of all directions cameras in one place see."""
    sphere = _spread(DIRECTIONS)
    return float(torch.stack([_in_sight(sphere, cameras[i], 0.0) for i in range(len(cameras))]).any(0).float().mean())


def _looking(yaw: float, pitch: float) -> Tensor:
    """w2c (4, 4) at the origin, turned right by `yaw` and up by `pitch` degrees."""
    a, b = math.radians(yaw), math.radians(pitch)
    right = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]], dtype=torch.float64)
    up = torch.tensor([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]], dtype=torch.float64)
    w2c = torch.eye(4)
    w2c[:3, :3] = (right @ up).T
    return w2c


def _spread(count: int) -> Tensor:
    """Directions (count, 3), equally dense all around."""
    index = torch.arange(count) + 0.5
    y, turn = 1 - 2 * index / count, index * math.pi * (1 + 5**0.5)
    flat = (1 - y**2).sqrt()
    return torch.stack([flat * torch.cos(turn), y, flat * torch.sin(turn)], -1)


def _in_sight(directions: Tensor, camera: Cameras, border: float = SHARED) -> Tensor:
    """Which directions (N, 3) a camera sees, but for its border."""
    local = directions @ camera.w2c[0, :3, :3].T
    pixels = (local @ camera.K[0].T)[:, :2] / local[:, 2:].clamp_min(1e-6)
    height, width = camera.size
    margin = pixels.new_tensor([width * border, height * border])
    last = pixels.new_tensor([width - 0.5, height - 0.5])
    return (local[:, 2] > 0) & (pixels >= margin - 0.5).all(1) & (pixels <= last - margin).all(1)


# --------------------------------------------------------------------------------------------------------------- distances


def sphere(size: tuple[int, int], radius: float) -> Tensor:
    """Distances (H, W) of a panorama where everything is equally far: sky, a far view."""
    return torch.full(size, float(radius))


def room(size: tuple[int, int], width: float, length: float, height: float, camera_height: float) -> Tensor:
    """Distances (H, W) of a panorama in the middle of a box, straight ahead along its length; scene units.

    ValueError if the camera does not stand between floor and ceiling.
    """
    if not 0 < camera_height < height:
        raise ValueError(f"a camera {camera_height:g} above the floor of a room {height:g} high is outside of it")
    rays = directions(size)
    ends = rays.new_tensor([[-width / 2, camera_height - height, -length / 2], [width / 2, camera_height, length / 2]])
    return (torch.where(rays > 0, ends[1], ends[0]) / torch.where(rays.abs() < 1e-9, 1e-9, rays)).abs().amin(-1)


# ------------------------------------------------------------------------------------------------------------ what is seen


def directions(size: tuple[int, int]) -> Tensor:
    """Unit rays (H, W, 3) of a panorama's pixels, OpenCV axes."""
    height, width = size
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    longitude, latitude = (u / width - 0.5) * 2 * math.pi, (0.5 - v / height) * math.pi
    flat = torch.cos(latitude)
    return torch.stack([flat * torch.sin(longitude), -torch.sin(latitude), flat * torch.cos(longitude)], -1)


def pictures(panorama: Tensor, cameras: Cameras) -> Tensor:
    """What cameras in the middle of a panorama (H, W, C) see of it (F, h, w, C)."""
    panorama = _shrunk(check_panorama(panorama), cameras)
    return torch.stack([_mixed(*_corners(panorama, _places(camera, panorama))) for camera in _each(cameras)])


def depths(distance: Tensor, cameras: Cameras) -> Tensor:
    """Depth (F, h, w) along the axes of cameras in the middle of a panorama of distances (H, W); 0 = unknown in both."""
    check_panorama(distance, "this panorama of distances")
    known = torch.where(torch.isfinite(distance) & (distance > 0), distance, 0.0)
    return torch.stack([_distance_at(known, _places(camera, known)) / _rays(camera).norm(dim=-1) for camera in _each(cameras)])


def _each(cameras: Cameras) -> Iterator[Cameras]:
    return (cameras[i] for i in range(len(cameras)))


def _rays(camera: Cameras) -> Tensor:
    """Rays (h, w, 3) in the world through the pixels, with a depth of 1."""
    return pixel_grid(camera.size) @ camera.K_inverse[0].T @ camera.w2c[0, :3, :3]


def _places(camera: Cameras, panorama: Tensor) -> Tensor:
    """Pixels (h, w, 2) of a panorama that a camera's pixels see; across they may lie beyond its ends."""
    height, width = panorama.shape[:2]
    x, y, z = _rays(camera).double().unbind(-1)
    longitude, latitude = torch.atan2(x, z), torch.atan2(-y, torch.hypot(x, z))
    return torch.stack([(longitude / (2 * math.pi) + 0.5) * width - 0.5, (0.5 - latitude / math.pi) * height - 0.5], -1)


def _corners(values: Tensor, places: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """The four pixels around each place, and how far it lies beyond the first, across and down.

    Beyond the left and right end the panorama goes on at the other one, and beyond a pole on the opposite side.
    """
    height, width = values.shape[:2]
    first = places.floor().long()
    found = []
    for down in (0, 1):
        for across in (0, 1):
            u, v = first[..., 0] + across, first[..., 1] + down
            over = (v < 0) | (v >= height)
            v = torch.where(v < 0, -1 - v, torch.where(v >= height, 2 * height - 1 - v, v))
            found.append(values[v, (u + over * (width // 2)) % width])
    x, y = (places - first).to(values).unbind(-1)
    return found, x, y


def _mixed(corners: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    a, b, c, d = corners
    if a.ndim > x.ndim:
        x, y = x[..., None], y[..., None]
    return (a * (1 - x) + b * x) * (1 - y) + (c * (1 - x) + d * x) * y


def _distance_at(distance: Tensor, places: Tensor) -> Tensor:
    """Distances (h, w) at places: between those around it on one surface, that of the nearest pixel across an edge."""
    corners, x, y = _corners(distance, places)
    every = torch.stack(corners)
    low, high = every.amin(0), every.amax(0)
    smooth = (low > 0) & (high - low < ONE_SURFACE * high)
    # what is plane bends the least as the inverse of its distance
    between = 1 / _mixed([1 / c.clamp_min(1e-12) for c in corners], x, y).clamp_min(1e-12)
    nearest = torch.gather(every, 0, ((x >= 0.5).long() + 2 * (y >= 0.5).long())[None])[0]
    return torch.where(smooth, between, nearest)


def _shrunk(panorama: Tensor, cameras: Cameras) -> Tensor:
    """The panorama (H, W, C) with no more pixels than views can show, so that they don't pick some and skip others."""
    height, width = panorama.shape[:2]
    wanted = 2 * math.pi * float(cameras.K[:, 0, 0].max())  # its width with a view's pixels in the middle
    if wanted >= width:
        return panorama
    size = (max(1, round(wanted / 2)), max(2, round(wanted)))
    return F.interpolate(panorama.movedim(-1, 0)[None], size, mode="area")[0].movedim(0, -1)
