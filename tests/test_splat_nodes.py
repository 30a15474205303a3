"""The splat nodes on the host's own SPLAT."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

FIELDS = ("positions", "scales", "rotations", "opacities", "sh")


@pytest.fixture
def nodes(pack):
    return pack.splat


@pytest.fixture
def splat(nodes):
    """1,000 in a cube, of which 100 are faint, 50 large and 5 far away."""
    random = torch.Generator().manual_seed(0)
    gaussians = nodes.splats.Gaussians(
        torch.rand(1000, 3, generator=random),
        torch.tensor([[1.0, 0, 0, 0]]).repeat(1000, 1),
        torch.full((1000, 3), 0.01),
        torch.full((1000,), 0.8),
        torch.rand(1000, 1, 3, generator=random),
    )
    gaussians.opacities[:100] = 0.01
    gaussians.scales[100:150, 1] = 5.0
    gaussians.means[150:155] = 1e4
    return nodes.to_splat(gaussians)


def test_pruning_says_what_went_and_why(nodes, splat):
    pruned, report = nodes.PruneSplat.execute(splat, max_size=1.0).args
    assert pruned.positions.shape == (1, 845, 3) and pruned.opacities.shape == (1, 845, 1)
    assert report == "845 gaussians left; gone: 150 faint, oversized or broken, 5 far away"


def test_pruning_merges_down_to_a_number(nodes, splat):
    pruned, report = nodes.PruneSplat.execute(splat, at_most=200).args
    assert 150 <= pruned.positions.shape[1] <= 200 and "merged into neighbours" in report


def test_a_share_of_the_faintest_goes(nodes, splat):
    splat.opacities[0] = torch.linspace(0, 1, 1000)[:, None]
    pruned, report = nodes.PruneSplat.execute(splat, min_opacity=0.0, faintest=0.5, outliers=0.0).args
    assert pruned.positions.shape[1] == pytest.approx(500, abs=1) and "the faintest" in report
    assert pruned.opacities.min() >= 0.499


def test_outliers_are_as_far_away_as_asked(nodes, splat):
    left = [nodes.PruneSplat.execute(splat, outliers=times).args[0].positions.shape[1] for times in (1.2, 10.0, 1e5)]
    assert left[0] < left[1] == 895 < left[2] == 900


def test_the_padding_of_a_splat_is_none_of_it(nodes, splat):
    splat.counts = torch.tensor([300])
    assert nodes.PruneSplat.execute(splat, outliers=0.0).args[0].positions.shape[1] == 200
    splat.counts = torch.tensor([0])
    with pytest.raises(ValueError, match="empty"):
        nodes.PruneSplat.execute(splat)


def test_nothing_asked_for_changes_nothing(nodes, splat):
    pruned, report = nodes.PruneSplat.execute(splat, min_opacity=0.0, outliers=0.0).args
    torch.testing.assert_close(pruned.positions, splat.positions)
    assert report == "1,000 gaussians left; gone: none"


def test_pruning_everything_is_refused(nodes, splat):
    with pytest.raises(ValueError, match="nothing is left of this splat .1,000 faint"):
        nodes.PruneSplat.execute(splat, min_opacity=0.9)


@pytest.fixture
def optimize(pack):
    return pack.optimize


def frames(nodes, count=4, size=(24, 32)):
    cameras = importlib.import_module("lyra_pack.lyra_core.cameras.camera").pinhole(size, 30.0, count)
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(1)), cameras


def test_fitting_needs_gsplat_and_a_gpu_and_says_how_to_get_it(optimize, splat, nodes):
    images, cameras = frames(nodes)
    with pytest.raises(RuntimeError, match="pip install gsplat"):
        optimize.OptimizeSplat.execute(splat, images, cameras)


def test_fitting_works_inside_the_host_s_inference_mode_and_leaves_its_inputs_alone(
    optimize, nodes, splat, monkeypatch
):
    def flat(gaussians, camera):
        """Every pixel has the mean colour, at the mean depth."""
        picture = gaussians.colors.mean(0).expand(*camera.size, 3)
        one = gaussians.opacities.mean().expand(camera.size)
        return picture, one, gaussians.means[:, 2].mean().expand(camera.size)

    monkeypatch.setattr(optimize.rasterize, "differentiable", lambda device: flat)
    with torch.inference_mode():
        images, cameras = frames(nodes)
        given = nodes.to_splat(nodes.splats.prune(nodes.from_splat(splat), 0.02, 1.0))
        before = given.sh.clone()
        depth = tuple(optimize.DepthMap(torch.full((12, 16), 0.5), cameras.K[0], "by hand") for _ in range(4))
        fitted, moved, report = optimize.OptimizeSplat.execute(given, images, cameras, steps=40, depth=depth).args
        assert torch.equal(given.sh, before)
    assert "dB on 1 frames that had no say" in report
    assert fitted.sh.shape == before.shape and not torch.equal(fitted.sh, before)
    assert len(moved) == 4 and not fitted.sh.requires_grad


def test_all_that_is_asked_for_reaches_the_fit_in_tensors_that_have_gradients(optimize, nodes, splat, monkeypatch):
    asked, room = [], []

    def fit(*args):
        asked.extend(args)
        moved = optimize.Cameras(args[3].w2c + 1, args[3].K, args[3].size)
        return type("Found", (), {"gaussians": args[1], "cameras": moved, "report": "as asked"})

    monkeypatch.setattr(optimize.rasterize, "differentiable", lambda device: "render")
    monkeypatch.setattr(optimize, "optimize", fit)
    monkeypatch.setattr(optimize, "free_memory", lambda size, device: room.append(size))
    with torch.inference_mode():
        images, cameras = frames(nodes)
        images = torch.cat([images, torch.ones(4, 24, 32, 1)], 3)
        exact = optimize.Cameras(cameras.w2c.double(), cameras.K.double(), cameras.size)
        depth = [optimize.DepthMap(torch.full(size, 0.5), cameras.K[0], "by hand") for size in ((12, 16), (24, 32))]
        options = {"steps": 40, "refine_cameras": False, "exposure": False, "seed": 7, "depth": (*depth, *depth)}
        _, moved, report = optimize.OptimizeSplat.execute(splat, images, exact, **options).args
    render, gaussians, pictures, told, depths, steps, refine, exposure, seed, on_step = asked
    assert (render, steps, refine, exposure, seed, report) == ("render", 40, False, False, 7, "as asked")
    assert len(gaussians) == 1000 and room == [1000 * optimize.BYTES_PER_GAUSSIAN]
    torch.testing.assert_close(pictures, images[..., :3].clone())
    torch.testing.assert_close(told.w2c, cameras.w2c.clone())
    torch.testing.assert_close(moved.w2c, told.w2c + 1)
    assert [each.shape for each in depths] == [(24, 32)] * 4
    for tensor in (*vars(gaussians).values(), pictures, told.w2c, told.K, *depths):
        assert not tensor.is_inference() and tensor.dtype == torch.float32
    on_step(1, 40, None)


def test_a_batch_of_splats_is_refused_where_one_is_wanted(nodes, splat):
    two = nodes.Types.SPLAT(*(torch.cat([getattr(splat, name)] * 2) for name in FIELDS))
    with pytest.raises(ValueError, match="batch of 2"):
        nodes.PruneSplat.execute(two)


def test_a_rendered_splat_has_depth_where_it_is_opaque_and_becomes_a_mesh(nodes, pack):
    """A wall at z = 2, seen by a camera that it fills, and by one that it fills to the half."""
    camera = importlib.import_module("lyra_pack.lyra_core.cameras.camera")
    x, y = torch.meshgrid(torch.arange(-2, 2, 0.02), torch.arange(-1.5, 1.5, 0.02), indexing="ij")
    means = torch.stack([x, y, torch.full_like(x, 2.0)], -1).reshape(-1, 3)
    count = len(means)
    scales = torch.tensor([0.02, 0.02, 0.002]).repeat(count, 1)
    quats = torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1)
    wall = nodes.splats.Gaussians(means, quats, scales, torch.full((count,), 0.9), torch.ones(count, 1, 3))
    views = camera.pinhole((48, 64), 60.0, 2)
    w2c = views.w2c.clone()
    w2c[1, 0, 3] = 2.0  # the second camera stands at x = -2, where the wall ends
    views = replace(views, w2c=w2c)
    images, alpha, _, depth = nodes.RenderSplat.execute(nodes.to_splat(wall), views, "#000000", "torch").args
    torch.testing.assert_close(depth[0].depth, torch.full((48, 64), 2.0), atol=0.01, rtol=0)
    left, right = depth[1].depth[:, :28], depth[1].depth[:, 36:]
    assert (left == 0).all() and (right - 2).abs().max() < 0.01
    assert ((alpha[1] > 0.5) == (depth[1].depth > 0)).all()
    mesh, report = pack.mesh.WorldMesh.execute(images=images, cameras=views, depth=depth).args
    assert (mesh.vertices[0, :, 2] + 2).abs().max() < 0.05 and mesh.faces.shape[1] > 100
