"""The ground under a path: the floor that was seen, continued to where nobody looked down.

A camera sees no floor at its own feet, so the surface of a world begins some way ahead of it and whatever stands where the
photographer stood falls for ever. Here the seen floor becomes a height field over the ground plan, and its holes around the
path are filled: as flat as what lies around them allows, never above anything that was seen.

Level axes: those of the world (OpenCV: y points down, so what is lower has a larger y), turned by `upright.level` so that
gravity is along y, for a photo may be taken aslant. Scene units. Walls and ceilings are not continued.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.ndimage import binary_dilation, distance_transform_edt
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import spsolve
from scipy.spatial import cKDTree
from torch import Tensor

from ..cameras.camera import Cameras
from . import upright
from .surface import Mesh

LEVEL = 0.82  # cosine of the steepest slope that one stands on, 35 degrees
CELLS = 16  # of the ground plan in the height of the eyes
STEP = 0.15  # of the height of the eyes: 25 cm for a person, the highest step that is walked
FLAT = 0.03  # of the height of the eyes by which a floor may be off its plane
GENTLE = 0.47  # steepest slope of the plane that all floors are near to, 25 degrees
ALIKE = 0.12  # by which the slope of a floor may differ from its plane's; the treads of stairs are no ramp
FEW = 20  # cells of floor that are needed
FARTHEST = 10.0  # heights of the eyes around the path that seen floor is of use; further off it is too coarse
TRIALS, SEED = 400, 0
SUNK = 0.01  # of the height of the eyes by which the continued ground lies under the seen one where both are
PULL = 1e-4  # of what is filled towards the plane, beside the pull of its neighbours
INVENTED = (0.85, 0.35, 0.85)  # colour of ground that nobody saw


class NoGroundError(ValueError):
    """A world without a floor that was seen; the message says what was looked for."""


@dataclass(frozen=True)
class Ground:
    """Heights over the ground plan: rows along z, columns along x of the level axes."""

    level: Tensor  # (3, 3) rotation from world axes to the level ones
    corner: tuple[float, float]  # x and z of the plan's first corner
    cell: float  # side of a cell
    height: np.ndarray  # (R, C) y of the ground, NaN where there is none
    seen: np.ndarray  # (R, C) bool: floor that was seen
    eyes: float  # height of the cameras over it, the middle one

    def leveled(self, mesh: Mesh, cameras: Cameras) -> tuple[Mesh, Cameras]:
        """What is in world axes in the level ones."""
        return upright.turned(mesh, self.level), upright.turned_cameras(cameras, self.level)

    def cells_of(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of places; they may lie beside the plan."""
        return (
            np.floor((z - self.corner[1]) / self.cell).astype(np.int64),
            np.floor((x - self.corner[0]) / self.cell).astype(np.int64),
        )

    def middle_of(self, row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x and z of the middle of cells."""
        return self.corner[0] + (column + 0.5) * self.cell, self.corner[1] + (row + 0.5) * self.cell

    @property
    def invented(self) -> np.ndarray:
        """(R, C) bool: ground that nobody saw."""
        return np.isfinite(self.height) & ~self.seen

    def floor_of(self, mesh: Mesh) -> Tensor:
        """(F,) bool: faces of a surface in world axes that are floor which was seen on the plan."""
        corners = upright.turned(mesh, self.level).vertices.double().cpu().numpy()[mesh.faces.cpu().numpy()]
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        x, y, z = corners.mean(1).T
        row, column = self.cells_of(x, z)
        inside = (row >= 0) & (row < self.height.shape[0]) & (column >= 0) & (column < self.height.shape[1])
        row, column = np.where(inside, row, 0), np.where(inside, column, 0)
        near = np.abs(y - self.height[row, column]) < STEP * self.eyes / 2
        level = -normal[:, 1] > LEVEL * np.linalg.norm(normal, axis=1)
        return torch.from_numpy(inside & level & near & self.seen[row, column])

    def mesh(self) -> Mesh:
        """The invented ground in world axes, two triangles a cell, reaching a cell under the seen floor around it; none: no faces."""
        wanted = binary_dilation(self.invented, np.ones((3, 3))) & np.isfinite(self.height)
        rows, columns = self.height.shape
        around = np.full((rows + 2, columns + 2), -np.inf)  # lower is larger
        around[1:-1, 1:-1] = np.where(np.isfinite(self.height), self.height, -np.inf)
        corners = np.max([around[i : i + rows + 1, j : j + columns + 1] for i in (0, 1) for j in (0, 1)], 0)
        corners = corners + SUNK * self.eyes
        z, x = np.meshgrid(np.arange(rows + 1), np.arange(columns + 1), indexing="ij")
        points = np.stack([self.corner[0] + x * self.cell, corners, self.corner[1] + z * self.cell], -1).reshape(-1, 3)
        row, column = wanted.nonzero()
        a = row * (columns + 1) + column
        b, c, d = a + 1, a + columns + 1, a + columns + 2
        faces = np.concatenate([np.stack([a, b, c], 1), np.stack([b, d, c], 1)])  # counter-clockwise seen from above
        used, numbers = np.unique(faces, return_inverse=True)
        vertices = torch.from_numpy(points[used].astype(np.float32)).view(-1, 3)
        made = Mesh(vertices, torch.from_numpy(numbers.reshape(-1, 3)), torch.tensor(INVENTED).expand(len(vertices), 3))
        return upright.turned(made, self.level.T)


def ground(mesh: Mesh, cameras: Cameras, margin: float = 1.0) -> Ground:
    """The ground of a surface, as far as a path goes and `margin` heights of the eyes around it.

    NoGroundError if the surface shows no floor below the cameras.
    """
    level = upright.level(mesh, cameras)
    found = _ground(upright.turned(mesh, level), upright.turned_cameras(cameras, level), margin)
    return replace(found, level=level)


def _ground(mesh: Mesh, cameras: Cameras, margin: float) -> Ground:
    """As `ground`, of what is in level axes."""
    points, slopes = samples(mesh, cameras)
    standable = np.isfinite(slopes[:, 0])
    level = points[standable]
    centers = cameras.centers.double().cpu().numpy()
    plane = _plane(level, slopes[standable], centers)
    below = plane[0] * centers[:, 0] + plane[1] * centers[:, 2] + plane[2] - centers[:, 1]
    eyes = float(np.median(below[below > 0])) if (below > 0).any() else 0.0
    if eyes <= 0:
        raise NoGroundError("the only floor that was seen lies above the cameras; the world may be upside down")
    cell = eyes / CELLS
    floor, path = level[np.abs(_off(level, plane)) < FLAT * eyes][:, (0, 2)], centers[:, (0, 2)]
    gap = cKDTree(floor).query(path)[0].max()
    reach = min(1.1 * gap, 8 * eyes) + margin * eyes
    far = floor[cKDTree(path).query(floor)[0] < FARTHEST * eyes]
    low, high = np.minimum(path.min(0) - reach, far.min(0, initial=np.inf)), np.maximum(path.max(0) + reach, far.max(0, initial=-np.inf))
    corner = low - cell
    columns, rows = np.ceil((high + cell - corner) / cell).astype(int)
    nothing = np.full((rows, columns), np.nan)
    plan = Ground(torch.eye(3), tuple(corner.tolist()), cell, nothing, np.isfinite(nothing), eyes)
    seen = _grown(plan, level, plane)
    if np.isfinite(seen).sum() < FEW:
        raise NoGroundError(f"only {int(np.isfinite(seen).sum())} cells of floor were seen around the path, {FEW} are needed")
    near = _near(plan, centers, reach)
    height = _filled(plan, seen, plane, near)
    height = np.where(np.isfinite(seen), seen, np.where(near, _pushed(plan, height, points), np.nan))
    return replace(plan, height=height, seen=np.isfinite(seen))


def samples(mesh: Mesh, cameras: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) all over a surface, denser than any cell, and how y rises along x and z there; NaN: too steep to stand on."""
    vertices = mesh.vertices.double().cpu().numpy()
    corners = vertices[mesh.faces.cpu().numpy()]
    across, down = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normal = np.cross(across, down)
    area = np.linalg.norm(normal, axis=1) / 2
    level = -normal[:, 1] > LEVEL * 2 * area.clip(1e-12)  # counter-clockwise from above: the normal points up, to smaller y
    slopes = np.where(level[:, None], -normal[:, (0, 2)] / np.where(level, normal[:, 1], 1)[:, None], np.nan)
    extent = np.quantile(vertices[:, 1], 0.98) - np.quantile(cameras.centers[:, 1].cpu().numpy(), 0.5)
    spacing = max(abs(float(extent)), 1e-6) / (2 * CELLS)
    count = np.clip(np.ceil(area / spacing**2), 1, 400).astype(np.int64)
    face = np.repeat(np.arange(len(corners)), count)
    u, v = np.random.default_rng(SEED).random((2, len(face)))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    return corners[face, 0] + u[:, None] * across[face] + v[:, None] * down[face], slopes[face]


def _plane(points: np.ndarray, slopes: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """y = a x + b z + c near to which most of what one could stand on below the cameras lies; what is near them counts more."""
    if len(points):
        away, nearest = cKDTree(centers[:, (0, 2)]).query(points[:, (0, 2)])
        below = points[:, 1] > centers[nearest, 1]
        points, slopes, away = points[below], slopes[below], away[below]
    if len(points) < FEW:
        raise NoGroundError("nothing that one could stand on was seen below the cameras")
    generator = np.random.default_rng(SEED)
    weights = 1 / away.clip(max(np.quantile(away, 0.05), 1e-6)) ** 4
    chosen = generator.choice(len(points), 4000, p=weights / weights.sum())
    some, slopes = points[chosen], slopes[chosen]
    best, most = None, -1
    for number in range(TRIALS):
        plane = _through(some[number : number + 1], slopes[number : number + 1])
        for _ in range(2):
            agree = _agree(some, slopes, plane, centers)
            if not agree.any():
                break
            plane = _through(some[agree], slopes[agree])
        if agree.sum() > most:
            best, most = plane, int(agree.sum())
    if most < FEW:
        raise NoGroundError("what one could stand on lies in no plane that is flatter than 25 degrees")
    return best


def _through(points: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """The plane of the middle slope of some points, at their middle height: what a ramp of single treads is not."""
    a, b = np.median(slopes, 0)
    return np.array([a, b, np.median(points[:, 1] - a * points[:, 0] - b * points[:, 2])])


def _agree(points: np.ndarray, slopes: np.ndarray, plane: np.ndarray, centers: np.ndarray) -> np.ndarray:
    height = np.median(plane[0] * centers[:, 0] + plane[1] * centers[:, 2] + plane[2] - centers[:, 1])
    if height <= 0 or np.hypot(*plane[:2]) > GENTLE:
        return np.zeros(len(points), bool)
    return (np.abs(_off(points, plane)) < FLAT * height) & (np.abs(slopes - plane[:2]) < ALIKE).all(1)


def _off(points: np.ndarray, plane: np.ndarray) -> np.ndarray:
    return points[:, 1] - (plane[0] * points[:, 0] + plane[1] * points[:, 2] + plane[2])


def _grown(plan: Ground, points: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """(R, C) heights of seen floor: what lies in the plane, and whatever is a step away from floor."""
    rows, columns = plan.height.shape
    row, column = plan.cells_of(points[:, 0], points[:, 2])
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    points, cell = points[inside], (row * columns + column)[inside]
    step = STEP * plan.eyes
    # the levels of a cell: heights a third of a step apart
    level = np.floor(points[:, 1] / (step / 3)).astype(np.int64)
    keys, numbers = np.unique(np.stack([cell, level], 1), axis=0, return_inverse=True)
    heights = np.bincount(numbers.reshape(-1), points[:, 1]) / np.bincount(numbers.reshape(-1))
    levels: dict[int, list[float]] = {}
    for (where, _), height in zip(keys.tolist(), heights.tolist(), strict=True):
        levels.setdefault(where, []).append(height)
    found = np.full(rows * columns, np.nan)
    waiting: deque[int] = deque()
    for where, choices in levels.items():
        x, z = plan.middle_of(where // columns, where % columns)
        flat = plane[0] * x + plane[1] * z + plane[2]
        nearest = min(choices, key=lambda y, flat=flat: abs(y - flat))
        if abs(nearest - flat) < FLAT * plan.eyes:
            found[where] = nearest
            waiting.append(where)
    while waiting:
        where = waiting.popleft()
        column = where % columns
        beside = [where - columns, where + columns]
        beside += [where - 1] if column else []
        beside += [where + 1] if column < columns - 1 else []
        for other in beside:
            if other in levels and np.isnan(found[other]):
                nearest = min(levels[other], key=lambda y, here=found[where]: abs(y - here))
                if abs(nearest - found[where]) <= step:
                    found[other] = nearest
                    waiting.append(other)
    return _closed(found.reshape(rows, columns))


def _closed(height: np.ndarray) -> np.ndarray:
    """Heights (R, C) with cells between four neighbours of floor: samples are random and leave out some."""
    around = np.pad(height, 1, constant_values=np.nan)
    between = (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]) / 4
    return np.where(np.isnan(height), between, height)


def _near(plan: Ground, centers: np.ndarray, reach: float) -> np.ndarray:
    """(R, C) bool: within reach of the path's feet."""
    path = np.zeros(plan.height.shape, bool)
    path[plan.cells_of(centers[:, 0], centers[:, 2])] = True
    return distance_transform_edt(~path) * plan.cell <= reach


def _filled(plan: Ground, seen: np.ndarray, plane: np.ndarray, near: np.ndarray) -> np.ndarray:
    """(R, C) heights, the seen ones unchanged: between them as smooth as they allow, far from them the plane."""
    rows, columns = seen.shape
    row, column = np.indices(seen.shape)
    x, z = plan.middle_of(row, column)
    flat = plane[0] * x + plane[1] * z + plane[2]
    known = np.isfinite(seen)
    height = np.where(known, seen, flat)
    unknown = near & ~known
    if not unknown.any():
        return height
    number = np.full(seen.shape, -1)
    number[unknown] = np.arange(unknown.sum())
    diagonal, value = np.full(unknown.sum(), PULL), PULL * flat[unknown]
    entries = []
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        inside = np.ones(seen.shape, bool)
        inside[(slice(None),) * axis + (-1 if shift == 1 else 0,)] = False
        here = unknown & inside
        there = np.roll(here, shift, axis)
        mine, other = number[here], number[there]
        diagonal[mine] += 1
        free = other >= 0
        entries.append((mine[free], other[free]))
        np.add.at(value, mine[~free], height[there][~free])
    i, j = (np.concatenate(part) for part in zip(*entries, strict=True))
    everywhere = np.arange(len(value))
    matrix = coo_matrix(
        (np.concatenate([diagonal, -np.ones(len(i))]), (np.concatenate([everywhere, i]), np.concatenate([everywhere, j])))
    ).tocsc()
    height[unknown] = spsolve(matrix, value)
    return height


def _pushed(plan: Ground, height: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Heights that lie under whatever was seen in the same cell."""
    row, column = plan.cells_of(points[:, 0], points[:, 2])
    inside = (row >= 0) & (row < height.shape[0]) & (column >= 0) & (column < height.shape[1])
    lowest = np.full(height.shape, -np.inf)
    np.maximum.at(lowest, (row[inside], column[inside]), points[inside, 1])
    return np.maximum(height, lowest)
