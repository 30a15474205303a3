"""A chunk painted while a network is trained: to look at, and to measure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..conditioning import schedules
from .contracts import Condition, Model, stack


@torch.no_grad()
def paint(
    model: Model, shown: Condition, noise: Tensor, steps: int = 10, pause: Callable[[], None] = lambda: None
) -> Tensor:
    """(16, T, h, w) clean latents by Euler's method along the reference's schedule, from noise of that shape."""
    sigmas, x = schedules.full(steps), noise.float()
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        pause()
        velocity = model(x[None], sigma[None] * schedules.TRAIN_STEPS, stack([shown]))[0].to(x)
        x = x + (after - sigma) * velocity
    return x
