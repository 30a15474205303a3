"""ComfyUI's page with an Explorer on it, in a real browser, for the tests of js/ and for tools/benches/explorer.py."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--js-flags=--expose-gc",
    # pages are drawn by the processor: without a detour over an emulated GPU, which WebGL still takes
    "--disable-accelerated-2d-canvas",
    "--disable-gpu-rasterization",
]
# what pulses on the host's page while a prompt runs is drawn again and again, by the processor where no GPU is
STILL = """addEventListener("DOMContentLoaded", () => {
    const still = document.createElement("style");
    still.textContent = "*, ::before, ::after { animation: none !important; transition: none !important }";
    document.head.append(still); });"""
FIRST, MODULES = "/extensions/{pack}/lyra2.js", "/extensions/{pack}/{name}.mjs"
CYCLE = """
    window.alive ??= []; const [kind, times] = given; const nodes = []; const count = () => document.getElementsByTagName('*').length;
    const settle = () => new Promise(done => setTimeout(done, 60));
    // in functions of their own: a suspended one keeps what was in its registers, the last node too
    const note = () => page.explorers.forEach(made => window.alive.some(ref => ref.deref() === made) || window.alive.push(new WeakRef(made)));
    const cycle = async () => {
        const node = LiteGraph.createNode(kind); node.pos = [900, 700]; app.graph.add(node); await settle();
        note();
        app.graph.remove(node);
    };
    for (let i = 0; i < times; i++) await cycle();
    const left = () => window.alive.map(ref => ref.deref()).filter(made => made && !page.explorers.has(made)).length;
    for (let i = 0; i < 100 && (i < 6 || left()); i++) { gc(); await settle(); }
    return left();"""
PATIENCE = 90  # seconds; a page that is drawn by a busy CPU can lag that far behind


def _written(graphs, definitions: dict, columns: list[dict]) -> dict:
    """A graph of the host, with room for what the Explorer shows; `graphs` is the package tools/graphs."""
    graph = graphs.describe.Graph(((graphs.describe.Group("", "", tuple(columns)),),))
    writer = graphs.frontend.Writer(definitions, {}, lambda names: [])
    sizes = {writer.signature(node): [320, 240] for node in graph.nodes.values()}
    return graphs.frontend.Writer(definitions, {**sizes, "Lyra2Explorer": [560, 700]}, lambda names: []).workflow(graph)


def _photo(graphs, width: int, height: int) -> list[dict]:
    Node = graphs.describe.Node
    scale = {"upscale_method": "lanczos", "width": width, "height": height, "crop": "disabled"}
    return [
        {"photo": Node("LoadImage", {"image": "photo.png"}), "scaled": Node("ImageScale", scale, {"image": ("photo", 0)})},
        {
            "depth": Node("Lyra2Depth", graphs.parts.ROOM, {"image": ("scaled", 0)}),
            "begin": Node("Lyra2BeginWorld", {}, {"image": ("scaled", 0), "depth": ("depth", 0)}),
        },
    ]


def workflow(graphs, definitions: dict, folder: str, chunk_frames: int = 16, grows: bool = True, zooms: bool = False) -> dict:
    """A photo, its depth, the world begun (nodes 1 to 4), an Explorer (5), what grows it (6), and two that must never run.

    zooms: a path of 17 cameras into the photo is connected to the Explorer.
    """
    Node = graphs.describe.Node
    columns, sources = _photo(graphs, 208, 128), {"world": ("begin", 0)}
    if zooms:
        columns[-1]["zoom"] = Node("Lyra2ZoomTrajectory", {"frames": 17}, {"depth": ("depth", 0)})
        sources["cameras"] = ("zoom", 0)
    columns.append({"explorer": Node("Lyra2Explorer", {"folder": folder}, sources)})
    if grows:
        links = {"world": ("explorer", 0), "cameras": ("explorer", 1), "captions": ("explorer", 2), "save_to": ("explorer", 5)}
        columns += [
            {"walk": Node("Lyra2PreviewChunks", {"chunk_frames": chunk_frames}, links)},
            {
                "frames": Node("Lyra2WorldFrames", {}, {"world": ("walk", 0)}),
                "save": Node("Lyra2SaveWorld", {"folder": "worlds/never"}, {"world": ("walk", 0)}),
            },
        ]
    return _written(graphs, definitions, columns)


def painted(graphs, definitions: dict, folder: str, steps: int = 2) -> dict:
    """The same, grown by the transformer; small, for checkpoints of random weights."""
    Node = graphs.describe.Node
    models = {name: node for column in graphs.parts.LOAD_MODELS.columns for name, node in column.items()}
    # UMT5 has only one size, 11 GB; what stands in its place is CLIP L
    models["text encoder"] = Node("CLIPLoader", {**models["text encoder"].values, "type": "stable_diffusion"})
    links = {name: ("explorer", slot) for slot, name in enumerate(("world", "cameras", "prompt", "chunks", "seed", "save_to"))}
    given = {"model": "transformer", "clip": "text encoder", "clip_vision": "image encoder", "vae": "vae", "depth_estimator": "estimator"}
    sources = {**links, **{name: (node, 0) for name, node in given.items()}}
    return _written(graphs, definitions, [
        *_photo(graphs, 96, 64),
        models,
        {"explorer": Node("Lyra2Explorer", {"folder": folder}, {"world": ("begin", 0)})},
        {"walk": Node("Lyra2Explore", {"quality": "full", "quality.steps": steps}, sources)},
    ])  # fmt: skip


class ExplorerPage:
    """One tab."""

    def __init__(self, browser, server, size=(1500, 900), pack="ComfyUI-LyraWorlds"):
        self.server, self.pack = server, pack
        self.tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.tab.set_default_timeout(1000 * PATIENCE)
        self.tab.add_init_script(STILL)
        self.errors: list[str] = []
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.requests: list = []
        self.tab.on("request", lambda request: self.requests.append(request))
        self.vue = None
        self.open()

    def open(self) -> None:
        self.tab.goto(self.server.url("/"))
        self.ready()

    def ready(self) -> None:
        self.tab.wait_for_function(
            "() => window.app?.graph?._nodes?.length && window.app.extensionManager?.workflow?.activeWorkflow?.changeTracker",
            timeout=1000 * PATIENCE,
        )

    def asked(self) -> list:
        """The requests for our own files and of our routes since `requests` was emptied, oldest first."""
        return [request for request in self.requests if f"/{self.pack}/" in request.url or "/lyra2/" in request.url]

    def speak(self, language: str) -> None:
        """The host's language, which it keeps per user on the server; a page speaks one from start to end."""
        self.tab.evaluate("l => window.app.extensionManager.setting.set('Comfy.Locale', l)", language)
        self.requests.clear()
        self.tab.reload()
        self.ready()

    def use(self, vue: bool) -> None:
        """Classic canvas or Nodes 2.0. The host keeps the choice per user on the server, so it is set every time."""
        self.tab.evaluate("v => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', v)", vue)
        self.vue = vue

    def load(self, graph: dict) -> None:
        self.tab.evaluate("async graph => { await window.app.loadGraphData(graph); }", graph)
        self.see()

    def see(self, scale: float = 1.0) -> None:
        """Puts the Explorer into the middle of the window."""
        self.tab.evaluate(
            """scale => { const node = app.graph._nodes.find(n => n.type === 'Lyra2Explorer');
            app.canvas.ds.scale = scale; app.canvas.ds.offset = [-node.pos[0] + 130 / scale, -node.pos[1] + 110 / scale];
            app.canvas.setDirty(true, true); }""",
            scale,
        )
        self.tab.wait_for_selector(".lyra2 .view", timeout=1000 * PATIENCE)

    def add_explorers(self, count: int) -> None:
        """More nodes beside the first one, and waits until each shows its view."""
        self.js(
            "const first = app.graph._nodes.find(n => n.type === 'Lyra2Explorer');"
            " for (let i = 0; i < given[0]; i++) { const node = LiteGraph.createNode('Lyra2Explorer');"
            " node.pos = [first.pos[0] + 30 * i, first.pos[1] + 20 * i]; app.graph.add(node); }",
            count,
        )
        self.tab.wait_for_function("n => document.querySelectorAll('.lyra2').length === n", arg=count + 1, timeout=1000 * PATIENCE)

    def contexts(self) -> int:
        return self.tab.evaluate("() => document.querySelectorAll('canvas.lyra2-stage').length")

    def cycle(self, kind: str, times: int) -> int:
        """Adds and removes a node so often; how many Explorers that are not on the page live on."""
        return self.js(CYCLE, kind, times)

    def dom_nodes(self) -> int:
        """All that live, on the page or not."""
        session = self.tab.context.new_cdp_session(self.tab)
        session.send("HeapProfiler.collectGarbage")
        nodes = session.send("Memory.getDOMCounters")["nodes"]
        session.detach()
        return nodes

    def chunks(self, name: str) -> list[dict]:
        """Of worlds/NAME, as its manifest has them."""
        return json.loads((self.server.output / "worlds" / name / "world.json").read_text())["chunks"]

    def module(self, name: str) -> str:
        return MODULES.format(pack=self.pack, name=name)

    def js(self, code: str, *arguments):
        """The value of an async function's body; `x` is the first Explorer, `page` what all of them share."""
        script = """async ([url, code, given]) => {
            const page = (await (await import(url)).load()).shared, x = [...page.explorers][0];
            return await new Function("page", "x", "given", `return (async () => { ${code} })()`)(page, x, given);
        }"""
        return self.tab.evaluate(script, [FIRST.format(pack=self.pack), code, list(arguments)])

    def x(self, expression: str):
        return self.js(f"return x ? ({expression}) : null")

    def wait(self, expression: str, seconds: float = PATIENCE):
        """Until the expression about the Explorer `x` is true; returns its value."""
        end = time.monotonic() + seconds
        while True:
            found = self.x(expression)
            if found:
                return found
            if time.monotonic() > end:
                told = self.x(
                    "({ grow: x.grow.state, problem: x.grow.problem, progress: x.grow.progress, keys: x.plan.keys.length, text: x.textWidget.value,"
                    " chain: x.world?.chain, message: x.panels.message.textContent, notice: x.panels.notice.textContent })"
                )
                raise AssertionError(f"never came true: {expression}; the page has {json.dumps(told)[:1500]}, errors {self.errors[-3:]}")
            self.tab.wait_for_timeout(100)

    def standing(self) -> None:
        """Until the world is open and drawn."""
        self.wait("x.standing && x.blockKeys.length === x.world?.chain.length && x.stage?.drawn > 0 && x.stage.owner === x")

    def button(self, name: str):
        return self.tab.locator(f".lyra2 input[type=button][aria-label='{name}']")

    def begin(self) -> None:
        self.tab.wait_for_selector(".lyra2 .message .button input", timeout=1000 * PATIENCE)
        self.button("Begin").click()
        self.standing()

    def focus(self) -> None:
        """A real click into the view, where nothing lies over it."""
        box = self.tab.locator(".lyra2 .sink").bounding_box()
        self.tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + 0.3 * box["height"])
        self.tab.wait_for_function("() => document.activeElement?.classList.contains('sink')")

    def hold(self, key: str, until: str) -> None:
        """A key held down until the expression is true. The flight goes no further then, however late this process lets go."""
        self.js(f"x.flight.step = function (seconds) {{ if (!({until})) Object.getPrototypeOf(this).step.call(this, seconds); }};")
        self.tab.keyboard.down(key)
        self.wait(until)
        self.tab.keyboard.up(key)
        self.wait("!x.flight.held.size && delete x.flight.step")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    def log_growth(self) -> None:
        """Keeps every state of Grow in `window.grown`, since a lagging page runs through several between two looks."""
        self.js("window.grown = []; const { set } = x.grow; x.grow.set = function (state, values) {"
                " window.grown.push(state + (values?.picture ? ' picture' : '')); return set.call(this, state, values); };")

    def grown(self) -> list[str]:
        return self.tab.evaluate("window.grown ?? []")

    def shot(self, name: str) -> None:
        """A picture for people, if LYRA2_SCREENSHOTS names a folder."""
        if os.environ.get("LYRA2_SCREENSHOTS"):
            self.tab.screenshot(path=str(Path(os.environ["LYRA2_SCREENSHOTS"]) / f"{name}.png"), timeout=120_000)


def launch(driver):
    return driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
