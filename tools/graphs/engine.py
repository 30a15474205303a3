"""Graphs that take a saved world, or any video, to other programs."""

from __future__ import annotations

from . import parts
from .describe import Graph, Node
from .parts import RECONSTRUCTOR, from_left_to_right

TEXT = """## {title}
{what}

**What comes out**: a folder in the output folder with splats (.ply, .spz, .splat), a mesh and its collision mesh (.glb), a
.usdz for simulators, COLMAP text, cameras, a video, and a README that says what each file is and which programs open it.
**Static scenes only.**"""
RECONSTRUCTION = f"""**Files**: `models/geometry_estimation/{RECONSTRUCTOR}`, NVIDIA's reconstruction weights (research licence), or
Depth Anything 3 giant or nested (CC BY-NC 4.0) in their place: `python tools/comfy.py models` lists and downloads them."""
CHOOSE = "choose a world of your output folder in *Lyra 2 Load World*; the list is empty until one was saved there"
UNCHOSEN = ""  # a file that only the user has


def world_to_engine() -> Graph:
    what = (
        "A saved world, made by the geometry preview or by Lyra 2, becomes something to walk through elsewhere. No model "
        f"files are needed.\n\n**First** {CHOOSE}."
    )
    sources = {"splat": ("prune", 0), "mesh": ("surface", 0), "world": ("world", 0)}
    return from_left_to_right(
        parts.note(TEXT.format(title="World to engine", what=what)),
        parts.photo({"world": Node("Lyra2LoadWorld", {"folder": UNCHOSEN})}, title="1 World"),
        parts.walk(
            {
                "gaussians": Node("Lyra2WorldGaussians", {}, {"world": ("world", 0)}),
                "surface": Node("Lyra2WorldMesh", {}, {"world": ("world", 0)}),
            },
            {"prune": Node("Lyra2PruneSplat", {}, {"splat": ("gaussians", 0)})},
            title="2 Splat and mesh",
        ),
        parts.results(parts.exported("world", sources), title="3 Results"),
    )


def world_to_splat() -> Graph:
    what = (
        "The frames of a saved world, seen by Depth Anything 3 with a Gaussian head from the cameras that they were made "
        f"for.\n\n**First** {CHOOSE}.\n\n{RECONSTRUCTION}"
    )
    sources = {
        "splat": ("prune", 0),
        "mesh": ("surface", 0),
        "world": ("world", 0),
        "cameras": ("reconstruct", 1),
    }
    return from_left_to_right(
        (parts.note(TEXT.format(title="World to splat", what=what)), parts.models(reconstructor())),
        parts.photo({"world": Node("Lyra2LoadWorld", {"folder": UNCHOSEN})}, title="1 World"),
        parts.walk(
            {"reconstruct": Node("Lyra2Reconstruct", {}, {"da3_model": ("reconstructor", 0), "world": ("world", 0)})},
            parts.pruned_mesh("reconstruct"),
            title="2 Splat and mesh",
        ),
        parts.results(parts.exported("world_to_splat", sources, "Lyra 2 reconstruction"), title="3 Results"),
    )


def video_to_splat() -> Graph:
    what = (
        "Any video of a still scene. The network finds the cameras itself; if you have them, connect *Lyra 2 Load "
        "Trajectory* to *Lyra 2 Reconstruct*.\n\n**First** choose a video in *Load Video*, or drop one onto it.\n\n"
        f"{RECONSTRUCTION}"
    )
    sources = {
        "splat": ("prune", 0),
        "mesh": ("surface", 0),
        "images": ("frames", 0),
        "cameras": ("reconstruct", 1),
    }
    seen = {"da3_model": ("reconstructor", 0), "images": ("frames", 0)}
    render = {"splat": ("prune", 0), "cameras": ("reconstruct", 1)}
    return from_left_to_right(
        (parts.note(TEXT.format(title="Video to splat", what=what)), parts.models(reconstructor())),
        parts.photo(
            {
                "video": Node("LoadVideo", {"file": UNCHOSEN}),
                "frames": Node("GetVideoComponents", {}, {"video": ("video", 0)}),
            },
            title="1 Video",
        ),
        parts.walk(
            {"reconstruct": Node("Lyra2Reconstruct", {}, seen)},
            parts.pruned_mesh("reconstruct"),
            title="2 Splat and mesh",
        ),
        parts.results(
            parts.exported("video", sources, "Lyra 2 reconstruction"),
            {
                "render": Node("Lyra2RenderSplat", {}, render),
                "rendered": Node("CreateVideo", {"fps": 16.0}, {"images": ("render", 0)}),
                "save video": Node("SaveVideo", {"filename_prefix": "lyra2/splat"}, {"video": ("rendered", 0)}),
            },
            title="3 Results",
        ),
    )


def reconstructor() -> dict[str, Node]:
    return {"reconstructor": Node("Lyra2LoadReconstructor", {"model_name": RECONSTRUCTOR})}


WORKFLOWS = (world_to_engine, world_to_splat, video_to_splat)
