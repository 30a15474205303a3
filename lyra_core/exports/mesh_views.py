"""Pictures of a mesh and their depth, from anywhere, also from inside of it.

Every pixel's ray is cut with the triangles that it may meet, and the nearest counts; triangles that reach behind the
camera are cut as well, since a wall may be two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras.camera import Cameras
from .surface import Mesh

NEAREST = 1e-3  # scene units before a camera from which on a surface is seen
EDGE = 1e-5  # of a triangle's sides, so that no ray passes between two
BLOCK = 2**18  # pixels computed at once
FINER = 2  # rays per pixel and side that colours are the mean of


@dataclass(frozen=True)
class Texture:
    """What is painted on a mesh."""

    picture: Tensor  # (H, W, 3) display colours in 0..1
    places: Tensor  # (V, 2) of the vertices on it: 0..1 from the left and from the top


@dataclass(frozen=True)
class Drawn:
    """What each pixel shows."""

    depth: Tensor  # (H, W) along z, scene units; 0 where nothing is
    face: Tensor  # (H, W) its triangle; -1
    weights: Tensor  # (H, W, 3) of that triangle's corners


def draw(mesh: Mesh, camera: Cameras) -> Drawn:
    """The nearest triangle in every pixel of one camera, from both of its sides."""
    height, width = camera.size
    faces, points = _in_sight(mesh, camera)
    # the ray of pixel p meets a + s ab + t ac at depth z: (1 / z, s / z, t / z) = equations @ (p, 1)
    a, across, down = points[:, 0], points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
    normal = torch.linalg.cross(across, down)
    equations = torch.stack([normal, torch.linalg.cross(down, a), torch.linalg.cross(a, across)], 1)
    scale = (normal * a).sum(1)
    flat = scale.abs() > 1e-20  # seen edge on, it is not seen
    equations, faces, points = equations[flat] / scale[flat][:, None, None], faces[flat], points[flat]
    first, sides = _boxes(points, (height, width))
    nearest = torch.zeros(height * width, dtype=equations.dtype, device=equations.device)
    which = torch.full((height * width,), -1, dtype=torch.long, device=equations.device)
    for some, pixel, near in _met(equations, first, sides, width):
        nearest.scatter_reduce_(0, pixel, near, "amax")
        best = near >= nearest[pixel]
        which[pixel[best]] = some[best]
    return _as_drawn(nearest, which, equations, faces, (height, width))


def _in_sight(mesh: Mesh, camera: Cameras) -> tuple[Tensor, Tensor]:
    """Numbers (N,) of the triangles that may be in a picture, and their corners (N, 3, 3) in homogeneous pixels."""
    height, width = camera.size
    matrix = (camera.K[0] @ camera.w2c[0, :3, :3]).double()
    points = mesh.vertices.double() @ matrix.T + camera.K[0].double() @ camera.w2c[0, :3, 3].double()
    x, y, z = points.unbind(1)
    outside = torch.stack([z <= NEAREST, x < -0.5 * z, x > (width - 0.5) * z, y < -0.5 * z, y > (height - 0.5) * z])
    seen = (~outside[:, mesh.faces].all(2).any(0)).nonzero()[:, 0]
    return seen, points[mesh.faces[seen]]


def _boxes(points: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The pixels (columns, rows) that triangles (N, 3, 3) may cover: the first (N, 2) and how many (N, 2)."""
    last = points.new_tensor([size[1] - 1, size[0] - 1])
    whole = (points[..., 2] > NEAREST).all(1)[:, None]  # others reach behind the camera, and may cover anything
    pixels = points[..., :2] / points[..., 2:].clamp_min(NEAREST)
    low = torch.where(whole, pixels.amin(1), 0.0).floor().clamp_min(0)
    high = torch.where(whole, pixels.amax(1), last).ceil()
    return low.long(), (torch.minimum(high, last) - low + 1).clamp_min(0).long()


def _met(equations: Tensor, first: Tensor, sides: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Triangles (M,), pixels (M,) and disparities (M,) of what meets, a block at a time."""
    count = sides.prod(1)
    ends, begin = count.cumsum(0), 0
    while begin < len(count):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(torch.searchsorted(ends, before + BLOCK, right=True)))
        which = torch.repeat_interleave(torch.arange(begin, end, device=count.device), count[begin:end])
        place = torch.arange(len(which), device=count.device) - (ends[which] - count[which] - before)
        row = place // sides[which, 0].clamp_min(1)
        u, v = first[which, 0] + place - row * sides[which, 0], first[which, 1] + row
        near, s, t = _answers(equations[which], u, v)
        edge = EDGE * near
        meets = (near > 0) & (near < 1 / NEAREST) & (s >= -edge) & (t >= -edge) & (s + t <= near + edge)
        yield which[meets], (v * width + u)[meets], near[meets]
        begin = end


def _answers(equations: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (equations @ torch.stack([u, v, torch.ones_like(u)], -1).to(equations)[..., None])[..., 0].unbind(-1)


def _as_drawn(nearest: Tensor, which: Tensor, equations: Tensor, faces: Tensor, size: tuple[int, int]) -> Drawn:
    there = (which >= 0).nonzero()[:, 0]
    weights = torch.zeros(len(which), 3, device=which.device)
    near, s, t = _answers(equations[which[there]], there % size[1], there // size[1])
    s, t = (s / near).clamp(0, 1), (t / near).clamp(0, 1)
    weights[there] = torch.stack([1 - s - t, s, t], -1).float()
    face = torch.full_like(which, -1)
    face[there] = faces[which[there]]
    depth = torch.where(nearest > 0, 1 / nearest.clamp_min(1e-12), 0.0).float()
    return Drawn(depth.view(size), face.view(size), weights.view(*size, 3))


def picture(mesh: Mesh, camera: Cameras, texture: Texture | None = None, background: tuple[float, float, float] = (0, 0, 0)) -> Tensor:
    """What a camera sees (H, W, 3) of a mesh, lit by nothing: its texture, or else the colours of its vertices."""
    fine = camera.resized((FINER * camera.size[0], FINER * camera.size[1]))
    drawn = draw(mesh, fine)
    there = drawn.face >= 0
    values = mesh.colors if texture is None else texture.places
    mixed = (values[mesh.faces[drawn.face[there]]] * drawn.weights[there][..., None]).sum(1)
    colours = mixed if texture is None else _painted(texture, mixed)
    seen = mesh.colors.new_tensor(background).expand(*fine.size, 3).clone()
    seen[there] = colours.to(seen)
    return F.avg_pool2d(seen.movedim(-1, 0)[None], FINER)[0].movedim(0, -1)


def _painted(texture: Texture, places: Tensor) -> Tensor:
    """Colours (N, 3) of a texture at places (N, 2); beyond its borders it begins anew."""
    grid = 2 * (places - places.floor()) - 1
    found = F.grid_sample(
        texture.picture.movedim(-1, 0)[None].float(), grid[None, None].float(), align_corners=False, padding_mode="border"
    )
    return found[0, :, 0].T
