"""Graphs that need no model file: the geometry preview."""

from __future__ import annotations

from . import parts
from .describe import Graph, Node
from .parts import SIZE, from_left_to_right

TEXT = """## {title}
No model files are needed: the geometry preview works from the photo and its depth alone. **Static scenes only.**

It runs as it is, with ComfyUI's example picture. {files}

The photo is cropped to 832x480 around its middle, never stretched; for an upright one set *Upscale Image* to 480x832{size}.

**Depth** (*Lyra 2 Depth*): *auto* finds a room or a ground by the photo's lines; look at the picture below it. Where it fails, fit the
*room box* or the *ground* by eye, or choose *MoGe* / *Depth Anything 3* and connect the host's own nodes (their models go to
`models/geometry_estimation`).{depth}

**Results** in the output folder: `lyra2/` video, splat (.ply), mesh (.glb) and cameras (.npz); `worlds/` the saved world, each photo's in
a folder of its own, which *Lyra 2 Load World* reopens. Run again after an interruption: finished chunks are not made again."""


def custom_trajectory() -> Graph:
    name = "custom_trajectory"
    files = (
        "**You bring** your own photo, and a camera file into the input folder (.npz with w2c, intrinsics, image_height, image_width; "
        "a camera-path .json; transforms.json; or a COLMAP text folder); optionally captions (.json: frame number to text). Until "
        "then *Lyra 2 Load Trajectory* has a short walk that comes with the pack."
    )
    text = TEXT.format(
        title="Custom trajectory, geometry preview", files=files, size=" there and in *Lyra 2 Load Trajectory*",
        depth=" Here it is the room box of the picture that comes with the pack, for which the shipped walk was made.",
    )
    camera_file = {"file": parts.SHIPPED_PATH, "frames": 161, "pose_scale": 1.0, **SIZE, "captions": "none"}
    walk = Node(
        "Lyra2PreviewChunks",
        {"save_to": parts.folder_of_worlds(name)},
        {"world": ("begin", 0), "cameras": ("path", 0), "captions": ("path", 1)},
    )
    return from_left_to_right(
        parts.note(text),
        (
            parts.photo(parts.loaded_photo(), parts.laid_out_depth(parts.ROOM, cameras=("path", 0))),
            parts.path({"path": Node("Lyra2LoadTrajectory", camera_file)}),
        ),
        parts.walk(
            {**parts.begun(cameras=("path", 0)), **parts.drawn("path")},
            {"walk": walk, "save path": parts.saved_cameras(("path", 0), name)},
        ),
        parts.results(parts.video("walk", name), *parts.splat_and_mesh("walk", name)),
    )


def zoom() -> Graph:
    files = (
        "**You bring** your own photo.\n\nThe video starts far away, moves in to the photo and on into it: the zoom out backwards, "
        "then the zoom in. The reference's 81 + 241 frames; each zoom is a world of its own, begun from the same photo."
    )
    walks = {
        f"walk {way}": Node(
            "Lyra2PreviewChunks", {"save_to": parts.folder_of_worlds(f"zoom_{way}")}, {"world": ("begin", 0), "cameras": (f"path {way}", 0)}
        )
        for way in ("in", "out")
    }
    saved = {f"save path {way}": parts.saved_cameras((f"path {way}", 0), f"zoom_{way}") for way in ("in", "out")}
    return from_left_to_right(
        parts.note(TEXT.format(title="Zoom in and out, geometry preview", files=files, size="", depth="")),
        parts.photo(parts.loaded_photo(), parts.laid_out_depth({})),
        parts.path(zoom_paths(), parts.begun() | parts.drawn("path out")),
        parts.walk({**walks, **saved}),
        parts.results(*parts.there_and_away("walk in", "walk out", "zoom"), *parts.splat_and_mesh("walk out", "zoom")),
    )


def zoom_paths() -> dict[str, Node]:
    """As the reference zooms."""
    depth = {"depth": ("depth", 0)}
    out = {"direction": "out", "strength": 1.5, "frames": 241, "upward_ratio": 0.15}
    return {
        "path in": Node("Lyra2ZoomTrajectory", {"direction": "in", "strength": 0.5, "frames": 81}, depth),
        "path out": Node("Lyra2ZoomTrajectory", out, depth),
    }


WORKFLOWS = (custom_trajectory, zoom)
