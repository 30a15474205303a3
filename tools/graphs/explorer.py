"""Graphs around the Explorer: stand, look around, lay the next path, grow."""

from __future__ import annotations

from . import lyra, parts
from .describe import Graph, Node
from .parts import from_left_to_right

HOW = """**Begin**: press *Begin* in the view (or Run). You stand where the photo was taken.

**Fly** with W A S D, Q E and the mouse; **lay keys** with K; the strip below shows how much of each view is known already.
**Grow** makes the next part of the world, right where you look. The tree keeps every branch; any state can be stood at again.

**Run** instead of *Grow* also writes what the world has become to `exports/`: splat, mesh, cameras, pictures, video; and *Consistency* says how
well it holds together."""
TEXT = """## {title}
No model files are needed: what was seen is looked up, what was not is continued by example. **Static scenes only.**

It runs as it is, with ComfyUI's example picture. **You bring** your own photo. It is cropped to 832x480 around its middle,
never stretched; for an upright one set *Upscale Image* to 480x832.

{how}

The world is saved under `worlds/` in the output folder after every chunk, and the workflow remembers where you stand."""


def explorer(name: str) -> dict[str, Node]:
    return {"explorer": Node("Lyra2Explorer", {"folder": f"worlds/{name}"}, {"world": ("begin", 0)})}


def grown(kind: str, values: dict, sources: dict) -> dict[str, Node]:
    stands = {"world": ("explorer", 0), "cameras": ("explorer", 1), "save_to": ("explorer", 5)}
    return {"walk": Node(kind, values, {**sources, **stands})}


def explore_and_grow() -> Graph:
    name = "explore_and_grow"
    text = TEXT.format(title="Explore and grow, geometry preview", how=HOW)
    return from_left_to_right(
        parts.note(text),
        parts.photo({**parts.loaded_photo(), **parts.laid_out_depth({})}, parts.begun()),
        parts.walk(explorer(name), grown("Lyra2PreviewChunks", {}, {"captions": ("explorer", 2)}), title="2 Explore and grow"),
        parts.results(parts.everything("walk", name, geometry_model="none") | parts.scored("walk"), title="3 Results"),
    )


def lyra_explore_and_grow() -> Graph:
    name = "lyra_explore_and_grow"
    painter = lyra.explore("explorer", 0, 35, False, name, ("explorer", 2))
    plan = {"chunks": ("explorer", 3), "seed": ("explorer", 4)}
    sources = {**painter.sources, **plan}
    values = {key: value for key, value in painter.values.items() if key not in ("chunks", "save_to")}
    return from_left_to_right(
        lyra.note("Explore and grow", f"**You bring** a photo.\n\n{HOW}"),
        (parts.models(parts.loaded_models()), parts.photo(parts.loaded_photo(), parts.estimated_depth(), parts.begun())),
        parts.walk(explorer(name), grown("Lyra2Explore", values, sources), title="2 Explore and grow"),
        parts.results(parts.everything("walk", name) | parts.scored("walk"), title="3 Results"),
    )


WORKFLOWS = (explore_and_grow, lyra_explore_and_grow)
