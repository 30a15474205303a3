"""What learning asks of networks: any that can be called so will do, with weights of its own or patched by a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Condition(NamedTuple):
    """What the network is told of a chunk. In the scale that it works in, without a batch axis until `stack`."""

    history: Tensor  # (16, history slots, h, w) clean latents
    warped: Tensor  # (16, new latents, h, w) the newest frame warped into the new views and encoded
    rays: Tensor  # (RAY_CHANNELS, history slots + new latents, h, w)
    correspondences: Tensor  # (SLOT_CHANNELS per spatial slot, spatial slots + new latents, h, w)
    text: Tensor  # (tokens, width)
    image: Tensor  # (tokens, width) CLIP's view of the newest frame


# noisy latents (B, 16, T, h, w), timesteps (B,) of 0 .. 1000, a batch of conditions -> velocity, noise minus image
Model = Callable[[Tensor, Tensor, Condition], Tensor]


class Codec(Protocol):
    """A video codec that is causal in time: 4 frames a latent, after the first. Latents are in the network's scale.

    `before` is what came before in the same video, if anything did; only as much is used as the codec remembers.
    """

    name: str  # tells it from others, for what is kept on disk

    def encode(self, frames: Tensor, before: Tensor | None = None) -> Tensor:
        """(16, T, h, w) of frames (F, H, W, 3) in -1 .. 1."""

    def decode(self, latents: Tensor, before: Tensor | None = None) -> Tensor:
        """(F, H, W, 3), not clamped, of latents (16, T, h, w)."""


@dataclass(frozen=True)
class Encoders:
    """Everything frozen that a step needs."""

    codec: Codec
    look: Callable[[Tensor], Tensor]  # a picture (H, W, 3) in -1 .. 1 -> (tokens, width)
    tell: Callable[[str], Tensor]  # a caption -> (tokens, width)
    geometry: torch.device | str | None = None  # where views are warped and guides made; None: where the sample is


@dataclass(frozen=True)
class Example:
    """A chunk to paint, and what is shown of it."""

    target: Tensor  # (16, new latents, h, w) clean
    condition: Condition
    remembered: Tensor  # (new latents, h, w) share of pixels that the memory shows and the newest frame does not


def stack(conditions: Sequence[Condition]) -> Condition:
    """Conditions as a batch; ValueError if their sizes differ."""
    for name, parts in zip(Condition._fields, zip(*conditions, strict=True), strict=True):
        if len({tuple(part.shape) for part in parts}) > 1:
            found = " and ".join(sorted({str(tuple(part.shape)) for part in parts}))
            raise ValueError(f"a batch needs {name} of one shape, found {found}")
    return Condition(*(torch.stack(parts) for parts in zip(*conditions, strict=True)))
