"""A surface as convex parts, for engines that take a mesh for its convex hull.

A surface encloses nothing, so each block of it gets a back, a little behind, and the solid between is decomposed by CoACD.
coacd is imported where it is used; nothing else needs it.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .surface import Mesh, decimate

FACES = 6000  # of the surface that is decomposed: finer than a part may be off costs minutes and changes nothing
ACROSS = 12  # blocks at most along the longest side
BLOCK, OFF, THICK = 2.0, 0.1, 0.06  # heights of the eyes: side of a block, how far a part may be off, how far its back is
CORNERS = 32  # of a part, at most
NEEDED = "convex parts need coacd: pip install coacd"


def require() -> ModuleType:
    """coacd; ImportError with the pip command if it is missing."""
    try:
        import coacd
    except ImportError as error:
        raise ImportError(NEEDED) from error
    return coacd


def convex(mesh: Mesh, eyes: float | None = None) -> list[Mesh]:
    """Convex parts of a surface, faces outwards, in its axes and units; they reach behind it and hardly before it.

    eyes: height of the eyes over the floor, by which one tells what is small; None: by the size of the surface.
    """
    coacd = require()
    if not len(mesh):
        return []
    coacd.set_log_level("error")
    longest = float(mesh.extent.max())
    eyes = max(eyes or 0.0, longest / (ACROSS * BLOCK))
    light = decimate(mesh, FACES)
    made = []
    for solid, colour in _solids(light, BLOCK * eyes, THICK * eyes):
        # the solid is closed as it is: coacd's own remeshing would cost most of the time
        found = coacd.run_coacd(
            coacd.Mesh(*solid), threshold=OFF * eyes, real_metric=True, preprocess_mode="off", resolution=1000, mcts_nodes=10,
            mcts_iterations=60, mcts_max_depth=2, decimate=True, max_ch_vertex=CORNERS, seed=0,
        )  # fmt: skip
        made += [_part(points, faces, colour) for points, faces in found if _is_solid(points, 0.1 * THICK * eyes)]
    return made


def _solids(mesh: Mesh, block: float, thick: float):
    """Closed meshes (vertices, faces) of the blocks of a surface, its back `thick` behind it, and the mean colour of each."""
    vertices, faces = mesh.vertices.double().cpu().numpy(), mesh.faces.cpu().numpy()
    corners = vertices[faces]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # to the free side
    blocks = np.unique(np.floor(corners.mean(1) / block), axis=0, return_inverse=True)[1].reshape(-1)
    for number in range(blocks.max() + 1):
        here = (blocks == number).nonzero()[0]
        used, part = np.unique(faces[here], return_inverse=True)
        part, count = part.reshape(-1, 3), len(used)
        normals = np.zeros((count, 3))
        for corner in range(3):
            np.add.at(normals, part[:, corner], across[here])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)
        edges = np.concatenate([part[:, (0, 1)], part[:, (1, 2)], part[:, (2, 0)]])
        both = {tuple(edge) for edge in edges.tolist()}
        a, b = np.array([edge for edge in both if edge[::-1] not in both], np.int64).reshape(-1, 2).T
        sides = [np.stack([b, a, a + count], 1), np.stack([b, a + count, b + count], 1)]
        points = np.concatenate([vertices[used], vertices[used] - thick * normals])
        yield (points, np.concatenate([part, part[:, ::-1] + count, *sides])), mesh.colors[torch.from_numpy(used)].mean(0)


def _is_solid(points: np.ndarray, least: float) -> bool:
    """Whether points (N, 3) are more than a sheet."""
    middle = points - points.mean(0)
    return len(points) > 3 and np.ptp(middle @ np.linalg.svd(middle, full_matrices=False)[2][2]) > least


def _part(points: np.ndarray, faces: np.ndarray, colour: Tensor) -> Mesh:
    middle = points - points.mean(0)
    volumes = np.einsum("fi,fi->f", middle[faces[:, 0]], np.cross(middle[faces[:, 1]], middle[faces[:, 2]]))
    faces = faces if volumes.sum() > 0 else faces[:, ::-1]
    vertices = torch.from_numpy(points.astype(np.float32))
    return Mesh(vertices, torch.from_numpy(faces.astype(np.int64)), colour.expand(len(points), 3))
