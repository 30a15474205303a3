"""The splat nodes on the host's own SPLAT."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

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


CASE = Path(__file__).parent / "cases" / "splat-rows-of-zeros"


@pytest.fixture
def wall(comfy_host):
    """A red wall at z = 3 and one row of zeros, as the host reads them."""
    from comfy_api.latest import Types
    from comfy_extras.nodes_gaussian_splat import File3DToSplat

    return File3DToSplat.execute(Types.File3D(str(CASE / "wall.ply"))).result[0]


def from_behind(count=1, size=(48, 64)):
    camera = importlib.import_module("lyra_pack.lyra_core.cameras.camera")
    views = camera.pinhole(size, 60.0, count)
    K = views.K.clone()
    K[:, 0, 0] = K[:, 1, 1] = 50.0
    return replace(views, w2c=views.w2c + torch.tensor([[0.0] * 4] * 2 + [[0, 0, 0, 1.0], [0] * 4]), K=K)


def test_a_row_of_zeros_is_not_drawn_but_counted(nodes, wall):
    shown = nodes.RenderSplat.execute(wall, from_behind(), "#000000", "torch")
    images, _, _, depth = shown.args
    assert images[0, 24, 32].tolist() == pytest.approx([0.780, 0.499, 0.499], abs=2e-3)
    assert float(depth[0].depth[24, 32]) == pytest.approx(4, abs=1e-3)
    assert shown.ui.as_dict()["text"] == ("400 gaussians drawn, 1 broken left out",)
    pruned, report = nodes.PruneSplat.execute(wall).args
    assert pruned.positions.shape[1] == 400 and report == "400 gaussians left; gone: 1 broken"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rotations", 0.0), ("rotations", 1e-20), ("rotations", float("nan")), ("positions", float("nan")),
        ("positions", -float("inf")), ("positions", 1e30), ("scales", float("inf")), ("scales", float("nan")),
        ("scales", -0.1), ("scales", 1e20), ("opacities", float("nan")), ("opacities", float("inf")),
        ("sh", float("nan")), ("sh", 1e35),
    ],
)  # fmt: skip
def test_whatever_can_not_be_a_gaussian_changes_no_picture_and_is_counted_by_all(nodes, wall, field, value):
    """In the host's splat of a wall, and of a wall with one such gaussian in front of it."""
    sound = nodes.PruneSplat.execute(wall).args[0]
    values = {name: getattr(sound, name).clone() for name in FIELDS}
    worse = {name: torch.cat([part, part[:, :1]], 1) for name, part in values.items()}
    worse["positions"][0, -1] = torch.tensor([0.0, 0.0, 1.0])
    worse[field][0, -1] = value
    whole, broken = (nodes.Types.SPLAT(*(these[name] for name in FIELDS)) for these in (values, worse))
    views = from_behind()
    pictures = [nodes.RenderSplat.execute(each, views, "#102030", "torch") for each in (whole, broken)]
    for first, second in zip(pictures[0].args[:3], pictures[1].args[:3], strict=True):
        assert torch.equal(first, second) and torch.isfinite(first).all()
    assert pictures[0].ui is None and "400 gaussians drawn, 1 broken left out" in pictures[1].ui.as_dict()["text"]
    assert nodes.PruneSplat.execute(broken, at_most=50).args[1].startswith(f"{50} gaussians left; gone: 1 broken") or (
        "gone: 1 broken, " in nodes.PruneSplat.execute(broken, at_most=50).args[1]
    )
    core = nodes.from_splat(broken)
    for fewer in (nodes.splats.at_most(core, 50), nodes.splats.voxel_reduce(core, 0.3), nodes.splats.without_outliers(core, 9)):
        assert nodes.splats.sound(fewer) == (fewer, 0) and len(fewer)
        assert all(torch.isfinite(part).all() for part in vars(fewer).values())


def test_a_splat_of_broken_gaussians_only_is_refused(nodes, wall):
    wall.rotations[:] = 0
    for node, more in ((nodes.RenderSplat, (from_behind(), "#000", "torch")), (nodes.PruneSplat, ())):
        with pytest.raises(ValueError, match="all 401 gaussians .* rotation of length zero"):
            node.execute(wall, *more)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("#fff", (1, 1, 1)), ("black", (0, 0, 0)), ("#102030", (16 / 255, 32 / 255, 48 / 255)), (" #FFF ", (1, 1, 1)),
        ("White", (1, 1, 1)), ("rebeccapurple", (0.4, 0.2, 0.6)), ("rgb(255, 0, 51)", (1, 0, 0.2)),
    ],
)  # fmt: skip
def test_a_background_is_a_colour_as_people_write_it(nodes, wall, written, meant):
    far = from_behind()
    turned = replace(far, w2c=far.w2c @ torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])))
    assert nodes.RenderSplat.execute(wall, turned, written, "torch").args[0][0, 0, 0].tolist() == pytest.approx(meant)


@pytest.mark.parametrize("written", ["", "#ff", "#12345g", "102030", "#10203080", "blackish", "0.5"])
def test_what_is_no_colour_is_refused_by_name(nodes, wall, written):
    with pytest.raises(ValueError, match=f"{written!r} is no colour; write #rgb"):
        nodes.RenderSplat.execute(wall, from_behind(), written, "torch")


def test_pruning_says_what_went_and_why(nodes, splat):
    pruned, report = nodes.PruneSplat.execute(splat, max_size=1.0).args
    assert pruned.positions.shape == (1, 845, 3) and pruned.opacities.shape == (1, 845, 1)
    assert report == "845 gaussians left; gone: 150 faint or oversized, 5 far away"


def test_pruning_merges_down_to_a_number(nodes, splat):
    pruned, report = nodes.PruneSplat.execute(splat, at_most=200).args
    assert 150 <= pruned.positions.shape[1] <= 200 and "merged into neighbours" in report


def test_a_share_of_the_faintest_goes(nodes, splat):
    splat.opacities[0] = torch.linspace(0, 1, 1000)[:, None]
    pruned, report = nodes.PruneSplat.execute(splat, min_opacity=0.0, faintest=0.5, outliers=0.0).args
    assert pruned.positions.shape[1] == pytest.approx(500, abs=1) and "the faintest" in report
    assert pruned.opacities.min() >= 0.499


def test_outliers_are_as_far_away_as_asked(nodes, splat):
    left = [nodes.PruneSplat.execute(splat, outliers=times).args[0].positions.shape[1] for times in (1.2, 10.0, 0.0)]
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
