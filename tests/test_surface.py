"""The surface of a room whose every point is known: where the mesh lies, which way it faces, and where it ends."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, join, pinhole, pixel_grid, project, unproject
from lyra_core.exports import surface, tsdf
from lyra_core.exports.surface import Mesh, decimate, extract, mesh_of
from lyra_core.exports.tsdf import Volume, coarser, fuse
from lyra_core.memory.depth import depth_map
from lyra_core.world.world import append, begin, plan

SIZE, FOCAL = (96, 128), 80.0
LOW, HIGH = torch.tensor([-3.05, -1.43, -2.57]), torch.tensor([3.11, 1.37, 4.23])  # of the room; y is down
PILLAR = torch.tensor([0.83, -0.31, 1.57]), torch.tensor([1.71, 1.37, 2.43])  # stands on its floor
VOXEL = 0.08
VIEWS = 14


# ------------------------------------------------------------------------------------------------------------- the truth


def look(center, yaw: float = 0.0, pitch: float = 0.0, size=SIZE, focal: float = FOCAL) -> Cameras:
    """One camera that looks along z, turned to the right by `yaw` and then up by `pitch`."""
    a, b, c, d = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    R = torch.tensor([[a, 0, b], [0, 1, 0], [-b, 0, a]]) @ torch.tensor([[1, 0, 0], [0, c, -d], [0, d, c]])
    c2w = torch.eye(4)
    c2w[:3, :3], c2w[:3, 3] = R, torch.tensor(center)
    return Cameras(torch.linalg.inv(c2w)[None], pinhole(size, focal).K, size)


def cameras_inside(count: int = VIEWS, **picture) -> list[Cameras]:
    turn = 2 * math.pi / count
    return [
        look(
            (1.2 * math.cos(turn * i) - 0.4, 0.1 * math.sin(3 * i), 0.6 + math.sin(turn * i)),
            2 * math.pi * i * 0.618,
            0.25 * math.sin(i),
            **picture,
        )
        for i in range(count)
    ]


def hit(origin: Tensor, rays: Tensor) -> Tensor:
    """Where along rays (..., 3) from inside the room the first surface is, in lengths of the ray."""
    inverse = 1 / torch.where(rays.abs() < 1e-12, 1e-12, rays)
    walls = torch.maximum((LOW - origin) * inverse, (HIGH - origin) * inverse).amin(-1)
    near, far = (PILLAR[0] - origin) * inverse, (PILLAR[1] - origin) * inverse
    enter, leave = torch.minimum(near, far).amax(-1), torch.maximum(near, far).amin(-1)
    return torch.where((enter < leave) & (enter > 0), enter, walls)


def true_depth(camera: Cameras) -> Tensor:
    rays = pixel_grid(camera.size) @ camera.K_inverse[0].T @ camera.c2w[0, :3, :3].T
    return hit(camera.centers[0], rays)


def color_at(points: Tensor) -> Tensor:
    return (points / 10 + 0.5).clamp(0, 1)


def view(camera: Cameras) -> tuple:
    depth = true_depth(camera)
    return color_at(unproject(depth[None], camera)[0]), depth, camera


def off_surface(points: Tensor) -> Tensor:
    """Distance (N,) of points to the nearest true surface."""
    walls = torch.minimum((points - LOW).abs(), (points - HIGH).abs()).amin(-1)
    beyond = torch.maximum(PILLAR[0] - points, points - PILLAR[1])
    outside = beyond.clamp_min(0).norm(dim=-1)
    return torch.minimum(walls, torch.where(outside > 0, outside, -beyond.amax(-1)))


@pytest.fixture(scope="module")
def cameras() -> list[Cameras]:
    return cameras_inside()


@pytest.fixture(scope="module")
def volume(cameras) -> Volume:
    return fuse((view(camera) for camera in cameras), VOXEL)


@pytest.fixture(scope="module")
def mesh(volume) -> Mesh:
    return extract(volume)


def wall(distance: float = 2.0, size=(48, 64), focal: float = 40.0, shade: float = 0.5) -> tuple:
    """A view from the origin at a plane."""
    camera = pinhole(size, focal)
    return torch.full((*size, 3), shade), torch.full(size, distance), camera


# ---------------------------------------------------------------------------------------------- reading a mesh


def as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)


def edges_of(mesh: Mesh) -> Tensor:
    """(3 F, 2) directed edges."""
    return torch.cat([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])


def edge_uses(mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Undirected edges (E, 2), and how many faces have each."""
    return torch.unique(edges_of(mesh).sort(1)[0], dim=0, return_counts=True)


def normals_of(mesh: Mesh) -> Tensor:
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    return torch.linalg.cross(b - a, c - a)


def rays_of(camera: Cameras, step: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Origins and directions (N, 3) of every step-th pixel, z = 1, and the true depths (N,); no pixels beside a jump."""
    depth = true_depth(camera)
    spread = torch.nn.functional.max_pool2d(torch.stack([depth, -depth])[:, None], 7, 1, 3).sum(0)[0]
    inside = torch.zeros_like(depth, dtype=torch.bool)
    inside[step:-step:step, step:-step:step] = True
    picked = inside & (spread < 0.3)
    rays = (pixel_grid(camera.size) @ camera.K_inverse[0].T @ camera.c2w[0, :3, :3].T)[picked]
    return camera.centers.expand(len(rays), 3), rays, depth[picked]


def struck(mesh: Mesh, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Every meeting of rays with the mesh: which ray (M,), and how far along it (M,)."""
    caster = trimesh.ray.ray_triangle.RayMeshIntersector(as_trimesh(mesh))
    _, ray, places = caster.intersects_id(origins.numpy(), rays.numpy(), multiple_hits=True, return_locations=True)
    ray, places = torch.from_numpy(ray), torch.from_numpy(places).float()
    return ray, ((places - origins[ray]) * rays[ray]).sum(1) / rays[ray].square().sum(1)


# ----------------------------------------------------------------------------------------------------- where it lies


def test_the_mesh_lies_on_the_surfaces(mesh):
    error = off_surface(mesh.vertices) / VOXEL
    assert error.median() < 0.01 and error.quantile(0.95) < 0.1 and error.max() < 1
    assert off_surface(mesh.vertices[mesh.faces].mean(1)).max() < VOXEL


@pytest.mark.parametrize("turn", [0.0, 0.9, 1.3])
def test_a_wall_is_exact_however_slanted(turn):
    camera = look((0.0, 0.0, 0.0), turn, 0.2)
    normal, level = torch.tensor([0.1, 0.05, -1.0]), -2.0
    rays = pixel_grid(camera.size) @ camera.K_inverse[0].T @ camera.c2w[0, :3, :3].T
    depth = level / (rays @ normal)
    depth = torch.where((depth > 0) & (depth < 20), depth, 0.0)
    found = mesh_of([(torch.ones(*SIZE, 3), depth, camera)], 0.06)
    error = (found.vertices @ normal - level).abs()
    assert error.quantile(0.9) < 1e-5 and error.max() < surface.CORNER * 0.06 and len(found) > 500


def floor_view() -> tuple:
    """A level look over a floor one unit below, and its depth from 4 to 9 units: the horizon is above the picture."""
    camera = pinhole((64, 128), 300.0)
    camera.K[0, 1, 2] = -12.0
    down = (pixel_grid(camera.size) @ camera.K_inverse[0].T)[..., 1]
    return torch.ones(64, 128, 3), torch.where(down > 1 / 9, 1 / down, 0.0), camera


def test_a_floor_seen_at_a_grazing_angle_has_no_cracks():
    found = mesh_of([floor_view()], 0.1, farthest=100)
    x, z = torch.meshgrid(torch.linspace(-0.7, 0.7, 30), torch.linspace(4.3, 8.5, 60), indexing="ij")
    points = torch.stack([x, torch.ones_like(x), z], -1).view(-1, 3)
    assert torch.cdist(points, found.vertices).amin(1).max() < 0.1


def test_what_is_far_behind_a_grazing_surface_along_the_view_is_not_measured():
    image, depth, camera = floor_view()
    volume = fuse([(image, depth, camera)], 0.1, farthest=100)
    sums = torch.cat(volume.pages)
    voxels = ((volume.blocks[:, None] * 8 + tsdf.lattice(8)) + 0.5)[sums[..., 1] > 0] * 0.1
    pixels, z = project(voxels, camera)
    column, row = pixels[0].round().long().unbind(1)
    below, behind = voxels[:, 1] - 1, z[0] - depth[row, column]
    assert 0.1 < below.max() < 0.2 + 1e-4 and behind.max() > 0.8  # two voxels, where the truncation is four


def test_everything_seen_has_a_surface(mesh, cameras):
    caster = trimesh.proximity.ProximityQuery(as_trimesh(mesh))
    points = torch.cat([o + r * d[:, None] for o, r, d in map(rays_of, cameras[::4])])
    _, distance, _ = caster.on_surface(points[::3].numpy())
    assert np.quantile(distance, 0.98) < 0.5 * VOXEL and distance.max() < 3 * VOXEL


def test_what_noise_does_is_averaged_away(cameras):
    generator = torch.Generator().manual_seed(0)

    def noisy(rounds: int):
        for camera in [look((0.1 * i, 0.0, 0.0), size=(48, 64), focal=40.0) for i in range(rounds)]:
            depth = 2 / (pixel_grid(camera.size) @ camera.K_inverse[0].T)[..., 2]
            yield torch.ones(48, 64, 3), depth * (1 + 0.01 * torch.randn(48, 64, generator=generator)), camera

    def error(count: int) -> float:
        return float((mesh_of(noisy(count), 0.08).vertices[:, 2] - 2).square().mean().sqrt())

    one, many = error(1), error(16)
    assert 0.01 < one < 0.03 and many < one / 2.5


def test_near_views_count_more_than_far_ones():
    far = wall(4.0, focal=80.0)
    near = (far[0], torch.full_like(far[1], 2.05), replace(far[2], w2c=far[2].w2c.clone()))
    near[2].w2c[0, 2, 3] = -2.0  # stands two units nearer, and says the wall is 0.05 farther
    middle = mesh_of([far, near], 0.05).vertices
    middle = middle[(middle[:, :2].abs() < 0.4).all(1), 2]
    assert_close(
        middle, torch.full_like(middle, (4 / 4**2 + 4.05 / 2.05**2) / (1 / 4**2 + 1 / 2.05**2)), atol=2e-3, rtol=0
    )


# ------------------------------------------------------------------------------------------------- which way, and how often


def test_faces_look_at_the_observer(mesh):
    centers = mesh.vertices[mesh.faces].mean(1)
    normals = torch.nn.functional.normalize(normals_of(mesh), dim=1)
    before, behind = off_free(centers + 0.5 * VOXEL * normals), off_free(centers - 0.5 * VOXEL * normals)
    assert (before & ~behind).float().mean() > 0.99


def off_free(points: Tensor) -> Tensor:
    """(N,) bool: which points are free space, in the room and not in the pillar."""
    in_room = ((points > LOW) & (points < HIGH)).all(1)
    return in_room & ~((points > PILLAR[0]) & (points < PILLAR[1])).all(1)


def test_every_edge_has_two_faces_but_at_the_border_of_what_was_seen(mesh, volume):
    _, uses = torch.unique(edges_of(mesh), dim=0, return_counts=True)
    assert uses.max() == 1  # two faces along one edge go through it in opposite directions
    edges, uses = edge_uses(mesh)
    assert uses.max() == 2
    border = mesh.vertices[edges[uses == 1]].mean(1)
    known = torch.cat([page[..., 1] for page in volume.pages]).view(-1) > 0
    around = (border / VOXEL - 0.5).floor()[:, None] + tsdf.lattice(4) - 1  # the cell and those beside it
    block = tsdf.find(volume.blocks, around.view(-1, 3).div(8).floor().long())
    inside = tsdf.number_in_block(around.long() % 8).view(-1)
    there = torch.where(block >= 0, known[block.clamp_min(0) * 512 + inside], False).view(len(border), -1)
    cliff = near_a_jump(border)
    assert (~there.all(1) | cliff).float().mean() > 0.97
    assert len(border) < 0.03 * len(edges)


def near_a_jump(points: Tensor) -> Tensor:
    """(N,) bool: which points are within three voxels of the pillar's edges, where no view measures both sides."""
    low, high = PILLAR
    beside = ((points - low).abs() < 3 * VOXEL).int() + ((points - high).abs() < 3 * VOXEL).int()
    return (beside.sum(1) >= 2) & (points > low - 3 * VOXEL).all(1) & (points < high + 3 * VOXEL).all(1)


def test_no_wall_is_there_twice(mesh, cameras):
    for camera in cameras[:3]:
        origins, rays, depth = rays_of(camera)
        ray, at = struck(mesh, origins, rays)
        beyond = 1.5 * VOXEL / rays.norm(dim=1)  # the pillar may hide a wall, but nothing stands right behind anything
        first = torch.full((len(rays),), torch.inf).scatter_reduce(0, ray, at, "amin")
        again = (at > first[ray] + 1e-3) & (at < first[ray] + 4 * beyond[ray])
        assert again.float().mean() < 0.002
        assert (at < (depth - beyond)[ray]).sum() == 0  # and nothing before the wall


def test_rays_meet_the_mesh_at_the_depth_of_the_views(mesh, cameras):
    error = []
    for camera in cameras[:5]:
        origins, rays, depth = rays_of(camera)
        ray, at = struck(mesh, origins, rays)
        first = torch.full((len(rays),), torch.inf).scatter_reduce(0, ray, at, "amin")
        error.append((first - depth).abs())
    assert (torch.cat(error) < 0.5 * VOXEL).float().mean() > 0.98
    assert torch.cat(error).median() < 0.01 * VOXEL


def test_colors_are_those_of_the_places(mesh):
    assert (mesh.colors - color_at(mesh.vertices)).abs().max() < 0.02
    assert mesh.colors.dtype == mesh.vertices.dtype == torch.float32 and mesh.faces.dtype == torch.int64


# ----------------------------------------------------------------------------------------------------- edges and free space


def test_nothing_spans_foreground_and_background():
    image, depth, camera = wall(4.0)
    depth = depth.clone()
    depth[12:36, 16:48] = 2.0
    found = mesh_of([(image, depth, camera)], 0.06)
    z = found.vertices[:, 2]
    assert ((z - 2).abs() < 0.01).any() and ((z - 4).abs() < 0.01).any()
    assert (((z - 2).abs() < 0.01) | ((z - 4).abs() < 0.01)).all()
    pixels, _ = project(found.vertices[(z - 2).abs() < 0.01], camera)
    assert pixels[0].amin(0).tolist() > [16, 12] and pixels[0, :, 0].max() < 47 and pixels[0, :, 1].max() < 35


@pytest.mark.parametrize("jump, whole", [(0.04, True), (0.06, False)])
def test_an_edge_is_a_jump_of_five_percent(jump, whole):
    image, depth, camera = wall(2.0)
    depth = depth.clone()
    depth[:, 32:] *= 1 + jump
    found = mesh_of([(image, depth, camera)], 0.05)
    pixels = project(found.vertices, camera)[0][0, :, 0]
    assert ((pixels > 30.5) & (pixels < 32.5)).any() == whole  # the two pixels beside the jump
    assert (pixels < 30.5).any() and (pixels > 32.5).any()


def test_free_space_takes_away_what_stood_in_it():
    image, depth, camera = wall(4.0)
    ghost = depth.clone()
    ghost[16:32, 16:32] = 3.0
    once, often = (mesh_of([(image, ghost, camera)] + [(image, depth, camera)] * n, 0.08) for n in (0, 3))
    assert ((once.vertices[:, 2] - 3).abs() < 0.1).any()
    assert not ((often.vertices[:, 2] - 3).abs() < 0.3).any()


def test_free_space_far_before_a_surface_counts_a_quarter_and_has_no_color():
    near, far = wall(2.0, shade=1.0), wall(4.0, shade=0.0)
    found = mesh_of([near, far], 0.08)
    front = (found.vertices[:, 2] - 2).abs() < 0.1
    assert front.any() and (found.colors[front] == 1).all() and (found.colors[~front] == 0).all()
    sums = torch.cat(fuse([near, far], 0.08).pages).view(-1, 6)
    both = sums[(sums[:, 0] > 0) & (sums[:, 5] > 0) & (sums[:, 1] > sums[:, 5] + 1e-6)]  # voxels just before the nearer
    assert len(both)
    assert_close(both[:, 1], torch.full_like(both[:, 1], 1 / 2**2 + 0.25 / 4**2))


def test_what_lies_behind_a_surface_stays_as_it_was():
    image, depth, camera = wall(4.0)
    before = torch.full_like(depth, 3.0)
    found = mesh_of([(image, depth, camera), (image, before, camera)], 0.08).vertices[:, 2]
    assert ((found - 4).abs() < 2e-3).any() and ((found - 3).abs() < 2e-3).any()


def test_a_thin_board_has_two_sides():
    def side(z: float, turned: bool) -> tuple:
        image, depth, _ = wall(2.0)
        return image, depth, look((0.0, 0.0, z), math.pi if turned else 0.0, size=(48, 64), focal=40.0)

    board = mesh_of([side(-2.0, False), side(2.2, True)], 0.05)  # 0.2 thick: both sides' distances meet inside
    z, towards = board.vertices[board.faces].mean(1)[:, 2], normals_of(board)[:, 2]
    inner = board.vertices[board.faces].mean(1)[:, :2].abs().amax(1) < 0.8
    assert (towards[inner & (z < 0.1)] < 0).all() and (towards[inner & (z > 0.1)] > 0).all()
    assert (z[inner].abs() < 0.03).any() and ((z[inner] - 0.2).abs() < 0.03).any()


def test_masked_and_unknown_pixels_are_not_measured():
    image, depth, camera = wall(2.0)
    known = torch.ones_like(depth, dtype=torch.bool)
    known[:, 40:] = False
    unknown = depth.clone()
    unknown[:, :8] = 0
    unknown[:4] = torch.nan
    pixels = project(mesh_of([(image, unknown, camera, known)], 0.06).vertices, camera)[0][0]
    assert pixels[:, 0].min() > 7 and pixels[:, 0].max() < 40 and pixels[:, 1].min() > 3
    assert pixels[:, 0].min() < 11 and pixels[:, 0].max() > 37 and pixels[:, 1].min() < 7


def test_sky_without_end_is_not_measured():
    image, depth, camera = wall(2.0)
    depth = depth.clone()
    depth[:30] = torch.inf
    found = mesh_of([(image, depth, camera)], smallest=50).vertices
    assert (found[:, 2] - 2).abs().max() < 3e-3 and project(found, camera)[0][0, :, 1].min() > 29


def test_voxels_finer_than_pixels_leave_no_holes():
    image, depth, camera = wall(2.0, size=(12, 16), focal=10.0)
    found = mesh_of([(image, depth, camera)], 0.011)
    area = normals_of(found).norm(dim=1).sum() / 2
    assert area > 0.99 * found.extent[0] * found.extent[1]


def test_a_few_points_far_away_cost_nothing():
    image, depth, camera = wall(2.0)
    wild = depth.clone()
    wild[3, 5], wild[20, 40:43], wild[30, 2] = 2000.0, 5e6, torch.inf
    plain, found = fuse([(image, depth, camera)]), fuse([(image, wild, camera)])
    assert found.voxel == plain.voxel and len(found) <= len(plain)
    assert extract(found).vertices[:, 2].max() < 2.01
    kept = fuse([(image, torch.where(wild == 2000, 30.0, depth), camera)], 0.1, farthest=20)
    assert len(kept) >= len(fuse([(image, depth, camera)], 0.1))


def test_farthest_counts_in_medians_of_the_view():
    image, depth, camera = wall(2.0)
    depth = depth.clone()
    depth[:20] = 10.0
    reach = [mesh_of([(image, depth, camera)], 0.15, farthest=f).vertices[:, 2].max().item() for f in (4, 6)]
    assert reach == pytest.approx([2, 10], abs=0.01)


# ------------------------------------------------------------------------------------------------------------------ blocks


def test_blocks_grow_with_the_surface_and_not_with_the_room(cameras, volume):
    finer = fuse((view(camera) for camera in cameras_inside(size=(192, 256), focal=160.0)), VOXEL / 2)
    coarse = fuse((view(camera) for camera in cameras_inside(size=(192, 256), focal=160.0)), VOXEL)
    assert 3 < len(finer) / len(coarse) < 5
    assert len(torch.unique(finer.blocks, dim=0)) == len(finer) == sum(len(page) for page in finer.pages)


def test_every_block_holds_a_voxel_beside_a_surface(volume):
    assert all((page[..., 5] > 0).any(1).all() for page in volume.pages)
    assert all(len(page) == tsdf.PAGE for page in volume.pages[:-1]) and len(volume.pages[-1])


def test_pages_change_nothing(monkeypatch, cameras, mesh):
    monkeypatch.setattr(tsdf, "PAGE", 100)
    paged = mesh_of((view(camera) for camera in cameras), VOXEL)
    assert len(paged) == len(mesh)
    order, same = (
        m.vertices[
            torch.unique(
                m.vertices.double().round(decimals=4) @ torch.tensor([1.0, 97.3, 9871.7]).double(), return_inverse=True
            )[1].argsort()
        ]
        for m in (paged, mesh)
    )
    assert_close(order, same)


def test_space_is_the_same_on_all_sides_of_the_origin():
    def at(shift: Tensor) -> Mesh:
        image, depth, camera = wall(2.0)
        w2c = camera.w2c.clone()
        w2c[0, :3, 3] = -shift
        return mesh_of([(image, depth, replace(camera, w2c=w2c))], 0.0625)

    here, shift = at(torch.zeros(3)), torch.tensor([-4.0, 12.5, -5.0])  # whole voxels
    there = at(shift)
    assert len(here) == len(there)
    assert_close(there.vertices.amin(0) - shift, here.vertices.amin(0), atol=1e-5, rtol=0)
    assert_close(there.vertices.mean(0) - shift, here.vertices.mean(0), atol=1e-5, rtol=0)


def test_a_coarser_volume_shows_the_same_surfaces(volume):
    coarse = coarser(fuse((view(camera) for camera in cameras_inside()), VOXEL / 2))
    assert coarse.voxel == VOXEL and coarse.truncation == pytest.approx(2 * tsdf.TRUNCATION * VOXEL / 2)
    assert len(coarse) < 1.1 * len(volume)
    error = off_surface(extract(coarse).vertices) / VOXEL
    assert error.median() < 0.05 and error.quantile(0.95) < 0.25


def test_a_size_of_our_own_is_two_pixels_and_doubles_until_it_fits():
    image, depth, camera = wall(2.0)
    free = fuse([(image, depth, camera)])
    assert free.voxel == pytest.approx(2 * 2.0 / 40)
    views = [view(camera) for camera in cameras_inside(4)]
    fitting = fuse(views, most=120)
    assert len(fitting) <= 120 < len(fuse(views, fitting.voxel / 2)) * 2
    assert math.log2(fitting.voxel / fuse(views).voxel) == pytest.approx(
        round(math.log2(fitting.voxel / fuse(views).voxel))
    )
    assert off_surface(extract(fitting).vertices).quantile(0.95) < fitting.voxel


def test_a_given_size_that_needs_too_many_blocks_is_refused_with_one_that_fits():
    views = [view(camera) for camera in cameras_inside(4)]
    with pytest.raises(ValueError, match=r"about \d+ blocks, 300 is the limit; take voxels of 0\.\d+") as refused:
        fuse(iter(views), 0.05, most=300)
    fits = float(str(refused.value).split("take voxels of ")[1].split()[0])
    assert 0.05 < fits < 0.5 and len(fuse(views, fits, most=300)) <= 300


# --------------------------------------------------------------------------------------------------------------- extraction


def noise_volume(seen: Tensor | None = None) -> Volume:
    """Distances that are nothing but noise: every way in which the corners of a cell can differ."""
    sums = torch.ones(27, 512, 6)
    sums[..., 0] = 0.1 * torch.randn(27, 512, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    if seen is not None:
        sums = sums * seen[..., None]
    return Volume(0.1, 1.0, tsdf.lattice(3), (sums,))


def test_any_distances_give_a_surface_without_cracks():
    found = extract(noise_volume(), 0)
    _, directed = torch.unique(edges_of(found), dim=0, return_counts=True)
    edges, uses = edge_uses(found)
    assert directed.max() == 1 and uses.max() == 2
    ends = found.vertices[edges[uses == 1]] - 0.05  # the outermost voxels are at 0 and 2.3
    on_hull = torch.minimum(ends, 2.3 - ends).abs() < 1e-5
    assert on_hull.all(1).any(1).all()


def test_the_surface_parts_free_from_solid():
    volume = noise_volume()
    found = extract(volume, 0)
    tri = found.vertices[found.faces]
    assert as_trimesh(found).face_normals.shape == (len(found), 3)
    # along each edge of the lattice the face that crosses it looks to the free end
    place = (tri - 0.05) / 0.1
    along = (place - place.round()).abs().argmax(-1)  # each vertex lies on an edge of the lattice along this axis
    low = torch.where(torch.nn.functional.one_hot(along, 3).bool(), place.floor(), place.round()).long()
    step = torch.nn.functional.one_hot(along, 3)
    distance = torch.empty(24, 24, 24)
    for block, page in zip(volume.blocks, volume.pages[0][..., 0].view(27, 8, 8, 8), strict=True):
        x, y, z = (block * 8).tolist()
        distance[x : x + 8, y : y + 8, z : z + 8] = page
    first, second = (distance[tuple(p.unbind(-1))] for p in (low, low + step))
    assert ((first < 0) != (second < 0)).all()
    share = (place - low).gather(-1, along[..., None])[..., 0]
    assert_close(share, (first / (first - second)).clamp(0.02, 0.98), atol=1e-4, rtol=0)
    outward = torch.where(second > first, 1, -1)
    normal = normals_of(found)[:, None].expand(-1, 3, -1).gather(-1, along[..., None])[..., 0]
    assert ((normal * outward) > 0).float().mean() > 0.7  # noise turns some; the other way round it would be 0.2


def test_cells_of_unseen_voxels_have_no_faces():
    seen = torch.rand(27, 512, generator=torch.Generator().manual_seed(1)) > 0.02
    found = extract(noise_volume(seen.float()), 0)
    unseen = tsdf.lattice(3)[:, None] * 8 + tsdf.lattice(8)
    unseen = unseen[~seen].float() * 0.1 + 0.05
    centers = found.vertices[found.faces].mean(1)
    assert (torch.cdist(centers, unseen, p=torch.inf).amin(1) > 0.1 - 1e-4).float().mean() == 1
    assert 0.5 < len(found) / len(extract(noise_volume(), 0)) < 0.95


def test_a_cliff_between_free_and_solid_is_no_surface():
    x = tsdf.lattice(8)[:, 0]

    def of(step: float) -> Volume:
        sums = torch.ones(1, 512, 6)
        sums[..., 0] = torch.where(x < 4, 0.5 * step, -0.5 * step)
        return Volume(0.1, 0.4, torch.zeros(1, 3, dtype=torch.int64), (sums,))

    assert len(extract(of(0.29), 0)) == 2 * 7 * 7
    with pytest.raises(ValueError, match="there is no surface"):
        extract(of(0.31), 0)


def test_loose_pieces_are_left_out_by_their_number_of_faces():
    image, depth, camera = wall(4.0)
    depth = depth.clone()
    depth[20:30, 20:34] = 2.0
    faces = {n: mesh_of([(image, depth, camera)], 0.08, smallest=n) for n in (0, 56, 57)}
    assert len(faces[0]) == len(faces[56]) == len(faces[57]) + 56 > 8000
    assert (faces[57].vertices[:, 2] - 4).abs().max() < 0.01
    used = faces[57].faces.unique()
    assert len(used) == used.max() + 1 == len(faces[57].vertices)


# --------------------------------------------------------------------------------------------------------------- collision


@pytest.fixture(scope="module")
def small(mesh) -> Mesh:
    pytest.importorskip("fast_simplification")
    return decimate(mesh, 3000)


def test_the_collision_mesh_is_small_and_still_where_the_walls_are(small, mesh, cameras, tmp_path):
    assert 2000 < len(small) <= 3000 < len(mesh)
    as_trimesh(small).export(tmp_path / "collision.stl")
    loaded = trimesh.load(tmp_path / "collision.stl")
    loaded = Mesh(
        torch.from_numpy(np.array(loaded.vertices)).float(), torch.from_numpy(np.array(loaded.faces)), small.colors
    )
    origins, rays, depth = rays_of(cameras[0])
    ray, at = struck(loaded, origins, rays)
    first = torch.full((len(rays),), torch.inf).scatter_reduce(0, ray, at, "amin")
    assert ((first - depth).abs() < VOXEL).float().mean() > 0.95
    assert (small.colors - color_at(small.vertices)).abs().quantile(0.95) < 0.05


def test_a_mesh_that_is_small_enough_stays_as_it_is(small):
    assert decimate(small, 3000) is small
    with pytest.raises(ValueError, match="2 faces encloses nothing"):
        decimate(small, 2)


def test_what_is_missing_for_decimation_is_named(mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(ImportError, match="pip install fast-simplification"):
        decimate(mesh, 100)


# ---------------------------------------------------------------------------------------------------------------- bad inputs


def test_what_can_not_be_fused_is_refused():
    image, depth, camera = wall()
    with pytest.raises(ValueError, match="there is no view"):
        fuse([])
    with pytest.raises(ValueError, match="none of the 2 views has a known depth"):
        fuse([(image, depth * 0, camera), (image, depth * torch.nan, camera)])
    with pytest.raises(ValueError, match=r"view 1: the image is \(48, 64\), the depth \(24, 64\)"):
        fuse([(image, depth, camera), (image, depth[:24], camera)])
    with pytest.raises(ValueError, match=r"view 0: .*\(48, 64\), what is known \(2, 2\)"):
        fuse([(image, depth, camera, torch.ones(2, 2, dtype=torch.bool))])
    with pytest.raises(ValueError, match="2 cameras"):
        fuse([(image, depth, join(camera, camera))])
    for voxel in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a voxel of .* holds nothing"):
            fuse([(image, depth, camera)], voxel)
    with pytest.raises(ValueError, match="truncation of 9"):
        fuse([(image, depth, camera)], 0.1, truncation=9)
    with pytest.raises(ValueError, match="at most 63 blocks"):
        fuse([(image, depth, camera)], most=63)
    with pytest.raises(ValueError, match="too small for a scene that reaches"):
        fuse([(image, depth, camera)], 1e-8)


def test_views_without_depth_are_passed_over():
    image, depth, camera = wall()
    plain, mixed = (
        mesh_of(views, 0.1)
        for views in ([(image, depth, camera)], [(image, depth * 0, camera), (image, depth, camera)])
    )
    assert_close(plain.vertices, mixed.vertices)


def test_views_are_taken_one_at_a_time_and_stay_as_they_were():
    image, depth, camera = wall()
    copies, taken = (image.clone(), depth.clone(), camera.w2c.clone()), []

    def views():
        for i in range(3):
            taken.append(i)
            yield image, depth, camera
            assert len(taken) == i + 1

    fuse(views(), 0.1)
    assert taken == [0, 1, 2]
    for now, then in zip((image, depth, camera.w2c), copies, strict=True):
        assert_close(now, then)


# ------------------------------------------------------------------------------------------------------------------ the node


@pytest.fixture(scope="module")
def nodes(pack):
    return importlib.import_module("lyra_pack.nodes.mesh")


@pytest.fixture(scope="module")
def world(cameras):
    """A photo and one chunk of eight frames, half of what these show made up."""
    world = begin(*view(cameras[0]))
    target = join(*cameras[:8])
    made = [view(camera) for camera in cameras[:8]]
    invented = torch.zeros(8, *SIZE, dtype=torch.bool)
    invented[..., : SIZE[1] // 2] = True
    frames = torch.stack([(m[0] * 255).to(torch.uint8) for m in made])
    return append(world, plan(world, target), frames, invented, {i + 1: m[1] for i, m in enumerate(made)})


def run(nodes, **inputs):
    return nodes.WorldMesh.execute(**inputs).args


def test_the_node_makes_a_mesh_of_a_world(nodes, world):
    mesh, report = run(nodes, world=world, voxel=0.1)
    assert mesh.vertices.shape[::2] == (1, 3) and mesh.faces.shape[::2] == (1, 3)
    assert mesh.vertex_colors.shape == mesh.vertices.shape and mesh.unlit
    ours = nodes.from_mesh(mesh)
    assert (off_surface(ours.vertices) < 0.1).all()
    assert f"{len(ours)} faces" in report and "voxels of 0.1 in" in report
    shown = run(nodes, world=world, voxel=0.1, invented=False)[0]
    keyframes = world.memory.keyframes
    known = [(world.frame(k.frame) / 255, k.depth, k.camera, ~world.invented(k.frame)) for k in keyframes]
    assert len(mesh_of(known, 0.1)) == shown.faces.shape[1] < mesh.faces.shape[1]


def test_the_node_makes_the_same_of_posed_pictures(nodes, cameras):
    made = [view(camera) for camera in cameras[:3]]
    images, posed = torch.stack([m[0] for m in made]), join(*cameras[:3])
    maps = tuple(depth_map(m[1], m[2].K[0], "test") for m in made)
    # 0.1 would put the walls exactly onto the lattice, where the last bit of a product decides about a face
    mesh, report = run(nodes, images=images, cameras=posed, depth=maps, voxel=0.097)
    assert_close(nodes.from_mesh(mesh).vertices, mesh_of(made, 0.097).vertices)
    halved = tuple(depth_map(m.depth[::2, ::2], m.camera.subsampled(2).K[0], "test") for m in maps)
    resized = run(nodes, images=images, cameras=posed.subsampled(2), depth=halved, voxel=0.097)[0]
    assert off_surface(nodes.from_mesh(resized).vertices).quantile(0.9) < 0.1


def test_the_node_says_which_inputs_are_missing(nodes, world, cameras):
    image, depth, _ = view(cameras[0])
    posed = {"images": image[None], "cameras": cameras[0], "depth": (depth_map(depth, cameras[0].K[0], "test"),)}
    with pytest.raises(ValueError, match="connect a world, or images, cameras and depth together; found nothing"):
        run(nodes)
    with pytest.raises(ValueError, match="found images, depth"):
        run(nodes, images=posed["images"], depth=posed["depth"])
    with pytest.raises(ValueError, match="a world and images, cameras, depth are connected"):
        run(nodes, world=world, **posed)
    with pytest.raises(ValueError, match="1 pictures, 2 cameras and 1 depths"):
        run(nodes, **{**posed, "cameras": join(cameras[0], cameras[1])})


def test_an_interrupt_stops_the_node(nodes, world, monkeypatch):
    def stop():
        raise InterruptedError

    monkeypatch.setattr(nodes.types, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(InterruptedError):
        run(nodes, world=world)


def test_axes_cross_both_ways(nodes, mesh):
    there = nodes.to_mesh(mesh)
    back = nodes.from_mesh(there)
    assert_close(back.vertices, mesh.vertices, atol=0, rtol=0)
    assert_close((back.faces, back.colors), (mesh.faces, mesh.colors))
    up = mesh.vertices[:, 1].argmin()
    assert there.vertices[0, :, 1].argmax() == up


def test_colours_are_linear_light_in_the_host_s_mesh_as_gltf_wants_them(nodes, mesh):
    grey = replace(mesh, colors=torch.tensor([0.0, 0.02, 0.5]).expand_as(mesh.colors))
    assert_close(nodes.to_mesh(grey).vertex_colors[0, 0], torch.tensor([0.0, 0.0015480, 0.2140411]))
    assert_close(nodes.from_mesh(nodes.to_mesh(grey)).colors, grey.colors)


def test_meshes_of_others_come_without_their_padding(nodes, mesh):
    theirs = nodes.to_mesh(mesh)
    theirs.vertices = torch.cat([theirs.vertices, torch.zeros(1, 5, 3)], 1)
    theirs.faces = torch.cat([theirs.faces, torch.zeros(1, 2, 3, dtype=torch.int64)], 1)
    theirs.vertex_colors = None
    theirs.vertex_counts, theirs.face_counts = torch.tensor([len(mesh.vertices)]), torch.tensor([len(mesh)])
    ours = nodes.from_mesh(theirs)
    assert_close((ours.vertices, ours.faces), (mesh.vertices, mesh.faces))
    assert (ours.colors == 0.5).all() and ours.colors.shape == ours.vertices.shape
    theirs.face_counts = torch.tensor([0])
    with pytest.raises(ValueError, match="empty"):
        nodes.from_mesh(theirs)
    theirs.vertices = theirs.vertices.repeat(2, 1, 1)
    with pytest.raises(ValueError, match="batch of 2"):
        nodes.from_mesh(theirs)


def test_what_the_host_saves_opens_the_right_way_up(nodes, comfy_host, world):
    save = importlib.import_module("comfy_extras.nodes_save_3d").SaveGLB
    saver = type("SaveGLB", (save,), {"hidden": SimpleNamespace(prompt=None, extra_pnginfo=None)})
    mesh, _ = run(nodes, world=world, voxel=0.1)
    [entry] = saver.execute(mesh, "mesh_test/room").ui["3d"]
    file = comfy_host / "output" / entry["subfolder"] / entry["filename"]
    loaded = trimesh.load(file, force="mesh", process=False)
    low, high = loaded.bounds
    # the ceiling is up at +y, what lies ahead of the photo is at -z, its right at +x
    assert np.abs([high[1] + LOW[1].item(), low[2] + HIGH[2].item(), high[0] - HIGH[0].item()]).max() < 0.1
    ceiling = loaded.triangles_center[:, 1] > high[1] - 0.02
    assert ceiling.sum() > 500 and (loaded.face_normals[ceiling, 1] < -0.9).mean() > 0.95  # it faces down
    stored = file.read_bytes()
    start = 20 + int.from_bytes(stored[12:16], "little")
    gltf = json.loads(stored[20:start])
    view_of = gltf["bufferViews"][
        gltf["accessors"][gltf["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]["bufferView"]
    ]
    found = np.frombuffer(stored, np.float32, view_of["byteLength"] // 4, start + 8 + view_of["byteOffset"]).reshape(
        -1, 3
    )
    places = torch.from_numpy(np.array(loaded.vertices)).float() * torch.tensor([1.0, -1.0, -1.0])
    displayed = np.where(found <= 0.0031308, 12.92 * found, 1.055 * found ** (1 / 2.4) - 0.055)
    assert np.abs(displayed - color_at(places).numpy()).max() < 0.05
