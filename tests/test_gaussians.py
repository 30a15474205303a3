"""Views become gaussians that show the views again, and nothing is there twice."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lyra_core.cameras.camera import (
    pinhole,
    pixel_grid,
    project,
    quaternion_to_rotation,
    unproject,
)
from lyra_core.metrics.pictures import psnr
from lyra_core.splats.gaussians import (
    FOOTPRINT,
    LONGEST,
    SH_DC,
    Gaussians,
    at_most,
    colors_to_sh,
    covered,
    faintest,
    from_views,
    fuse,
    merge,
    prune,
    voxel_reduce,
    without_outliers,
)
from lyra_core.splats.rasterize import render

SIZE = (60, 80)
FOCAL = 70.0


def random_gaussians(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(torch.randn(count, 3, generator=generator),
                     torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
                     0.05 + torch.rand(count, 3, generator=generator), torch.rand(count, generator=generator),
                     torch.randn(count, 1, 3, generator=generator))


def moved(camera, to, yaw=0.0):
    """The camera standing at `to`, turned to the right by `yaw` radians."""
    c, s = torch.tensor(yaw).cos(), torch.tensor(yaw).sin()
    c2w = torch.eye(4)
    c2w[:3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    c2w[:3, 3] = torch.tensor(to)
    return replace(camera, w2c=torch.linalg.inv(c2w)[None])


def box_view(camera, half=(2.0, 1.2, 3.0)):
    """Image and depth that a camera inside a painted box around the origin sees, by intersection of rays and walls."""
    rays = (pixel_grid(camera.size) @ torch.linalg.inv(camera.K[0]).T) @ camera.c2w[0, :3, :3].T
    half = torch.tensor(half)
    depth = ((half * rays.sign() - camera.centers[0]) / rays).nan_to_num(nan=float("inf")).amin(2)
    points = camera.centers[0] + rays * depth[..., None]
    wall = ((points.abs() - half).abs() < 1e-4).float() * torch.tensor([0.2, -0.1, 0.05])
    waves = [torch.sin(3 * points[..., i] + i) * torch.cos(2 * points[..., i - 1]) for i in range(3)]
    paint = 0.5 + 0.25 * torch.stack(waves, -1)
    return (paint + wall.sum(2, keepdim=True)).clamp(0, 1), depth


def test_colours_survive_spherical_harmonics():
    colors = torch.rand(7, 3)
    gaussians = replace(random_gaussians(7), sh=colors_to_sh(colors))
    torch.testing.assert_close(gaussians.colors, colors)
    torch.testing.assert_close(gaussians.sh[:, 0], (colors - 0.5) / SH_DC)


def test_select_and_merge_take_apart_and_put_together():
    whole = random_gaussians(20)
    mask = torch.rand(20) < 0.5
    again = merge(whole.select(mask), whole.select(~mask))
    assert len(again) == 20
    torch.testing.assert_close(again.means, torch.cat([whole.means[mask], whole.means[~mask]]))
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        merge(whole, replace(whole, sh=torch.zeros(20, 4, 3)))


def test_every_known_pixel_of_the_first_view_becomes_one_gaussian_at_its_point():
    camera = pinhole(SIZE, FOCAL)
    image, depth = box_view(camera)
    depth[10:20, 5:9] = 0
    known = torch.ones(SIZE, dtype=torch.bool)
    known[:, 70:] = False
    gaussians = from_views([image], [depth], camera, known=[known])
    expected = known & (depth > 0)
    assert len(gaussians) == int(expected.sum())
    torch.testing.assert_close(gaussians.means, unproject(depth[None], camera)[0][expected])
    torch.testing.assert_close(gaussians.colors, image[expected])
    torch.testing.assert_close(gaussians.quats.norm(dim=1), torch.ones(len(gaussians)))


def test_a_gaussian_projects_back_to_a_round_spot_of_its_pixel_on_any_slope():
    camera = pinhole(SIZE, FOCAL)
    normal = torch.nn.functional.normalize(torch.tensor([0.6, -0.5, -0.9]), dim=0)
    rays = pixel_grid(SIZE) @ torch.linalg.inv(camera.K[0]).T
    depth = -3 / (rays @ normal)
    assert (depth > 0).all()
    gaussians = from_views([torch.zeros(*SIZE, 3)], [depth], camera)
    axes = quaternion_to_rotation(gaussians.quats) * gaussians.scales[:, None]
    x, y, z = gaussians.means.unbind(1)
    jacobian = FOCAL / z[:, None, None] * torch.stack([torch.stack([torch.ones_like(x), 0 * x, -x / z], 1),
                                                       torch.stack([0 * x, torch.ones_like(x), -y / z], 1)], 1)
    spot = (jacobian @ axes) @ (jacobian @ axes).mT / FOOTPRINT ** 2
    inner = spot.view(*SIZE, 2, 2)[1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.eye(2).expand_as(inner), atol=0.06, rtol=0)
    thin = quaternion_to_rotation(gaussians.quats)[:, :, 2]
    torch.testing.assert_close((thin @ normal).abs().view(SIZE)[1:-1, 1:-1], torch.ones(SIZE)[1:-1, 1:-1], atol=1e-3, rtol=0)


def test_no_gaussian_bridges_a_depth_edge():
    camera = pinhole(SIZE, FOCAL)
    depth = torch.full(SIZE, 4.0)
    depth[:, 40:] = 1.0
    gaussians = from_views([torch.zeros(*SIZE, 3)], [depth], camera)
    flat = gaussians.select(gaussians.means[:, 2] == 1.0)
    torch.testing.assert_close(flat.scales[:, :2], torch.full((len(flat), 2), FOOTPRINT / FOCAL))


def test_no_gaussian_becomes_a_needle():
    camera = pinhole(SIZE, 1000.0)
    depth = (4 * 1.03 ** -torch.arange(80.0)).expand(SIZE)
    gaussians = from_views([torch.zeros(*SIZE, 3)], [depth], camera)
    unit = gaussians.means[:, 2] / 1000
    torch.testing.assert_close(gaussians.scales.amax(1), LONGEST * FOOTPRINT * unit)


def test_a_stride_takes_every_second_point_and_makes_it_twice_as_large():
    camera = pinhole(SIZE, FOCAL)
    image, depth = torch.rand(*SIZE, 3), torch.full(SIZE, 2.0)
    fine, coarse = from_views([image], [depth], camera), from_views([image], [depth], camera, stride=2)
    torch.testing.assert_close(coarse.means, fine.means.view(*SIZE, 3)[::2, ::2].reshape(-1, 3))
    torch.testing.assert_close(coarse.scales, 2 * fine.scales[:len(coarse)])


@pytest.mark.parametrize("stride", [1, 2])
def test_views_rendered_from_where_they_were_taken_look_the_same(stride):
    camera = moved(pinhole((120, 160), 120.0), (0.3, -0.2, -0.8), 0.5)
    image, depth = box_view(camera)
    result = render(from_views([image], [depth], camera, stride), camera, backend="torch")
    taken = torch.zeros(camera.size, dtype=torch.bool)
    taken[:1 - stride or None, :1 - stride or None] = True      # with a stride the last row lies beyond the last pixel taken
    assert psnr(result.images[0], image, taken) > (34 if stride == 1 else 28)
    assert result.alpha[0][taken].min() > (0.95 if stride == 1 else 0.9)
    assert ((result.depth[0] - depth).abs() / depth).median() < 0.01


def test_a_second_identical_view_adds_nothing():
    camera = moved(pinhole(SIZE, FOCAL), (0.3, 0.1, -1.0), 0.4)
    image, depth = box_view(camera)
    once = from_views([image], [depth], camera)
    twice = fuse([(image, depth, camera), (image, depth, camera)])
    assert len(twice) == len(once) == depth.numel()


def test_a_view_from_elsewhere_adds_what_was_unseen_and_hardly_more():
    first, second = moved(pinhole(SIZE, FOCAL), (0.0, 0.0, -1.0)), moved(pinhole(SIZE, FOCAL), (0.4, 0.0, -0.8), 0.5)
    (image, depth), (image_2, depth_2) = box_view(first), box_view(second)
    added = fuse(iter([(image, depth, first), (image_2, depth_2, second)])).means[depth.numel():]
    pixels, z = project(unproject(depth_2[None], second).reshape(-1, 3), first)
    inside = (z[0] > 0) & (pixels[0] > -0.5).all(1) & (pixels[0] < torch.tensor([80, 60]) - 0.5).all(1)
    unseen = int((~inside).sum())
    assert unseen > 500
    assert 0.95 * unseen <= len(added) <= 1.03 * unseen     # means next to the border cover their neighbours as well


def test_what_was_hidden_behind_something_is_added_and_the_thing_itself_is_not():
    camera, right = pinhole(SIZE, FOCAL), moved(pinhole(SIZE, FOCAL), (0.4, 0.0, 0.0))
    depth = torch.full(SIZE, 4.0)
    depth[20:40, 30:50] = 1.5
    seen = unproject(depth[None], camera)[0, 20:40, 30:50].reshape(-1, 3)
    pixels, _ = project(seen, right)
    depth_2 = torch.full(SIZE, 4.0)
    u, v = pixels[0].round().long().unbind(1)
    depth_2[v, u] = 1.5
    grey = torch.full((*SIZE, 3), 0.5)
    added = fuse([(grey, depth, camera), (grey, depth_2, right)]).means[depth.numel():]
    assert (added[:, 2] > 3.9).all()
    shadow = added[(added[:, 0].abs() < 0.6) & (added[:, 1].abs() < 0.6)]
    assert len(shadow) > 100


def test_coverage_tells_depths_apart_and_closes_gaps_but_does_not_grow():
    camera = pinhole(SIZE, FOCAL)
    depth = torch.full(SIZE, 2.0)
    points = unproject(depth[None], camera)[0]
    patch = torch.zeros(SIZE, dtype=torch.bool)
    patch[0:31, 40:71] = True
    every_third = torch.zeros(SIZE, dtype=torch.bool)
    every_third[0:31:3, 40:71:3] = True
    assert torch.equal(covered(points[patch], depth, camera), patch)
    assert torch.equal(covered(points[every_third], depth, camera), patch)
    assert not covered(1.1 * points[patch], depth, camera).any()
    assert not covered(-points[patch], depth, camera).any()


def test_there_is_no_seam_where_a_later_view_takes_over():
    first, second = moved(pinhole(SIZE, FOCAL), (0.0, 0.0, -1.0)), moved(pinhole(SIZE, FOCAL), (0.1, 0.0, -1.0), 0.3)
    between = moved(pinhole(SIZE, FOCAL), (0.05, 0.0, -1.0), 0.15)
    result = render(fuse((*box_view(camera), camera) for camera in (first, second)), between, backend="torch")
    assert result.alpha[0, 6:-6].min() > 0.93


def test_views_are_taken_one_at_a_time():
    camera = pinhole(SIZE, FOCAL)
    alive = []

    def views():
        for i in range(4):
            alive.append(i)
            yield torch.zeros(*SIZE, 3), torch.full(SIZE, 2.0), camera, torch.ones(SIZE, dtype=torch.bool)

    assert len(fuse(views(), stride=2)) == SIZE[0] * SIZE[1] / 4 and alive == [0, 1, 2, 3]


def test_views_that_do_not_fit_together_are_refused():
    camera = pinhole(SIZE, FOCAL)
    with pytest.raises(ValueError, match=r"\(30, 40\)"):
        fuse([(torch.zeros(*SIZE, 3), torch.ones(30, 40), camera)])
    with pytest.raises(ValueError, match="no view"):
        fuse([])
    with pytest.raises(ValueError, match="2 images, 1 depths"):
        from_views(torch.zeros(2, *SIZE, 3), torch.ones(1, *SIZE), camera)


def test_a_view_without_any_depth_gives_no_gaussian():
    camera = pinhole(SIZE, FOCAL)
    empty = from_views(torch.zeros(1, *SIZE, 3), torch.zeros(1, *SIZE), camera)
    assert len(empty) == 0
    assert render(empty, camera, backend="torch").alpha.max() == 0
    assert len(voxel_reduce(empty, 0.1)) == 0


def test_pruning_removes_the_faint_the_large_and_the_broken():
    gaussians = random_gaussians(50)
    gaussians.means[3, 1] = float("nan")
    left = prune(gaussians, min_opacity=0.2, max_scale=0.9)
    expected = (gaussians.opacities >= 0.2) & (gaussians.scales.amax(1) <= 0.9)
    expected[3] = False
    assert len(left) == int(expected.sum())
    torch.testing.assert_close(left.means, gaussians.means[expected])


def test_voxels_that_hold_one_gaussian_change_nothing():
    gaussians = random_gaussians(30)
    result = voxel_reduce(gaussians, 1e-4)
    torch.testing.assert_close(result.means, gaussians.means)
    torch.testing.assert_close(result.quats, gaussians.quats)


def test_a_voxel_of_many_keeps_their_weighted_mean_and_covariance():
    gaussians = random_gaussians(40)
    # eight voxels meet at the origin; put all into one of them
    inside = replace(gaussians, means=gaussians.means + 100)
    merged = voxel_reduce(inside, 1e3)
    assert len(merged) == 1
    weights = gaussians.opacities / gaussians.opacities.sum()
    mean = (weights[:, None] * inside.means).sum(0)
    axes = quaternion_to_rotation(inside.quats) * inside.scales[:, None]
    offset = (inside.means - mean)[..., None]
    covariance = (weights[:, None, None] * (axes @ axes.mT + offset @ offset.mT)).sum(0)
    torch.testing.assert_close(merged.means[0], mean)
    found = quaternion_to_rotation(merged.quats[0]) * merged.scales[0]
    torch.testing.assert_close(found @ found.T, covariance, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(merged.sh[0], (weights[:, None, None] * inside.sh).sum(0))
    with pytest.raises(ValueError, match="positive"):
        voxel_reduce(gaussians, 0.0)


def test_a_reduced_surface_is_smaller_and_still_closed():
    camera = moved(pinhole(SIZE, FOCAL), (0.0, 0.0, -1.0))
    image, depth = box_view(camera)
    gaussians = from_views([image], [depth], camera)
    reduced = voxel_reduce(gaussians, 0.08)
    assert len(reduced) < 0.6 * len(gaussians)
    result = render(reduced, camera, backend="torch")
    assert result.alpha.min() > 0.9 and psnr(result.images[0], image) > 24


@pytest.mark.parametrize(("share", "gone"), [(0.0, 0), (0.3, 2), (0.5, 4), (0.99, 8), (1.0, 9)])
def test_the_faintest_share_ends_below_the_opacity_that_is_kept(share, gone):
    opacities = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.4, 0.6, 0.95])
    assert int((opacities < faintest(opacities, share)).sum()) == gone


def test_what_is_far_from_the_middle_goes_wherever_the_scene_stands():
    gaussians = random_gaussians(400)
    means = 7.0 + gaussians.means
    means[:3] = torch.tensor([[500.0, 7, 7], [7, -80, 7], [7, 7, 1e9]])
    left = without_outliers(replace(gaussians, means=means), 10.0)
    torch.testing.assert_close(left.means, means[3:])
    with pytest.raises(ValueError, match="above 1"):
        without_outliers(gaussians, 1.0)


def test_the_farthest_that_stay_are_exactly_so_many_times_as_far_and_equal_ones_are_no_outliers():
    gaussians = random_gaussians(9)
    means = torch.zeros(9, 3)
    means[:, 0] = torch.tensor([0, 1, -1, 1, -1, 1, 10, -1, -10.01])
    left = without_outliers(replace(gaussians, means=means), 10.0)
    torch.testing.assert_close(left.means, means[:8])
    assert len(without_outliers(replace(gaussians, means=torch.ones(9, 3)), 2.0)) == 9


@pytest.mark.parametrize("count", [1, 50, 700])
@pytest.mark.parametrize("shape", ["cloud", "flat", "with two far away"])
def test_as_many_are_left_as_asked_for_and_hardly_fewer(count, shape):
    gaussians = random_gaussians(2000)
    means = gaussians.means * torch.tensor([1.0, 1.0, 0.0 if shape == "flat" else 1.0])
    means[:2, 0] *= 1e4 if shape == "with two far away" else 1
    left = at_most(replace(gaussians, means=means), count)
    assert 0.95 * count - 3 <= len(left) <= count


def test_only_those_that_nearly_coincide_become_one_where_that_is_enough():
    gaussians = random_gaussians(30)
    means = gaussians.means.double()
    means[29] = means[28] + 1e-9
    left = at_most(replace(gaussians, means=means.float().double()), 29)
    torch.testing.assert_close(left.means[:28], means[:28].float().double())
    assert len(left) == 29


def test_few_enough_stay_as_they_are_and_equal_ones_become_one():
    gaussians = random_gaussians(20)
    assert at_most(gaussians, 20) is gaussians
    same = replace(gaussians, means=torch.ones(20, 3))
    assert len(at_most(same, 5)) == 1 and at_most(same, 20) is same
    with pytest.raises(ValueError, match="1 or more"):
        at_most(gaussians, 0)
