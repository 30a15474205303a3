"""Frames in the size that Depth Anything 3 looks at them, resampled as the reference's preparation does.

The reference resizes 8-bit pictures by the mean over each new pixel's area, or by cubic interpolation where a side grows,
and rounds to 8 bits again: by OpenCV, and so do we.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 14  # pixels; sides are multiples of it
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green, blue


def seen_size(size: tuple[int, int], longest: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) with the longest side as long as that, and then in whole patches, halves up."""
    first = tuple(max(1, int(round(side * longest / max(size)))) for side in size)
    return first, tuple(whole_patches(side) for side in first)


def whole_patches(side: int) -> int:
    """The number of pixels nearest to `side` that is whole patches, halves up, at least one."""
    return max(PATCH, (2 * side + PATCH) // (2 * PATCH) * PATCH)


def prepared(frames: Tensor, longest: int) -> Tensor:
    """(F, 3, h, w) of frames (F, H, W, 3) in 0..1: normalised, the longest side about `longest`, in whole patches."""
    sizes = seen_size(tuple(frames.shape[1:3]), longest)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    pictures = []
    for frame in frames:
        picture = rounded(255 * frame.float().movedim(-1, 0))
        for size in sizes:
            picture = resized(picture, size)
        pictures.append((picture / 255 - mean.to(picture)) / deviation.to(picture))
    return torch.stack(pictures)


def resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) of 8-bit values (C, H, W), as 8-bit values: means over areas, or cubic if a side grows."""
    before = tuple(picture.shape[1:])
    if before == size:
        return picture
    import cv2

    grows = size[0] > before[0] or size[1] > before[1]
    bytes_ = picture.movedim(0, -1).contiguous().to("cpu", torch.uint8).numpy()
    found = cv2.resize(bytes_, size[::-1], interpolation=cv2.INTER_CUBIC if grows else cv2.INTER_AREA)
    return torch.from_numpy(found).reshape(*size, -1).movedim(-1, 0).to(picture)


def rounded(values: Tensor) -> Tensor:
    """To 0, 1, .. 255; halves up."""
    return (values + 0.5).floor().clamp(0, 255)
