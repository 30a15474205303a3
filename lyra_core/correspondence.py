"""What guides the transformer, as maps on the latent grid.

Correspondences: which pixel of a retrieved frame lands where in the new views. Rays: where each pixel looks from and
to, seen from the newest frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .camera import Cameras, pixel_grid

LATENT_PIXELS = 8  # a latent stands for 8x8 pixels


def canonical_coordinates(size: tuple[int, int], slot: int, slots: int = 5, device=None) -> Tensor:
    """The map (H, W, 3) that identifies the pixels of the frame in history slot `slot`: x, y and slot, each in [-1, 1]."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, size[0], device=device), torch.linspace(-1, 1, size[1], device=device), indexing="ij"
    )
    return torch.stack([x, y, torch.full_like(x, float(torch.linspace(-1, 1, slots)[slot]))], -1)


def ray_maps(cameras: Cameras, reference: Cameras) -> Tensor:
    """(6, F, H, W) ray origins and unit directions of every pixel, in the frame of the one camera `reference`.

    Origins in scene units; not a moment in Pluecker's sense, although the reference calls it so. Its rays pass half a
    pixel right of and below the point that its warps take for a pixel's centre, and the weights know them so.
    """
    c2w = reference.w2c @ cameras.c2w
    pixels = pixel_grid(cameras.size, cameras.K.device)
    pixels = pixels + pixels.new_tensor([0.5, 0.5, 0.0])
    local = pixels.to(cameras.K) @ torch.linalg.inv(cameras.K).mT[:, None]
    directions = F.normalize(local, dim=-1) @ c2w[:, None, :3, :3].mT
    origins = c2w[:, None, None, :3, 3].expand_as(directions)
    return torch.cat([origins, directions], -1).movedim(-1, 0)


def on_latents(maps: Tensor) -> Tensor:
    """(C, F, H, W) -> (64 C, F, H / 8, W / 8): the 8x8 pixels of a latent become its channels, rows before columns."""
    return F.pixel_unshuffle(maps.movedim(1, 0), LATENT_PIXELS).movedim(0, 1)
