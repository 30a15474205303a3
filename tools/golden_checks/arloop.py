"""The pieces of the generation loop: warp, retrieval, rays, layouts, schedules, trajectories."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import zip_longest
from types import SimpleNamespace

import torch
from torch import Tensor

from lyra_core.cameras import camera_files, presets, trajectory
from lyra_core.cameras.camera import Cameras, rescaled_as_reference, unproject
from lyra_core.conditioning import schedules
from lyra_core.conditioning.correspondence import canonical_coordinates, on_latents, ray_maps
from lyra_core.conditioning.framepack import FramePackLayout, temporal_latents
from lyra_core.memory.retrieval import STRIDE, TOLERANCE, Keyframe, retrieve
from lyra_core.memory.warp import FAR, Warp, lift, merge, reliable, splat

from . import Check, Golden, furthest, relative
from .traj import CAMERA_LIMIT

LOADED_LIMIT = 1e-6  # relative; the example's trajectory
POINT_LIMIT = 1e-5  # relative; world points, rays
PIXEL_LIMIT = 1e-4  # absolute; a warped value that is farther off makes its pixel count as wrong
WRONG_PIXELS = 1e-3  # share of pixels that may be wrong: a coordinate on a pixel border falls to either side
SIGMA_LIMIT = 1e-7  # absolute
SOLVED_LIMIT = 1e-5  # absolute; samples after each step of a solver


def wrong_pixels(found: Tensor, expected: Tensor) -> float:
    """Share of pixels (F, C, H, W) that are off by more than PIXEL_LIMIT in any channel; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    right = (found.float() - expected.float()).abs() <= PIXEL_LIMIT  # NaN is not
    return float((~right).any(1).float().mean())


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
        cameras = camera_files.load_npz(source, case["num_frames"], case["pose_scale"])
        cameras = rescaled_as_reference(cameras, tuple(case["target_hw"]))
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


def check_rays(golden: Golden) -> Iterator[Check]:
    from lyra_core.models.lyra2 import unshuffle

    arrays = golden.arrays
    size = tuple(arrays["plucker_BTHW6"].shape[2:4])
    cameras = Cameras(arrays["w2c"], arrays["K"], size)
    reference = cameras[int(arrays["ref_index"])]
    maps = ray_maps(cameras, reference)
    found = {
        "c2w_rel": (reference.w2c @ cameras.c2w)[None],
        "plucker_BTHW6": maps.movedim(0, -1)[None],
        "plucker_latent_384": on_latents(maps)[None],
        "camera_tokens_1536_5d": unshuffle(on_latents(maps)[None]),
    }
    for key, value in found.items():
        yield Check("*", key, furthest(value, arrays[key]), POINT_LIMIT)


def check_framepack(golden: Golden) -> Iterator[Check]:
    record = golden.json
    for spec, expected in record["specs"].items():
        layout = FramePackLayout.parse(spec)
        letters = {"temporal": "k", "spatial": "s"}
        found = {
            "splits": [s.slots for s in layout.segments],
            "kernel_sizes": [s.kernel for s in layout.segments],
            "kernel_types": [letters[s.source] for s in layout.segments],
            "new_latent": layout.new_latents,
            "n_temporal": layout.slots("temporal"),
            "n_spatial": layout.slots("spatial"),
            "n_history": layout.slots(),
            "total": layout.slots() + layout.new_latents,
            "new_video_frames": layout.new_frames,
            "spatial_positions": layout.positions("spatial"),
            "kernel_ids": [*range(len(layout.segments)), -1],
            "split_list": [*(s.slots for s in layout.segments), layout.new_latents],
        }
        wrong = sum(found.get(key) != value for key, value in expected.items())
        yield Check(spec, "wrong_fields", wrong + (str(layout) != spec), 0)
    layout = FramePackLayout.parse(record["spec"])
    for case in record["layouts"]:
        history, expected = case["T_hist_total_latents"], case["selected_idx_hist"]
        try:
            found = temporal_latents(layout, history)
        except ValueError:
            found = None  # where the reference runs out of latents and raises IndexError
        raised = isinstance(expected, str)
        yield Check(f"{history}_latents", "wrong_slots", float(found != (None if raised else expected)), 0)


def check_schedules(golden: Golden) -> Iterator[Check]:
    from comfy.k_diffusion.sampling import sample_lcm
    from comfy.model_sampling import CONST

    from lyra_core.models.sampling import sample_unipc

    arrays, record = golden.arrays, golden.json

    def denoiser(time_of):
        """The toy model of the JSON: its velocity at the time that the network would be told."""

        def denoised(x: Tensor, sigma: Tensor, **_options) -> Tensor:
            s = time_of(sigma)[0] / 1000
            velocity = 0.8 * (1.7 * x).tanh() + 0.3 * (5 * s).sin() * (2 * x).cos() - 0.2 * x**2 * s
            return x - sigma[0] * velocity

        return denoised

    for case in record["unipc"]:
        name = f"n{case['steps']}_shift{case['shift']:g}"
        sigmas, walked = schedules.full(case["steps"], case["shift"]), []
        wrong = (schedules.timesteps(sigmas[:-1]) != arrays[f"{name}_timesteps"]).sum()
        yield Check(name, "wrong_timesteps", float(wrong), 0)
        yield Check(name, "sigmas", furthest(sigmas, arrays[f"{name}_sigmas"]), SIGMA_LIMIT)
        model, options = denoiser(schedules.timesteps), {"model_options": {}}
        out = sample_unipc(model, arrays["x_init"], sigmas, options, lambda step, to=walked: to.append(step["x"]), True)
        yield Check(name, "samples", furthest(torch.stack([*walked[1:], out]), arrays[f"{name}_traj"]), SOLVED_LIMIT)
    sigmas, walked, noises = schedules.dmd(), [], iter(arrays["dmd_noise"])
    yield Check("dmd", "sigmas", furthest(sigmas[:-1], arrays["dmd_sigmas"]), SIGMA_LIMIT)
    yield Check("dmd", "table", furthest(schedules.dmd_table(), arrays["dmd_all_sigmas"]), SIGMA_LIMIT)
    yield Check("dmd", "timesteps", furthest(sigmas[:-1] * 1000, arrays["dmd_timesteps"]), SIGMA_LIMIT * 1000)
    model = denoiser(lambda sigma: sigma * 1000)
    model.inner_model = SimpleNamespace(model_patcher=SimpleNamespace(get_model_object=lambda _name: CONST()))
    sample_lcm(
        model,
        arrays["x_init"],
        sigmas,
        {"seed": 0},
        lambda step: walked.append(step["denoised"]),
        True,
        noise_sampler=lambda *_sigmas: next(noises),
    )
    for i, found in enumerate(walked):
        yield Check("dmd", f"x0_{i}", furthest(found, arrays[f"dmd_x0_{i}"]), SOLVED_LIMIT)


def check_run(golden: Golden) -> Iterator[Check]:
    from .end_to_end import check_run  # imports the host

    return check_run(golden)


def check_depth_update(golden: Golden) -> Iterator[Check]:
    from .depth_update import check_depth_update

    return check_depth_update(golden)


def check_manifest(golden: Golden) -> list[Check]:
    return [Check("*", skip="read by the runs that use it")]


CHECKS = {
    "a_forward_warp": check_warp,
    "b_retrieval": check_retrieval,
    "c_plucker": check_rays,
    "d_framepack": check_framepack,
    "e_schedules": check_schedules,
    "f_trajectory": check_loaded_trajectory,
    "g_e2e_unipc": check_run,
    "g_e2e_dmd": check_run,
    "g_weight_manifest": check_manifest,
    "h_depth_update": check_depth_update,
    "i_camera_traj": check_preset_files,
}


def check_for(golden: Golden):
    return CHECKS.get(golden.name)
