"""What a node of the host has: sockets and widgets, in the order in which the frontend keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .describe import Node

DYNAMIC_COMBO, AUTOGROW = "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "LOAD_3D", DYNAMIC_COMBO)


@dataclass(frozen=True)
class Input:
    name: str
    type: str
    value: object = None  # of a widget
    is_widget: bool = False
    then: tuple = ()  # what the frontend saves after it


def inputs_of(node: Node, definition: Mapping)  -> list[Input]:
    """All of a node's; SystemExit for values that have no widget."""
    order = definition["input_order"]
    specs = [
        (name, definition["input"][part][name]) for part in ("required", "optional") for name in order.get(part, [])
    ]
    expanded = [pair for name, spec in specs for pair in _expanded(name, spec, node.values)]
    unknown = set(node.values) - {name for name, _ in expanded}
    if unknown:
        raise SystemExit(f"{node.kind} has no widgets {sorted(unknown)}")
    found = [_input(name, spec, node.values) for name, spec in expanded if spec[0] != AUTOGROW]
    return found + [Input(name, "IMAGE") for name in grown(node, definition)]


def grown(node: Node, definition: Mapping) -> list[str]:
    """Connected sockets that the node has because they are connected."""
    slots = [name for part in definition["input"].values() for name, spec in part.items() if spec[0] == AUTOGROW]
    return [name for name in node.sources if name.partition(".")[0] in slots]


def _expanded(name: str, spec: list, chosen: Mapping) -> list[tuple[str, list]]:
    """A dynamic combo is its own widget and then the inputs of the chosen option, named combo.input."""
    if spec[0] != DYNAMIC_COMBO:
        return [(name, spec)]
    key = chosen.get(name, spec[1]["options"][0]["key"])
    option = next(o for o in spec[1]["options"] if o["key"] == key)
    inner = [
        (f"{name}.{n}", s) for part in ("required", "optional") for n, s in option["inputs"].get(part, {}).items()
    ]
    return [(name, spec), *(pair for n, s in inner for pair in _expanded(n, s, chosen))]


def _input(name: str, spec: list, values: Mapping) -> Input:
    options = spec[1] if len(spec) > 1 else {}
    kind = "COMBO" if isinstance(spec[0], list) else spec[0]
    if kind not in WIDGETS or options.get("forceInput"):
        return Input(name, spec[0])
    then = ("fixed",) if options.get("control_after_generate") else ()
    return Input(name, kind, values.get(name, _default(spec)), True, then)


def _default(spec: list):
    options = spec[1] if len(spec) > 1 else {}
    if spec[0] == DYNAMIC_COMBO:
        return options["options"][0]["key"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    return options.get("default", (choices or [""])[0])
