"""How well a small Lyra 2 paints scenes of which everything is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

import torch
from torch import Tensor

from lyra_core.cameras.camera import Cameras
from lyra_core.metrics.pictures import SSIM_WINDOW, gradient_similarity, psnr, reprojection_error, ssim_map
from lyra_core.training.contracts import Codec, Encoders, Example, Model
from lyra_core.training.examples import evaluating, example, prepared, warped_views
from lyra_core.training.painting import paint
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import CleanLatents, Sample, Window, codec_key, still
from lyra_core.world import preview
from lyra_core.world import world as worlds

from . import scenes

SAMPLING = 8  # steps of a chunk
FEWEST = 200  # pixels of a chunk that a number about a part of it needs


@dataclass(frozen=True)
class Parts:
    """Which pixels (F, H, W) of a chunk the newest frame shows, which only the memory does, and which nobody has seen."""

    seen: Tensor
    remembered: Tensor
    new: Tensor


def parts(sample: Sample, window: Window, recipe: Recipe) -> Parts:
    plain = evaluating(recipe)
    newest = warped_views(sample, window, replace(plain, memory="frames"))[1]
    anything = warped_views(sample, window, replace(plain, memory="cloud"))[1]
    return Parts(newest, anything & ~newest, ~anything & ~newest)


def truth(sample: Sample, window: Window) -> Tensor:
    """(F, H, W, 3) in 0 .. 1."""
    return sample.frames[window.first : window.first + window.count].float() / 255


def forgetful(sample: Sample, window: Window) -> Sample:
    """The same film, of which only the newest frame can be remembered: retrieval switched off."""
    return replace(sample, depths={frame: depth for frame, depth in sample.depths.items() if frame == window.newest})


# ---------------------------------------------------------------------------------------------------------- painting


def painted(
    model: Model, encoders: Encoders, sample: Sample, window: Window, recipe: Recipe, seed: int, steps: int = SAMPLING
) -> Tensor:
    """(F, H, W, 3) in 0 .. 1, the window painted after the true frames before it."""
    sample = prepared(sample, encoders.codec, recipe)
    shown = example(sample, window, encoders, evaluating(recipe), torch.Generator().manual_seed(seed))
    latents = paint(model, shown.condition, _noise(shown, seed), steps)
    before = sample.latents.stream[:, : recipe.still + recipe.layout.new_latents * window.segment]
    return encoders.codec.decode(latents, before).clamp(-1, 1) * 0.5 + 0.5


def walked(model: Model, encoders: Encoders, sample: Sample, recipe: Recipe, seed: int, steps: int = SAMPLING) -> Tensor:
    """(F, H, W, 3) in 0 .. 1: chunk after chunk, each painted after those that were painted before it. Depth is the true one."""
    codec, recipe = encoders.codec, evaluating(recipe)
    windows = sample.windows(recipe.chunk, recipe.windows)
    pictures = still(sample, recipe.still)
    sampled = history = codec.encode(pictures)
    # what is to be painted is not looked at, only how large it is
    blank = torch.zeros(len(history), len(windows) * recipe.layout.new_latents, *history.shape[2:])
    alone = codec.encode(sample.picture(0)[None])[:, 0]
    key = codec_key(codec, recipe.still, recipe.chunk, recipe.stride)
    sample = replace(sample, latents=CleanLatents(torch.cat([history, blank], 1), {0: alone}, key))
    for window in windows:
        generator = torch.Generator().manual_seed(seed + window.segment)
        shown = example(sample, window, encoders, recipe, generator, history=history)
        latents = paint(model, shown.condition, _noise(shown, seed + window.segment), steps)
        frames = codec.decode(latents, sampled).clamp(-1, 1)
        history = torch.cat([history, codec.encode(frames, pictures)], 1)
        sampled, pictures = torch.cat([sampled, latents], 1), torch.cat([pictures, frames])
        sample = replace(sample, spoilt={**sample.spoilt, **dict(zip(window.frames, frames, strict=True))})
    return sample.pictures(range(1, 1 + len(windows) * recipe.chunk)) * 0.5 + 0.5


def _noise(shown: Example, seed: int) -> Tensor:
    return torch.randn(shown.target.shape, generator=torch.Generator().manual_seed(seed))


def previewed(sample: Sample, window: Window) -> Tensor:
    """(F, H, W, 3) in 0 .. 1: the first chunk as the geometry preview makes it, from the photo and its true depth."""
    world = worlds.begin(sample.frames[0].float() / 255, sample.depths[0], sample.cameras[:1])
    return preview.generate(world, worlds.plan(world, sample.cameras_of(window))).frames.float() / 255


def coded(frames: Tensor, sample: Sample, codec: Codec, recipe: Recipe) -> Tensor:
    """A first chunk (F, H, W, 3) in 0 .. 1 as the codec gives it back, after the photo that it begins at."""
    before = still(sample, recipe.still)
    latents = codec.encode(frames * 2 - 1, before)
    return codec.decode(latents, codec.encode(before)).clamp(-1, 1) * 0.5 + 0.5


# ----------------------------------------------------------------------------------------------------------- numbers


def alike(made: Tensor, true: Tensor, where: Tensor) -> dict[str, float]:
    """PSNR in dB, SSIM and GMSD of those pixels (F, H, W); nothing if they are too few."""
    if int(where.sum()) < FEWEST:
        return {}
    edge = SSIM_WINDOW // 2
    inner = where[:, edge:-edge, edge:-edge]
    # pictures times channels -> the mean of a picture's channels
    structure = ssim_map(made, true)[:, 0].unflatten(0, (len(made), 3)).mean(1)
    found = {"PSNR": psnr(made, true, where), "GMSD": float(gradient_similarity(made, true)[where].std())}
    return found | ({"SSIM": float(structure[inner].mean())} if inner.any() else {})


def drift(made: Tensor, true: Tensor, chunk: int) -> dict[str, list[float]]:
    """Of each chunk: how far its mean colour is from the true one, and the logarithm of how sharp it is against that."""
    colour, sharpness = [], []
    for ours, theirs in zip(made.split(chunk), true.split(chunk), strict=True):
        colour.append(float((ours.mean((0, 1, 2)) - theirs.mean((0, 1, 2))).norm()))
        sharpness.append(float(torch.log(_detail(ours) / _detail(theirs))))
    return {"colour": colour, "sharpness": sharpness}


def _detail(frames: Tensor) -> Tensor:
    return (frames[:, 1:] - frames[:, :-1]).abs().mean() + (frames[:, :, 1:] - frames[:, :, :-1]).abs().mean()


def slope(values: Sequence[float]) -> float:
    """By how much they rise from one to the next, by least squares."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(y), dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def reprojected(made: Tensor, sample: Sample, window: Window) -> float:
    """Mean colour difference, 0 .. 1, between the last frame and the newest one before it, where both show the same."""
    last = window.first + window.count - 1
    return reprojection_error(
        sample.picture(window.newest) * 0.5 + 0.5,
        sample.depths[window.newest],
        sample.cameras[window.newest],
        made[-1],
        sample.cameras[last],
        sample.depths[last],
    )


def camera_error(picture: Tensor, scene: scenes.Scene, camera: Cameras) -> tuple[float, float]:
    """Degrees and scene units between a camera and the one that the picture (H, W, 3) looks taken from.

    Found by rendering the true scene and comparing: Gauss and Newton's steps from the true camera, damped, kept if better. Slopes
    are taken over wide steps first, because edges of boxes only move by whole samples.
    """
    motion, damping = torch.zeros(6), 1e-2

    def residuals(motions: Tensor) -> Tensor:
        shown = scenes.render([scene], [_moved(camera, motions)])[0][0]
        return (shown - picture).flatten(1)

    here = residuals(motion[None])[0]
    for width in (1.0,) * 4 + (0.4,) * 4 + (0.15,) * 4:
        steps = width * torch.tensor([1e-2] * 3 + [3e-2] * 3)
        beside = residuals(torch.cat([motion + torch.diag(steps), motion - torch.diag(steps)]))
        J = ((beside[:6] - beside[6:]) / 2).T / steps
        A = J.T @ J
        tried = motion - torch.linalg.solve(A + torch.diag(damping * A.diagonal() + 1e-6), J.T @ here)
        there = residuals(tried[None])[0]
        if there.square().sum() < here.square().sum():
            motion, here, damping = tried, there, damping / 3
        else:
            damping = min(damping * 10, 1.0)
    return float(torch.rad2deg(motion[:3].norm())), float(motion[3:].norm())


def _moved(camera: Cameras, motions: Tensor) -> Cameras:
    """A camera, turned and moved in its own axes by N motions (N, 6): three angles in radians, three lengths."""
    zero = torch.zeros(len(motions))
    x, y, z = motions[:, :3].unbind(1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    change = torch.eye(4).repeat(len(motions), 1, 1)
    change[:, :3, :3], change[:, :3, 3] = torch.linalg.matrix_exp(skew), motions[:, 3:]
    return replace(camera, w2c=change @ camera.w2c, K=camera.K.expand(len(motions), 3, 3))


def told(values: Sequence[float]) -> str:
    """Mean and standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}, of one" if values else "nothing to measure"
    return f"{mean(values):.3f} ± {error(values):.3f}"


def error(values: Sequence[float]) -> float:
    """The standard error of their mean."""
    return stdev(values) / len(values) ** 0.5
