"""Signed distances to the surfaces that views show, kept only around these surfaces.

Views are fused one at a time. A pixel stands for the plane its surface lies in there, and disparity is linear on a plane,
so the distance of a voxel at z to it is `(1 - z disparity) h` with h the distance of the plane from the camera: exact on
every wall, however slanted, and alike for all views that see it. Distances live in blocks of 8³ voxels that exist only
where a surface was measured, so memory grows with the surface and not with the room.

Axes are those of the cameras (OpenCV: x right, y down, z forward), lengths are scene units.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cameras.camera import Cameras, pixel_grid, unproject

BLOCK = 8  # voxels along the side of a block
VOXELS = BLOCK**3
PAGE = 1024  # blocks that are looked at together: half a million voxels, a few megabytes per number
REACH = 2**20  # blocks from the origin that can be numbered

FOOTPRINT = 2.0  # pixels at the median depth that are one voxel, if no other size is asked for
TRUNCATION = 4.0  # voxels on either side of a surface within which distances are kept
FARTHEST = 6.0  # median depths beyond which nothing is measured
MOST = 2**16  # blocks: 0.8 GB
EDGE = 0.05  # relative depth jump between neighbouring pixels that is an edge, not a slope
DEEPEST = 1.0  # truncations along z behind a pixel: the plane of a side seen edge-on soon leaves what it is the side of
SHALLOW = 2.0  # voxels behind a plane that are measured even so: a cell reaches that far
CARVING = 0.25  # weight of free space far before a surface: beside a silhouette it is nearer to one than it looks


@dataclass(frozen=True)
class Volume:
    """Signed distances around the surfaces that were measured; positive is free space."""

    voxel: float  # side of a voxel, scene units; voxel (i, j, k) has its centre at (i + 0.5, j + 0.5, k + 0.5) of them
    truncation: float  # distances are known up to here, scene units
    blocks: Tensor  # (B, 3) int64, in units of blocks
    # (<= PAGE, 512, 6) each, B in all: sums of distance, weight, and weighted red, green, blue, 1
    pages: tuple[Tensor, ...]

    def __len__(self) -> int:
        """Number of blocks."""
        return self.blocks.shape[0]


@dataclass(frozen=True)
class _View:
    """One picture as a plane per pixel."""

    # (H * W, 8) disparity, its slope per pixel to the right and down, h, weight, and colour; h = 0: unknown
    pixels: Tensor
    points: Tensor  # (N, 3) of the measured pixels, in world space
    steps: Tensor  # (N,) from one to its neighbours, scene units
    camera: Cameras


# ---------------------------------------------------------------------------------------------------------------- fusing


def fuse(
    views: Iterable[tuple],
    voxel: float | None = None,
    truncation: float = TRUNCATION,
    farthest: float = FARTHEST,
    most: int = MOST,
) -> Volume:
    """The distances that all views together tell.

    views: tuples (image (H, W, 3) in 0..1, depth (H, W) z-depth with 0 = unknown, camera, and optionally known (H, W)
    bool), taken one at a time, so hundreds of frames need never be in memory together. Free space between a camera and
    what it sees takes away what earlier views saw there.
    voxel: scene units; None: two pixels at the median depth of the first view, and twice as much each time the blocks
    become more than `most`. truncation: in voxels, at most half a block.
    farthest: depth beyond this many medians of its view is not measured. Estimators and sky give points a thousand times
    farther than all the rest, which no voxel of a useful size resolves and no camera path reaches.
    ValueError if there is no view or no known depth, for sizes that differ, or if a given voxel needs too many blocks.
    """
    _check_numbers(voxel, truncation, most)
    volume, number, views = None, -1, iter(views)
    for number, (image, depth, camera, *known) in enumerate(views):
        view = _view(number, image, depth, camera, known[0] if known else None, farthest)
        if not len(view.points):
            continue
        if volume is None:
            size = voxel or FOOTPRINT * _footprint(view)
            volume = Volume(size, truncation * size, view.points.new_empty(0, 3, dtype=torch.int64), ())
        wanted = _missing(volume, _near(view, volume))
        while len(volume) + len(wanted) > most:
            if voxel:
                raise _too_many(volume, wanted, views, number, farthest, most)
            volume = coarser(volume)
            wanted = _missing(volume, _near(view, volume))
        volume = _integrate(volume, view, wanted)
    if volume is None:
        raise ValueError(
            f"none of the {number + 1} views has a known depth; there is no surface in them"
            if number >= 0
            else "there is no view to make a surface of"
        )
    return volume


def coarser(volume: Volume) -> Volume:
    """The same surfaces in voxels of twice the size."""
    blocks, parent = torch.unique(volume.blocks.div(2, rounding_mode="floor"), dim=0, return_inverse=True)
    sums = torch.zeros(len(blocks) * VOXELS, 6, device=blocks.device)
    places = lattice(BLOCK, volume.blocks.device)
    start = 0
    for page in volume.pages:
        here = slice(start, start := start + len(page))
        inside = ((volume.blocks[here] % 2 * BLOCK)[:, None] + places).div(2, rounding_mode="floor")
        index = parent[here][:, None] * VOXELS + number_in_block(inside)
        sums.index_add_(0, index.view(-1), page.view(-1, 6))
    scale = 2 * volume.voxel
    pages = sums.view(-1, VOXELS, 6).split(PAGE) if len(blocks) else ()
    return Volume(scale, 2 * volume.truncation, blocks, pages)


def _check_numbers(voxel: float | None, truncation: float, most: int) -> None:
    if voxel is not None and not 0 < voxel < float("inf"):
        raise ValueError(f"a voxel of {voxel} scene units holds nothing; give a positive size, or none for automatic")
    if not 1.5 <= truncation <= BLOCK / 2:
        raise ValueError(f"a truncation of {truncation} voxels: give 1.5 to {BLOCK / 2:g}")
    if most < 4**3:
        raise ValueError(f"at most {most} blocks: even the coarsest voxels may need {4**3}")


def _view(number: int, image: Tensor, depth: Tensor, camera: Cameras, known: Tensor | None, farthest: float) -> _View:
    sizes = {tuple(depth.shape), tuple(image.shape[:2]), camera.size}
    if known is not None:
        sizes.add(tuple(known.shape))
    if len(sizes) > 1 or len(camera) != 1:
        raise ValueError(
            f"view {number}: the image is {tuple(image.shape[:2])}, the depth {tuple(depth.shape)}, the picture of its "
            f"{len(camera)} cameras {camera.size}"
            + (f", what is known {tuple(known.shape)}" if known is not None else "")
            + "; resize them to one size, and give one camera per view"
        )
    camera = camera.to(depth.device)
    measured = torch.isfinite(depth) & (depth > 0)
    if known is not None:
        measured &= known.to(depth.device)
    if measured.any():
        measured &= depth <= farthest * depth[measured].median()
    depth = torch.where(measured, depth, 0.0)
    planes, edge = _planes(depth, camera)
    measured &= ~edge
    rays = (pixel_grid(camera.size, depth.device) @ camera.K_inverse[0].mT).norm(dim=-1)
    weight = planes[..., :1].square()  # depth is as certain as disparity is; the angle of the surface hardly matters
    pixels = torch.cat([planes, weight, image[..., :3].to(depth)], -1) * measured[..., None]
    slopes = planes[..., 1:3].abs().sum(-1)
    steps = depth / camera.K[0, 0, 0] + depth.square() * slopes * rays
    return _View(pixels.view(-1, 8), unproject(depth[None], camera)[0][measured], steps[measured], camera)


def _planes(depth: Tensor, camera: Cameras) -> tuple[Tensor, Tensor]:
    """Per pixel (H, W, 4) disparity, its slopes to the right and down, and the plane's distance; which pixels are edges."""
    disparity = torch.where(depth > 0, 1 / depth.clamp_min(1e-12), 0.0)
    across, edge_across = _slope(disparity, 1)
    down, edge_down = _slope(disparity, 0)
    u, v, _ = pixel_grid(camera.size, depth.device).unbind(-1)
    # the plane n · X = 1 has disparity n · K⁻¹ (u, v, 1), and is 1 / |n| away
    n = torch.stack([across, down, disparity - across * u - down * v], -1) @ camera.K[0]
    h = 1 / n.norm(dim=-1).clamp_min(1e-12)
    return torch.stack([disparity, across, down, h], -1), edge_across | edge_down


def _slope(disparity: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean step (H, W) to the neighbours along `dim` on the same surface, and which pixels have one on another (H, W)."""
    size = disparity.shape[dim]
    first, second = disparity.narrow(dim, 0, size - 1), disparity.narrow(dim, 1, size - 1)
    both = (first > 0) & (second > 0)
    smooth = both & ((second - first).abs() <= EDGE * first.minimum(second))
    total, count = torch.zeros_like(disparity), torch.zeros_like(disparity)
    edge = torch.zeros_like(disparity, dtype=torch.bool)
    for start in (0, 1):
        total.narrow(dim, start, size - 1).add_(torch.where(smooth, second - first, 0))
        count.narrow(dim, start, size - 1).add_(smooth)
        edge.narrow(dim, start, size - 1).logical_or_(both & ~smooth)
    return total / count.clamp_min(1), edge


def _footprint(view: _View) -> float:
    """Side of a pixel at the median depth, scene units."""
    disparity = view.pixels[view.pixels[:, 3] > 0, 0]
    return float(1 / (disparity.median() * view.camera.K[0, 0, 0]))


def _near(view: _View, volume: Volume) -> Tensor:
    """Blocks (n, 3) within the truncation of what the view measured, and a few more."""
    side = BLOCK * volume.voxel
    reach = (volume.truncation + 0.5 * view.steps).clamp_max(side)[:, None]
    low, high = ((view.points + sign * reach).double().div(side).floor() for sign in (-1, 1))
    if max(-low.min(), high.max()) >= REACH:
        raise ValueError(
            f"voxels of {volume.voxel:.3g} scene units are too small for a scene that reaches "
            f"{float(view.points.abs().max()):.3g} from the origin; take larger ones"
        )
    low, spans = low.long(), (high - low).long()  # 0 to 2 blocks along each axis
    kinds, where = torch.unique(_pack(low), return_inverse=True)
    span = kinds.new_zeros(len(kinds), 3).scatter_reduce_(0, where[:, None].expand(-1, 3), spans, "amax")
    steps = lattice(4, low.device)
    parts = zip(_unpack(kinds).split(PAGE), span.split(PAGE), strict=True)
    found = [_pack((part[:, None] + steps)[(steps <= spans[:, None]).all(-1)]) for part, spans in parts]
    return _unpack(torch.unique(torch.cat(found)))


def _missing(volume: Volume, blocks: Tensor) -> Tensor:
    """Those of the blocks (n, 3) that the volume has not."""
    return blocks[find(volume.blocks, blocks) < 0]


def _integrate(volume: Volume, view: _View, wanted: Tensor) -> Volume:
    """The volume with what a view says of its blocks, in place, and of further ones (n, 3) where it measured a surface."""
    start = 0
    for page in volume.pages:
        blocks = volume.blocks[start : start + len(page)]
        start += len(page)
        rows = _visible(blocks, view.camera, volume.voxel).nonzero()[:, 0]
        voxels, values = _observe(blocks[rows], view, volume)
        page.view(-1, 6).index_add_(0, rows[voxels // VOXELS] * VOXELS + voxels % VOXELS, values)
    kept, sums = [volume.blocks], []
    for blocks in wanted.split(PAGE):
        voxels, values = _observe(blocks, view, volume)
        page = values.new_zeros(len(blocks) * VOXELS, 6).index_add_(0, voxels, values).view(-1, VOXELS, 6)
        measured = (page[..., 5] > 0).any(1)
        kept.append(blocks[measured])
        sums.append(page[measured])
    full = [page for page in volume.pages if len(page) == PAGE]
    rest = torch.cat([*(page for page in volume.pages if len(page) < PAGE), *sums]) if sums else None
    pages = volume.pages if rest is None else (*full, *rest.split(PAGE))
    return replace(volume, blocks=torch.cat(kept), pages=pages)


def _visible(blocks: Tensor, camera: Cameras, voxel: float) -> Tensor:
    """(n,) bool: which blocks (n, 3) may reach into the camera's picture."""
    height, width = camera.size
    x, y, z = (camera.K[0] @ camera.w2c[0, :3]).double()
    sides = torch.stack([x + 0.5 * z, (width - 0.5) * z - x, y + 0.5 * z, (height - 0.5) * z - y, z])
    centers = (blocks + 0.5) * (BLOCK * voxel)
    radius = 0.5 * 3**0.5 * BLOCK * voxel
    return (centers.double() @ sides[:, :3].T + sides[:, 3] > -radius * sides[:, :3].norm(dim=1)).all(1)


def _observe(blocks: Tensor, view: _View, volume: Volume) -> tuple[Tensor, Tensor]:
    """What a view says of the voxels of n blocks: numbers of voxels (M,), below n * 512, and what to add to each (M, 6)."""
    height, width = view.camera.size
    to_pixels = (view.camera.K[0] @ view.camera.w2c[0, :3]).double()
    corners = (blocks.double() * (BLOCK * volume.voxel)) @ to_pixels[:, :3].T + to_pixels[:, 3]
    inside = ((lattice(BLOCK, blocks.device) + 0.5) * volume.voxel).double() @ to_pixels[:, :3].T
    x, y, z = ((corners[:, None, i] + inside[:, i]).to(view.pixels).view(-1) for i in range(3))
    u, v = x / z, y / z
    voxels = ((z > 0) & (u > -0.5) & (u < width - 0.5) & (v > -0.5) & (v < height - 0.5)).nonzero()[:, 0]
    u, v, z = u[voxels], v[voxels], z[voxels]
    column, row = u.round(), v.round()
    pixels = view.pixels[row.long() * width + column.long()]
    disparity, across, down, h, weight = pixels[:, :5].unbind(1)
    disparity = disparity + across * (u - column) + down * (v - row)
    distance = (1 - z * disparity) * h
    deep = (z * disparity - 1 > DEEPEST * volume.truncation * disparity) & (distance < -SHALLOW * volume.voxel)
    seen = ((h > 0) & (distance > -volume.truncation) & ~deep).nonzero()[:, 0]
    distance, weight = distance[seen] / volume.truncation, weight[seen]
    # what lies behind a surface may be the back of something thin, so it counts the less the deeper it is
    weight = weight * (1 + distance.clamp_max(0))
    weight = torch.where(distance < 1, weight, CARVING * weight)
    near = torch.where(distance < 1, weight, 0.0)
    colors = pixels[seen, 5:] * near[:, None]
    distance = distance.clamp_max(1) * volume.truncation
    return voxels[seen], torch.cat([torch.stack([distance * weight, weight], 1), colors, near[:, None]], 1)


def _too_many(
    volume: Volume, wanted: Tensor, views: Iterable[tuple], number: int, farthest: float, most: int
) -> ValueError:
    """What to say when the blocks of a volume and those wanted are too many; looks at the rest of the views."""
    numbers = _pack(torch.cat([volume.blocks, wanted]))
    for count, (image, depth, camera, *known) in enumerate(views, number + 1):
        view = _view(count, image, depth, camera, known[0] if known else None, farthest)
        if len(view.points):
            numbers = torch.unique(torch.cat([numbers, _pack(_near(view, volume))]))
    fitting = 1.05 * volume.voxel * (len(numbers) / most) ** 0.5  # blocks are as many as the surface has squares
    return ValueError(
        f"voxels of {volume.voxel:.3g} scene units need about {len(numbers)} blocks, {most} is the limit; "
        f"take voxels of {fitting:.3g} or larger, or let the size be automatic"
    )


# ------------------------------------------------------------------------------------------------------- blocks as numbers


def lattice(side: int, device=None) -> Tensor:
    """(side³, 3) integer points of a cube, the last axis fastest."""
    return torch.cartesian_prod(*[torch.arange(side, device=device)] * 3)


def number_in_block(points: Tensor) -> Tensor:
    """Place (...) of points (..., 3) in the lattice of a block."""
    x, y, z = points.unbind(-1)
    return (x * BLOCK + y) * BLOCK + z


def _pack(blocks: Tensor) -> Tensor:
    """One int64 per block (n, 3)."""
    x, y, z = (blocks + REACH).unbind(-1)
    return (x * (2 * REACH) + y) * (2 * REACH) + z


def _unpack(numbers: Tensor) -> Tensor:
    """The inverse of `_pack`."""
    xy = numbers.div(2 * REACH, rounding_mode="floor")
    return torch.stack([xy.div(2 * REACH, rounding_mode="floor"), xy % (2 * REACH), numbers % (2 * REACH)], -1) - REACH


def find(blocks: Tensor, wanted: Tensor) -> Tensor:
    """Rows (n,) of `wanted` (n, 3) in `blocks` (B, 3); -1 where it has no such block."""
    if not len(blocks):
        return torch.full_like(wanted[:, 0], -1)
    numbers, rows = _pack(blocks).sort()
    asked = _pack(wanted)
    place = torch.searchsorted(numbers, asked).clamp_max(len(numbers) - 1)
    return torch.where(numbers[place] == asked, rows[place], -1)
