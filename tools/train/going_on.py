"""A training whose every step follows from its number, so that weights, moments and a number are all there is to keep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lyra_core.training import state


def keep(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, step: int, settings: Mapping) -> None:
    """The state after so many steps."""
    weights = dict(network.named_parameters())
    for weight in weights.values():
        if weight not in optimiser.state:  # it has had no gradient yet; this is what its first one would find
            moments = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            optimiser.state[weight] = {"step": torch.tensor(0.0), **moments}
    state.save(state.capture(step, weights, optimiser, torch.Generator().get_state(), (), settings), path)


def resume(path: Path, network: nn.Module, optimiser: torch.optim.Optimizer, settings: Mapping) -> int:
    """Put a kept state back; how many steps it had made, 0 if there is none. ValueError if it is of another training."""
    if not path.exists():
        return 0
    found = state.load(path)
    if found.settings != settings:
        raise ValueError(f"{path} is of a training with {found.settings}, not {dict(settings)}; move it away to begin another one")
    state.restore(found, dict(network.named_parameters()), optimiser, torch.Generator())
    return found.step
