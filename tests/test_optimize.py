"""Fitting gaussians to frames, through a slow renderer that is written down as the formulas say and has gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lyra_core.cameras.camera import Cameras, pinhole, project, quaternion_to_rotation
from lyra_core.cameras.presets import preset
from lyra_core.metrics.pictures import psnr, ssim
from lyra_core.splats import optimize as module
from lyra_core.splats.gaussians import Gaussians, colors_to_sh
from lyra_core.splats.optimize import optimize
from lyra_core.splats.rasterize import render as rasterise

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


# ------------------------------------------------------------------------------- by a renderer whose answers are plain


def one_colour(gaussians: Gaussians, camera: Cameras):
    """Every pixel is the mean of the gaussians' places and the mean of their colours; nothing else matters."""
    picture = (gaussians.means.mean(0) + gaussians.colors.mean(0)).expand(*camera.size, 3)
    return picture, picture[..., 0] * 0 + 1, picture[..., 2]


def grey(values, size=SIZE) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, *size, 3)


def still(count: int) -> Cameras:
    return pinhole(SIZE, FOCAL, count)


def some(opacity=0.9) -> Gaussians:
    """Seven grey ones around the origin, two of them far away."""
    means = torch.tensor([[0.0, 0, 2], [0, 0, -2], [2, 0, 0], [-2, 0, 0], [0, 0, 0], [0, 50, 0], [0, -50, 0]])
    quats = torch.tensor([1.0, 0, 0, 0]).repeat(7, 1)
    return Gaussians(
        means, quats, torch.full((7, 3), 0.1), torch.full((7,), opacity), colors_to_sh(torch.full((7, 3), 0.5))
    )


@pytest.mark.parametrize(("frames", "held"), [(2, (1,)), (3, (2,)), (8, (7,)), (9, (7,)), (17, (7, 15))])
def test_every_eighth_frame_is_held_out_and_at_least_one_whose_errors_count_together(frames, held):
    values = torch.linspace(0.3, 1.2, frames)
    values[0] = 3.0  # too bright for a picture, but not held out
    found = optimize(one_colour, replace(some(), means=some().means + 1), grey(values.tolist()), still(frames), steps=1)
    assert found.held_out == held
    error = sum((1.0 - float(values[frame])) ** 2 for frame in held) / len(held)  # what is brighter than white is white
    assert found.before == pytest.approx(-10 * torch.tensor(error).log10().item(), abs=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_means_move_by_their_rate_times_the_scene_s_size_and_ever_less(steps, monkeypatch):
    monkeypatch.setattr(module, "RATES", {name: 1e-3 if name == "means" else 0.0 for name in module.RATES})
    cameras = still(4)
    w2c = cameras.w2c.clone()
    w2c[:, 0, 3] = torch.tensor([-4.0, -2.0, 0.0, 2.0])  # the path's middle is 1 to the right of the origin
    start = some()
    size = float((start.means - torch.tensor([1.0, 0, 0])).norm(dim=1).median())
    found = optimize(
        one_colour, start, grey([1.0] * 4), replace(cameras, w2c=w2c), steps=steps, refine_cameras=False, exposure=False
    )
    expected = sum(1e-3 * size * 0.01 ** (step / steps) for step in range(1, steps + 1))
    moved = found.gaussians.means - start.means
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize(("moving", "rate"), [("colors", 0.02), ("means", 0.005)])
def test_the_best_state_is_kept_though_later_ones_are_worse_and_the_last_step_is_looked_at(moving, rate, monkeypatch):
    monkeypatch.setattr(module, "RATES", {name: rate if name == moving else 0.0 for name in module.RATES})
    monkeypatch.setattr(module, "MEANS_END", 1.0)
    shown = []
    images = grey([1.0, 1.0, 0.6])  # on its way to white it passes the grey of the frame that is held out
    found = optimize(
        one_colour, some(), images, still(3), steps=25, on_step=lambda *step: shown.append(step), exposure=False
    )
    assert 0 < found.best_step < 25 and f"best after {found.best_step} steps" in found.report
    again = psnr(one_colour(found.gaussians, still(1))[0], images[2])
    assert again == pytest.approx(found.after, abs=1e-3)
    assert [done for done, _, picture in shown if picture is not None] == [*range(2, 25, 2), 25]


def test_without_exposure_every_frame_is_taken_as_it_is(monkeypatch):
    found = []
    for rate in (0.0, 1.0):
        monkeypatch.setattr(module, "EXPOSURE_RATE", rate)
        found.append(optimize(one_colour, some(), grey([0.7, 1.0, 0.8]), still(3), steps=10, exposure=False))
    assert found[0].best_step > 0
    torch.testing.assert_close(found[0].gaussians.sh, found[1].gaussians.sh, rtol=0, atol=0)


def test_pictures_of_progress_are_no_brighter_than_white():
    shown = []
    start = replace(some(), sh=colors_to_sh(torch.full((7, 3), 1.2)))
    optimize(one_colour, start, grey([1.2] * 3), still(3), steps=1, on_step=lambda *step: shown.append(step[2]))
    assert shown[0].min() == 255


def test_what_no_picture_asks_for_becomes_smaller_and_fainter(monkeypatch):
    monkeypatch.setattr(module, "RATES", {**module.RATES, "opacities": 1e-2, "scales": 1e-2})
    start = some()
    found = optimize(one_colour, start, grey([0.9] * 3), still(3), steps=5).gaussians
    assert (found.opacities < start.opacities - 1e-3).all() and (found.scales < start.scales - 1e-3).all()
    torch.testing.assert_close(found.quats.norm(dim=1), torch.ones(7))


def test_opacities_and_sizes_at_their_ends_can_move():
    start = some()
    start.opacities[:2], start.scales[0], start.scales[1] = torch.tensor([0.0, 1.0]), 0.0, -0.1
    found = optimize(one_colour, start, grey([0.9] * 3), still(3), steps=5)
    assert found.best_step > 0
    for field in vars(found.gaussians).values():
        assert torch.isfinite(field).all()
    assert found.gaussians.opacities[0] > 0 and found.gaussians.opacities[1] < 1 - 5e-5


def test_what_goes_takes_nothing_with_it(start, images, cameras, monkeypatch):
    """Gaussians that no picture shows go halfway, and the rest is fitted as if they had never been there."""
    monkeypatch.setattr(module, "CLEAN_EVERY", 4)
    for cost in ("OPACITY_COST", "SCALE_COST"):
        monkeypatch.setattr(module, cost, 0.0)
    start = replace(start, sh=torch.cat([start.sh, torch.full((COUNT, 3, 3), 0.01)], 1))
    faint = replace(start, opacities=torch.full((COUNT,), 0.001)).select(slice(0, COUNT, 2))
    more = Gaussians(*(torch.cat(pair) for pair in zip(vars(faint).values(), vars(start).values(), strict=True)))
    monkeypatch.setattr(module, "_scene_size", lambda *args: 3.0)

    def visible(gaussians, camera):
        return brute_force(gaussians.select(gaussians.opacities > 0.01), camera)

    alone, among = (optimize(visible, each, images, cameras, steps=12) for each in (start, more))
    assert alone.best_step == among.best_step == 12
    for field, value in zip(vars(alone.gaussians).values(), vars(among.gaussians).values(), strict=True):
        torch.testing.assert_close(value, field)


def test_if_everything_has_become_invisible_nothing_goes(monkeypatch):
    monkeypatch.setattr(module, "CLEAN_EVERY", 1)
    found = optimize(one_colour, some(opacity=0.001), grey([0.9] * 3), still(3), steps=3)
    assert found.best_step == 3 and len(found.gaussians) == 7


def test_a_scene_of_other_units_is_fitted_in_the_same_way(start, images, cameras, truth, monkeypatch):
    monkeypatch.setattr(module, "CLEAN_EVERY", 5)
    monkeypatch.setattr(module, "CAMERA_RATE", 3e-3)
    monkeypatch.setattr(module, "DEPTH_COST", 1.0)
    monkeypatch.setattr(module, "SCALE_COST", 1.0)
    start = replace(start, scales=start.scales.clone())
    start.scales[:3] = torch.tensor([[0.25], [0.35], [0.6]])  # a tenth of the scene's size is about 0.3
    with torch.no_grad():
        depths = [brute_force(truth, cameras[i])[2] for i in range(FRAMES)]
    found = []
    for unit in (1.0, 8.0):
        scaled = replace(start, means=unit * start.means, scales=unit * start.scales)
        w2c = cameras.w2c.clone()
        w2c[:, :3, 3] *= unit
        known = [unit * depth for depth in depths]
        found.append(optimize(brute_force, scaled, images, replace(cameras, w2c=w2c), known, steps=10))
    small, large = found
    assert small.best_step == large.best_step > 0 and len(small.gaussians) == len(large.gaussians) < COUNT
    torch.testing.assert_close(large.gaussians.means, 8 * small.gaussians.means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(large.gaussians.scales, 8 * small.gaussians.scales, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(large.cameras.centers, 8 * small.cameras.centers, rtol=1e-3, atol=1e-3)
    R = small.cameras.w2c[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand_as(R), rtol=0, atol=1e-6)
    moved = (small.cameras.centers - cameras.centers).norm(dim=1)
    assert moved.max() > 1e-3 and torch.equal(small.cameras.w2c[0], cameras.w2c[0])


@pytest.mark.parametrize("known", [False, True])
def test_the_loss_pixel_by_pixel(known):
    random = torch.Generator().manual_seed(2)
    picture, image = torch.rand(2, *SIZE, 3, generator=random)
    alpha, found, depth = torch.rand(3, *SIZE, generator=random)
    found[:3], depth[:, :3] = 0, 0
    gaussians = replace(some(), scales=torch.rand(7, 3, generator=random))
    state = module._State(gaussians, 2, True, True)
    state.size, state.exposures = 4.0, torch.tensor([[[0.0] * 3] * 2, [[0.1, -0.2, 0.0], [0.0, 0.1, 0.05]]])
    render = lambda gaussians, camera: (picture, alpha, found)  # noqa: E731
    loss, _ = module._loss(render, state, still(2), 1, image, depth if known else None)

    shown = picture * torch.tensor([0.1, -0.2, 0.0]).exp() + torch.tensor([0.0, 0.1, 0.05])
    apart = [float((shown[v, u] - image[v, u]).abs().mean()) for v in range(SIZE[0]) for u in range(SIZE[1])]
    worst = sorted(range(len(apart)), key=apart.__getitem__)[int(0.9 * len(apart)) :]
    trust = torch.ones(len(apart))
    trust[worst] = 0.1
    blended = image + trust.view(*SIZE, 1) * (shown - image)
    expected = 0.8 * float((trust * torch.tensor(apart)).mean()) + 0.2 * (1 - ssim(blended, image))
    expected += 0.01 * (0.9 + float(gaussians.scales.mean()) / 4) + 0.1 * 0.0625 / 6
    if known:
        pairs = [(1 / f, 1 / d) for f, d, a in zip(*(x.flatten().tolist() for x in (found, depth, alpha)), strict=True)
                 if f > 0 and d > 0 and a > 0.5]  # fmt: skip
        expected += 0.01 * 4.0 * sum(abs(f - d) for f, d in pairs) / len(pairs)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, i, c: (g.select(slice(0)), i, c), "empty"),
        (lambda g, i, c: (replace(g, sh=g.sh / 0), i, c), "not finite; Lyra2PruneSplat"),
        (lambda g, i, c: (g, i, c, [torch.ones(3, 4)] * 10), r"depths must be \(24, 32\)"),
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
