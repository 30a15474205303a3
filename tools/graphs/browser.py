"""The real frontend in a real browser: opens graphs, says how large it draws them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    # pages are drawn by the processor: without a detour over an emulated GPU, which WebGL still takes
    "--disable-accelerated-2d-canvas",
    "--disable-gpu-rasterization",
    "--disable-gpu-compositing",
)
FRONTENDS = ("classic", "nodes 2.0")

OPEN = """async ([graph, modern]) => {
    await app.extensionManager.setting.set("Comfy.VueNodes.Enabled", modern);
    await app.loadGraphData(graph);
    const nodes = app.graph._nodes, edge = (side, end) => Math[side](...nodes.map(n => end(n)));
    const box = [edge("min", n => n.pos[0]), edge("min", n => n.pos[1] - 30)];
    box.push(edge("max", n => n.pos[0] + n.size[0]) - box[0], edge("max", n => n.pos[1] + n.size[1]) - box[1]);
    app.canvas.ds.fitToBounds(box, {zoom: 0.9});  // Nodes 2.0 draws only what can be seen
    app.canvas.setDirty(true, true);
}"""
# No node, as drawn or as the graph has it, has changed its place or size for a while, counted in drawn pages
SETTLED = """async () => {
    const places = () => JSON.stringify([
        app.graph._nodes.map(n => [...n.pos, ...n.size]),
        [...document.querySelectorAll("[data-node-id]")].map(e => [e.offsetWidth, e.offsetHeight, ...[...e.children].map(c => c.offsetHeight)]),
    ]);
    for (let last = "", same = 0, left = 600; same < 4; left--) {
        if (!left) throw new Error("nodes still moved or grew after 600 drawn pages");
        await new Promise(done => setTimeout(() => requestAnimationFrame(done), 50));
        const now = places();
        same = now === last ? same + 1 : 0;
        last = now;
    }
}"""
# [id, x, y, width, height, least width, least height] of each node; the title above y is not counted
CLASSIC = """() => app.graph._nodes.map(n => [+n.id, ...n.pos, ...n.size, ...n.computeSize()])"""
# The element begins with the title, 30 high, and buttons hang below it. Its own scale tells pixels from the graph's
# units, because the canvas knows of a change of zoom before the elements follow.
MODERN = """() => {
    let first;
    return app.graph._nodes.map(n => {
        const element = document.querySelector(`[data-node-id="${n.id}"]`);
        const {left, top, width} = element.getBoundingClientRect(), scale = width / element.offsetWidth;
        const low = [element, ...element.children].map(e => e.getBoundingClientRect()).filter(b => b.height).map(b => b.bottom);
        const height = (Math.max(...low) - top) / scale - 30;
        first ??= {left, top, pos: [...n.pos]};
        const x = first.pos[0] + (left - first.left) / scale, y = first.pos[1] + (top - first.top) / scale;
        return [+n.id, x, y, element.offsetWidth, height, element.offsetWidth, height];
    });
}"""


@contextmanager
def opened(url: str, width: int = 1600, height: int = 900) -> Iterator:
    """A page with the frontend of the host at `url`; playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(url)
        page.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=90_000)
        yield page
        browser.close()


def show(page, graph: dict, frontend: str) -> None:
    page.evaluate(OPEN, [graph, frontend == "nodes 2.0"])
    page.wait_for_function("n => window.app.graph._nodes.length === n", arg=len(graph["nodes"]), timeout=30_000)
    if frontend == "nodes 2.0":
        page.wait_for_function("n => document.querySelectorAll('[data-node-id]').length >= n", arg=len(graph["nodes"]))
    page.evaluate(SETTLED)  # texts and pictures have found their size


def drawn(page, frontend: str) -> list[list[float]]:
    """[id, x, y, width, height, least width, least height] of each node, its title above y left out."""
    return page.evaluate(CLASSIC if frontend == "classic" else MODERN)
