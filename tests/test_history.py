"""A history's parts must fit its layout; rays and pixels become channels by the definition, pixel by pixel."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import Cameras, pinhole, quaternion_to_rotation
from lyra_core.conditioning.correspondence import canonical_coordinates, on_latents, ray_maps
from lyra_core.conditioning.framepack import LYRA2, FramePackLayout
from lyra_core.conditioning.history import Guides, History

LAYOUT = FramePackLayout.parse("f1k1f2s2f1s1f3k2f1k1_g3")  # 8 slots, 3 of them spatial
SIZE = (4, 6)
SHAPES = {
    "latents": (16, 8, *SIZE),
    "warped": (16, 3, *SIZE),
    "rays": (384, 8 + 3, *SIZE),
    "correspondences": (256 * 3, 3 + 3, *SIZE),
}


def history(layout=LAYOUT, **shapes) -> History:
    """With its guides asked for, which are only checked then."""
    parts = {name: torch.zeros(shape) for name, shape in {**SHAPES, **shapes}.items()}
    guides = Guides(parts.pop("rays"), parts.pop("correspondences"))
    made = History(layout, **parts, make_guides=lambda device: guides)
    assert made.guides() is guides
    return made


# ------------------------------------------------------------------------------------------------------- the record


def test_a_history_that_fits_its_layout_is_taken_and_tells_its_size():
    assert history().size == SIZE
    production = {
        "latents": (16, 25, 2, 2),
        "warped": (16, 20, 2, 2),
        "rays": (384, 45, 2, 2),
        "correspondences": (1280, 25, 2, 2),
    }
    assert history(LYRA2, **production).size == (2, 2)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("change", [-2, 2])
def test_a_part_of_another_shape_is_refused_by_name(name, axis, change):
    shape = list(SHAPES[name])
    shape[axis] += change
    # a size is the latents', so it is the next part that does not fit
    blamed = "warped" if name == "latents" and axis > 1 else name
    with pytest.raises(ValueError, match=rf"^{blamed} are .*{LAYOUT}"):
        history(**{name: tuple(shape)})


@pytest.mark.parametrize("name", SHAPES)
def test_a_part_with_a_batch_is_refused_by_name_and_with_both_shapes(name):
    found = (1, *SHAPES[name])
    with pytest.raises(ValueError) as refusal:
        history(**{name: found})
    assert str(refusal.value).startswith(f"{name} are {found}, ")
    assert name == "latents" or str(SHAPES[name]) in str(refusal.value)


@pytest.mark.parametrize(("size", "pixels"), [((5, 6), "40x48"), ((4, 7), "32x56"), ((3, 3), "24x24")])
def test_an_odd_number_of_latents_is_refused_in_pixels(size, pixels):
    with pytest.raises(ValueError, match=rf"{pixels}.*16 pixels"):
        history(**{name: (*shape[:2], *size) for name, shape in SHAPES.items()})


def test_a_history_does_not_change():
    with pytest.raises(FrozenInstanceError):
        history().latents = torch.zeros(SHAPES["latents"])


# ------------------------------------------------------------------------------------------------------------- rays


def rigid(w, x, y, z, *place) -> torch.Tensor:
    matrix = torch.eye(4)
    matrix[:3, :3] = quaternion_to_rotation(torch.tensor([w, x, y, z]))
    matrix[:3, 3] = torch.tensor(place)
    return matrix


def some_cameras() -> Cameras:
    """Three cameras that differ in all they can, with pixels that are not square."""
    w2c = torch.stack(
        [
            rigid(1.0, 0.1, -0.2, 0.05, 0.3, -0.2, 1.0),
            rigid(1.0, -0.3, 0.4, 0.1, -1.0, 0.5, 0.2),
            rigid(0.2, 0.3, 1.0, -0.4, 2.0, 1.5, -3.0),
        ]
    )
    K = torch.tensor([[[9.0, 0, 4.6], [0, 10.5, 3.1], [0, 0, 1]]]).repeat(3, 1, 1)
    K[1, 0, 0], K[2, 1, 2] = 14.0, 2.2
    return Cameras(w2c, K, (7, 11))


def test_rays_are_those_of_the_definition():
    cameras, reference = some_cameras(), some_cameras()[1]
    found = ray_maps(cameras, reference)
    assert found.shape == (6, 3, 7, 11) and found.dtype == torch.float32
    to_reference = reference.w2c[0].double()
    for frame in range(3):
        world_to, K = cameras.w2c[frame].double(), cameras.K[frame].double()
        R, t = world_to[:3, :3], world_to[:3, 3]
        origin = to_reference[:3, :3] @ (-R.T @ t) + to_reference[:3, 3]
        for v in range(7):
            for u in range(11):
                x = (u + 0.5 - K[0, 2]) / K[0, 0]
                y = (v + 0.5 - K[1, 2]) / K[1, 1]
                local = torch.stack([x, y, torch.ones(()).double()]) / (x * x + y * y + 1).sqrt()
                direction = to_reference[:3, :3] @ R.T @ local
                assert_close(
                    found[:, frame, v, u].double(), torch.cat([origin, direction]), atol=2e-6, rtol=0, check_dtype=False
                )


def test_the_reference_camera_s_own_rays_start_at_nothing_and_are_its_pixels_directions():
    for camera in some_cameras()[[0]], some_cameras()[[2]]:
        found = ray_maps(camera, camera)
        assert_close(found[:3], torch.zeros(3, 1, 7, 11), atol=1e-5, rtol=0)
        v, u = torch.meshgrid(torch.arange(7.0), torch.arange(11.0), indexing="ij")
        pixels = torch.stack([u + 0.5, v + 0.5, torch.ones_like(u)], -1)
        local = pixels @ torch.linalg.inv(camera.K[0]).T
        assert_close(found[3:, 0], (local / local.norm(dim=-1, keepdim=True)).movedim(-1, 0), atol=1e-5, rtol=0)


def test_directions_have_length_one():
    directions = ray_maps(some_cameras(), some_cameras()[0])[3:]
    assert_close(directions.norm(dim=0), torch.ones(3, 7, 11))


def test_moving_the_whole_world_changes_no_ray():
    cameras, reference = some_cameras(), some_cameras()[2]
    motion = rigid(0.7, -0.2, 0.5, 0.4, 3.0, -2.0, 1.0)
    moved, moved_reference = (replace(c, w2c=c.w2c @ motion) for c in (cameras, reference))
    assert_close(ray_maps(moved, moved_reference), ray_maps(cameras, reference), atol=1e-5, rtol=0)


def test_a_larger_world_has_the_same_directions_and_larger_origins():
    cameras, reference = some_cameras(), some_cameras()[0]

    def grown(c: Cameras) -> Cameras:
        w2c = c.w2c.clone()
        w2c[:, :3, 3] *= 3
        return replace(c, w2c=w2c)

    small, large = ray_maps(cameras, reference), ray_maps(grown(cameras), grown(reference))
    assert_close(large[:3], 3 * small[:3], atol=1e-5, rtol=0)
    assert_close(large[3:], small[3:], atol=1e-6, rtol=0)


def test_a_camera_that_steps_forward_has_its_origin_ahead():
    ahead = pinhole((4, 4), 4.0)
    ahead.w2c[:, 2, 3] = -2.0
    assert_close(ray_maps(ahead, pinhole((4, 4), 4.0))[:3, 0, 0, 0], torch.tensor([0.0, 0.0, 2.0]))


def test_rays_change_none_of_their_cameras():
    cameras, reference = some_cameras(), some_cameras()[0]
    ray_maps(cameras, reference)
    assert torch.equal(cameras.w2c, some_cameras().w2c) and torch.equal(cameras.K, some_cameras().K)
    assert torch.equal(reference.w2c, some_cameras()[0].w2c)


# -------------------------------------------------------------------------------------------------------- other maps


def test_pixels_become_channels_rows_before_columns():
    maps = torch.randn(3, 2, 16, 24, generator=torch.Generator().manual_seed(0))
    found = on_latents(maps)
    assert found.shape == (3 * 64, 2, 2, 3)
    for c in range(3):
        for dy in range(8):
            for dx in range(8):
                assert torch.equal(found[c * 64 + dy * 8 + dx], maps[c, :, dy::8, dx::8])


def test_a_frame_s_coordinates_run_from_corner_to_corner_and_over_the_slots():
    for slot, z in enumerate([-1.0, -0.5, 0.0, 0.5, 1.0]):
        found = canonical_coordinates((3, 5), slot)
        assert found.shape == (3, 5, 3)
        for v, u in ((0, 0), (2, 4), (1, 3)):
            assert_close(found[v, u], torch.tensor([u / 2 - 1, v - 1.0, z]))
    assert canonical_coordinates((2, 2), 1, slots=3)[..., 2].unique().tolist() == [0.0]
    assert math.isclose(float(canonical_coordinates((2, 2), 2, slots=4)[0, 0, 2]), 1 / 3, rel_tol=1e-6)


def test_the_inverse_of_any_intrinsics_is_their_inverse_with_every_entry_rounded_once():
    K = torch.tensor(
        [[[30.0, 0.0, 24.0], [0.0, 30.0, 16.0], [0.0, 0.0, 1.0]], [[31.0, 2.5, 20.3], [0, 29, 17.7], [0, 0, 1]]]
    )
    cameras = Cameras(torch.eye(4).repeat(2, 1, 1), K, (32, 48))
    exact = torch.linalg.inv(K.double())
    assert torch.equal(cameras.K_inverse[0], exact[0].float())
    assert_close(cameras.K_inverse.double(), exact, rtol=2e-7, atol=1e-9)
