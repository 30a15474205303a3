"""Graphs that begin a world from more than one photo: several, a video, a panorama."""

from __future__ import annotations

from . import parts
from .describe import Column, Graph, Node
from .engine import UNCHOSEN
from .parts import SIZE, from_left_to_right

TEXT = """## {title}
{what}

No model files are needed: the geometry preview walks on from here. Put *Lyra 2 Explore* in its place for Lyra 2 or Wan VACE.
**Static scenes only.**

{depth}

**Results** in the output folder: `lyra2/` video, splat (.ply) and mesh (.glb); `worlds/` the saved world, which
*Lyra 2 Load World* reopens."""
LAYOUT = (
    "**Depth**: *auto* lays out each photo by its lines, which is rough. *Lyra 2 Photos* brings all to one scale and says how well they "
    "fit. Better: *Run Depth Anything 3* or *MoGe*, connected to *Lyra 2 Depth*; or *Run Depth Anything 3* with mode *multiview* (Small or "
    "Base), connected to *Lyra 2 Photos* with places *Depth Anything 3*, which needs neither *Lyra 2 Depth* nor a focal length."
)
CROPPED = "Pictures are cropped to 832x480 around their middle, never stretched."


def photos_to_world() -> Graph:
    name, count = "photos_to_world", 3
    what = (
        "Photos of one place become one world: *Lyra 2 Photos* finds where each was taken. The world begins at the first; the others are "
        "remembered where you walk.\n\n**You bring** 2 to 10 photos that overlap by a third at least; more *Load Image* nodes go into *Batch "
        f"Images*. Until then it is ComfyUI's example picture three times. {CROPPED}\n\n**Look at the report** of *Lyra 2 Photos*: a photo "
        "that does not fit is left out, and it says why."
    )
    photos = {f"photo {i}": Node("LoadImage", {"image": "example.png"}, title=f"Photo {i}") for i in range(1, count + 1)}
    batch = Node("BatchImagesNode", {}, {f"images.image{i}": (f"photo {i + 1}", 0) for i in range(count)})
    return from_left_to_right(
        parts.note(TEXT.format(title="Photos to world", what=what, depth=LAYOUT)),
        parts.photo(photos, {"batch": batch, **scaled("batch")}, *placed(), title="1 Photos and depth"),
        *walked(name),
    )


def video_to_world() -> Graph:
    name = "video_to_world"
    what = (
        "A video of a still place becomes a world: *Lyra 2 Pick Frames* takes a few sharp frames that are equally far apart, *Lyra 2 Photos* "
        "finds where each was taken. The world begins at the first.\n\n**First** choose a video in *Load Video*, or drop one onto it: walk "
        f"slowly, sideways rather than turning on the spot; nothing should move but you. {CROPPED}"
    )
    frames = {
        "footage": Node("LoadVideo", {"file": UNCHOSEN}),
        "frames": Node("Lyra2PickFrames", {"count": 8}, {"video": ("footage", 0)}),
        **scaled("frames"),
    }
    return from_left_to_right(
        parts.note(TEXT.format(title="Video to world", what=what, depth=LAYOUT)),
        parts.photo(frames, *placed(), title="1 Video and depth"),
        *walked(name),
    )


def panorama_to_world() -> Graph:
    name = "panorama_to_world"
    what = (
        "A 360 degree panorama becomes a world: *Lyra 2 Panorama* cuts it into views that all stand in its middle. The path looks around "
        "once, then walks ahead.\n\n**First** choose a panorama in *Load Image*: equirectangular, twice as wide as high."
    )
    depth = (
        "**Distance**: a *room* of the size that you say. Better: *Run MoGe Panorama Inference*, or a picture of distances, which *Lyra 2 "
        "Panorama* takes as well."
    )
    pano = {"views": 12, **SIZE, "field_of_view": 90.0}
    turn = {"preset": "rotate_spot", "preset.direction": "right", "preset.strength": 360.0, "frames": 161}
    return from_left_to_right(
        parts.note(TEXT.format(title="Panorama to world", what=what, depth=depth)),
        parts.photo(
            {"photo": Node("LoadImage", {"image": "example.png"})},
            {
                "photos": Node("Lyra2Panorama", pano, {"image": ("photo", 0)}),
                "see photos": Node("PreviewImage", {}, {"images": ("photos", 0)}),
            },
            title="1 Panorama",
        ),
        parts.path(
            {
                "around": Node("Lyra2PresetTrajectory", turn, {"depth": ("photos", 1)}),
                "ahead": Node("Lyra2ZoomTrajectory", {"direction": "in", "strength": 0.3, "frames": 81}, {"depth": ("photos", 1)}),
            },
            {"path": Node("Lyra2EditTrajectory", {"edit": "join"}, {"cameras": ("around", 0), "edit.then": ("ahead", 0)})},
        ),
        *walked(name, with_path=False),
    )


def scaled(pictures: str) -> Column:
    return {
        "scaled": Node("ImageScale", {"upscale_method": "lanczos", **SIZE, "crop": "center"}, {"image": (pictures, 0)}),
    }


def placed() -> tuple[Column, Column]:
    """Depth of the photos, and where they were taken."""
    places = {"places": "by what they show alike", "places.focal": "found, one for all"}
    return (
        parts.laid_out_depth({}),
        {
            "photos": Node("Lyra2Photos", places, {"images": ("scaled", 0), "places.depth": ("depth", 0)}),
            "see photos": Node("PreviewImage", {}, {"images": ("photos", 0)}),
        },
    )


def walked(name: str, with_path: bool = True):
    """The path, the walk along it, and what comes of that."""
    zoom = {"direction": "in", "strength": 0.4, "frames": 81}
    path = {"path": Node("Lyra2ZoomTrajectory", zoom, {"depth": ("photos", 1)})}
    begun = parts.begun(image=("photos", 0), depth=("photos", 1), cameras=("photos", 2))
    walk = Node("Lyra2PreviewChunks", {"save_to": parts.folder_of_worlds(name)}, {"world": ("begin", 0), "cameras": ("path", 0)})
    return (
        *([parts.path(path)] if with_path else []),
        parts.walk({**begun, **parts.drawn("path")}, {"walk": walk}),
        parts.results(parts.video("walk", name), *parts.splat_and_mesh("walk", name)),
    )


WORKFLOWS = (photos_to_world, video_to_world, panorama_to_world)
