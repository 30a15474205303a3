"""Preview worlds of photos in real engines: spheres dropped over free ground, at places to begin at and under the cameras; a
wheeled body that drives from place to place; rays of the cameras against what collides.

Of MuJoCo (`pip install mujoco`) and Newton (`pip install newton newton-usd-schemas`, which compiles itself for a minute at
first), those that are installed. "As seen" is the surface without continued ground.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lyra_core.cameras import trajectory
from lyra_core.cameras.camera import Cameras, unproject
from lyra_core.cameras.presets import preset
from lyra_core.exports import ground, mjcf_files, parts, surface, usd_files, walkable
from lyra_core.splats import gaussians, rasterize
from lyra_core.world import preview
from lyra_core.world.world import begin, to_float

from . import Result, engines
from .photos import SMALL, Photo, photos

SPHERES, FACES = 200, 20_000
BODY = walkable.Body(0.3, 1.0, step=0.05)  # of wheels; scene units, which count as metres
STRIDE = 12  # pixels between rays


@dataclass(frozen=True)
class Scene:
    mesh: surface.Mesh  # what collides, as it is exported
    cameras: Cameras
    around: walkable.Walkable
    splat: gaussians.Gaussians

    def starts(self) -> np.ndarray:
        """(N, 3) in metres, z up: over free ground, at the places, under the cameras."""
        plan, generator = self.around.ground, np.random.default_rng(0)
        row, column = (self.around.clearance > 2 * plan.cell).nonzero()
        some = generator.permutation(len(row))[:SPHERES]
        x, z = plan.middle_of(row[some], column[some])
        points = np.stack([x, z, -plan.height[row[some], column[some]]], 1)
        places = [(p.position[0], p.position[2], -p.position[1]) for p in self.around.places]
        centers = plan.leveled(self.mesh, self.cameras)[1].centers.double().numpy()
        feet = np.stack([centers[:, 0], centers[:, 2], -plan.height[plan.cells_of(centers[:, 0], centers[:, 2])]], 1)
        return np.concatenate([points, places, feet]) + (0, 0, engines.ABOVE)


def scene(photo: Photo) -> Scene:
    path = preset("orbit_horizontal", photo.camera, 17, trajectory.center_depth(photo.depth), "left", 0.15)
    world = preview.explore(begin(photo.image, photo.depth, photo.camera), path, chunk_frames=16)
    views = [(to_float(world.frame(k.frame)), k.depth, k.camera) for k in world.memory.keyframes]
    mesh = surface.mesh_of(views)
    around = walkable.walkable(ground.ground(mesh, world.cameras), mesh, world.cameras, BODY)
    return Scene(surface.decimate(mesh, FACES), world.cameras, around, gaussians.fuse(views))


def in_mujoco(made: Scene, starts: np.ndarray, folder: Path, continued: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where spheres are after two seconds (N, 3), and how fast (N,)."""
    mjcf_files.save(made.around, BODY, folder / "world.xml", 1.0)
    return engines.dropped_in_mujoco(folder / "world.xml", starts)


def in_newton(made: Scene, starts: np.ndarray, folder: Path, continued: bool) -> tuple[np.ndarray, np.ndarray]:
    usd_files.save_usdz(folder / "world.usdz", None, made.mesh, made.cameras, found=made.around if continued else None)
    level = np.eye(3) if continued else made.around.ground.level.double().numpy()  # as seen: in the axes of the photo
    where, speed = engines.dropped_in_newton(folder / "world.usdz", _z_up(_z_down(starts) @ level))
    return _z_up(_z_down(where) @ level.T), speed


def _z_down(points: np.ndarray) -> np.ndarray:
    return np.stack([points[:, 0], -points[:, 2], points[:, 1]], 1)


def _z_up(points: np.ndarray) -> np.ndarray:
    return np.stack([points[:, 0], points[:, 2], -points[:, 1]], 1)


ENGINES: dict[str, tuple[Callable, tuple[bool, ...]]] = {"mujoco": (in_mujoco, (True,)), "newton": (in_newton, (False, True))}


def bench_drop() -> Iterator[Result]:
    for photo in photos(SMALL):
        made = scene(photo)
        yield from _dropped(photo.name, made)
        if find_spec("mujoco"):
            yield _driven(photo.name, made)
        if find_spec("trimesh"):
            yield from _rays(photo.name, made)


def _dropped(photo: str, made: Scene) -> Iterator[Result]:
    starts = made.starts()
    for name, (drop, kinds) in ENGINES.items():
        if find_spec(name) is None:
            yield Result(f"drop: {photo}, {name}", "not measured: not installed")
            continue
        for continued in kinds:
            with tempfile.TemporaryDirectory() as folder:
                where, speed = drop(made, starts, Path(folder), continued)
            fell = engines.fallen(starts, where)
            feet = fell[-len(made.cameras) :]
            said = f"{int(fell.sum())}, {int(feet.sum())} of {len(feet)}, {int((speed[~fell] > engines.FAST).sum())}"
            kind = "continued" if continued else "as seen"
            yield Result(
                f"drop: {photo}, {name}, {kind}: {len(starts)} fallen, at the cameras, fast",
                said,
                *(("none fallen", not fell.any()) if continued else ()),
            )


def _driven(photo: str, made: Scene) -> Result:
    places = list(made.around.places)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "world.xml"
        mjcf_files.save(made.around, BODY, file, 1.0)
        legs = engines.driven(file, made.around, places)
    wrong = [leg for leg in legs if leg]
    said = wrong[0] if wrong else f"{len(legs)} of {len(places) - 1}"
    return Result(f"drop: {photo}, mujoco, wheels from place to place, arrived", said, "all", not wrong)


def _rays(photo: str, made: Scene) -> Iterator[Result]:
    """Against the collision mesh, and against convex parts where coacd is installed."""
    bodies = {"triangles": [made.mesh]}
    if find_spec("coacd"):
        floor, ground_plan = made.around.ground.floor_of(made.mesh), made.around.ground
        bodies["floor and convex parts"] = [made.mesh.only(floor), *parts.convex(made.mesh.only(~floor), ground_plan.eyes)]
    for name, meshes in bodies.items():
        off = np.concatenate([_off(meshes, made, frame) for frame in range(0, len(made.cameras), 4)])
        value = f"{np.median(off):.2%}, {np.mean(off < 0.05):.1%}"
        yield Result(f"drop: {photo}, {name}: rays off the rendered depth, within 5 %", value, "< 5 %", np.median(off) < 0.05)


def _off(meshes: list[surface.Mesh], made: Scene, frame: int) -> np.ndarray:
    """By how much of the rendered depth the first hit of each ray is off it; infinite if it hits nothing."""
    import trimesh

    camera = made.cameras[frame]
    shown = rasterize.render(made.splat, camera, backend="torch")
    depth = shown.depth[0]
    points = unproject(depth[None], camera)[0]
    sure = (depth > 0) & (shown.alpha[0] > 0.9)
    points = points[::STRIDE, ::STRIDE][sure[::STRIDE, ::STRIDE]].double().numpy()
    center = camera.centers[0].double().numpy()
    away = np.linalg.norm(points - center, axis=1)
    solid = trimesh.util.concatenate([trimesh.Trimesh(m.vertices.numpy(), m.faces.numpy(), process=False) for m in meshes])
    rays = (points - center) / away[:, None]
    places, ray, _ = solid.ray.intersects_location(np.broadcast_to(center, rays.shape), rays)
    hit = np.full(len(rays), np.inf)
    np.minimum.at(hit, ray, np.linalg.norm(places - center, axis=1))
    return np.abs(hit - away) / away


BENCHES = {"drop": bench_drop}
