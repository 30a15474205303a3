"""Lyra2Depth: the lens is the photo's, whatever grid the depth came on; what can't be is refused or said."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lyra_core.cameras.camera import pinhole, project

CASES = Path(__file__).parent / "cases"
SIZE = (60, 104)
FOCAL = 52 / math.tan(math.radians(30))


@pytest.fixture(scope="module")
def nodes(pack):
    return importlib.import_module("lyra_pack.nodes.depth")


def opened(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float()[None] / 255


def photos(count=1, size=SIZE):
    return torch.zeros(count, *size, 3)


def picture_source(picture, kind="linear", near=4.0, far=6.0, fov=60.0):
    return {
        "source": "depth picture", "picture": picture, "kind": kind, "near": near, "far": far, "field_of_view": fov,
    }  # fmt: skip


def da3_source(geometry, fov=60.0, **more):
    return {"source": "Depth Anything 3", "da3_geometry": geometry, "field_of_view": fov, **more}


def depth_of(nodes, source, count=1, size=SIZE, cameras=None):
    return nodes.Depth.execute(photos(count, size), source, cameras).args[0]


def case_geometry(name):
    with np.load(CASES / "da3-cameras-of-another-grid" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


# depth pictures


def test_a_depth_picture_squeezed_to_a_square_has_the_photos_lens(nodes):
    folder = CASES / "depth-picture-of-another-shape"
    photo = opened(folder / "photo.png")
    (found,) = nodes.Depth.execute(photo, picture_source(opened(folder / "depth.png"))).args[0]
    assert found.size == SIZE
    assert_close(found.K, pinhole(SIZE, FOCAL).K[0])
    pixel, _ = project(torch.tensor([[0.0, -1.0, 5.0]]), found.camera)
    assert abs(pixel[0, 0, 1].item() - 11.49) < 0.01


@pytest.mark.parametrize("size, grid", [((60, 104), (64, 64)), ((104, 60), (36, 64)), ((48, 48), (90, 40)), ((60, 104), (30, 52))])
def test_the_depth_of_a_squeezed_picture_is_where_it_was_in_the_photo(nodes, size, grid):
    left_to_right = torch.linspace(0, 1, grid[1]).repeat(grid[0], 1)
    top_to_bottom = torch.linspace(0, 1, grid[0])[:, None].repeat(1, grid[1])
    for ramp in (left_to_right, top_to_bottom):
        (found,) = depth_of(nodes, picture_source(ramp[None, ..., None].expand(1, *grid, 3)), size=size)
        assert found.K[0, 0] == found.K[1, 1]
        assert_close(found.K, pinhole(size, size[1] / 2 / math.tan(math.radians(30))).K[0])
        whole = torch.nn.functional.interpolate((4 + 2 * ramp)[None, None], size, mode="bilinear")[0, 0]
        assert (found.depth - whole).abs().max() <= 2 / (min(grid) - 1)


def test_given_cameras_keep_their_lens_under_a_picture_of_another_shape(nodes):
    cameras = pinhole((480, 832), 700.0)
    (found,) = depth_of(nodes, picture_source(torch.full((1, 64, 64, 3), 0.5)), cameras=cameras)
    assert_close(found.K, cameras.resized(SIZE).K[0])


@pytest.mark.parametrize("size", [(480, 640), (832, 480), (512, 512)])
@pytest.mark.parametrize("source", ["plane", "depth picture", "MoGe", "Depth Anything 3"])
def test_cameras_of_pictures_of_another_shape_are_refused_with_both_sizes(nodes, size, source):
    given = {
        "plane": {"source": "plane", "distance": 3.0, "field_of_view": 60.0},
        "depth picture": picture_source(torch.ones(1, 64, 64, 3)),
        "MoGe": {"source": "MoGe", "moge_geometry": {"depth": torch.ones(1, *SIZE)}},
        "Depth Anything 3": da3_source({"depth": torch.ones(1, *SIZE)}),
    }[source]
    with pytest.raises(ValueError, match=f"pictures {size[1]} wide and {size[0]} high, the photo is 104 x 60"):
        depth_of(nodes, given, cameras=pinhole(size, 700.0))


@pytest.mark.parametrize("given, count", [(1, 2), (2, 3), (3, 1)])
def test_another_number_of_depth_pictures_than_of_photos_is_refused(nodes, given, count):
    with pytest.raises(ValueError, match=f"{given} depth pictures for {count} photos"):
        depth_of(nodes, picture_source(torch.full((given, 64, 64, 3), 0.5)), count)


def said(nodes, picture, kind="metric", **more):
    return nodes.Depth.execute(photos(), picture_source(picture, kind, 0.1, **more)).args[2]


def grey(values):
    return values[None, ..., None].expand(1, *values.shape, 3)


@pytest.mark.parametrize(
    "picture, kind, says",
    [
        (grey(torch.linspace(0.5, 9, 104).clamp(max=1).repeat(60, 1)), "metric", "% of it is exactly 1"),
        (grey((torch.linspace(0, 9, 104).repeat(60, 1)).round() / 9), "metric", "it has only 9 different values"),
        (grey((torch.linspace(0, 250, 104).repeat(60, 1)).round() / 255), "metric", "it has 8 bits a pixel"),
        (torch.rand(1, *SIZE, 3, generator=torch.Generator().manual_seed(0)), "disparity", "it is coloured"),
        (torch.rand(1, *SIZE, 3, generator=torch.Generator().manual_seed(0)), "metric", "it is coloured"),
    ],
)
def test_a_picture_that_cannot_be_what_it_is_taken_for_gets_a_word(nodes, picture, kind, says, caplog):
    report = said(nodes, picture, kind, far=10.0)
    assert "doubtful: " in report and says in report and says in caplog.text
    assert ("Lyra 2 Load Depth" in report) == (kind == "metric")


@pytest.mark.parametrize(
    "picture, kind",
    [
        (grey(torch.linspace(0.5, 9, 104 * 60).reshape(SIZE)), "metric"),
        (grey((torch.linspace(500, 9000, 104 * 60).reshape(SIZE)).round() / 65535), "metric"),
        (grey(torch.linspace(0, 1, 104 * 60).reshape(SIZE)), "metric"),  # its farthest pixel is at 1
        (grey((torch.linspace(0, 255, 104).repeat(60, 1)).round() / 255), "disparity"),
        (grey((torch.linspace(0, 255, 104).repeat(60, 1)).round() / 255), "linear"),
    ],
)
def test_a_good_depth_picture_gets_no_word(nodes, picture, kind, caplog):
    assert "doubtful" not in said(nodes, picture, kind, far=10.0) and not caplog.text


# Depth Anything 3


def test_an_identity_is_no_camera_and_the_field_of_view_is_assumed(nodes):
    (found,) = depth_of(nodes, da3_source(case_geometry("one_photo")))
    assert_close(found.K, pinhole(SIZE, FOCAL).K[0])
    assert "60 degrees assumed" in found.source


def test_intrinsics_of_what_the_network_saw_are_brought_to_the_photo(nodes):
    for found in depth_of(nodes, da3_source(case_geometry("two_photos")), 2):
        expected = torch.tensor([[60.621777 * 104 / 70, 0, 51.5], [0, 60.621777 * 60 / 42, 29.5], [0, 0, 1]])
        assert_close(found.K, expected)


@pytest.mark.parametrize("resolution", [140, 280, 504, 518, 756, 1008])
@pytest.mark.parametrize("size", [(480, 832), (832, 480), (512, 512), (720, 1280), (600, 450)])
@pytest.mark.parametrize("method", ["upper_bound_resize", "lower_bound_resize"])
def test_every_grid_that_the_host_can_look_at_is_told_by_the_principal_point(nodes, resolution, size, method):
    from comfy.ldm.depth_anything_3.preprocess import compute_target_size

    height, width = compute_target_size(*size, resolution, method)
    K = torch.tensor([[400.0, 0, width / 2], [0, 410.0, height / 2], [0, 0, 1]])
    geometry = {"depth": torch.ones(2, *size), "intrinsics": K.expand(1, 2, 3, 3)}
    found = depth_of(nodes, da3_source(geometry), 2, size)[1]
    expected = [
        [400 * size[1] / width, 0, (size[1] - 1) / 2], [0, 410 * size[0] / height, (size[0] - 1) / 2], [0, 0, 1],
    ]  # fmt: skip
    assert_close(found.K, torch.tensor(expected))


def test_a_ray_decoders_principal_points_beside_the_middle_are_kept(nodes):
    """The rays' principal point is only near the middle, for each photo a little elsewhere."""
    size, seen = (480, 832), (294, 504)
    offsets = torch.tensor([[0.004, -0.01], [-0.006, 0.008], [0.002, 0.001]])
    K = torch.tensor([[450.0, 0, 0], [0, 450.0, 0], [0, 0, 1]]).repeat(1, 3, 1, 1)
    K[0, :, :2, 2] = (0.5 + offsets) * torch.tensor(seen[::-1])
    found = depth_of(nodes, da3_source({"depth": torch.ones(3, *size), "intrinsics": K}), 3, size)
    for each, offset in zip(found, offsets, strict=True):
        assert_close(each.K[0, 0], torch.tensor(450 * 832 / 504))
        assert_close(each.K[:2, 2], (0.5 + offset) * torch.tensor(size[::-1]) - 0.5)


def test_one_view_of_several_without_a_camera_is_the_only_one_assumed(nodes):
    geometry = case_geometry("two_photos")
    for nothing in (torch.eye(3), torch.full((3, 3), math.nan)):
        geometry["intrinsics"][0, 0] = nothing
        first, second = depth_of(nodes, da3_source(geometry, 90.0), 2)
        assert "90 degrees assumed" in first.source and "assumed" not in second.source
        assert_close(first.K, pinhole(SIZE, 52.0).K[0])
        assert_close(second.K[0, 0], torch.tensor(60.621777 * 104 / 70))


def test_a_lens_that_no_picture_has_is_refused(nodes):
    for focal in (0.9, 1e6):
        K = torch.tensor([[focal, 0, 35.0], [0, focal, 21.0], [0, 0, 1]]).repeat(1, 1, 1, 1)
        with pytest.raises(ValueError, match="Depth Anything 3: frame 0 has focal lengths.*field of view"):
            depth_of(nodes, da3_source({"depth": torch.ones(1, *SIZE), "intrinsics": K}))
    pixels = torch.tensor([[90.0, 0, 52.0], [0, 90.0, 30.0], [0, 0, 1]])  # MoGe's are in units of the picture
    with pytest.raises(ValueError, match="MoGe: frame 0 has focal lengths"):
        depth_of(nodes, {"source": "MoGe", "moge_geometry": {"depth": torch.ones(1, *SIZE), "intrinsics": pixels[None]}})


@pytest.mark.parametrize("grid", [(64, 64), (104, 60), (60, 80)])
def test_a_geometry_of_a_picture_of_another_shape_is_refused_unless_the_lens_is_the_photos(nodes, grid):
    moge = {"depth": torch.ones(1, *grid), "intrinsics": torch.tensor([[[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]])}
    da3 = {"depth": torch.ones(1, *grid), "intrinsics": torch.tensor([[[[60.0, 0, 35], [0, 60, 35], [0, 0, 1]]]])}
    for source in ({"source": "MoGe", "moge_geometry": moge}, da3_source(da3)):
        with pytest.raises(ValueError, match=f"its picture is {grid[1]} x {grid[0]}, the photo is 104 x 60"):
            depth_of(nodes, source)
        (found,) = depth_of(nodes, source, cameras=pinhole(SIZE, 100.0))
        assert found.size == SIZE and found.K[0, 0] == found.K[1, 1] == 100
    (found,) = depth_of(nodes, da3_source({"depth": torch.ones(1, *grid)}))
    assert_close(found.K, pinhole(SIZE, FOCAL).K[0])  # without a lens of its own, the photo's is assumed


def test_the_metric_model_becomes_metres_by_the_focal_length_that_it_saw(nodes):
    geometry = {"depth": torch.full((1, 480, 832), 2.0), "sky": torch.zeros(1, 480, 832)}
    (plain,) = depth_of(nodes, da3_source(geometry, 60.0), size=(480, 832))
    (found,) = depth_of(nodes, da3_source(geometry, 60.0, metres=True, resolution=504), size=(480, 832))
    focal = 252 / math.tan(math.radians(30))  # of the 504 pixels that the network saw
    assert (plain.depth == 2).all()
    assert_close(found.depth, torch.full((480, 832), 2 * focal / 300))
    assert "metres" in found.source and "metres" not in plain.source
    cameras = pinhole((480, 832), 600.0)
    (found,) = depth_of(nodes, da3_source(geometry, metres=True, resolution=832), size=(480, 832), cameras=cameras)
    assert_close(found.depth, torch.full((480, 832), 2 * 600 / 300.0))
    with pytest.raises(ValueError, match="no sky, so it is not from Depth Anything 3 Metric"):
        depth_of(nodes, da3_source({"depth": geometry["depth"]}, metres=True, resolution=504), size=(480, 832))
