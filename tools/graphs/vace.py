"""Graphs in which Wan VACE paints, or any other video model in its place."""

from __future__ import annotations

from . import parts
from .describe import Column, Graph, Node
from .parts import NEGATIVE, PROMPT, SIZE, VIEWS, from_left_to_right
from .preview import zoom_paths

TRANSFORMER = "wan2.1_vace_1.3B_fp16.safetensors"
TEXT = """## {title}
Wan VACE paints every frame; the world's memory shows it what is known and masks the rest. **Static scenes only.**

{what}

The photo is cropped to 832x480 around its middle, never stretched: VACE 1.3B was made for 832x480.

**Files** (`python tools/comfy.py models` lists and downloads them), all Apache-2.0, commercial use allowed:
- `models/diffusion_models/wan2.1_vace_1.3B_fp16.safetensors`, for cards of 8 GB as users report; or `wan2.1_vace_14B_fp16`{experts}
- `models/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors`, `models/vae/wan_2.1_vae.safetensors`
- `models/geometry_estimation/depth_anything_3_mono_large.safetensors`; any Depth Anything 3 will do

**The world is saved** after every chunk under `worlds/` in the output folder, each photo's in a folder of its own. Running
again after an interrupt, or with more chunks, goes on from there."""
EXPERTS = """;
  or both of `wan2.2_fun_vace_*_14B_fp8_scaled`: the high noise one as model, the low noise one as low_noise_model
- for a few steps: *Wan VACE distilled* as generator, with a lightx2v LoRA in `models/loras`"""


def models() -> Column:
    return {
        "transformer": Node("UNETLoader", {"unet_name": TRANSFORMER}),
        "text encoder": Node("CLIPLoader", {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan"}),
        "vae": Node("VAELoader", {"vae_name": "wan_2.1_vae.safetensors"}),
        "depth model": Node("LoadDA3Model", {"model_name": "depth_anything_3_mono_large.safetensors"}),
        "estimator": Node("Lyra2DA3Estimator", {}, {"da3_model": ("depth model", 0)}),
    }


def explore(path: str, chunks: int, save_to: str, prompt: str | tuple = PROMPT) -> Node:
    values = {"chunks": chunks, "negative": NEGATIVE, "save_to": parts.folder_of_worlds(save_to), "views": VIEWS, "generator": "Wan VACE"}
    sources = {
        "world": ("begin", 0),
        "cameras": (path, 0),
        "model": ("transformer", 0),
        "clip": ("text encoder", 0),
        "vae": ("vae", 0),
        "depth_estimator": ("estimator", 0),
    }
    if isinstance(prompt, str):
        values["prompt"] = prompt
    else:
        sources["prompt"] = prompt
    return Node("Lyra2Explore", values, sources)


def photo(**more: tuple[str, int]):
    return parts.photo(parts.loaded_photo(), parts.estimated_depth(("depth model", 0), **more))


def vace_zoom() -> Graph:
    name = "vace_zoom"
    what = (
        "**You bring** a photo, and a prompt in both *Lyra 2 Explore* nodes.\n\nThe zoom out backwards, then the zoom in, without showing "
        "the photo twice."
    )
    walks = {f"walk {way}": explore(f"path {way}", chunks, f"{name}_{way}") for way, chunks in (("in", 1), ("out", 3))}
    return from_left_to_right(
        (parts.note(TEXT.format(title="Zoom in and out, by Wan VACE", what=what, experts=EXPERTS)), parts.models(models())),
        photo(),
        parts.path(zoom_paths(), parts.begun() | parts.drawn("path out")),
        parts.walk(walks),
        parts.results(*parts.there_and_away("walk in", "walk out", name), *parts.splat_and_mesh("walk out", name)),
    )


def vace_custom_trajectory() -> Graph:
    name = "vace_custom_trajectory"
    what = (
        "**You bring** a photo; a camera file into the input folder (.npz, camera-path .json, transforms.json or a COLMAP text folder); "
        "captions (.json). Until then *Lyra 2 Load Trajectory* has a short walk and captions that come with the pack."
    )
    camera_file = {"file": parts.SHIPPED_PATH, "frames": 161, "pose_scale": 1.0, **SIZE, "captions": parts.SHIPPED_CAPTIONS}
    return from_left_to_right(
        (parts.note(TEXT.format(title="Custom trajectory, by Wan VACE", what=what, experts=EXPERTS)), parts.models(models())),
        (photo(cameras=("path", 0)), parts.path({"path": Node("Lyra2LoadTrajectory", camera_file)})),
        parts.walk(
            parts.begun(cameras=("path", 0)) | parts.drawn("path"), {"walk": explore("path", 2, name, ("path", 1))}
        ),
        parts.results(parts.video("walk", name), *parts.splat_and_mesh("walk", name)),
    )


def any_video_model() -> Graph:
    name = "any_video_model"
    what = (
        "One chunk of 80 frames. *Lyra 2 Control Views* gives a video with grey holes, a mask (1 = paint), disparity, and what was "
        "retrieved; *Lyra 2 Append Frames* takes what comes back. Between them stand ComfyUI's own VACE nodes: **put any other video model "
        "there** that takes a video and a mask. For a second chunk copy the walk and begin it with the grown world.\n\n"
        "**Uni3C** (with the 14B only, whose width it has) is one more guide, by ComfyUI's own nodes, bypassed here: select the four "
        "bypassed ones, press Ctrl+B, and choose `Wan21_Uni3C_controlnet_fp16` from `models/model_patches`. It is shown the control video "
        "with black holes.\n\n"
        "**You bring** a photo and a prompt."
    )
    zoom = {"direction": "in", "strength": 0.4, "frames": 81}
    prompts = {
        which: Node("CLIPTextEncode", {"text": text}, {"clip": ("text encoder", 0)})
        for which, text in (("prompt", PROMPT), ("negative", NEGATIVE))
    }
    told = {
        "positive": ("prompt", 0),
        "negative": ("negative", 0),
        "vae": ("vae", 0),
        "length": ("views", 4),
        "control_video": ("views", 0),
        "control_masks": ("views", 1),
    }
    sampling = {"steps": 20, "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple"}
    uni3c = {"model": ("transformer", 0), "model_patch": ("uni3c file", 0), "vae": ("vae", 0), "render_video": ("render", 0)}
    sample = {"model": ("uni3c", 0), "positive": ("told", 0), "negative": ("told", 1), "latent_image": ("told", 2)}
    plan = {"world": ("begin", 0), "plan": ("retrieve", 0)}
    grow = {**plan, "images": ("decode", 0), "depth_estimator": ("estimator", 0)}
    return from_left_to_right(
        (parts.note(TEXT.format(title="Any video model", what=what, experts="")), parts.models(models())),
        photo(),
        parts.path(
            {"path walk": Node("Lyra2ZoomTrajectory", zoom, {"depth": ("depth", 0)}), **prompts}, parts.begun()
        ),
        parts.walk(
            {
                "retrieve": Node("Lyra2RetrieveHistory", {"views": VIEWS}, {"world": ("begin", 0), "cameras": ("path walk", 0)}),
                "views": Node("Lyra2ControlViews", {}, plan),
            },
            {
                "told": Node("WanVaceToVideo", SIZE, told),
                "see control": Node("PreviewImage", {}, {"images": ("views", 0)}),
            },
            {
                "uni3c file": Node("ModelPatchLoader", {"name": "Wan21_Uni3C_controlnet_fp16.safetensors"}, bypassed=True),
                "black": Node("EmptyImage", SIZE, {"batch_size": ("views", 4)}, bypassed=True),
                "render": Node(
                    "ImageCompositeMasked",
                    {},
                    {"destination": ("views", 0), "source": ("black", 0), "mask": ("views", 1)},
                    bypassed=True,
                ),
                "uni3c": Node("WanUni3CControlnetApply", {}, uni3c, bypassed=True),
            },
            {
                "sample": Node("KSampler", sampling, sample),
                "trim": Node("TrimVideoLatent", {}, {"samples": ("sample", 0), "trim_amount": ("told", 3)}),
                "decode": Node("VAEDecode", {}, {"samples": ("trim", 0), "vae": ("vae", 0)}),
            },
            {"walk": Node("Lyra2AppendFrames", {"save_to": parts.folder_of_worlds(name), "prompt": PROMPT}, grow)},
        ),
        parts.results(parts.video("walk", name), *parts.splat_and_mesh("walk", name)),
    )


WORKFLOWS = (vace_zoom, vace_custom_trajectory, any_video_model)
