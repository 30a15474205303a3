"""The rasteriser does what the formula says, pixel by pixel, from outside and from inside a scene."""
from __future__ import annotations

from dataclasses import replace
from math import exp, log, pi, sqrt

import numpy as np
import pytest
import torch

from lyra_core.cameras.camera import pinhole, quaternion_to_rotation
from lyra_core.splats import rasterize
from lyra_core.splats.gaussians import Gaussians, colors_to_sh, harmonics, merge
from lyra_core.splats.rasterize import render, render_frames

SIZE = (20, 24)


def random_gaussians(count, seed, scale=0.08, depth=(1.0, 4.0)):
    """In front of a camera at the origin, some of them beside its picture."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    z = depth[0] + (depth[1] - depth[0]) * rand(count, 1)
    means = torch.cat([(rand(count, 2) - 0.5) * z * 1.6, z], 1)
    return Gaussians(means, torch.nn.functional.normalize(rand(count, 4) - 0.5, dim=1), scale * (0.05 + rand(count, 3)),
                     rand(count), colors_to_sh(rand(count, 3)))


def turned_camera():
    camera = pinhole(SIZE, 22.0)
    w2c = torch.eye(4)
    w2c[:3, :3] = quaternion_to_rotation(torch.tensor([1.0, 0.05, -0.08, 0.1]))
    w2c[:3, 3] = torch.tensor([0.1, -0.2, 0.3])
    K = camera.K.clone()
    K[0, 0, 0], K[0, 0, 2] = 19.0, 9.0          # pixels that aren't square, a principal point off the middle
    return replace(camera, w2c=w2c[None], K=K)


def brute_force(gaussians, camera, background=(0.0, 0.0, 0.0), near=0.01):
    """Image, depth, alpha by the textbook formula, one pixel and one gaussian at a time, in double precision."""
    height, width = camera.size
    R, t, K = camera.w2c[0, :3, :3].double(), camera.w2c[0, :3, 3].double(), camera.K[0].double()
    local = gaussians.means.double() @ R.T + t
    rotation = quaternion_to_rotation(gaussians.quats.double())
    covariance = R @ rotation @ torch.diag_embed(gaussians.scales.double() ** 2) @ rotation.mT @ R.T
    splats = []
    for i in sorted(range(len(gaussians)), key=lambda i: float(local[i, 2])):
        x, y, z = local[i].tolist()
        if z <= near:
            continue
        fx, fy, cx, cy = float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])
        slope_x = min(max(x / z, (-cx - 0.15 * width) / fx), (width - 1 - cx + 0.15 * width) / fx)
        slope_y = min(max(y / z, (-cy - 0.15 * height) / fy), (height - 1 - cy + 0.15 * height) / fy)
        J = torch.tensor([[fx / z, 0, -fx / z * slope_x], [0, fy / z, -fy / z * slope_y]], dtype=torch.float64)
        inverse = torch.linalg.inv(J @ covariance[i] @ J.T + 0.3 * torch.eye(2, dtype=torch.float64)).tolist()
        splats.append((fx * x / z + cx, fy * y / z + cy, z, inverse, float(gaussians.opacities[i]), gaussians.colors[i]))
    image, depth, alpha = torch.zeros(height, width, 3), torch.zeros(height, width), torch.zeros(height, width)
    for v in range(height):
        for u in range(width):
            clear = 1.0
            for x, y, z, ((a, b), (_, c)), opacity, color in splats:
                dx, dy = u - x, v - y
                share = min(opacity * exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy)), 0.999)
                if share >= 1 / 255:
                    image[v, u] += clear * share * color
                    depth[v, u] += clear * share * z
                    clear *= 1 - share
            alpha[v, u] = 1 - clear
            image[v, u] += clear * torch.tensor(background)
            depth[v, u] /= max(1 - clear, 1e-12)
    return image, depth, alpha


SCENES = {
    "small ones": lambda: random_gaussians(40, 1),
    "overlapping big ones": lambda: random_gaussians(40, 2, scale=0.8),
    "needles": lambda: replace(random_gaussians(40, 3), scales=torch.tensor([[3.0, 0.001, 0.001]]).repeat(40, 1)),
    "behind and very near": lambda: merge(random_gaussians(20, 4, scale=0.3, depth=(-2.0, 0.5)),
                                          random_gaussians(20, 5, scale=0.02, depth=(0.02, 0.3)), random_gaussians(20, 6)),
    "many opaque layers": lambda: replace(random_gaussians(90, 7, scale=0.5), opacities=torch.full((90,), 0.9)),
}


@pytest.mark.parametrize("scene", SCENES)
def test_every_pixel_is_what_the_formula_says(scene):
    gaussians, camera = SCENES[scene](), turned_camera()
    image, depth, alpha = brute_force(gaussians, camera, (0.2, 0.5, 0.9))
    result = render(gaussians, camera, (0.2, 0.5, 0.9), backend="torch")
    assert alpha.max() > 0.5
    torch.testing.assert_close(result.images[0], image, atol=1e-4, rtol=0)
    torch.testing.assert_close(result.alpha[0], alpha, atol=1e-4, rtol=0)
    seen = alpha > 0
    assert (result.depth[0][~seen] == 0).all()
    torch.testing.assert_close(result.depth[0][seen], depth[seen], atol=1e-3, rtol=1e-3)


def test_batches_slices_and_slabs_do_not_show(monkeypatch):
    gaussians, camera = SCENES["overlapping big ones"](), turned_camera()
    whole = render(gaussians, camera, backend="torch")
    for name, value in (("SLAB", 7), ("SLICE", 3), ("BATCH_CPU", 400)):
        monkeypatch.setattr(rasterize, name, value)
    pieces = render(gaussians, camera, backend="torch")
    torch.testing.assert_close(pieces.images, whole.images, atol=1e-4, rtol=0)
    torch.testing.assert_close(pieces.depth, whole.depth, atol=1e-3, rtol=1e-4)


def test_the_order_of_the_gaussians_does_not_matter():
    gaussians, camera = SCENES["overlapping big ones"](), turned_camera()
    shuffled = gaussians.select(torch.randperm(len(gaussians), generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(render(shuffled, camera, backend="torch").images,
                               render(gaussians, camera, backend="torch").images, atol=1e-5, rtol=0)


def room(spacing=0.06, half=(2.0, 1.3, 3.0)):
    """Round splats on the six walls of a box around the origin, each wall of its own colour."""
    parts = []
    for axis in range(3):
        others = [half[i] for i in range(3) if i != axis]
        a, b = torch.meshgrid(*(torch.arange(-h, h + spacing, spacing) for h in others), indexing="ij")
        for side in (-1, 1):
            wall = torch.full((a.numel(), 3), side * half[axis])
            wall[:, [i for i in range(3) if i != axis]] = torch.stack([a.flatten(), b.flatten()], 1)
            color = torch.full((len(wall), 3), 0.1)
            color[:, axis] = 0.5 + 0.4 * side
            parts.append(Gaussians(wall, torch.tensor([[1.0, 0, 0, 0]]).repeat(len(wall), 1),
                                   torch.full((len(wall), 3), 0.6 * spacing), torch.full((len(wall),), 0.95),
                                   colors_to_sh(color)))
    return merge(*parts)


def test_a_room_seen_from_inside_is_closed_whichever_way_one_looks():
    gaussians = room()
    for yaw, axis, side in ((0.0, 2, 1), (0.5, 0, 1), (1.0, 2, -1), (1.5, 0, -1)):
        angle = torch.tensor(yaw * pi)
        w2c = torch.eye(4)
        w2c[0, 0] = w2c[2, 2] = angle.cos()
        w2c[0, 2], w2c[2, 0] = -angle.sin(), angle.sin()
        camera = replace(pinhole((96, 160), 90.0), w2c=w2c[None])
        result = render(gaussians, camera, backend="torch")
        assert result.alpha.min() > 0.95
        assert float(result.images[0, 48, 80, axis]) == pytest.approx(0.5 + 0.4 * side, abs=0.03)
        assert float(result.depth[0, 48, 80]) == pytest.approx({2: 3.0, 0: 2.0}[axis], abs=0.1)


def test_a_single_opaque_gaussian_lies_where_its_camera_projects_it():
    camera = pinhole((33, 41), 40.0)
    point = torch.tensor([[0.3, -0.2, 2.0]])
    gaussians = Gaussians(point, torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 0.02), torch.ones(1),
                          colors_to_sh(torch.tensor([[1.0, 0.5, 0.0]])))
    alpha = render(gaussians, camera, backend="torch").alpha[0]
    v, u = torch.meshgrid(torch.arange(33.0), torch.arange(41.0), indexing="ij")
    centroid = torch.stack([(u * alpha).sum(), (v * alpha).sum()]) / alpha.sum()
    torch.testing.assert_close(centroid, torch.tensor([20 + 40 * 0.15, 16 - 40 * 0.1]), atol=0.02, rtol=0)


def test_a_gaussian_that_fills_the_picture_needs_no_more_than_a_slab(monkeypatch):
    monkeypatch.setattr(rasterize, "SLAB", 1000)
    camera = pinhole((160, 160), 100.0)
    gaussians = replace(random_gaussians(50, 8, scale=20.0), opacities=torch.full((50,), 0.3))
    largest = []
    slabs = rasterize._slabs
    monkeypatch.setattr(rasterize, "_slabs", lambda *a: (largest.append(len(e[0])) or e for e in slabs(*a)))
    assert render(gaussians, camera, backend="torch").alpha.min() > 0.9
    assert 0 < max(largest) <= 1000


def test_hidden_gaussians_change_nothing():
    gaussians, camera = room(), pinhole((96, 160), 90.0)
    behind = random_gaussians(200, 9, depth=(5.0, 9.0))
    torch.testing.assert_close(render(merge(gaussians, behind), camera, backend="torch").images,
                               render(gaussians, camera, backend="torch").images, atol=0.02, rtol=0)


def test_nothing_in_sight_shows_the_background():
    camera = pinhole(SIZE, 22.0)
    behind = random_gaussians(10, 10, depth=(-4.0, -1.0))
    result = render(behind, camera, (0.1, 0.2, 0.3), backend="torch")
    torch.testing.assert_close(result.images[0], torch.tensor([0.1, 0.2, 0.3]).expand(*SIZE, 3))
    assert result.alpha.max() == 0 and result.depth.max() == 0


def test_broken_and_invisible_gaussians_are_left_out():
    gaussians, camera = random_gaussians(30, 11, scale=0.3), turned_camera()
    bad = random_gaussians(4, 12, scale=0.3)
    bad.means[0, 0], bad.scales[1, 0], bad.opacities[2], bad.opacities[3] = float("nan"), float("inf"), float("nan"), 0.0
    assert torch.equal(render(merge(bad, gaussians), camera, backend="torch").images,
                       render(gaussians, camera, backend="torch").images)


@pytest.mark.parametrize("degree", range(5))
def test_colours_change_with_the_direction_as_gsplat_s_do(degree):
    """Against gsplat's own formula in plain torch, in pictures of gaussians that are seen from another side each."""
    reference = pytest.importorskip("gsplat.cuda._torch_impl")
    gaussians, camera = random_gaussians(60, 16, scale=0.2), turned_camera()
    sh = torch.randn(60, (degree + 1) ** 2, 3, generator=torch.Generator().manual_seed(17)) * 0.4
    gaussians = replace(gaussians, sh=sh)
    colors = reference._spherical_harmonics(degree, gaussians.means - camera.centers[0], sh) + 0.5
    plain = replace(gaussians, sh=colors_to_sh(colors.clamp_min(0)))
    expected, found = (render(each, camera, backend="torch").images for each in (plain, gaussians))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    elsewhere = replace(camera, w2c=camera.w2c + torch.tensor([[0, 0, 0, 0.4], *[[0.0] * 4] * 3]))
    moved = [render(each, elsewhere, backend="torch").images for each in (plain, gaussians)]
    assert ((moved[0] - moved[1]).abs().max() > 0.02) == (degree > 0)


@pytest.mark.parametrize("degree", range(5))
def test_harmonics_are_orthonormal_over_all_directions(degree):
    z, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(8))
    angle = torch.arange(16, dtype=torch.float64) * 2 * pi / 16
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    directions = torch.cat([(1 - z.square()).sqrt()[:, None, None] * ring, z[:, None, None].expand(8, 16, 1)], 2)
    values = harmonics(directions, degree)
    product = torch.einsum("a,abi,abj->ij", weight * 2 * pi / 16, values, values)
    torch.testing.assert_close(product, torch.eye((degree + 1) ** 2, dtype=torch.float64))


@pytest.mark.parametrize("count", [0, 2, 3, 8, 15, 36])
def test_harmonics_that_fill_no_degree_are_refused(count):
    gaussians = replace(random_gaussians(3, 18), sh=torch.zeros(3, count, 3))
    with pytest.raises(ValueError, match=f"{count} spherical harmonics are no degree up to 4"):
        render(gaussians, turned_camera(), backend="torch")


def test_no_finite_gaussian_however_large_or_near_breaks_a_picture():
    """Sizes and distances whose squares leave no digits of float32 for the smaller axis."""
    camera = turned_camera()
    for scale, z in ((1e11, 0.02), (1e6, 0.011), (1e3, 1e6), (1e12, 1e12), (0.0, 0.02)):
        for flat in ((1, 1, 1), (1, 1e-6, 1e-6), (1, 1, 1e-9)):
            means = torch.tensor([[0.0, 0.1 * z, z]]) @ camera.w2c[0, :3, :3] + camera.centers[0]
            large = Gaussians(means, torch.tensor([[0.5, 0.1, 0.7, -0.3]]), scale * torch.tensor([flat]), torch.ones(1),
                              colors_to_sh(torch.ones(1, 3)))
            found = render(large, camera, backend="torch")
            assert all(torch.isfinite(part).all() and part.min() >= 0 for part in vars(found).values()), (scale, z, flat)
            assert found.images.max() <= 1.0001


def test_frames_come_one_at_a_time_and_together_make_the_rendering():
    gaussians = random_gaussians(40, 13)
    cameras = pinhole(SIZE, 22.0, 3)
    w2c = cameras.w2c.clone()
    w2c[:, 0, 3] = torch.tensor([0.0, 0.2, 0.4])
    cameras = replace(cameras, w2c=w2c)
    frames = render_frames(gaussians, cameras, backend="torch")
    first = next(frames)
    assert first.images.shape == (1, *SIZE, 3) and first.depth.shape == first.alpha.shape == (1, *SIZE)
    together = render(gaussians, cameras, backend="torch")
    assert together.images.shape == (3, *SIZE, 3)
    assert torch.equal(together.images[:1], first.images)
    assert torch.equal(together.images[2:], list(frames)[-1].images)


def test_the_low_pass_keeps_a_tiny_gaussian_visible():
    camera = pinhole((15, 15), 20.0)
    dot = Gaussians(torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 1e-6), torch.ones(1),
                    colors_to_sh(torch.ones(1, 3)))
    alpha = render(dot, camera, backend="torch").alpha[0]
    assert float(alpha[7, 7]) == pytest.approx(0.999)
    reach = sqrt(2 * 0.3 * log(255))
    assert int((alpha[7] > 0).sum()) == 2 * int(reach) + 1


def test_a_rasteriser_that_cannot_be_had_is_refused_by_name():
    gaussians, camera = random_gaussians(3, 14), pinhole(SIZE, 22.0)
    with pytest.raises(ValueError, match="'metal'"):
        render(gaussians, camera, backend="metal")
    with pytest.raises(RuntimeError, match="CUDA only; the rasteriser 'torch' draws without"):
        render(gaussians, camera, backend="gsplat")
    with pytest.raises(RuntimeError, match="pip install gsplat. and an NVIDIA GPU: the gaussians are on cpu"):
        rasterize.differentiable(torch.device("cpu"))
    assert render(gaussians, camera, backend="auto").images.shape == (1, *SIZE, 3)


def test_gsplat_is_asked_in_its_own_conventions():
    gaussians, camera = random_gaussians(3, 15), turned_camera()
    asked = {}

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, **options):
        asked.update(options, K=Ks, size=(height, width), colors=colors)
        picture = torch.arange(4.0).expand(1, height, width, 4)
        return picture, torch.full((1, height, width, 1), 0.5), {}

    color, alpha, depth = rasterize._render_gsplat(rasterization, gaussians, camera, near=0.2)
    torch.testing.assert_close(asked["K"][0, :2, 2], camera.K[0, :2, 2] + 0.5)
    assert torch.equal(asked["colors"], gaussians.sh) and asked["sh_degree"] == 0
    more = replace(gaussians, sh=torch.rand(3, 16, 3))
    rasterize._render_gsplat(rasterization, more, camera, near=0.2)
    assert torch.equal(asked["colors"], more.sh) and asked["sh_degree"] == 3
    assert asked["size"] == SIZE and asked["near_plane"] == 0.2 and asked["eps2d"] == rasterize.LOW_PASS
    assert color.shape == (*SIZE, 3) and alpha.shape == depth.shape == SIZE
    assert color[0, 0].tolist() == [0, 1, 2] and depth[0, 0] == 3 and alpha[0, 0] == 0.5
