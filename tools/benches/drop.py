"""Spheres dropped into preview worlds of photos, in real engines: over free ground, at places to begin at, and under the cameras.

Of MuJoCo (`pip install mujoco`) and Newton (`pip install newton newton-usd-schemas`, which compiles for minutes at first), those
that are installed. "As seen" is the surface without continued ground.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lyra_core.cameras import trajectory
from lyra_core.cameras.presets import preset
from lyra_core.exports import ground, mjcf_files, surface, usd_files, walkable
from lyra_core.world import preview
from lyra_core.world.world import begin, to_float

from . import Result
from .photos import SMALL, Photo, photos

SPHERES, RADIUS, ABOVE = 200, 0.05, 0.3  # scene units, which count as metres
SECONDS, STEPS = 2.0, 240
FALLEN, FAST = 0.8, 0.05  # below the ground; metres a second after that time
BODY = walkable.Body(0.3, 1.0)


@dataclass(frozen=True)
class Scene:
    mesh: surface.Mesh
    cameras: object
    around: walkable.Walkable

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
        return np.concatenate([points, places, feet]) + (0, 0, ABOVE)


def scene(photo: Photo) -> Scene:
    path = preset("orbit_horizontal", photo.camera, 17, trajectory.center_depth(photo.depth), "left", 0.15)
    world = preview.explore(begin(photo.image, photo.depth, photo.camera), path, chunk_frames=16)
    mesh = surface.mesh_of((to_float(world.frame(k.frame)), k.depth, k.camera) for k in world.memory.keyframes)
    return Scene(mesh, world.cameras, walkable.walkable(ground.ground(mesh, world.cameras), mesh, world.cameras, BODY))


def in_mujoco(made: Scene, starts: np.ndarray, folder: Path, continued: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where spheres are after two seconds (N, 3), and how fast (N,)."""
    import mujoco

    mjcf_files.save(made.around, BODY, folder / "world.xml", 1.0)
    bodies = "".join(
        f'<body pos="{x} {y} {z}"><freejoint/><geom type="sphere" size="{RADIUS}" contype="2" conaffinity="1" condim="6" '
        'friction="0.8 0.02 0.02"/></body>'
        for x, y, z in starts
    )
    text = (folder / "world.xml").read_text().replace("<geom ", '<geom contype="1" conaffinity="2" ')
    model = mujoco.MjModel.from_xml_string(text.replace("</worldbody>", bodies + "</worldbody>"))
    data = mujoco.MjData(model)
    while data.time < SECONDS:
        mujoco.mj_step(model, data)
    return data.xpos[1:].copy(), np.linalg.norm(data.qvel.reshape(-1, 6)[:, :3], axis=1)


def in_newton(made: Scene, starts: np.ndarray, folder: Path, continued: bool) -> tuple[np.ndarray, np.ndarray]:
    import newton
    import warp

    usd_files.save_usdz(folder / "world.usdz", None, made.mesh, made.cameras, found=made.around if continued else None)
    builder = newton.ModelBuilder(up_axis=newton.Axis.Z)
    builder.add_usd(str(folder / "world.usdz"))
    shape = newton.ModelBuilder.ShapeConfig(density=1000.0, mu=0.8)
    shape.collision_group = -2  # with everything but each other
    for start in starts:
        body = builder.add_body(xform=warp.transform(warp.vec3(*map(float, start)), warp.quat_identity()))
        builder.add_shape_sphere(body, radius=RADIUS, cfg=shape)
    model = builder.finalize(device="cpu")
    solver, state, after = newton.solvers.SolverXPBD(model, iterations=4), model.state(), model.state()
    for _ in range(round(SECONDS * STEPS)):
        state.clear_forces()
        solver.step(state, after, model.control(), model.collide(state), 1 / STEPS)
        state, after = after, state
    return state.body_q.numpy()[:, :3], np.linalg.norm(state.body_qd.numpy()[:, :3], axis=1)


ENGINES: dict[str, tuple[Callable, tuple[bool, ...]]] = {"mujoco": (in_mujoco, (True,)), "newton": (in_newton, (False, True))}


def bench_drop() -> Iterator[Result]:
    for photo in photos(SMALL):
        made = scene(photo)
        starts = made.starts()
        for name, (drop, kinds) in ENGINES.items():
            if find_spec(name) is None:
                yield Result(f"drop: {photo.name}, {name}", "not measured: not installed")
                continue
            for continued in kinds:
                with tempfile.TemporaryDirectory() as folder:
                    where, speed = drop(made, starts, Path(folder), continued)
                fallen = starts[:, 2] - ABOVE - where[:, 2] > FALLEN
                feet = fallen[-len(made.cameras) :]
                said = f"{int(fallen.sum())}, {int(feet.sum())} of {len(feet)}, {int((speed[~fallen] > FAST).sum())}"
                kind = "continued" if continued else "as seen"
                yield Result(
                    f"drop: {photo.name}, {name}, {kind}: {len(starts)} fallen, at the cameras, fast",
                    said,
                    *(("none fallen", not fallen.any()) if continued else ()),
                )


BENCHES = {"drop": bench_drop}
