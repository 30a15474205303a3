"""Where a training has got to, as one file: weights, optimiser, random generator and losses; going on from it is never having stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import files
from ..array_files import read_header, write_safetensors

VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW, for each weight


class StateError(files.FileError):
    """A training that can't be gone on with: its file, what was found there, and the way out."""


@dataclass(frozen=True)
class State:
    """After a whole number of steps; tensors on the processor."""

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]  # "weight's name/exp_avg" and so on
    random: Tensor  # uint8, of a torch.Generator
    losses: tuple[float, ...]  # of each step
    settings: Mapping  # plain JSON values: what must be the same to go on

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(weight).all()) for weight in self.weights.values())


def capture(
    step: int, weights: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, random: Tensor, losses, settings
) -> State:
    """A copy of everything that the next step depends on."""
    moments = {
        f"{name}/{moment}": optimiser.state[weight][moment].detach().to("cpu", copy=True)
        for name, weight in weights.items()
        if weight in optimiser.state
        for moment in MOMENTS
    }
    held = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in weights.items()}
    return State(step, held, moments, random.clone(), tuple(losses), dict(settings))


def restore(
    state: State, weights: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, random: torch.Generator
) -> None:
    """Put everything back; ValueError if the network is another one."""
    moments = {f"{name}/{moment}" for name in {*state.weights} for moment in MOMENTS}
    differing = sorted({*state.weights} ^ {*weights}) or sorted({*state.moments} - moments)
    differing = differing or (sorted(moments - {*state.moments}) if state.moments else [])
    differing += [name for name in weights if name in state.weights and weights[name].shape != state.weights[name].shape]
    if differing:
        raise ValueError(f"the training was of other weights: {', '.join(differing[:5])} differ; begin another one")
    try:
        random.set_state(state.random)
    except (RuntimeError, TypeError):
        raise ValueError("the training's random numbers are damaged; begin another one") from None
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state.weights[name])
            if f"{name}/step" in state.moments:
                optimiser.state[weight] = {
                    moment: state.moments[f"{name}/{moment}"].to(_place(moment, weight, optimiser), copy=True)
                    for moment in MOMENTS
                }


def _place(moment: str, weight: Tensor, optimiser: torch.optim.Optimizer):
    """An optimiser that works in one kernel counts its steps beside its weights, any other on the processor."""
    beside = any(optimiser.defaults.get(how) for how in ("fused", "capturable"))
    return weight.device if moment != "step" or beside else "cpu"


def save(state: State, path: Path) -> None:
    """Write the file anew, whole or not at all; OSError that names the way out where the disk is full."""
    tensors = {f"weight:{name}": weight for name, weight in state.weights.items()}
    tensors |= {f"moment:{name}": moment for name, moment in state.moments.items()}
    tensors |= {"random": state.random, "losses": torch.tensor(state.losses, dtype=torch.float64)}
    record = json.dumps({"version": VERSION, "step": state.step, "settings": state.settings})
    write_safetensors(path, tensors, {"lyra2_training": record})


def load(path: Path) -> State:
    """What `save` wrote; StateError for anything else."""
    with files.reading(path):
        told = read_header(path).metadata.get("lyra2_training", "{}")
        record = files.parse_json(told, path)
    with files.parsing(path, "is no whole safetensors file; take a copy of it, or remove it to begin again"):
        tensors = safetensors.torch.load_file(path)
    whole = isinstance(record, dict) and record.get("version") == VERSION and isinstance(record.get("settings"), dict)
    if not whole or type(record.get("step")) is not int or not {"random", "losses"} <= tensors.keys():
        raise StateError(f"{path}: is no training of this version of the pack; remove it to begin again")
    weights, moments = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("weight:", "moment:")
    )
    return State(record["step"], weights, moments, tensors["random"], tuple(tensors["losses"].tolist()), record["settings"])
