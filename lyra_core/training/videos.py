"""Videos with known cameras as samples: depth as it was given, or estimated of the frames that may be remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..cameras.camera import Cameras
from ..memory.depth_alignment import DepthEstimator, in_scene_units, known_depth
from ..memory.retrieval import Keyframe
from .sample import Sample

TOGETHER = 10  # frames that an estimator sees at a time, as the reference


def of_frames(
    name: str,
    frames: Tensor,
    cameras: Cameras,
    depths: Mapping[int, Tensor],
    captions: Mapping[int, str],
    chunk: int,
) -> Sample:
    """A sample of uint8 frames (F, H, W, 3): as many whole chunks after the first frame as there are."""
    whole = 1 + (len(frames) - 1) // chunk * chunk
    kept = {frame: depth for frame, depth in depths.items() if frame < whole}
    return Sample(name, frames[:whole], cameras[:whole], kept, {first: text for first, text in captions.items() if first < whole})


def remembered(frames: int, chunk: int, stride: int) -> list[int]:
    """Frames whose depth is needed: every `stride`-th, and the last before each chunk."""
    whole = 1 + (frames - 1) // chunk * chunk
    return sorted({*range(0, whole, stride), *range(0, whole, chunk)})


def estimated(
    frames: Tensor,
    cameras: Cameras,
    wanted: list[int],
    estimator: DepthEstimator,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, Tensor]:
    """Depth of some of the frames (F, H, W, 3) uint8, in the units of their cameras.

    The first frames get their scale from the cameras, so the estimator must say where it believes them to be; all others from
    the depth of those before. NoScaleError where that is not possible.
    """
    found: list[Keyframe] = []
    for start in range(0, len(wanted), TOGETHER):
        ids = wanted[start : start + TOGETHER]
        pictures, views = frames[ids].float() / 255, cameras[ids]
        known = known_depth(found[-TOGETHER:], views)
        depth, _how = in_scene_units(estimator(pictures, views, known), views, known)
        found += [Keyframe(frame, its, cameras[frame : frame + 1]) for frame, its in zip(ids, depth, strict=True)]
        on_step(min(start + TOGETHER, len(wanted)), len(wanted))
    return {keyframe.frame: keyframe.depth.cpu() for keyframe in found}
