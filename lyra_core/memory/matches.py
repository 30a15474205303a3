"""What two photos show alike: distinct points of each, and which of them are the same.

Points are SIFT's. Their descriptors do not change with brightness, contrast, size or a turned picture, but with a mirrored
one. OpenCV is imported where it is needed only: two packages own its module, and hosts lack it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

POINTS = 4000  # of a photo at most
RATIO = 0.8  # of the distances to the best and to the second best partner, above which a match counts as a guess


@dataclass(frozen=True)
class Features:
    """N distinct points of one photo."""

    pixels: np.ndarray  # (N, 2) float64, integer pixel centres
    descriptors: Tensor  # (N, 128) float32 of unit length

    def __len__(self) -> int:
        return len(self.pixels)


def features(picture: Tensor) -> Features:
    """The distinct points of a picture (H, W, 3) in 0..1, at most POINTS."""
    import cv2

    grey = (picture.detach().float().cpu().mean(-1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    points, descriptors = cv2.SIFT_create(POINTS).detectAndCompute(grey, None)
    if not points:
        return Features(np.empty((0, 2)), torch.empty(0, 128))
    found = torch.from_numpy(descriptors)
    # roots of what is in each bin: a few full bins do not outweigh all the others
    found = (found / found.sum(1, keepdim=True).clamp_min(1e-9)).sqrt()
    return Features(np.array([point.pt for point in points], dtype=np.float64), found)


def matches(a: Features, b: Features) -> np.ndarray:
    """Which points of `a` and `b` are the same (M, 2): each other's best partner, and clearly better than the second best."""
    if len(a) < 2 or len(b) < 2:
        return np.empty((0, 2), dtype=np.int64)
    alike = a.descriptors @ b.descriptors.T
    near, partner = alike.topk(2, 1)
    back = alike.argmax(0)
    distance = (2 - 2 * near).clamp_min(0).sqrt()
    sure = (distance[:, 0] < RATIO * distance[:, 1]) & (back[partner[:, 0]] == torch.arange(len(a)))
    return torch.stack([sure.nonzero()[:, 0], partner[sure, 0]], 1).numpy()
