"""The splat nodes on the host's own SPLAT."""

from __future__ import annotations

import importlib

import pytest
import torch


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
    cameras = importlib.import_module("lyra_pack.lyra_core.camera").pinhole(size, 30.0, count)
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
