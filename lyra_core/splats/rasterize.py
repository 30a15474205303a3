"""Pictures of gaussians, from anywhere, also from among them.

`render_frames` projects every gaussian to an ellipse on the picture and blends them front to back, in display space, as
gsplat does. gsplat itself is used where it is installed and the gaussians are on its device; the rasteriser here is
plain torch and runs anywhere.

How it stays fast without a kernel of its own: the picture is cut into small tiles, every tile gets the list of
gaussians that touch it, in depth order, and tiles are blended in batches, a few gaussians deep at a time. A tile that
has become opaque takes no more gaussians, so what is hidden costs next to nothing.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from ..cameras.camera import Cameras, quaternion_to_rotation, to_corner_origin
from .gaussians import Gaussians, degree, seen_colors, sound

BACKENDS = ("auto", "gsplat", "torch")

NEAR = 0.01             # scene units of z-depth up to which gaussians are left out
LOW_PASS = 0.3          # px², added to every ellipse so that none falls between pixels
FAINTEST = 1 / 255      # a gaussian that adds less to a pixel is skipped there
MOST_OPAQUE = 0.999     # of one gaussian at one pixel
CLOSED = 1e-4           # transmittance below which a tile takes no more gaussians
JACOBIAN_MARGIN = 0.3   # beyond the picture's edge, in half-pictures: where the linearised projection is held fixed

TILE = 8                # px; smaller wastes less on small gaussians, larger sorts fewer entries
SLICE = 32              # gaussians blended per step in every tile
SLAB = 2 ** 21          # entries (gaussian, tile) held at once; bounds the memory when gaussians cover the whole picture
BATCH_CPU = 2 ** 20     # (tile, gaussian, pixel) triples computed at once: few steps, that still fit in the cache
BATCH_GPU = 2 ** 24


@dataclass(frozen=True)
class Rendering:
    """F pictures of gaussians."""

    images: Tensor      # (F, H, W, 3) over the background; 0..1 if the colours are
    depth: Tensor       # (F, H, W) expected z-depth of what is seen, scene units; 0 where nothing is
    alpha: Tensor       # (F, H, W) how opaque, 0..1


@dataclass(frozen=True)
class _Ellipses:
    """M projected gaussians, nearest first."""

    centers: Tensor     # (M, 2) px
    reach: Tensor       # (M, 2) px, half the width and height of the box outside which it is fainter than FAINTEST
    strokes: Tensor     # (M, 11) what blending needs, in one row because gathering rows is what costs: centre x, y (px);
    #                     f0, f1, f2 and l of alpha = exp(l - (f0 dx + f1 dy)² - (f2 dy)²); red, green, blue, z-depth, 1


def render(gaussians: Gaussians, cameras: Cameras, background: tuple[float, float, float] = (0.0, 0.0, 0.0),
           near: float = NEAR, backend: str = "auto") -> Rendering:
    """All frames of `render_frames` in one record."""
    frames = list(render_frames(gaussians, cameras, background, near, backend))
    return Rendering(*(torch.cat([getattr(f, field) for f in frames]) for field in ("images", "depth", "alpha")))


def differentiable(device: torch.device):
    """gsplat as a function of gaussians and one camera to colour (H, W, 3), alpha (H, W) and depth (H, W), with gradients.

    RuntimeError with what to do where gsplat can't be used; nothing else here has gradients.
    """
    try:
        rasterization = _gsplat(device, required=True)
    except RuntimeError as reason:
        raise RuntimeError(f"gradients need gsplat (pip install gsplat) and an NVIDIA GPU: {reason}") from reason
    return lambda gaussians, camera: _render_gsplat(rasterization, gaussians, camera, NEAR)


@torch.no_grad()
def render_frames(gaussians: Gaussians, cameras: Cameras, background: tuple[float, float, float] = (0.0, 0.0, 0.0),
                  near: float = NEAR, backend: str = "auto") -> Iterator[Rendering]:
    """Renderings of one frame each, so that the caller can report progress, stop, or store them away.

    Colours are those that each gaussian has in the direction it is seen in; broken gaussians (see `drawable`) are left out.
    near: z-depth (scene units) up to which gaussians are left out.
    backend: "torch" anywhere; "gsplat" needs CUDA tensors; "auto" takes gsplat where it can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no rasteriser {backend!r}; choose one of {', '.join(BACKENDS)}")
    rasterization = None if backend == "torch" else _gsplat(gaussians.means.device, required=backend == "gsplat")
    gaussians, _ = sound(gaussians)
    cameras = cameras.to(gaussians.means.device)
    shade = gaussians.means.new_tensor(background)
    for frame in range(len(cameras)):
        if rasterization is not None:
            color, alpha, depth = _render_gsplat(rasterization, gaussians, cameras[frame], near)
        else:
            color, alpha, depth = _render_torch(gaussians, cameras[frame], near)
        yield Rendering((color + (1 - alpha[..., None]) * shade)[None], depth[None], alpha[None])


# -------------------------------------------------------------------------------------------------------------------- gsplat

def _gsplat(device: torch.device, required: bool):
    """gsplat's `rasterization`, or None where it can't be used; with `required` a RuntimeError that says why instead."""
    reason = f"the gaussians are on {device}, and gsplat renders on CUDA only"
    if device.type == "cuda":
        try:
            from gsplat import rasterization
            from gsplat.cuda._backend import _C
        except (ImportError, OSError, RuntimeError) as error:   # the last two: it compiles itself on the first import
            reason = f"gsplat can't be loaded ({error}); install it with `pip install gsplat`"
        else:
            if _C is not None:
                return rasterization
            reason = "gsplat is installed without compiled kernels, and there is no CUDA toolkit to compile them"
    if required:
        raise RuntimeError(f"{reason}; the rasteriser 'torch' draws without")
    return None


def _render_gsplat(rasterization, gaussians: Gaussians, camera: Cameras, near: float) -> tuple[Tensor, Tensor, Tensor]:
    """Colour (H, W, 3), alpha (H, W) and expected depth (H, W) of one camera."""
    pictures, alphas, _ = rasterization(
        gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh,
        camera.w2c, to_corner_origin(camera.K), camera.size[1], camera.size[0],
        sh_degree=degree(gaussians), near_plane=near, eps2d=LOW_PASS, render_mode="RGB+ED")
    return pictures[0, ..., :3], alphas[0, ..., 0], pictures[0, ..., 3]


# --------------------------------------------------------------------------------------------------------------------- torch

def _render_torch(gaussians: Gaussians, camera: Cameras, near: float) -> tuple[Tensor, Tensor, Tensor]:
    """Colour (H, W, 3), alpha (H, W) and expected depth (H, W) of one camera."""
    height, width = camera.size
    ellipses = _project(gaussians, camera, near)
    rows, columns = -(-height // TILE), -(-width // TILE)
    paint = ellipses.strokes.new_zeros(rows * columns, TILE * TILE, 5)
    clear = ellipses.strokes.new_ones(rows * columns, TILE * TILE)
    for entries in _slabs(ellipses, rows, columns, clear):
        _blend(ellipses.strokes, entries, columns, paint, clear)
    picture = paint.view(rows, columns, TILE, TILE, 5).transpose(1, 2).reshape(rows * TILE, columns * TILE, 5)
    color, depth, alpha = picture[:height, :width].split([3, 1, 1], dim=2)
    return color, alpha[..., 0], torch.where(alpha > 0, depth / alpha.clamp_min(1e-12), 0)[..., 0]


def _project(gaussians: Gaussians, camera: Cameras, near: float) -> _Ellipses:
    """The ellipses of all gaussians that touch the picture, nearest first."""
    height, width = camera.size
    R, t, K = camera.w2c[0, :3, :3], camera.w2c[0, :3, 3], camera.K[0]
    local = gaussians.means @ R.T + t
    candidates = _in_sight(gaussians, local, camera, near)
    gaussians, local = gaussians.select(candidates), local[candidates]

    covariance = _covariance(gaussians, local, camera)
    centers = (local @ K.T)[:, :2] / local[:, 2:]
    a, b, c = covariance.unbind(1)
    # exp(-½ dᵀ Σ⁻¹ d) >= FAINTEST / opacity inside an ellipse; its bounding box is √ΣXX and √ΣYY wide
    log_opacity = gaussians.opacities.log()
    extent = (2 * (log_opacity - log(FAINTEST))).clamp_min(0).sqrt()
    reach = torch.stack([a.sqrt() * extent, c.sqrt() * extent], 1)
    limit = centers.new_tensor([width - 1, height - 1])
    touches = (extent > 0) & (centers + reach >= 0).all(1) & (centers - reach <= limit).all(1)
    # Cholesky factors of ½ Σ⁻¹: sums of squares keep their precision for long thin ellipses, the expanded form doesn't
    # what is left of x once y is known; the low pass is in it, so that rounding and overflow of c can't take it away
    narrow = (0.5 / (a - b * (b / c)).clamp_min(LOW_PASS)).sqrt()
    factors = torch.stack([narrow, -(b / c) * narrow, (0.5 / c).sqrt()], 1)
    strokes = torch.cat([centers, factors, log_opacity[:, None],
                         seen_colors(gaussians, camera.centers[0]), local[:, 2:], torch.ones_like(local[:, 2:])], 1)
    order = touches.nonzero()[:, 0]
    order = order[torch.argsort(local[order, 2], stable=True)]
    return _Ellipses(centers[order], reach[order], strokes[order])


def _in_sight(gaussians: Gaussians, local: Tensor, camera: Cameras, near: float) -> Tensor:
    """Indices of the gaussians beyond `near` whose bounding sphere may touch the picture, by a bound that is cheap."""
    height, width = camera.size
    K, z = camera.K[0], local[:, 2]
    sigma = gaussians.scales.amax(1)
    seen = z > near
    for axis, size in ((0, width), (1, height)):
        low, high = -K[axis, 2] / K[axis, axis], (size - 1 - K[axis, 2]) / K[axis, axis]
        # the held Jacobian is steepest at the margin, a little beyond the picture; its rows are no longer than this
        steepest = (1 + ((1 + JACOBIAN_MARGIN) * torch.maximum(low.abs(), high.abs())) ** 2).sqrt()
        # 3.4 > sqrt(2 ln 255), the farthest that an opaque gaussian reaches, in standard deviations
        margin = 3.4 * (sigma * steepest + (LOW_PASS ** 0.5 / K[axis, axis]) * z)
        seen &= (local[:, axis] >= low * z - margin) & (local[:, axis] <= high * z + margin)
    return seen.nonzero()[:, 0]


def _covariance(gaussians: Gaussians, local: Tensor, camera: Cameras) -> Tensor:
    """Picture covariances (N, 3) as (xx, xy, yy) in px², of gaussians at camera-space means (N, 3)."""
    height, width = camera.size
    K, z = camera.K[0], local[:, 2]
    axes = (camera.w2c[0, :3, :3] @ quaternion_to_rotation(gaussians.quats)) * gaussians.scales[:, None]
    images = []
    for axis, size in ((0, width), (1, height)):
        f, center, margin = K[axis, axis], K[axis, 2], JACOBIAN_MARGIN * 0.5 * size
        # outside the picture the linearised projection would smear near gaussians over all of it
        slope = (local[:, axis] / z).clamp((-center - margin) / f, (size - 1 - center + margin) / f)
        images.append((axes[:, axis] - slope[:, None] * axes[:, 2]) * (f / z)[:, None])
    x, y = images
    return torch.stack([(x * x).sum(1) + LOW_PASS, (x * y).sum(1), (y * y).sum(1) + LOW_PASS], 1)


def _slabs(ellipses: _Ellipses, rows: int, columns: int, clear: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Front to back, at most about SLAB entries at a time: tiles (E,), ascending, and the ellipses (E,) that touch them.

    Tiles that are closed by the time a slab is made are left out of it.
    """
    limit = torch.tensor([columns - 1, rows - 1], device=clear.device)
    # by the pixels inside the box, not by the box: it often ends between a tile's last pixel and the next tile's first
    first = ((ellipses.centers - ellipses.reach).ceil() / TILE).floor().long().clamp_min(0)
    last = ((ellipses.centers + ellipses.reach).floor() / TILE).floor().long().minimum(limit)
    span = last - first + 1
    counts = span[:, 0] * span[:, 1]
    total = counts.cumsum(0)
    start, done = 0, 0
    while start < len(counts):
        stop = max(start + 1, int(torch.searchsorted(total, done + SLAB, right=True)))
        which = torch.repeat_interleave(torch.arange(start, stop, device=counts.device), counts[start:stop])
        place = torch.arange(len(which), device=counts.device) - (total[which] - counts[which] - done)
        wide = span[which, 0]
        tiles = (first[which, 1] + place // wide) * columns + first[which, 0] + place % wide
        start, done = stop, int(total[stop - 1])
        open_ = clear.amax(1) > CLOSED
        if not open_.any():
            return
        kept = open_[tiles]
        tiles, order = torch.sort(tiles[kept], stable=True)
        yield tiles, which[kept][order]


def _blend(strokes: Tensor, entries: tuple[Tensor, Tensor], columns: int, paint: Tensor, clear: Tensor) -> None:
    """Lay the entries of one slab over `paint` (tiles, px, 5), and lower the transmittance `clear` (tiles, px)."""
    owners, which = entries
    tiles, counts = torch.unique_consecutive(owners, return_counts=True)
    begin = counts.cumsum(0) - counts
    batch = (BATCH_GPU if paint.is_cuda else BATCH_CPU) // (SLICE * TILE * TILE)
    depth = torch.arange(SLICE, device=counts.device)
    while len(tiles):
        for part in range(0, len(tiles), batch):
            rows = slice(part, part + batch)
            address = (begin[rows, None] + depth).clamp_max(len(which) - 1)
            _blend_slice(strokes, which[address], depth < counts[rows, None], tiles[rows], columns, paint, clear)
        going = (counts > SLICE) & (clear[tiles].amax(1) > CLOSED)
        tiles, begin, counts = tiles[going], begin[going] + SLICE, counts[going] - SLICE


def _blend_slice(strokes: Tensor, which: Tensor, present: Tensor, tiles: Tensor, columns: int,
                 paint: Tensor, clear: Tensor) -> None:
    """Lay the strokes `which` (B, S), where `present`, front to back over the `tiles` (B,)."""
    center, factor, level, color = strokes.index_select(0, which.view(-1)).view(*which.shape, -1).split([2, 3, 1, 5], 2)
    corner = torch.stack([tiles % columns, tiles // columns], 1)[:, None] * TILE
    step = torch.arange(TILE, device=tiles.device, dtype=strokes.dtype)
    dx, dy = (corner - center).unsqueeze(3).add(step).unbind(2)                                 # (B, S, TILE) each
    across, along, falling = dx * factor[..., :1], dy * factor[..., 1:2], dy * factor[..., 2:]
    level = level.masked_fill(~present[..., None], -torch.inf) - falling.square()
    u = across[..., None, :] + along[..., None]                                                 # (B, S, TILE, TILE)
    alpha = level[..., None].addcmul(u, u, value=-1).exp_().flatten(2)
    alpha = torch.where(alpha < FAINTEST, 0, alpha.clamp_max_(MOST_OPAQUE))
    through = torch.cumprod(torch.cat([clear[tiles][:, None], 1 - alpha], 1), 1)
    clear[tiles] = through[:, -1]
    paint[tiles] += (through[:, :-1] * alpha).mT @ color
