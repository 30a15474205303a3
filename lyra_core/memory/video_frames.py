"""Which frames of a video a world begins from: few, sharp, far enough apart to tell depth, near enough to overlap.

Points are followed from frame to frame. How far they have moved is how new a view is; what no homography explains of it
is parallax, which tells places and depths, and counts more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

FEWEST, MOST = 5, 10  # frames
WIDTH = 320  # pixels across at which frames are compared
POINTS, LEFT = 300, 0.6  # points that are followed, and the share of them below which new ones are taken
FAR = 0.08  # of the width: after so much motion new points are taken, because the old ones leave the picture
BACK = 0.5  # pixels that a point may end beside its beginning, followed to the next frame and back
CUT = 0.25  # share of the points that one frame may keep of the last; fewer, and it is another shot
WEIGHT = 4.0  # of parallax beside motion
STILL, STEP = 0.02, 0.35  # of the width: motion below which there is no other view, and at most from one frame to the next


@dataclass(frozen=True)
class Motion:
    """How a video of F frames moves up to its first cut."""

    way: np.ndarray  # (F,) how far the view has moved since the first frame, in widths, parallax included
    parallax: float  # of all that, in widths
    sharpness: np.ndarray  # (F,) the more the sharper
    cut: bool  # whether there is more of the video, of another shot


def measured(frames: Iterable[Tensor], on_frame: Callable[[int], None] = lambda done: None) -> Motion:
    """How frames (H, W, 3) uint8 move; they are taken one after the other."""
    import cv2

    way, sharpness, parallax, base, cut = [0.0], [], 0.0, 0.0, False
    before = start = here = None
    for number, frame in enumerate(frames):
        grey = _small(frame)
        if before is not None:
            moved, kept = _followed(before, grey, here)
            if kept.sum() < CUT * len(here) or not kept.any():
                cut = True
                break
            start, here = start[kept], moved[kept]
            far, apart = _apart(start, here)
            way.append(max(base + far + WEIGHT * apart, way[-1]))
        sharpness.append(float(cv2.Laplacian(grey, cv2.CV_32F).var()))
        if before is None or far > FAR or len(here) < LEFT * POINTS:
            parallax += 0.0 if before is None else apart
            base, start = way[-1], cv2.goodFeaturesToTrack(grey, POINTS, 0.01, 5)
            start = here = np.empty((0, 1, 2), np.float32) if start is None else start
        before = grey
        on_frame(number + 1)
    if not sharpness:
        raise ValueError("this video has no frame")
    return Motion(np.array(way[: len(sharpness)]), parallax, np.array(sharpness), cut)


def _followed(before: np.ndarray, now: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where points (N, 1, 2) of one picture are in the next, and which (N,) lead back to where they came from."""
    import cv2

    if not len(points):
        return points, np.zeros(0, bool)
    window = {"winSize": (21, 21), "maxLevel": 3}
    moved, found, _ = cv2.calcOpticalFlowPyrLK(before, now, points, None, **window)
    back, again, _ = cv2.calcOpticalFlowPyrLK(now, before, moved, None, **window)
    return moved, (found[:, 0] > 0) & (again[:, 0] > 0) & (np.linalg.norm(back - points, axis=2)[:, 0] < BACK)


def _small(frame: Tensor) -> np.ndarray:
    import cv2

    grey = cv2.cvtColor(np.ascontiguousarray(frame.cpu().numpy()), cv2.COLOR_RGB2GRAY)
    size = (WIDTH, max(1, round(WIDTH * grey.shape[0] / grey.shape[1])))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def _apart(start: np.ndarray, here: np.ndarray) -> tuple[float, float]:
    """How far points (N, 1, 2) have moved, and what no homography explains of that, in widths; of the middle point."""
    import cv2

    far = float(np.median(np.linalg.norm(here - start, axis=2))) / WIDTH
    homography = cv2.findHomography(start, here, cv2.RANSAC, 2.0)[0] if len(start) > 8 else None
    if homography is None:
        return far, 0.0
    left = np.linalg.norm(cv2.perspectiveTransform(start, homography) - here, axis=2)
    return far, min(float(np.median(left)) / WIDTH, far)


def chosen(motion: Motion, count: int) -> list[int]:
    """The numbers of at most `count` frames, equally far apart, each the sharpest around; the first is near the beginning.

    ValueError for a video that shows one view only.
    """
    if not FEWEST <= count <= MOST:
        raise ValueError(f"{count} frames; choose {FEWEST} to {MOST}")
    whole = float(motion.way[-1])
    if whole < STILL:
        raise ValueError(
            f"this video moves by {whole:.1%} of its width only, up to frame {len(motion.way)}"
            + (", where another shot begins" if motion.cut else "")
            + "; take one of its frames as a photo"
        )
    count = min(count, len(motion.way), 1 + int(whole / STILL))
    step = min(whole / (count - 1), STEP)
    found: list[int] = []
    for place in step * np.arange(count):
        near = np.flatnonzero(np.abs(motion.way - place) <= step / 4)
        near = near if len(near) else np.abs(motion.way - place).argmin()[None]
        found.append(int(near[motion.sharpness[near].argmax()]))
    return sorted(set(found))
