"""Graphs as the frontend saves them (version 0.4), with the node definitions of a running host."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

from . import layout
from .describe import Graph, Group, Node, Subgraph
from .inputs import DYNAMIC_COMBO, Input, grown, inputs_of
from .parts import NOTE, SAVE_EVERYTHING, SUBGRAPHS

NOTE_WIDTH, NOTE_LINE = 620, 95  # letters that a line of that width holds
WIDTH = 320  # of a node that does not need more
# least heights of nodes that show something once they ran, or that people write in
ROOMY = {
    "LoadImage": 340,
    "LoadVideo": 340,
    "PreviewImage": 300,
    "Lyra2DrawTrajectory": 300,
    "SaveVideo": 420,
    "SaveGLB": 460,
    "SaveGaussianSplat": 560,
    "PreviewGaussianSplat": 560,
    "CLIPTextEncode": 180,
    "Lyra2Explore": 900,
    "Lyra2Explorer": 820,
    "Lyra2Consistency": 620,
}
WIDER = {"Lyra2Explorer": 960, "Lyra2Consistency": 560}  # a view to walk in, beside its panels; a table
# what these show while they run stands below their widgets
WATCHED = ("Lyra2PreviewChunks", "Lyra2AppendChunk", "Lyra2WorldGaussians", "Lyra2WorldMesh", "Lyra2RenderSplat")
WATCHED += ("Lyra2Reconstruct", "Lyra2ExportWorld", "SamplerCustomAdvanced", SAVE_EVERYTHING.name)
PICTURE = 200  # height of that
# which of tools/models.py a loader's file is, for the host's missing-model dialog
FILES = {
    "CLIPLoader": "umt5-fp8",
    "CLIPVisionLoader": "clip-vision",
    "VAELoader": "wan-vae",
    "LoadDA3Model": "da3-mono",
}
BYPASSED = 4
INPUTS_NODE, OUTPUTS_NODE = -10, -20  # the frontend's ids of a subgraph's two ends
INNER_IDS = 100  # of a subgraph's nodes from here on, because the frontend renumbers what is also the id of a node outside


# ------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Writer:
    """Writes graphs for one host."""

    definitions: Mapping[str, Mapping]  # /object_info
    sizes: Mapping[str, list[int]]
    model_files: Callable[[list[str]], list[dict]]  # names in tools/models.py -> entries of properties.models

    def workflow(self, graph: Graph) -> dict:
        """A workflow with all subgraphs that it uses."""
        placed = layout.place(graph, self.size_of, self._slot)
        nodes, links = self._nodes(graph.nodes, placed)
        used = [sub for sub in SUBGRAPHS if any(node.kind == sub.name for node in graph.nodes.values())]
        turns, extensions = _reroutes(graph, placed, nodes, links)
        extra = {"workflowRendererVersion": "LG"} | ({"reroutes": turns, "linkExtensions": extensions} if turns else {})
        return {
            **_head(nodes, links),
            "groups": [_group(number, *group) for number, group in enumerate(placed.groups, 1)],
            "definitions": {"subgraphs": [self.definition(sub) for sub in used]},
            "extra": extra,
        }

    def blueprint(self, subgraph: Subgraph) -> dict:
        """A file of subgraphs/: one instance, and what is in it."""
        node = Node(subgraph.name)
        graph = Graph(((Group("", "", ({"instance": node},)),),))
        placed = layout.place(graph, self.size_of, self._slot)
        nodes, links = self._nodes(graph.nodes, placed)
        definitions = {"subgraphs": [self.definition(subgraph)]}
        return {**_head(nodes, links), "groups": [], "definitions": definitions, "extra": {"workflowRendererVersion": "LG"}}

    def definition(self, subgraph: Subgraph) -> dict:
        """What is in a subgraph, and what leads in and out of it."""
        placed = layout.place(Graph(((Group("", "", subgraph.columns),),)), self.size_of, self._slot)
        nodes, links = self._nodes(subgraph.nodes, placed, INNER_IDS * (1 + SUBGRAPHS.index(subgraph)))
        by_name = dict(zip(subgraph.nodes, nodes, strict=True))
        inner = _InnerLinks(links)
        boxes = [placed.box(name) for name in subgraph.nodes]
        left, right = min(box.left for box in boxes), max(box.right for box in boxes)
        inputs = [
            self._end(subgraph, "in", name, slot, left - 120, [
                inner.add(INPUTS_NODE, slot, by_name[within], self._slot(subgraph.nodes[within], entry)) for within, entry in targets
            ])
            for slot, (name, targets) in enumerate({**subgraph.inputs, **subgraph.widgets}.items())
        ]  # fmt: skip
        outputs = [
            self._end(subgraph, "out", name, slot, right + 140, [inner.leave(by_name[within], output, slot)])
            for slot, (name, (within, output)) in enumerate(subgraph.outputs.items())
        ]
        return {
            "id": _uuid(subgraph.name),
            "version": 1,
            "state": {"lastGroupId": 0, "lastNodeId": nodes[-1]["id"], "lastLinkId": len(inner.links), "lastRerouteId": 0},
            "revision": 0,
            "config": {},
            "name": subgraph.name,
            "category": subgraph.category,
            "description": subgraph.description,
            "inputNode": {"id": INPUTS_NODE, "bounding": [left - 260, 0, 160, 40 + layout.SLOT * len(inputs)]},
            "outputNode": {"id": OUTPUTS_NODE, "bounding": [right + 120, 0, 160, 40 + layout.SLOT * len(outputs)]},
            "inputs": inputs,
            "outputs": outputs,
            "widgets": [],
            "nodes": nodes,
            "groups": [],
            "links": inner.links,
            "extra": {"workflowRendererVersion": "LG"},
        }

    @staticmethod
    def _end(subgraph: Subgraph, side: str, name: str, slot: int, x: float, links: list[dict]) -> dict:
        """An input or output of a subgraph, with the inner links that begin or end there."""
        numbers = [link["id"] for link in links]
        place = [x, layout.SLOT * slot]
        return {"id": _uuid(subgraph.name, side, name), "name": name, "type": links[0]["type"], "linkIds": numbers, "pos": place}

    def signature(self, node: Node) -> str:
        """What a node's size depends on: its class, the chosen options that bring widgets of their own, sockets that it grew."""
        chosen = [str(entry.value) for entry in self._slots(node)[0] if entry.type == DYNAMIC_COMBO]
        more = len(self.grown(node))
        return ": ".join([node.kind, *chosen, *([f"{more} connected"] if more else [])])

    def grown(self, node: Node) -> list[str]:
        return [] if _subgraph(node) else grown(node, self.definitions[node.kind])

    def size_of(self, node: Node) -> layout.Size:
        if node.kind == NOTE:
            return NOTE_WIDTH, note_height(node.values[""])
        name = self.signature(node)
        if name not in self.sizes:
            raise SystemExit(f"nobody knows how large {name!r} is; run: python tools/comfy.py workflows --measure")
        width, height = self.sizes[name]
        room = height + PICTURE * (node.kind in WATCHED)
        return max(WIDTH, width, WIDER.get(node.kind, 0)), max(room, ROOMY.get(node.kind, 0))

    def _slots(self, node: Node) -> tuple[list[Input], list[tuple[str, str]]]:
        """A node's inputs, and its outputs' names and types."""
        subgraph = _subgraph(node)
        if subgraph is None:
            definition = self.definitions[node.kind]
            return inputs_of(node, definition), list(zip(definition["output_name"], definition["output"], strict=True))
        inner = {name: self._slots(each) for name, each in subgraph.nodes.items()}
        inputs = []
        for name, targets in {**subgraph.inputs, **subgraph.widgets}.items():
            within, entry = targets[0]
            found = next(each for each in inner[within][0] if each.name == entry)
            inputs.append(Input(name, found.type, node.values.get(name, found.value), name in subgraph.widgets))
        unknown = set(node.values) - set(subgraph.widgets)
        if unknown:
            raise SystemExit(f"{node.kind} has no widgets {sorted(unknown)}")
        return inputs, [(name, inner[within][1][output][1]) for name, (within, output) in subgraph.outputs.items()]

    def _shown(self, node: Node) -> list[Input]:
        """The inputs that are saved as such: sockets, and widgets that take their value from elsewhere."""
        wired = {*node.sources, *_fed(node)}
        whole = _subgraph(node) is not None
        return [entry for entry in self._slots(node)[0] if whole or not entry.is_widget or entry.name in wired]

    def _slot(self, node: Node, name: str) -> int:
        return next(i for i, entry in enumerate(self._shown(node)) if entry.name == name)

    def _nodes(self, graph: Mapping[str, Node], placed: layout.Placed, first: int = 1) -> tuple[list[dict], list[list]]:
        """Nodes, numbered from `first`, and links [id, source, output, target, input, type]."""
        ids = {name: number for number, name in enumerate(graph, first)}
        kinds = [node.kind for node in graph.values()]
        nodes, links = [], []
        for name, node in graph.items():
            saved = self._node(node, ids[name], placed.positions[name], placed.sizes[name])
            if node.title or kinds.count(node.kind) > 1:
                saved["title"] = node.title or name.capitalize()  # so that people, and --set, can tell them apart
            for entry, (source, output) in node.sources.items():
                slot = next(i for i, each in enumerate(saved["inputs"]) if each["name"] == entry)
                links.append([len(links) + 1, ids[source], output, ids[name], slot, saved["inputs"][slot]["type"]])
                saved["inputs"][slot]["link"] = len(links)
            nodes.append(saved)
        for link in links:
            nodes[link[1] - first]["outputs"][link[2]]["links"].append(link[0])
        return nodes, links

    def _node(self, node: Node, number: int, position: tuple[int, int], size: tuple[int, int]) -> dict:
        subgraph = _subgraph(node)
        properties = {} if subgraph or node.kind == NOTE else {"Node name for S&R": node.kind}
        if node.kind in FILES:
            properties["models"] = self.model_files([FILES[node.kind]])
        saved = {
            "id": number,
            "type": _uuid(subgraph.name) if subgraph else node.kind,
            "pos": list(position),
            "size": list(size),
            "flags": {},
            "order": number - 1,
            "mode": BYPASSED if node.bypassed else 0,
            "inputs": [],
            "outputs": [],
            "properties": properties,
            "widgets_values": [],
        }
        if node.kind == NOTE:
            return {**saved, "widgets_values": [node.values[""]]}
        inputs, outputs = self._slots(node)
        saved["widgets_values"] = [value for entry in inputs if entry.is_widget for value in (entry.value, *entry.then)]
        saved["inputs"] = [
            {"name": entry.name, "type": entry.type, "link": None}
            | ({"widget": {"name": entry.name}} if entry.is_widget else {})
            for entry in self._shown(node)
        ]
        saved["outputs"] = [{"name": name, "type": kind, "links": []} for name, kind in outputs]
        if subgraph:
            saved["title"] = subgraph.name
        return saved


def _subgraph(node: Node) -> Subgraph | None:
    return next((subgraph for subgraph in SUBGRAPHS if subgraph.name == node.kind), None)


def _fed(node: Node) -> list[str]:
    """Widgets of an inner node of a subgraph that are fed from outside."""
    return [
        entry
        for subgraph in SUBGRAPHS
        for targets in subgraph.widgets.values()
        for inner, entry in targets
        if subgraph.nodes[inner] is node
    ]


def note_height(text: str) -> int:
    """Enough for every paragraph and list entry of a note."""
    entries = text.replace("\n  ", " ").replace("\n- ", "\n\n- ").split("\n\n")
    return 60 + sum(10 + 20 * ceil(len(entry) / NOTE_LINE) for entry in entries)


class _InnerLinks:
    """The links of a subgraph, which are objects where a workflow has lists."""

    KEYS = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")

    def __init__(self, links: list[list]):
        self.links = [dict(zip(self.KEYS, link, strict=True)) for link in links]

    def _append(self, *ends) -> dict:
        self.links.append(dict(zip(self.KEYS, (len(self.links) + 1, *ends), strict=True)))
        return self.links[-1]

    def add(self, origin: int, origin_slot: int, target: dict, slot: int) -> dict:
        link = self._append(origin, origin_slot, target["id"], slot, target["inputs"][slot]["type"])
        target["inputs"][slot]["link"] = link["id"]
        return link

    def leave(self, origin: dict, output: int, slot: int) -> dict:
        link = self._append(origin["id"], output, OUTPUTS_NODE, slot, origin["outputs"][output]["type"])
        origin["outputs"][output]["links"].append(link["id"])
        return link


def _reroutes(graph: Graph, placed: layout.Placed, nodes: list[dict], links: list[list]) -> tuple[list[dict], list[dict]]:
    """The turns as the frontend's reroutes, numbered from 1, and for each link that has some the last of them."""
    reroutes = [
        {"id": number, "pos": list(turn.place), "linkIds": []} | ({} if turn.before is None else {"parentId": turn.before + 1})
        for number, turn in enumerate(placed.turns, 1)
    ]
    names, extensions = list(graph.nodes), []
    for link, _, _, target, slot, _ in links:
        turn = placed.last_turns.get((names[target - 1], nodes[target - 1]["inputs"][slot]["name"]))
        if turn is not None:
            extensions.append({"id": link, "parentId": turn + 1})
        while turn is not None:
            reroutes[turn]["linkIds"].append(link)
            turn = placed.turns[turn].before
    return reroutes, extensions


def _head(nodes: list[dict], links: list[list]) -> dict:
    return {
        "id": "",
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "config": {},
        "version": 0.4,
    }


def _group(number: int, title: str, colour: str, box: layout.Box) -> dict:
    bounding = [round(side) for side in (box.left, box.top, box.right - box.left, box.bottom - box.top)]
    return {"id": number, "title": title, "bounding": bounding, "color": colour, "font_size": 24, "flags": {}}


def _uuid(*words: str) -> str:
    """The same for the same words, so that a file changes only when its graph does."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("ComfyUI-LyraWorlds", *words))))
