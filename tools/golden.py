"""Compares the project with a folder of golden numbers: `python tools/golden.py DIR`.

DIR has any of model/, arloop/, traj/, gsrecon/. Every case, size and seed comes from its files. One line per
check, a last line with the counts, exit status 1 if any check failed. A new kind of file needs one generator of
checks, under its name in CHECKS.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lyra_core import camera_files, camera_path, presets, trajectory  # noqa: E402
from lyra_core.camera import Cameras, quaternion_to_rotation, unproject  # noqa: E402
from lyra_core.correspondence import canonical_coordinates  # noqa: E402
from lyra_core.memory import STRIDE, TOLERANCE, Keyframe, retrieve  # noqa: E402
from lyra_core.warp import FAR, Warp, lift, merge, reliable, splat  # noqa: E402

FOLDERS = ("model", "arloop", "traj", "gsrecon")
SUFFIXES = (".json", ".npz", ".safetensors")
CAMERA_LIMIT = 1e-5  # relative; presets, zoom, custom trajectories
LOADED_LIMIT = 1e-6  # relative; the example's trajectory
PATH_LIMIT = 1e-4  # camera paths
GROUND_DEGREES = 6.0  # two random plane fits of the same noisy points
POINT_LIMIT = 1e-5  # relative; world points
PIXEL_LIMIT = 1e-4  # absolute; a warped value that is farther off makes its pixel count as wrong
WRONG_PIXELS = 1e-3  # share of pixels that may be wrong: a coordinate on a pixel border falls to either side


@dataclass(frozen=True)
class Check:
    """One comparison, or the reason why there is none."""

    case: str
    metric: str = ""
    value: float = 0.0
    limit: float = 0.0
    skip: str = ""

    @property
    def ok(self) -> bool:
        return self.value <= self.limit  # NaN is not

    def __str__(self) -> str:
        if self.skip:
            return f"{self.case} - - - skip:{self.skip}"
        return f"{self.case} {self.metric} {self.value:.3g} {self.limit:.3g} {'ok' if self.ok else 'FAIL'}"


@dataclass(frozen=True)
class Golden:
    """The files of one name in one folder: what .json, .npz and .safetensors share."""

    folder: Path
    name: str

    @property
    def json(self) -> object:
        return json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))

    @property
    def arrays(self) -> dict[str, Tensor]:
        """Everything in the npz; 0-d arrays too."""
        with np.load(self.folder / f"{self.name}.npz", allow_pickle=False) as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files}


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def wrong_pixels(found: Tensor, expected: Tensor) -> float:
    """Share of pixels (F, C, H, W) that are off by more than PIXEL_LIMIT in any channel; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    right = (found.float() - expected.float()).abs() <= PIXEL_LIMIT  # NaN is not
    return float((~right).any(1).float().mean())


def degrees_between(a: Tensor, b: Tensor) -> float:
    return math.degrees(math.acos(float((a.double() @ b.double()) / a.double().norm() / b.double().norm())))


# ------------------------------------------------------------------------------------------------------------ traj


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
            # the reference returns too short a trajectory in silence and takes sizeless intrinsics as they are
            cameras = camera_files.load_npz(
                file, min(case["num_frames"], case["n_out"]), case["pose_scale"], target, stored_size=target
            )
        for key, found in (("w2c", cameras.w2c), ("K", cameras.K)):
            yield Check(str(case["id"]), key, relative(found, arrays[f"{case['id']}|{key}"]), CAMERA_LIMIT)


def check_captions(golden: Golden) -> Iterator[Check]:
    for i, case in enumerate(golden.json):
        captions = camera_files.load_captions(json.dumps({str(key): str(key) for key in case["keys"]}))
        wrong = sum(
            camera_files.caption_for_chunk(captions, c, case["num_frames"], chunk["n"]) != str(chunk["caption_key"])
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
        for case in Golden(golden.folder, "campath_eval").json
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


# ---------------------------------------------------------------------------------------------------------- arloop


def check_warp(golden: Golden) -> Iterator[Check]:
    arrays, names = golden.arrays, golden.json["targets"]
    size = tuple(arrays["src_depth"].shape)
    targets = Cameras(arrays["tgt_w2c"], arrays["tgt_K"], size)

    def lifted(view: str, features: Tensor | None = None):
        camera = Cameras(arrays[f"{view}_w2c"][None], arrays["K"][None], size)
        return lift(
            arrays[f"{view}_depth"], camera, arrays[f"{view}_rgb"].movedim(0, -1) if features is None else features
        )

    def compare(case: str, warp: Warp, keys: tuple[str, str, str]) -> Iterator[Check]:
        found = (_picture(warp), warp.depth[:, None], warp.seen[:, None])
        for key, values in zip(keys, found, strict=True):
            if key in arrays:
                yield Check(case, key, wrong_pixels(values, arrays[key].view(values.shape)), WRONG_PIXELS)

    known = torch.isfinite(arrays["src_depth"]) & (arrays["src_depth"] > 0)
    points = unproject(arrays["src_depth"][None], Cameras(arrays["src_w2c"][None], arrays["K"][None], size))[0]
    yield Check("unproject", "world_points", relative(points[known], arrays["world_points"][known]), POINT_LIMIT)
    for key in (key for key in arrays if key.startswith("reliable_mask_")):
        threshold = float(key.rpartition("_")[2].replace("p", "."))
        found = reliable(torch.nan_to_num(arrays["src_depth"], nan=FAR).clamp(0, FAR), threshold)
        masks = [(mask & known)[None, None] for mask in (found, arrays[key] > 0.5)]
        yield Check("reliable", key, wrong_pixels(*masks), WRONG_PIXELS)
    for key in (key for key in arrays if key.startswith("canonical_coords_slot")):
        coordinates = canonical_coordinates(size, int(key.removeprefix("canonical_coords_slot")))
        yield Check("canonical", key, relative(coordinates.movedim(-1, 0), arrays[key]), POINT_LIMIT)
        warp = splat(lifted("src", coordinates), targets, len(targets))
        yield from compare("batch", warp, ("coord_warp_batch", "", ""))
    for case, batch in (("batch", len(targets)), ("single", 1)):
        warp = splat(lifted("src"), targets, batch)
        yield from compare(case, warp, (f"rgb_warp_{case}", f"depth_warp_{case}", f"mask_{case}"))
    if "right" not in names:
        yield Check("two_view", skip="the file doesn't say which of its targets the two views were warped into")
        return
    warp = splat(merge(lifted("src"), lifted("src2")), targets[names.index("right")])
    yield from compare("two_view", warp, ("two_view_rgb", "two_view_depth", "two_view_mask"))


def _picture(warp: Warp) -> Tensor:
    """(F, C, H, W) as the reference's pictures: holes and the lower bound are -1."""
    return torch.where(warp.seen[..., None], warp.features.clamp(-1, 1), -1.0).movedim(-1, 1)


def check_retrieval(golden: Golden) -> Iterator[Check]:
    arrays = golden.arrays
    w2c = arrays["w2c"]
    cameras = Cameras(w2c, arrays["K"].expand(len(w2c), 3, 3), tuple(arrays["hw"].tolist()))
    stored = {
        frame: Keyframe(frame, depth, cameras[frame])
        for frame, depth in zip(arrays["frame_ids"].tolist(), arrays["depth"], strict=True)
    }
    for key in (key for key in arrays if re.fullmatch(r"cache_world_points_idx\d+", key)):
        keyframe = list(stored.values())[int(key.removeprefix("cache_world_points_idx"))]
        depth = keyframe.depth[::STRIDE, ::STRIDE]
        points = torch.where(depth[..., None] > 0, unproject(depth[None], keyframe.camera.subsampled(STRIDE))[0], 0.0)
        yield Check(key, "world_points", relative(points, arrays[key]), POINT_LIMIT)
    for i, case in enumerate(golden.json):
        name, options = f"{i}:{case['tag']}", case["kwargs"]
        unknown = sorted(set(case["cache_frame_ids"]) - stored.keys())
        if unknown or options.get("random"):
            yield Check(
                name, skip=f"the files don't say which stored entries {unknown} copy" if unknown else "a random choice"
            )
            continue
        found = retrieve(
            [stored[frame] for frame in case["cache_frame_ids"]],
            cameras[case["target_frames"]],
            options["num_latents"],
            tolerance=options.get("depth_threshold", TOLERANCE),
            skip_last=options.get("skip_last_n", 0),
            unknown_at_origin=True,
            by="coverage" if options.get("max_coverage", True) else "ownership",
        )
        expected = [frame for _, frame in case["result_latent_frame_ids"]]
        wrong = sum(a != b for a, b in zip_longest(found, expected))
        yield Check(name, "wrong_ids", wrong, 0)


def check_loaded_trajectory(golden: Golden) -> Iterator[Check]:
    arrays, record = golden.arrays, golden.json
    source = golden.folder.parent.parent / "inputs" / record["source"] / "trajectory.npz"
    for i, case in enumerate(record["configs"]):
        if not source.exists():
            yield Check(str(i), skip=f"no inputs/{record['source']}/trajectory.npz beside the golden folder")
            continue
        cameras = camera_files.load_npz(source, case["num_frames"], case["pose_scale"], tuple(case["target_hw"]))
        for key, found in (("w2c", cameras.w2c), ("K", cameras.K)):
            yield Check(str(i), key, relative(found, arrays[f"{key}_{i}"]), LOADED_LIMIT)


def check_preset_files(golden: Golden) -> Iterator[Check]:
    arrays, record = golden.arrays, golden.json
    start = Cameras(arrays["initial_w2c"][None], arrays["K"][None], (480, 832))
    for name in (key.removesuffix("_w2c") for key in arrays if "__" in key and key.endswith("_w2c")):
        which, _, direction = name.partition("__")
        if "noise" in which and which != "rotate_spot_noise":
            yield Check(name, skip="its noise was drawn from an unknown seed")
            continue
        cameras = presets.preset(which, start, record["n"], record["center_depth"], direction, record["strength"])
        yield Check(name, "w2c", relative(cameras.w2c, arrays[f"{name}_w2c"]), CAMERA_LIMIT)
        if f"{name}_K" in arrays:
            yield Check(name, "K", relative(cameras.K, arrays[f"{name}_K"]), CAMERA_LIMIT)
    for name in record["errors"]:
        yield Check(name, skip="the reference crashes on it")
    before = Cameras(arrays["zoomout_w2c"], start.K.repeat(len(arrays["zoomout_w2c"]), 1, 1), start.size)
    after = trajectory.along_ground(before, arrays["ground_normal"])
    expected = arrays["zoomout_ground_parallel"]
    yield Check("zoomout_ground_parallel", "w2c", relative(after.w2c, expected), CAMERA_LIMIT)


# ------------------------------------------------------------------------------------------------------------- all

CHECKS: dict[tuple[str, str], Callable[[Golden], Iterator[Check]]] = {
    ("traj", "presets"): check_presets,
    ("traj", "zoom"): check_zoom,
    ("traj", "ground"): check_ground,
    ("traj", "custom"): check_custom,
    ("traj", "captions"): check_captions,
    ("traj", "campath_eval"): check_path_evaluation,
    ("traj", "campath_sampled"): check_path_samples,
    ("traj", "campath_saved_by_reference"): check_saved_path,
    ("arloop", "a_forward_warp"): check_warp,
    ("arloop", "b_retrieval"): check_retrieval,
    ("arloop", "f_trajectory"): check_loaded_trajectory,
    ("arloop", "i_camera_traj"): check_preset_files,
}


def checks_of(golden: Golden) -> Iterator[Check]:
    """All checks of one file; a file that can't be read or makes the product raise is one failed check more."""
    check = CHECKS.get((golden.folder.name, golden.name))
    if check is None:
        yield Check("*", skip="no check yet")
        return
    try:
        yield from check(golden)
    except Exception as error:  # the rest of the files still wants to be compared
        message = " ".join(f"{type(error).__name__}: {error}".split())
        yield Check("*", f"raised[{message}]", math.inf, 0)


def main(root: Path) -> int:
    ok = failed = skipped = 0
    for folder in (root / name for name in FOLDERS if (root / name).is_dir()):
        for name in sorted({file.stem for file in folder.iterdir() if file.suffix in SUFFIXES}):
            for check in checks_of(Golden(folder, name)):
                print(f"{folder.name}/{name} {check}")
                skipped += bool(check.skip)
                ok += not check.skip and check.ok
                failed += not check.skip and not check.ok
    print(f"{ok} ok, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"usage: python tools/golden.py DIR, a folder with any of {', '.join(FOLDERS)}")
    sys.exit(main(Path(sys.argv[1])))
