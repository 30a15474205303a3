"""The surface of a world as triangles: what collides, what other programs open.

Extracted from the signed distances of `tsdf`, in the same axes (OpenCV: x right, y down, z forward) and scene units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from . import tsdf
from .tsdf import BLOCK, VOXELS, Volume, find, fuse, lattice, number_in_block

CLIFF = 0.75  # truncations by which distances of neighbouring voxels may differ, see `extract`; 0.25 if all were exact
SMALLEST = 100  # faces of a piece that is worth keeping
CORNER = 0.02  # vertices keep this share of an edge away from its ends, so that no triangle is a point
EDGES = [
    (a, a | 1 << axis) for axis in range(3) for a in range(8) if not a >> axis & 1
]  # of a cell; corner = x + 2y + 4z


@dataclass(frozen=True)
class Mesh:
    """Triangles in world space."""

    vertices: Tensor  # (V, 3) float32, scene units
    faces: Tensor  # (F, 3) int64, counter-clockwise seen from the free side
    colors: Tensor  # (V, 3) in 0..1

    def __len__(self) -> int:
        """Number of faces."""
        return self.faces.shape[0]

    @property
    def extent(self) -> Tensor:
        """(3,) lengths of the box around it."""
        return self.vertices.amax(0) - self.vertices.amin(0)

    def to(self, device) -> Mesh:
        return Mesh(self.vertices.to(device), self.faces.to(device), self.colors.to(device))

    def only(self, faces: Tensor) -> Mesh:
        """Of the faces only some (F,) bool, and the vertices that they have."""
        used, numbers = torch.unique(self.faces[faces.to(self.faces.device)], return_inverse=True)
        return Mesh(self.vertices[used], numbers, self.colors[used])


def mesh_of(
    views: Iterable[tuple], voxel: float | None = None, smallest: int = SMALLEST, farthest: float = tsdf.FARTHEST
) -> Mesh:
    """`fuse`, then `extract`."""
    return extract(fuse(views, voxel, farthest=farthest), smallest)


def extract(volume: Volume, smallest: int = SMALLEST, on_page: Callable[[int, int], None] = lambda done, total: None) -> Mesh:
    """The surface between free and solid, where voxels on both sides were seen.

    A cell has faces only if all eight voxels at its corners were seen and none of them differ by more than a distance can
    within one voxel (with room for noise): where the edge of what is known behind a surface meets free space, the sign
    changes too, but nothing was measured there. Pieces of fewer than `smallest` faces are left out. ValueError if nothing
    is left. `on_page(done, total)` is called after every 1024 blocks.
    """
    sums = [page[..., :2] for page in volume.pages]
    distance = torch.cat([torch.where(s[..., 1] > 0, s[..., 0] / s[..., 1], torch.nan) for s in sums])
    corners, code = _cells(volume, distance, on_page)
    corner_of, tables = torch.tensor(EDGES, device=code.device), _triangles().to(code.device)
    edges = tables[code]  # (C, T, 3) edges of each cell, -1 beyond the last triangle
    cell, triangle = (edges[..., 0] >= 0).nonzero(as_tuple=True)
    edges = edges[cell, triangle]
    ends = corners[cell[:, None, None], corner_of[edges]]  # (F, 3, 2) voxels
    _, faces = torch.unique(ends[..., 0] * 3 + edges // 4, return_inverse=True)
    count = int(faces.max()) + 1 if len(faces) else 0
    first, second = (ends.new_zeros(count).index_copy_(0, faces.view(-1), ends[..., i].reshape(-1)) for i in (0, 1))
    mesh = _without_crumbs(Mesh(*_vertices(volume, distance.view(-1), first, second, faces)), smallest)
    if not len(mesh):
        raise ValueError(
            f"there is no surface in pieces of {smallest} faces or more; take voxels smaller than {volume.voxel:.3g} scene "
            "units, or keep smaller pieces"
        )
    return mesh


def _cells(volume: Volume, distance: Tensor, on_page: Callable[[int, int], None]) -> tuple[Tensor, Tensor]:
    """Cells that the surface crosses: their corners (C, 8) as voxels, and which of these are solid (C,), a bit each."""
    device = volume.blocks.device
    padded = lattice(BLOCK + 1, device)
    beside = number_in_block(padded // BLOCK)  # which of the neighbours, in a lattice where only 0 and 1 occur
    steps = lattice(2, device)
    neighbours = torch.stack([find(volume.blocks, volume.blocks + step) for step in steps], 1)
    beside = torch.searchsorted(number_in_block(steps), beside)
    inside = number_in_block(padded % BLOCK)
    limit = CLIFF * volume.truncation
    flat = torch.cat([distance.view(-1), distance.new_full((VOXELS,), torch.nan)])  # block -1 was never seen
    shifts = [(c & 1, c >> 1 & 1, c >> 2) for c in range(8)]
    first, second = torch.tensor(EDGES, device=device).unbind(1)
    found = [(neighbours.new_empty(0, 8), neighbours.new_empty(0))]
    pages = neighbours.split(tsdf.PAGE)
    for done, rows in enumerate(pages, 1):
        rows = torch.where(rows < 0, len(distance), rows)
        voxels = (rows[:, beside] * VOXELS + inside).view(-1, *[BLOCK + 1] * 3)
        solid = (flat[voxels] < 0).to(torch.uint8)
        code = sum(solid[:, x : x + BLOCK, y : y + BLOCK, z : z + BLOCK] << c for c, (x, y, z) in enumerate(shifts))
        block, x, y, z = ((code > 0) & (code < 255)).nonzero(as_tuple=True)
        corners = torch.stack([voxels[block, x + dx, y + dy, z + dz] for dx, dy, dz in shifts], 1)
        values = flat[corners]
        steep = ((values[:, first] < 0) != (values[:, second] < 0)) & (
            (values[:, first] - values[:, second]).abs() > limit
        )
        whole = values.isfinite().all(1) & ~steep.any(1)
        found.append((corners[whole], code[block, x, y, z][whole].long()))
        on_page(done, len(pages))
    corners, codes = zip(*found, strict=True)
    return torch.cat(corners), torch.cat(codes)


def _vertices(
    volume: Volume, distance: Tensor, first: Tensor, second: Tensor, faces: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the surface crosses the edges between voxels `first` and `second` (V,), the faces again, and its colours."""
    share = (distance[first] / (distance[first] - distance[second])).clamp(CORNER, 1 - CORNER)[:, None]
    places = lattice(BLOCK, first.device)
    ends = [volume.blocks[v // VOXELS] * BLOCK + places[v % VOXELS] for v in (first, second)]
    vertices = ((ends[0] + (ends[1] - ends[0]) * share.double() + 0.5) * volume.voxel).to(distance)
    colors = distance.new_zeros(len(first), 4)
    for number, page in enumerate(volume.pages):  # never all colours at once
        for voxels, part in ((first, 1 - share), (second, share)):
            here = (voxels // (tsdf.PAGE * VOXELS) == number).nonzero()[:, 0]
            colors[here] += page.view(-1, 6)[voxels[here] - number * tsdf.PAGE * VOXELS, 2:] * part[here]
    return vertices, faces, (colors[:, :3] / colors[:, 3:].clamp_min(1e-30)).clamp(0, 1)


@cache
def _triangles() -> Tensor:
    """(256, T, 3) edges of a cell that each triangle joins, per set of solid corners; -1 beyond the last triangle."""
    found = [[t for loop in _loops(code) for t in _fan(loop)] for code in range(256)]
    most = max(len(triangles) for triangles in found)
    return torch.tensor([triangles + [[-1] * 3] * (most - len(triangles)) for triangles in found])


def _sides() -> list[list[int]]:
    """Corners of the six sides of a cell, clockwise seen from outside."""
    sides = []
    for axis in range(3):
        u, v = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        sides += [[0, u, u | v, v], [c | 1 << axis for c in (0, v, u | v, u)]]
    return sides


def _loops(code: int) -> list[list[int]]:
    """The edges that the surface crosses, in order around each of its pieces, free space to the outside.

    On every side of the cell each run of solid corners is cut off by itself: a rule that knows only that side, so that the
    cell beyond it comes to the same cuts and no crack opens.
    """
    number = {frozenset(edge): i for i, edge in enumerate(EDGES)}
    after = {}
    for side in _sides():
        solid = [code >> c & 1 for c in side]
        for i in range(4):
            if solid[i - 1] or not solid[i]:
                continue
            last = next(j for j in range(i, i + 4) if not solid[(j + 1) % 4])
            into, out = frozenset((side[i - 1], side[i])), frozenset((side[last % 4], side[(last + 1) % 4]))
            after[number[out]] = number[into]
    loops = []
    while after:
        loop = [next(iter(after))]
        while (following := after.pop(loop[-1])) != loop[0]:
            loop.append(following)
        loops.append(loop)
    return loops


def _fan(loop: list[int]) -> list[list[int]]:
    """Triangles of a loop of edges; no diagonal lies in a side of the cell, where the next cell might draw it too."""
    on = [{i for i, side in enumerate(_sides()) if set(edge) <= set(side)} for edge in EDGES]
    for start in range(len(loop)):
        a, *rest = loop[start:] + loop[:start]
        if not any(on[a] & on[b] for b in rest[1:-1]):
            return [[a, b, c] for b, c in zip(rest, rest[1:], strict=False)]
    raise AssertionError(f"the loop {loop} has no fan")


def _without_crumbs(mesh: Mesh, smallest: int) -> Mesh:
    """Without connected pieces of fewer than `smallest` faces, and without vertices of no face."""
    faces = mesh.faces.cpu().numpy()
    count = len(mesh.vertices)
    start, end = faces[:, :2].reshape(-1), faces[:, 1:].reshape(-1)
    graph = coo_matrix((np.ones(len(start), bool), (start, end)), (count, count))
    _, piece = connected_components(graph, directed=False)
    of_face = piece[faces[:, 0]]
    kept = torch.from_numpy(np.bincount(of_face, minlength=1)[of_face] >= smallest).to(mesh.faces.device)
    return mesh.only(kept)


def decimate(mesh: Mesh, faces: int) -> Mesh:
    """The mesh in at most `faces` faces, for collisions; needs `fast-simplification`. Colours are the nearest vertex's."""
    try:
        import fast_simplification
    except ImportError as error:
        raise ImportError("making a mesh smaller needs fast-simplification: pip install fast-simplification") from error
    if faces < 4:
        raise ValueError(f"a mesh of {faces} faces encloses nothing; ask for 4 at least")
    if len(mesh) <= faces:
        return mesh
    vertices = mesh.vertices.cpu().numpy()
    points, triangles = fast_simplification.simplify(
        vertices, mesh.faces.cpu().numpy().astype(np.int32), target_count=faces
    )
    _, nearest = cKDTree(vertices).query(points)
    points, triangles = torch.from_numpy(points).to(mesh.vertices), torch.from_numpy(triangles).to(mesh.faces)
    return Mesh(points, triangles, mesh.colors[torch.from_numpy(nearest).to(mesh.faces.device)])
