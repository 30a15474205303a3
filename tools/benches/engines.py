"""Physics engines on an export: spheres that are dropped, a wheeled body that drives, rays of cameras. Scene units are metres.

MuJoCo takes world.xml, Newton world.usdz. Each is imported where it is used. `python engines.py world.usdz starts.npy done.npz`
drops spheres in Newton: it compiles its kernels in a process of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

RADIUS, ABOVE = 0.05, 0.3  # of a sphere, and how far above the ground it begins
SECONDS, STEPS = 2.0, 240
FALLEN, FAST = 0.8, 0.05  # below the ground; metres a second after that time
WHEEL, AXLE, PACE, AHEAD = 0.08, 0.24, 0.8, 0.35  # of a wheeled body: radius, between the wheels, metres a second, looks ahead
ARRIVED, LOST, SLOWEST = 0.2, 0.15, 4.0  # metres off the goal, off the ground; how often longer than straight on it may take


def dropped_in_mujoco(file: Path, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where spheres that meet all but each other are after SECONDS (N, 3), and how fast (N,)."""
    import mujoco

    bodies = "".join(
        f'<body pos="{x} {y} {z}"><freejoint/><geom type="sphere" size="{RADIUS}" contype="2" conaffinity="1" condim="6" '
        'friction="0.8 0.02 0.02"/></body>'
        for x, y, z in starts
    )
    text = file.read_text().replace("<geom ", '<geom contype="1" conaffinity="2" ')
    model = mujoco.MjModel.from_xml_string(text.replace("</worldbody>", bodies + "</worldbody>"))
    data = mujoco.MjData(model)
    while data.time < SECONDS:
        mujoco.mj_step(model, data)
    return data.xpos[1:].copy(), np.linalg.norm(data.qvel.reshape(-1, 6)[:, :3], axis=1)


def dropped_in_newton(file: Path, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `dropped_in_mujoco`, of a .usdz."""
    import newton
    import warp

    builder = newton.ModelBuilder(up_axis=newton.Axis.Z)
    builder.add_usd(str(file))
    shape = newton.ModelBuilder.ShapeConfig(density=1000.0, mu=0.8, mu_torsional=0.02, mu_rolling=0.02)  # as in MuJoCo
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


def fallen(starts: np.ndarray, where: np.ndarray) -> np.ndarray:
    """(N,) bool: spheres that went through the ground."""
    return starts[:, 2] - ABOVE - where[:, 2] > FALLEN


# -------------------------------------------------------------------------------------------------------- a wheeled body

GLIDING = 'type="sphere" size="0.03" friction="0.01 0.001 0.001" mass="0.1"'
HINGE, TYRE = 'axis="0 1 0" armature="0.003" damping="0.002"', f'type="cylinder" size="{WHEEL} 0.02" euler="90 0 0" mass="0.3"'
ROVER = f"""<body name="rover" pos="{{x}} {{y}} {{z}}" quat="{{w}} 0 0 {{s}}"><freejoint/><geom type="box" size="0.14 0.1 0.03" mass="2"/>
<geom pos="0.11 0 -0.038" {GLIDING}/><geom pos="-0.11 0 -0.038" {GLIDING}/>
<body pos="0 {AXLE / 2} 0"><joint name="left" {HINGE}/><geom {TYRE}/></body>
<body pos="0 -{AXLE / 2} 0"><joint name="right" {HINGE}/><geom {TYRE}/></body></body>"""
MOTOR = '<velocity joint="{}" kv="0.3" forcerange="-0.6 0.6"/>'
MOTORS = f"<actuator>{MOTOR.format('left')}{MOTOR.format('right')}</actuator></mujoco>"


def way(around, start: tuple[int, int], goal: tuple[int, int]) -> np.ndarray:
    """Places (N, 2), x and y in metres, along cells that can be reached, rather away from what is in the way."""
    plan, (rows, columns) = around.ground, around.state.shape
    number = np.arange(rows * columns).reshape(rows, columns)
    from_, to, cost = [], [], []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = (slice(0, rows - down), slice(max(0, -right), columns - max(0, right)))
        there = (slice(down, rows), slice(max(0, right), columns + min(0, right)))
        both = around.reachable[here] & around.reachable[there]
        from_.append(number[here][both])
        to.append(number[there][both])
        cost.append(np.hypot(down, right) * (1 + 0.3 / around.clearance[there][both]))
    count = rows * columns
    graph = coo_matrix((np.concatenate(cost), (np.concatenate(from_), np.concatenate(to))), (count, count)).tocsr()
    before = dijkstra(graph, directed=False, indices=number[start], return_predecessors=True)[1]
    cells = [number[goal]]
    while cells[-1] != number[start]:
        cells.append(before[cells[-1]])
        if cells[-1] < 0:
            raise ValueError(f"no way from cell {start} to {goal}")
    row, column = np.divmod(np.array(cells[::-1]), columns)
    return np.stack(plan.middle_of(row, column), 1)


def driven(file: Path, around, places: list) -> list[str]:
    """Drives from place to place along the map; what went wrong, of each leg: empty if nothing."""
    import mujoco

    first, plan = places[0], around.ground
    x, z, turn = first.position[0], first.position[2], np.pi / 4 - first.heading / 2
    body = ROVER.format(x=x, y=z, z=WHEEL + 0.05 - first.position[1], w=np.cos(turn), s=np.sin(turn))
    text = file.read_text().replace("</worldbody>", body + "</worldbody>").replace("</mujoco>", MOTORS)
    model = mujoco.MjModel.from_xml_string(text)
    model.opt.timestep = 0.004
    data, said = mujoco.MjData(model), []
    rover = data.body("rover")
    for start, goal in zip(places, places[1:], strict=False):
        cells = [tuple(int(i) for i in plan.cells_of(p.position[0], p.position[2])) for p in (start, goal)]
        path = way(around, *cells)
        length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
        until, wrong = data.time + 3 + SLOWEST * length / PACE, ""
        while np.linalg.norm(path[-1] - rover.xpos[:2]) > ARRIVED:
            here = rover.xpos[:2].copy()
            nearest = int(np.argmin(np.linalg.norm(path - here, axis=1)))
            aim = path[min(nearest + max(1, round(AHEAD / plan.cell)), len(path) - 1)] - here
            forward = rover.xmat.reshape(3, 3)[:, 0]
            off = np.arctan2(forward[0] * aim[1] - forward[1] * aim[0], forward[:2] @ aim)
            pace, turning = PACE * max(0.0, np.cos(off)), np.clip(3 * off, -2, 2)
            data.ctrl[:] = (pace - turning * AXLE / 2) / WHEEL, (pace + turning * AXLE / 2) / WHEEL
            for _ in range(10):
                mujoco.mj_step(model, data)
            row, column = (int(i) for i in plan.cells_of(here[0], here[1]))
            over = rover.xpos[2] - WHEEL + plan.height[row, column]
            if not abs(over) < LOST or rover.xmat[8] < 0.8:  # NaN where there is no ground
                wrong = f"left the ground at ({here[0]:.1f}, {here[1]:.1f}): {over:.2f} over it"
                break
            if data.time > until:
                wrong = f"stuck at ({here[0]:.1f}, {here[1]:.1f}), {np.linalg.norm(path[-1] - here):.1f} m from its goal"
                break
        said.append(wrong)
        if wrong:
            break
    return said


if __name__ == "__main__":
    world, begun, result = sys.argv[1:]
    where, speed = dropped_in_newton(Path(world), np.load(begun))
    np.savez(result, where=where, speed=speed)
