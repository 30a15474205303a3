"""Whether made-up parts of a picture look like the real ones, where nobody can ask that they be the same.

PSNR and SSIM prefer a blur to a right texture that lies a pixel aside. So not pixels but what they are distributed like is
compared, place by place: strengths of gradients (is there as much detail?), and small patches at several scales (is it the
same kind of detail?), both by the Wasserstein distance; of patches along random directions (Karras et al. 2018).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 6  # places across a picture that are compared each by itself
LEAST = 0.1  # of the pixels of a place, to compare it
QUANTILES, DIRECTIONS, PATCH, SCALES = 256, 128, 7, 3


def gradient_distance(made: Tensor, real: Tensor, where: Tensor) -> float:
    """Mean difference of how strong the gradients of two pictures (H, W, 3) are where a mask (H, W) says, in natural logarithms.

    0: as much detail of every strength. 0.7: gradients are half or twice as strong.
    """
    strengths = [torch.log(_gradients(picture) + 1 / 255)[None] for picture in (made, real)]
    return _over_places(where, lambda some: _apart(*(strength[:, some] for strength in strengths)))


def patch_distance(made: Tensor, real: Tensor, where: Tensor) -> float:
    """How differently patches of two pictures (H, W, 3) are distributed where a mask (H, W) says: mean over scales, times 100.

    Every scale is a band of a Laplacian pyramid, so that the brightness of a place counts once.
    """
    generator = torch.Generator().manual_seed(0)
    total, made, real = 0.0, made.permute(2, 0, 1)[None], real.permute(2, 0, 1)[None]
    for scale in range(SCALES):
        smaller = [F.avg_pool2d(picture, 2, ceil_mode=True, count_include_pad=False) for picture in (made, real)]
        bands = [
            picture if scale == SCALES - 1 else picture - F.interpolate(small, picture.shape[2:], mode="bilinear")
            for picture, small in zip((made, real), smaller, strict=True)
        ]
        directions = torch.randn(DIRECTIONS, 3, PATCH, PATCH, generator=generator)
        directions /= directions.flatten(1).norm(dim=1)[:, None, None, None]
        seen = [F.conv2d(band, directions.to(band), padding=PATCH // 2)[0] for band in bands]
        total += _over_places(where, lambda some, seen=seen: _apart(*(values[:, some] for values in seen)))
        made, real = smaller
        where = -F.max_pool2d(-F.pad(where[None].float(), (0, where.shape[1] % 2, 0, where.shape[0] % 2), value=1.0), 2)[0] > 0
    return 100 * total / SCALES


def _gradients(picture: Tensor) -> Tensor:
    """(H, W) length of the gradient of the brightness."""
    grey = picture.mean(-1)
    return torch.hypot(F.pad(grey.diff(dim=1), (0, 1)), F.pad(grey.diff(dim=0), (0, 0, 0, 1)))


def _apart(a: Tensor, b: Tensor) -> float:
    """Mean over C of the Wasserstein distances of values (C, N) and (C, M)."""
    at = torch.linspace(0, 1, QUANTILES, device=a.device)
    return float((_quantiles(a, at) - _quantiles(b, at)).abs().mean())


def _quantiles(values: Tensor, at: Tensor) -> Tensor:
    ordered = values.sort(dim=1).values  # torch.quantile refuses more than 16 million
    return ordered[:, (at * (values.shape[1] - 1)).round().long()]


def _over_places(where: Tensor, distance) -> float:
    """The distance of each place that has enough of the mask, mean weighted by how much."""
    height, width = where.shape
    total = weight = 0.0
    for rows in torch.arange(height).chunk(BLOCKS):
        for columns in torch.arange(width).chunk(BLOCKS):
            some = torch.zeros_like(where)
            some[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
            some &= where
            if (count := int(some.sum())) >= LEAST * len(rows) * len(columns):
                total, weight = total + count * distance(some), weight + count
    if not weight:
        raise ValueError("the mask leaves too little to compare; give one that is true somewhere")
    return total / weight
