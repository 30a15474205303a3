"""The layout of a photo is found where its lines tell it, and said to be unknown where they don't."""

from __future__ import annotations

import functools
import importlib
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import unproject
from lyra_core.memory import layout
from lyra_core.memory.depth import assumed_lens, axes_through, box, resized, room_box

SIZE = (240, 416)
K = assumed_lens(SIZE, 60.0)
PHOTO = (2 * SIZE[0], 2 * SIZE[1])


def at(x, y):
    return (x * (SIZE[1] - 1), y * (SIZE[0] - 1))


@functools.cache
def drawn(planes, point, distance, tile=1.0):
    """A photo of the inside of a box with tiles on its walls, and its depth; planes: left, right, ceiling, floor."""
    _, axes = axes_through(K, at(*point))
    fine, lens = (4 * SIZE[0], 4 * SIZE[1]), K * torch.tensor([[4.0], [4], [1]])
    lens[:2, 2] += 1.5
    truth, sharp = (box(size, k, axes, planes, distance, "truth") for size, k in ((SIZE, K), (fine, lens)))
    local = (unproject(sharp.depth[None], sharp.camera)[0] @ axes.T) / tile
    places = torch.tensor([planes[0], planes[1], planes[2], planes[3], distance]) / tile
    gaps = torch.stack([(local[..., axis] - place).abs() for axis, place in zip((0, 0, 1, 1, 2), places, strict=True)])
    wall = gaps.argmin(0)
    bright = torch.zeros(fine)
    for number, axes_of_it in enumerate(((1, 2), (1, 2), (0, 2), (0, 2), (0, 1))):
        parity = sum(local[..., axis].floor() for axis in axes_of_it) % 2
        bright = torch.where(wall == number, 0.25 + 0.1 * number + 0.3 * parity, bright)
    photo = torch.nn.functional.avg_pool2d(bright[None, None], 2)[0, 0]  # twice the world's size, without stairs
    return photo[..., None].expand(-1, -1, 3), truth


@pytest.mark.parametrize("point", [(0.5, 0.5), (0.3, 0.4), (0.75, 0.6), (0.45, 0.3)])
def test_the_vanishing_point_of_a_room_is_found(point):
    photo, _ = drawn((-2.0, 2.5, -1.5, 1.6), point, 12.0)
    found = layout.lines(photo)
    vanishing = layout.vanishing_point(found)
    assert np.abs(vanishing.point / found.size[::-1] - point).max() < 0.01


@pytest.mark.parametrize(
    "walls, says",
    [((-2.0, 2.5), "left and right walls"), ((-1.5, math.inf), "left wall"), ((-math.inf, 2.0), "right wall")],
)
def test_walls_stand_where_they_are_and_open_sides_stay_open(walls, says):
    planes = (*walls, -math.inf, 1.6)
    photo, truth = drawn(planes, (0.45, 0.45), 15.0, 0.8)
    found = resized(layout.automatic(photo, assumed_lens(PHOTO, 60.0), 1.6), SIZE)
    assert says in found.source
    inside = truth.depth < 8
    apart = (found.depth[inside] / truth.depth[inside]).log().abs()
    assert apart.median() < 0.05 and apart.quantile(0.9) < 0.5
    usual = room_box(SIZE, K, layout.USUAL_POINT, layout.USUAL_WALL, layout.USUAL_DISTANCE)
    assert apart.mean() < 0.3 * (usual.depth[inside] / truth.depth[inside]).log().abs().mean()


def test_everything_scales_with_the_height_of_the_camera():
    photo, _ = drawn((-2.0, 2.5, -math.inf, 1.6), (0.5, 0.45), 12.0)
    low, high = (layout.automatic(photo, assumed_lens(PHOTO, 60.0), height).depth for height in (1.6, 3.2))
    assert_close(high, 2 * low, rtol=1e-4, atol=0)


@pytest.mark.parametrize("seam", [0.6, 0.7])
def test_a_ground_ends_where_upright_things_stand_on_it(seam):
    photo = torch.full((*SIZE, 3), 0.8)
    generator = torch.Generator().manual_seed(0)
    for x in torch.randint(5, SIZE[1] - 10, (60,), generator=generator).tolist():
        top = int(torch.randint(20, 80, (1,), generator=generator))
        photo[top : int(seam * SIZE[0]) - int(torch.randint(0, 8, (1,), generator=generator)), x : x + 3] = 0.2
    photo[int(seam * SIZE[0]) :] = 0.5
    for _ in range(150):
        y, x = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((int(seam * SIZE[0]) + 3, 236), (0, 380)))
        photo[y : y + 2, x : x + 30] = 0.3
    found = layout.automatic(photo, K, 1.6)
    assert "no vanishing point; a ground that ends at" in found.source
    assert abs(layout.ground_seam(layout.lines(photo)) - seam) < 0.04
    backdrop = found.depth[0, 0]
    row = int((found.depth[:, 200] < 0.99 * backdrop).nonzero()[0])
    assert abs(row / SIZE[0] - seam) < 0.05


@pytest.mark.parametrize("kind", ["flat", "noise", "blobs", "tiny"])
def test_a_photo_that_tells_nothing_gets_the_usual_room_and_that_is_said(kind):
    generator = torch.Generator().manual_seed(1)
    size = (16, 24) if kind == "tiny" else SIZE
    photo = torch.full((*size, 3), 0.5)
    if kind == "noise":
        photo = torch.rand(*size, 3, generator=generator)
    if kind == "blobs":
        coarse = torch.rand(1, 3, 8, 12, generator=generator)
        photo = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0].movedim(0, -1).clamp(0, 1)
    lens = assumed_lens(size, 60.0)
    found = layout.automatic(photo, lens, 1.6)
    assert found.source.startswith("nothing in the photo tells its layout; the usual room box")
    usual = room_box(size, lens, layout.USUAL_POINT, layout.USUAL_WALL, layout.USUAL_DISTANCE)
    assert torch.equal(found.depth, usual.depth)


def test_the_demos_room_is_seen_with_both_its_walls(project):
    from PIL import Image

    picture = Image.open(project / "tools" / "demo" / "room.png").convert("RGB")
    photo = torch.from_numpy(np.array(picture)).float() / 255
    found = layout.automatic(photo, assumed_lens(tuple(photo.shape[:2]), 60.0), 1.6)
    assert "left and right walls" in found.source and "meet at (0.50, 0.55)" in found.source


@pytest.mark.parametrize("shape", [(416, 240), (300, 300), (120, 208), (900, 1600)])
def test_a_photo_of_any_shape_is_looked_at_whole(shape):
    photo, _ = drawn((-2.0, 2.5, -1.5, 1.6), (0.4, 0.45), 12.0)
    stretched = torch.nn.functional.interpolate(photo.movedim(-1, 0)[None], shape, mode="area")[0].movedim(0, -1)
    found = layout.lines(stretched)
    vanishing = layout.vanishing_point(found)
    assert abs(vanishing.point[0] / found.size[1] - 0.4) < 0.02 and abs(vanishing.point[1] / found.size[0] - 0.45) < 0.02


def test_the_node_lays_out_each_photo_and_reports_what_its_lines_told(pack):
    nodes = importlib.import_module("lyra_pack.nodes.depth")
    photos = torch.stack([drawn((-2.0, 2.5, -1.5, 1.6), (0.4, 0.45), 12.0)[0], torch.full((*PHOTO, 3), 0.5)])
    maps, _, report = nodes.Depth.execute(photos, {"source": "auto", "camera_height": 1.6, "field_of_view": 60.0}).args
    first, second = report.splitlines()
    assert "lines meet at (0.40, 0.45)" in first and "nothing in the photo tells" in second
    assert_close(maps[0].K, assumed_lens(PHOTO, 60.0))
