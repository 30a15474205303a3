"""Views of a splat or a mesh: true depth where something is, unknown where nothing is, and a world that begins from them."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import pinhole, unproject
from lyra_core.exports.mesh_views import Texture, draw, picture
from lyra_core.exports.surface import Mesh
from lyra_core.splats import gaussians as splats
from lyra_core.world.world import begin

SIZE = (64, 96)


def box_mesh(low: torch.Tensor, high: torch.Tensor) -> Mesh:
    """A box of twelve triangles; colours say where each corner is."""
    corners = torch.stack(torch.meshgrid(*(torch.tensor([0.0, 1.0]),) * 3, indexing="ij"), -1).view(8, 3)
    sides = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = [[a, b, c] for a, b, c, d in sides] + [[a, c, d] for a, b, c, d in sides]
    return Mesh(low + corners * (high - low), torch.tensor(faces), corners)


@pytest.fixture(scope="module")
def room(scenes):
    return scenes.Room(scenes.FURNISHED.walls, ())


@pytest.fixture(scope="module")
def node(pack):
    return importlib.import_module("lyra_pack.nodes.splat_views").SplatViews


# ------------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("place", [(0, 0, 0), (1.5, -0.7, 4, 130), (-2, 1.0, 7, 200, 40), (0, 0, 3, 0, -89)])
def test_a_room_of_twelve_triangles_is_seen_from_inside_without_a_gap(scenes, room, place):
    cameras = scenes.standing([place], SIZE, 60.0)
    _, depth = scenes.traced(room, cameras)
    drawn = draw(box_mesh(*room.walls), cameras)
    assert (drawn.face >= 0).all()
    assert_close(drawn.depth, depth[0], atol=1e-4, rtol=1e-4)


def test_colours_of_vertices_are_mixed_in_space_and_not_in_the_picture(scenes, room):
    cameras = scenes.standing([(0.5, 0.2, 1, 35)], SIZE, 60.0)
    low, high = room.walls
    points = unproject(scenes.traced(room, cameras)[1], cameras)[0]
    assert_close(picture(box_mesh(low, high), cameras), (points - low) / (high - low), atol=0.01, rtol=0)


def test_each_pixel_shows_the_nearest_of_all_triangles_that_its_ray_meets():
    random = torch.Generator().manual_seed(0)
    vertices = torch.rand(30, 1, 3, generator=random) * torch.tensor([4.0, 3.0, 6.0]) - torch.tensor([2.0, 1.5, 1.0])
    vertices = (vertices + 0.6 * torch.randn(30, 3, 3, generator=random)).view(90, 3)
    mesh = Mesh(vertices, torch.arange(90).view(30, 3), torch.rand(90, 3, generator=random))
    camera = pinhole((24, 32), 20.0)
    rays = unproject(torch.ones(1, 24, 32), camera)[0].view(-1, 3).double()
    a, b, c = (vertices.double()[mesh.faces[:, i]] for i in range(3))
    # Moeller and Trumbore, every ray with every triangle
    edges = b - a, c - a
    p = torch.linalg.cross(rays[:, None].expand(-1, 30, -1), edges[1][None].expand(len(rays), -1, -1))
    determinant = (edges[0] * p).sum(-1)
    s = -(a * p).sum(-1) / determinant
    q = torch.linalg.cross(-a, edges[0])
    t, z = (rays @ q.T) / determinant, (edges[1] * q).sum(-1) / determinant
    hit = (s >= 0) & (t >= 0) & (s + t <= 1) & (z > 1e-3)
    expected = torch.where(hit, z, torch.inf).amin(1)
    found = draw(mesh, camera)
    depth = torch.where(found.depth > 0, found.depth, torch.inf).view(-1).double()
    assert ((depth - expected).abs() < 1e-4).float().add((depth == expected).float()).clamp(max=1).mean() > 0.995
    nearest, there = torch.where(hit, z, torch.inf).argmin(1), hit.any(1)
    assert (found.face.view(-1) == nearest)[there].float().mean() > 0.995
    assert hit.any(1).float().mean() > 0.3 and not hit.any(1).all()


def test_a_texture_is_seen_as_it_was_painted_and_begins_anew_beyond_its_border():
    quad = torch.tensor([[-1.0, -1, 2], [1, -1, 2], [1, 1, 2], [-1, 1, 2]])
    mesh = Mesh(quad, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.zeros(4, 3))
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(1)), (64, 64), mode="bilinear")
    image = image[0].movedim(0, -1)
    camera = pinhole((64, 64), 64.0)  # the quad fills the picture
    places = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    assert_close(picture(mesh, camera, Texture(image, places)), image, atol=0.03, rtol=0)
    again = picture(mesh, camera, Texture(image, places * 2))
    assert_close(again[:31, :31], again[32:63, 32:63], atol=1e-4, rtol=0)


def test_a_textured_mesh_of_the_host_comes_with_its_texture(node, scenes):
    from comfy_api.latest import Types

    quad = torch.tensor([[-1.0, -1, 2], [1, -1, 2], [1, 1, 2], [-1, 1, 2]])
    paint = torch.zeros(1, 8, 8, 3)
    paint[..., 1] = 1.0
    mesh = Types.MESH(
        quad[None] * torch.tensor([1.0, -1, -1]), torch.tensor([[[0, 1, 2], [0, 2, 3]]]),
        uvs=torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 1]]]), texture=paint,
    )  # fmt: skip
    images, depth, _, report = node.execute(scenes.standing([(0, 0, 0)], SIZE, 60.0), mesh=mesh, background="#ff0000").args
    assert_close(images[0, 32, 48], torch.tensor([0.0, 1.0, 0.0]))
    assert_close(images[0, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert float(depth[0].depth[32, 48]) == pytest.approx(2) and depth[0].depth[0, 0] == 0 and "view 1" in report


# ------------------------------------------------------------------------------------------------------------------- splats


@pytest.fixture(scope="module")
def splat(pack, scenes, room):
    """The room's far half as gaussians, as the host has them."""
    cameras = scenes.standing([(0, 0, 0), (0, 0, 0, 40), (0, 0, 0, -40)], (120, 180), 110.0)
    pictures, depths = scenes.traced(room, cameras)
    return pack.splat.to_splat(splats.fuse([(p, d, cameras[i], None) for i, (p, d) in enumerate(zip(pictures, depths, strict=True))], 1))


PLACES = [(0, 0, 0), (0.2, 0, 0.4, 15), (-0.3, 0, 0.6, -20)]


def test_a_world_begins_from_a_splat_with_its_depth(node, splat, scenes, room):
    cameras = scenes.standing(PLACES, SIZE, 110.0)
    images, maps, seen, report = node.execute(cameras, splat=splat, views=3).args
    pictures, depths = scenes.traced(room, cameras)
    for its, depth in zip(maps, depths, strict=True):
        known = its.depth > 0
        assert known.float().mean() > 0.9 and float((its.depth / depth - 1).abs()[known].median()) < 0.01
    assert float((images - pictures).abs().mean()) < 0.06 and report.count("% known") == 3
    world = begin(images[0], maps[0].depth, seen[0], [(images[i], maps[i].depth, seen[i]) for i in (1, 2)])
    assert len(world.memory.keyframes) == 3


def test_views_are_spread_over_a_path(node, splat, scenes):
    cameras = scenes.standing([(0, 0, 0.01 * i) for i in range(81)], SIZE, 60.0)
    seen = node.execute(cameras, splat=splat, views=5).args[2]
    assert_close(seen.centers[:, 2], torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]))


def test_what_is_not_opaque_is_unknown(node, pack, splat, scenes):
    cameras = scenes.standing(PLACES[:1], SIZE, 60.0)
    gaussians = pack.splat.from_splat(splat)
    hazy = pack.splat.to_splat(replace(gaussians, opacities=torch.where(gaussians.means[:, 0] < 0, 0.05, gaussians.opacities)))
    depth = node.execute(cameras, splat=hazy).args[1][0].depth
    assert (depth[:, :40] > 0).float().mean() < 0.1 and (depth[:, 56:] > 0).float().mean() > 0.9


def test_a_view_of_nothing_is_left_out_and_said(node, pack, splat, scenes):
    cameras = scenes.standing([(0, 0, 0), (0, 0, -30, 180), (0.1, 0, 0)], SIZE, 60.0)
    images, maps, seen, report = node.execute(cameras, splat=splat, views=3).args
    assert len(images) == len(maps) == len(seen) == 2 and "view 2: left out, it shows nothing" in report
    assert_close(seen.w2c, cameras.w2c[[0, 2]])


def test_a_splat_of_nothing_is_refused(node, pack, splat, scenes):
    cameras = scenes.standing([(0, 0, -30, 180)], SIZE, 60.0)
    with pytest.raises(ValueError, match="the first view shows nothing"):
        node.execute(cameras, splat=splat)
    nothing = pack.splat.to_splat(pack.splat.from_splat(splat).select(torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="this splat is empty"):
        node.execute(cameras, splat=nothing)


def test_one_of_splat_and_mesh_is_needed(node, splat, scenes):
    cameras = scenes.standing(PLACES, SIZE, 60.0)
    with pytest.raises(ValueError, match="found neither"):
        node.execute(cameras)
    with pytest.raises(ValueError, match="found both"):
        node.execute(cameras, splat=splat, mesh=object())
