"""A training whose every step follows from its number, so that weights, moments and a number are all there is to keep."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from lyra_core.training import state

DONE = "done"  # of what a kept state says beside its settings


@dataclass
class Progress:
    """How much of a training is done, 0 to 1: by its steps, or by a clock that stands still while nobody trains."""

    steps: int
    minutes: float | None = None
    before: float = 0.0  # of the clock's share
    began: float = field(default_factory=lambda: time.monotonic())

    def __call__(self, step: int) -> float:
        if self.minutes is None:
            return min(1.0, step / self.steps)
        return min(1.0, self.before + (time.monotonic() - self.began) / 60 / self.minutes)


def keep(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, step: int, settings: Mapping, done: float = 0.0) -> None:
    """The state after so many steps, `done` of all that are to be made."""
    weights = dict(network.named_parameters())
    for weight in weights.values():
        if weight not in optimiser.state:  # it has had no gradient yet; this is what its first one would find
            moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            optimiser.state[weight] = {"step": torch.tensor(0.0), **moments}
    state.save(state.capture(step, weights, optimiser, torch.Generator().get_state(), (), {**settings, DONE: done}), path)


def resume(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, settings: Mapping) -> tuple[int, float]:
    """Put a kept state back; its steps and how much was done, 0 if there is none. ValueError if it is of another training."""
    if not path.exists():
        return 0, 0.0
    found = state.load(path)
    told = {name: value for name, value in found.settings.items() if name != DONE}
    if told != settings:
        raise ValueError(f"{path} is of a training with {told}, not {dict(settings)}; move it away to begin another one")
    state.restore(found, dict(network.named_parameters()), optimiser, torch.Generator())
    return found.step, found.settings.get(DONE, 0.0)
