"""The noise levels that Lyra 2 was trained and distilled for. sigma is the share of noise, 1 to 0."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TRAIN_STEPS = 1000
SHIFT = 5.0
HIGHEST = 0.9990000128746033  # 1 - 1 / TRAIN_STEPS, in the reference's float32
DMD_STEPS = (1000, 750, 500, 250)  # where the distilled model works, on the unshifted table


def shifted(share: np.ndarray, shift: float) -> np.ndarray:
    """Noise levels moved towards 1: more steps for the composition, fewer for the details."""
    return shift * share / (1 + (shift - 1) * share)


def full(steps: int, shift: float = SHIFT) -> Tensor:
    """(steps + 1) float32 sigmas of the full-quality schedule; the last is 0."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"a schedule needs at least one step and a positive shift, found {steps} and {shift}")
    sigmas = shifted(np.linspace(HIGHEST, 0, steps + 1)[:-1], shift)
    return torch.from_numpy(np.append(sigmas, 0).astype(np.float32))


def dmd() -> Tensor:
    """The 4 + 1 float32 sigmas of the distilled model; the last is 0."""
    table = dmd_table()
    return torch.cat([table[[TRAIN_STEPS - step for step in DMD_STEPS]], torch.zeros(1)])


def dmd_table() -> Tensor:
    """The 1000 float32 sigmas that the distilled model's steps are taken from, highest first."""
    return shifted(torch.linspace(1, 0, TRAIN_STEPS + 1)[:-1], SHIFT)


def timesteps(sigmas: Tensor) -> Tensor:
    """What the network is told: 1000 sigma, as integers where the reference truncates them."""
    return (sigmas * TRAIN_STEPS).floor().long()


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Float32 normal noise of the reference: the same on every machine, unlike torch's."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))
