"""What is trained, how fast, and what becomes of gradients on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

LEARNING_RATE, WEIGHT_DECAY, LARGEST_NORM = 3e-5, 1e-3, 0.1
WARM_UP, CYCLE = 100, 400_000  # steps until the full rate; until the lowest
START, HIGH, LOW = 1e-6, 0.99, 0.4  # of the rate: at first, after the warm-up, in the end
IN_BLOCKS = ("cam_encoder", "buffer_encoder", "self_attn", "clean_patch_embeddings", "patch_embedding")
ANYWHERE = ("clean_patch_embeddings", "patch_embedding")

Filter = Callable[[str], bool]  # the name of a weight in the network -> whether it is trained


def of_lyra2(name: str) -> bool:
    """What the reference trains: all that Lyra 2 adds to Wan, self-attention and the patch embeddings."""
    patterns = IN_BLOCKS if re.match(r"blocks\.\d+\.", name) else ANYWHERE
    return any(pattern in name for pattern in patterns)


def everything(name: str) -> bool:
    return True


def matching(text: str) -> Filter:
    """Weights whose name holds one of the words of a list with commas, such as "self_attn, ffn"; ValueError for none."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError("no weights are named; write parts of their names, such as self_attn, cam_encoder")
    return lambda name: any(word in name for word in words)


def trained(network: nn.Module, chosen: Filter) -> dict[str, nn.Parameter]:
    """The network's weights of these names; only they get gradients. ValueError if there is none."""
    found = {}
    for name, weight in network.named_parameters():
        weight.requires_grad_(chosen(name))
        if weight.requires_grad:
            found[name] = weight
    if not found:
        raise ValueError("no weight of the network has such a name; nothing would be learned")
    return found


def optimiser(
    weights: Iterable[nn.Parameter], rate: float = LEARNING_RATE, decay: float = WEIGHT_DECAY
) -> torch.optim.AdamW:
    """The reference's: decay on all that is trained, biases too."""
    return torch.optim.AdamW(list(weights), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)


def rate_factor(step: int, warm_up: int = WARM_UP, cycle: int = CYCLE, low: float = LOW) -> float:
    """By what the learning rate is multiplied in a step, from 0: up in a line, then down in one until `cycle`."""
    if step < warm_up:
        return START + (HIGH - START) * step / warm_up
    return low + (HIGH - low) * max(0, cycle - step) / cycle


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def tame(weights: Iterable[nn.Parameter], largest: float = LARGEST_NORM) -> float:
    """Gradients without NaN and infinities, then scaled down together to a norm of at most `largest`; the norm before."""
    return float(tamed(weights, largest))


def tamed(weights: Iterable[nn.Parameter], largest: float) -> Tensor:
    """The same without waiting for the device: the norm stays there."""
    weights = [weight for weight in weights if weight.grad is not None]
    for weight in weights:
        torch.nan_to_num(weight.grad, nan=0.0, posinf=0.0, neginf=0.0, out=weight.grad)
    return nn.utils.clip_grad_norm_(weights, largest)


def values(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of weights on the processor."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
