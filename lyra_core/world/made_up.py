"""What a view shows where nothing is known: what lies around it, carried on softly, or texture like that of the photo.

By example, a surface that lies in a plane goes on in that plane, so a floor runs on in perspective, in depth too; everything
else goes on in the picture. What is softly carried on lies under both, for the colours to begin with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ..cameras.camera import Cameras
from ..memory.planes import NONE, Planes, in_front, planes
from ..memory.synthesis import PATCH, synthesised

SOFTNESS = 2.0  # pixels away at which what is made up is blurred over two pixels; twice that, over four; ...
DEEP = 4.0  # pixels that a hole must reach inwards to be filled by example; slivers are too narrow to show a texture
SLANT = 1.3  # how much nearer one end of a plane must be than the other, or it goes on in the picture
COARSE, FAR = 2.0, 3.0  # texels that a pixel may cover to be an example, and to be filled in the plane
LARGEST = 320  # texels a side of a plane that is filled
FINE = 0.25  # of a plane's known pixels cover less than a texel
LEAST = 400  # pixels of a plane's hole
ASIDE = 2 * PATCH  # pixels beside a hole in which what ends before it is left out
SAME_DEPTH = 0.1  # relative disparity by which a plane may be off from the depth that goes on
MANY_TIMES = 2.0  # as far away as the nearest plane another may be, to come into question
NEAREST, FARTHEST = 0.05, 10.0  # of the middle depth: as near or far as planes may go on


@dataclass(frozen=True)
class Surfaces:
    """Where the surfaces of a view are, beyond what is known of it."""

    depth: Tensor  # (H, W), complete
    planes: Planes
    label: Tensor  # (H, W) which plane each pixel lies on, known or not; NONE: on none
    ends: Tensor  # (H, W) bool: known, but before what goes on beside it


def deep(hole: Tensor) -> bool:
    """Whether a hole (H, W) is more than slivers."""
    return bool(hole.any()) and distance_transform_edt(F.pad(hole, (1, 1, 1, 1)).cpu().numpy()).max() > DEEP


def beyond(depth: Tensor, known: Tensor, seed: int = 0) -> Surfaces:
    """The planes of a complete depth (H, W) go on where it is not known (H, W). Same seed, same planes.

    Its own numbers there say where planes end: beside a silhouette they are those of what lies behind, and they stay where
    no plane goes on.
    """
    depth, hole = depth.clone(), ~known
    ends = _before(hole, depth)
    goes_on = known & ~ends
    found = planes(depth, goes_on & (depth > 0), seed)
    label = carried_on(found, depth, goes_on)
    row, column = (hole & (label != NONE)).nonzero().unbind(1)
    depth[row, column] = 1 / found.at(row, column)[label[row, column], torch.arange(len(row))]
    return Surfaces(depth, found, label, ends)


def by_example(image: Tensor, known: Tensor, surfaces: Surfaces, camera: Cameras, seed: int = 0) -> Tensor:
    """A picture (H, W, 3) with texture where it is not known (H, W): in the planes that go on there, in the picture elsewhere.

    Same seed, same pixels.
    """
    hole, goes_on = ~known, known & ~surfaces.ends
    texture = image.clone()
    texture[~goes_on] = softly(image, surfaces.depth, goes_on)
    # what ends there begins as what goes on beside it
    row, column = distance_transform_edt(known.numpy(), return_distances=False, return_indices=True)[:, surfaces.ends.numpy()]
    texture[surfaces.ends] = texture[torch.from_numpy(row).long(), torch.from_numpy(column).long()]
    begun = torch.zeros_like(known)
    for number, disparity in enumerate(surfaces.planes.disparity):
        plane = _Plane.of(disparity, camera.K[0])
        part, examples = hole & (surfaces.label == number), goes_on & (surfaces.label == number)
        if plane is not None and _slanted(surfaces.depth, part | examples) and int(part.sum()) >= LEAST:
            begun |= _in_the_plane(texture, plane, part, examples, seed)
    texture = synthesised(texture, ~goes_on, goes_on, seed, begun, surfaces.label)
    return torch.where(hole[..., None], texture, image)


def _before(hole: Tensor, depth: Tensor) -> Tensor:
    """Which pixels (H, W) within ASIDE of a hole lie before what goes on there."""
    away, nearest = distance_transform_edt(~hole.numpy(), return_indices=True)
    beside = torch.from_numpy(away <= ASIDE) & ~hole
    row, column = (torch.from_numpy(index)[beside] for index in nearest)
    before = torch.zeros_like(hole)
    before[beside] = depth[beside] < (1 - SAME_DEPTH) * depth[row, column]
    return before


def carried_on(found: Planes, depth: Tensor, known: Tensor) -> Tensor:
    """For every pixel (H, W) the plane that it lies on, if those near it that are known lie on one.

    That of the nearest known pixel; of others that are hardly farther away the one counts that would hide it, or be hidden,
    as they do where both are known. Beside what lies on no plane it is the one that the depth (H, W) goes on with.
    """
    label, nearer, count = found.label.clone(), in_front(found), len(found.disparity)
    row, column = (~known).nonzero().unbind(1)
    if not len(row) or not count:
        return label
    away = torch.stack([_away(known & (found.label == plane))[row, column] for plane in (NONE, *range(count))])
    reach = MANY_TIMES * away.amin(0) + PATCH
    best, at, pixel = away.argmin(0) - 1, found.at(row, column), torch.arange(len(row))
    for plane in range(count):
        rival = (best != plane) & (away[plane + 1] <= reach)
        wins = (at[plane] > at[best.clamp_min(0), pixel]) == nearer[plane, best.clamp_min(0)]
        behind = (at[plane] * depth[row, column] - 1).abs() < SAME_DEPTH
        best = torch.where(rival & torch.where(best == NONE, behind, wins), plane, best)
    nearness, middle = at[best.clamp_min(0), pixel], float(1 / depth[known & (depth > 0)].median())
    label[row, column] = torch.where((nearness > middle / FARTHEST) & (nearness < middle / NEAREST), best, NONE)
    return label


def _away(there: Tensor) -> Tensor:
    """How many pixels (H, W) away the nearest one of a mask (H, W) is; infinite if it is empty."""
    if not there.any():
        return torch.full(there.shape, float("inf"))
    return torch.from_numpy(distance_transform_edt(~there.numpy())).float()


def _slanted(depth: Tensor, where: Tensor) -> bool:
    depths = depth[where]
    return len(depths) > 0 and float(depths.max()) > SLANT * float(depths.min())


@dataclass(frozen=True)
class _Plane:
    """A plane before a camera, with directions of its own: a place on it is origin + s right + t up."""

    disparity: Tensor  # (3,) of pixels
    K: Tensor  # (3, 3)
    normal: Tensor  # (3,) of a plane normal . X = 1, X in the camera
    right: Tensor  # (3,) of unit length
    up: Tensor

    @classmethod
    def of(cls, disparity: Tensor, K: Tensor) -> _Plane | None:
        """None for a plane that faces the camera: it goes on in the picture."""
        normal = K.T @ disparity
        facing = normal / normal.norm()
        ahead = normal.new_tensor([0.0, 0.0, 1.0]) - facing[2] * facing
        if float(ahead.norm()) < 0.1:
            return None
        ahead = ahead / ahead.norm()
        return cls(disparity, K, normal, torch.linalg.cross(facing, ahead), ahead)

    def places(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s and t (N,) of pixels, and how long the side of a square is that covers as much of the plane as each pixel."""
        pixels = torch.stack([column, row, torch.ones_like(row)]).float()
        z = 1 / (self.disparity @ pixels)
        points = torch.linalg.inv(self.K) @ pixels * z
        area = z**3 * self.normal.norm() / (self.K[0, 0] * self.K[1, 1])
        return self.right @ points, self.up @ points, area.sqrt()

    def pixels(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, v and depth of places s, t."""
        origin = self.normal / self.normal.square().sum()
        points = origin + s[..., None] * self.right + t[..., None] * self.up
        u, v, z = (points @ self.K.T).unbind(-1)
        return u / z, v / z, z


def _in_the_plane(image: Tensor, plane: _Plane, hole: Tensor, examples: Tensor, seed: int) -> Tensor:
    """Fill pixels of a hole (H, W) that lie on a plane, in the picture (H, W, 3) itself; which ones (H, W) it were.

    The plane is seen from straight above for it, at about the resolution of what is known of it.
    """
    filled = torch.zeros_like(hole)
    row, column = examples.nonzero().unbind(1)
    if not len(row):
        return filled
    *at, side = plane.places(row, column)
    texel = float(side.quantile(FINE)) if len(side) < 2**24 else float(side.median())
    known = torch.stack(at)[:, side < COARSE * texel]
    row, column = hole.nonzero().unbind(1)
    *at, side = plane.places(row, column)
    wanted = torch.stack(at)
    near = side < FAR * texel
    row, column, wanted = row[near], column[near], wanted[:, near]
    if len(row) < LEAST or known.shape[1] < LEAST:
        return filled
    # as much of what is known as there is to fill, around it
    low, high = wanted.amin(1), wanted.amax(1)
    around = (high - low).clamp_min(PATCH * texel)
    low, high = torch.maximum(low - around, torch.minimum(low, known.amin(1))), torch.minimum(high + around, torch.maximum(high, known.amax(1)))
    texel = max(texel, float((high - low).max()) / LARGEST)
    columns, rows = (int(n) + 1 for n in ((high - low) / texel).ceil())
    if min(rows, columns) < 3 * PATCH:
        return filled
    t, s = torch.meshgrid(torch.arange(rows) * texel + low[1], torch.arange(columns) * texel + low[0], indexing="ij")
    u, v, z = plane.pixels(s, t)
    height, width = examples.shape
    inside = (z > 0) & (u >= 0) & (v >= 0) & (u <= width - 1) & (v <= height - 1)
    u, v = torch.where(inside, u, 0.0), torch.where(inside, v, 0.0)
    fine = z**3 * plane.normal.norm() / (plane.K[0, 0] * plane.K[1, 1]) < (COARSE * texel) ** 2
    given = inside & fine & examples[v.round().long(), u.round().long()]
    texture = sample(image, u.view(-1), v.view(-1)).view(rows, columns, 3)
    if int(given.sum()) < LEAST:
        return filled
    texture[~given] = softly(texture, torch.ones_like(z), given)
    texture = synthesised(texture, ~given, given, seed)
    x, y = (wanted - low[:, None]) / texel
    image[row, column] = sample(texture, x, y)
    filled[row, column] = True
    return filled


def softly(image: Tensor, depth: Tensor, known: Tensor) -> Tensor:
    """Colours (M, 3) for the M pixels that are not known: their surroundings, blurred more the farther away those are."""
    holes = (~known).nonzero()
    filled = image.clone()
    filled[~known] = continued(image, depth, known)
    pyramid = [filled]
    while min(pyramid[-1].shape[:2]) > 4:
        coarser = F.avg_pool2d(pyramid[-1].permute(2, 0, 1)[None], 2, ceil_mode=True, count_include_pad=False)
        pyramid.append(coarser[0].permute(1, 2, 0))
    distance = torch.from_numpy(distance_transform_edt(~known.cpu().numpy())).to(image)[~known]
    level = torch.log2(1 + distance / SOFTNESS).clamp(max=len(pyramid) - 1)
    result = image.new_zeros(len(holes), 3)
    for i, coarse in enumerate(pyramid):
        share = (1 - (level - i).abs()).clamp_min(0)
        wanted = share > 0
        v, u = ((holes[wanted] + 0.5) / 2**i - 0.5).unbind(1)
        u, v = u.clamp(0, coarse.shape[1] - 1), v.clamp(0, coarse.shape[0] - 1)
        result[wanted] += share[wanted, None] * sample(coarse, u, v)
    return result


def continued(values: Tensor, depth: Tensor, known: Tensor, farther: float = 6.0) -> Tensor:
    """Values (H, W, C) carried to the M unknown pixels (M, C) from the nearest known ones left, right, above and below.

    Near ones count more; of two on opposite sides the one that lies deeper counts far more, because behind a silhouette
    only the background continues.
    """
    row, column = (~known).nonzero().unbind(1)
    carried = torch.cat([values, depth[..., None]], -1)  # the depth travels along
    total, weights = values.new_zeros(len(row), carried.shape[-1]), values.new_zeros(len(row))
    for axis in (0, 1):
        sides = [_nearest_known(known, row, column, axis, step) for step in (1, -1)]
        depths = [torch.where(there, depth[r, c], 0.0) for r, c, there in sides]
        deeper = torch.maximum(*depths).clamp_min(1e-9)
        for (r, c, there), its_depth in zip(sides, depths, strict=True):
            away = ((r - row).abs() + (c - column).abs()).float()
            weight = torch.where(there, (its_depth / deeper) ** farther / (away + 0.5) ** 2, 0.0)
            total += weight[:, None] * carried[r, c]
            weights += weight
    reached = weights > 0
    total /= weights.clamp_min(1e-30)[:, None]
    if not reached.all():
        # corners, whose row and column hold nothing known, continue what has just been carried beside them
        wider = known.clone()
        carried[row, column], wider[row, column] = total, reached
        total[~reached, :-1] = continued(carried[..., :-1], carried[..., -1], wider, farther)
    return total[:, :-1]


def _nearest_known(known: Tensor, row: Tensor, column: Tensor, axis: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of the first known pixel before (step 1) or after (-1) each given one along an axis, and if there is."""
    seen = known if step == 1 else known.flip(axis)
    count = known.shape[axis]
    index = torch.arange(count, dtype=torch.int32, device=known.device)
    last = torch.where(seen, index[:, None] if axis == 0 else index, -1).cummax(axis).values
    where = (row, column)[axis] if step == 1 else count - 1 - (row, column)[axis]
    found = (last[where, column] if axis == 0 else last[row, where]).long()
    there = found >= 0
    found = found.clamp_min(0) if step == 1 else count - 1 - found.clamp_min(0)
    return (found, column, there) if axis == 0 else (row, found, there)


def sample(image: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear lookup (N, C) in an image (H, W, C) at pixels u, v inside it."""
    height, width = image.shape[:2]
    grid = torch.stack([u * (2 / (width - 1)) - 1, v * (2 / (height - 1)) - 1], -1)[None, None]
    return F.grid_sample(image.permute(2, 0, 1)[None], grid, align_corners=True, padding_mode="border")[0, :, 0].T
