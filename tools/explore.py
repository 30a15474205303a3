"""Prepares the workflow that `comfy.py explore` opens: the template, with a photo or a saved world in place.

A page opens a template by its address. The prepared one is offered beside the pack's own by a folder of nodes that has none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from urllib.parse import urlencode

TEMPLATE = "explore_and_grow"
OFFERED_BY = "LyraWorlds-explore"


def is_world(path: Path) -> bool:
    return (path / "world.json").is_file()


def with_photo(workflow: dict, photo: Path, size: tuple[int, int], base: Path) -> dict:
    """The template with this photo, scaled to size (width, height), and a world of its name; the photo goes to BASE/input."""
    (base / "input").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(photo, base / "input" / photo.name)
    set_widgets(workflow, "LoadImage", {0: photo.name})
    set_widgets(workflow, "ImageScale", {1: size[0], 2: size[1], 3: "center"})
    set_widgets(workflow, "Lyra2Explorer", {0: f"worlds/{photo.stem}", 1: ""})
    return workflow


def with_world(workflow: dict, folder: str, state: str) -> dict:
    """The template standing at a state of a folder in the output folder."""
    plan = {"path": [], "lyra2": {"version": 1, "from": state}}
    set_widgets(workflow, "Lyra2Explorer", {0: folder, 1: json.dumps(plan)})
    return workflow


def set_widgets(workflow: dict, kind: str, values: dict[int, object]) -> None:
    """Set values, by the place of the widget, of the workflow's only node of a kind."""
    (node,) = (node for node in workflow["nodes"] if node["type"] == kind)
    for place, value in values.items():
        node["widgets_values"][place] = value


def offer(workflow: dict, base: Path) -> str:
    """Put a workflow where the host offers it as a template; the part of an address that opens it."""
    folder = base / "custom_nodes" / OFFERED_BY
    (folder / "workflows").mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")
    (folder / "workflows" / f"{TEMPLATE}.json").write_text(json.dumps(workflow), encoding="utf-8")
    return "/?" + urlencode({"template": TEMPLATE, "source": OFFERED_BY})
