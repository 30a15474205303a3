"""A picture for each workflow in the template browser, of what that workflow makes.

The worlds are walked by the geometry preview, along each workflow's own paths with fewer frames: where a workflow needs
models, its picture is the draft that the same graph gives without them, and says so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from . import parts
from .describe import Graph, Node

SIZE = (832, 480)
FRAMES = 16  # new ones per walk
PHOTO = Path(__file__).parents[1] / "demo" / "room.png"
PATHS = ("Lyra2ZoomTrajectory", "Lyra2PresetTrajectory", "Lyra2EditTrajectory", "Lyra2LoadTrajectory")
APPENDS = ("Lyra2AppendChunk", "Lyra2AppendFrames")
WALKS = ("Lyra2Explore", "Lyra2PreviewChunks", *APPENDS)
ROOM = {"source": "room box", "source.vanishing_x": 0.5, "source.distance": 6.0, "source.field_of_view": 67.4, **parts.ROOM}
FIRST = {"source": "room box", "source.vanishing_x": 0.5, "source.vanishing_y": 0.5, "source.distance": 6.0}  # of photo_1.png
FIRST |= {"source.wall_left": 0.2026, "source.wall_right": 0.7974, "source.wall_top": 0.048, "source.wall_bottom": 0.6676}
FIRST |= {"source.field_of_view": 67.72}
DRAFT = "drafted by the geometry preview"
OUTSIDE = {"direction": "out", "strength": 1.3, "upward_ratio": 0.45}  # of the room, for looking at a whole splat

# what is shown of each: its walks by name (last frame), the path from above, the splat from outside, the plan's pictures
SHOWN = {
    "custom_trajectory": ("walk",),
    "zoom": ("walk out", "walk in"),
    "photos_to_world": ("walk", "above"),
    "video_to_world": ("half", "above"),
    "panorama_to_world": ("walk", "half", "above"),
    "lyra_step_by_step": ("append second", "plan", "above"),
    "lyra_photo_to_splat": ("walk", "splat", "above"),
    "lyra_zoom": ("walk out", "walk in", "above"),
    "lyra_zoom_dmd": ("walk in", "walk out", "above"),
    "lyra_custom_trajectory": ("walk", "above"),
    "lyra_custom_trajectory_dmd": ("half", "above"),
    "lyra_there_and_back": ("half", "walk", "above"),
    "vace_zoom": ("walk in", "above"),
    "vace_custom_trajectory": ("above", "walk"),
    "any_video_model": ("walk", "depth"),
    "world_to_engine": ("splat", "depth"),
    "world_to_splat": ("splat", "walk"),
    "video_to_splat": ("walk", "splat", "depth"),
    "train_on_my_world": ("half", "above", "walk"),
}


def make(folder: Path, graphs: Mapping[str, Graph], run: Callable[[dict], None], server) -> None:
    """One <name>.jpg for each graph. `run` runs a prompt on `server`."""
    shutil.copyfile(PHOTO, server.base / "input" / PHOTO.name)
    subprocess.run([sys.executable, str(PHOTO.with_name("make_room.py")), str(server.base / "input")], check=True)
    for name, graph in graphs.items():
        if name not in SHOWN:
            continue  # a picture of the page itself
        if not any(node.kind in PATHS for node in graph.nodes.values()):
            graph = graphs["custom_trajectory"]  # a world like the one that comes out of that
        run(prompt_of(name, graph, SHOWN[name]))
        pictures = [_newest(server.output, f"{name}_{what.replace(' ', '_')}") for what in SHOWN[name]]
        needs_models = name.startswith(("lyra_", "vace_", "any_", "train_")) or name.endswith("_to_splat")
        composed(pictures, DRAFT if needs_models else "").save(folder / f"{name}.jpg", quality=88)
        print(f"wrote {name}.jpg", flush=True)


def prompt_of(name: str, graph: Graph, shown: tuple[str, ...]) -> dict:
    """The graph's paths and walks, few frames each, as an API prompt that saves what is shown."""
    nodes = dict(_begun_from_views(name) if name in ("photos_to_world", "video_to_world", "panorama_to_world") else _begun())
    for node_name, node in graph.nodes.items():
        if node.kind in PATHS:
            nodes[node_name] = _short(node)
        elif node.kind in WALKS:
            nodes[node_name] = _walked(node_name, node)
    walk = [n for n in nodes if nodes[n]["class_type"] == "Lyra2PreviewChunks"][-1]
    saved = {}
    for what in shown:
        key, link = f"show {what}", [f"show {what}", 0]
        if what == "above":
            nodes[key] = _api("Lyra2DrawTrajectory", cameras=nodes[walk]["inputs"]["cameras"], world=[walk, 0])
            link = [key, 1]
        elif what == "plan":
            cameras = nodes[walk]["inputs"]["cameras"]
            nodes[key] = _api("Lyra2RetrieveHistory", world=["append first", 0], cameras=cameras, retrieve=5, views=1, chunk_frames=FRAMES)
            nodes[f"last of {what}"] = _api("ImageFromBatch", image=[key, 1], batch_index=0, length=1)
            link = [f"last of {what}", 0]
        elif what in ("splat", "depth"):
            nodes |= _outside(walk)
            link = ["outside", 0 if what == "splat" else 2]
        else:
            world = what if what in nodes else walk
            frame = FRAMES // 2 if what == "half" else _last(nodes, world)
            nodes[key] = _api("Lyra2WorldFrames", world=[world, 0], first=frame, count=1, backwards=False)
        saved[f"save {what}"] = _api("SaveImage", images=link, filename_prefix=f"{name}_{what.replace(' ', '_')}")
    return {**nodes, **saved}


def _begun() -> dict[str, dict]:
    return {
        "photo": _api("LoadImage", image=PHOTO.name),
        "scaled": _api("ImageScale", image=["photo", 0], upscale_method="lanczos", **parts.SIZE, crop="center"),
        "depth": _api("Lyra2Depth", image=["scaled", 0], **ROOM),
        "begin": _api("Lyra2BeginWorld", image=["scaled", 0], depth=["depth", 0], prompt=""),
    }


def _begun_from_views(name: str) -> dict[str, dict]:
    """A world of the three photos, or of the panorama, of the room that `make_room` paints."""
    nodes = {f"photo {i}": _api("LoadImage", image=f"photo_{i}.png") for i in (1, 2, 3)}
    nodes["scaled"] = _api("BatchImagesNode", **{f"images.image{i}": [f"photo {i + 1}", 0] for i in range(3)})
    nodes["first"] = _api("ImageFromBatch", image=["scaled", 0], batch_index=0, length=1)
    nodes["depth"] = _api("Lyra2Depth", image=["first", 0], **FIRST)
    places = {"places": "by what they show alike", "places.depth": ["depth", 0], "places.focal": "as given"}
    nodes["photos"] = _api("Lyra2Photos", images=["scaled", 0], least_matches=30, **places)
    if name == "panorama_to_world":
        room = {"room_width": 4.78, "room_length": 8.0, "room_height": 2.87, "camera_height": 0.777}
        distance = {"distance": "room", **{f"distance.{key}": value for key, value in room.items()}}
        cut = {"views": 12, **parts.SIZE, "field_of_view": 90.0, "heading": 0.0}
        nodes = {"panorama": _api("LoadImage", image="panorama.png")}
        nodes["photos"] = _api("Lyra2Panorama", image=["panorama", 0], **distance, **cut)
    begun = {"image": ["photos", 0], "depth": ["photos", 1], "cameras": ["photos", 2]}
    return {**nodes, "begin": _api("Lyra2BeginWorld", prompt="", **begun)}


def _short(node: Node) -> dict:
    """A path of the graph with few frames; an edit keeps what it makes of them."""
    values = {**node.values, **{entry: list(source) for entry, source in node.sources.items()}}
    if "frames" in values or node.kind == "Lyra2PresetTrajectory":
        values["frames"] = 1 + FRAMES
    defaults = {
        "Lyra2ZoomTrajectory": {"upward_ratio": 0.0, "along_ground": False, "upward_shift": 0.05},
        "Lyra2PresetTrajectory": {"seed": 0},
        "Lyra2LoadTrajectory": {
            "curve": "as the file says",
            "motion": "uniform motion",
            "fit": "crop",
            "without_distortion": False,
            "captions": "none",
        },
    }.get(node.kind, {})
    return _api(node.kind, **{**defaults, **values})


def _walked(name: str, node: Node) -> dict:
    """The preview in place of whatever paints."""
    world = node.sources["world"][0]
    cameras = f"path {name.split()[-1]}" if node.kind in APPENDS else node.sources["cameras"][0]
    inputs = {"world": [world, 0], "cameras": [cameras, 0]}
    return _api("Lyra2PreviewChunks", **inputs, retrieve=5, chunk_frames=FRAMES, save_to="")


def _outside(walk: str) -> dict[str, dict]:
    path = _short(Node("Lyra2ZoomTrajectory", {**OUTSIDE, "frames": 2}, {"depth": ("depth", 0)}))
    path["inputs"]["frames"] = 2
    return {
        "way out": path,
        "there": _api("Lyra2EditTrajectory", cameras=["way out", 0], edit="reverse"),
        "gaussians": _api("Lyra2WorldGaussians", world=[walk, 0], stride=1, invented=True),
        "pruned": _api("Lyra2PruneSplat", splat=["gaussians", 0], min_opacity=0.02, faintest=0.0, max_size=0.0, outliers=10.0, at_most=0),
        "outside": _api("Lyra2RenderSplat", splat=["pruned", 0], cameras=["there", 0], background="#1a1c22", rasteriser="auto"),
    }


def _last(nodes: Mapping[str, dict], world: str) -> int:
    """Number of a world's last frame, by the walks and edits that made it."""
    if world == "begin":
        return 0
    inputs = nodes[world]["inputs"]
    edited = nodes[inputs["cameras"][0]]["inputs"].get("edit") == "there and back"
    return _last(nodes, inputs["world"][0]) + FRAMES * (2 if edited else 1)


def _api(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def _newest(folder: Path, prefix: str) -> Image.Image:
    with Image.open(sorted(folder.glob(f"{prefix}_0*.png"))[0]) as opened:
        return opened.convert("RGB")


def composed(pictures: list[Image.Image], label: str) -> Image.Image:
    """The first picture, the others small along its lower edge."""
    whole = pictures[0].resize(SIZE, Image.Resampling.LANCZOS)
    width, height = SIZE[0] * 3 // 10, SIZE[1] * 3 // 10
    for place, picture in enumerate(reversed(pictures[1:])):
        left, top = SIZE[0] - (width + 14) * (place + 1), SIZE[1] - height - 14
        whole.paste((240, 240, 240), (left - 2, top - 2, left + width + 2, top + height + 2))
        whole.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    if label:
        draw, font = ImageDraw.Draw(whole, "RGBA"), ImageFont.load_default(18)
        box = draw.textbbox((16, 14), label, font=font)
        draw.rectangle((box[0] - 8, box[1] - 6, box[2] + 8, box[3] + 6), fill=(0, 0, 0, 150))
        draw.text((16, 14), label, font=font, fill=(255, 255, 255))
    return whole
