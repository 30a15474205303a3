#!/usr/bin/env python3
"""Writes workflows/*.json and subgraphs/*.json from the descriptions in graphs/, with the node definitions of a running host.

    python tools/comfy.py workflows [--measure] [--check] [--thumbnails]

The shipped files are what this writes. Nodes stand where graphs/layout.py puts them, from the sizes in graphs/sizes.json;
--measure asks the real frontend for these again, which needs a Chromium. --check writes nothing and fails if a file differs.
--thumbnails draws workflows/*.jpg too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from math import ceil
from pathlib import Path

from graphs import begin, browser, engine, explorer, learn, lyra, parts, preview, thumbnails, vace
from graphs.describe import Graph, Group, Node
from graphs.frontend import WIDTH, Writer
from host import TOOLS, load

PROJECT = TOOLS.parent
SIZES = TOOLS / "graphs" / "sizes.json"
WORKFLOWS = (*preview.WORKFLOWS, *begin.WORKFLOWS, *lyra.WORKFLOWS, *vace.WORKFLOWS, *engine.WORKFLOWS, *explorer.WORKFLOWS, *learn.WORKFLOWS)


def writer(definitions: dict, sizes: dict) -> Writer:
    return Writer(definitions, sizes, load("lyra_models", TOOLS / "models.py").template_entries)


def files(to: Writer) -> dict[Path, dict]:
    """Every shipped file and what is in it."""
    workflows = {PROJECT / "workflows" / f"{describe.__name__}.json": to.workflow(describe()) for describe in WORKFLOWS}
    return workflows | {PROJECT / "subgraphs" / f"{sub.name}.json": to.blueprint(sub) for sub in parts.SUBGRAPHS}


def text_of(graph: dict) -> str:
    return json.dumps(graph, indent=1, ensure_ascii=False) + "\n"


def gallery(to: Writer) -> Graph:
    """One node of every size that any graph or subgraph has."""
    every = [node for describe in WORKFLOWS for node in describe().nodes.values()]
    every += [node for subgraph in parts.SUBGRAPHS for node in subgraph.nodes.values()]
    one_each = {
        to.signature(node): Node(node.kind, node.values, dict.fromkeys(to.grown(node), ("LoadImage", 0)))
        for node in every
        if node.kind != parts.NOTE
    }
    rows = [dict(sorted(one_each.items())[first : first + 8]) for first in range(0, len(one_each), 8)]
    return Graph(((Group("", "", tuple(rows)),),))


def measure(url: str, definitions: dict) -> dict[str, list[int]]:
    """The least size of every node, the larger one of both frontends."""
    described = gallery(writer(definitions, {}))
    graph = writer(definitions, dict.fromkeys(described.nodes, [WIDTH, 10])).workflow(described)
    for node in graph["nodes"]:
        node["size"] = [WIDTH, 10]
    found = dict.fromkeys(described.nodes, (0, 0))
    with browser.opened(url) as page:
        for frontend in browser.FRONTENDS:
            browser.show(page, graph, frontend)
            for name, (*_, width, height) in zip(found, browser.drawn(page, frontend), strict=True):
                found[name] = tuple(max(a, 10 * ceil(round(b) / 10)) for a, b in zip(found[name], (width, height), strict=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="comfy.py workflows", description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="ask the real frontend how large it draws each node")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not what would be written")
    parser.add_argument("--thumbnails", action="store_true", help="draw the pictures of the template browser too")
    options = parser.parse_args()
    launcher = load("lyra_comfy", TOOLS / "comfy.py")
    with tempfile.TemporaryDirectory() as folder, launcher.Server(Path(folder) / "base", Path(folder) / "output") as server:
        definitions = server.get("/object_info")  # of a host without files of anybody's own
        if options.thumbnails:
            described = {describe.__name__: describe() for describe in WORKFLOWS}
            thumbnails.make(PROJECT / "workflows", described, lambda prompt: launcher.run_prompt(server, prompt), server)
        sizes = measure(server.url("/"), definitions) if options.measure else json.loads(SIZES.read_text())
    if options.measure and not options.check:
        SIZES.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in sizes.items()) + "\n}\n")
    different = 0
    for file, graph in files(writer(definitions, sizes)).items():
        if file.is_file() and file.read_text(encoding="utf-8") == text_of(graph):
            continue
        different += 1
        if not options.check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text_of(graph), encoding="utf-8")
        print(f"{'differs:' if options.check else 'wrote'} {file.relative_to(PROJECT)}")
    return int(options.check and different > 0)


if __name__ == "__main__":
    sys.exit(main())
