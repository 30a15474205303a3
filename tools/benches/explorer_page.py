"""What the Explorer's page costs: requests and bytes, live numbers, a million points, in a real browser without a GPU."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import graphs.describe
import graphs.frontend
import graphs.parts
from host import TOOLS, load

from . import Result

MANY = """
    // 40 chunks of 25,000 points on the walls of a hall, as one chain
    const chain = Array.from({ length: 40 }, (_, i) => i.toString(16).padStart(8, '0'));
    let seed = 1; const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
    for (const state of chain) {
        const count = 25000, positions = new Float32Array(4 * count), colours = new Uint8Array(4 * count);
        for (let i = 0; i < count; i++) {
            const wall = i % 4, u = 8 * random() - 4, z = 2 + 10 * random();
            positions.set(wall < 2 ? [wall ? 4 : -4, u / 2, z, 0.003] : [u, wall === 2 ? 2 : -2, z, 0.003], 4 * i);
            colours.set([255 * random(), 128, 255 * random(), 0], 4 * i);
        }
        page.worlds.keep(`${x.folder} ${state}`, { count, positions, colours, frames: new Int32Array(count), levelEnds: [400, 1600, 6250, count],
            strides: [16, 8, 4, 2], coarse: 1600, coarseStride: 8, cameras: [x.standing], views: [], size: x.world.size });
    }
    const tree = chain.map((state, i) => ({ state, parent: chain[i - 1] ?? null, prompt: '', generator: 'none', seed: i, frames: 80 }));
    x.world = { ...x.world, chain, state: chain.at(-1), tree }; x.blockKeys = chain; x.settings.budget = 2_000_000; x.showBlocks(); x.planChanged();
"""
TIMED = """
    const { gl } = x.stage, pixel = new Uint8Array(4), times = [];
    for (let i = 0; i < given[1]; i++) {
        x.stage.setBudget(given[0]); const begin = performance.now(); x.stage.render({ ...x.picture(), side: null });
        gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, pixel); times.push(performance.now() - begin);
    }
    return { ms: times.sort((a, b) => a - b)[times.length >> 1], drawn: x.stage.drawn };
"""
LIVE = """
    const keys = Array.from({ length: 10 }, (_, i) => ({ R: [0, 0.02 * i, 0, 1], T: [0.05 * i, 0, 0.1 * i], fov: x.standing.fov }));
    x.settings.chunks = 1; const times = [];
    const few = x.livePoints(), some = new Float32Array(4 * 50000);
    for (let i = 0; i < some.length; i++) some[i] = few[i % few.length];
    x.points = some;
    for (let i = 0; i < 60; i++) {
        keys[4].T[0] += 0.001;
        const begin = performance.now();
        x.preview({ ...x.plan, keys: [...keys] });
        times.push(performance.now() - begin);
    }
    times.sort((a, b) => a - b);
    return { whole: times[0], median: times[30], points: x.points.length / 4 };
"""


def page_module():
    file = TOOLS.parent / "tests" / "explorer" / "page.py"
    spec = importlib.util.spec_from_file_location("lyra_page", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lyra_page"] = module
    spec.loader.exec_module(module)
    return module


def bench_page() -> Iterator[Result]:
    tools = page_module()
    if tools.CHROMIUM is None:
        yield Result("explorer page", "skipped: no chromium (apt install chromium, or set CHROMIUM)")
        return
    from playwright.sync_api import sync_playwright

    launcher = load("lyra_comfy", TOOLS / "comfy.py")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        base = Path(folder)
        (base / "input").mkdir()
        shutil.copyfile(TOOLS / "demo" / "room.png", base / "input" / "photo.png")
        with launcher.Server(base, base / "output") as server:
            browser = tools.launch(driver)
            yield from measured(browser, tools, server)
            browser.close()


def measured(browser, tools, server) -> Iterator[Result]:
    graph = tools.workflow(graphs, server.get("/object_info"), "worlds/bench")
    first = tools.ExplorerPage(browser, server)
    first.use(False)
    first.load(graph)
    first.begin()
    first.tab.context.close()
    page = tools.ExplorerPage(browser, server)  # without what that one has kept
    ours = [r.url for r in page.asked()]
    size = sum(on_the_wire(url) for url in ours)
    yield Result("explorer page: requests at start", f"{len(ours)}, {size / 1e3:.1f} kB", "1, <= 12 kB", len(ours) == 1 and size <= 12e3)
    page.requests.clear()
    page.load(graph)
    page.standing()
    asked = page.asked()
    sizes = {r.url: on_the_wire(r.url) for r in asked}
    yield Result("explorer page: requests until the first points", str(len(asked)), "<= 6", len(asked) <= 6)
    yield Result("explorer page: bytes until then", f"{sum(sizes.values()) / 1e6:.2f} MB", "<= 1 MB", sum(sizes.values()) <= 1e6)
    libraries = sum(size for url, size in sizes.items() if "/lyra2/lib/" in url)
    yield Result("explorer page: three.js among them", f"{libraries / 1e6:.2f} MB", "<= 0.5 MB", libraries <= 0.5e6)
    js, ours = TOOLS.parent / "js", next(size for url, size in sizes.items() if "/lyra2/page/" in url)
    code = (js / "lyra2.js").stat().st_size + len(load("lyra_modules", TOOLS.parent / "nodes" / "routes" / "modules.py").linked(js))
    what = f"explorer page: our own code ({ours / 1e3:.0f} kB on the wire, with its texts and look)"
    yield Result(what, f"{code / 1e3:.1f} kB", "<= 150 kB", code <= 150e3)
    live = page.js(LIVE)
    what = f"explorer page: a change of 10 keys, path and numbers of {live['points']:.0f} points"
    # the fastest: on a busy machine a page waits, but does not work more
    yield Result(what, f"{live['whole']:.0f} ms (median {live['median']:.0f})", "<= 30 ms", live["whole"] <= 30)
    yield from grown(page)
    yield from many(page)
    yield from life(page, graph)


def grown(page) -> Iterator[Result]:
    """What the page fetches of a chunk that was grown."""
    page.js("x.settings.chunks = 1; x.setKeys([{ R: [0, 0, 0, 1], T: [0.1, 0, 0.4], fov: 40 }]);")
    page.wait("x.settled?.retrieved")
    page.requests.clear()
    page.js("await x.startGrowing();")
    page.wait("x.world.chain.length === 2 && !x.grow.busy && x.blockKeys.length === 2")
    fetched = [r for r in page.asked() if r.method == "GET"]
    size = sum(r.sizes()["responseBodySize"] for r in fetched)
    yield Result("explorer page: a grown chunk", f"{len(fetched)} requests, {size / 1e6:.2f} MB", "2, <= 0.4 MB", len(fetched) == 2 and size <= 0.4e6)


def life(page, graph: dict) -> Iterator[Result]:
    """Twenty nodes at once, and fifty that came and went, in the classic canvas; a tenth of them in Nodes 2.0."""
    page.load(graph)
    page.standing()
    page.add_explorers(19)
    contexts = page.contexts()
    yield Result("explorer page: WebGL contexts with 20 nodes", str(contexts), "1", contexts == 1)
    for vue, cycles, other, bar in ((False, 50, "CLIPTextEncode", "<= {:.0f} + 4"), (True, 12, "Lyra2PreviewChunks", "<= 1.5 x {:.0f}")):
        page.use(vue)
        page.load(graph)
        page.standing()
        page.cycle("Lyra2Explorer", 2)
        cost = {}
        for kind in (other, "Lyra2Explorer"):
            before = page.dom_nodes()
            alive = page.cycle(kind, cycles)
            cost[kind] = (page.dom_nodes() - before) / cycles
        name = "Nodes 2.0" if vue else "classic"
        yield Result(f"explorer page: Explorers alive of {cycles} that came and went, {name}", str(alive), "0", alive == 0)
        most = 1.5 * cost[other] if vue else cost[other] + 4
        what = f"explorer page: DOM nodes that a cycle leaves, {name} ({other}: {cost[other]:.0f})"
        yield Result(what, f"{cost['Lyra2Explorer']:.0f}", bar.format(cost[other]), cost["Lyra2Explorer"] <= most)
    page.use(False)


def on_the_wire(url: str) -> int:
    """Bytes that a browser without it in its cache would take."""
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept-Encoding": "gzip"}), timeout=60) as answer:
        return len(answer.read())


def many(page) -> Iterator[Result]:
    page.js(MANY)
    page.wait("x.stage.drawn > 900000", 120)
    few = page.js(TIMED, 100_000, 5)
    all_of_them = page.js(TIMED, 2_000_000, 3)
    page.focus()
    page.tab.keyboard.down("ArrowRight")
    page.tab.wait_for_timeout(6000)
    budget = page.x("x.stage.movingBudget")
    moving = page.js(TIMED, budget, 5)
    page.tab.keyboard.up("ArrowRight")
    page.js("window.stopped = performance.now();")
    page.wait("x.stage.drawn > 900000 && !x.stage.drawing()", 60)
    back = page.js("return performance.now() - window.stopped;")
    ratio = moving["ms"] / few["ms"]
    yield Result("explorer page: a frame of 100,000 and of 1,000,000 points", f"{few['ms']:.0f} and {all_of_them['ms']:.0f} ms")
    what = f"explorer page: a frame while moving among a million points ({moving['drawn']} drawn), over that of 100,000"
    yield Result(what, f"{ratio:.2f} times", "<= 1.5", ratio <= 1.5)
    yield Result("explorer page: all points are back after stopping", f"{back / 1000:.1f} s", "<= 3 s", back <= 3000)
