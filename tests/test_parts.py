"""A surface as convex parts: they cover it, leave free what is free, and MuJoCo's rays meet them where the picture has depth."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull
from test_ground import BODY, EYES, room, seen_surface, walk

from lyra_core.cameras.camera import unproject
from lyra_core.exports import mjcf_files, parts, surface, walkable
from lyra_core.exports.ground import ground

pytest.importorskip("coacd", reason="convex parts; pip install coacd")


@pytest.fixture(scope="module")
def world():
    """Cameras, map, surface without its floor, and the parts of that."""
    cameras = walk(3)
    mesh = seen_surface(cameras, voxel=0.15)
    around = walkable.walkable(ground(mesh, cameras), mesh, cameras, BODY)
    light = surface.decimate(mesh, 700)
    rest = light.only(~around.ground.floor_of(light))
    return cameras, around, rest, parts.convex(rest, EYES)


def deep(points: np.ndarray, made: list[surface.Mesh]) -> np.ndarray:
    """How far points (N, 3) are inside of the part they are the deepest in; negative: outside of all."""
    hulls = [ConvexHull(part.vertices.numpy()).equations for part in made]
    return np.max([-(points @ hull[:, :3].T + hull[:, 3]).max(1) for hull in hulls], 0)


def test_parts_cover_the_surface_and_leave_free_what_lies_before_it(world):
    cameras, _, rest, made = world
    middles, off = rest.vertices[rest.faces].mean(1).numpy(), parts.OFF * EYES
    assert (deep(middles, made) > -0.03).mean() > 0.98
    for i in (0, 2):
        seen, center = unproject(room(cameras[i])[None], cameras[i])[0, ::8, ::8].reshape(-1, 3), cameras.centers[i]
        away = (seen - center).norm(dim=1, keepdim=True)
        for share in (0.5, 0.9):
            before = torch.minimum(away * share, away - 1.5 * off)  # of the way to what is seen
            assert (deep((center + (seen - center) / away * before).numpy(), made) > 0).mean() < 0.01
    assert 10 < len(made) < 150 and max(len(part.vertices) for part in made) <= parts.CORNERS
    for part in made:
        inner = part.vertices[part.faces] - part.vertices.mean(0)
        assert float(torch.linalg.det(inner).sum()) > 0  # faces outwards


def test_rays_of_a_camera_meet_ground_and_parts_at_its_depth_in_mujoco(world, tmp_path):
    mujoco = pytest.importorskip("mujoco")
    cameras, around, _, made = world
    assert f"{len(made)} convex parts" in mjcf_files.save(around, BODY, tmp_path / "world.xml", 1.0, made)
    model = mujoco.MjModel.from_xml_path(str(tmp_path / "world.xml"))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    off = []
    for i in range(len(cameras)):
        seen = unproject(room(cameras[i])[None], cameras[i])[0, 4::12, 4::12].reshape(-1, 3).double().numpy()
        center = cameras.centers[i].double().numpy()
        for point in seen:
            eye, way = (np.array([p[0], p[2], -p[1]]) for p in (center, point - center))
            away = np.linalg.norm(way)
            hit = mujoco.mj_ray(model, data, eye, way / away, None, 1, -1, np.zeros(1, np.int32))
            off.append(abs(hit - away) / away if hit > 0 else np.inf)
    off = np.array(off)
    assert len(off) > 400 and np.median(off) < 0.02 and (off < 0.08).mean() > 0.9


def test_without_coacd_one_is_told_what_to_install(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "coacd", None)
    with pytest.raises(ImportError, match="pip install coacd"):
        parts.convex(world[2], EYES)
