"""The layout of a photo, found by its lines: where it vanishes, where walls stand, where the ground ends.

Lines that run away from the camera meet in one point. Where enough of them do, in several directions, the photo is a box
that may be open at its sides and top: a room, a street, a gallery. Where they don't, upright lines above flat ones tell
where a ground meets what stands on it. Where nothing tells anything, the room is the usual one, and that is said.

Points and segments are pixels of the photo seen at SEEN pixels; K and depth are those of the photo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .depth import DepthMap, axes_through, box, ground, room_box

USUAL_POINT, USUAL_WALL, USUAL_DISTANCE = (0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 6.0  # a room seen straight on

SEEN = 832  # pixels of the photo's longest side where its lines are looked for
SHORTEST = 0.02  # of the diagonal: shorter segments have no direction
OBLIQUE = (4.0, 78.0)  # degrees from the horizontal of lines that may run away from the camera
TOLERANCE = 2.5  # degrees by which a line may miss the vanishing point
STEP = 12  # pixels between places that are tried
DIRECTIONS = 18  # bins of half a turn; many parallel lines are one witness, not many
WITNESS = 0.25  # heights of line that one direction counts at most
LEAST_SCORE, LEAST_RATIO, LEAST_DIRECTIONS = 1.0, 5.0, 5  # of a vanishing point: heights of line, over the median, witnesses
LEAST_SUPPORT = 0.12  # heights of line above and below the horizon that make a wall
FLAT, UPRIGHT = 12.0, 60.0  # degrees: at most, at least
LEAST_LINES, LEAST_SPLIT = 40, 0.5  # of a ground: lines of each kind, and how well a height parts them
SEAMS = (0.35, 0.9)  # where a ground may end, in heights
LEVEL, ABOVE = 0.5, 0.08  # the horizon of a level camera, in heights; and how far at least it is above the ground's end
FARTHEST, NEAREST = 40.0, 3.0  # camera heights to a box's end


@dataclass(frozen=True)
class Lines:
    """Straight segments of a photo."""

    ends: np.ndarray  # (N, 4) x0, y0, x1, y1
    size: tuple[int, int]  # (height, width) of the photo as it was seen

    @property
    def length(self) -> np.ndarray:
        return np.hypot(*(self.ends[:, 2:] - self.ends[:, :2]).T)

    @property
    def middle(self) -> np.ndarray:
        return (self.ends[:, :2] + self.ends[:, 2:]) / 2

    @property
    def slope(self) -> np.ndarray:
        """Degrees from the horizontal, 0 to 90."""
        across, down = np.abs(self.ends[:, 2:] - self.ends[:, :2]).T
        return np.degrees(np.arctan2(down, across))

    def where(self, chosen: np.ndarray) -> Lines:
        return Lines(self.ends[chosen], self.size)


def lines(photo: Tensor) -> Lines:
    """The straight segments of a photo (H, W, 3) in 0..1."""
    import cv2

    height, width = photo.shape[:2]
    scale = SEEN / max(height, width)
    seen = cv2.resize(
        (photo[..., :3].cpu().float().clamp(0, 1) * 255).round().byte().numpy(),
        (max(2, round(width * scale)), max(2, round(height * scale))),
        interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC,
    )
    grey = cv2.cvtColor(np.ascontiguousarray(seen), cv2.COLOR_RGB2GRAY)
    ends = cv2.createLineSegmentDetector().detect(grey)[0]
    return Lines(np.zeros((0, 4)) if ends is None else ends.reshape(-1, 4).astype(np.float64), grey.shape)


# --------------------------------------------------------------------------------------------------- vanishing points


@dataclass(frozen=True)
class Vanishing:
    """Where lines that run away from the camera meet."""

    point: np.ndarray  # (2,) x, y
    support: Lines  # those that do


def vanishing_point(found: Lines) -> Vanishing | None:
    """The point that most lines in most directions run to, in the picture or beside it; None if no point stands out."""
    height, width = found.size
    shortest = SHORTEST * math.hypot(height, width)
    slope = found.slope
    found = found.where((found.length > shortest) & (slope > OBLIQUE[0]) & (slope < OBLIQUE[1]))
    if len(found.ends) < LEAST_DIRECTIONS:
        return None
    y, x = np.mgrid[0.05 * height : 0.95 * height : STEP, -0.25 * width : 1.25 * width : STEP]
    places = np.stack([x.ravel(), y.ravel()], 1)
    heard = np.concatenate([_heard(found, part, TOLERANCE) for part in np.array_split(places, 32)]) / height
    score = np.minimum(heard, WITNESS).sum(1)
    best = int(score.argmax())
    witnesses = int((heard[best] > 0.04).sum())
    if score[best] < max(LEAST_SCORE, LEAST_RATIO * np.median(score)) or witnesses < LEAST_DIRECTIONS:
        return None
    point = _met(found, places[best])
    return Vanishing(point, found.where(_misses(found, point[None])[0] < math.sin(math.radians(TOLERANCE))))


def _misses(found: Lines, places: np.ndarray) -> np.ndarray:
    """(P, N) sine of the angle by which each line misses each place; 1 for lines that the place lies on or beside."""
    along = (found.ends[:, 2:] - found.ends[:, :2]) / found.length[:, None]
    to = places[:, None] - found.middle
    away = np.hypot(to[..., 0], to[..., 1])
    sine = np.abs(to[..., 0] * along[:, 1] - to[..., 1] * along[:, 0]) / np.maximum(away, 1e-6)
    return np.where(away > 0.75 * found.length + 5, sine, 1.0)


def _heard(found: Lines, places: np.ndarray, tolerance: float) -> np.ndarray:
    """(P, DIRECTIONS) pixels of line that run to each place, by the direction that they come from."""
    weight = found.length * np.exp(-((_misses(found, places) / math.sin(math.radians(tolerance))) ** 2))
    to = places[:, None] - found.middle
    direction = (np.arctan2(to[..., 1], to[..., 0]) % math.pi / math.pi * DIRECTIONS).astype(int) % DIRECTIONS
    bins = direction + DIRECTIONS * np.arange(len(places))[:, None]
    return np.bincount(bins.ravel(), weight.ravel(), DIRECTIONS * len(places)).reshape(-1, DIRECTIONS)


def _met(found: Lines, point: np.ndarray) -> np.ndarray:
    """The point (2,) nearest to the lines that run to it, least squares with outliers left out again and again."""
    along = (found.ends[:, 2:] - found.ends[:, :2]) / found.length[:, None]
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    for _ in range(5):
        missed = _misses(found, point[None])[0] / math.sin(math.radians(TOLERANCE))
        far = np.hypot(*(point - found.middle).T)
        weight = found.length * np.exp(-(missed**2)) / np.maximum(far, 20) ** 2
        pulls = np.einsum("n,ni,nj->ij", weight, across, across) + 1e-9 * np.eye(2)
        point = np.linalg.solve(pulls, np.einsum("n,ni,nj,nj->i", weight, across, across, found.middle) + 1e-9 * point)
    return point


# --------------------------------------------------------------------------------------------------------- the layout


def automatic(photo: Tensor, K: Tensor, camera_height: float) -> DepthMap:
    """Depth of a photo (H, W, 3) in 0..1 with lens K (3, 3), as its lines tell it; `source` says what they told.

    camera_height: of the camera above the ground, scene units; the rest follows from it.
    """
    found = lines(photo)
    size = tuple(photo.shape[:2])
    vanishing = vanishing_point(found)
    if vanishing is not None:
        return _box(vanishing, found, size, K, camera_height)
    seam = ground_seam(found)
    if seam is None:
        usual = room_box(size, K, USUAL_POINT, USUAL_WALL, USUAL_DISTANCE)
        return DepthMap(usual.depth, usual.K, f"nothing in the photo tells its layout; the usual {usual.source}")
    horizon = min(LEVEL, seam - ABOVE)
    distance = camera_height * float(K[1, 1]) / ((seam - horizon) * (size[0] - 1))
    flat = ground(size, K, horizon, camera_height, distance)
    source = f"no vanishing point; a ground that ends at {seam:.2f} of the height, {distance:.3g} away, horizon at {horizon:.2f}"
    return DepthMap(flat.depth, flat.K, source)


def ground_seam(found: Lines) -> float | None:
    """Where a ground meets what stands on it, in heights from the top: upright lines end above it, flat ones lie below.

    None if no height parts them well.
    """
    height = found.size[0]
    found = found.where(found.length > 8)
    weight, feet = np.minimum(found.length, 60), found.ends[:, (1, 3)].max(1) / height
    upright = found.slope > UPRIGHT
    flat = (found.slope < FLAT) & (found.middle[:, 1] > 0.4 * height)  # farther up they are clouds and roofs
    if min(upright.sum(), flat.sum()) < LEAST_LINES:
        return None
    places = np.linspace(*SEAMS, 56)

    def above(chosen: np.ndarray) -> np.ndarray:
        return np.array([weight[chosen & (feet < place)].sum() for place in places]) / weight[chosen].sum()

    split = above(upright) - above(flat)
    return float(places[split.argmax()]) if split.max() >= LEAST_SPLIT else None


def _box(vanishing: Vanishing, found: Lines, size: tuple[int, int], K: Tensor, camera_height: float) -> DepthMap:
    scale = max(size) / max(found.size)
    point = tuple(float(p) for p in vanishing.point * scale)
    _, axes = axes_through(K, point)
    to_level = (axes @ torch.linalg.inv(K)).double().numpy()

    def level(pixels: np.ndarray) -> np.ndarray:
        """(N, 3) rays right, down, ahead of the level frame through pixels (N, 2) as they were seen."""
        return np.concatenate([pixels * scale, np.ones((len(pixels), 1))], 1) @ to_level.T

    ends = level(vanishing.support.ends.reshape(-1, 2)).reshape(-1, 2, 3)
    walls = [_wall(vanishing, found, level, side) * camera_height for side in (-1, 1)]
    planes = (-walls[0], walls[1], -math.inf, camera_height)
    reach = np.stack([_reach(ends, planes).max(1), np.full(len(ends), NEAREST * camera_height)]).max(0)
    distance = float(np.clip(np.quantile(reach, 0.9), NEAREST * camera_height, FARTHEST * camera_height))
    made = box(size, K, axes, planes, distance, "")
    names = [name for name, wall in zip(("left", "right"), walls, strict=True) if math.isfinite(wall)]
    shown = tuple(float(p) / (s - 1) for p, s in zip(point, size[::-1], strict=True))
    source = (
        f"{len(vanishing.support.ends)} lines meet at ({shown[0]:.2f}, {shown[1]:.2f}); a floor, "
        f"{' and '.join(names) or 'no'} wall{'s' * (len(names) != 1)}, an end {distance:.3g} away"
    )
    return DepthMap(made.depth, made.K, source)


def _reach(rays: np.ndarray, planes: tuple[float, ...]) -> np.ndarray:
    """How far ahead rays (..., 3) of the level frame meet the first of the walls (left, right, ceiling, floor)."""
    x, y, z = np.moveaxis(rays, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        beside = np.where(x > 0, planes[1] / x, planes[0] / x)
        below = np.where(y > 0, planes[3] / y, planes[2] / y)
    far = z * np.minimum(beside, below)
    return np.where(np.isfinite(far) & (z > 0), far, 0.0)


def _wall(vanishing: Vanishing, found: Lines, level, side: int) -> float:
    """How far aside the wall on that side (-1 left, 1 right) is, in camera heights; infinite if there is none.

    A wall has lines to the vanishing point above and below the horizon. It stands where its upright lines end.
    """
    support, (x, y) = vanishing.support, vanishing.point
    aside = side * (support.middle[:, 0] - x) > 0
    above = support.middle[:, 1] < y
    heights = [support.length[aside & part].sum() / found.size[0] for part in (above, ~above)]
    if min(heights) < LEAST_SUPPORT:
        return math.inf
    upright = found.where((found.slope > 75) & (found.length > SHORTEST * math.hypot(*found.size)))
    lower = upright.ends[:, 1] > upright.ends[:, 3]
    feet = np.where(lower[:, None], upright.ends[:, :2], upright.ends[:, 2:])
    standing = (side * (feet[:, 0] - x) > 0) & (feet[:, 1] > y)
    if standing.sum() >= 5:
        rays, weight = level(feet[standing]), upright.length[standing]
    else:  # the lowest of the wall's own lines
        chosen = support.where(aside & ~above)
        rays, weight = level(chosen.middle), chosen.length
    ratio = np.abs(rays[:, 0]) / np.maximum(rays[:, 1], 1e-6)  # of aside to below: small is steep
    order = ratio.argsort()
    heard = weight[order].cumsum() / weight.sum()
    return float(np.clip(ratio[order][np.searchsorted(heard, 0.15)], 0.3, 10.0))
