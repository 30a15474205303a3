"""Fitting gaussians to frames, through a slow renderer that is written down as the formulas say and has gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lyra_core import optimize as module
from lyra_core.camera import Cameras, pinhole, project, quaternion_to_rotation
from lyra_core.gaussians import Gaussians, colors_to_sh
from lyra_core.metrics import psnr
from lyra_core.optimize import optimize
from lyra_core.presets import preset
from lyra_core.rasterize import render as rasterise

SIZE, FOCAL, FRAMES, COUNT = (24, 32), 30.0, 10, 60
STEPS = 120


def brute_force(gaussians: Gaussians, camera: Cameras):
    """Every gaussian at every pixel, front to back; as rasterize, without its shortcuts."""
    pixels, z = project(gaussians.means, camera)
    pixels, z = pixels[0], z[0]
    R, K = camera.w2c[0, :3, :3], camera.K[0]
    local = gaussians.means @ R.T + camera.w2c[0, :3, 3]
    axes = R @ (quaternion_to_rotation(gaussians.quats) * gaussians.scales[:, None])
    rows = [(axes[:, i] - (local[:, i] / z)[:, None] * axes[:, 2]) * (K[i, i] / z)[:, None] for i in (0, 1)]
    J = torch.stack(rows, 1)
    precision = torch.linalg.inv(J @ J.mT + 0.3 * torch.eye(2))
    v, u = torch.meshgrid(*(torch.arange(float(side)) for side in camera.size), indexing="ij")
    offset = torch.stack([u, v], -1)[..., None, :] - pixels
    power = torch.einsum("hwni,nij,hwnj->hwn", offset, precision, offset)
    alpha = (gaussians.opacities * torch.exp(-0.5 * power) * (z > 0.01)).clamp_max(0.999)
    order = z.argsort()
    alpha = alpha[..., order]
    through = torch.cumprod(torch.cat([torch.ones_like(alpha[..., :1]), 1 - alpha], -1), -1)
    weights = through[..., :-1] * alpha
    seen = weights.sum(-1)
    color = weights @ gaussians.colors[order].clamp_min(0)
    return color, seen, torch.where(seen > 0, (weights @ z[order]) / seen.clamp_min(1e-9), 0)


@pytest.fixture(scope="module")
def truth() -> Gaussians:
    random = torch.Generator().manual_seed(0)
    means = torch.rand(COUNT, 3, generator=random) * torch.tensor([2.4, 1.8, 1.0]) + torch.tensor([-1.2, -0.9, 2.5])
    quats = torch.nn.functional.normalize(torch.randn(COUNT, 4, generator=random), dim=1)
    scales = 0.1 + 0.15 * torch.rand(COUNT, 3, generator=random)
    colors = torch.rand(COUNT, 3, generator=random)
    return Gaussians(means, quats, scales, torch.full((COUNT,), 0.9), colors_to_sh(colors))


@pytest.fixture(scope="module")
def cameras() -> Cameras:
    return preset("spiral", pinhole(SIZE, FOCAL), FRAMES, 3.0)


@pytest.fixture(scope="module")
def images(truth, cameras):
    with torch.no_grad():
        return torch.stack([brute_force(truth, cameras[i])[0] for i in range(FRAMES)])


@pytest.fixture
def start(truth) -> Gaussians:
    """Nearly right."""
    random = torch.Generator().manual_seed(1)
    return replace(
        truth,
        means=truth.means + 0.02 * torch.randn(COUNT, 3, generator=random),
        sh=truth.sh + 0.3 * torch.randn(COUNT, 1, 3, generator=random),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Rates for a hundred steps instead of thousands."""
    monkeypatch.setattr(module, "RATES", {name: 5 * rate for name, rate in module.RATES.items()})


def test_the_slow_renderer_is_ours(truth, cameras, images):
    found = rasterise(truth, cameras[3], backend="torch")
    assert psnr(found.images[0], images[3]) > 45


def test_frames_that_had_no_say_get_better_and_the_result_is_what_was_measured(start, images, cameras):
    before = [field.clone() for field in vars(start).values()]
    found = optimize(brute_force, start, images, cameras, steps=STEPS)
    assert found.held_out == (7,)
    assert found.after > found.before + 3
    with torch.no_grad():
        again = psnr(brute_force(found.gaussians, cameras[7])[0].clamp(0, 1), images[7])
        assert psnr(brute_force(start, cameras[7])[0].clamp(0, 1), images[7]) == pytest.approx(found.before, abs=0.01)
    assert again == pytest.approx(found.after, abs=0.01)
    assert f"{found.before:.2f} dB to {found.after:.2f} dB on 1 frames" in found.report
    for field, value in zip(before, vars(start).values(), strict=True):
        assert torch.equal(field, value)


def test_held_out_frames_are_looked_at_but_never_fitted(start, images, cameras):
    fitted = set()

    def render(gaussians, camera):
        if torch.is_grad_enabled():
            fitted.update(i for i in range(FRAMES) if torch.allclose(camera.w2c, cameras[i].w2c, atol=1e-6))
        return brute_force(gaussians, camera)

    optimize(render, start, images, cameras, steps=60, refine_cameras=False)
    assert fitted == set(range(FRAMES)) - {7}


def test_the_start_wins_where_every_step_makes_it_worse(truth, images, cameras, monkeypatch):
    monkeypatch.setattr(module, "RATES", {name: 1.0 for name in module.RATES})
    found = optimize(brute_force, truth, images, cameras, steps=20)
    assert found.best_step == 0 and found.gaussians is truth and found.cameras is cameras
    assert "as it was" in found.report


def test_a_frame_that_is_too_dark_does_not_darken_the_scene(start, images, cameras, monkeypatch):
    monkeypatch.setattr(module, "EXPOSURE_RATE", 0.05)
    dark = images.clone()
    dark[::2] *= 0.6
    plain = optimize(brute_force, start, dark, cameras, steps=STEPS, exposure=False, refine_cameras=False)
    known = optimize(brute_force, start, dark, cameras, steps=STEPS, exposure=True, refine_cameras=False)
    assert known.after > plain.after + 0.5, (known.after, plain.after)


def test_a_camera_that_is_off_comes_back_and_the_first_one_never_moves(truth, images, cameras, monkeypatch):
    monkeypatch.setattr(module, "CAMERA_RATE", 2e-3)
    monkeypatch.setattr(module, "RATES", {name: rate * 1e-3 for name, rate in module.RATES.items()})
    w2c = cameras.w2c.clone()
    w2c[3, 1, 3] += 0.06
    w2c[7, 0, 3] += 0.06  # the best state is the last one only if the held-out frame gets better, so start it worse
    told = replace(cameras, w2c=w2c)
    # truth with one lamp too many, so that something gets better
    start = replace(truth, sh=truth.sh + 0.2)
    monkeypatch.setitem(module.RATES, "colors", 0.02)
    found = optimize(brute_force, start, images, told, steps=200, exposure=False)
    assert found.best_step > 0
    moved = (found.cameras.centers - cameras.centers).norm(dim=1)
    assert moved[3] < 0.65 * 0.06, moved
    assert torch.equal(found.cameras.w2c[0], told.w2c[0]) and torch.equal(found.cameras.w2c[7], told.w2c[7])


def test_cameras_stay_where_they_are_told_to(start, images, cameras):
    found = optimize(brute_force, start, images, cameras, steps=30, refine_cameras=False)
    torch.testing.assert_close(found.cameras.w2c, cameras.w2c)


def test_a_passer_by_in_some_frames_hardly_counts(start, images, cameras, monkeypatch):
    spoiled = images.clone()
    spoiled[[1, 2, 3, 5, 6], 6:14, 8:18] = 1.0
    wary = optimize(brute_force, start, spoiled, cameras, steps=STEPS, exposure=False, refine_cameras=False)
    monkeypatch.setattr(module, "DISTRUST", 1.0)
    naive = optimize(brute_force, start, spoiled, cameras, steps=STEPS, exposure=False, refine_cameras=False)
    assert wary.after > naive.after + 2, (wary.after, naive.after)


def test_what_has_become_invisible_or_fog_goes_and_adam_goes_on(start, images, cameras, monkeypatch):
    monkeypatch.setattr(module, "CLEAN_EVERY", 20)
    start = replace(start, opacities=start.opacities.clone(), scales=start.scales.clone())
    start.opacities[:5] = 1e-3
    start.scales[5:7] = 40.0
    start.opacities[5:7] = 0.01
    found = optimize(brute_force, start, images, cameras, steps=STEPS)
    assert COUNT - 12 < len(found.gaussians) <= COUNT - 7
    assert found.after > found.before + 3


def test_known_depth_pulls_gaussians_to_it(truth, cameras, images, monkeypatch):
    monkeypatch.setattr(module, "DEPTH_COST", 100.0)
    monkeypatch.setitem(module.RATES, "means", 3e-3)
    with torch.no_grad():
        depths = [brute_force(truth, cameras[i])[2] for i in range(FRAMES)]
    start = replace(truth, means=truth.means + torch.tensor([0.0, 0.0, 0.15]))
    off = {}
    for name, known in (("with", depths), ("without", None), ("unknown", [0 * depth for depth in depths])):
        result = optimize(brute_force, start, images, cameras, known, STEPS, refine_cameras=False, exposure=False)
        with torch.no_grad():
            found = brute_force(result.gaussians, cameras[7])[2]
        off[name] = float((found - depths[7]).abs().median())
    assert off["with"] < 0.7 * off["without"]
    assert off["unknown"] == pytest.approx(off["without"])


def test_the_same_seed_gives_the_same_result(start, images, cameras):
    results = [optimize(brute_force, start, images, cameras, steps=20, seed=seed).gaussians for seed in (3, 3, 4)]
    assert torch.equal(results[0].means, results[1].means)
    assert not torch.equal(results[0].means, results[2].means)


def test_higher_harmonics_stay_as_they_are(start, images, cameras):
    more = replace(start, sh=torch.cat([start.sh, torch.full((COUNT, 3, 3), 0.01)], 1))
    found = optimize(brute_force, more, images, cameras, steps=30).gaussians
    assert torch.equal(found.sh[:, 1:], more.sh[:, 1:]) and not torch.equal(found.sh[:, 0], more.sh[:, 0])


def test_progress_shows_pictures_and_may_stop_it(start, images, cameras):
    steps = []

    def on_step(done, total, picture):
        steps.append((done, picture))
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(brute_force, start, images, cameras, steps=50, on_step=on_step)
    assert [done for done, _ in steps] == list(range(1, 16))
    shown = [picture for _, picture in steps if picture is not None]
    assert len(shown) == 3 and shown[0].shape == (*SIZE, 3) and shown[0].dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, i, c: (g.select(slice(0)), i, c), "empty"),
        (lambda g, i, c: (g, i[:4], c), "4 images, 10 cameras"),
        (lambda g, i, c: (g, i, c, [None] * 3), "10 images, 10 cameras, 3 depths"),
        (lambda g, i, c: (g, i[:1], c[:1]), "none to hold out"),
        (lambda g, i, c: (g, i[:, 2:], c), r"images are \(22, 32\), the cameras for \(24, 32\)"),
        (lambda g, i, c: (g, i, c, None, 0), "0 steps"),
    ],
)
def test_what_does_not_fit_is_refused(start, images, cameras, change, message):
    with pytest.raises(ValueError, match=message):
        optimize(brute_force, *change(start, images, cameras))
