"""The workflows dropped into the real frontend, in a real browser, with both ways it draws nodes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted(file.stem for file in (PROJECT / "workflows").glob("*.json"))
MODEL_FILES = (".safetensors", ".pt")
TITLE = 30  # height of a node's title, which stands above its position
BORDER = 10  # that Nodes 2.0 draws around a node, thicker around one with an error
DROP = """([name, text]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([text], name, {type: "application/json"}));
    const target = document.querySelector("canvas#graph-canvas") ?? document.body;
    for (const kind of ["dragenter", "dragover", "drop"])
        target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer, clientX: 300, clientY: 300}));
}"""
SAVED = "() => { const graph = app.graph.serialize(); return [graph.nodes.map(n => [n.id, ...n.pos]), graph.extra.reroutes ?? []] }"

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "google-chrome"))) and not os.environ.get("CHROMIUM"),
    reason="no chromium on this machine (apt install chromium, or set CHROMIUM)",
)


@pytest.fixture(scope="module")
def server(launcher, tmp_path_factory):
    """A host on which nobody has put anything: no input, no world, no model."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "models").mkdir()
    with launcher.Server(folder / "base", folder / "output", "--models-directory", str(folder / "models")) as running:
        yield running


@pytest.fixture(scope="module")
def page(graphs, server):
    pytest.importorskip("playwright.sync_api")
    with graphs.browser.opened(server.url("/")) as tab:
        yield tab


@pytest.fixture(scope="module")
def info(server) -> dict:
    """What the server says of its nodes, once: it takes as long as a page."""
    return server.get("/object_info")


def workflow_of(name: str) -> dict:
    return json.loads((PROJECT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_dropped_workflow_opens_complete_and_queues_as_the_command_line_does(page, info, launcher, name):
    workflow = workflow_of(name)
    page.evaluate("() => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    page.evaluate("() => window.app.graph.clear()")
    page.evaluate(DROP, [f"{name}.json", json.dumps(workflow)])
    page.wait_for_function("n => window.app.graph._nodes.length === n", arg=len(workflow["nodes"]), timeout=30_000)
    missing = page.evaluate("() => window.app.graph._nodes.filter(n => !window.LiteGraph.registered_node_types[n.type]).map(n => n.type)")
    assert missing == [], "the frontend knows every node"
    in_browser = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    converted = launcher.to_api_format(workflow, info)
    assert set(in_browser) == set(converted)
    for node, found in in_browser.items():
        assert found["class_type"] == converted[node]["class_type"]
        ours = converted[node]["inputs"]
        # the browser draws the viewer's state and leaves out an unconnected text; all else must be the same
        differing = {k for k in set(ours) | set(found["inputs"]) if ours.get(k) != found["inputs"].get(k)}
        assert all(k == "viewport_state" or not (ours.get(k) or found["inputs"].get(k)) for k in differing), differing


@pytest.fixture(scope="module", params=WORKFLOWS)
def shown(request, page, graphs) -> tuple[dict, dict[str, list], tuple, list[int]]:
    """A workflow, its nodes as each frontend draws them, places and turns as it would be saved then, and what is red."""
    workflow, nodes = workflow_of(request.param), {}
    for frontend in reversed(graphs.browser.FRONTENDS):
        graphs.browser.show(page, workflow, frontend)
        nodes[frontend] = graphs.browser.drawn(page, frontend)
        if os.environ.get("LYRA2_SCREENSHOTS"):
            page.screenshot(path=str(Path(os.environ["LYRA2_SCREENSHOTS"]) / f"{request.param} {frontend}.png"))
    red = page.evaluate("() => app.graph._nodes.filter(n => n.has_errors).map(n => +n.id)")
    return workflow, nodes, page.evaluate(SAVED), red


def test_nothing_overlaps_and_nothing_moves_however_the_frontend_draws_it(shown):
    workflow, drawn, (places, turns), _red = shown
    saved = {node["id"]: node for node in workflow["nodes"]}
    groups = {group["title"]: group["bounding"] for group in workflow["groups"]}
    group_boxes = {title: (x, y, x + width, y + height) for title, (x, y, width, height) in groups.items()}
    for frontend, nodes in drawn.items():
        boxes = {}
        for number, x, y, width, height, least_width, least_height in nodes:
            node = saved[number]
            what = f"{frontend}: {node.get('title') or node['type']} ({number})"
            assert abs(x - node["pos"][0]) < 1 and abs(y - node["pos"][1]) < 1, f"{what} moved"
            room = (least_width - node["size"][0], least_height - node["size"][1])
            assert max(room) < BORDER, f"{what} needs {room} more; run: python tools/comfy.py workflows --measure"
            boxes[what] = (x, y - TITLE, x + width, y + height)
        touching = [pair for pair in itertools.combinations(boxes, 2) if meet(boxes[pair[0]], boxes[pair[1]], 10)]
        assert not touching
        for title, group in group_boxes.items():
            cut = [what for what, box in boxes.items() if meet(box, group) and not inside(box, group)]
            assert not cut, f"{frontend}: {title} cuts through {cut}"
        assert not [pair for pair in itertools.combinations(group_boxes.values(), 2) if meet(*pair)]
    assert {number: (x, y) for number, x, y in places} == {n: tuple(node["pos"]) for n, node in saved.items()}
    assert [turn["pos"] for turn in turns] == [turn["pos"] for turn in workflow["extra"].get("reroutes", [])]


def meet(a: tuple, b: tuple, margin: float = 0) -> bool:
    return a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin


def inside(a: tuple, b: tuple) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]


def test_on_a_fresh_host_nothing_is_red_but_missing_models(shown, info, launcher):
    workflow, _drawn, _saved, red = shown
    outside = {node.partition(":")[0] for node, entry in models_of(launcher.to_api_format(workflow, info))}
    assert set(map(str, red)) <= outside
    wrong = [
        f"{entry['class_type']}.{name} = {value!r}"
        for entry in launcher.to_api_format(workflow, info).values()
        for name, value in entry["inputs"].items()
        for options in choices(info[entry["class_type"]], name)
        if isinstance(value, str) and value and value not in options and not value.endswith(MODEL_FILES)
    ]
    assert not wrong


def models_of(prompt: dict):
    return [
        (node, entry)
        for node, entry in prompt.items()
        if any(isinstance(value, str) and value.endswith(MODEL_FILES) for value in entry["inputs"].values())
    ]


def choices(definition: dict, name: str) -> list[list]:
    """The options of a plain combo; none for anything else."""
    specs = [group.get(name) for group in definition["input"].values()]
    specs = [spec for spec in specs if isinstance(spec, list)]
    plain = [spec[0] for spec in specs if isinstance(spec[0], list)]
    return plain + [spec[1]["options"] for spec in specs if spec[0] == "COMBO" and "options" in spec[1]]


def test_every_shipped_file_is_what_the_generator_writes(project):
    done = subprocess.run(
        [sys.executable, str(project / "tools" / "comfy.py"), "workflows", "--check"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_subgraphs_are_offered_and_open_as_they_are_in_the_workflows(page, graphs, server, project):
    offered = [entry for entry in server.get("/global_subgraphs").values() if entry["source"] == "custom_node"]
    files = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (project / "subgraphs").glob("*.json")}
    assert {entry["name"] for entry in offered} == set(files) == {sub.name for sub in graphs.parts.SUBGRAPHS}
    for name, blueprint in files.items():
        graphs.browser.show(page, blueprint, "classic")
        shown = page.evaluate("() => app.graph._nodes.map(n => [n.title, n.isSubgraphNode?.() ?? false, n.outputs.length])")
        assert shown == [[name, True, len(blueprint["definitions"]["subgraphs"][0]["outputs"])]]
    used = [each for name in WORKFLOWS for each in workflow_of(name)["definitions"]["subgraphs"]]
    assert used and all(each == files[each["name"]]["definitions"]["subgraphs"][0] for each in used)


def test_templates_are_served_with_their_thumbnails(page):
    for name in WORKFLOWS:
        status, kind = page.evaluate(
            "async url => { const a = await fetch(url); return [a.status, a.headers.get('content-type')]; }",
            f"/api/workflow_templates/ComfyUI-LyraWorlds/{name}.jpg",
        )
        assert (status, kind) == (200, "image/jpeg")
