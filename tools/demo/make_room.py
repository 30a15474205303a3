#!/usr/bin/env python3
"""Paints room.png, the picture that the demo walks into when it is given none: a hall whose walls are where the
custom-trajectory workflow's room box has them. With a folder: three photos and a panorama of the whole hall into it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lyra_core.cameras.camera import pinhole, pixel_grid, unproject  # noqa: E402
from lyra_core.cameras.panorama import directions  # noqa: E402
from lyra_core.memory.depth import axes_through, room_box  # noqa: E402

SIZE, FOCAL, DISTANCE = (960, 1664), 1250.44, 6.0
ROOM = ((-2.392, -2.095, -2.0), (2.392, 0.777, DISTANCE))  # what that picture shows, from (0, 0, 0), and as much behind it
PHOTOS = (((0, 0, 0), 0.0), ((0.6, -0.1, 0.3), -0.14), ((1.1, -0.1, 0.6), -0.25))  # where they were taken; radians turned
VANISHING, WALL = (0.5, 0.55), (0.2, 0.1, 0.8, 0.72)


def noise(u, v, frequency: float, seed: int):
    """Smooth value noise in 0..1 at (u, v)."""
    grid = np.random.default_rng(seed).random((64, 64))
    x, y = u * frequency, v * frequency
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - i, y - j
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    g = lambda a, b: grid[a % 64, b % 64]  # noqa: E731
    return (g(i, j) * (1 - fx) + g(i + 1, j) * fx) * (1 - fy) + (g(i, j + 1) * (1 - fx) + g(i + 1, j + 1) * fx) * fy


def turbulence(u, v, frequency: float, seed: int):
    return sum(noise(u, v, frequency * 2**k, seed + k) / 2**k for k in range(5)) / 1.94


def mix(a, b, t):
    return a * (1 - t[..., None]) + np.asarray(b) * t[..., None]


def tone(r, g, b, shape):
    return np.broadcast_to(np.array([r, g, b], float), (*shape, 3)).copy()


def floor(x, z):
    plank = np.floor(x / 0.28)
    along = z + plank * 0.73
    board = np.floor(along / 1.6)
    shade = noise(plank * 7.3, board * 3.1, 1.0, 5)
    grain = turbulence(x * 9, z * 0.9, 2.0, 11)
    colour = mix(mix(tone(0.45, 0.27, 0.14, x.shape), [0.66, 0.43, 0.24], shade), [0.28, 0.15, 0.07], 0.45 * grain)
    gap = np.minimum(np.abs(x / 0.28 - plank), np.abs(along / 1.6 - board) * 5) < 0.03
    rug = np.maximum(np.abs(x) / 1.05, np.abs(z - 3.9) / 1.5)
    colour[gap] *= 0.45
    weave = 0.85 + 0.15 * np.sin(x * 160) * np.sin(z * 160)
    pattern = (np.sin(np.abs(x) * 14) * np.sin((z - 3.9) * 14) > 0.25).astype(float)
    carpet = mix(tone(0.48, 0.09, 0.10, x.shape), [0.80, 0.63, 0.32], 0.75 * pattern) * weave[..., None]
    carpet = mix(carpet, [0.12, 0.13, 0.30], ((rug > 0.82) & (rug < 0.93)).astype(float))
    return np.where((rug < 1)[..., None], carpet, colour)


def wall(along, y, seed: int):
    """A side wall: wainscot below, plaster above, pictures and lamps in between."""
    colour = mix(tone(0.62, 0.60, 0.50, y.shape), [0.50, 0.50, 0.44], turbulence(along, y, 2.5, seed))
    panel = (np.abs((along / 0.8) % 1 - 0.5) < 0.4) & (y > 0.55) & (y < 0.88)
    wood = mix(tone(0.36, 0.22, 0.13, y.shape), [0.24, 0.13, 0.07], turbulence(along * 6, y, 2.0, seed + 3))
    wood = np.where(panel[..., None], wood * 1.25, wood)
    colour = np.where((y > 0.45)[..., None], wood, colour)
    colour[(np.abs(y - 0.45) < 0.025) | (np.abs(y + 1.35) < 0.05)] = [0.72, 0.60, 0.38]
    for number, middle in enumerate(np.arange(2.6, 6.0, 1.15)):
        dx, dy = np.abs(along - middle) / 0.36, np.abs(y + 0.45) / 0.5
        inside, frame = np.maximum(dx, dy) < 1, np.maximum(dx, dy) < 1.16
        t = turbulence(along * 2, y * 2, 2.0, seed + 20 + number)
        hue = np.array([[0.20, 0.36, 0.52], [0.55, 0.38, 0.18], [0.24, 0.42, 0.25], [0.50, 0.22, 0.24]])[(number + seed) % 4]
        canvas = mix(hue * (0.55 + 0.9 * t[..., None]), [0.92, 0.82, 0.62], np.clip(-(y + 0.45) * 1.2, 0, 1) * t)
        colour = np.where(frame[..., None], [0.62, 0.46, 0.20], colour)
        colour = np.where(inside[..., None], canvas, colour)
    return colour


def back(x, y):
    colour = wall(x + 40, y, 9)
    colour = np.where(((y <= 0.45) & (np.abs(y + 0.45) < 0.9))[..., None], tone(0.60, 0.57, 0.47, y.shape), colour)
    for middle in (-1.75, 0.0, 1.75):
        w, top = np.abs(x - middle) / 0.55, y + 0.55
        arch = (w < 1) & (y < 0.35) & (top > -np.sqrt(np.clip(1 - w * w, 0, 1)) * 0.6)
        edge = (w < 1.18) & (y < 0.42) & (top > -np.sqrt(np.clip(1.4 - w * w, 0, 2)) * 0.62)
        sky = mix(tone(0.98, 0.90, 0.74, y.shape), [0.42, 0.66, 0.92], np.clip(0.15 - y, 0, 1))
        hills = y > -0.05 - 0.25 * noise(x + 7, x * 0, 1.4, 31)
        sky = np.where(hills[..., None], mix(tone(0.30, 0.45, 0.33, y.shape), [0.60, 0.66, 0.55], np.clip(0.35 - y, 0, 1)), sky)
        bars = (np.abs(((x - middle) / 0.55 * 1.5) % 1 - 0.5) > 0.46) | (np.abs((y / 0.38) % 1 - 0.5) > 0.46)
        colour = np.where(edge[..., None], [0.76, 0.70, 0.58], colour)
        colour = np.where(arch[..., None], np.where(bars[..., None], [0.33, 0.24, 0.17], sky * 1.35), colour)
    return colour


def ceiling(x, z):
    colour = mix(tone(0.66, 0.62, 0.54, x.shape), [0.56, 0.52, 0.44], turbulence(x, z, 2.0, 60))
    beam = np.abs((z / 0.95) % 1 - 0.5) > 0.36
    wood = mix(tone(0.30, 0.19, 0.11, x.shape), [0.19, 0.11, 0.06], turbulence(x, z * 6, 2.0, 70))
    return np.where(beam[..., None], wood, colour)


def painted(points, behind=-np.inf):
    """The picture of points (H, W, 3) on the room's surfaces, 0..1; behind: z of the wall at its other end."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    left, right, up, down = x.min(), x.max(), y.min(), y.max()
    gaps = np.stack([DISTANCE - z, down - y, x - left, right - x, y - up, z - behind])
    which = gaps.argmin(0)
    y_wall = (y - up) / (down - up) * 2.6 - 1.65          # the walls are drawn 2.6 units high
    ends, sides = (lambda i: back(x[i], y_wall[i])), (lambda seed: lambda i: wall(z[i], y_wall[i], seed))
    surfaces = [ends, lambda i: floor(x[i], z[i]), sides(2), sides(4), lambda i: ceiling(x[i], z[i]), ends]
    colour = np.empty((*x.shape, 3))
    for number, surface in enumerate(surfaces):
        colour[which == number] = surface(which == number)
    light = 0.42 + 0.75 * np.exp(-np.abs(z - 5.2) / 2.6)
    pool = np.exp(-((x - 0.35 * (6 - z)) ** 2) / 0.9) * np.exp(-((z - 4.2) ** 2) / 1.8)
    light = np.where(which == 1, light * (0.8 + 0.75 * pool), light)
    corner = np.sort(gaps, 0)[1]                            # distance to the second nearest surface
    light = light * (0.62 + 0.38 * np.clip(corner / 0.55, 0, 1) ** 0.6)
    picture = np.clip(colour * light[..., None] * [1.06, 1.0, 0.92], 0, None)
    picture = picture / (1 + 0.18 * picture)
    return np.clip(picture, 0, 1) ** 0.9


def seen_along(center, rays):
    """Colours (H, W, 3) in 0..1 that rays (H, W, 3) from a point in the whole room meet, and how many of their lengths away."""
    ends = (np.array(ROOM)[:, None, None] - center) / np.where(np.abs(rays) < 1e-9, 1e-9, rays)
    away = ends.max(0).min(-1)
    return painted((center + rays * away[..., None]).clip(*ROOM), ROOM[0][2]), away


def paint_picture() -> None:
    camera = pinhole(SIZE, FOCAL)
    depth = room_box(SIZE, camera.K[0], VANISHING, WALL, DISTANCE)
    axes = axes_through(camera.K[0], (VANISHING[0] * (SIZE[1] - 1), VANISHING[1] * (SIZE[0] - 1)))[1]
    points = (unproject(depth.depth[None], camera)[0] @ axes.T).numpy().astype(float)
    _image(painted(points)).resize((1280, 738), Image.LANCZOS).save(Path(__file__).with_name("room.png"), optimize=True)


def paint_views(folder: Path) -> None:
    """photo_1.png to photo_3.png on a walk to the right, and panorama.png, of the whole room."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (place, yaw) in enumerate(PHOTOS, 1):
        camera = pinhole((480, 832), 620.0)
        turned = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        rays = (pixel_grid(camera.size) @ camera.K_inverse[0].T).numpy().astype(float) @ turned.T
        _image(seen_along(np.array(place), rays)[0]).save(folder / f"photo_{number}.png")
    _image(seen_along(np.zeros(3), directions((768, 1536)).numpy().astype(float))[0]).save(folder / "panorama.png")


def _image(colours) -> Image.Image:
    return Image.fromarray((colours * 255).astype(np.uint8))


if __name__ == "__main__":
    paint_views(Path(sys.argv[1])) if len(sys.argv) > 1 else paint_picture()
