"""From a network's views to gaussians in the world: adapter, alignment, chunks, ownership."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lyra_core.cameras.camera import Cameras, from_corner_origin
from lyra_core.splats import alignment, gaussian_adapter, reconstruct
from lyra_core.splats.gaussians import Gaussians

from . import Check, Golden, furthest, gsrecon_network, relative
from .ply import check_ply

LIMIT = 1e-5  # relative to the largest value
ANY_SIZE = (1, 1)  # of pictures where only the poses count


def cameras_of(w2c: Tensor, K: Tensor | None = None, size: tuple[int, int] = ANY_SIZE) -> Cameras:
    """Cameras of w2c (F, 3 or 4, 4) and the reference's K, whose top-left pixel is centred on (0.5, 0.5)."""
    last = torch.eye(4).to(w2c)[3:].expand(len(w2c), 1, 4)
    K = torch.eye(3).to(w2c).repeat(len(w2c), 1, 1) if K is None else from_corner_origin(K)
    return Cameras(torch.cat([w2c[:, :3], last], 1), K, size)


def check_normalize(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    for key in (key for key in arrays if key.startswith("w2c")):
        found = alignment.seen_from_first(cameras_of(arrays[key][0])).w2c
        yield Check(key, "w2c", relative(found, arrays[key.replace("w2c", "out")][0]), LIMIT)


def check_similarity(case: str, found: alignment.Similarity, prefix: str, arrays: dict[str, Tensor]) -> Iterator[Check]:
    pairs = {"r": found.R, "t": found.t, "s": torch.tensor(found.scale, dtype=torch.float64)}
    for name, value in pairs.items():
        yield Check(case, name, relative(value, arrays[f"{prefix}_{name}"]), LIMIT)


def check_pose_tools(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    predicted, given = cameras_of(arrays["pred_w2c"], arrays["key_K"]), cameras_of(arrays["input_w2c"])
    found = alignment.align(given, predicted, "centers")
    yield from check_similarity("umeyama", found, "umeyama", arrays)
    aligned = found.inverse.cameras(predicted)
    yield Check("aligned", "w2c", relative(aligned.w2c, arrays["aligned_w2c"]), LIMIT)
    dense = alignment.on_all_frames(aligned, arrays["key_idx"].tolist(), len(arrays["dense_w2c"]))
    yield Check("dense", "w2c", relative(dense.w2c, arrays["dense_w2c"]), LIMIT)
    yield Check("dense", "K", relative(dense.K, from_corner_origin(arrays["dense_K"])), LIMIT)
    for key in (key for key in arrays if key.startswith("subsample_")):
        total, most = map(int, key.split("_")[1:])
        yield Check(key, "wrong_frames", alignment.evenly(0, total - 1, most) != arrays[key].tolist(), 0)


def check_gaussians(found: Gaussians, arrays: dict[str, Tensor]) -> Iterator[Check]:
    values = {
        "means": found.means,
        "scales": found.scales,
        "rotations": found.quats,
        "harmonics": found.sh.mT,
        "opacities": found.opacities,
    }
    for key, value in values.items():
        yield Check("*", key, relative(value, arrays[key][0]), LIMIT)


def check_opacity(golden: Golden) -> Iterator[Check]:
    density = golden.arrays["pdf"][None, None]
    raw = torch.zeros(*density.shape, sum(gaussian_adapter.CHANNELS))
    view = cameras_of(torch.eye(4)[None], torch.eye(3)[None], tuple(density.shape[1:]))
    found = gaussian_adapter.from_head(raw, density, torch.ones_like(density), view).opacities
    yield Check("*", "opacity", furthest(found, golden.arrays["opacity"]), LIMIT)


def check_adapter(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    raw = arrays["raw"][0]
    view = cameras_of(arrays["w2c"][0], arrays["K"][0], tuple(raw.shape[1:3]))
    largest = gaussian_adapter.LARGEST * float(arrays["mult"])
    found = gaussian_adapter.from_head(raw, arrays["opacity"][0], arrays["depth"][0], view, largest=largest)
    yield from check_gaussians(found, arrays)


def check_post(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    size = int(arrays["H"]), int(arrays["W"])
    predicted = cameras_of(arrays["pred_w2c34"], arrays["pred_K"], size)
    given = cameras_of(arrays["input_w2c"], arrays["input_K"], size) if arrays["have_input"] else None
    found, _ = alignment.in_world(
        arrays["raw"][0],
        arrays["conf"][0],
        arrays["depth"][0],
        predicted,
        given,
        alignment.align(given, predicted, "centers") if given else None,
        "predicted" if arrays["use_aligned_pred_cam"] else "given",
    )
    yield from check_gaussians(found, arrays)


def check_moved_gaussians(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    means, scales, quats = (arrays[key][0] for key in ("means", "scales", "rotations"))
    before = Gaussians(means, quats, scales, torch.ones(len(means)), torch.zeros(len(means), 1, 3))
    found = alignment.Similarity(float(arrays["s"]), arrays["r"], arrays["t"]).gaussians(before)
    for key, value in (("means", found.means), ("scales", found.scales), ("rotations", found.quats)):
        yield Check("*", key, relative(value, arrays[f"out_{key}"][0]), LIMIT)


def check_chunk_sampling(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    for kind in ("uniform", "split"):
        sampled, chunks = arrays[f"{kind}_sampled"], arrays[f"{kind}_chunks"]
        count, size = chunks.shape
        total, overlap = int(sampled[-1]) + 1, (count * size - len(sampled)) // (count - 1)
        if kind == "uniform":
            found = alignment.uniform_chunks(total, count, size, overlap)
        else:
            found = alignment.split_chunks(total, arrays["split_frames"].tolist(), size, overlap)
        yield Check(kind, "wrong_chunks", found != chunks.tolist(), 0)
        yield Check(kind, "wrong_frames", sorted({f for chunk in found for f in chunk}) != sampled.tolist(), 0)


def check_chunk_fit(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    source, target, weights = (arrays[key] for key in ("src", "tgt", "weights"))
    cameras, settled = cameras_of(arrays["src_w2c"]), cameras_of(arrays["tgt_w2c"])
    yield from check_similarity("points", alignment.fit_points(source, target, weights), "plain", arrays)
    fit = alignment.fit_chunk(source, target, weights, cameras, settled, "centers")
    yield from check_similarity("joint", fit, "joint", arrays)
    moved = fit.cameras(cameras)
    errors = (fit.points(source.double()) - target).norm(dim=1)[weights > 0]
    found = {
        "err_mean": errors.mean(),
        "err_p95": errors.quantile(0.95),
        "camera_err_mean": (moved.centers - settled.centers).norm(dim=1).mean(),
    }
    for key, value in found.items():
        yield Check("joint", key, furthest(value, arrays[key]), LIMIT)
    yield Check("joint", "w2c", relative(moved.w2c, arrays["w2c_applied"]), LIMIT)
    yield Check("weights", "*", relative(alignment.inverse_depth_weights(arrays["z"]), arrays["inv_depth_weights"]), LIMIT)


def check_ownership(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    size = int(arrays["image_h"]), int(arrays["image_w"])
    chunks = [cameras_of(w2c, K, size) for w2c, K in zip(arrays["w2c"], arrays["K"], strict=True)]
    for owner, mask in enumerate(arrays["masks"]):
        found = alignment.owned(arrays["pos"], owner, chunks, float(arrays["max_diff_m"]))
        yield Check(str(owner), "wrong_gaussians", float((found != mask).sum()), 0)


def check_metres(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    depth, confidence, metric, sky = (arrays[key][0] for key in ("depth", "depth_conf", "metric_depth_raw", "sky"))
    cameras = cameras_of(arrays["w2c34"][0], arrays["K"][0], tuple(depth.shape[1:]))
    found, scale = reconstruct.in_metres(reconstruct.Views(depth, confidence, cameras), metric, sky)
    for key, value, expected in (
        ("depth", found.depth, arrays["out_depth"][0]),
        ("confidence", found.confidence, arrays["out_conf"][0]),
        ("w2c", found.cameras.w2c[:, :3], arrays["out_w2c34"][0]),
        ("scale", torch.tensor(scale, dtype=torch.float64), arrays["scale_factor"]),
    ):
        yield Check("*", key, relative(value, expected), LIMIT)


CHECKS = {
    "normalize_extrinsics": check_normalize,
    "pose_tools": check_pose_tools,
    "map_pdf_to_opacity": check_opacity,
    "gs_adapter": check_adapter,
    "gs_post": check_post,
    "sim3_gaussians": check_moved_gaussians,
    "chunk_sampling": check_chunk_sampling,
    "chunk_sim3": check_chunk_fit,
    "ownership": check_ownership,
    "nested_metric": check_metres,
    "ply": check_ply,
    **gsrecon_network.CHECKS,
}


def check_for(golden: Golden) -> Callable[[Golden], Iterator[Check]] | None:
    """By how the name begins."""
    return next((check for name, check in CHECKS.items() if golden.name.startswith(name)), None)
