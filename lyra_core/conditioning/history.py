"""What the transformer is shown of the past when it paints a chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .framepack import FramePackLayout

LATENT_CHANNELS = 16
RAY_CHANNELS = 6 * 64  # origin and direction of the rays of the 8x8 pixels of a latent
SLOT_CHANNELS = 4 * 64  # canonical x, y, slot and depth of the 8x8 pixels of a latent, per spatial slot


class Guides(NamedTuple):
    """Maps on the latent grid that say where the pixels of a chunk look and where they come from."""

    rays: Tensor  # (RAY_CHANNELS, history slots + new latents, h, w) relative to the newest frame's camera
    correspondences: Tensor  # (SLOT_CHANNELS per spatial slot, spatial slots + new latents, h, w)


@dataclass(frozen=True)
class History:
    """The packed past of one chunk and where the new views look; h x w latents of 8x8 pixels.

    The guides are made when they are asked for: at 480x832 they are a gigabyte, of cameras and depths that the world
    has anyway. ValueError where the parts don't fit each other or the layout, or a side is no multiple of 16 pixels.
    """

    layout: FramePackLayout
    latents: Tensor  # (16, history slots, h, w) clean, as the host's VAE returns them
    warped: Tensor  # (16, new latents, h, w) the newest frame, warped into the new views and encoded
    make_guides: Callable[[torch.device | None], Guides]

    def __post_init__(self):
        if self.latents.ndim != 4:
            raise ValueError(f"latents are {tuple(self.latents.shape)}, expected (channels, slots, height, width)")
        height, width = self.size
        if height % 2 or width % 2:
            raise ValueError(f"pictures of {8 * height}x{8 * width} don't fit: both sides must be multiples of 16 pixels")
        self._check("latents", self.latents, LATENT_CHANNELS, self.layout.slots())
        self._check("warped", self.warped, LATENT_CHANNELS, self.layout.new_latents)

    def _check(self, name: str, found: Tensor, channels: int, count: int) -> None:
        expected = (channels, count, *self.size)
        if tuple(found.shape) != expected:
            raise ValueError(f"{name} are {tuple(found.shape)}, layout {self.layout} needs {expected}")

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in latents."""
        return tuple(self.latents.shape[-2:])

    def guides(self, device: torch.device | None = None) -> Guides:
        """Made anew on every call, on `device` (None: the processor); ValueError if they don't fit."""
        made, new, spatial = self.make_guides(device), self.layout.new_latents, self.layout.slots("spatial")
        self._check("rays", made.rays, RAY_CHANNELS, self.layout.slots() + new)
        self._check("correspondences", made.correspondences, SLOT_CHANNELS * spatial, spatial + new)
        return made
