"""Histories that the network has spoilt itself, so that it learns to correct its drift instead of following it.

Stage A noises a chunk a little, lets the network guess it back in one step and decodes that guess over the video. Stage B is
an ordinary step on the chunk that follows: its history, remembered pictures and last frame are the spoilt ones, its depth,
cameras and what it has to paint are the true ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..conditioning.schedules import TRAIN_STEPS
from .contracts import Encoders, Example, Model, stack
from .examples import draw_window, example, prepared
from .losses import draw_timestep, nearest_timestep
from .recipe import Recipe
from .sample import Sample, Window, still

Kind = Literal["plain", "spoilt", "photo"]


def kind_of(step: int, recipe: Recipe, generator: torch.Generator) -> Kind:
    """What step number `step` learns from: every second one is plain, the others are spoilt, or begin at the photo."""
    share = float(torch.rand((), generator=generator))
    if step % 2 or share > recipe.self_augmented:
        return "plain"
    return "photo" if share <= recipe.photo_only else "spoilt"


def training_example(
    sample: Sample, model: Model, encoders: Encoders, recipe: Recipe, generator: torch.Generator, step: int
) -> Example:
    """An example of a random window, as it is the turn of step number `step`."""
    kind, sample = kind_of(step, recipe, generator), prepared(sample, encoders.codec, recipe)
    if kind == "plain":
        return example(sample, draw_window(sample, recipe, generator), encoders, recipe, generator)
    if kind == "photo":
        return example(sample, sample.windows(recipe.chunk, 1)[0], encoders, recipe, generator, photo_only=True)
    window = draw_window(sample, recipe, generator, room=1)
    spoilt, history = spoil(sample, window, model, encoders, recipe, generator)
    after = Window(window.segment + 1, window.first + window.count, window.count)
    return example(spoilt, after, encoders, recipe, generator, history=history)


@torch.no_grad()
def spoil(
    sample: Sample, window: Window, model: Model, encoders: Encoders, recipe: Recipe, generator: torch.Generator
) -> tuple[Sample, Tensor]:
    """Stage A: the sample with the window painted by the network, and the latents (16, T, h, w) up to the window's end."""
    sample = prepared(sample, encoders.codec, recipe)
    shown = example(sample, window, encoders, recipe, generator)
    timestep = spoiling_timestep(recipe, generator)
    guess = one_step(model, shown, timestep, torch.randn(shown.target.shape, generator=generator))
    return painted_over(sample, window, guess, encoders, recipe)


def spoiling_timestep(recipe: Recipe, generator: torch.Generator) -> float:
    """How far a chunk is noised before the network guesses it back."""
    return nearest_timestep(max(1.0, draw_timestep(recipe.shift, generator) * recipe.highest // 1), recipe.shift)


@torch.no_grad()
def painted_over(
    sample: Sample, window: Window, guess: Tensor, encoders: Encoders, recipe: Recipe
) -> tuple[Sample, Tensor]:
    """The sample, which is `prepared`, with a guess of latents (16, T, h, w) decoded over the window, and the latents up to its end."""
    codec, layout = encoders.codec, recipe.layout
    before = sample.latents.stream[:, : recipe.still + layout.new_latents * window.segment]
    copied = recipe.still - 1 if recipe.copy_history else 0
    kept = before.shape[1] - copied
    frames = codec.decode(torch.cat([before[:, kept:], guess], 1), before[:, :kept]).clamp(-1, 1)
    first = window.first + window.count - len(frames)
    # frames of the time before the video are its first one again and again: the last one written stays
    spoilt = replace(sample, spoilt={max(0, first + place): frame for place, frame in enumerate(frames)})
    history = torch.cat([still(sample, recipe.still), sample.pictures(range(1, window.first))])
    painted = codec.encode(frames[-window.count :], history)
    return spoilt, torch.cat([before, painted], 1)


def one_step(model: Model, shown: Example, timestep: float, noise: Tensor) -> Tensor:
    """The clean latents (16, T, h, w) that the network guesses behind its example, noised up to a timestep: x - sigma v.

    That is what the reference's solver makes in one step from there to 0; the network is told a whole timestep.
    """
    return one_step_each(model, [shown], [timestep], noise[None])[0]


def one_step_each(model: Model, shown: Sequence[Example], timesteps: Sequence[float], noise: Tensor) -> Tensor:
    """The same for several examples at once; noise and guesses (B, 16, T, h, w)."""
    clean = torch.stack([example.target for example in shown])
    sigmas = (torch.tensor(timesteps) / TRAIN_STEPS).view(-1, 1, 1, 1, 1).to(clean)
    noisy = (1 - sigmas) * clean + sigmas * noise.to(clean)
    told = torch.tensor([float(int(timestep)) for timestep in timesteps])
    return noisy - sigmas * model(noisy, told, stack([example.condition for example in shown])).to(noisy)
