#!/usr/bin/env python3
"""Writes workflows/*.json from the short descriptions below, with the node definitions of a running host.

    python tools/comfy.py workflows

The shipped files are what this writes; tests check them against the host. A node is (type, position, {widget: value},
{input: (node, output)}); widgets that are not named keep their default.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
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

**Results** in the output folder: `lyra2/` video, splat (.ply) and cameras (.npz); `worlds/` the saved world, which
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


def main() -> int:
    spec = importlib.util.spec_from_file_location("launcher", PROJECT / "tools" / "comfy.py")
    launcher = importlib.util.module_from_spec(spec)
    sys.modules["launcher"] = launcher
    spec.loader.exec_module(launcher)
    with launcher.Server(launcher.home() / "base", Path("output").resolve()) as server:
        object_info = server.get("/object_info")
    for describe in (custom_trajectory, zoom):
        file = PROJECT / "workflows" / f"{describe.__name__}.json"
        file.write_text(
            json.dumps(build(describe(), object_info), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        print(f"wrote {file.relative_to(PROJECT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
