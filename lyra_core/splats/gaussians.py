"""3D Gaussians: what a world becomes when it stops being a video.

The world axes are those of the cameras (OpenCV: x right, y down, z forward), which is also what 3DGS files hold, so no
axis is flipped anywhere here. Values are activated: linear scales, opacities in [0, 1], unit quaternions.

Without a network, a world's frames and depths already are a surface: `fuse` turns every pixel into one flat gaussian
that covers exactly that pixel's patch of the surface, and skips the pixels that earlier views have covered.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isqrt, pi, sqrt

import torch
from torch import Tensor

from ..cameras.camera import FARTHEST, Cameras, project, quaternion_to_rotation, rotation_to_quaternion, unproject

SH_DC = 0.28209479177387814     # the constant spherical harmonic, 1 / (2 sqrt(pi))

FOOTPRINT = 0.5         # standard deviation in pixels: 95 % closed from half as far; 0.6 closes more and costs 1.3 dB
THICKNESS = 0.1         # across the surface, relative to the pixel's footprint: flat, but never singular
LONGEST = 6.0           # stretch at grazing angles, in footprints; beyond it depth noise would make needles
EDGE = 0.05             # relative depth jump between neighbouring pixels that is an edge, not a slope
FINER = 1.01            # by how much a voxel may be larger than it must
OPACITY = 0.98          # of a measured surface: neighbours overlap, so the surface itself is closed

HIGHEST_DEGREE = 4      # of spherical harmonics, as gsplat
LARGEST = FARTHEST      # of any number of a gaussian: beyond any scene, and its square is still a float32
SHORTEST = 1e-12        # length of a quaternion from which on it says how to turn; shorter ones can't be made unit
BLOCK = 1 << 16         # gaussians looked at at once
BROKEN = f"have NaN or infinite values, numbers beyond {LARGEST:g}, negative sizes or a rotation of length zero"


@dataclass(frozen=True)
class Gaussians:
    """N gaussians in world space."""

    means: Tensor       # (N, 3) scene units
    quats: Tensor       # (N, 4) unit, order w x y z
    scales: Tensor      # (N, 3) standard deviations, linear, scene units
    opacities: Tensor   # (N,) in [0, 1]
    sh: Tensor          # (N, K, 3) spherical harmonics in the order and with the signs of 3DGS files; K = (degree + 1)²

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def colors(self) -> Tensor:
        """(N, 3) plain colours, 0..1 for those that came from images."""
        return 0.5 + SH_DC * self.sh[:, 0]

    def select(self, mask: Tensor) -> Gaussians:
        """Those where the mask (N,) holds, or those at the given indices."""
        return Gaussians(self.means[mask], self.quats[mask], self.scales[mask], self.opacities[mask], self.sh[mask])

    def to(self, device) -> Gaussians:
        return Gaussians(self.means.to(device), self.quats.to(device), self.scales.to(device),
                         self.opacities.to(device), self.sh.to(device))


def drawable(gaussians: Gaussians) -> Tensor:
    """(N,) bool: which ones can be drawn. The others are BROKEN, and whoever draws, merges or writes leaves them out.

    Opacities outside of 0..1 are no fault: they count as 0 or 1.
    """
    parts = [torch.ones(len(gaussians), dtype=torch.bool, device=gaussians.means.device)]
    for field in vars(gaussians).values():
        parts.append((field.float().abs() <= LARGEST).reshape(len(gaussians), -1).all(1))       # NaN is not
    lengths = torch.linalg.vector_norm(gaussians.quats.float(), dim=1)
    return torch.stack([*parts, (gaussians.scales >= 0).all(1), lengths >= SHORTEST]).all(0)


def sound(gaussians: Gaussians, block: int = BLOCK) -> tuple[Gaussians, int]:
    """Those that can be drawn (see `drawable`), and how many were left out; the same ones if that is none."""
    starts = range(0, len(gaussians), block)
    masks = [drawable(gaussians.select(slice(start, start + block))) for start in starts]
    broken = sum(int((~mask).sum()) for mask in masks)
    return (gaussians.select(torch.cat(masks)), broken) if broken else (gaussians, 0)


def merge(first: Gaussians, *others: Gaussians) -> Gaussians:
    """All of them in one set, on the device of the first; ValueError if their spherical harmonics differ in number."""
    bands = sorted({g.sh.shape[1] for g in (first, *others)})
    if len(bands) > 1:
        raise ValueError(f"gaussians with {bands} spherical harmonics can't be merged; keep `sh[:, :1]` of each")
    parts = [first, *(g.to(first.means.device) for g in others)]
    return Gaussians(*(torch.cat([getattr(g, field) for g in parts])
                       for field in ("means", "quats", "scales", "opacities", "sh")))


def colors_to_sh(colors: Tensor) -> Tensor:
    """Spherical harmonics (N, 1, 3) of plain colours (N, 3) in 0..1."""
    return ((colors - 0.5) / SH_DC)[:, None]


# ------------------------------------------------------------------------------------------------- colours with directions

def degree(gaussians: Gaussians) -> int:
    """The degree of its spherical harmonics, 0 .. HIGHEST_DEGREE; ValueError if they fill none."""
    count = gaussians.sh.shape[1]
    found = isqrt(count) - 1
    if (found + 1) ** 2 != count or not 0 <= found <= HIGHEST_DEGREE:
        raise ValueError(f"{count} spherical harmonics are no degree up to {HIGHEST_DEGREE}; keep the first 1, 4, 9 or 16: "
                         "`sh[:, :1]`")
    return found


def harmonics(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics (..., (degree + 1)²) of unit directions (..., 3), in the order and with the signs of 3DGS.

    Order m of degree l is Legendre's function of z times the real or imaginary part of (-x - iy)^m.
    """
    x, y, z = directions.unbind(-1)
    values = [None] * (degree + 1) ** 2
    diagonal, real, imaginary = torch.full_like(z, sqrt(0.25 / pi)), torch.ones_like(z), torch.zeros_like(z)
    for m in range(degree + 1):
        if m:
            diagonal = diagonal * sqrt((2 * m + 1) / (2 * m))
            real, imaginary = -(x * real - y * imaginary), -(x * imaginary + y * real)
        before, legendre = torch.zeros_like(z), diagonal
        for band in range(m, degree + 1):
            middle = band * (band + 1)
            values[middle + m] = legendre * real * (sqrt(2) if m else 1)
            if m:
                values[middle - m] = legendre * imaginary * sqrt(2)
            up = sqrt((4 * (band + 1) ** 2 - 1) / ((band + 1) ** 2 - m * m))
            down = sqrt((band * band - m * m) / abs(4 * band * band - 1))
            before, legendre = legendre, up * (z * legendre - down * before)
    return torch.stack(values, -1)


def seen_colors(gaussians: Gaussians, center: Tensor) -> Tensor:
    """(N, 3) colours, 0 or more, as they look from a point (3,), of all degrees there are."""
    highest = degree(gaussians)
    if not highest:
        return gaussians.colors.clamp_min(0)
    basis = harmonics(torch.nn.functional.normalize(gaussians.means - center, dim=1), highest)
    return (0.5 + (basis[:, None] @ gaussians.sh)[:, 0]).clamp_min(0)


# ---------------------------------------------------------------------------------------------------- from images and depth

def from_views(images: Sequence[Tensor], depths: Sequence[Tensor], cameras: Cameras, stride: int = 1,
               known: Sequence[Tensor] | None = None, tolerance: float = 0.04) -> Gaussians:
    """`fuse` for views that are at hand: images (F, H, W, 3), depths (F, H, W), known (F, H, W) bool."""
    if not len(images) == len(depths) == len(cameras):
        raise ValueError(f"{len(images)} images, {len(depths)} depths and {len(cameras)} cameras are not one view each")
    masks = known if known is not None else [None] * len(images)
    return fuse(((images[i], depths[i], cameras[i], masks[i]) for i in range(len(cameras))), stride, tolerance)


def fuse(views: Iterable[tuple], stride: int = 1, tolerance: float = 0.04) -> Gaussians:
    """One gaussian per pixel of the first view, then one per pixel that the gaussians so far don't cover.

    views: tuples (image (H, W, 3) in 0..1, depth (H, W) z-depth with 0 = unknown, camera, and optionally known (H, W)
    bool), taken one at a time, so hundreds of frames need never be in memory together.
    stride: take every stride-th pixel, with gaussians that much larger.
    tolerance: relative depth difference below which a gaussian and a pixel show the same surface.
    """
    parts: list[Gaussians] = []
    means = None
    for image, depth, camera, *known in views:
        image, depth, camera = image[::stride, ::stride], depth[::stride, ::stride], camera.subsampled(stride)
        if depth.shape != camera.size or image.shape[:2] != camera.size:
            raise ValueError(f"view {len(parts)}: after stride {stride} the image is {tuple(image.shape[:2])}, the depth "
                             f"{tuple(depth.shape)} and the camera's picture {camera.size}; resize them to one size")
        wanted = torch.isfinite(depth) & (depth > 0)
        if known and known[0] is not None:
            wanted &= known[0][::stride, ::stride]
        if means is not None:
            wanted &= ~covered(means, depth, camera, tolerance)
        parts.append(from_pixels(image, depth, camera, wanted))
        means = parts[-1].means if means is None else torch.cat([means, parts[-1].means])
    if not parts:
        raise ValueError("there is no view to make gaussians of")
    return merge(*parts)


def covered(means: Tensor, depth: Tensor, camera: Cameras, tolerance: float = 0.04) -> Tensor:
    """(H, W) bool: which pixels lie on, or in a gap of up to two pixels between, means (N, 3) at their depth (H, W)."""
    height, width = camera.size
    pixels, z = project(means, camera)
    pixels, z = pixels[0].round(), z[0]
    inside = (z > 0) & (pixels >= -1).all(1) & (pixels[:, 0] <= width) & (pixels[:, 1] <= height)
    u, v, z = pixels[inside, 0].long(), pixels[inside, 1].long(), z[inside]
    # two pixels of border, so that the neighbours of a mean just outside the picture are addresses too
    framed = torch.nn.functional.pad(depth, (2, 2, 2, 2))
    near = torch.zeros_like(framed, dtype=torch.bool)
    steps = [(step_v, step_u) for step_v in (-1, 0, 1) for step_u in (-1, 0, 1)]
    for step_v, step_u in steps:
        address = (v + 2 + step_v) * (width + 4) + u + 2 + step_u
        d = framed.view(-1)[address]
        near.view(-1)[address[(z - d).abs() <= tolerance * d]] = True
    # Around the covered area this reaches a pixel too far, which would leave a seam between it and what is added;
    # so give back the pixels that have an uncovered neighbour on the same surface.
    found = near[2:-2, 2:-2].clone()
    for step_v, step_u in steps:
        beside = (slice(2 + step_v, 2 + step_v + height), slice(2 + step_u, 2 + step_u + width))
        found &= near[beside] | ((framed[beside] - depth).abs() > tolerance * depth)
    return found


def from_pixels(image: Tensor, depth: Tensor, camera: Cameras, wanted: Tensor) -> Gaussians:
    """One flat gaussian for each wanted pixel (H, W) bool of one view, lying in the surface that the depth describes."""
    across, down = _patch(depth, camera)
    across, down = across[wanted], down[wanted]
    # The patch's sides aren't perpendicular where the surface is slanted; its principal axes are. The gaussian with
    # these axes projects back to the same round spot of FOOTPRINT pixels on every pixel, whatever the slant.
    turn = 0.5 * torch.atan2(2 * (across * down).sum(1), across.square().sum(1) - down.square().sum(1))[:, None]
    axes = torch.stack([turn.cos() * across + turn.sin() * down, turn.cos() * down - turn.sin() * across], 1)
    unit = (depth[wanted] / camera.K[0, 0, 0])[:, None]
    lengths = axes.norm(dim=2)
    axes = axes / lengths[..., None].clamp_min(1e-12)
    R = torch.stack([axes[:, 0], axes[:, 1], torch.linalg.cross(axes[:, 0], axes[:, 1])], 2)
    scales = torch.cat([FOOTPRINT * lengths.minimum(LONGEST * unit), THICKNESS * FOOTPRINT * unit], 1)
    means = unproject(depth[None], camera)[0][wanted]
    return Gaussians(means, rotation_to_quaternion(R), scales, torch.full_like(unit[:, 0], OPACITY),
                     colors_to_sh(image[wanted][:, :3].to(means)))


def _patch(depth: Tensor, camera: Cameras) -> tuple[Tensor, Tensor]:
    """World vectors (H, W, 3) from each pixel's surface point to its right and its lower neighbour's, on the surface.

    Where the depth jumps on both sides the patch faces the camera.
    """
    points = unproject(depth[None], camera)[0]
    axes = camera.c2w[0, :3, :3].mT
    right = axes[0] * (depth / camera.K[0, 0, 0])[..., None]
    lower = axes[1] * (depth / camera.K[0, 1, 1])[..., None]
    return _slope(points, depth, right, 1), _slope(points, depth, lower, 0)


def _slope(points: Tensor, depth: Tensor, facing: Tensor, dim: int) -> Tensor:
    """Mean step (H, W, 3) to the neighbours along `dim` that lie on the same surface, else `facing`."""
    size = depth.shape[dim]
    step = points.narrow(dim, 1, size - 1) - points.narrow(dim, 0, size - 1)
    near, far = depth.narrow(dim, 0, size - 1), depth.narrow(dim, 1, size - 1)
    smooth = (near > 0) & (far > 0) & ((far - near).abs() <= EDGE * near.minimum(far))
    total, count = torch.zeros_like(points), torch.zeros_like(depth)
    for start in (0, 1):
        total.narrow(dim, start, size - 1).add_(torch.where(smooth[..., None], step, 0))
        count.narrow(dim, start, size - 1).add_(smooth)
    return torch.where((count > 0)[..., None], total / count.clamp_min(1)[..., None], facing)


# ------------------------------------------------------------------------------------------------------------- fewer of them

def prune(gaussians: Gaussians, min_opacity: float = 0.0, max_scale: float = float("inf")) -> Gaussians:
    """Without those more transparent than `min_opacity`, larger than `max_scale` (scene units) or broken."""
    gaussians, _ = sound(gaussians)
    return gaussians.select((gaussians.opacities >= min_opacity) & (gaussians.scales.amax(1) <= max_scale))


def faintest(opacities: Tensor, share: float) -> float:
    """The opacity from which on gaussians are kept when the faintest `share` of them, 0..1, goes; opacities (N,)."""
    return float(opacities.kthvalue(min(max(int(len(opacities) * share), 1), len(opacities))).values)


def without_outliers(gaussians: Gaussians, times: float) -> Gaussians:
    """Without those more than `times` as far from the scene's middle (the median) as half of them are, and broken ones."""
    if not times > 1:
        raise ValueError(f"{times} times the median distance would leave less than half of the gaussians; give above 1")
    gaussians, _ = sound(gaussians)
    distances = (gaussians.means - gaussians.means.median(0).values).norm(dim=1)
    return gaussians.select(distances <= times * distances.median())


def at_most(gaussians: Gaussians, count: int, on_step: Callable[[], None] = lambda: None) -> Gaussians:
    """`voxel_reduce` by the smallest voxels that leave `count` or fewer, to 2 %; only without broken ones if that will do.

    `on_step` is called for each size that is tried.
    """
    if count < 1:
        raise ValueError(f"at most {count} gaussians are none; give 1 or more")
    gaussians, _ = sound(gaussians)
    if len(gaussians) <= count:
        return gaussians
    extent = max(float((gaussians.means.amax(0) - gaussians.means.amin(0)).max()), 1e-9)
    # the lower end is as small as numbers of voxels fit an integer
    low, high = extent / 2**20, 2 * extent
    while high > FINER * low:
        on_step()
        middle = (low * high) ** 0.5
        low, high = (low, middle) if len(_voxels(gaussians.means, middle)[1]) <= count else (middle, high)
    return voxel_reduce(gaussians, high)


def voxel_reduce(gaussians: Gaussians, voxel: float) -> Gaussians:
    """One gaussian per cube of side `voxel` (scene units): opacity-weighted means, and the spread of all sound ones in it."""
    if not voxel > 0:
        raise ValueError(f"a voxel of {voxel} scene units holds nothing; give a positive size")
    gaussians, _ = sound(gaussians)
    index, counts = _voxels(gaussians.means, voxel)
    alone = (counts == 1)[index]
    crowded = gaussians.select(~alone)
    if len(crowded) == 0:
        return gaussians
    _, group = torch.unique(index[~alone], return_inverse=True)
    return merge(gaussians.select(alone), _average(crowded, group))


def _voxels(means: Tensor, voxel: float) -> tuple[Tensor, Tensor]:
    """The voxel's number (N,) of each mean, and how many means each voxel holds (V,)."""
    means = means.double()
    cells = torch.floor((means - means.amin(0)) / voxel) if len(means) else means
    extent = cells.amax(0) + 1 if len(cells) else cells.new_ones(3)
    if extent.prod() >= 2.0 ** 62:
        raise ValueError(f"voxels of {voxel} scene units are too small for a scene of {extent.tolist()} voxels; "
                         "prune far gaussians or take larger voxels")
    x, y, z = cells.long().unbind(1)
    _, index, counts = torch.unique((x * int(extent[1]) + y) * int(extent[2]) + z, return_inverse=True, return_counts=True)
    return index, counts


def _average(gaussians: Gaussians, group: Tensor) -> Gaussians:
    """One gaussian per group (N,) of consecutive numbers, with the mean and covariance of the group as a mixture."""
    weights = gaussians.opacities.clamp_min(1e-6)
    total = weights.new_zeros(int(group.max()) + 1).index_add_(0, group, weights)

    def mean(values: Tensor) -> Tensor:
        weighted = values.flatten(1) * weights[:, None]
        summed = weighted.new_zeros(len(total), weighted.shape[1]).index_add_(0, group, weighted)
        return (summed / total[:, None]).reshape(-1, *values.shape[1:])

    means = mean(gaussians.means)
    axes = quaternion_to_rotation(gaussians.quats) * gaussians.scales[:, None]
    offset = (gaussians.means - means[group])[:, :, None]
    variances, R = torch.linalg.eigh(mean(axes @ axes.mT + offset @ offset.mT))
    R = R * torch.linalg.det(R).sign()[:, None, None]       # eigenvectors may come mirrored
    return Gaussians(means, rotation_to_quaternion(R), variances.clamp_min(1e-20).sqrt(),
                     mean(gaussians.opacities[:, None])[:, 0], mean(gaussians.sh))
