"""Where one photo was taken, by points of the scene that it shows.

Each point comes from another photo's pixel and depth. The place is found by OpenCV (PnP among guesses, SQPNP) and then
refined here with what is known of the errors: a depth that is wrong moves a point along a line in the photo, so what it is
off along that line counts less than what it is off across.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..cameras.camera import Cameras

LOOSE = 0.01  # of the picture's longest side: how far a match may lie off
ROBUST = 3.0  # standard deviations of its depth by which a match that fits may lie off
BEHIND = 1e6  # pixels that a point behind the camera lies off
ONE_SURFACE = 0.05  # relative disparity over the pixels around a point beyond which its depth is a guess
SHARPEST, WORST_DEPTH = 0.3, 0.3  # pixels that a match is off at least; relative error of depth that is reckoned with at most
TURNED = 1.25, 0.1  # a turn alone explains the matches if it errs no more than so many times a full pose, plus pixels
NARROWEST = 1.0  # degrees between two rays from which on where they meet is believed
FEWEST = 6  # points that a place is looked for with
TRIED = 3  # guesses that are followed up
MOVED, TOGETHER = 15, 0.2  # matches that moved together, and their spread in pictures' widths: a thing that moves
DOUBTED = 0.05  # relative error of depth that is reckoned with where lenses are compared


@dataclass(frozen=True)
class Seen:
    """M points of the scene that one photo shows, as far as other photos know them."""

    points: np.ndarray  # (M, 3) scene units
    pixels: np.ndarray  # (M, 2) in that photo
    sources: np.ndarray  # (M,) the photo that knows it
    others: np.ndarray  # (M, 2) pixels in that
    centers: np.ndarray  # (M, 3) where that was taken


@dataclass(frozen=True)
class Pose:
    w2c: np.ndarray  # (4, 4)
    error: np.ndarray  # (M,) pixels that each point lies off
    off: np.ndarray  # (M,) the same if its depth may be as wrong as that of others
    fits: np.ndarray  # (M,) bool

def depth_at(depth: Tensor, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth (M,) at pixels (M, 2) between those of a map, and whether one surface is around each."""
    disparity = torch.where(depth > 0, 1 / depth.clamp_min(1e-12), 0.0).double().numpy()
    height, width = disparity.shape
    inside = ((pixels >= 0) & (pixels <= [width - 1, height - 1])).all(1)
    u, v = pixels.clip(0, [width - 1, height - 1]).T
    left, top = np.minimum(u.astype(int), width - 2), np.minimum(v.astype(int), height - 2)
    corners = np.stack([disparity[top + dy, left + dx] for dy in (0, 1) for dx in (0, 1)])
    x, y = u - left, v - top
    between = ((1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y) * corners
    sure = inside & (corners.min(0) > 0) & (np.ptp(corners, 0) < ONE_SURFACE * corners.max(0))
    return 1 / np.maximum(between.sum(0), 1e-12), sure


def lifted(pixels: np.ndarray, z: np.ndarray, camera: Cameras) -> np.ndarray:
    """Scene points (M, 3) at pixels (M, 2) of a camera and depths (M,) along it."""
    w2c = camera.w2c[0].double().numpy()
    local = _rays(pixels, camera.K[0].double().numpy()) * z[:, None]
    return (local - w2c[:3, 3]) @ w2c[:3, :3]


def _rays(pixels: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Directions (M, 3) through pixels (M, 2), with z = 1."""
    return np.concatenate([pixels, np.ones((len(pixels), 1))], 1) @ np.linalg.inv(K).T


def projected(points: np.ndarray, w2c: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pixels (M, 2) of scene points, infinite behind the camera."""
    local = points @ w2c[:3, :3].T + w2c[:3, 3]
    front = local[:, 2] > 1e-9
    seen = local @ K.T
    return np.where(front[:, None], seen[:, :2] / np.where(front, seen[:, 2], 1)[:, None], np.inf)


def resected(seen: Seen, K: np.ndarray, size: tuple[int, int], tried: int = TRIED) -> Pose | None:
    """The camera that sees the points where they are, from so many guesses; None if there are too few points, or none agree."""
    loose = LOOSE * max(size)
    guesses = [w2c for w2c in _guesses(seen, K, loose) if w2c is not None]
    # where many far points make a turn look like a step aside, the most that fit loosely may fit the worse place
    guesses.sort(key=lambda w2c: _cost(seen, w2c, K, loose))
    poses = [pose for pose in (_settled(seen, w2c, K, loose) for w2c in guesses[:tried]) if pose is not None]
    return min(poses, key=lambda pose: _cost(seen, pose.w2c, K, loose), default=None)


def _guesses(seen: Seen, K: np.ndarray, loose: float) -> Iterator[np.ndarray | None]:
    """Places (4, 4) by all points, loosely and tightly, and by those of each photo alone, whose depths may disagree."""
    every = np.ones(len(seen.points), bool)
    yield _guess(seen, every, K, loose)
    yield _guess(seen, every, K, loose / 4)
    sources = np.unique(seen.sources)
    for source in sources:
        if len(sources) > 1:
            yield _guess(seen, seen.sources == source, K, loose / 2)
        yield _guess_by_rays(seen, seen.sources == source, K)


def _guess(seen: Seen, some: np.ndarray, K: np.ndarray, limit: float) -> np.ndarray | None:
    """w2c (4, 4) with which most of some points fit within `limit` pixels."""
    import cv2

    points, pixels = np.ascontiguousarray(seen.points[some]), np.ascontiguousarray(seen.pixels[some])
    if len(points) < FEWEST:
        return None
    done, _, _, fits = cv2.solvePnPRansac(
        points, pixels, K, None, iterationsCount=2000, reprojectionError=limit, confidence=0.9999, flags=cv2.SOLVEPNP_AP3P
    )
    if not done or fits is None or len(fits) < FEWEST:
        return None
    points, pixels = points[fits[:, 0]], pixels[fits[:, 0]]
    _, turn, shift = cv2.solvePnP(points, pixels, K, None, flags=cv2.SOLVEPNP_SQPNP)
    turn, shift = cv2.solvePnPRefineLM(points, pixels, K, None, turn, shift)
    w2c = _matrix(cv2.Rodrigues(turn)[0], shift[:, 0])
    return w2c if np.isfinite(w2c).all() else None


def _guess_by_rays(seen: Seen, some: np.ndarray, K: np.ndarray) -> np.ndarray | None:
    """w2c (4, 4) by how rays of one other photo meet these, which asks depth for nothing but how far that is.

    Where depth is only laid out, it finds places that PnP misses; where the camera only turned, it finds nonsense.
    """
    import cv2

    here = _rays(seen.pixels[some], K)
    points = seen.points[some] - seen.centers[some]  # with the other camera at the origin, turned as the world
    if not len(points):
        return None
    there = _unit(points)
    lift = _to_front(there)
    ahead = there @ lift.T
    front = ahead[:, 2] > 0.1
    if front.sum() < 2 * FEWEST:
        return None
    ahead, here, points = ahead[front], here[front], points[front]
    flat = ahead[:, :2] / ahead[:, 2:], here[:, :2] / here[:, 2:]
    essential, fits = cv2.findEssentialMat(*flat, np.eye(3), method=cv2.RANSAC, prob=0.9999, threshold=float(1 / K[0, 0]))
    if essential is None or essential.shape != (3, 3):
        return None
    _, R, t, fits = cv2.recoverPose(essential, *flat, np.eye(3), mask=fits)
    fits = fits[:, 0] > 0
    if fits.sum() < FEWEST:
        return None
    local, t = (points[fits] @ lift.T) @ R.T, t[:, 0]
    aside, along = np.cross(here[fits], t), np.cross(here[fits], local)
    step = np.median(-(aside * along).sum(1) / np.maximum((aside**2).sum(1), 1e-12))
    R = R @ lift
    return _matrix(R, step * t - R @ seen.centers[some][0])


def _to_front(rays: np.ndarray) -> np.ndarray:
    """A rotation (3, 3) that brings the middle of rays (N, 3) to the z axis."""
    ahead = _unit(rays).mean(0)
    ahead /= max(np.linalg.norm(ahead), 1e-9)
    right = np.cross([0.0, 1.0, 0.0] if abs(ahead[1]) < 0.9 else [0.0, 0.0, 1.0], ahead)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(ahead, right), ahead])


def _settled(seen: Seen, w2c: np.ndarray, K: np.ndarray, loose: float) -> Pose | None:
    """The likeliest pose near a guess, with the errors of matches and depth that it implies; None if too little fits."""
    error, reach = _errors(seen, w2c, K)
    off = np.linalg.norm(error, axis=1)
    for _ in range(3):
        fits = off < loose
        if fits.sum() < FEWEST:
            return None
        pixels, depth = _noise(error, reach, fits)
        w2c = _refined(seen, w2c, K, fits, pixels, depth)
        error, reach = _errors(seen, w2c, K)
        off = _unexplained(error, reach, ROBUST * depth)
    return Pose(w2c, np.linalg.norm(error, axis=1), off, off < loose) if (off < loose).sum() >= FEWEST else None


def _cost(seen: Seen, w2c: np.ndarray, K: np.ndarray, loose: float) -> float:
    """Sum of squared pixels that matches lie off if depth is a little wrong; what is far off counts no more than what is off.

    The limit is tight: where windows or tiles repeat, a wrong place fits more matches, but loosely.
    """
    across, along, fast = _parts(*_errors(seen, w2c, K))
    return float(np.square(np.hypot(across, along / np.hypot(1, DOUBTED * fast)).clip(0, loose / 4)).sum())


def misfit(seen: Seen, K: np.ndarray, size: tuple[int, int]) -> float:
    """The cost of about the best place with a lens K."""
    loose, pose = LOOSE * max(size), resected(seen, K, size, tried=1)
    return len(seen.points) * (loose / 4) ** 2 if pose is None else _cost(seen, pose.w2c, K, loose)


def _errors(seen: Seen, w2c: np.ndarray, K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how many pixels (M, 2) each point lies off, and how many it moves with its depth: pixels (M, 2) per natural log."""
    step = 1e-4
    here = projected(seen.points, w2c, K)
    there = projected(seen.points + step * (seen.points - seen.centers), w2c, K)
    front = np.isfinite(here).all(1) & np.isfinite(there).all(1)
    error = np.where(front[:, None], seen.pixels - np.where(front[:, None], here, 0), BEHIND)
    return error, np.where(front[:, None], np.where(front[:, None], there, 0) - np.where(front[:, None], here, 0), 0) / step


def _parts(error: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors (M,) across and along the line on which a point moves with its depth, and how fast it does (M,)."""
    fast = np.linalg.norm(reach, axis=1)
    x, y = np.where(fast[:, None] > 1e-9, reach / np.maximum(fast, 1e-9)[:, None], [1.0, 0.0]).T
    return error[:, 0] * y - error[:, 1] * x, error[:, 0] * x + error[:, 1] * y, fast


def _unexplained(error: np.ndarray, reach: np.ndarray, depth: float) -> np.ndarray:
    """Pixels (M,) that points lie off even if their depth may be wrong by a share of itself."""
    across, along, fast = _parts(error, reach)
    return np.hypot(across, np.maximum(0, np.abs(along) - depth * fast))


def _noise(error: np.ndarray, reach: np.ndarray, fits: np.ndarray) -> tuple[float, float]:
    """Standard deviations of matches, in pixels, and of depth, as a share of itself."""
    across, along, fast = _parts(error[fits], reach[fits])
    pixels = max(SHARPEST, 1.4826 * float(np.median(np.abs(across))))
    tells = fast > np.median(fast)  # those that move most
    square = np.square(1.4826 * along[tells]) - pixels**2
    depth = float(np.sqrt(max(0.0, np.median(square / np.maximum(np.square(fast[tells]), 1e-12))))) if tells.any() else 0.0
    return pixels, min(depth, WORST_DEPTH)


def _refined(seen: Seen, w2c: np.ndarray, K: np.ndarray, fits: np.ndarray, pixels: float, depth: float) -> np.ndarray:
    """The pose at which the matches that fit are likeliest, if matches and depth have these standard deviations.

    That a point may lie nearer or farther than its depth says is in the weights: what it is off along that line counts
    less, so that a wrong depth bends the pose little, and where a camera only turned it counts in full.
    """
    import cv2
    from scipy.optimize import least_squares

    some = Seen(*(getattr(seen, name)[fits] for name in ("points", "pixels", "sources", "others", "centers")))
    reach = _errors(some, w2c, K)[1]
    weights = pixels, np.sqrt(pixels**2 + np.square(depth * np.linalg.norm(reach, axis=1)))

    def moved(change: np.ndarray) -> np.ndarray:
        return _matrix(cv2.Rodrigues(change[:3])[0] @ w2c[:3, :3], w2c[:3, 3] + change[3:])

    def wrong(change: np.ndarray) -> np.ndarray:
        across, along, _ = _parts(_errors(some, moved(change), K)[0], reach)
        return np.concatenate([across / weights[0], along / weights[1]])

    return moved(least_squares(wrong, np.zeros(6), loss="cauchy", f_scale=2.0, x_scale="jac", max_nfev=30).x)


def _matrix(R: np.ndarray, t: np.ndarray) -> np.ndarray:
    w2c = np.eye(4)
    w2c[:3, :3], w2c[:3, 3] = R, t
    return w2c


def turned(seen: Seen, pose: Pose, K: np.ndarray, source: int, neighbour: Cameras) -> np.ndarray | None:
    """w2c (4, 4) of a camera that only turned where its neighbour `source` stands, if that explains what they both show; else None.

    It is the test whether a homography explains the matches, for one that these two lenses can have: a flat wall has a
    homography too, but not that of a turn.
    """
    both = pose.fits & (seen.sources == source)
    there = _unit(_rays(seen.others[both], neighbour.K[0].double().numpy()))
    world = there @ neighbour.w2c[0, :3, :3].double().numpy()
    here, pixels = _unit(_rays(seen.pixels[both], K)), seen.pixels[both]
    center = neighbour.centers[0].double().numpy()
    weights = np.ones(len(here))
    for _ in range(10):
        R = _rotation((weights[:, None] * here).T @ world)
        error = np.linalg.norm(projected(world, _matrix(R, np.zeros(3)), K) - pixels, axis=1)
        weights = 1 / (1 + (error / max(np.median(error), 1e-3)) ** 2)
    if np.median(error) > TURNED[0] * np.median(pose.error[both]) + TURNED[1]:
        return None
    return _matrix(R, -R @ center)


def _unit(rays: np.ndarray) -> np.ndarray:
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _rotation(matrix: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) nearest to a matrix."""
    U, _, V = np.linalg.svd(matrix)
    return U @ np.diag([1, 1, np.sign(np.linalg.det(U @ V))]) @ V


def met(ends: tuple[np.ndarray, np.ndarray], a: Cameras, b: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """Depths (2, M) along both cameras at which rays through matched pixels meet, and which of the pixels (M,) do."""
    centers = [camera.centers[0].double().numpy() for camera in (a, b)]
    rays = [
        _rays(pixels, camera.K[0].double().numpy()) @ camera.w2c[0, :3, :3].double().numpy()
        for pixels, camera in zip(ends, (a, b), strict=True)
    ]
    # z0 and z1 with center0 + z0 ray0 nearest to center1 + z1 ray1
    dots = [(rays[i] * rays[j]).sum(1) for i, j in ((0, 0), (0, 1), (1, 1))]
    base = [rays[i] @ (centers[1] - centers[0]) for i in (0, 1)]
    determinant = np.maximum(dots[0] * dots[2] - dots[1] ** 2, 1e-15)
    z = np.stack([dots[2] * base[0] - dots[1] * base[1], dots[1] * base[0] - dots[0] * base[1]]) / determinant
    sine = np.sqrt(determinant / (dots[0] * dots[2]))
    met = (centers[0] + z[0][:, None] * rays[0] + centers[1] + z[1][:, None] * rays[1]) / 2
    off = [
        np.linalg.norm(projected(met, camera.w2c[0].double().numpy(), camera.K[0].double().numpy()) - pixels, axis=1)
        for camera, pixels in zip((a, b), ends, strict=True)
    ]
    fits = (z > 0).all(0) & (sine > np.sin(np.radians(NARROWEST))) & (np.maximum(*off) < LOOSE * max(a.size))
    return z[:, fits], fits.nonzero()[0]


def moving(seen: Seen, pose: Pose, source: int, size: tuple[int, int]) -> tuple[int, float, float] | None:
    """How many matches with the photo `source` do not fit but moved together, as people and cars do, and around which pixel."""
    import cv2

    off = ~pose.fits & (seen.sources == source)
    if off.sum() < MOVED:
        return None
    _, together = cv2.estimateAffinePartial2D(
        seen.others[off], seen.pixels[off], method=cv2.RANSAC, ransacReprojThreshold=LOOSE * max(size)
    )
    if together is None:
        return None
    here = seen.pixels[off][together[:, 0].astype(bool)]
    if len(here) < MOVED or here.std(0).max() > TOGETHER * size[1]:
        return None
    return len(here), *np.median(here, 0).tolist()
