"""The ground under a path: continued where nobody looked, with a map for robots, for USD and for MuJoCo."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from lyra_core.cameras.camera import Cameras, pinhole, pixel_grid
from lyra_core.exports import mjcf_files, surface, walkable
from lyra_core.exports.ground import NoGroundError, ground, samples
from lyra_core.exports.walkable import FREE, OCCUPIED, UNKNOWN, Body, NowhereError

EYES, CEILING = 1.6, -1.0  # y of floor and ceiling; the cameras stand at 0
STAIRS = ((6.5, 1.4), (7.2, 1.2))  # z from which a step goes on, and its y
BOX = ((0.6, 4.4), (1.2, 5.0), 0.9)  # x and z of its corners, y of its top
BODY, ON_WHEELS = Body(0.25, 1.0), Body(0.25, 1.0, step=0.05)


def room(camera: Cameras, tilt: float = 0.0, floor: bool = True, slope: float = 0.0) -> torch.Tensor:
    """Depth (H, W) of a room 6 wide and 10 long, with a box and two steps.

    tilt: radians about x by which all of it is turned; slope: of the floor alone, downwards ahead.
    """
    turn = torch.tensor([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]])
    rays = (pixel_grid(camera.size) @ torch.linalg.inv(camera.K[0]).T) @ camera.c2w[0, :3, :3].T @ turn.T
    center = turn @ camera.centers[0]
    depth = torch.full(camera.size, torch.inf)

    def plane(axis: int, where: float, *bounds: tuple[int, float, float]) -> None:
        nonlocal depth
        k = (where - center[axis]) / rays[..., axis]
        at = center + k[..., None] * rays
        there = k > 1e-6
        for other, low, high in bounds:
            there &= (at[..., other] >= low) & (at[..., other] <= high)
        depth = torch.where(there & (k < depth), k, depth)

    for axis, low, high in ((0, -3.0, 3.0), (1, CEILING, EYES), (2, -2.0, 8.0)):
        for where in (low, high):
            if (axis, where) != (1, EYES):
                plane(axis, where)
    if floor:
        k = (EYES + slope * center[2] - center[1]) / (rays[..., 1] - slope * rays[..., 2])
        depth = torch.where((k > 1e-6) & (k < depth), k, depth)
        for z, y in STAIRS:
            plane(1, y, (2, z, 8.0), (0, -3.0, 3.0))
            plane(2, z, (1, y, EYES), (0, -3.0, 3.0))
        (left, front), (right, back), top = BOX
        plane(1, top, (0, left, right), (2, front, back))
        for x in (left, right):
            plane(0, x, (1, top, EYES), (2, front, back))
        plane(2, front, (1, top, EYES), (0, left, right))
    return torch.where(depth.isfinite(), depth, 0.0)


def walk(frames: int = 5) -> Cameras:
    cameras = pinhole((120, 208), 0.8 * 208, frames)
    w2c = cameras.w2c.clone()
    w2c[:, 2, 3] = -torch.linspace(0, 1.0, frames)
    return replace(cameras, w2c=w2c)


def seen_surface(cameras: Cameras, voxel: float = 0.08, **options) -> surface.Mesh:
    views = [(torch.full((*cameras.size, 3), 0.5), room(c, **options), c) for c in (cameras[i] for i in range(0, len(cameras), 2))]
    return surface.mesh_of(views, voxel)


@pytest.fixture(scope="module")
def cameras() -> Cameras:
    return walk()


@pytest.fixture(scope="module")
def mesh(cameras) -> surface.Mesh:
    return seen_surface(cameras)


@pytest.fixture(scope="module")
def found(mesh, cameras):
    return ground(mesh, cameras)


@pytest.fixture(scope="module")
def around(found, mesh, cameras) -> walkable.Walkable:
    return walkable.walkable(found, mesh, cameras, BODY)


def at(found, x: float, z: float) -> tuple[int, int]:
    row, column = found.cells_of(np.array([x]), np.array([z]))
    return int(row[0]), int(column[0])


# ------------------------------------------------------------------------------------------------------------- the ground


def test_a_body_finds_ground_where_the_photographer_stood(found, cameras):
    assert found.eyes == pytest.approx(EYES, abs=0.03)
    for x, _, z in cameras.centers.tolist():
        cell = at(found, x, z)
        assert found.invented[cell] and found.height[cell] == pytest.approx(EYES, abs=0.03)


def test_every_camera_looks_down_on_a_triangle(found, mesh, cameras):
    import trimesh

    invented = found.mesh()
    for part, hit in ((invented, True), (mesh, False)):  # the surface alone begins ahead of them
        solid = trimesh.Trimesh(part.vertices.numpy(), part.faces.numpy(), process=False)
        places, rays, faces = solid.ray.intersects_location(cameras.centers.numpy(), np.tile([0.0, 1.0, 0.0], (len(cameras), 1)))
        assert (set(rays) == set(range(len(cameras)))) is hit
    normals = trimesh.Trimesh(invented.vertices.numpy(), invented.faces.numpy(), process=False).face_normals
    assert (normals[:, 1] < 0).all()  # upwards


def test_steps_stay_steps(found):
    for z, y in ((6.2, EYES), (6.85, 1.4), (7.5, 1.2)):
        cell = at(found, -1.0, z)
        assert found.seen[cell] and found.height[cell] == pytest.approx(y, abs=0.04)


def test_no_ground_lies_above_what_was_seen(found, mesh, cameras):
    points = samples(mesh, cameras)[0]
    row, column = found.cells_of(points[:, 0], points[:, 2])
    inside = (row >= 0) & (row < found.height.shape[0]) & (column >= 0) & (column < found.height.shape[1])
    row, column, y = row[inside], column[inside], points[inside, 1]
    unseen = found.invented[row, column]
    assert unseen.any() and (found.height[row, column][unseen] >= y[unseen] - 1e-6).all()
    corners = found.mesh().vertices.numpy()
    row, column = found.cells_of(corners[:, 0] + 1e-4, corners[:, 2] + 1e-4)
    floor = np.pad(found.height, 1, constant_values=np.nan)[row + 1, column + 1]
    known = np.pad(found.seen, 1)[row + 1, column + 1]
    assert known.any() and (corners[known, 1] > floor[known]).all()  # where they overlap it lies under the seen floor


@pytest.mark.parametrize("degrees", [4.0, -25.0])
def test_a_photo_taken_aslant_has_a_level_ground(degrees):
    cameras = walk()
    tilt = math.radians(degrees)
    mesh = seen_surface(cameras, tilt=tilt)
    found = ground(mesh, cameras)
    down = torch.tensor([0.0, math.cos(tilt), -math.sin(tilt)])
    assert math.degrees(math.acos(min(1.0, float(found.level[1] @ down)))) < 0.1
    expected = float(EYES - (cameras.centers @ down).mean())
    assert found.eyes == pytest.approx(expected, abs=0.03)
    _, leveled = found.leveled(mesh, cameras)
    for x, _, z in leveled.centers.tolist():
        assert found.height[at(found, x, z)] == pytest.approx(EYES, abs=0.04)
    beneath = found.mesh().vertices @ down  # the mesh is in the world's own axes
    assert float((beneath - EYES).abs().quantile(0.9)) < 0.05


def test_a_ramp_between_walls_stays_a_ramp():
    cameras, slope = walk(), 0.08
    found = ground(seen_surface(cameras, slope=slope), cameras)
    assert float(found.level[1, 1]) > math.cos(math.radians(0.5))
    for x, _, z in cameras.centers.tolist():
        assert found.height[at(found, x, z)] == pytest.approx(EYES + slope * z, abs=0.06)


def test_faces_of_the_floor_are_those_that_lie_on_it(found, mesh):
    middles = mesh.vertices[mesh.faces].mean(1)
    of_floor = found.floor_of(mesh)
    heights = middles[of_floor][:, 1]
    assert ((heights - EYES).abs() < 0.1).float().mean() > 0.4 and heights.min() > 1.05  # steps are floor too, the box is not
    rest = middles[~of_floor]
    on_floor = (rest[:, 1] - EYES).abs() < 0.02
    assert on_floor.float().mean() < 0.05 and (rest[:, 1] < CEILING + 0.1).any()


def test_a_wider_margin_goes_further(mesh, cameras, found):
    wide = ground(mesh, cameras, margin=2.0)
    assert np.isfinite(wide.height).sum() > 1.3 * np.isfinite(found.height).sum()


def test_a_world_without_a_floor_says_so(cameras):
    with pytest.raises(NoGroundError, match="stand on"):
        ground(seen_surface(cameras, floor=False), cameras)


# ---------------------------------------------------------------------------------------------------------------- the map


def test_what_stands_on_the_floor_is_in_the_way_and_the_ceiling_is_not(around, found):
    front = at(found, 0.9, 4.45)
    rows = slice(front[0] - 2, front[0] + 3)
    assert (around.state[rows, front[1]] == OCCUPIED).any()
    assert around.state[at(found, -1.0, 4.5)] == FREE  # under the ceiling
    assert around.state[0, 0] == UNKNOWN
    assert not around.reachable[around.state == OCCUPIED].any()


def test_places_to_begin_at_are_free_apart_and_within_reach(around, found):
    assert 4 < len(around.places) <= walkable.PLACES
    clearances = [place.clearance for place in around.places]
    assert clearances == sorted(clearances, reverse=True) and clearances[-1] >= BODY.radius
    for number, place in enumerate(around.places):
        cell = at(found, place.position[0], place.position[2])
        assert around.reachable[cell] and place.position[1] == found.height[cell]
        assert place.heading == pytest.approx(0.0, abs=1e-6)  # as the cameras look
        for other in around.places[:number]:
            away = math.hypot(place.position[0] - other.position[0], place.position[2] - other.position[2])
            assert away >= walkable.APART * BODY.radius - found.cell


def test_a_body_that_is_too_wide_finds_no_place(found, mesh, cameras):
    with pytest.raises(NowhereError, match="200 wide"):
        walkable.walkable(found, mesh, cameras, Body(100.0, 1.0))


def test_the_files_of_a_map_say_the_same_in_metres(around, found, tmp_path):
    walkable.save(around, tmp_path, 2.0)
    pixels = np.array(Image.open(tmp_path / "map.pgm"))[::-1]
    assert ((pixels == 0) == (around.state == OCCUPIED)).all() and ((pixels == 254) == (around.state == FREE)).all()
    said = dict(line.split(": ", 1) for line in (tmp_path / "map.yaml").read_text().splitlines())
    assert float(said["resolution"]) == pytest.approx(2 * found.cell, abs=1e-6) and said["image"] == "map.pgm"
    with np.load(tmp_path / "map.npz") as numbers:
        assert (numbers["occupancy"] == around.state).all()
        assert numbers["places"].shape == (len(around.places), 4)
        assert numbers["places"][0, 2] == pytest.approx(-2 * around.places[0].position[1])
    assert Image.open(tmp_path / "map.png").size == (around.state.shape[1], around.state.shape[0])


# --------------------------------------------------------------------------------------------------------------- engines


def test_boxes_cover_what_is_occupied_once(around):
    covered = np.zeros(around.state.shape, int)
    for top, left, bottom, right in mjcf_files._boxes(around.state == OCCUPIED):
        covered[top:bottom, left:right] += 1
    assert (covered == (around.state == OCCUPIED)).all()


def test_the_height_field_holds_the_ground(around, found, tmp_path):
    mjcf_files.save(around, BODY, tmp_path / "world.xml", 1.0)
    root = ElementTree.parse(tmp_path / "world.xml").getroot()
    field, geom = root.find("asset/hfield"), root.find("worldbody/geom[@name='ground']")
    shape = int(field.get("nrow")), int(field.get("ncol"))
    low, span = float(geom.get("pos").split()[2]), float(field.get("size").split()[2])
    heights = low + span * np.array(field.get("elevation").split(), float).reshape(shape)[::-1]
    known = np.isfinite(found.height)
    assert shape == found.height.shape
    assert np.abs(heights + found.height)[known].max() < 1e-3
    assert len(root.findall("worldbody/site")) == len(around.places)


def test_mujoco_has_the_ground_where_it_is(tmp_path):
    mujoco = pytest.importorskip("mujoco")
    cameras = walk()
    mesh = seen_surface(cameras, slope=0.1)
    found = ground(mesh, cameras)
    around = walkable.walkable(found, mesh, cameras, BODY)
    mjcf_files.save(around, BODY, tmp_path / "world.xml", 1.0)
    model = mujoco.MjModel.from_xml_path(str(tmp_path / "world.xml"))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    row, column = around.reachable.nonzero()
    off = []
    for i in range(0, len(row), 97):
        (x,), (z,) = found.middle_of(row[i : i + 1], column[i : i + 1])
        start = np.array([x, z, 10.0])
        away = mujoco.mj_ray(model, data, start, np.array([0.0, 0.0, -1.0]), None, 1, -1, np.zeros(1, np.int32))
        off.append(10.0 - away + found.height[row[i], column[i]])
    assert len(off) > 50 and np.abs(off).max() < 0.05  # a tenth of which is the field's own triangles between cells


@pytest.fixture(scope="module")
def on_wheels(found, mesh, cameras) -> walkable.Walkable:
    """The map for who can't take a step: a ball on the edge of one rolls down, wheels turn over."""
    return walkable.walkable(found, mesh, cameras, ON_WHEELS)


def test_steps_are_in_the_way_of_wheels(around, on_wheels, found):
    above, below = at(found, -1.0, 6.85), at(found, -1.0, 5.5)
    assert around.reachable[above] and around.reachable[below]
    assert on_wheels.reachable[below] and not on_wheels.reachable[above]


@pytest.fixture(scope="module")
def aslant():
    """A world whose photo was taken 12 degrees aslant: cameras, surface and map."""
    cameras = walk()
    mesh = seen_surface(cameras, tilt=math.radians(-12.0))
    return cameras, mesh, walkable.walkable(ground(mesh, cameras), mesh, cameras, ON_WHEELS)


def starts_over(around: walkable.Walkable, above: float, most: int = 200) -> np.ndarray:
    """(N, 3) in metres, z up: over free ground, and over every place to begin at."""
    plan, generator = around.ground, np.random.default_rng(0)
    row, column = (around.clearance > 2 * plan.cell).nonzero()  # a sphere at the border of the ground rolls off it
    some = generator.permutation(len(row))[:most]
    x, z = plan.middle_of(row[some], column[some])
    points = np.stack([x, z, -plan.height[row[some], column[some]]], 1)
    return np.concatenate([points, [(p.position[0], p.position[2], -p.position[1]) for p in around.places]]) + (0, 0, above)


@pytest.mark.parametrize("world", ["on_wheels", "aslant"])
def test_spheres_and_bodies_rest_on_the_ground_in_mujoco(world, engines, request, tmp_path):
    pytest.importorskip("mujoco")
    around = request.getfixturevalue(world)
    around = around[2] if world == "aslant" else around
    mjcf_files.save(around, BODY, tmp_path / "world.xml", 1.0)
    starts = starts_over(around, engines.ABOVE)
    where, speed = engines.dropped_in_mujoco(tmp_path / "world.xml", starts)
    assert not engines.fallen(starts, where).any() and (speed < engines.FAST).all()


def test_spheres_rest_on_the_ground_in_newton(aslant, engines, tmp_path):
    pytest.importorskip("newton", reason="compiles itself for a minute at first; pip install newton newton-usd-schemas")
    from lyra_core.exports import usd_files

    cameras, mesh, around = aslant
    usd_files.save_usdz(tmp_path / "world.usdz", None, surface.decimate(mesh, 3000), cameras, found=around)
    starts = starts_over(around, engines.ABOVE)
    np.save(tmp_path / "starts.npy", starts)
    command = [sys.executable, engines.__file__, *(str(tmp_path / name) for name in ("world.usdz", "starts.npy", "done.npz"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "done.npz") as found:
        assert not engines.fallen(starts, found["where"]).any() and (found["speed"] < engines.FAST).all()


def test_a_wheeled_body_drives_from_place_to_place(on_wheels, engines, tmp_path):
    pytest.importorskip("mujoco")
    mjcf_files.save(on_wheels, ON_WHEELS, tmp_path / "world.xml", 1.0)
    assert engines.driven(tmp_path / "world.xml", on_wheels, list(on_wheels.places)) == [""] * (len(on_wheels.places) - 1)


def test_usd_has_gravity_friction_labels_and_places(aslant, tmp_path):
    pytest.importorskip("pxr")
    from pxr import Usd, UsdGeom, UsdPhysics, UsdSemantics, UsdShade

    from lyra_core.exports import usd_files

    cameras, mesh, around = aslant
    usd_files.save_usdc(tmp_path / "w.usdc", None, mesh, cameras, found=around, metres_per_unit=2.0)
    stage = Usd.Stage.Open(str(tmp_path / "w.usdc"))
    scene = UsdPhysics.Scene.Get(stage, "/physicsScene")
    assert tuple(scene.GetGravityDirectionAttr().Get()) == (0, 0, -1)
    assert scene.GetGravityMagnitudeAttr().Get() == pytest.approx(9.81 / 2)
    labels = {"ground": ("ground", "invented"), "floor": ("ground", "seen"), "collision": ("obstacle", "seen")}
    faces, transforms = 0, UsdGeom.XformCache()
    for name, said in labels.items():
        prim = stage.GetPrimAtPath(f"/World/{name}")
        assert prim.HasAPI(UsdPhysics.CollisionAPI)
        assert prim.GetCustomDataByKey("lyra2:invented") is (True if name == "ground" else None)
        material = UsdShade.MaterialBindingAPI(prim).ComputeBoundMaterial("physics")[0]
        assert UsdPhysics.MaterialAPI(material).GetStaticFrictionAttr().Get() == pytest.approx(0.8)
        for taxonomy, label in zip(("class", "source"), said, strict=True):
            assert list(UsdSemantics.LabelsAPI(prim, taxonomy).GetLabelsAttr().Get()) == [label]
        faces += len(UsdGeom.Mesh(prim).GetFaceVertexCountsAttr().Get())
        if name != "collision":
            matrix = np.array(transforms.GetLocalToWorldTransform(prim))
            points = np.array(UsdGeom.Mesh(prim).GetPointsAttr().Get()) @ matrix[:3, :3]
            assert np.quantile(np.abs(points[:, 2] + EYES), 0.75) < 0.05  # level
    assert faces == len(mesh) + len(around.ground.mesh())
    places = stage.GetPrimAtPath("/World/spawn").GetChildren()
    assert len(places) == len(around.places)
    matrix = transforms.GetLocalToWorldTransform(places[0])
    x, y, z = around.places[0].position
    assert np.allclose(matrix.ExtractTranslation(), (x, z, -y), atol=1e-5)
    up, ahead = matrix.TransformDir((0, 0, 1)), matrix.TransformDir((1, 0, 0))
    assert np.allclose(up, (0, 0, 1), atol=1e-6) and np.allclose(ahead, (0, 1, 0), atol=1e-4)
