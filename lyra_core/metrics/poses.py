"""Whether frames were seen by the cameras that they were made for: what points of two pictures say, without any weights.

Points are SIFT's. Two pictures of a still scene have an epipolar geometry, and it must be that of their cameras (TSED, Yu et
al. 2023); points whose place in the world is remembered tell where a picture was really taken (PnP).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..cameras.camera import Cameras

POINTS = 2000  # of a picture, at most
RATIO = 0.8  # how much nearer a match must be than the next best
LEAST_MATCHES = 10  # of two pictures that can be judged at all, as in TSED
LEAST_INLIERS = 30  # of a picture whose camera counts as found
REPROJECTION, TRIES = 3.0, 1000  # pixels that an inlier may be off, and how many guesses are made
THRESHOLDS = (1.0, 2.0, 4.0)  # pixels


@dataclass(frozen=True)
class Points:
    """N points that can be found again in other pictures."""

    pixels: np.ndarray  # (N, 2) x, y
    descriptors: np.ndarray  # (N, 128) of unit length


@dataclass(frozen=True)
class PoseError:
    """How far the camera that a picture was really seen by is from the one it was made for."""

    degrees: float
    distance: float  # scene units between the centres
    inliers: int


def points(image: Tensor) -> Points:
    """The points of a picture (H, W, 3) in 0..1."""
    import cv2

    grey = cv2.cvtColor((image.cpu().float().clamp(0, 1) * 255).round().byte().numpy(), cv2.COLOR_RGB2GRAY)
    found, descriptors = cv2.SIFT_create(POINTS).detectAndCompute(grey, None)
    if not found:
        return Points(np.zeros((0, 2)), np.zeros((0, 128), np.float32))
    # square roots of histograms: their product tells how alike those are (Arandjelovic and Zisserman 2012)
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))
    return Points(np.array([point.pt for point in found]), descriptors.astype(np.float32))


def matches(a: Points, b: Points) -> tuple[np.ndarray, np.ndarray]:
    """Indices (M,) into the points of a and of b that show the same: each is the other's best, by far."""
    if min(len(a.pixels), len(b.pixels)) < 2:
        return np.zeros(0, int), np.zeros(0, int)
    apart = np.sqrt(np.maximum(2 - 2 * a.descriptors @ b.descriptors.T, 0))
    best = apart.argmin(1)
    nearest, second = np.partition(apart, 1, axis=1)[:, :2].T
    mutual = apart.argmin(0)[best] == np.arange(len(best))
    (chosen,) = (mutual & (nearest < RATIO * second)).nonzero()
    return chosen, best[chosen]


def epipolar_distances(a: np.ndarray, b: np.ndarray, camera_a: Cameras, camera_b: Cameras, still: float = 1e-6) -> np.ndarray:
    """How far (M,) matching pixels a, b (M, 2) are from where the other camera must see them, pixels; mean of both sides.

    Cameras whose centres are nearer than `still` scene units only turn: then a pixel has one place, not a line.
    """
    (Ra, ta, Ka), (Rb, tb, Kb) = (_parts(camera) for camera in (camera_a, camera_b))
    R = Rb @ Ra.T
    t = tb - R @ ta
    a, b = (np.concatenate([pixels, np.ones((len(pixels), 1))], 1) for pixels in (a, b))
    if np.linalg.norm(t) < still:
        there = Kb @ R @ np.linalg.inv(Ka)
        return (_apart(a @ there.T, b) + _apart(b @ np.linalg.inv(there).T, a)) / 2
    across = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    F = np.linalg.inv(Kb).T @ across @ R @ np.linalg.inv(Ka)
    in_b, in_a = a @ F.T, b @ F
    off = np.abs((in_b * b).sum(1))
    return (off / np.linalg.norm(in_b[:, :2], axis=1) + off / np.linalg.norm(in_a[:, :2], axis=1)) / 2


def _parts(camera: Cameras) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w2c, K = camera.w2c[0].double().cpu().numpy(), camera.K[0].double().cpu().numpy()
    return w2c[:3, :3], w2c[:3, 3], K


def _apart(projected: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return np.linalg.norm(projected[:, :2] / projected[:, 2:] - pixels[:, :2], axis=1)


def pair_distance(a: Points, b: Points, camera_a: Cameras, camera_b: Cameras, still: float = 1e-6) -> float | None:
    """Median epipolar distance of two pictures' matches, pixels; None if there are too few. TSED is the share below a limit."""
    i, j = matches(a, b)
    if len(i) < LEAST_MATCHES:
        return None
    return float(np.median(epipolar_distances(a.pixels[i], b.pixels[j], camera_a, camera_b, still)))


def places(pixels: np.ndarray, depth: Tensor, camera: Cameras) -> tuple[np.ndarray, np.ndarray]:
    """Places in the world (N, 3) of pixels (N, 2) of a view with this depth (H, W), and which of them (N,) are known."""
    height, width = depth.shape
    x, y = np.rint(pixels).astype(int).T
    z = depth.cpu().double().numpy()[y.clip(0, height - 1), x.clip(0, width - 1)]
    R, t, K = _parts(camera)
    local = np.concatenate([pixels, np.ones((len(pixels), 1))], 1) @ np.linalg.inv(K).T * z[:, None]
    return (local - t) @ R, z > 0


def pose_error(world: np.ndarray, pixels: np.ndarray, camera: Cameras) -> PoseError | None:
    """Where a picture was seen from whose pixels (N, 2) show places in the world (N, 3), against its camera.

    None if fewer than LEAST_INLIERS of them agree on one camera. Nothing is aligned: both are in the world's own axes.
    """
    import cv2

    if len(world) < LEAST_INLIERS:
        return None
    R, t, K = _parts(camera)
    world, pixels = (np.ascontiguousarray(part, np.float64) for part in (world, pixels))
    found, r, moved, inliers = cv2.solvePnPRansac(
        world, pixels, K, None, iterationsCount=TRIES, reprojectionError=REPROJECTION, confidence=0.9999, flags=cv2.SOLVEPNP_SQPNP
    )
    if not found or inliers is None or len(inliers) < LEAST_INLIERS:
        return None
    r, moved = cv2.solvePnPRefineLM(world[inliers[:, 0]], pixels[inliers[:, 0]], K, None, r, moved)
    seen = cv2.Rodrigues(r)[0]
    apart = np.linalg.norm(seen - R) / 8**0.5  # the sine of half the angle, precise for small ones
    distance = np.linalg.norm(seen.T @ moved[:, 0] - R.T @ t)
    return PoseError(float(np.degrees(2 * np.arcsin(min(apart, 1)))), float(distance), len(inliers))
