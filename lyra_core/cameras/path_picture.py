"""A camera path as pictures: over the first view, and on a map seen from above."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .camera import Cameras

START, END = (80, 220, 120), (240, 80, 60)  # colours of the first and the last camera
FRUSTA = 9  # how many cameras are drawn as frusta


def over_first_view(image: Tensor, cameras: Cameras, depth: float) -> Tensor:
    """The first camera's picture (H, W, 3) uint8 with the path and frusta drawn in; `depth`: how long a frustum is drawn."""
    canvas = Image.fromarray(image.numpy()).convert("RGB")
    pen = ImageDraw.Draw(canvas, "RGBA")
    eye = cameras[0]
    centers = _to_pixels(cameras.centers, eye)
    for i in range(len(cameras) - 1):
        if centers[i] and centers[i + 1]:
            pen.line([centers[i], centers[i + 1]], fill=_colour(i, len(cameras)), width=3)
    for i in _chosen(len(cameras)):
        outline = [_to_pixels(p[None], eye)[0] for p in _window(cameras[i], depth)]
        if all(outline) and i:
            pen.polygon(outline, outline=(*_colour(i, len(cameras)), 200))
    return _to_tensor(canvas)


def from_above(cameras: Cameras, points: Tensor, colours: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (H, W, 3) uint8, x to the right and z upwards: known points (N, 3) in their colours (N, 3) 0..1, path, frusta."""
    height, width = size
    centers = cameras.centers.cpu()
    everything = torch.cat([centers, points])[:, (0, 2)] if len(points) else centers[:, (0, 2)]
    low, high = (torch.quantile(everything[:: max(1, len(everything) // 100_000)], q, dim=0) for q in (0.02, 0.98))
    low, high = torch.minimum(low, centers[:, (0, 2)].amin(0)), torch.maximum(high, centers[:, (0, 2)].amax(0))
    span = (high - low).clamp_min(1e-3)
    scale = 0.9 * float(min(width / span[0], height / span[1]))
    middle = (low + high) / 2

    def place(p: Tensor) -> Tensor:
        return torch.stack([(p[:, 0] - middle[0]) * scale + width / 2, height / 2 - (p[:, 2] - middle[1]) * scale], 1)

    ground = torch.full((height, width, 3), 24, dtype=torch.uint8)
    if len(points):
        order = points[:, 1].argsort(descending=True)  # y points down: what is higher is drawn later
        u, v = place(points[order]).round().long().unbind(1)
        inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
        ground[v[inside], u[inside]] = (colours[order][inside] * 255).to(torch.uint8)
    canvas = Image.fromarray(ground.numpy())
    pen = ImageDraw.Draw(canvas, "RGBA")
    path = [tuple(p) for p in place(centers).tolist()]
    for i in range(len(path) - 1):
        pen.line([path[i], path[i + 1]], fill=_colour(i, len(path)), width=3)
    reach = 0.08 * float(span.norm())
    for i in _chosen(len(cameras)):
        left, right = place(_window(cameras[i], reach)[[0, 1]]).tolist()
        pen.polygon([path[i], tuple(left), tuple(right)], outline=(*_colour(i, len(path)), 230))
    return _to_tensor(canvas)


def _chosen(count: int) -> list[int]:
    return sorted({round(i) for i in torch.linspace(0, count - 1, min(FRUSTA, count)).tolist()})


def _colour(index: int, count: int) -> tuple[int, int, int]:
    t = index / max(count - 1, 1)
    return tuple(round(a + t * (b - a)) for a, b in zip(START, END, strict=True))


def _window(camera: Cameras, depth: float) -> Tensor:
    """Corners (4, 3) of the picture in the world at `depth`: top left, top right, bottom right, bottom left."""
    height, width = camera.size
    corners = torch.tensor(
        [[0, 0, 1], [width - 1, 0, 1], [width - 1, height - 1, 1], [0, height - 1, 1]], dtype=torch.float32
    )
    local = corners @ torch.linalg.inv(camera.K[0]).T * depth
    return local @ camera.c2w[0, :3, :3].T + camera.centers[0]


def _to_pixels(points: Tensor, camera: Cameras) -> list[tuple[float, float] | None]:
    """Where points appear in a camera, None for those behind it or far outside the picture."""
    local = points @ camera.w2c[0, :3, :3].T + camera.w2c[0, :3, 3]
    u, v, z = (local @ camera.K[0].T).unbind(1)
    reach = 20 * max(camera.size)
    return [
        (float(a / c), float(b / c)) if c > 1e-3 and abs(a / c) < reach and abs(b / c) < reach else None
        for a, b, c in zip(u, v, z, strict=True)
    ]


def _to_tensor(canvas: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(canvas.height, canvas.width, 3)
