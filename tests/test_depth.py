"""Depth without weights is where the walls are; depth from others arrives with their conventions undone."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import from_normalized, pinhole, pixel_grid, to_corner_origin, unproject
from lyra_core.memory import depth as depth_
from lyra_core.memory.depth import (
    DepthMap,
    depth_map,
    focal_from_fov,
    from_da3,
    from_moge,
    from_picture,
    ground,
    resized,
    room_box,
    sharpened,
)

SIZE = (25, 41)  # odd, so that there is a middle pixel


def intrinsics(focal=30.0, size=SIZE, shift=(0.0, 0.0)):
    K = pinhole(size, focal).K[0]
    K[0, 2] += shift[0]
    K[1, 2] += shift[1]
    return K


def points_of(found: DepthMap):
    return unproject(found.depth[None], found.camera)[0]


def rays_of(K, size=SIZE):
    """Directions through the pixels, written out."""
    v, u = torch.meshgrid(torch.arange(float(size[0])), torch.arange(float(size[1])), indexing="ij")
    return torch.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], torch.ones(size)], -1)


# layouts


def test_a_plane_is_as_far_as_it_says_at_every_pixel():
    found = depth_.plane(SIZE, intrinsics(), 3.5)
    assert found.size == SIZE
    assert torch.equal(points_of(found)[..., 2], torch.full(SIZE, 3.5))


@pytest.mark.parametrize("horizon", [0.5, 0.3, 0.7, -0.2])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (4.0, -3.0)])
def test_a_ground_is_a_floor_up_to_a_backdrop(horizon, shift):
    K, height, distance = intrinsics(shift=shift), 1.6, 9.0
    found = ground(SIZE, K, horizon, height, distance)
    pitch = math.atan((horizon * (SIZE[0] - 1) - K[1, 2].item()) / K[1, 1].item())  # of the level line, downwards
    down = torch.tensor([0, math.cos(pitch), -math.sin(pitch)])
    ahead = torch.tensor([0, math.sin(pitch), math.cos(pitch)])
    rays = rays_of(K)
    floor = torch.where(rays @ down > 0, height / (rays @ down), math.inf)
    assert_close(found.depth, torch.minimum(floor, distance / (rays @ ahead)), rtol=1e-4, atol=0)
    points = points_of(found)
    on_floor, on_wall = (points @ down - height).abs() < 1e-3, (points @ ahead - distance).abs() < 1e-3
    assert (on_floor | on_wall).all() and on_wall.any() and (points @ down).max() < height + 1e-3


def test_a_level_ground_meets_the_backdrop_below_the_horizon():
    K = intrinsics()
    found = ground(SIZE, K, 0.5, 1.0, 6.0)
    horizon = SIZE[0] // 2
    assert_close(found.depth[: horizon + 1], torch.full((horizon + 1, SIZE[1]), 6.0))
    seam = K[1, 2] + K[1, 1] * 1.0 / 6.0  # the row where the floor is 6 away
    assert (found.depth[math.ceil(seam.item()) :] <= 6.0).all()
    assert_close(found.depth[-1], torch.full((SIZE[1],), 1.0 * K[1, 1].item() / (SIZE[0] - 1 - K[1, 2].item())))


def box_of(K, vanishing_point, back_wall, distance):
    """Axes (rows right, down, ahead) and the walls' places (left, right, ceiling, floor), by similar triangles."""

    def ray(x, y):
        u, v = x * (SIZE[1] - 1), y * (SIZE[0] - 1)
        return torch.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], torch.tensor(1.0)])

    ahead = ray(*vanishing_point) / ray(*vanishing_point).norm()
    right = torch.stack([ahead[2], torch.tensor(0.0), -ahead[0]]) / torch.hypot(ahead[0], ahead[2])
    down = torch.stack(
        [
            ahead[1] * right[2] - ahead[2] * right[1],
            ahead[2] * right[0] - ahead[0] * right[2],
            ahead[0] * right[1] - ahead[1] * right[0],
        ]
    )
    (vx, vy), (left, top, end, bottom) = vanishing_point, back_wall

    def on_back_wall(x, y):
        return distance * ray(x, y) / (ray(x, y) @ ahead)

    return torch.stack([right, down, ahead]), (
        on_back_wall(left, vy) @ right,
        on_back_wall(end, vy) @ right,
        on_back_wall(vx, top) @ down,
        on_back_wall(vx, bottom) @ down,
    )


@pytest.mark.parametrize(
    "vanishing_point, back_wall",
    [
        ((0.5, 0.5), (0.3, 0.3, 0.7, 0.7)),
        ((0.4, 0.6), (0.2, 0.45, 0.75, 0.7)),
        ((0.5, 0.5), (-0.5, -0.2, 1.5, 1.2)),
        ((0.7, 0.4), (0.65, 0.3, 0.9, 0.5)),
    ],
)
def test_a_room_box_is_the_inside_of_five_walls(vanishing_point, back_wall):
    K, distance = intrinsics(shift=(2.0, 1.0)), 5.0
    axes, (left, right, ceiling, floor) = box_of(K, vanishing_point, back_wall, distance)
    assert left < 0 < right and ceiling < 0 < floor
    found = room_box(SIZE, K, vanishing_point, back_wall, distance)
    x, y, z = (points_of(found) @ axes.T).unbind(-1)
    gaps = torch.stack([x - left, right - x, y - ceiling, floor - y, distance - z])
    assert gaps.min() > -1e-3  # nothing is outside
    assert_close(gaps.abs().amin(0), torch.zeros(SIZE), atol=1e-3, rtol=0)  # and everything on a wall


def test_a_room_seen_straight_on_has_its_back_wall_where_it_was_drawn():
    found = room_box(SIZE, intrinsics(), (0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 4.0)
    rows, columns = slice(6, 19), slice(10, 31)  # a quarter to three quarters of 24 and 40
    assert_close(found.depth[rows, columns], torch.full((13, 21), 4.0))
    outside = torch.ones(SIZE, dtype=torch.bool)
    outside[rows, columns] = False
    assert (found.depth[outside] < 4.0 - 1e-3).all()
    assert_close(found.depth[12, 0], torch.tensor(2.0))  # twice as far from the middle, half as deep
    assert_close(found.depth, found.depth.flip(0))
    assert_close(found.depth, found.depth.flip(1))


@pytest.mark.parametrize("point", [(0.1, 0.5), (0.9, 0.5), (0.5, 0.1), (0.5, 0.9), (0.3, 0.5)])
def test_a_vanishing_point_outside_the_back_wall_is_refused_with_both(point):
    with pytest.raises(
        ValueError, match=rf"vanishing point \({point[0]:g}, {point[1]:g}\).*0.3 to 0.7 and y 0.2 to 0.8"
    ):
        room_box(SIZE, intrinsics(), point, (0.3, 0.2, 0.7, 0.8), 5.0)


def test_a_field_of_view_makes_the_focal_length_that_spans_it():
    for degrees in (1, 40, 90, 170):
        focal = focal_from_fov(SIZE, degrees)
        assert_close(2 * math.degrees(math.atan(SIZE[1] / 2 / focal)), float(degrees), rtol=1e-4, atol=0)
    for degrees in (0.5, 171, -40):
        with pytest.raises(ValueError, match=f"{degrees} degrees"):
            focal_from_fov(SIZE, degrees)


# pictures


def test_a_depth_picture_is_read_by_its_kind():
    value = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    K = intrinsics(size=(2, 2))
    assert_close(from_picture(value, K, "disparity", 2, 8).depth, 1 / torch.tensor([[0.125, 0.21875], [0.3125, 0.5]]))
    assert_close(from_picture(value, K, "linear", 2, 8).depth, torch.tensor([[2, 3.5], [5, 8]]))
    assert_close(from_picture(value, K, "metric", 2, 8).depth, torch.tensor([[0.0, 2], [4, 8]]))


def test_a_colour_picture_counts_as_its_grey_and_transparency_does_not():
    grey = torch.rand(*SIZE, generator=torch.Generator().manual_seed(0))
    expected = from_picture(grey, intrinsics(), "linear", 1, 5).depth
    for channels in (1, 3, 4):
        picture = grey[..., None].repeat(1, 1, channels)
        if channels == 4:
            picture[..., 3] = 0
        assert_close(from_picture(picture, intrinsics(), "linear", 1, 5).depth, expected)


@pytest.mark.parametrize("near, far", [(5, 5), (5, 1), (0, 5), (-1, 5), (math.nan, 5)])
def test_near_and_far_must_be_positive_and_in_order(near, far):
    with pytest.raises(ValueError, match=f"near {near:g} and far {far:g}.*0 < near < far"):
        from_picture(torch.ones(SIZE), intrinsics(), "linear", near, far)


def test_what_is_no_depth_picture_is_refused():
    with pytest.raises(ValueError, match="kind 'log'.*'disparity', 'linear' or 'metric'"):
        from_picture(torch.ones(SIZE), intrinsics(), "log", 1, 5)
    with pytest.raises(ValueError, match="metric picture: no pixel has a positive finite depth"):
        from_picture(torch.zeros(SIZE), intrinsics(), "metric", 1, 5)


# raw numbers


def test_what_is_not_a_positive_finite_depth_becomes_unknown():
    raw = torch.tensor([[1.0, math.nan, math.inf], [-math.inf, -2.0, 0.0]])
    found = depth_map(raw, intrinsics(size=(2, 3)), "test")
    assert found.depth.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert raw[1, 1] == -2  # the estimator's own tensor is left alone


@pytest.mark.parametrize(
    "depth, K, says",
    [
        (torch.ones(3, 4, 1), intrinsics(), r"at least 2 pixels a side, found \(3, 4, 1\)"),
        (torch.ones(1, 4), intrinsics(), r"found \(1, 4\)"),
        (torch.full((3, 4), math.nan), intrinsics(), "no pixel"),
        (torch.ones(3, 4), intrinsics(focal=-1.0), "unusable intrinsics"),
        (torch.ones(3, 4), intrinsics() * math.nan, "unusable intrinsics"),
        (torch.ones(3, 4), torch.eye(4), "unusable intrinsics"),
    ],
)
def test_unusable_numbers_are_refused_with_what_was_found(depth, K, says):
    with pytest.raises(ValueError, match=f"somewhere: .*{says}"):
        depth_map(depth, K, "somewhere")


# the host's estimators

NORMAL, OFFSET = torch.nn.functional.normalize(torch.tensor([0.2, -0.3, 1.0]), dim=0), 4.0


def slanted(K, size=SIZE):
    """Depth of the plane NORMAL . p = OFFSET."""
    return OFFSET / (rays_of(K, size) @ NORMAL)


def moge(batch=2):
    """What the host's MoGe node gives: normalised intrinsics with half-pixel centres."""
    K = intrinsics(shift=(1.5, -0.5))
    normalised = torch.stack(
        [(K[0] + torch.tensor([0, 0, 0.5])) / SIZE[1], (K[1] + torch.tensor([0, 0, 0.5])) / SIZE[0], K[2]]
    )
    return {
        "depth": torch.stack([slanted(K)] * batch),
        "intrinsics": normalised.expand(batch, 3, 3).clone(),
        "mask": torch.ones(batch, *SIZE, dtype=torch.bool),
    }, K


def test_a_plane_through_moges_intrinsics_is_the_same_plane():
    geometry, K = moge()
    found = from_moge(geometry, 1)
    assert_close(found.K, K)
    assert_close(points_of(found) @ NORMAL, torch.full(SIZE, OFFSET))
    assert_close(from_normalized(geometry["intrinsics"][0], SIZE), K)


def test_moges_own_half_pixel_rays_are_ours():
    geometry, _ = moge()
    K = geometry["intrinsics"][0]
    v, u = torch.meshgrid(
        (torch.arange(SIZE[0]) + 0.5) / SIZE[0], (torch.arange(SIZE[1]) + 0.5) / SIZE[1], indexing="ij"
    )
    theirs = torch.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], torch.ones(SIZE)], -1)
    ours = pixel_grid(SIZE) @ torch.linalg.inv(from_moge(geometry).K).T
    assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_what_moge_masks_or_puts_at_infinity_is_unknown():
    geometry, K = moge()
    geometry["mask"][0, :3] = False
    geometry["depth"][0, 5, :4] = math.inf  # MoGe writes infinity where its mask is False
    found = from_moge(geometry)
    unknown = torch.zeros(SIZE, dtype=torch.bool)
    unknown[:3] = unknown[5, :4] = True
    assert torch.equal(found.depth == 0, unknown)
    assert_close(found.depth[~unknown], slanted(K)[~unknown])
    assert (from_moge(geometry, 1).depth > 0).all()
    del geometry["mask"]
    assert (from_moge(geometry, 1).depth > 0).all()


def test_an_incomplete_moge_geometry_is_refused_by_what_it_lacks():
    geometry, _ = moge()
    with pytest.raises(ValueError, match="no intrinsics.*MoGeInference"):
        from_moge({key: geometry[key] for key in ("depth", "mask")})
    with pytest.raises(ValueError, match=r"no 'depth', only \['intrinsics', 'mask'\]"):
        from_moge({key: geometry[key] for key in ("intrinsics", "mask")})
    for index in (2, -1):
        with pytest.raises(ValueError, match=f"holds 2 views; there is no view {index}"):
            from_moge(geometry, index)


def test_depth_anythings_sky_is_unknown_and_its_intrinsics_are_pixels():
    K = intrinsics(shift=(0.2, -0.2))
    theirs = K + torch.tensor([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])  # the network's middle is half the width
    sky = torch.zeros(2, *SIZE)
    sky[1, :4] = 0.9
    geometry = {
        "depth": torch.stack([slanted(K)] * 2),
        "sky": sky,
        "intrinsics": torch.stack([torch.eye(3), theirs])[None],
    }
    found = from_da3(geometry, 1)
    assert_close(found.K, K)
    assert torch.equal(found.depth[:4], torch.zeros(4, SIZE[1])) and (found.depth[4:] > 0).all()
    assert_close(points_of(found)[4:] @ NORMAL, torch.full((SIZE[0] - 4, SIZE[1]), OFFSET))


def test_depth_anything_without_intrinsics_is_given_a_field_of_view():
    geometry = {"depth": torch.full((1, *SIZE), 2.0)}
    found = from_da3(geometry, horizontal_fov=90.0)
    assert_close(found.K, intrinsics(SIZE[1] / 2))
    assert "90 degrees assumed" in found.source
    assert from_da3(geometry).K[0, 0] > found.K[0, 0]  # 60 degrees are the narrower view
    with pytest.raises(ValueError, match=r"DA3_GEOMETRY has no 'depth', only \['sky'\]"):
        from_da3({"sky": torch.zeros(1, *SIZE)})
    with pytest.raises(ValueError, match="holds 1 views; there is no view 3"):
        from_da3(geometry, 3)


# sizes and silhouettes


@pytest.mark.parametrize("size", [(50, 82), (12, 20), (25, 60), (7, 9)])
def test_a_resized_map_invents_no_depth_and_stretches_its_intrinsics(size):
    depth = torch.where(torch.arange(SIZE[1]) < 17, 1.5, 6.0).repeat(SIZE[0], 1)
    depth[:4] = 0
    found = resized(DepthMap(depth, intrinsics(), "test"), size)
    assert found.size == size and found.source == "test"
    assert set(found.depth.unique().tolist()) == {0.0, 1.5, 6.0}
    scale = torch.tensor([[size[1] / SIZE[1]], [size[0] / SIZE[0]], [1]])
    assert_close(to_corner_origin(found.K), to_corner_origin(intrinsics()) * scale)  # pixels are areas


def test_a_map_of_the_right_size_is_left_alone():
    found = depth_.plane(SIZE, intrinsics(), 2.0)
    assert resized(found, SIZE) is found


def test_doubling_and_halving_a_map_returns_it():
    depth = 1 + torch.rand(*SIZE, generator=torch.Generator().manual_seed(0))
    found = DepthMap(depth, intrinsics(), "test")
    back = resized(resized(found, (2 * SIZE[0], 2 * SIZE[1])), SIZE)
    assert torch.equal(back.depth, depth)
    assert_close(back.K, found.K)


@pytest.mark.parametrize("normal", [(0, 0, 1), (1.2, 0, 1), (0, -1.5, 1), (0.7, 0.7, 1), (0, 2.2, 1)])
def test_slanted_planes_have_no_floating_pixels(normal):
    rays = rays_of(intrinsics())
    depth = 4 / (rays @ torch.tensor(normal, dtype=torch.float32))
    depth = torch.where((depth > 0) & (depth < 60), depth, 0.0)
    inside = torch.nn.functional.max_pool2d((depth == 0).float()[None, None], 9, 1, 4)[0, 0] == 0
    assert inside.any()
    assert torch.equal(sharpened(depth)[inside], depth[inside])


@pytest.mark.parametrize("width", [1, 2])
def test_pixels_that_float_at_a_silhouette_join_one_of_its_sides(width):
    near, far = 2.0, 6.0
    ramp = torch.cat(
        [torch.full((18,), near), torch.linspace(near, far, width + 2)[1:-1], torch.full((23 - width,), far)]
    )
    for depth in (ramp.repeat(20, 1), ramp.repeat(20, 1).T):
        found = sharpened(depth)
        assert ((found - near).abs() < 1e-4).logical_or((found - far).abs() < 1e-4).all()
        flat = (depth == near) | (depth == far)
        assert_close(found[flat], depth[flat])


def test_a_floating_pixel_joins_the_side_that_is_nearer_in_disparity():
    for middle, side in ((2.5, 2.0), (5.0, 6.0)):
        depth = torch.where(torch.arange(20) < 10, 2.0, 6.0).repeat(12, 1)
        depth[:, 10] = middle
        assert_close(sharpened(depth)[:, 10], torch.full((12,), side))


def test_sharpening_leaves_the_unknown_unknown_and_nothing_else():
    depth = torch.where(torch.arange(20) < 10, 2.0, 6.0).repeat(12, 1)
    depth[3:6, 8:14] = 0
    found = sharpened(depth)
    assert torch.equal(found == 0, depth == 0)
    assert torch.isfinite(found).all()
    assert torch.equal(sharpened(torch.zeros(8, 8)), torch.zeros(8, 8))
