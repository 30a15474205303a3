"""The loss: how far the network's velocity is from the true one, by how much each noise level teaches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..conditioning.schedules import SHIFT, TRAIN_STEPS, shifted
from .contracts import Example, Model, stack
from .recipe import Recipe


@cache
def timestep_table(shift: float = SHIFT) -> Tensor:
    """(1000,) float32 timesteps that are learned at, highest first; 1000 sigma."""
    return shifted(torch.linspace(1, 0, TRAIN_STEPS + 1)[:-1], shift) * TRAIN_STEPS


@cache
def weight_table(shift: float = SHIFT) -> Tensor:
    """(1000,) float32 what each of them counts: most in the middle, nothing at the top; 1 on average."""
    bell = torch.exp(-2 * ((timestep_table(shift) - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
    bell = bell - bell.min()
    return bell * (TRAIN_STEPS / bell.sum())


def draw_timestep(shift: float, generator: torch.Generator) -> float:
    """A timestep of the table, its place drawn from the logistic of a normal number."""
    place = torch.sigmoid(torch.randn((), generator=generator)) * TRAIN_STEPS
    return float(timestep_table(shift)[min(int(place), TRAIN_STEPS - 1)])


def nearest_timestep(timestep: float, shift: float = SHIFT) -> float:
    """The timestep of the table that is nearest to a number."""
    table = timestep_table(shift)
    return float(table[(table - timestep).abs().argmin()])


def weight_of(timestep: float, shift: float = SHIFT) -> float:
    """What a timestep of the table counts."""
    return float(weight_table(shift)[(timestep_table(shift) - timestep).abs().argmin()])


def flow_loss(
    model: Model, examples: Sequence[Example], recipe: Recipe, generator: torch.Generator, timestep: float | None = None
) -> Tensor:
    """The mean over examples of w(t) mean((v - (noise - x0))^2), at a timestep drawn for each, or at the one given.

    A scalar on the model's device, with a gradient. What only the memory shows counts `remembered_weight` times.
    """
    drawn = [draw_timestep(recipe.shift, generator) if timestep is None else timestep for _ in examples]
    clean = torch.stack([shown.target for shown in examples])
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    times = torch.tensor(drawn)
    sigmas = (times / TRAIN_STEPS).view(-1, 1, 1, 1, 1).to(clean)
    velocity = model(sigmas * noise + (1 - sigmas) * clean, times, stack([shown.condition for shown in examples]))
    remembered = torch.stack([shown.remembered for shown in examples])
    weights = torch.tensor([weight_of(time, recipe.shift) for time in drawn])
    return weighted_error(velocity, noise - clean, weights, remembered, recipe)


def weighted_error(velocity: Tensor, true: Tensor, weights: Tensor, remembered: Tensor, recipe: Recipe) -> Tensor:
    """The mean of squared errors of velocities (B, 16, T, h, w), by weights (B,) and `remembered` (B, T, h, w), which are moved to theirs."""
    each = weights.to(velocity.device).view(-1, 1, 1, 1, 1)
    each = each * (1 + (recipe.remembered_weight - 1) * remembered.to(velocity.device)[:, None])
    return (each * (velocity.float() - true.to(velocity.device)) ** 2).mean()
