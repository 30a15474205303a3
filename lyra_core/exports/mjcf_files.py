"""MuJoCo: the ground as a height field, and what stands on it as convex parts or as boxes.

MuJoCo takes a mesh for its convex hull, so the surface of a room would fill the room. A height field holds the ground as it is,
steps and slopes included. Without convex parts of the rest the occupied cells of the map become boxes, as many cells in one
as fit. In metres, level: z up, x to the right and y ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as xml

import numpy as np
from scipy.ndimage import distance_transform_edt

from .surface import Mesh
from .upright import turned
from .walkable import OCCUPIED, Body, Walkable

BASE = 0.5  # metres of ground under its lowest place


def save(found: Walkable, body: Body, file: Path, metres: float, parts: Sequence[Mesh] | None = None) -> str:
    """Write world.xml; says what is in it. parts: convex ones of all that is no floor, world axes; None: boxes of the map."""
    ground, (rows, columns) = found.ground, found.ground.height.shape
    z = -metres * _everywhere(ground.height)
    low, high = float(z.min()), float(z.max())
    cell = metres * ground.cell
    corner = tuple(metres * value for value in ground.corner)
    root = xml.Element("mujoco", model="world")
    xml.SubElement(root, "option", gravity="0 0 -9.81")
    assets, world = xml.SubElement(root, "asset"), xml.SubElement(root, "worldbody")
    span = max(high - low, 1e-4)
    xml.SubElement(
        assets, "hfield", name="ground", nrow=str(rows), ncol=str(columns),
        size=_numbers((columns - 1) * cell / 2, (rows - 1) * cell / 2, span, BASE),
        # rows from the farthest to the nearest, as a picture has them
        elevation=" ".join(f"{value:.5f}" for value in ((z - low) / span)[::-1].reshape(-1)),
    )  # fmt: skip
    xml.SubElement(world, "light", pos="0 0 10", dir="0 0 -1", directional="true")
    middle = (corner[0] + columns * cell / 2, corner[1] + rows * cell / 2, low)
    xml.SubElement(world, "geom", name="ground", type="hfield", hfield="ground", pos=_numbers(*middle))
    standing = _add_boxes(world, found, z, metres, body) if parts is None else _add_parts(assets, world, found, metres, parts)
    for number, place in enumerate(found.places):
        at = (metres * place.position[0], metres * place.position[2], -metres * place.position[1])
        # MuJoCo's x looks ahead; a heading of 0 looks along y
        turn = (np.cos(np.pi / 4 - place.heading / 2), 0, 0, np.sin(np.pi / 4 - place.heading / 2))
        xml.SubElement(world, "site", name=f"spawn_{number}", pos=_numbers(*at), quat=_numbers(*turn), size="0.05")
    xml.indent(root)
    xml.ElementTree(root).write(file, encoding="unicode")
    return f"ground of {rows}x{columns} cells, {standing}, {len(found.places)} places to begin at"


def _add_boxes(world: xml.Element, found: Walkable, z: np.ndarray, metres: float, body: Body) -> str:
    corner, cell = [metres * value for value in found.ground.corner], metres * found.ground.cell
    boxes = list(_boxes(found.state == OCCUPIED))
    for number, (top, left, bottom, right) in enumerate(boxes):
        below = float(z[top:bottom, left:right].min())
        above = float(z[top:bottom, left:right].max()) + metres * body.height
        sides = ((right - left) * cell / 2, (bottom - top) * cell / 2, (above - below) / 2)
        at = (corner[0] + (left + right) * cell / 2, corner[1] + (top + bottom) * cell / 2, (above + below) / 2)
        xml.SubElement(world, "geom", name=f"part_{number}", type="box", size=_numbers(*sides), pos=_numbers(*at))
    return f"{len(boxes)} boxes"


def _add_parts(assets: xml.Element, world: xml.Element, found: Walkable, metres: float, parts: Sequence[Mesh]) -> str:
    for number, part in enumerate(parts):
        x, y, z = (metres * turned(part, found.ground.level).vertices.double().cpu().numpy()).T
        corners = np.stack([x, z, -y], 1)
        # of a shell, whatever its volume: nothing moves it
        xml.SubElement(assets, "mesh", name=f"part_{number}", vertex=_numbers(*corners.reshape(-1)), inertia="shell")
        xml.SubElement(world, "geom", name=f"part_{number}", type="mesh", mesh=f"part_{number}")
    return f"{len(parts)} convex parts"


def _numbers(*values: float) -> str:
    return " ".join(f"{value:.5f}" for value in values)


def _everywhere(height: np.ndarray) -> np.ndarray:
    """Heights with the nearest ground where there is none: a height field has no holes."""
    where = distance_transform_edt(~np.isfinite(height), return_distances=False, return_indices=True)
    return height[tuple(where)]


def _boxes(occupied: np.ndarray):
    """Rectangles (top, left, bottom, right), ends excluded, that cover the occupied cells once: wide ones, then high."""
    left_over = occupied.copy()
    for row, column in zip(*occupied.nonzero(), strict=True):
        if not left_over[row, column]:
            continue
        right = column
        while right < occupied.shape[1] and left_over[row, right]:
            right += 1
        bottom = row
        while bottom < occupied.shape[0] and left_over[bottom, column:right].all():
            bottom += 1
        left_over[row:bottom, column:right] = False
        yield int(row), int(column), int(bottom), int(right)
