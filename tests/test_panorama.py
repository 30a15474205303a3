"""Views of a panorama: whole, seamless, with depth along their axes; and a world that is walked from them."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras import panorama
from lyra_core.cameras.camera import Cameras, unproject
from lyra_core.metrics.pictures import psnr
from lyra_core.world.preview import look_up, remembered_sources
from lyra_core.world.world import begin, plan

SIZE = (120, 208)
WIDE = (256, 512)


@pytest.fixture(scope="module")
def room(scenes):
    """(panorama, distances) from the middle of the furnished room."""
    return scenes.seen_along(scenes.FURNISHED, torch.tensor([0.0, 0.1, 2.0]), panorama.directions(WIDE))


@pytest.fixture(scope="module")
def node(pack):
    return importlib.import_module("lyra_pack.nodes.panorama")


def true_views(scenes, cameras: Cameras) -> tuple[torch.Tensor, torch.Tensor]:
    moved = cameras.w2c.clone()
    moved[:, :3, 3] -= moved[:, :3, :3] @ torch.tensor([0.0, 0.1, 2.0])
    return scenes.traced(scenes.FURNISHED, Cameras(moved, cameras.K, cameras.size))


@pytest.mark.parametrize(("count", "least"), [(6, 0.58), (8, 0.78), (10, 0.9), (12, 0.96)])
def test_more_views_see_more_of_the_sphere_and_the_first_looks_ahead(count, least):
    cameras = panorama.around(count, SIZE, 90.0, heading=30.0)
    assert len(cameras) == count and panorama.coverage(cameras) > least
    assert_close(cameras.c2w[0, :3, 2], torch.tensor([0.5, 0.0, math.sqrt(0.75)]))
    assert_close(cameras.centers, torch.zeros(count, 3))
    assert cameras.fov[0] == pytest.approx(2 * math.atan(SIZE[0] / SIZE[1]), abs=1e-5)


@pytest.mark.parametrize("count", [5, 13])
def test_other_numbers_of_views_are_refused(count):
    with pytest.raises(ValueError, match="choose 6 to 12"):
        panorama.around(count, SIZE, 90.0)


def test_views_are_what_cameras_there_would_see(scenes, room):
    cameras = panorama.around(8, SIZE, 90.0)
    pictures, depths = true_views(scenes, cameras)
    seen, far = panorama.pictures(room[0], cameras), panorama.depths(room[1], cameras)
    assert float((seen - pictures).abs().median()) < 0.02
    off = (far / depths - 1).abs()
    assert float(off.median()) < 1e-3 and float((off < 0.02).float().mean()) > 0.97, "what is off lies at silhouettes"


def test_depth_is_distance_along_the_axis():
    cameras = panorama.around(6, SIZE, 90.0)
    depths = panorama.depths(panorama.sphere(WIDE, 5.0), cameras)
    points = unproject(depths, cameras)
    assert_close(points.norm(dim=-1), torch.full(points.shape[:3], 5.0))


def test_neighbouring_views_agree_on_colour_and_distance_where_they_overlap(room):
    cameras = panorama.around(10, SIZE, 90.0)
    smooth = panorama.directions(WIDE) * 0.4 + 0.5  # a colour for each direction
    seen, depths = panorama.pictures(smooth, cameras), panorama.depths(room[1], cameras)
    rays = unproject(torch.ones_like(depths), cameras)
    assert_close(seen, rays / rays.norm(dim=-1, keepdim=True) * 0.4 + 0.5, atol=2e-3, rtol=0)
    # the same surfaces, whichever view shows them
    first, second = unproject(depths, cameras)[:2]
    local = first @ cameras.w2c[1, :3, :3].T
    pixels = (local @ cameras.K[1].T)[..., :2] / local[..., 2:]
    inside = (local[..., 2] > 0) & (pixels > 0).all(-1) & (pixels < torch.tensor([SIZE[1] - 1.0, SIZE[0] - 1.0])).all(-1)
    u, v = pixels[inside].round().long().unbind(-1)
    assert inside.float().mean() > 0.02
    off = (second[v, u].norm(dim=-1) / first[inside].norm(dim=-1) - 1).abs()
    assert float((off < 0.03).float().mean()) > 0.9


def test_the_ends_of_a_panorama_meet_without_a_seam():
    smooth = panorama.directions((64, 128)) * 0.4 + 0.5
    behind = panorama.around(6, SIZE, 90.0, heading=180.0)[0]
    up = Cameras(behind.w2c.clone(), behind.K, SIZE)
    up.w2c[0, :3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # looks up, where all longitudes meet
    for camera in (behind, up):
        rays = unproject(torch.ones(1, *SIZE), camera)
        found = panorama.pictures(smooth, camera)
        assert_close(found, rays / rays.norm(dim=-1, keepdim=True) * 0.4 + 0.5, atol=5e-3, rtol=0)


def test_a_large_panorama_is_averaged_and_not_picked_from():
    lines = torch.zeros(512, 1024, 3)
    lines[:, ::2] = 1.0
    seen = panorama.pictures(lines, panorama.around(6, (48, 80), 90.0)[0])
    assert float((seen - 0.5).abs().max()) < 0.15


def test_what_is_unknown_stays_unknown_and_edges_stay_sharp():
    distance = panorama.sphere((64, 128), 2.0)
    distance[:, 70:] = 8.0
    distance[:26] = float("inf")
    camera = panorama.around(6, SIZE, 90.0)[0]
    found = panorama.depths(distance, camera)[0]
    length = unproject(torch.ones(1, *SIZE), camera)[0].norm(dim=-1)
    values = (found * length)[found > 0]
    assert (((values - 2).abs() < 1e-3) | ((values - 8).abs() < 1e-3)).all() and (found == 0)[:10].any()


def test_a_room_has_its_walls_where_they_are_said_to_be():
    far = panorama.room(WIDE, 4.0, 6.0, 3.0, 1.5)
    points = panorama.directions(WIDE) * far[..., None]
    assert_close(points.flatten(0, 1).amax(0), torch.tensor([2.0, 1.5, 3.0]), atol=1e-3, rtol=0)
    assert_close(points.flatten(0, 1).amin(0), torch.tensor([-2.0, -1.5, -3.0]), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="outside of it"):
        panorama.room(WIDE, 4.0, 6.0, 3.0, 3.5)


# --------------------------------------------------------------------------------------------------------------- the node


def cut(node, image, distance, **more):
    values = {"views": 8, "width": SIZE[1] // 16 * 16, "height": SIZE[0] // 16 * 16, **more}
    return node.Panorama.execute(image[None], distance, **values).args


def test_a_walk_of_a_third_of_a_unit_and_back_finds_the_panorama_again(node, room, scenes):
    distances = {"distance": node.PICTURE, "picture": (room[1] / 20)[None, ..., None], "kind": "metric", "near": 0.1, "far": 20.0}
    images, maps, cameras, report = cut(node, room[0], distances, width=208, height=112)
    world = begin(images[0], maps[0].depth, cameras[0], [(images[i], maps[i].depth, cameras[i]) for i in range(1, 8)])
    assert "8 views of 208x112" in report and len(world.memory.keyframes) == 8
    away = cameras[0].w2c[0].clone()
    away[:3, 3] = torch.tensor([-0.15, 0.0, -0.26])  # 0.3 units ahead and to the right
    there = Cameras(away[None], cameras.K[:1], cameras.size)
    sources = remembered_sources(world, plan(world, there, count=8))
    look, back = look_up(sources, there), look_up(sources, cameras[0])
    pictures, depths = true_views(scenes, there)
    assert float((look.depth / depths[0] - 1).abs().median()) < 0.01 and look.found.float().mean() > 0.9
    assert psnr(look.image[look.found], pictures[0][look.found]) > 20
    assert psnr(back.image, images[0]) > 40


def test_the_world_begins_straight_ahead_wherever_the_first_view_looks(node, room):
    ahead, turned = (cut(node, room[0], {"distance": node.SPHERE, "radius": 4.0}, heading=heading) for heading in (0.0, 90.0))
    assert_close(turned[2].w2c, ahead[2].w2c)
    right = panorama.pictures(room[0], panorama.around(8, (112, 208), 90.0, heading=90.0)[0])
    assert_close(turned[0][:1], right)
    assert float((turned[0][0] - ahead[0][0]).abs().mean()) > 0.05


def test_behind_is_remembered_too(node, room):
    images, maps, cameras, _ = cut(node, room[0], {"distance": node.SPHERE, "radius": 4.0}, width=208, height=112)
    world = begin(images[0], maps[0].depth, cameras[0], [(images[i], maps[i].depth, cameras[i]) for i in range(1, 8)])
    behind = panorama.around(6, (112, 208), 90.0, heading=180.0)[0]
    look = look_up(remembered_sources(world, plan(world, behind, count=8)), behind)
    assert look.found.float().mean() > 0.95
    assert psnr(look.image[look.found], panorama.pictures(room[0], behind)[0][look.found]) > 22


@pytest.mark.parametrize("size", [(100, 100), (100, 150), (200, 100), (100, 204)])
def test_what_is_not_twice_as_wide_as_high_is_refused(node, size):
    with pytest.raises(ValueError, match=f"is {size[1]}x{size[0]}; a whole equirectangular panorama is twice as wide"):
        cut(node, torch.zeros(*size, 3), {"distance": node.SPHERE, "radius": 4.0})
    if size[1] != 2 * size[0]:
        picture = {"distance": node.PICTURE, "picture": torch.ones(1, *size, 1), "kind": "linear", "near": 1.0, "far": 2.0}
        with pytest.raises(ValueError, match="panorama of distances is"):
            cut(node, torch.zeros(64, 128, 3), picture)


def test_two_panoramas_are_refused(node):
    with pytest.raises(ValueError, match="2 pictures; give one panorama"):
        node.Panorama.execute(torch.zeros(2, 64, 128, 3), {"distance": node.SPHERE, "radius": 4.0})


def moge(distance: torch.Tensor, mask: torch.Tensor) -> dict:
    return {"depth": distance[None], "mask": mask[None]}


def test_what_moge_sees_nothing_in_is_unknown_and_views_of_nothing_are_left_out(node, room):
    mask = panorama.directions(WIDE)[..., 1] > -0.2  # nothing above
    images, maps, cameras, report = cut(node, room[0], {"distance": node.MOGE, "moge_geometry": moge(room[1], mask)}, views=12)
    assert len(images) == len(maps) == len(cameras) < 12 and "left out, no distance is known in it" in report
    assert (maps[0].depth == 0).any()
    with pytest.raises(ValueError, match="turn the heading"):
        cut(node, room[0], {"distance": node.MOGE, "moge_geometry": moge(room[1], torch.zeros_like(mask))})
    with pytest.raises(ValueError, match="MoGe Panorama Inference"):
        cut(node, room[0], {"distance": node.MOGE, "moge_geometry": {**moge(room[1], mask), "intrinsics": torch.eye(3)[None]}})
