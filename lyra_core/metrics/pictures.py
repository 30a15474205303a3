"""How well a world holds together: pictures against pictures, and pictures against the geometry.

Images are (H, W, 3) or (F, H, W, 3) in 0..1; every function returns plain numbers, or a record of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad

from ..cameras.camera import Cameras, project, unproject

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Wang et al. 2004, as are the two stabilisers
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
GMSD_C = 0.0026  # Xue et al. 2014


@dataclass(frozen=True)
class Revisits:
    """How alike P frames that come back are to the earlier ones that were taken from the same place."""

    outgoing: tuple[int, ...]  # the earlier frames
    returning: tuple[int, ...]  # the frame that comes back to each of them
    psnr: tuple[float, ...]  # dB, of each pair
    mean: float  # dB, mean over the pairs
    pooled: float  # dB, of the squared error over all pixels of all pairs


@dataclass(frozen=True)
class ColorDrift:
    """How far the colours of F frames have moved away from the first frame's."""

    mean: tuple[float, ...]  # distance of the frame's mean colour, RGB in 0..1
    std: tuple[float, ...]  # distance of its standard deviations, i.e. of the contrast


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images. mask: (H, W) or (F, H, W) bool, pixels to compare."""
    total, count = _squared_error(a, b, mask)
    if count == 0:
        raise ValueError("the mask leaves no pixel to compare; give one that is true somewhere")
    return _decibels(total, count)


def _squared_error(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[float, int]:
    """Sum of the squared differences and how many numbers are in it."""
    if a.shape != b.shape:
        raise ValueError(
            f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} can't be compared; resize one of them"
        )
    squares = (a - b).double().square()
    squares = squares if mask is None else squares[mask]
    return float(squares.sum()), squares.numel()


def _decibels(total: float, count: int) -> float:
    mse = torch.tensor(total / count, dtype=torch.float64)
    return float(-10 * torch.log10(mse)) if mse > 0 else float("inf")


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity, 1 for equal images, with the usual gaussian window, without any padding."""
    return float(ssim_map(a.double(), b.double()).mean())


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """`ssim` of every window that fits: (N, 1, H - 10, W - 10), N being pictures times channels; can be derived."""
    if a.shape != b.shape or min(a.shape[-3:-1]) < SSIM_WINDOW:
        raise ValueError(
            f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}: they must have one shape, and at least "
            f"{SSIM_WINDOW} pixels a side"
        )
    x, y = (image.movedim(-1, -3).reshape(-1, 1, *image.shape[-3:-1]) for image in (a, b))
    reach = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    bell = torch.softmax(-0.5 * (reach / SSIM_SIGMA) ** 2, 0)

    def blur(image: Tensor) -> Tensor:
        return conv2d(conv2d(image, bell.view(1, 1, 1, -1)), bell.view(1, 1, -1, 1))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    return ((2 * mx * my + SSIM_C1) * (2 * cov + SSIM_C2)) / ((mx * mx + my * my + SSIM_C1) * (vx + vy + SSIM_C2))


def gradient_similarity(a: Tensor, b: Tensor) -> Tensor:
    """How alike the edges of two pictures or F of them are, 1 for equal ones: (..., H, W) of (..., H, W, 3).

    The standard deviation of it is GMSD (Xue et al. 2014), here without its halving of the pictures first, for they are small.
    """
    if a.shape != b.shape or a.shape[-1] != 3:
        raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} can't be compared; resize one of them")
    kernel = a.new_tensor([[1.0, 0.0, -1.0]] * 3) / 3
    kernels = torch.stack([kernel, kernel.T])[:, None]

    def edges(image: Tensor) -> Tensor:
        grey = image.mean(-1).reshape(-1, 1, *image.shape[-3:-1])
        return conv2d(pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1).view(image.shape[:-1])

    first, second = edges(a), edges(b)
    return (2 * first * second + GMSD_C) / (first**2 + second**2 + GMSD_C)


def revisit_psnr(
    frames: Sequence[Tensor],
    cameras: Cameras,
    seen: Sequence[Tensor] | None = None,
    tolerance: float = 0.02,
    scale: float | None = None,
    on_pair: Callable[[int, int], None] = lambda done, total: None,
) -> Revisits:
    """Compare each frame that comes back to where an earlier one was taken with that earlier one.

    frames: F of (H, W, 3). A frame comes back if its camera stands where an earlier one stood, the nearest such one, and
    the path was elsewhere in between (ten times the tolerance away at least).
    seen: F of (H, W) bool, pixels that aren't invented; those of the earlier frame are compared, whether the later one
    has them or had to invent them again.
    tolerance: largest distance / scale + angle (radians) of two cameras that still stand in the same place.
    scale: scene units that weigh like one radian; without it, how far the path leads from its first camera.
    on_pair: (done, total) after each pair. Frames are looked at one pair at a time.
    """
    pairs, errors = [], []
    coming_back = revisits(cameras, tolerance, scale)
    for done, (out, back) in enumerate(coming_back, 1):
        total, count = _squared_error(frames[out], frames[back], None if seen is None else seen[out])
        if count:
            pairs.append((out, back))
            errors.append((total, count))
        on_pair(done, len(coming_back))
    if not pairs:
        raise ValueError(
            f"no pair of frames to compare: no camera of this path of {len(cameras)} comes back to within {tolerance:.3g} "
            "of an earlier one after having been elsewhere, or no pixel was seen there"
        )
    values = [_decibels(*error) for error in errors]
    pooled = _decibels(sum(total for total, _ in errors), sum(count for _, count in errors))
    return Revisits(
        tuple(out for out, _ in pairs),
        tuple(back for _, back in pairs),
        tuple(values),
        sum(values) / len(values),
        pooled,
    )


def revisits(cameras: Cameras, tolerance: float = 0.02, scale: float | None = None) -> list[tuple[int, int]]:
    """Which frames come back, as `revisit_psnr` takes it: (the earlier one, the one that comes back to it)."""
    apart = camera_distances(cameras, scale)
    # row i: how far the path has been from camera i since then
    left = torch.triu(apart).cummax(1).values > 10 * tolerance
    came_back = torch.triu(left & (apart <= tolerance), 1)
    nearest = torch.where(came_back, apart, float("inf")).min(0)
    return [(int(nearest.indices[back]), back) for back in came_back.any(0).nonzero().flatten().tolist()]


def camera_distances(cameras: Cameras, scale: float | None = None) -> Tensor:
    """(F, F) distance of the centres / scale + angle between the orientations (radians), of every two cameras."""
    centers, R = cameras.centers.double(), cameras.w2c[:, :3, :3].double()
    apart = torch.cdist(centers, centers, compute_mode="donot_use_mm_for_euclid_dist")
    if scale is None:
        scale = float(apart[0].max()) or 1.0
    # the chord between rotations, unlike the arc cosine of their trace, is precise for small angles
    chord = torch.cdist(R.flatten(1), R.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    return apart / scale + 2 * torch.asin((chord / 8**0.5).clamp_max(1))


def reprojection_error(
    frame_a: Tensor,
    depth_a: Tensor,
    camera_a: Cameras,
    frame_b: Tensor,
    camera_b: Cameras,
    depth_b: Tensor | None = None,
    tolerance: float = 0.05,
) -> float:
    """Mean absolute colour difference between a's pixels and what b shows where they project to; see `shown_by_both`."""
    a, b = shown_by_both(frame_a, depth_a, camera_a, frame_b, camera_b, depth_b, tolerance)
    if not len(a):
        raise ValueError(
            "no pixel of the first view is visible in the second: they don't overlap, or their depths differ"
        )
    return float((b - a).abs().mean())


def shown_by_both(
    frame_a: Tensor,
    depth_a: Tensor,
    camera_a: Cameras,
    frame_b: Tensor,
    camera_b: Cameras,
    depth_b: Tensor | None = None,
    tolerance: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """Colours (N, 3) of those of a's pixels that b shows too, and b's colours (N, 3) where they project to.

    frame (H, W, 3), depth (H, W) z-depth with 0 = unknown, one camera each. With `depth_b`, pixels whose depth differs
    from b's there by more than `tolerance`, relative, count as hidden in b and are left out.
    """
    height, width = camera_b.size
    known = depth_a > 0
    pixels, z = project(unproject(depth_a[None], camera_a)[0][known], camera_b)
    pixels, z = pixels[0], z[0]
    limit = pixels.new_tensor([width - 1, height - 1])
    # half a thousandth of a pixel: the border itself, reached by rounding from the other side, is still inside
    visible = (z > 0) & (pixels >= -5e-4).all(1) & (pixels <= limit + 5e-4).all(1)
    if depth_b is not None:
        u, v = pixels.nan_to_num().round().clamp(pixels.new_zeros(2), limit).long().unbind(1)
        visible &= (z - depth_b[v, u]).abs() <= tolerance * z
    places = (2 * pixels[visible] / limit.clamp_min(1) - 1)[None, None]
    shown = grid_sample(
        frame_b.movedim(-1, 0)[None], places, mode="bilinear", padding_mode="border", align_corners=True
    )
    return frame_a[known][visible], shown[0, :, 0].T


def color_drift(frames: Iterable[Tensor]) -> ColorDrift:
    """Of each frame (H, W, 3), taken one at a time, from the first."""
    statistics = [torch.stack([f.flatten(0, 1).double().mean(0), f.flatten(0, 1).double().std(0)]) for f in frames]
    if not statistics:
        raise ValueError("there is no frame to measure the colours of")
    distances = (torch.stack(statistics) - statistics[0]).norm(dim=2)
    return ColorDrift(tuple(distances[:, 0].tolist()), tuple(distances[:, 1].tolist()))
