"""The depth of generated frames: which are estimated, where the cameras end up, and at which scale the depth is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lyra_core.cameras.camera import Cameras
from lyra_core.memory.depth_alignment import STILL, Estimate, in_scene_units, stretched
from lyra_core.memory.warp import FAR, reliable
from lyra_core.world.world import ChunkPlan, keyframe_ids

from . import Check, Golden, furthest, relative

LIMIT = 1e-4  # absolute for cameras, relative for depth
NUDGE_LIMIT = 3e-7  # absolute; the offsets are a millionth themselves
WRONG_PIXELS = 1e-3  # share of pixels of a mask that may be wrong
NUDGE = 1e-6  # scene units by which the reference moves cameras that stand still apart
UNUSABLE = 999.9  # depth from which on the reference takes a pixel of the first frame for sky
RECONSIDERED = 0.15  # the reference's continuity of the depth of new frames, which it only shows


@dataclass(frozen=True)
class Update:
    """The state of the loop after depth was estimated."""

    cameras: Cameras  # of all frames
    remembered: tuple[int, ...]  # frame ids
    newest: Tensor | None = None  # (H, W) depth of the last frame


def check_depth_update(golden: Golden) -> Iterator[Check]:
    arrays, record = golden.arrays, golden.json
    for i, case in enumerate(record["window_selection"]):
        found = depth_window(case["abs_last_idx"], case["interval"], case["max"], case["include_chunk_last"])
        yield Check(f"window_{i}", "wrong_ids", len(set(found) ^ set(case["frames"])) + (found != case["frames"]), 0)
    yield from _check_still(arrays, record)
    for i, case in enumerate(record["cases"]):
        yield from _check_updates(f"case{i}", case, arrays)
    yield from _check_single(arrays, record)


def _check_still(arrays: dict[str, Tensor], record: dict) -> Iterator[Check]:
    still = _cameras(arrays["static_cam_in"])
    found = moved_apart(still).w2c
    yield Check("still", "w2c", furthest(found, arrays["static_cam_out"]), NUDGE_LIMIT)
    offset, expected = found - still.w2c, arrays["static_cam_out"] - still.w2c
    yield Check("still", "offset", furthest(offset, expected), NUDGE_LIMIT)
    for key in (key for key in arrays if key.endswith("_w2c_in")):
        moving = _cameras(arrays[key])
        same = torch.equal(moved_apart(moving).w2c, moving.w2c)
        yield Check(key, "wrong_if_moved", float(same != record["moving_cam_unchanged"]), 0)


def _cameras(w2c: Tensor, K: Tensor | None = None, size: tuple[int, int] = (1, 1)) -> Cameras:
    if w2c.shape[1] == 3:
        w2c = torch.cat([w2c, w2c.new_tensor([0, 0, 0, 1]).expand(len(w2c), 1, 4)], 1)
    return Cameras(w2c, (torch.eye(3) if K is None else K).expand(len(w2c), 3, 3), size)


def _check_updates(name: str, case: dict, arrays: dict[str, Tensor]) -> Iterator[Check]:
    """Every chunk of one mode: the state after it, and the depth of its last frame."""
    newest = arrays[f"{name}_buffer_depth_latest"]
    path = _cameras(arrays[f"{name}_w2c_in"], torch.tensor(case["K"]), tuple(newest.shape))
    state, means = Update(path[:1], (0,)), {}
    for chunk in range(len(case["da3_kw"])):
        frames = len(arrays[f"{name}_cam_after{chunk + 1}"])
        grown = Cameras(
            torch.cat([state.cameras.w2c, path.w2c[len(state.cameras) : frames]]), path.K[:frames], path.size
        )
        followed = case["use_predicted_pose"] and believes_prediction(chunk, case["continuation"])
        asked = case["da3_kw"][chunk]
        for key in ("align_to_input_extrinsics", "align_to_input_ext_scale"):
            yield Check(f"{name}_{chunk}", key, float(asked[key] != str(not followed)), 0)
        state = _update(state, grown, case, followed, arrays, f"{name}_da3_{chunk}")
        after = f"{name}_cam_after{chunk + 1}"
        yield Check(after, "w2c", furthest(state.cameras.w2c, arrays[after]), LIMIT)
        wrong = set(state.remembered) ^ set(case[f"cache_ids_after{chunk + 1}"])
        yield Check(f"{name}_{chunk}", "wrong_ids", len(wrong), 0)
        means[frames - 1] = state.newest.double().mean()
        key = f"{name}_frame0_w2c_after{chunk + 1}"
        if key in arrays:
            yield Check(key, "w2c", furthest(state.cameras.w2c[0], arrays[key]), LIMIT)
    yield Check(name, "newest_depth", relative(state.newest, newest), LIMIT)
    expected = arrays[f"{name}_buffer_mask_latest"] > 0.5
    below = expected.any(1)  # the estimator's sky, whole rows of it, is cut out of the mask but isn't in the file
    wrong = (shown_as_reliable(state.newest[None])[0] != expected)[below].float().mean()
    yield Check(name, "newest_mask", float(wrong), WRONG_PIXELS)
    kept = state.cameras.w2c[list(state.remembered)]
    yield Check(name, "cache_w2c", furthest(kept, arrays[f"{name}_cache_w2c"]), LIMIT)
    for frame, mean in means.items():
        expected = arrays[f"{name}_cache_depth_mean"][state.remembered.index(frame)]
        yield Check(f"{name}_frame{frame}", "depth_mean", relative(mean, expected), LIMIT)
    yield Check(f"{name}_others", skip="the raw depth of frames other than a chunk's last isn't in the file")


def _update(state: Update, cameras: Cameras, case: dict, followed: bool, arrays: dict[str, Tensor], key: str) -> Update:
    """One chunk on: the estimator saw the frames of the window and said `key`_ext_out and, of the last, `key`_depth_last."""
    last, first_new = len(cameras) - 1, len(state.cameras)
    window = depth_window(last, case["interval"], case["max_history"], case["include_chunk_last"])
    native = arrays[f"{key}_depth_last"]
    depth = stretched(native[None], cameras.size).expand(len(window), *cameras.size)
    estimate = Estimate(depth, _cameras(arrays[f"{key}_ext_out"]))
    w2c = cameras.w2c.clone()
    if followed:
        history = sum(frame < first_new for frame in window)
        moved, depth = follow_predicted_cameras(estimate, cameras[window], history)
        # of several settled cameras none is moved; a single one is put back where it was
        changed = slice(0 if history == 1 else history, None)
        w2c[window[changed]] = moved.w2c[changed]
    else:
        depth, _ = in_scene_units(estimate, cameras[window], torch.zeros_like(depth), "none")
    entering = keyframe_ids(ChunkPlan("", first_new, cameras[first_new:], ()))
    remembered = (*state.remembered, *(frame for frame in window if frame in entering))
    return Update(Cameras(w2c, cameras.K, cameras.size), remembered, depth[-1])


def _check_single(arrays: dict[str, Tensor], record: dict) -> Iterator[Check]:
    from lyra_core.models.depth_estimators import longest_side

    native, expected = arrays["single_da3_depth_native"], arrays["single_depth"]
    depth, surfaces = single_depth(native, tuple(expected.shape))
    yield Check("single", "depth", relative(depth, expected), LIMIT)
    wrong = (surfaces != (arrays["single_mask"] > 0.5)).float().mean()
    yield Check("single", "mask", float(wrong), WRONG_PIXELS)
    asked = [record["single_da3_kw"], *(kw for case in record["cases"] for kw in case["da3_kw"])]
    sizes = [
        tuple(expected.shape),
        *(
            tuple(arrays[f"case{i}_buffer_depth_latest"].shape)
            for i, case in enumerate(record["cases"])
            for _ in case["da3_kw"]
        ),
    ]
    wrong = sum(kw["process_res"] != str(longest_side(size)) for kw, size in zip(asked, sizes, strict=True))
    yield Check("*", "wrong_process_res", wrong, 0)
    yield Check("single_image_chw01", skip="pictures are resized by the host's nodes, not by OpenCV")
    yield Check("single_K", skip="the file doesn't hold the intrinsics that the estimator gave")


# ----------------------------------------------------------- what the reference does and the product has no use for


def depth_window(
    newest: int, interval: int = 8, count: int = 10, chunk_ends: bool = False, chunk_frames: int = 80
) -> list[int]:
    """Ids of the frames whose depth is estimated when `newest` is the last one made, in order.

    `count` frames, every `interval`-th back from the newest; with `chunk_ends` also the photo and the last frame of every
    chunk. The photo is in it only where the steps reach it.
    """
    if newest < 0 or interval < 1 or count < 1 or chunk_frames < 1:
        raise ValueError(
            f"no window back from frame {newest} with interval {interval}, count {count} and chunks of {chunk_frames}; "
            "all but the frame must be at least 1"
        )
    recent = range(newest, max(newest - interval * count, -1), -interval)
    ends = range(0, newest + 1, chunk_frames) if chunk_ends else ()
    return sorted({*recent, *ends})


def moved_apart(cameras: Cameras) -> Cameras:
    """Cameras that stand still, moved by about a millionth of a scene unit each; others as they are.

    The reference does this before it asks for depth, because Umeyama fails on points that coincide. Seen from the first of
    them, as networks are told, they still coincide; and a scale from such cameras is noise, so `camera_scale` refuses.
    """
    if cameras.centers.var(0, unbiased=False).sum() >= STILL:
        return cameras
    i = 2 * torch.pi * torch.arange(len(cameras), dtype=torch.float64)
    offsets = NUDGE * torch.stack([torch.sin(i * 1e-5), torch.cos(i * 1.3e-5), torch.sin(i * 7e-6)], 1)
    w2c = cameras.w2c.clone()
    w2c[:, :3, 3] -= (w2c[:, :3, :3] @ offsets.to(w2c)[..., None]).squeeze(-1)
    return replace(cameras, w2c=w2c)


def believes_prediction(chunk: int, continuation: bool) -> bool:
    """Whether the reference's predicted-pose mode takes the cameras of this chunk from the estimator: only of the first
    one, or of all with `continuation`."""
    return chunk == 0 or continuation


def follow_predicted_cameras(estimate: Estimate, cameras: Cameras, history: int) -> tuple[Cameras, Tensor]:
    """Cameras (F) in the world where the estimator saw the frames, and depth (F, H, W) to go with them.

    cameras: where they were thought to be; the first `history` of them are settled. The predicted path is scaled to the
    length of the settled one, and hung up at its last camera. One settled camera has no length: then the whole path
    counts. As the reference, which keeps the settled cameras as they were except for a single one, and all of K.
    """
    depth, predicted = estimate.depth, estimate.cameras
    if predicted is None or not 1 <= history <= len(cameras):
        found = "doesn't say" if predicted is None else f"says, but {history} of {len(cameras)} frames are settled"
        raise ValueError(f"can't follow an estimator to where it saw the frames: it {found}")
    measured = slice(0, len(cameras) if history == 1 else history)
    real, seen = (float(c.centers[measured].diff(dim=0).norm(dim=1).sum()) for c in (cameras, predicted))
    scale = real / seen if seen > 1e-8 else 1.0
    w2c = predicted.w2c.to(cameras.w2c).clone()
    w2c[:, :3, 3] *= scale
    anchor = history - 1
    return replace(cameras, w2c=w2c @ torch.linalg.inv(w2c[anchor]) @ cameras.w2c[anchor]), depth * scale


def single_depth(depth: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Depth (h, w) of the photo at its size (H, W) as the reference keeps it, and which pixels (H, W) are surfaces."""
    depth = torch.nan_to_num(stretched(depth[None], size)[0], nan=FAR, posinf=FAR, neginf=0.0).clamp(0, FAR)
    return depth, depth < UNUSABLE


def shown_as_reliable(depth: Tensor) -> Tensor:
    """Pixels (F, H, W) of new depth that the reference shows as reliable; it uses the others all the same."""
    return torch.stack([reliable(d, RECONSIDERED) for d in depth])
