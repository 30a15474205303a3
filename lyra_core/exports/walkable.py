"""Where a body can stand and go: a map of the ground, places to begin at, and their files.

A body is an upright cylinder. Cells of the ground plan are free, occupied (something stands there, or the ground jumps by
more than a step) or unknown (no ground). Level axes of the ground, scene units; the files are in metres, x to the right and y
ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt, label

from ..cameras.camera import Cameras
from .ground import STEP, Ground, samples
from .surface import Mesh

FREE, OCCUPIED, UNKNOWN = 0, 100, -1  # as ROS counts
FEW = 3  # points in a body's way that are taken for noise
APART = 4.0  # radii between places to begin at
PLACES = 16
SHADES = {FREE: 254, OCCUPIED: 0, UNKNOWN: 205}  # of a map's picture, as ROS paints it


class NowhereError(ValueError):
    """A body that finds no place to stand; the message says how wide and high it is."""


@dataclass(frozen=True)
class Body:
    """An upright cylinder, scene units."""

    radius: float
    height: float
    step: float | None = None  # the highest that it takes; wheels take little. None: what a person of this height of the eyes does


@dataclass(frozen=True)
class Place:
    """Where a body can begin."""

    position: tuple[float, float, float]  # on the ground, level axes
    heading: float  # radians from z (ahead) towards x (right)
    clearance: float  # to what is nearest, scene units


@dataclass(frozen=True)
class Walkable:
    """A map of the ground plan."""

    ground: Ground
    state: np.ndarray  # (R, C) int8 FREE, OCCUPIED or UNKNOWN
    clearance: np.ndarray  # (R, C) distance of free cells to the nearest that is not
    reachable: np.ndarray  # (R, C) bool: where the body's middle can come to from the path
    places: tuple[Place, ...]  # the clearest first


def walkable(ground: Ground, mesh: Mesh, cameras: Cameras, body: Body, most: int = PLACES) -> Walkable:
    """What a body can do on the ground of a surface (world axes). NowhereError if it can't stand anywhere near the path."""
    mesh, cameras = ground.leveled(mesh, cameras)
    state = _state(ground, samples(mesh, cameras)[0], body)
    clearance = distance_transform_edt(np.pad(state == FREE, 1))[1:-1, 1:-1] * ground.cell
    standing = clearance >= body.radius
    centers = cameras.centers.double().cpu().numpy()
    feet = np.stack(ground.cells_of(centers[:, 0], centers[:, 2]), 1)
    pieces, _ = label(standing)
    row, column = standing.nonzero()
    if not len(row):
        raise NowhereError(
            f"a body {2 * body.radius:.3g} wide and {body.height:.3g} high (scene units) can stand nowhere on the ground; "
            "make it smaller"
        )
    nearest = np.argmin((row[:, None] - feet[:, 0]) ** 2 + (column[:, None] - feet[:, 1]) ** 2, 0)
    own = pieces[row[nearest], column[nearest]]
    reachable = pieces == np.bincount(own).argmax()  # what is next to most of the path
    return Walkable(ground, state, clearance, reachable, tuple(_places(ground, clearance, reachable, cameras, body, most)))


def _state(ground: Ground, points: np.ndarray, body: Body) -> np.ndarray:
    height, (rows, columns) = ground.height, ground.height.shape
    row, column = ground.cells_of(points[:, 0], points[:, 2])
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    row, column, y = row[inside], column[inside], points[inside, 1]
    over = height[row, column] - y  # NaN where there is no ground
    step = STEP * ground.eyes if body.step is None else body.step
    in_the_way = (over > step) & (over < body.height)
    hits = np.zeros(height.shape, np.int64)
    np.add.at(hits, (row[in_the_way], column[in_the_way]), 1)
    jumps = np.zeros(height.shape, bool)
    for axis in (0, 1):
        high = np.abs(np.diff(height, axis=axis)) > step
        pad = [(0, 0), (0, 0)]
        for side in ((0, 1), (1, 0)):
            pad[axis] = side
            jumps |= np.pad(high, pad)
    state = np.where(np.isfinite(height), FREE, UNKNOWN)
    return np.where((hits > FEW) | jumps, OCCUPIED, state).astype(np.int8)


def _places(ground: Ground, clearance: np.ndarray, reachable: np.ndarray, cameras: Cameras, body: Body, most: int):
    """Spread over all that can be reached, the clearest first; each looks as the nearest camera does."""
    centers, ahead = cameras.centers.double().cpu().numpy(), cameras.c2w[:, :3, 2].double().cpu().numpy()
    row, column = (reachable & (clearance >= min(2 * body.radius, clearance[reachable].max()))).nonzero()
    room = clearance[row, column]
    chosen, away = [int(np.argmax(room))], np.full(len(row), np.inf)
    while len(chosen) < most:
        away = np.minimum(away, np.hypot(row - row[chosen[-1]], column - column[chosen[-1]]) * ground.cell)
        if away.max() < APART * body.radius:
            break
        chosen.append(int(np.argmax(away)))
    for i in sorted(chosen, key=lambda i: -room[i]):
        x, z = (float(value) for value in ground.middle_of(row[i], column[i]))
        view = ahead[np.argmin((centers[:, 0] - x) ** 2 + (centers[:, 2] - z) ** 2)]
        yield Place((x, float(ground.height[row[i], column[i]]), z), math.atan2(view[0], view[2]), float(room[i]))


# -------------------------------------------------------------------------------------------------------------- files


def picture(found: Walkable) -> np.ndarray:
    """(R, C, 3) uint8, ahead upwards: free white, reachable green, occupied black, unknown grey; places red."""
    shown = np.full((*found.state.shape, 3), SHADES[UNKNOWN], np.uint8)
    shown[found.state == FREE] = 255
    shown[found.reachable] = (190, 235, 190)
    shown[found.state == OCCUPIED] = 0
    for place in found.places:
        row, column = (int(i) for i in found.ground.cells_of(place.position[0], place.position[2]))
        shown[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = (220, 30, 30)
    return shown[::-1]


def save(found: Walkable, folder: Path, metres: float) -> None:
    """map.pgm and map.yaml for ROS, map.png to look at, map.npz with all numbers; `metres` per scene unit."""
    shades = np.full(found.state.shape, SHADES[UNKNOWN], np.uint8)
    for state in (FREE, OCCUPIED):
        shades[found.state == state] = SHADES[state]
    Image.fromarray(shades[::-1].copy()).save(folder / "map.pgm")
    Image.fromarray(picture(found)).save(folder / "map.png")
    x, z = (metres * value for value in found.ground.corner)
    lines = (
        "image: map.pgm", f"resolution: {metres * found.ground.cell:.6f}", f"origin: [{x:.6f}, {z:.6f}, 0.0]",
        "negate: 0", "occupied_thresh: 0.65", "free_thresh: 0.196", "mode: trinary",
    )  # fmt: skip
    (folder / "map.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    np.savez_compressed(
        folder / "map.npz",
        occupancy=found.state,
        height=(-metres * found.ground.height).astype(np.float32),
        seen=found.ground.seen,
        clearance=(metres * found.clearance).astype(np.float32),
        reachable=found.reachable,
        resolution=metres * found.ground.cell,
        origin=np.array([x, z]),
        places=np.array([[metres * p.position[0], metres * p.position[2], -metres * p.position[1], p.heading] for p in found.places]),
    )
