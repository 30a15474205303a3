"""The workflows dropped into the real frontend, in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-gpu",
]
DROP = """([name, text]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([text], name, {type: "application/json"}));
    const target = document.querySelector("canvas#graph-canvas") ?? document.body;
    for (const kind of ["dragenter", "dragover", "drop"])
        target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer, clientX: 300, clientY: 300}));
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt install chromium, or set CHROMIUM)")


@pytest.fixture(scope="module")
def server(launcher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    with launcher.Server(folder / "base", folder / "output") as running:
        yield running


@pytest.fixture(scope="module")
def page(server):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1600, "height": 900})
        tab.goto(server.url("/"))
        tab.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=90_000)
        yield tab
        browser.close()


@pytest.mark.parametrize("name", ["custom_trajectory", "zoom", "world_to_engine", "world_to_splat", "video_to_splat"])
def test_a_dropped_workflow_opens_complete_and_queues_as_the_command_line_does(page, server, launcher, project, name):
    text = (project / "workflows" / f"{name}.json").read_text()
    workflow = json.loads(text)
    page.evaluate("() => window.app.graph.clear()")
    page.evaluate(DROP, [f"{name}.json", text])
    page.wait_for_function("n => window.app.graph._nodes.length === n", arg=len(workflow["nodes"]), timeout=30_000)
    missing = page.evaluate("() => window.app.graph._nodes.filter(n => !window.LiteGraph.registered_node_types[n.type]).map(n => n.type)")
    assert missing == [], "the frontend knows every node"
    in_browser = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    converted = launcher.to_api_format(workflow, server.get("/object_info"))
    assert set(in_browser) == set(converted)
    for node, found in in_browser.items():
        assert found["class_type"] == converted[node]["class_type"]
        ours = converted[node]["inputs"]
        # the browser draws the viewer's state and leaves out an unconnected text; all else must be the same
        differing = {k for k in set(ours) | set(found["inputs"]) if ours.get(k) != found["inputs"].get(k)}
        assert all(k == "viewport_state" or not (ours.get(k) or found["inputs"].get(k)) for k in differing), differing
    if os.environ.get("LYRA2_SCREENSHOTS"):
        page.evaluate("() => { window.app.canvas.fitViewToSelectionAnimated?.(); }")
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(os.environ["LYRA2_SCREENSHOTS"]) / f"{name}.png"))


def test_templates_are_served_with_their_thumbnails(page, server):
    for name in ("custom_trajectory", "zoom"):
        status, kind = page.evaluate(
            "async url => { const a = await fetch(url); return [a.status, a.headers.get('content-type')]; }",
            f"/api/workflow_templates/ComfyUI-LyraWorlds/{name}.jpg",
        )
        assert (status, kind) == (200, "image/jpeg")
