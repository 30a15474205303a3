"""Correspondences: which pixel of a retrieved frame lands where in the new views."""

from __future__ import annotations

import torch
from torch import Tensor


def canonical_coordinates(size: tuple[int, int], slot: int, slots: int = 5, device=None) -> Tensor:
    """The map (H, W, 3) that identifies the pixels of the frame in history slot `slot`: x, y and slot, each in [-1, 1]."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, size[0], device=device), torch.linspace(-1, 1, size[1], device=device), indexing="ij"
    )
    return torch.stack([x, y, torch.full_like(x, float(torch.linspace(-1, 1, slots)[slot]))], -1)
