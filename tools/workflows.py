#!/usr/bin/env python3
"""Writes workflows/*.json from the short descriptions below, with the node definitions of a running host.

    python tools/comfy.py workflows

The shipped files are what this writes; tests check them against the host. A node is (type, position, {widget: value},
{input: (node, output)}); widgets that are not named keep their default.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from host import TOOLS, load

PROJECT = TOOLS.parent
SIZE = {"width": 832, "height": 480}
ROOM = {
    "source": "room box",
    "source.vanishing_y": 0.55,
    "source.wall_left": 0.2,
    "source.wall_top": 0.1,
    "source.wall_right": 0.8,
    "source.wall_bottom": 0.72,
}

NOTE = """## {title}
No model files are needed: the geometry preview works from the photo and its depth alone. **Static scenes only.**

{files}

**Depth** (Lyra 2 Depth): fit the *room box* or the *ground* to your photo by eye and look at its picture output, or
choose *MoGe* / *Depth Anything 3* and connect the host's own nodes (their models go to `models/geometry_estimation`).

**Results** in the output folder: `lyra2/` video, splat (.ply), mesh (.glb) and cameras (.npz); `worlds/` the saved world, which
*Lyra 2 Load World* reopens. Run again after an interruption: finished chunks are not made again."""


def photo() -> dict:
    return {
        "photo": ("LoadImage", (0, 0), {"image": "photo.png"}, {}),
        "scaled": (
            "ImageScale",
            (300, 0),
            {"upscale_method": "lanczos", **SIZE, "crop": "disabled"},
            {"image": ("photo", 0)},
        ),
    }


def results(frames: tuple, splat_of: tuple, x: int, name: str) -> dict:
    return {
        "video": ("CreateVideo", (x, 0), {"fps": 16.0}, {"images": frames}),
        "save video": ("SaveVideo", (x + 300, 0), {"filename_prefix": f"lyra2/{name}"}, {"video": ("video", 0)}),
        "surface": ("Lyra2WorldMesh", (x, 980), {}, {"world": splat_of}),
        "save mesh": ("SaveGLB", (x + 300, 980), {"filename_prefix": f"lyra2/{name}"}, {"mesh": ("surface", 0)}),
        "gaussians": ("Lyra2WorldGaussians", (x, 460), {"stride": 1}, {"world": splat_of}),
        "ply": ("SplatToFile3D", (x + 300, 460), {"format": "ply"}, {"splat": ("gaussians", 0)}),
        "save splat": (
            "SaveGaussianSplat",
            (x + 600, 460),
            {"filename_prefix": f"lyra2/{name}"},
            {"model_3d": ("ply", 0)},
        ),
    }


def custom_trajectory() -> dict:
    files = (
        "**You bring** (into the input folder): a photo; a camera file (.npz with w2c, intrinsics, image_height, image_width; a camera-path "
        ".json; transforms.json; or a COLMAP text folder); optionally captions (.json: frame number to text)."
    )
    return {
        "note": (
            "MarkdownNote",
            (0, 420),
            {"": NOTE.format(title="Custom trajectory, geometry preview", files=files)},
            {},
        ),
        **photo(),
        "path": (
            "Lyra2LoadTrajectory",
            (300, 220),
            {"file": "trajectory.npz", "frames": 161, "pose_scale": 1.1, **SIZE, "captions": "none"},
            {},
        ),
        "depth": ("Lyra2Depth", (640, 0), ROOM, {"image": ("scaled", 0), "cameras": ("path", 0)}),
        "begin": (
            "Lyra2BeginWorld",
            (980, 0),
            {},
            {"image": ("scaled", 0), "depth": ("depth", 0), "cameras": ("path", 0)},
        ),
        "draw": ("Lyra2DrawTrajectory", (1300, 460), {}, {"cameras": ("path", 0), "world": ("begin", 0)}),
        "see path": ("PreviewImage", (1600, 700), {}, {"images": ("draw", 0)}),
        "walk": (
            "Lyra2PreviewChunks",
            (1300, 0),
            {"save_to": "worlds/custom_trajectory"},
            {"world": ("begin", 0), "cameras": ("path", 0), "captions": ("path", 1)},
        ),
        "frames": ("Lyra2WorldFrames", (1640, 0), {}, {"world": ("walk", 0)}),
        "save path": (
            "Lyra2SaveTrajectory",
            (1640, 260),
            {"filename_prefix": "lyra2/custom_cameras"},
            {"cameras": ("frames", 1)},
        ),
        **results(("frames", 0), ("walk", 0), 1980, "custom_trajectory"),
    }


def zoom() -> dict:
    return {
        "note": (
            "MarkdownNote",
            (0, 420),
            {
                "": NOTE.format(
                    title="Zoom in and out, geometry preview",
                    files="**You bring** (into the input folder): a photo.\n\nThe video starts far away, "
                    "moves in to the photo and on into it: the zoom out backwards, then the zoom in. The reference's 81 + 241 frames; each "
                    "zoom is a world of its own, begun from the same photo.",
                )
            },
            {},
        ),
        **photo(),
        "depth": ("Lyra2Depth", (640, 0), ROOM, {"image": ("scaled", 0)}),
        "begin": ("Lyra2BeginWorld", (980, 0), {}, {"image": ("scaled", 0), "depth": ("depth", 0)}),
        "path in": (
            "Lyra2ZoomTrajectory",
            (980, 220),
            {"direction": "in", "strength": 0.5, "frames": 81},
            {"depth": ("depth", 0)},
        ),
        "path out": (
            "Lyra2ZoomTrajectory",
            (980, 520),
            {"direction": "out", "strength": 1.5, "frames": 241, "upward_ratio": 0.15},
            {"depth": ("depth", 0)},
        ),
        "walk in": (
            "Lyra2PreviewChunks",
            (1300, 0),
            {"save_to": "worlds/zoom_in"},
            {"world": ("begin", 0), "cameras": ("path in", 0)},
        ),
        "walk out": (
            "Lyra2PreviewChunks",
            (1300, 320),
            {"save_to": "worlds/zoom_out"},
            {"world": ("begin", 0), "cameras": ("path out", 0)},
        ),
        "frames in": ("Lyra2WorldFrames", (1640, 0), {"first": 1}, {"world": ("walk in", 0)}),
        "frames out": ("Lyra2WorldFrames", (1640, 320), {"backwards": True}, {"world": ("walk out", 0)}),
        "all frames": (
            "BatchImagesNode",
            (1980, 200),
            {},
            {"images.image0": ("frames out", 0), "images.image1": ("frames in", 0)},
        ),
        "save path in": (
            "Lyra2SaveTrajectory",
            (1980, 720),
            {"filename_prefix": "lyra2/zoom_in_cameras"},
            {"cameras": ("frames in", 1)},
        ),
        "save path out": (
            "Lyra2SaveTrajectory",
            (2300, 720),
            {"filename_prefix": "lyra2/zoom_out_cameras"},
            {"cameras": ("path out", 0)},
        ),
        **results(("all frames", 0), ("walk out", 0), 2300, "zoom"),
    }


LYRA_NOTE = """## {title}
Lyra 2 paints every frame; the geometry only tells it what was where. **Static scenes only.**

{what}

**Files** (`python tools/comfy.py models` lists and downloads them, after you accepted their licences):
- `models/diffusion_models/lyra2.safetensors`: NVIDIA's Lyra 2.0 transformer, converted with *Lyra 2 Convert Checkpoint* or
  `python tools/comfy.py convert`. Research licence.
{lora}- `models/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors`, `models/vae/wan_2.1_vae.safetensors`,
  `models/clip_vision/clip_vision_h.safetensors` (Apache-2.0)
- `models/geometry_estimation/depth_anything_3_mono_large.safetensors` (Apache-2.0); any Depth Anything 3 or MoGe will do
{solver}
**Draft first**: set *Upscale Image* (and the size in *Lyra 2 Load Trajectory*) to half, or the steps to 10, and run the same
path and seed; or use *Lyra 2
Preview Chunks* in place of *Lyra 2 Explore*, which needs no weights at all.

**The world is saved** after every chunk under `worlds/` in the output folder. Running again after an interrupt, or with
more chunks, goes on from there. Another seed or prompt makes a branch beside it."""
DMD_LORA = "- `models/loras/lyra2_dmd_distillation.safetensors`: the DMD LoRA, converted. Research licence.\n"
SOLVER = "\nThe reference's solver needs `pip install diffusers` in ComfyUI's Python.\n"

NEGATIVE = (
    "blurry, low quality, jpeg artifacts, overexposed, static noise, watermark, text, people, moving objects, deformed"
)
# which of tools/models.py a loader's file is, for the host's missing-model dialog
FILES = {
    "CLIPLoader": "umt5-fp8",
    "CLIPVisionLoader": "clip-vision",
    "VAELoader": "wan-vae",
    "LoadDA3Model": "da3-mono",
}


def lyra_models() -> dict:
    """The loaders, below the photo."""
    return {
        "model": ("UNETLoader", (0, 900), {"unet_name": "lyra2.safetensors"}, {}),
        "text encoder": (
            "CLIPLoader",
            (0, 1060),
            {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"},
            {},
        ),
        "image encoder": ("CLIPVisionLoader", (300, 900), {"clip_name": "clip_vision_h.safetensors"}, {}),
        "vae": ("VAELoader", (300, 1000), {"vae_name": "wan_2.1_vae.safetensors"}, {}),
        "depth model": (
            "LoadDA3Model",
            (300, 1100),
            {"model_name": "depth_anything_3_mono_large.safetensors"},
            {},
        ),
        "geometry": ("DA3Inference", (640, 300), {}, {"da3_model": ("depth model", 0), "image": ("scaled", 0)}),
        "estimator": ("Lyra2DA3Estimator", (640, 1000), {}, {"da3_model": ("depth model", 0)}),
    }


def lyra_depth(**more: tuple) -> tuple:
    sources = {"image": ("scaled", 0), "source.da3_geometry": ("geometry", 0), **more}
    return ("Lyra2Depth", (640, 0), {"source": "Depth Anything 3"}, sources)


def explore(position: tuple, path: str, chunks: int, steps: int, distilled: bool, save_to: str, prompt, **more) -> tuple:
    quality = {"quality": "DMD", "quality.dmd_lora": "lyra2_dmd_distillation.safetensors"}
    quality = quality if distilled else {"quality": "full", "quality.steps": steps}
    values = {"chunks": chunks, "negative": NEGATIVE, "save_to": save_to, **quality}
    sources = {
        "world": ("begin", 0),
        "cameras": (path, 0),
        "model": ("model", 0),
        "clip": ("text encoder", 0),
        "clip_vision": ("image encoder", 0),
        "vae": ("vae", 0),
        "depth_estimator": ("estimator", 0),
    }
    if isinstance(prompt, str):
        values["prompt"] = prompt
    else:
        sources["prompt"] = prompt
    return ("Lyra2Explore", position, values, {**sources, **more})


def lyra_note(title: str, what: str, distilled: bool) -> dict:
    lora, solver = (DMD_LORA, "") if distilled else ("", SOLVER)
    return {"note": ("MarkdownNote", (0, 420), {"": LYRA_NOTE.format(title=title, what=what, lora=lora, solver=solver)}, {})}


PROMPT = "A quiet, sunlit room. The camera moves slowly and steadily; nothing in the scene moves. Describe your photo here."


def lyra_zoom(distilled: bool = False) -> dict:
    name = "lyra_zoom_dmd" if distilled else "lyra_zoom"
    what = (
        "**You bring** (into the input folder): a photo, and a prompt in both *Lyra 2 Explore* nodes.\n\nThe zoom out "
        "backwards, then the zoom in, as the reference joins them, without showing the photo twice."
    )
    return {
        **lyra_note("Zoom in and out" + (", four steps" if distilled else ""), what, distilled),
        **photo(),
        **lyra_models(),
        "depth": lyra_depth(),
        "begin": ("Lyra2BeginWorld", (980, 0), {}, {"image": ("scaled", 0), "depth": ("depth", 0)}),
        "path in": (
            "Lyra2ZoomTrajectory",
            (980, 220),
            {"direction": "in", "strength": 0.5, "frames": 81},
            {"depth": ("depth", 0)},
        ),
        "path out": (
            "Lyra2ZoomTrajectory",
            (980, 520),
            {"direction": "out", "strength": 1.5, "frames": 241, "upward_ratio": 0.15},
            {"depth": ("depth", 0)},
        ),
        "walk in": explore((1300, 0), "path in", 1, 50, distilled, f"worlds/{name}_in", PROMPT),
        "walk out": explore((1300, 600), "path out", 3, 50, distilled, f"worlds/{name}_out", PROMPT),
        "frames in": ("Lyra2WorldFrames", (1640, 0), {"first": 1}, {"world": ("walk in", 0)}),
        "frames out": ("Lyra2WorldFrames", (1640, 600), {"backwards": True}, {"world": ("walk out", 0)}),
        "all frames": (
            "BatchImagesNode",
            (1980, 200),
            {},
            {"images.image0": ("frames out", 0), "images.image1": ("frames in", 0)},
        ),
        **results(("all frames", 0), ("walk out", 0), 2300, name),
    }


def lyra_zoom_dmd() -> dict:
    return lyra_zoom(distilled=True)


def lyra_custom_trajectory(distilled: bool = False) -> dict:
    name = "lyra_custom_trajectory_dmd" if distilled else "lyra_custom_trajectory"
    what = (
        "**You bring** (into the input folder): a photo; a camera file (.npz, camera-path .json, transforms.json or a COLMAP "
        "text folder); captions (.json: frame number to text, each chunk takes the latest that begins by its first frame)."
    )
    return {
        **lyra_note("Custom trajectory" + (", four steps" if distilled else ""), what, distilled),
        **photo(),
        **lyra_models(),
        "path": (
            "Lyra2LoadTrajectory",
            (300, 220),
            {"file": "trajectory.npz", "frames": 161, "pose_scale": 1.1, **SIZE, "captions": "captions.json"},
            {},
        ),
        "depth": lyra_depth(cameras=("path", 0)),
        "begin": (
            "Lyra2BeginWorld",
            (980, 0),
            {},
            {"image": ("scaled", 0), "depth": ("depth", 0), "cameras": ("path", 0)},
        ),
        "draw": ("Lyra2DrawTrajectory", (1300, 800), {}, {"cameras": ("path", 0), "world": ("begin", 0)}),
        "see path": ("PreviewImage", (1600, 900), {}, {"images": ("draw", 0)}),
        "walk": explore((1300, 0), "path", 2, 35, distilled, f"worlds/{name}", ("path", 1)),
        "frames": ("Lyra2WorldFrames", (1640, 0), {}, {"world": ("walk", 0)}),
        "save path": (
            "Lyra2SaveTrajectory",
            (1640, 260),
            {"filename_prefix": f"lyra2/{name}_cameras"},
            {"cameras": ("frames", 1)},
        ),
        **results(("frames", 0), ("walk", 0), 1980, name),
    }


def lyra_custom_trajectory_dmd() -> dict:
    return lyra_custom_trajectory(distilled=True)


def lyra_there_and_back() -> dict:
    name = "lyra_there_and_back"
    what = (
        "**You bring** (into the input folder): a photo, and a prompt in *Lyra 2 Explore*.\n\nThe camera goes out and comes "
        "back the same way; *Lyra 2 Consistency* prints how well what it comes back to agrees with what it left."
    )
    return {
        **lyra_note("There and back", what, False),
        **photo(),
        **lyra_models(),
        "depth": lyra_depth(),
        "begin": ("Lyra2BeginWorld", (980, 0), {}, {"image": ("scaled", 0), "depth": ("depth", 0)}),
        "path": (
            "Lyra2ZoomTrajectory",
            (640, 520),
            {"direction": "in", "strength": 0.5, "frames": 81},
            {"depth": ("depth", 0)},
        ),
        "both ways": ("Lyra2EditTrajectory", (980, 520), {"edit": "there and back"}, {"cameras": ("path", 0)}),
        "walk": explore((1300, 0), "both ways", 2, 35, False, f"worlds/{name}", PROMPT),
        "frames": ("Lyra2WorldFrames", (1640, 0), {}, {"world": ("walk", 0)}),
        "score": ("Lyra2Consistency", (1640, 300), {}, {"world": ("walk", 0)}),
        "worst pair": ("PreviewImage", (1980, 720), {}, {"images": ("score", 2)}),
        **results(("frames", 0), ("walk", 0), 1980, name),
    }


ENGINE_NOTE = """## {title}
{what}

**What comes out**: a folder in the output folder with splats (.ply, .spz, .splat), a mesh and its collision mesh (.glb), a
.usdz for simulators, COLMAP text, cameras, a video, and a README that says what each file is and which programs open it.

*Lyra 2 Export World* needs `pip install usd-core` for the .usdz and `pip install fast-simplification` for a lighter
collision mesh in ComfyUI's Python; both can be switched off there. **Static scenes only.**"""
RECONSTRUCTION = """**Files**: `models/geometry_estimation/lyra2_reconstruction.pt`, NVIDIA's reconstruction weights (research licence), or
Depth Anything 3 giant or nested (CC BY-NC 4.0) in their place: `python tools/comfy.py models` lists and downloads them."""


def bundle(x: int, splat: tuple, values: dict, **sources: tuple) -> dict:
    """A lighter splat, and everything in one folder."""
    return {
        "prune": ("Lyra2PruneSplat", (x, 0), {}, {"splat": splat}),
        "export": ("Lyra2ExportWorld", (x + 340, 0), values, {"splat": ("prune", 0), **sources}),
    }


def reconstructed(name: str) -> dict:
    return {"folder": f"exports/{name}", "geometry_model": "Lyra 2 reconstruction"}


def world_to_engine() -> dict:
    what = (
        "A saved world, made by the geometry preview or by Lyra 2, becomes something to walk through elsewhere. No model "
        "files are needed.\n\n**You bring** the name of a world in the output folder, in *Lyra 2 Load World*."
    )
    return {
        "note": ("MarkdownNote", (0, 300), {"": ENGINE_NOTE.format(title="World to engine", what=what)}, {}),
        "world": ("Lyra2LoadWorld", (0, 0), {"folder": "worlds/custom_trajectory"}, {}),
        "gaussians": ("Lyra2WorldGaussians", (340, 0), {}, {"world": ("world", 0)}),
        "surface": ("Lyra2WorldMesh", (680, 300), {}, {"world": ("world", 0)}),
        **bundle(680, ("gaussians", 0), {"folder": "exports/custom_trajectory"}, mesh=("surface", 0), world=("world", 0)),
    }


def world_to_splat() -> dict:
    what = (
        "The frames of a saved world, seen by Depth Anything 3 with a Gaussian head from the cameras that they were made "
        f"for.\n\n**You bring** the name of a world in the output folder.\n\n{RECONSTRUCTION}"
    )
    return {
        "note": ("MarkdownNote", (0, 420), {"": ENGINE_NOTE.format(title="World to splat", what=what)}, {}),
        "world": ("Lyra2LoadWorld", (0, 0), {"folder": "worlds/lyra_custom_trajectory"}, {}),
        "reconstructor": ("Lyra2LoadReconstructor", (0, 220), {"model_name": "lyra2_reconstruction.pt"}, {}),
        "reconstruct": (
            "Lyra2Reconstruct",
            (340, 0),
            {},
            {"da3_model": ("reconstructor", 0), "world": ("world", 0)},
        ),
        "surface": (
            "Lyra2WorldMesh",
            (680, 400),
            {},
            {"images": ("reconstruct", 2), "cameras": ("reconstruct", 3), "depth": ("reconstruct", 4)},
        ),
        **bundle(
            680, ("reconstruct", 0), reconstructed("lyra_custom_trajectory"), mesh=("surface", 0), world=("world", 0),
            cameras=("reconstruct", 1),
        ),
    }  # fmt: skip


def video_to_splat() -> dict:
    what = (
        "Any video of a still scene. The network finds the cameras itself; if you have them, connect *Lyra 2 Load "
        f"Trajectory* to *Lyra 2 Reconstruct*.\n\n**You bring** (into the input folder): a video.\n\n{RECONSTRUCTION}"
    )
    return {
        "note": ("MarkdownNote", (0, 420), {"": ENGINE_NOTE.format(title="Video to splat", what=what)}, {}),
        "video": ("LoadVideo", (0, 0), {"file": "video.mp4"}, {}),
        "frames": ("GetVideoComponents", (300, 0), {}, {"video": ("video", 0)}),
        "reconstructor": ("Lyra2LoadReconstructor", (0, 220), {"model_name": "lyra2_reconstruction.pt"}, {}),
        "reconstruct": (
            "Lyra2Reconstruct",
            (600, 0),
            {},
            {"da3_model": ("reconstructor", 0), "images": ("frames", 0)},
        ),
        "surface": (
            "Lyra2WorldMesh",
            (940, 400),
            {},
            {"images": ("reconstruct", 2), "cameras": ("reconstruct", 3), "depth": ("reconstruct", 4)},
        ),
        "render": ("Lyra2RenderSplat", (1280, 400), {}, {"splat": ("prune", 0), "cameras": ("reconstruct", 1)}),
        "rendered": ("CreateVideo", (1580, 400), {"fps": 16.0}, {"images": ("render", 0)}),
        "save video": ("SaveVideo", (1880, 400), {"filename_prefix": "lyra2/splat"}, {"video": ("rendered", 0)}),
        **bundle(
            940, ("reconstruct", 0), reconstructed("video"), mesh=("surface", 0), images=("frames", 0),
            cameras=("reconstruct", 1),
        ),
    }  # fmt: skip


WORKFLOWS = (
    world_to_engine,
    world_to_splat,
    video_to_splat,
    custom_trajectory,
    zoom,
    lyra_zoom,
    lyra_zoom_dmd,
    lyra_custom_trajectory,
    lyra_custom_trajectory_dmd,
    lyra_there_and_back,
)


def widgets_of(definition: dict) -> list[tuple[str, list]]:
    ordered = definition["input_order"]
    return [
        (name, definition["input"][group][name])
        for group in ("required", "optional")
        for name in ordered.get(group, [])
    ]


SOCKETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COMFY_DYNAMICCOMBO_V3", "LOAD_3D")


def is_widget(spec: list) -> bool:
    options = spec[1] if len(spec) > 1 else {}
    return (isinstance(spec[0], list) or spec[0] in SOCKETS) and not options.get("forceInput")


def expand(name: str, spec: list, chosen: dict) -> list[tuple[str, list]]:
    """A dynamic combo is its own widget and then the inputs of the chosen option, named combo.input."""
    if spec[0] != "COMFY_DYNAMICCOMBO_V3":
        return [(name, spec)]
    key = chosen.get(name, spec[1]["options"][0]["key"])
    option = next(o for o in spec[1]["options"] if o["key"] == key)
    inner = [
        (f"{name}.{n}", s) for group in ("required", "optional") for n, s in option["inputs"].get(group, {}).items()
    ]
    return [(name, spec), *(pair for n, s in inner for pair in expand(n, s, chosen))]


def default(spec: list):
    options = spec[1] if len(spec) > 1 else {}
    if spec[0] == "COMFY_DYNAMICCOMBO_V3":
        return options["options"][0]["key"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    return options.get("default", (choices or [""])[0])


def build(graph: dict, object_info: dict) -> dict:
    """The UI-format workflow (version 0.4) of a description."""
    kinds = [kind for kind, *_ in graph.values()]
    ids = {name: number for number, name in enumerate(graph, 1)}
    nodes, links = [], []
    for name, (kind, position, values, sources) in graph.items():
        node = {
            "id": ids[name],
            "type": kind,
            "pos": [round(1.2 * position[0]), round(1.4 * position[1])],
            "size": [300, 200],
            "flags": {},
            "order": ids[name] - 1,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {"Node name for S&R": kind},
            "widgets_values": [],
        }
        if kinds.count(kind) > 1:
            node["title"] = name.capitalize()           # so that people, and --set, can tell them apart
        nodes.append(node)
        if kind == "MarkdownNote":
            node |= {"size": [620, 420], "widgets_values": [values[""]], "title": "What this needs and makes"}
            continue
        if kind in FILES:
            node["properties"]["models"] = models().template_entries([FILES[kind]])
        definition = object_info[kind]
        node["outputs"] = [
            {"name": n, "type": t, "links": []}
            for n, t in zip(definition["output_name"], definition["output"], strict=True)
        ]
        expanded = [pair for n, s in widgets_of(definition) for pair in expand(n, s, values)]
        unknown = set(values) - {n for n, _ in expanded}
        if unknown:
            raise SystemExit(f"{kind} has no widgets {sorted(unknown)}")
        for input_name, spec in expanded:
            if is_widget(spec):
                node["widgets_values"].append(values.get(input_name, default(spec)))
                options = spec[1] if len(spec) > 1 else {}
                if options.get("control_after_generate"):
                    node["widgets_values"].append("fixed")
                if input_name in sources:  # a widget that takes its value from elsewhere
                    node["inputs"].append(
                        {"name": input_name, "type": spec[0], "link": None, "widget": {"name": input_name}}
                    )
            elif spec[0] != "COMFY_AUTOGROW_V3":
                node["inputs"].append({"name": input_name, "type": spec[0], "link": None})
        node["inputs"] += [
            {"name": n, "type": "IMAGE", "link": None} for n in sources if n not in {i["name"] for i in node["inputs"]}
        ]
        for input_name, (source, slot) in sources.items():
            target_slot = next(i for i, entry in enumerate(node["inputs"]) if entry["name"] == input_name)
            links.append(
                [len(links) + 1, ids[source], slot, ids[name], target_slot, node["inputs"][target_slot]["type"]]
            )
            node["inputs"][target_slot]["link"] = len(links)
    for link in links:
        nodes[link[1] - 1]["outputs"][link[2]]["links"].append(link[0])
    return {
        "id": "",
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def models():
    return load("lyra_models", TOOLS / "models.py")


def main() -> int:
    launcher = load("lyra_comfy", TOOLS / "comfy.py")
    with launcher.Server(launcher.home() / "base", Path("output").resolve()) as server:
        object_info = server.get("/object_info")
    for describe in WORKFLOWS:
        file = PROJECT / "workflows" / f"{describe.__name__}.json"
        file.write_text(
            json.dumps(build(describe(), object_info), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        print(f"wrote {file.relative_to(PROJECT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
