"""Presets, zoom, custom trajectories, captions and camera paths."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lyra_core.cameras import camera_files, camera_path, captions, presets, trajectory
from lyra_core.cameras.camera import Cameras, quaternion_to_rotation, rescaled_as_reference

from . import Check, Golden, relative

CAMERA_LIMIT = 1e-5  # relative; presets, zoom, custom trajectories
PATH_LIMIT = 1e-4  # camera paths
GROUND_DEGREES = 6.0  # two random plane fits of the same noisy points


def degrees_between(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(float((a.double() @ b.double()) / a.double().norm() / b.double().norm())))


def check_presets(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    K = torch.tensor([[700, 0, 416], [0, 701, 240], [0, 0, 1]], dtype=torch.float32)  # from golden/README.md
    for case in golden.json:
        if not case["finite"]:
            yield Check(case["key"], skip="the reference's own numbers are not finite")
            continue
        start = Cameras(torch.tensor(case["initial_w2c"])[None], K[None], (480, 832))
        generator = None if case["seed"] is None else torch.Generator().manual_seed(case["seed"])
        cameras = presets.preset(
            case["trajectory"],
            start,
            case["video_len"],
            case["center_depth"],
            case["direction"],
            case["strength"],
            generator,
        )
        yield Check(case["key"], "w2c", relative(cameras.w2c, arrays[f"{case['key']}|w2c"]), CAMERA_LIMIT)
        expected_K = arrays.get(f"{case['key']}|K", K.expand(case["n_out"], 3, 3))
        yield Check(case["key"], "K", relative(cameras.K, expected_K), CAMERA_LIMIT)


def check_zoom(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    for case in golden.json:
        depth = arrays[f"{case['case']}|depth"]
        start = Cameras(torch.eye(4)[None], arrays["K"][None], tuple(depth.shape))
        normal = None if case["ground_normal"] is None else torch.tensor(case["ground_normal"])
        cameras = trajectory.zoom(
            start,
            depth,
            case["direction"],
            case["strength"],
            case["N"],
            case["upward_ratio"],
            normal,
            case["upward_shift"],
            case["trajectory"],
        )
        yield Check(
            case["key"], "center_depth", abs(trajectory.center_depth(depth) / case["center_depth"] - 1), CAMERA_LIMIT
        )
        yield Check(case["key"], "w2c", relative(cameras.w2c, arrays[f"{case['key']}|w2c"]), CAMERA_LIMIT)
        yield Check(
            case["key"], "end_center", relative(cameras.centers[-1], torch.tensor(case["end_center"])), CAMERA_LIMIT
        )


def check_ground(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    known = arrays["mask"] > 0.5
    normal = trajectory.ground_normal(arrays["depth"], arrays["K"], valid=known)
    for key in ("ref_normal", "true_normal"):
        value = math.inf if normal is None else degrees_between(normal, arrays[key])
        yield Check(key, "degrees", value, GROUND_DEGREES)
    found = trajectory.ground_normal(arrays["depth"], arrays["K"], valid=torch.zeros_like(known)) is None
    yield Check("empty_is_none", "wrong", float(found != bool(arrays["empty_is_none"])), 0)


def check_custom(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    for case in golden.json:
        stored = (case["image_height"], case["image_width"])
        target = case["target_hw"] and tuple(case["target_hw"])
        contents = {key: arrays[key].numpy() for key in ("w2c", "intrinsics")}
        if None not in stored:
            contents |= {"image_height": np.array(stored[0]), "image_width": np.array(stored[1])}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trajectory.npz"
            np.savez(file, **contents)
            # the reference returns too short a trajectory in silence, takes sizeless intrinsics as they are, and those of
            # another size too, which `load_npz` refuses
            found = camera_files.read_npz(file, stored_size=target).first(min(case["num_frames"], case["n_out"]))
        cameras = Cameras(found.w2c.float(), found.K.float(), found.sizes[0])
        cameras = trajectory.scale(cameras, case["pose_scale"], about="origin")
        cameras = rescaled_as_reference(cameras, target) if target else cameras
        for key, found in (("w2c", cameras.w2c), ("K", cameras.K)):
            yield Check(str(case["id"]), key, relative(found, arrays[f"{case['id']}|{key}"]), CAMERA_LIMIT)


def check_captions(golden: Golden) -> Iterator[Check]:
    for i, case in enumerate(golden.json):
        texts = captions.parse_captions(json.dumps({str(key): str(key) for key in case["keys"]}))
        wrong = sum(
            captions.caption_for_chunk(texts, c, case["num_frames"], chunk["n"]) != str(chunk["caption_key"])
            for c, chunk in enumerate(case["chunks"])
        )
        yield Check(str(i), "wrong_captions", wrong, 0)


def _path_of(case: dict) -> camera_path.CameraPath:
    keys = tuple(
        camera_path.PathKey(torch.tensor(key["c2w"])[:3], key["fov"], key["timestamp"]) for key in case["keyframes"]
    )
    path = camera_path.CameraPath(keys, case["spline_order"], case["loop"])
    return camera_path.spaced(path, case["equidistant"]) if case["equidistant"] else path


def check_path_evaluation(golden: Golden) -> Iterator[Check]:
    for case in golden.json:
        path, samples = _path_of(case["input"]), case["output"]["samples"]
        c2w, fov = camera_path.evaluate(path, torch.tensor(case["input"]["t"], dtype=torch.float64))
        expected = torch.tensor([sample["c2w"] for sample in samples]).view(-1, 3, 4)
        name = case["input"]["id"]
        yield Check(
            name,
            "timestamps",
            relative(torch.tensor([key.timestamp for key in path.keys]), torch.tensor(case["output"]["timestamps"])),
            PATH_LIMIT,
        )
        yield Check(name, "c2w", relative(c2w[:, :3], expected), PATH_LIMIT)
        yield Check(name, "fov", relative(fov, torch.tensor([sample["fov"] for sample in samples])), PATH_LIMIT)


def check_path_samples(golden: Golden) -> Iterator[Check]:
    """A name holds a path of campath_eval, the frames, how often the ends repeat; that of focal the height too."""
    arrays = golden.arrays
    paths = {
        case["input"]["id"].split("|")[0]: case["input"]
        for case in golden.beside("campath_eval").json
        if case["input"]["spline_order"] == 3 and not case["input"]["loop"]
    }
    for name in dict.fromkeys(key.rpartition("|")[0] for key in arrays):
        base, frames, holds = name.split("|")
        if base not in paths:
            yield Check(name, skip=f"campath_eval.json has no open cubic path {base}")
            continue
        path, frames, holds = _path_of(paths[base]), int(frames[1:]), int(holds.removeprefix("dup"))
        times = camera_path.resample(camera_path.held(path, holds), frames, "arc length")
        yield Check(name, "ts", relative(times, arrays[f"{name}|ts"]), PATH_LIMIT)
        for key in (key for key in arrays if key.startswith(f"{name}|focal")):
            height = int(key.rpartition("focal")[2])
            cameras = camera_path.path_cameras(path, (height, 2 * height), frames, "arc length", holds=holds)
            yield Check(name, "c2w", relative(cameras.c2w[:, :3], arrays[f"{name}|c2w"]), PATH_LIMIT)
            yield Check(name, "fov", relative(cameras.fov.rad2deg(), arrays[f"{name}|fov"]), PATH_LIMIT)
            yield Check(name, "focal", relative(cameras.K[:, 1, 1], arrays[key]), PATH_LIMIT)


def check_saved_path(golden: Golden) -> Iterator[Check]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "path.json"
        camera_files.save_camera_path(file, camera_files.load_camera_path(golden.folder / f"{golden.name}.json"))
        found, expected = json.loads(file.read_text(encoding="utf-8")), golden.json
    for key in sorted(expected.keys() - {"path"}):
        yield Check(key, "difference", abs(float(found[key]) - float(expected[key])), PATH_LIMIT)
    for key in ("T", "fov", "timestamp", "up_dir"):
        columns = [torch.tensor([keyframe[key] for keyframe in record["path"]]) for record in (found, expected)]
        yield Check(f"path.{key}", "relative", relative(*columns), PATH_LIMIT)
    # q and -q are one rotation
    turns = [
        quaternion_to_rotation(torch.tensor([keyframe["R"] for keyframe in record["path"]]).roll(1, 1))
        for record in (found, expected)
    ]
    yield Check("path.R", "relative", relative(*turns), PATH_LIMIT)


CHECKS = {
    "presets": check_presets,
    "zoom": check_zoom,
    "ground": check_ground,
    "custom": check_custom,
    "captions": check_captions,
    "campath_eval": check_path_evaluation,
    "campath_sampled": check_path_samples,
    "campath_saved_by_reference": check_saved_path,
}


def check_for(golden: Golden):
    return CHECKS.get(golden.name)
