"""Photos of one place: where they were taken, their depths in one scale, and what does not fit is named and left out."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, to_corner_origin
from lyra_core.memory import posing
from lyra_core.memory.depth import DepthMap
from lyra_core.world.world import begin

SIZE, FOCAL = (288, 496), 360.0
AS_GIVEN, ONE_FOCAL, OWN_FOCAL = posing.FOCAL_CHOICES
ARC = [(0, 0, 0), (0.6, 0.05, 0.1, -8), (1.2, 0.1, 0.3, -16)]
TURN = [(0, 0, 0), (0, 0, 0, 14), (0, 0, 0, -18, 4)]
DOLLY = [(0, 0, 0), (0, 0, 0.6), (0, 0, 1.1)]
WIDE = [(0, 0, 0), (1.1, 0, 0.2, -20), (2.2, 0, 0.8, -42)]


@pytest.fixture(scope="module")
def shot(scenes):
    """(cameras, pictures, depths) of places in the furnished room."""
    kept: dict = {}

    def shot(places: list[tuple], focal: float = FOCAL) -> tuple[Cameras, torch.Tensor, torch.Tensor]:
        key = (*places, focal)
        if key not in kept:
            cameras = scenes.standing(places, SIZE, focal)
            kept[key] = (cameras, *scenes.traced(scenes.FURNISHED, cameras))
        return kept[key]

    return shot


def maps_of(depths: torch.Tensor, K: torch.Tensor, scales: tuple[float, ...] = ()) -> list[DepthMap]:
    scales = scales or (1.0,) * len(depths)
    return [DepthMap(depth * scale, K, "true") for depth, scale in zip(depths, scales, strict=True)]


def longer(K: torch.Tensor, factor: float) -> torch.Tensor:
    return K * torch.tensor([[factor, 1, 1], [1, factor, 1], [1, 1, 1]])


def cameras_of(placement: posing.Placement) -> Cameras:
    cameras = [its.camera for its in placement.placed]
    return Cameras(torch.cat([c.w2c for c in cameras]), torch.cat([c.K for c in cameras]), cameras[0].size)


@pytest.mark.parametrize("places", [ARC, TURN, DOLLY, WIDE])
def test_places_are_found_and_depths_brought_to_one_scale(shot, scenes, places):
    cameras, pictures, depths = shot(places)
    found = posing.place(pictures, maps_of(depths, cameras.K[0], (1.0, 3.0, 0.2)))
    turn, shift = scenes.errors(cameras_of(found), cameras)
    assert turn < 0.15 and shift < 0.02 and not found.left_out
    for its, depth in zip(found.placed, depths, strict=True):
        assert float((its.depth.depth / depth).median()) == pytest.approx(1, abs=2e-3)


def test_the_same_photos_have_the_same_places_again(shot):
    cameras, pictures, depths = shot(ARC)
    once, again = (posing.place(pictures, maps_of(depths, cameras.K[0])) for _ in range(2))
    assert_close(cameras_of(again).w2c, cameras_of(once).w2c, rtol=0, atol=0)


def test_a_photo_that_shows_nothing_of_the_first_is_reached_through_its_neighbour(shot, scenes):
    cameras, pictures, depths = shot([*WIDE, (2.6, 0, 1.6, -75)])
    maps = maps_of(depths, cameras.K[0])
    with pytest.raises(ValueError, match=r"photo 2: left out, only \d+ matches fit"):
        posing.place(pictures[[0, 3]], [maps[0], maps[3]])
    turn, shift = scenes.errors(cameras_of(posing.place(pictures, maps)), cameras)
    assert turn < 0.3 and shift < 0.03


def test_with_the_depth_of_the_first_alone_the_others_remember_what_it_shows(shot, scenes):
    cameras, pictures, depths = shot(ARC)
    found = posing.place(pictures, maps_of(depths[:1], cameras.K[0]))
    turn, shift = scenes.errors(cameras_of(found), cameras)
    its = found.placed[2].depth.depth
    known = its > 0
    assert turn < 0.15 and shift < 0.02
    assert 0.5 < known.float().mean() < 1 and ((its / depths[2] - 1).abs()[known] < 0.02).float().mean() > 0.97


def test_who_turned_on_the_spot_did_not_move_at_all_and_it_is_said(shot):
    cameras, pictures, depths = shot(TURN)
    found = posing.place(pictures, maps_of(depths, cameras.K[0]))
    assert_close(cameras_of(found).centers, torch.zeros(3, 3), atol=1e-6, rtol=0)
    assert all("turned on the spot" in line for line in posing.said(found, 3)[1:])


def test_who_walked_along_a_wall_has_a_homography_too_but_did_not_turn(scenes):
    cameras = scenes.standing([(0, 0, 0), (0.4, 0.1, 0, 3)], SIZE, FOCAL)
    wall = scenes.Room(scenes.box(-30, -30, -1, 30, 30, 4), ())
    pictures, depths = scenes.traced(wall, cameras)
    found = posing.place(pictures, maps_of(depths, cameras.K[0]))
    turn, shift = scenes.errors(cameras_of(found), cameras)
    assert turn < 0.3 and shift < 0.03 and "turned on the spot" not in posing.said(found, 2)[1]


def test_a_depth_that_is_smoothly_wrong_by_a_tenth_bends_the_places_little(shot, scenes):
    cameras, pictures, depths = shot(ARC)
    v, u = torch.meshgrid(torch.linspace(-1, 1, SIZE[0]), torch.linspace(-1, 1, SIZE[1]), indexing="ij")
    wrong = [d * (1 + 0.1 * torch.sin(2.5 * u + 1.3 * v + i)) for i, d in enumerate(depths)]
    found = posing.place(pictures, maps_of(torch.stack(wrong), cameras.K[0]))
    turn, shift = scenes.errors(cameras_of(found), cameras)
    assert turn < 0.5 and shift < 0.1


# ------------------------------------------------------------------------------------------------------------ focal lengths


@pytest.mark.parametrize(("places", "factor"), [(ARC, 1.15), (TURN, 0.87)])
def test_a_wrong_focal_length_is_put_right_where_the_photos_tell(shot, scenes, places, factor):
    cameras, pictures, depths = shot(places)
    wrong = maps_of(depths, longer(cameras.K[0], factor))
    bent, _ = scenes.errors(cameras_of(posing.place(pictures, wrong)), cameras)
    found = posing.place(pictures, wrong, focal=ONE_FOCAL)
    turn, shift = scenes.errors(cameras_of(found), cameras)
    assert turn < 0.2 < bent and shift < 0.02
    assert found.placed[1].depth.K[0, 0] == pytest.approx(FOCAL, rel=0.02) and "pixels found" in found.notes[0]


def test_who_walks_straight_ahead_is_not_told_another_focal_length(shot):
    cameras, pictures, depths = shot(DOLLY)
    wrong = longer(cameras.K[0], 1.15)
    found = posing.place(pictures, maps_of(depths, wrong), focal=ONE_FOCAL)
    assert_close(found.placed[0].depth.K, wrong)
    assert "can't tell" in found.notes[0]


def test_a_photo_through_a_longer_lens_gets_its_own_focal_length(scenes, shot):
    cameras, pictures, depths = shot(ARC)
    tele = scenes.standing(ARC, SIZE, 1.3 * FOCAL)[1]
    picture, depth = scenes.traced(scenes.FURNISHED, tele)
    maps = maps_of(torch.stack([depths[0], depth[0]]), cameras.K[0])
    found = posing.place(torch.stack([pictures[0], picture[0]]), maps, focal=OWN_FOCAL)
    assert found.placed[1].camera.K[0, 0, 0] == pytest.approx(1.3 * FOCAL, rel=0.02)
    assert scenes.errors(found.placed[1].camera, cameras[1])[1] < 0.1


# ------------------------------------------------------------------------------------------------------------- what is bad


def test_photos_of_another_place_are_named_with_their_matches_and_left_out(shot, scenes):
    cameras, pictures, depths = shot(ARC)
    elsewhere = scenes.Room(scenes.box(-9, -4, -2, 7, 3, 20), ())
    other, its_depth = scenes.traced(elsewhere, scenes.standing([(3, -1, 1, 130, 20)], SIZE, FOCAL))
    mixed = torch.stack([pictures[0], other[0], pictures[1]])
    found = posing.place(mixed, maps_of(torch.stack([depths[0], its_depth[0], depths[1]]), cameras.K[0]))
    assert [its.photo for its in found.placed] == [0, 2] and found.left_out[0].fits < posing.LEAST
    assert f"photo 2: left out, only {found.left_out[0].fits} matches fit; it shows another place" in posing.said(found, 3)[1]
    with pytest.raises(ValueError, match=r"none of the other photos fits the first \(30 matches are needed\):\nphoto 1.*\nphoto 2: left"):
        posing.place(mixed[:2], maps_of(torch.stack([depths[0], its_depth[0]]), cameras.K[0]))


def test_a_mirrored_photo_is_left_out_and_told_from_one_of_another_place(shot):
    cameras, pictures, depths = shot(ARC)
    mixed = torch.stack([pictures[0], pictures[1].flip(1), pictures[2]])
    found = posing.place(mixed, maps_of(torch.stack([depths[0], depths[1].flip(1), depths[2]]), cameras.K[0]))
    assert [its.photo for its in found.placed] == [0, 2] and "mirrored" in posing.said(found, 3)[1]


def test_a_photo_that_lies_on_its_side_is_placed_and_said_to(scenes):
    size = (400, 400)
    cameras = scenes.standing(ARC[:2], size, FOCAL)
    pictures, depths = scenes.traced(scenes.FURNISHED, cameras)
    turned = torch.stack([pictures[0], pictures[1].rot90(1)])
    found = posing.place(turned, maps_of(torch.stack([depths[0], depths[1].rot90(1)]), cameras.K[0]))
    assert "lies on its side, turned by" in posing.said(found, 2)[1]
    assert float((found.placed[1].camera.centers - cameras[1].centers).norm()) < 0.02


def test_something_that_moved_between_the_photos_is_said_with_its_place(scenes):
    cameras = scenes.standing(ARC[:2], SIZE, FOCAL)
    pictures, depths = scenes.traced(scenes.FURNISHED, cameras)
    noise = torch.rand(1, 3, 16, 10, generator=torch.Generator().manual_seed(0))
    coat = torch.nn.functional.interpolate(noise, (96, 60), mode="bicubic")[0].movedim(0, -1).clamp(0, 1)
    walked = pictures.clone()
    walked[0][90:186, 170:230], walked[1][90:186, 330:390] = coat, coat
    found = posing.place(walked, maps_of(depths, cameras.K[0]))
    assert "moved together" in posing.said(found, 2)[1]
    still = posing.place(pictures, maps_of(depths, cameras.K[0]))
    assert "moved together" not in posing.said(still, 2)[1]


def test_another_exposure_and_grain_change_little(shot, scenes):
    cameras, pictures, depths = shot(ARC)
    grain = 0.03 * torch.randn(pictures[1].shape, generator=torch.Generator().manual_seed(1))
    exposed = torch.stack([pictures[0], (0.5 * pictures[1] ** 1.3 + 0.05 + grain).clamp(0, 1), (1.4 * pictures[2]).clamp(0, 1)])
    turn, shift = scenes.errors(cameras_of(posing.place(exposed, maps_of(depths, cameras.K[0]))), cameras)
    assert turn < 0.3 and shift < 0.04


@pytest.mark.parametrize(
    ("count", "depths", "says"),
    [(1, 1, "1 photo; give two or more"), (3, 2, "2 depths for 3 photos")],
)
def test_what_is_no_set_of_photos_is_refused(shot, count, depths, says):
    cameras, pictures, its = shot(ARC)
    with pytest.raises(ValueError, match=says):
        posing.place(pictures[:count], maps_of(its[:depths], cameras.K[0]))


def test_depth_of_another_size_is_refused(shot):
    cameras, pictures, depths = shot(ARC)
    small = [DepthMap(depth[::2, ::2], cameras[0].subsampled(2).K[0], "small") for depth in depths]
    with pytest.raises(ValueError, match="depth 1 is 248x144, the photos are 496x288"):
        posing.place(pictures, small)


def test_plain_pictures_are_left_out_without_an_error(shot):
    cameras, pictures, depths = shot(ARC)
    white = torch.stack([pictures[0], torch.ones_like(pictures[1]), pictures[2]])
    found = posing.place(white, maps_of(depths, cameras.K[0]))
    assert [(its.photo, its.fits) for its in found.left_out] == [(1, 0)]


# ---------------------------------------------------------------------------------------------------------- places known


def test_with_known_cameras_each_depth_gets_their_scale_and_the_world_begins_at_the_first(shot, scenes):
    cameras, pictures, depths = shot(ARC)
    elsewhere = replace(cameras, w2c=cameras.w2c @ torch.linalg.inv(scenes.standing([(3, 1, -2, 70)], SIZE, FOCAL).w2c))
    found = posing.fitted(pictures, maps_of(depths, cameras.K[0], (0.5, 4.0, 1.0)), elsewhere)
    assert_close(cameras_of(found).w2c, cameras.w2c, atol=1e-5, rtol=0)
    for its, depth in zip(found.placed, depths, strict=True):
        assert float((its.depth.depth / depth).median()) == pytest.approx(1, abs=0.01)


def test_with_known_cameras_a_picture_that_is_not_theirs_is_left_out(shot, scenes):
    cameras, pictures, depths = shot(ARC)
    elsewhere = scenes.standing([ARC[0], ARC[1], (-0.9, 0.4, 0, 40)], SIZE, FOCAL)
    found = posing.fitted(pictures, maps_of(depths, cameras.K[0]), elsewhere)
    assert [its.photo for its in found.left_out] == [2] and found.left_out[0].fits < posing.LEAST


def test_cameras_that_all_stand_in_one_place_tell_no_scale(shot):
    cameras, pictures, depths = shot(TURN)
    with pytest.raises(ValueError, match="stand in one place"):
        posing.fitted(pictures, maps_of(depths, cameras.K[0]), cameras)


def test_what_a_network_placed_wrongly_is_left_out_unless_all_shall_stay(shot, scenes):
    cameras, pictures, depths = shot(ARC)
    wrong = scenes.standing([ARC[0], ARC[1], (-0.9, 0.4, 0, 40)], SIZE, FOCAL)
    maps = maps_of(depths, cameras.K[0])
    assert not posing.agreed(pictures, maps, cameras).left_out
    found = posing.agreed(pictures, maps, wrong)
    assert [its.photo for its in found.left_out] == [2]
    assert len(posing.agreed(pictures, maps, wrong, least=0).placed) == 3


# --------------------------------------------------------------------------------------------------------------- the node


@pytest.fixture(scope="module")
def node(pack):
    return importlib.import_module("lyra_pack.nodes.photos")


def test_a_world_begins_from_what_the_node_gives(node, shot):
    cameras, pictures, depths = shot(ARC)
    places = {"places": node.MATCHES, "depth": tuple(maps_of(depths, cameras.K[0], (1, 2, 3))), "focal": AS_GIVEN}
    images, maps, seen, report = node.Photos.execute(pictures, places).args
    world = begin(images[0], maps[0].depth, seen[0], [(images[i], maps[i].depth, seen[i]) for i in (1, 2)])
    assert [k.frame for k in world.memory.keyframes] == [0, -1, -2] and report.count("matches fit") == 2


def da3(cameras: Cameras, depths: torch.Tensor, scale: float = 1.0) -> dict:
    w2c = cameras.w2c.clone()
    w2c[:, :3, 3] *= scale
    return {"depth": depths * scale, "extrinsics": w2c[None, :, :3], "intrinsics": to_corner_origin(cameras.K)[None], "mode": "multiview"}


def test_views_of_depth_anything_3_are_seen_from_the_first_in_its_own_scale(node, shot, scenes):
    cameras, pictures, depths = shot(ARC)
    other_world = replace(cameras, w2c=cameras.w2c @ torch.linalg.inv(scenes.standing([(3, 1, -2, 70)], SIZE, FOCAL).w2c))
    places = {"places": node.MULTIVIEW, "da3_geometry": da3(other_world, depths, 0.3)}
    _, maps, seen, _ = node.Photos.execute(pictures, places).args
    assert_close(seen.w2c[:, :3, :3], cameras.w2c[:, :3, :3], atol=1e-5, rtol=0)
    assert_close(seen.centers, 0.3 * cameras.centers, atol=1e-5, rtol=0)
    assert_close(seen.K, cameras.K, atol=1e-2, rtol=0)
    assert_close(maps[2].depth, 0.3 * depths[2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extrinsics": None}, "mode multiview"),
        ({"intrinsics": torch.eye(3).expand(1, 3, 3, 3)}, "no camera for each of its 3 views"),
        ({"extrinsics": torch.full((1, 3, 3, 4), torch.nan)}, "found no cameras"),
    ],
)
def test_a_geometry_without_cameras_says_what_to_do(node, shot, changes, says):
    cameras, pictures, depths = shot(ARC)
    geometry = {key: value for key, value in {**da3(cameras, depths), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=says):
        node.Photos.execute(pictures, {"places": node.MULTIVIEW, "da3_geometry": geometry})


def test_opencv_is_imported_only_where_it_is_needed():
    for module in ("matches", "resection", "posing"):
        source = (Path(posing.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        assert not any(line.startswith("import cv2") for line in source.splitlines())
    assert np.isfinite(posing.FOCALS).all()
