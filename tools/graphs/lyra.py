"""Graphs of the Lyra 2 transformer."""

from __future__ import annotations

from . import parts
from .describe import Column, Graph, Node
from .parts import DMD_LORA, NEGATIVE, PROMPT, RECONSTRUCTOR, SIZE, VIEWS, from_left_to_right
from .preview import zoom_paths

TEXT = """## {title}
Lyra 2 paints every frame; the geometry only tells it what was where. **Static scenes only.**

{what}

The photo is cropped to 832x480 around its middle, never stretched; Lyra 2 was trained with 832x480.

**Files** (`python tools/comfy.py models` lists and downloads them, after you accepted their licences); choose them in *{models}*:
- `models/diffusion_models/lyra2.safetensors`: NVIDIA's Lyra 2.0 transformer, converted with *Lyra 2 Convert Checkpoint* or
  `python tools/comfy.py convert`. Research licence.
{more}- `models/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors`, `models/vae/wan_2.1_vae.safetensors`,
  `models/clip_vision/clip_vision_h.safetensors` (Apache-2.0)
- `models/geometry_estimation/depth_anything_3_mono_large.safetensors` (Apache-2.0); any Depth Anything 3 will do

**Draft first**: set *Upscale Image* to half{sizes}, or the steps to 10, and run the same path and seed; or use *Lyra 2
Preview Chunks* in place of {painter}, which needs no weights at all.

**The world is saved** after every chunk under `worlds/` in the output folder. Running again after an interrupt, or with
more chunks, goes on from there. Another seed or prompt makes a branch beside it."""
LORA_FILE = f"- `models/loras/{DMD_LORA}`: the DMD LoRA, converted. Research licence.\n"
RECONSTRUCTION_FILE = (
    f"- `models/geometry_estimation/{RECONSTRUCTOR}`: the reconstruction weights (research licence), or Depth Anything 3 giant or "
    "nested (CC BY-NC 4.0) in their place\n"
)


def note(title: str, what: str, *files: str, sizes: str = "", painter: str = "*Lyra 2 Explore*"):
    text = TEXT.format(
        title=title, what=what, more="".join(files), models=parts.LOAD_MODELS.name, sizes=sizes, painter=painter
    )
    return parts.note(text)


def explore(path: str, chunks: int, steps: int, distilled: bool, save_to: str, prompt: str | tuple = PROMPT) -> Node:
    quality = {"quality": "DMD", "quality.dmd_lora": DMD_LORA}
    quality = quality if distilled else {"quality": "full", "quality.steps": steps}
    values = {"chunks": chunks, "negative": NEGATIVE, "save_to": parts.folder_of_worlds(save_to), "views": VIEWS, **quality}
    sources = {
        "world": ("begin", 0),
        "cameras": (path, 0),
        "model": ("models", 0),
        "clip": ("models", 1),
        "clip_vision": ("models", 2),
        "vae": ("models", 3),
        "depth_estimator": ("models", 5),
    }
    if isinstance(prompt, str):
        values["prompt"] = prompt
    else:
        sources["prompt"] = prompt
    return Node("Lyra2Explore", values, sources)


def lyra_zoom(distilled: bool = False) -> Graph:
    name = "lyra_zoom_dmd" if distilled else "lyra_zoom"
    what = (
        "**You bring** a photo, and a prompt in both *Lyra 2 Explore* nodes.\n\nThe zoom out backwards, then the zoom in, as the "
        "reference joins them, without showing the photo twice."
    )
    walks = {
        f"walk {way}": explore(f"path {way}", chunks, 50, distilled, f"{name}_{way}")
        for way, chunks in (("in", 1), ("out", 3))
    }
    title = "Zoom in and out" + (", four steps" if distilled else "")
    return from_left_to_right(
        (note(title, what, *[LORA_FILE] * distilled), parts.models(parts.loaded_models())),
        parts.photo(parts.loaded_photo(), parts.estimated_depth()),
        parts.path(zoom_paths(), parts.begun() | parts.drawn("path out")),
        parts.walk(walks),
        parts.results(*parts.there_and_away("walk in", "walk out", name), parts.everything("walk out", name)),
    )


def lyra_zoom_dmd() -> Graph:
    return lyra_zoom(distilled=True)


def lyra_custom_trajectory(distilled: bool = False) -> Graph:
    name = "lyra_custom_trajectory_dmd" if distilled else "lyra_custom_trajectory"
    what = (
        "**You bring** a photo; a camera file into the input folder (.npz, camera-path .json, transforms.json or a COLMAP text folder); "
        "captions (.json: frame number to text, each chunk takes the latest that begins by its first frame). Until then *Lyra 2 Load "
        "Trajectory* has a short walk and captions that come with the pack."
    )
    camera_file = {"file": parts.SHIPPED_PATH, "frames": 161, "pose_scale": 1.0, **SIZE, "captions": parts.SHIPPED_CAPTIONS}
    title = "Custom trajectory" + (", four steps" if distilled else "")
    return from_left_to_right(
        (
            note(title, what, *[LORA_FILE] * distilled, sizes=" (and the size in *Lyra 2 Load Trajectory*)"),
            parts.models(parts.loaded_models()),
        ),
        (
            parts.photo(parts.loaded_photo(), parts.estimated_depth(cameras=("path", 0))),
            parts.path({"path": Node("Lyra2LoadTrajectory", camera_file)}),
        ),
        parts.walk(
            parts.begun(cameras=("path", 0)) | parts.drawn("path"),
            {"walk": explore("path", 2, 35, distilled, name, ("path", 1))},
        ),
        parts.results(
            parts.video("walk", name),
            {**parts.everything("walk", name), "save path": parts.saved_cameras(("path", 0), name)},
        ),
    )


def lyra_custom_trajectory_dmd() -> Graph:
    return lyra_custom_trajectory(distilled=True)


def lyra_there_and_back() -> Graph:
    name = "lyra_there_and_back"
    what = (
        "**You bring** a photo, and a prompt in *Lyra 2 Explore*.\n\nThe camera goes out and comes back the same way; *Lyra 2 "
        "Consistency* prints how well what it comes back to agrees with what it left, and draws where it agrees least."
    )
    zoom = {"direction": "in", "strength": 0.5, "frames": 81}
    return from_left_to_right(
        (note("There and back", what), parts.models(parts.loaded_models())),
        parts.photo(parts.loaded_photo(), parts.estimated_depth()),
        parts.path(
            {
                "path": Node("Lyra2ZoomTrajectory", zoom, {"depth": ("depth", 0)}),
                "both ways": Node("Lyra2EditTrajectory", {"edit": "there and back"}, {"cameras": ("path", 0)}),
            },
            parts.begun() | parts.drawn("both ways"),
        ),
        parts.walk({"walk": explore("both ways", 2, 35, False, name)}),
        parts.results(
            parts.video("walk", name),
            parts.everything("walk", name),
        ),
    )


def lyra_photo_to_splat() -> Graph:
    name = "lyra_photo_to_splat"
    what = (
        "**You bring** a photo, and a prompt in *Lyra 2 Explore*.\n\nLyra 2 walks an arc around what the photo shows; the reconstruction "
        f"network looks at the frames and makes one splat of them, which is pruned, meshed, and exported to `exports/{name}` with a "
        "README that says which program opens what."
    )
    arc = {"preset": "orbit_horizontal", "preset.direction": "right", "preset.strength": 0.35, "frames": 161}
    return from_left_to_right(
        (
            note("From a photo to a splat", what, LORA_FILE, RECONSTRUCTION_FILE),
            parts.models(
                {
                    **parts.loaded_models(),
                    "reconstructor": Node("Lyra2LoadReconstructor", {"model_name": RECONSTRUCTOR}),
                }
            ),
        ),
        parts.photo(parts.loaded_photo(), parts.estimated_depth()),
        parts.path(
            {"path": Node("Lyra2PresetTrajectory", arc, {"depth": ("depth", 0)}), **parts.begun()}, parts.drawn("path")
        ),
        parts.walk({"walk": explore("path", 2, 35, True, name)}),
        parts.results(*reconstruction(name, "walk")),
    )


def reconstruction(name: str, world: str) -> tuple[Column, ...]:
    """A splat and a mesh of what was painted, in one folder; and the video."""
    reconstruct = {"da3_model": ("reconstructor", 0), "world": (world, 0)}
    sources = {"splat": ("prune", 0), "mesh": ("surface", 0), "world": (world, 0), "cameras": ("reconstruct", 1)}
    return (
        {"reconstruct": Node("Lyra2Reconstruct", {}, reconstruct), **parts.video(world, name)},
        parts.pruned_mesh("reconstruct"),
        parts.exported(name, sources, "Lyra 2 reconstruction"),
    )


# -------------------------------------------------------------------------------------------------------- step by step


def lyra_step_by_step() -> Graph:
    name = "lyra_step_by_step"
    what = (
        "Every stage of Lyra 2 as a node of its own, for two chunks of 80 frames; *Lyra 2 Explore* does the same in one. For each chunk: "
        "**Retrieve History** looks up which past frames see the new views; **FramePack** encodes them and warps the newest frame; "
        "**Chunk Conditioning** adds that to the prompts; ComfyUI's own **sampler** paints 20 latents; **Append Chunk** decodes them, "
        "estimates their depth and remembers them. The second chunk starts where the first one ends.\n\n**You bring** a photo, and a "
        "prompt.\n\nIt is wired for the four steps of the DMD LoRA. For full quality: bypass *LoraLoaderModelOnly* (Ctrl+B), choose *full* "
        "in both *Lyra 2 Sigmas*, put *Lyra 2 UniPC* in place of *KSamplerSelect* and 5 as cfg. Any other sampler works too."
    )
    first = {"direction": "in", "strength": 0.3, "frames": 81}
    second = {"preset": "orbit_horizontal", "preset.direction": "right", "preset.strength": 0.25, "frames": 81}
    depth = {"depth": ("depth", 0)}
    prompts = {
        "prompt": Node("CLIPTextEncode", {"text": PROMPT}, {"clip": ("models", 1)}),
        "negative": Node("CLIPTextEncode", {"text": NEGATIVE}, {"clip": ("models", 1)}),
    }
    return from_left_to_right(
        (
            note("Step by step", what, LORA_FILE, RECONSTRUCTION_FILE, painter="the walk"),
            parts.models(
                {
                    **parts.loaded_models(),
                    "dmd": Node("LoraLoaderModelOnly", {"lora_name": DMD_LORA}, {"model": ("models", 0)}),
                    "reconstructor": Node("Lyra2LoadReconstructor", {"model_name": RECONSTRUCTOR}),
                }
            ),
        ),
        parts.photo(parts.loaded_photo(), parts.estimated_depth() | parts.begun()),
        parts.path(
            {
                "path first": Node("Lyra2ZoomTrajectory", first, depth, "Path: first chunk"),
                "path second": Node("Lyra2PresetTrajectory", second, {**depth, "start": ("path first", 0)}, "Path: second chunk"),
                **prompts,
            },
        ),
        (
            parts.walk(*chunk("first", "begin", name), title="3a Walk: the first chunk"),
            parts.walk(*chunk("second", "append first", name), title="3b Walk: the second chunk"),
        ),
        parts.results(*reconstruction(name, "append second")),
    )


def chunk(which: str, world: str, name: str) -> tuple[Column, ...]:
    """One round of Lyra 2's loop."""

    def own(node: str) -> str:
        return f"{node} {which}"

    plan = {"world": (world, 0), "cameras": (own("path"), 0)}
    pack = {"world": (world, 0), "plan": (own("retrieve"), 0), "vae": ("models", 3), "clip_vision": ("models", 2)}
    both = {"history": (own("pack"), 0), "positive": ("prompt", 0), "negative": ("negative", 0)}
    guide = {"model": ("dmd", 0), "positive": (own("condition"), 0), "negative": (own("condition"), 1)}
    sample = {
        "noise": (own("noise"), 0),
        "guider": (own("guide"), 0),
        "sampler": (own("solver"), 0),
        "sigmas": (own("sigmas"), 0),
        "latent_image": (own("condition"), 2),
    }
    grow = {
        "world": (world, 0),
        "plan": (own("retrieve"), 0),
        "latent": (own("sample"), 0),
        "vae": ("models", 3),
        "depth_estimator": ("models", 5),
    }
    kept = {"save_to": parts.folder_of_worlds(name), "prompt": PROMPT}

    def stage(kind: str, what: str, values: dict, sources: dict) -> Node:
        return Node(kind, values, sources, title=f"{what}: {which} chunk")

    def shown(what: str, output: int) -> Node:
        return stage("PreviewImage", what, {}, {"images": (own("retrieve"), output)})

    return (
        {
            own("retrieve"): stage("Lyra2RetrieveHistory", "Retrieve History", {"views": VIEWS}, plan),
            own("see retrieved"): shown("What is retrieved", 1),
            own("see warped"): shown("Newest frame, warped", 2),
        },
        {
            own("pack"): stage("Lyra2FramePack", "FramePack", {}, pack),
            own("noise"): stage("Lyra2Noise", "Noise", {}, {"history": (own("pack"), 0)}),
        },
        {
            own("condition"): stage("Lyra2ChunkConditioning", "Chunk Conditioning", {}, both),
            own("solver"): stage("KSamplerSelect", "Solver", {"sampler_name": "lcm"}, {}),
            own("sigmas"): stage("Lyra2Sigmas", "Sigmas", {"schedule": "DMD"}, {}),
        },
        {
            own("guide"): stage("CFGGuider", "CFG Guider", {"cfg": 1.0}, guide),
            own("sample"): stage("SamplerCustomAdvanced", "Sampler", {}, sample),
        },
        {own("append"): stage("Lyra2AppendChunk", "Append Chunk", kept, grow)},
    )


WORKFLOWS = (
    lyra_step_by_step,
    lyra_photo_to_splat,
    lyra_zoom,
    lyra_zoom_dmd,
    lyra_custom_trajectory,
    lyra_custom_trajectory_dmd,
    lyra_there_and_back,
)
