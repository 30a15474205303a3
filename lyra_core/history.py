"""What the transformer is shown of the past when it paints a chunk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .framepack import FramePackLayout

LATENT_CHANNELS = 16
RAY_CHANNELS = 6 * 64  # origin and direction of the rays of the 8x8 pixels of a latent
SLOT_CHANNELS = 4 * 64  # canonical x, y, slot and depth of the 8x8 pixels of a latent, per spatial slot


@dataclass(frozen=True)
class History:
    """The packed past of one chunk and where the new views look; h x w latents of 8x8 pixels.

    ValueError where the parts don't fit each other or the layout, or a side is no multiple of 16 pixels.
    """

    layout: FramePackLayout
    latents: Tensor  # (16, history slots, h, w) clean, as the host's VAE returns them
    warped: Tensor  # (16, new latents, h, w) the newest frame, warped into the new views and encoded
    rays: Tensor  # (RAY_CHANNELS, history slots + new latents, h, w) relative to the newest frame's camera
    correspondences: Tensor  # (SLOT_CHANNELS per spatial slot, spatial slots + new latents, h, w)

    def __post_init__(self):
        slots, spatial, new = self.layout.slots(), self.layout.slots("spatial"), self.layout.new_latents
        height, width = self.size
        if height % 2 or width % 2:
            raise ValueError(
                f"pictures of {8 * height}x{8 * width} don't fit: both sides must be multiples of 16 pixels"
            )
        expected = {
            "latents": (LATENT_CHANNELS, slots),
            "warped": (LATENT_CHANNELS, new),
            "rays": (RAY_CHANNELS, slots + new),
            "correspondences": (SLOT_CHANNELS * spatial, spatial + new),
        }
        for name, counts in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != (*counts, height, width):
                raise ValueError(f"{name} are {found}, layout {self.layout} needs {(*counts, height, width)}")

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in latents."""
        return tuple(self.latents.shape[-2:])
