"""The Explorer in the real page, with real mouse and keyboard, in both of the host's frontends: one server, one browser."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lyra_core.cameras import next_path, presets
from lyra_core.cameras.camera import pinhole, quaternion_to_rotation, rotation_to_quaternion
from lyra_core.memory import point_cloud, preflight
from lyra_core.memory.depth import room_box
from lyra_core.world import preview, world_files
from lyra_core.world.world import begin

spec = importlib.util.spec_from_file_location("lyra_page", Path(__file__).parent / "page.py")
page_module = sys.modules["lyra_page"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page_module)
pytestmark = pytest.mark.skipif(
    page_module.CHROMIUM is None, reason="no chromium on this machine (apt install chromium, or set CHROMIUM)"
)
SIZE = (240, 416)
FRONTENDS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes2"])


@pytest.fixture(scope="module")
def server(launcher, project, comfy_host, tiny_models, tmp_path_factory):
    base = tmp_path_factory.mktemp("explorer")
    (base / "input").mkdir()
    shutil.copyfile(project / "tools" / "demo" / "room.png", base / "input" / "photo.png")
    tiny_models.write_all(base / "models")
    with launcher.Server(base, base / "output", "--models-directory", str(base / "models")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        running = page_module.launch(driver)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page(browser, server):
    return page_module.ExplorerPage(browser, server)


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def graph(object_info, graphs):
    """Makes a workflow around an Explorer of this folder."""
    return lambda folder, **options: page_module.workflow(graphs, object_info, folder, **options)


@pytest.fixture(scope="module")
def room(project):
    picture = Image.open(project / "tools" / "demo" / "room.png").convert("RGB").resize((SIZE[1], SIZE[0]))
    image = torch.from_numpy(np.asarray(picture).copy()).float() / 255
    stand = pinhole(SIZE, 360.0)
    depth = room_box(SIZE, stand.K[0], (0.5, 0.55), (0.2, 0.1, 0.8, 0.72), 6.0).depth
    return begin(image, depth, stand)


@pytest.fixture(scope="module")
def saved(server, room):
    """Saves the room, grown by so many chunks of 8 frames, as worlds/NAME."""

    def save(name: str, chunks: int = 0) -> list[str]:
        folder, world = server.output / "worlds" / name, room
        for number in range(chunks):
            way = presets.preset("horizontal_zoom", world.last_camera, 9, 2.0, "right", 0.1)
            world = preview.explore(world, way, chunk_frames=8, prompts=lambda _, n=number: f"part {n}")
        world_files.save(world, folder)
        return list(world.keys)

    return save


def manifest(server, name: str) -> dict:
    return json.loads((server.output / "worlds" / name / "world.json").read_text())


# ------------------------------------------------------------------------------------------------------------ the maths


def seeded_plan(seed: int) -> dict:
    """A path of 1 to 12 keys after the standing one, of every curve and motion, as its JSON."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 14))
    T = np.cumsum(rng.normal(0, 0.3, (count, 3)), 0)
    q = np.cumsum(rng.normal(0, 0.15, (count, 4)), 0) + [0, 0, 0, 1]
    if seed % 7 == 0:
        T[1:] = T[0]        # a turn on the spot
    if seed % 11 == 0:
        q[1:] = q[0]        # no turn at all
    keys = [
        {"R": (a / np.linalg.norm(a)).tolist(), "T": b.tolist(), "fov": float(rng.uniform(25, 70)), "timestamp": 0.5 * (i + 1)}
        for i, (a, b) in enumerate(zip(q, T, strict=True))
    ]
    motion = ("uniform motion", "arc length", "time")[seed % 3]
    plan = {"version": 1, "from": "", "frames": int(rng.choice([17, 81, 161])), "motion": motion, "captions": {}, "seed": 1}
    if seed % 2:
        plan["before"] = {"R": keys[0]["R"], "T": (T[0] - rng.normal(0, 0.2, 3)).tolist(), "fov": keys[0]["fov"]}
    return {
        "loop": False, "time": 0.0, "duration_seconds": 5.0, "spline_order": int(seed % 4), "through_keys": bool(seed % 5 < 3),
        "path": keys, "lyra2": plan,
    }  # fmt: skip


IN_THE_PAGE = """
const maths = await import(given[0]);
return given[1].map((text) => {
    const plan = maths.parsePlan(text), keys = [JSON.parse(text).path[0], ...plan.keys];
    const curve = { ...maths.curveOf(plan, keys.map((key, i) => ({ ...key, timestamp: JSON.parse(text).path[i].timestamp }))),
        order: JSON.parse(text).spline_order };
    return maths.posesOf(curve, plan.frames, plan.motion).map(({ R, T, fov }) => [...R, ...T, fov]);
});"""


def test_200_paths_in_the_page_are_those_of_the_server(page):
    plans = [json.dumps(seeded_plan(seed)) for seed in range(200)]
    found = page.js(IN_THE_PAGE, page.module("path"), plans)
    for seed, (text, poses) in enumerate(zip(plans, found, strict=True)):
        plan = next_path.read(text)
        cameras = next_path.path_cameras(plan.path, SIZE, plan.frames, plan.motion)
        poses = torch.tensor(poses, dtype=torch.float64)
        c2w = cameras.c2w.double()
        assert (c2w[:, :3, 3] - poses[:, 4:7]).norm(dim=1).max() < 1e-5 * 2, f"centres of path {seed}"
        q = rotation_to_quaternion(c2w[:, :3, :3])
        ours = poses[:, [3, 0, 1, 2]]
        turned = quaternion_to_rotation(ours).mT @ quaternion_to_rotation(q)
        vector = torch.stack([turned[:, 2, 1] - turned[:, 1, 2], turned[:, 0, 2] - turned[:, 2, 0], turned[:, 1, 0] - turned[:, 0, 1]])
        assert torch.rad2deg(torch.asin((0.5 * vector.norm(dim=0)).clamp(max=1))).max() < 1e-3, f"rotations of path {seed}"
        assert (torch.rad2deg(cameras.fov.double()) - poses[:, 7]).abs().max() < 1e-4, f"fields of view of path {seed}"


def test_a_path_written_by_the_page_is_the_same_path_read_by_the_server(page):
    text = json.dumps({**seeded_plan(5), "note": "kept"})
    again = page.js(
        "const m = await import(given[0]); const p = m.parsePlan(given[1]); return m.formatPlan(p, JSON.parse(given[1]).path[0]);",
        page.module("path"), text,
    )  # fmt: skip
    before, after = next_path.read(text), next_path.read(again)
    assert json.loads(again)["note"] == "kept" and (before.frames, before.motion, before.seed) == (after.frames, after.motion, after.seed)
    for a, b in zip(before.path.keys, after.path.keys, strict=True):
        torch.testing.assert_close(a.c2w, b.c2w, atol=2e-6, rtol=0)


def test_coverage_clearance_and_effort_in_the_page_are_those_of_the_server(page, room):
    block = point_cloud.block([point_cloud.view_of(room.memory.keyframes[0], room.frame(0), room.invented(0))], [], room.first.cameras)
    points = block.points(2)
    stride = point_cloud.finest_stride(SIZE[1]) << 2
    grid = preflight.grid_of(SIZE, stride)
    shares = []
    for seed in range(12):
        plan = next_path.read(json.dumps(seeded_plan(seed)))
        cameras = next_path.cameras_of(plan, room.last_camera)[[0, len(next_path.cameras_of(plan, room.last_camera)) - 1]]
        q = rotation_to_quaternion(cameras.c2w[:, :3, :3].double())[:, [1, 2, 3, 0]]
        K = cameras.K[0]
        lens = {"size": list(SIZE), "ratio": float(K[0, 0] / K[1, 1]), "centre": [float(K[0, 2]), float(K[1, 2])]}
        poses = [{"R": q[i].tolist(), "T": cameras.c2w[i, :3, 3].tolist(), "fov": float(torch.rad2deg(cameras.fov[i]))} for i in range(2)]
        flat = np.concatenate([points, np.zeros((len(points), 1), np.float32)], 1).reshape(-1).tolist() if seed == 0 else None
        found = page.js(
            "const m = await import(given[0]); if (given[1]) window.somePoints = new Float32Array(given[1]); const p = window.somePoints;"
            " const grid = m.gridOf(given[2].size, given[4]);"
            " return { grid, cover: given[3].map(pose => m.coverage(pose, given[2], p, p.length / 4, grid)),"
            " clear: given[3].map(pose => m.clearance(pose.T, p, p.length / 4)) };",
            page.module("path"), flat, lens, poses, stride,
        )  # fmt: skip
        assert found["grid"] == [grid[1], grid[0]]
        # one cell may fall to the other side by rounding
        np.testing.assert_allclose(found["cover"], preflight.coverage(points, cameras, grid), atol=1.01 / (grid[0] * grid[1]))
        np.testing.assert_allclose(found["clear"], preflight.distances(points, cameras.centers.numpy()), rtol=1e-4)
        shares += found["cover"]
    assert min(shares) < 0.5 < max(shares), "views that are covered in part were among them"


DECODE = """
const w = await import(given[0]);
const bytes = Uint8Array.from(atob(given[1]), (c) => c.charCodeAt(0));
try {
    const block = w.decodeBlock(bytes.buffer);
    return { positions: [...block.positions], colours: [...block.colours], levelEnds: block.levelEnds, strides: block.strides,
        cameras: block.cameras, size: block.size, frames: [...new Set(block.frames)] };
} catch (error) {
    return { error: error.message };
}"""


def test_a_block_of_the_server_is_decoded_by_the_page_and_a_broken_one_is_refused(page, room):
    import base64

    view = point_cloud.view_of(room.memory.keyframes[0], room.frame(0), room.invented(0))
    block = point_cloud.block([view], [], room.first.cameras, cap=4000)
    content = point_cloud.encode(block)

    def decoded(some: bytes) -> dict:
        return page.js(DECODE, page.module("worlds"), base64.b64encode(some).decode())

    found = decoded(content)
    positions = np.array(found["positions"]).reshape(-1, 4)
    truth = block.points()
    assert np.linalg.norm(positions[:, :3] - truth, axis=1).max() < 1e-3 * truth[:, 2].min()
    np.testing.assert_array_equal(np.array(found["colours"]).reshape(-1, 4)[:, :3], block.rgb)
    assert found["levelEnds"] == np.cumsum(block.counts.sum(1)).tolist() and found["strides"] == [8, 4, 2, 1]
    for end, stride in zip(found["levelEnds"], found["strides"], strict=True):
        assert (block.pixels[:end] % stride == 0).all(), "any beginning of the points is an even thinning"
    assert found["size"] == list(SIZE) and len(found["cameras"]) == 1
    assert found["cameras"][0]["fov"] == pytest.approx(float(torch.rad2deg(room.last_camera.fov[0])), abs=1e-4)
    assert "version 2" in decoded(content[:4] + b"\2\0" + content[6:])["error"]
    assert "cut off" in decoded(content[:-5])["error"]
    assert "no point block" in decoded(b"<html>" + content)["error"]
    assert "no point block" in decoded(b"")["error"]


# --------------------------------------------------------------------------------------------------------------- flow A


@FRONTENDS
def test_begin_fly_lay_keys_grow_go_back_and_branch(page, graph, server, vue):
    name = f"flow_{'nodes2' if vue else 'classic'}"
    page.use(vue)
    page.load(graph(f"worlds/{name}"))
    page.shot(f"{name}_0_empty")
    page.begin()
    assert page.x("x.flight.pose.T.join() === x.standing.T.join() && x.flight.pose.fov === x.standing.fov"), "it opens where the photo was taken"
    page.focus()
    page.hold("w", "x.flight.pose.T[2] > 0.3")
    page.press("k")
    page.wait("x.plan.keys.length === 1")
    page.hold("ArrowRight", "x.flight.pose.R[1] > 0.05")
    page.press("Enter")
    page.wait("x.plan.keys.length === 2 && x.settled?.retrieved")
    assert page.x("x.panels.status.textContent.includes('known') && x.live.coverageMark === 'good'"), "the preflight is seen"
    shown = "() => [...document.querySelectorAll('textarea')].some(area => area.value.includes('lyra2') && area.checkVisibility())"
    assert not page.tab.evaluate(shown), "the text is the node's value, the view what one sees of it"
    while page.x("x.chunks > 1"):
        page.button("One chunk less").click()
    page.wait("x.settled?.retrieved?.length === 1")
    page.shot(f"{name}_1_planned")
    page.js("window.before = { pose: JSON.stringify(x.flight.pose), from: x.world.state };")
    page.log_growth()
    page.press("Shift+Enter")
    page.wait("x.world.chain.length === 2 && x.blockKeys.length === 2 && !x.grow.busy && x.plan.keys.length === 0")
    states = page.grown()
    assert "running picture" in states and states[-1] in ("done", "idle"), states
    assert page.x("JSON.stringify(x.flight.pose) === window.before.pose"), "the camera stays where it was"
    assert page.x("JSON.parse(x.textWidget.value).lyra2.from === x.world.state && x.world.state !== window.before.from"), "from moved on"
    history = list(server.get("/history").values())[-1]
    assert {node.split(".")[0] for node in history["outputs"]} <= {"5", "6"}, "only the Explorer and what grows it ran"
    assert not (server.output / "worlds" / "never").exists()
    page.shot(f"{name}_2_grown")
    page.press("Shift+B")
    page.wait("x.world.state === window.before.from && x.blockKeys.length === 1")
    page.press("Home")
    page.wait("!x.flight.moving")
    page.hold("d", "x.flight.pose.T[0] > 0.3")
    page.press("k", "Shift+Enter")
    page.wait("x.world.chain.length === 2 && !x.grow.busy && x.blockKeys.length === 2")
    chunks = manifest(server, name)["chunks"]
    photo = next(chunk["key"] for chunk in chunks if chunk["parent"] is None)
    assert [chunk["parent"] for chunk in chunks].count(photo) == 2 and len(chunks) == 3, "a second child beside the first"
    page.press("3")
    page.wait("x.panels.panel.querySelectorAll('.state').length === 3 && x.panels.panel.querySelectorAll('.here').length === 1")
    page.shot(f"{name}_3_tree")
    page.press("3")
    assert page.errors == []


NEWER = "comfyui-frontend-package==1.58.1"


@pytest.fixture(scope="module")
def newer_server(launcher, project, tmp_path_factory, request):
    """A host with a later frontend than the one that it asks for, out of pip's cache or the package index."""
    folder = request.config.cache.mkdir("frontend")
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", NEWER, "-d", str(folder)]
        if subprocess.run(command, capture_output=True, timeout=300).returncode:
            pytest.skip(f"{NEWER} can't be had here")
    base = tmp_path_factory.mktemp("newer")
    with zipfile.ZipFile(sorted(folder.glob("*.whl"))[-1]) as archive:
        archive.extractall(base / "frontend")
    (base / "input").mkdir()
    shutil.copyfile(project / "tools" / "demo" / "room.png", base / "input" / "photo.png")
    root = base / "frontend" / "comfyui_frontend_package" / "static"
    with launcher.Server(base, base / "output", "--front-end-root", str(root)) as running:
        yield running


@FRONTENDS
def test_the_same_with_a_newer_frontend(browser, newer_server, graph, vue):
    page = page_module.ExplorerPage(browser, newer_server)
    try:
        test_begin_fly_lay_keys_grow_go_back_and_branch(page, graph, newer_server, vue)
    finally:
        page.tab.close()


# --------------------------------------------------------------------------------------------------------------- flow B


def test_the_transformer_shows_each_chunk_as_it_comes(page, graphs, object_info, server):
    page.use(False)
    # steps enough that a chunk takes longer than a software-rendered page lags behind the server
    page.load(page_module.painted(graphs, object_info, "worlds/painted", steps=20))
    page.begin()
    page.js("x.settings.chunks = 2; x.setKeys([{ R: [0, 0, 0, 1], T: [0.2, 0, 0.6], fov: x.standing.fov }]);")
    assert page.x("x.chunks === 2 && JSON.parse(x.textWidget.value).lyra2.frames === 161")
    page.log_growth()
    page.js(
        "window.seen = []; const { blockArrived } = x; x.blockArrived = function (state) {"
        " window.seen.push([x.world.chain.length, x.grow.state]); return blockArrived.call(this, state); };"
    )
    page.press("Escape")
    page.js("await x.startGrowing();")
    page.wait("!x.grow.busy && x.grow.state !== 'idle' || x.world.chain.length === 3", 300)
    page.wait("x.world.chain.length === 3 && !x.grow.busy && x.blockKeys.length === 3")
    assert [2, "running"] in page.tab.evaluate("window.seen"), "the first chunk was there before the second was done"
    assert page.x("x.settings.grown.length") == 2 and page.x("x.plan.keys.length") == 0
    assert [chunk["settings"].get("seed") for chunk in manifest(server, "painted")["chunks"]][1:] == [1, 1]


def test_stop_ends_a_run_within_a_step_and_an_error_is_said_with_its_node(page, graphs, object_info, server):
    page.use(False)
    page.load(page_module.painted(graphs, object_info, "worlds/stopped", steps=1000))
    page.begin()
    page.js("x.settings.chunks = 1; x.setKeys([{ R: [0, 0, 0, 1], T: [0.2, 0, 0.2], fov: x.standing.fov }]); await x.startGrowing();")
    page.wait("x.grow.state === 'running' && x.grow.progress.stage === 'sample' && x.grow.progress.step > 0", 180)
    page.js("await x.grow.stop();")
    stopped = time.monotonic()
    while server.get("/queue")["queue_running"]:
        assert time.monotonic() < stopped + 20, "a step takes a fraction of a second, a thousand of them minutes"
        time.sleep(0.1)
    page.wait("x.grow.state === 'idle'")
    assert 0 < page.x("x.grow.progress.step") < 900
    assert page.x("x.plan.keys.length") == 1, "the path is kept"
    assert len(manifest(server, "stopped")["chunks"]) == 1
    # 40 frames are no whole chunk of the transformer
    page.js("x.aim = function () { this.chunkFrames = 40; }; x.settings.chunks = 1; x.commit(); await x.startGrowing();")
    page.wait("x.grow.state === 'failed' && !x.refreshing", 120)
    said = page.x("x.panels.status.textContent")
    assert "Lyra 2 Explore" in said and "80" in said, said
    assert page.x("x.panels.growButton.textContent") == "Retry"


# ------------------------------------------------------------------------------------------------------- interactions


def test_everything_that_lays_a_path_does_with_keys_buttons_and_numbers(page, graph, saved):
    saved("tools", chunks=1)
    page.use(False)
    page.load(graph("worlds/tools"))
    page.standing()
    page.js("await x.standAtLatest();")
    page.wait("x.world.chain.length === 2 && x.blockKeys.length === 2")
    page.press("Escape")
    page.focus()
    # a start, then numbers: typed, stepped, undone
    page.press("2")
    page.button("move in").click()
    page.wait("x.plan.keys.length === 2")
    page.press("1", ".")
    page.wait("x.selected === 0 && x.panel === 'key'")
    field = page.tab.locator(".lyra2 .panel input[aria-label^='To the right, scene units']")
    field.fill("0.25")
    field.press("Enter")
    page.wait("Math.abs(x.plan.keys[0].T[0] - 0.25) < 1e-9 && !x.committing")
    assert page.x("JSON.parse(x.textWidget.value).path[1].T[0]") == 0.25
    assert page.tab.evaluate("() => document.activeElement.classList.contains('sink')"), "the keys go on working"
    page.press("Control+z")
    page.wait("Math.abs(x.plan.keys[0].T[0] - 0.25) > 0.01")
    page.press("Control+Shift+z")
    page.wait("Math.abs(x.plan.keys[0].T[0] - 0.25) < 1e-9")
    # duplicate, delete, set to view, handles
    page.press("c")
    page.wait("x.plan.keys.length === 3 && x.selected === 1")
    page.press("u")
    page.wait("x.plan.keys[1].T.join() === x.flight.pose.T.join()")
    page.press("g")
    page.wait("x.gizmoShown && x.stage.gizmo?.getHelper().visible")
    page.press("Delete")
    page.wait("x.plan.keys.length === 2")
    page.press("Escape", "Escape", "Escape")
    # the whole path
    page.press("2")
    page.button("And back").click()
    page.wait("x.plan.keys.length === 4")
    assert page.x("x.plan.keys.at(-1).T.join() === x.standing.T.join()")
    page.tab.locator(".lyra2 .panel .segment label", has_text="straight").locator("input").check()
    page.wait("x.plan.curve === 'straight' && JSON.parse(x.textWidget.value).spline_order === 1")
    page.button("Clear").click()
    page.wait("x.plan.keys.length === 0 && JSON.parse(x.textWidget.value).path.length === 0")
    page.press("2")
    # recorded while flying
    page.focus()
    page.press("b")
    page.hold("d", "x.recording.length > 3 && Math.abs(x.recording.at(-1).T[0] - x.standing.T[0]) > 0.1")
    page.press("b")
    page.wait("!x.recording && x.plan.keys.length >= 1 && x.plan.keys.length <= 30")
    # scrubbing and playing leave one's own view alone
    page.js("window.before = JSON.stringify(x.flight.pose);")
    page.press("[", "[")
    page.wait("x.scrub < x.poses.length - 1")
    page.press("Space")
    page.wait("x.playing === 'side' || x.scrub > 0")
    page.wait("!x.playing")
    assert page.x("JSON.stringify(x.flight.pose) === window.before")
    # a made frame, its picture over the points until one moves
    page.press("3")
    page.js("x.snapTo(4);")
    page.tab.wait_for_function("() => document.querySelector('.lyra2 .photo')?.naturalWidth > 0")
    assert page.x("x.flight.pose.T.join() === x.past[4].T.join()")
    page.focus()
    page.hold("ArrowLeft", "!x.photoShown")
    # orbit, map, full screen
    page.press("3", "o")
    page.wait("x.flight.pivot")
    page.press("o")
    box = page.tab.locator(".lyra2 .box.map canvas").bounding_box()
    page.js("window.before = x.flight.pose.T.join();")
    page.tab.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
    page.wait("x.flight.pose.T.join() !== window.before && x.flight.pose.T[1] === Number(window.before.split(',')[1])")
    page.press("f")
    page.wait("x.overlay && x.view.clientWidth > 1200 && x.stage.owner === x")
    page.press("Escape", "Escape", "Escape", "Escape")
    page.wait("!x.overlay && x.root.contains(x.view)")
    # splats in place of points, few of them without a GPU
    page.press("j")
    page.wait("x.stage.splats?.count > 1000 && x.stage.splats.count <= 20200 && x.stage.splats.mesh.visible")
    page.press("j")
    page.wait("!x.stage.splats && x.shownBlocks().length === 2")
    assert page.errors == []


# --------------------------------------------------------------------------------------------------- life in the host


HOST = """return {
    nodes: app.graph._nodes.length, links: [...(app.graph.links?.values?.() ?? Object.values(app.graph.links))].length,
    sidebar: app.extensionManager.sidebarTab?.activeSidebarTabId ?? null, offset: [...app.canvas.ds.offset], scale: app.canvas.ds.scale,
    selected: Object.keys(app.canvas.selected_nodes ?? {}).length, dialogs: document.querySelectorAll('.p-dialog, dialog[open]').length,
    undo: app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length,
    redo: app.extensionManager.workflow.activeWorkflow.changeTracker.redoQueue.length,
    modes: app.graph._nodes.map(n => n.mode).join(), same: app.graph._nodes.every((n, i) => n === window.nodesBefore?.[i]),
};"""
KEYS = [
    *"wasdqernmpghvcxtuioklfbj", ".", ",", "[", "]", "Delete", "Backspace", "Control+z", "Control+y", "Control+Shift+z", "Home", "Space",
    "1", "2", "3", "4", "Escape", "Tab",
]  # fmt: skip


@FRONTENDS
def test_no_key_in_the_view_or_on_a_button_moves_anything_of_the_host(page, graph, saved, vue):
    saved("keys")
    page.use(vue)
    page.load(graph("worlds/keys", grows=False))
    page.standing()
    page.focus()
    page.js("window.nodesBefore = [...app.graph._nodes];")
    before = page.js(HOST)
    for key in KEYS:
        page.focus() if page.x("document.activeElement !== x.panels.sink && !x.overlay") else None
        page.press(key)
        if page.x("Boolean(x.overlay)"):
            page.press("f")
    after = page.js(HOST)
    # b was pressed once: a recording began and ended, which is a change of the path like any other
    assert {**after, "undo": 0} == {**before, "undo": 0} and after["undo"] >= before["undo"]
    page.js("x.recording = null; x.playing = null; x.clearPath(); x.select(-1);")
    page.js("x.setKeys([{ R: [0, 0, 0, 1], T: [0, 0, 0.5], fov: 40 }]);")
    before = page.js(HOST)
    for key in ("w", "r", "m", "Delete", "Backspace", "Escape", "n"):
        page.button("Add key").focus()
        page.press(key)
    page.button("Add key").focus()
    page.press("Control+z")
    after = page.js(HOST)
    assert after["same"] and after["nodes"] == before["nodes"], "Ctrl+Z on a button is ours: the graph's nodes are the same objects"
    assert {**after, "undo": 0} == {**before, "undo": 0}
    assert page.x("x.plan.keys.length") == 0, "and it undid the key"
    page.press("Control+y")
    page.wait("x.plan.keys.length === 1")


@FRONTENDS
def test_the_wheel_zooms_the_graph_until_the_view_has_the_focus(page, graph, saved, vue):
    saved("keys")
    page.use(vue)
    page.load(graph("worlds/keys", grows=False))
    page.standing()
    page.js("document.activeElement?.blur();")
    box = page.tab.locator(".lyra2 .sink").bounding_box()
    page.tab.mouse.move(box["x"] + 200, box["y"] + 100)
    scale = page.js("return app.canvas.ds.scale;")
    page.tab.mouse.wheel(0, -100)
    page.tab.wait_for_function("s => app.canvas.ds.scale !== s", arg=scale)
    page.see()
    page.focus()
    scale, speed = page.js("return [app.canvas.ds.scale, x.flight.speed];")
    page.tab.mouse.wheel(0, -100)
    page.wait(f"x.flight.speed > {speed}")
    assert page.js("return app.canvas.ds.scale;") == scale


KEY = "{ R: [0, 0, 0, 1], T: [0.1, 0, 0.4], fov: 40 }"


@FRONTENDS
def test_the_path_survives_undo_copies_subgraphs_tabs_and_the_other_frontend(page, graph, saved, vue):
    state = saved("value")[-1]
    page.use(vue)
    page.load(graph("worlds/value"))
    page.standing()
    page.js(f"x.setKeys([{KEY}]);")
    text = page.x("x.textWidget.value")
    assert json.loads(text)["lyra2"]["from"] == state
    # saved and loaded again
    again = page.js("return app.graph.serialize();")
    page.load(again)
    page.standing()
    assert page.x("x.textWidget.value") == text
    # one prompt for the page and for the command line
    prompt = page.js("return (await app.graphToPrompt()).output;")
    explorer = next(node for node in prompt.values() if node["class_type"] == "Lyra2Explorer")
    assert explorer["inputs"]["path"] == text and set(explorer["inputs"]) == {"world", "folder", "path"}
    # a copy has the same path, and a root that nobody needs is let go
    page.js(
        "const node = app.graph._nodes.find(n => n.type === 'Lyra2Explorer'); app.canvas.selectItems?.([node]) ?? app.canvas.selectNode(node);"
        " app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard();"
    )
    values = page.js("return app.graph._nodes.filter(n => n.type === 'Lyra2Explorer').map(n => n.widgets.find(w => w.name === 'path').value);")
    assert values == [text, text]
    page.js("app.graph.remove(app.graph._nodes.filter(n => n.type === 'Lyra2Explorer').at(-1));")
    # the graph's own undo
    page.js("const t = app.extensionManager.workflow.activeWorkflow.changeTracker; t.captureCanvasState(); x.clearPath(); ")
    assert page.x("JSON.parse(x.textWidget.value).path.length") == 0
    page.js("await app.extensionManager.workflow.activeWorkflow.changeTracker.undo();")
    page.wait(f"x.textWidget?.value === {json.dumps(text)} && x.plan.keys.length === 1")
    # into a subgraph and out again
    page.js(
        "const node = app.graph._nodes.find(n => n.type === 'Lyra2Explorer');"
        " const { subgraph } = app.graph.convertToSubgraph(new Set([node])); window.inner = subgraph;"
    )
    inner = page.js("return window.inner._nodes.find(n => n.type === 'Lyra2Explorer').widgets.find(w => w.name === 'path').value;")
    assert inner == text
    page.js("app.canvas.setGraph(window.inner);")
    page.wait(f"x?.textWidget?.value === {json.dumps(text)}")
    assert ":" in page.x("x.id"), "the server knows it by the ids of the subgraph around it"
    assert page.x("x.targets().map(({ node }) => node.type).join()") == "Lyra2PreviewChunks", "links lead out of the subgraph"
    page.js("app.canvas.setGraph(app.rootGraph ?? app.graph); window.inner = null;")
    # the other frontend
    page.load(again)
    page.use(not vue)
    page.wait(f"x?.textWidget?.value === {json.dumps(text)}")
    page.standing()
    assert page.tab.evaluate("() => document.querySelectorAll('canvas.lyra2-stage').length") == 1
    page.use(vue)


def test_a_text_that_is_no_path_survives_and_is_said(page, graph, saved):
    saved("value")
    page.use(False)
    made = graph("worlds/value")
    node = next(node for node in made["nodes"] if node["type"] == "Lyra2Explorer")
    for text, says in (('{"path": 3}', 'no list "path"'), ("never a path", "JSON"), ('{"path": [{"R": [0,0,0,0], "T": [0,0,0], "fov": 40}]}', "R")):
        node["widgets_values"][1] = text
        page.load(made)
        page.standing()
        assert page.x("x.textWidget.value") == text
        assert says in page.x("x.panels.notice.textContent"), text
        assert page.js("return (await app.graphToPrompt()).output[x.id].inputs.path;") == text
    page.js(f"x.setKeys([{KEY}]);")
    assert page.x("JSON.parse(x.textWidget.value).path.length") == 2, "an edit replaces it"


def test_what_is_gone_is_said_with_a_way_out(page, graph, saved, server):
    keys = saved("gone", chunks=1)
    page.use(False)
    made = graph("worlds/gone")
    node = next(node for node in made["nodes"] if node["type"] == "Lyra2Explorer")
    missing = {"path": [], "lyra2": {"version": 1, "from": "0123456789abcdef", "frames": 17, "motion": "uniform motion", "captions": {}, "seed": 1}}
    node["widgets_values"][1] = json.dumps(missing)
    page.load(made)
    page.wait("x && !x.panels.message.hidden && x.panels.message.textContent.includes('gone')")
    page.button("Stand at the latest").click()
    page.standing()
    assert page.x("x.world.state") == keys[-1] and page.x("JSON.parse(x.textWidget.value).lyra2.from") == keys[-1]
    shutil.rmtree(server.output / "worlds" / "gone")
    page.js("await x.loadWorld();")
    page.wait("x.panels.message.textContent.includes('No world here yet')")
    assert page.x("JSON.parse(x.textWidget.value).lyra2.from") == keys[-1], "the text is kept"


def test_a_second_tab_sees_what_the_first_one_grew(browser, page, graph, server, saved):
    saved("shared")
    page.use(False)
    page.load(graph("worlds/shared"))
    page.standing()
    other = page_module.ExplorerPage(browser, server)
    try:
        other.use(False)
        other.load(graph("worlds/shared"))
        other.standing()
        page.js(f"x.setKeys([{KEY}]); await x.startGrowing();")
        page.wait("x.world.chain.length === 2 && !x.grow.busy")
        other.js("await x.comeBack();")
        other.wait("x.panels.notice.textContent.includes('grown in another place')")
        assert other.x("x.world.chain.length") == 1, "it stays where it stood"
        other.button("Stand at the latest").click()
        other.wait("x.world.chain.length === 2 && x.blockKeys.length === 2")
        assert other.x("x.world.state") == page.x("x.world.state")
    finally:
        other.tab.close()


def test_a_lost_socket_loses_nothing(page, graph, server, saved):
    saved("lost")
    page.use(False)
    page.load(graph("worlds/lost"))
    page.standing()
    # what the server says while the line is down reaches nobody
    page.js(f"x.setKeys([{KEY}]); await x.startGrowing(); x.api.socket.onmessage = null; x.api.socket.close();")
    page.wait("x.world.chain.length === 2 && !x.grow.busy && x.blockKeys.length === 2")
    assert len(manifest(server, "lost")["chunks"]) == 2


def test_one_context_for_twenty_nodes_and_the_same_picture_after_it_was_lost(page, graph, saved):
    saved("value")
    page.use(False)
    page.load(graph("worlds/value", grows=False))
    page.standing()
    sharpness = """
        x.stage.lastDraw = x.picture(); const copy = x.stage.picture(), { data } = copy.getContext('2d').getImageData(0, 0, copy.width, copy.height);
        let sum = 0; for (let i = 0; i < data.length; i += 4) sum += data[i] + data[i + 1] + data[i + 2]; return sum / data.length;"""
    page.wait("!x.stage.raf && !x.stage.drawing()")
    before = page.js(sharpness)
    assert before > 30
    page.js("window.loss = x.stage.gl.getExtension('WEBGL_lose_context'); window.loss.loseContext();")
    page.wait("x.stage.gl.isContextLost()")
    page.js("window.loss.restoreContext();")
    page.wait("!x.stage.gl.isContextLost()")
    page.js("x.stage.invalidate();")
    page.wait("!x.stage.raf && !x.stage.drawing()")
    after = page.js(sharpness)
    assert after == pytest.approx(before, rel=0.01), f"{before} before, {after} after"
    page.js(
        "const first = app.graph._nodes.find(n => n.type === 'Lyra2Explorer');"
        " for (let i = 0; i < 19; i++) { const node = LiteGraph.createNode('Lyra2Explorer');"
        " node.pos = [first.pos[0] + 30 * i, first.pos[1] + 20 * i]; app.graph.add(node); }"
    )
    page.tab.wait_for_function("() => document.querySelectorAll('.lyra2').length === 20", timeout=90_000)
    page.tab.wait_for_timeout(500)
    assert page.tab.evaluate("() => document.querySelectorAll('canvas.lyra2-stage').length") <= 1
    page.js("for (const node of app.graph._nodes.filter(n => n.type === 'Lyra2Explorer').slice(1)) app.graph.remove(node);")


GARBAGE = """
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


@pytest.mark.parametrize(
    "vue, other, times, more",
    [(False, "CLIPTextEncode", 50, lambda cost: cost + 4), (True, "Lyra2PreviewChunks", 12, lambda cost: 1.5 * cost)],
    ids=["classic", "nodes2"],
)
def test_explorers_that_came_and_went_are_gone(page, graph, saved, vue, other, times, more):
    saved("value")
    page.use(vue)
    page.load(graph("worlds/value", grows=False))
    page.standing()
    page.js("const n = app.graph._nodes.find(n => n.type === 'Lyra2Explorer'); app.canvas.ds.scale = 0.5; app.canvas.ds.offset = [-400, 60];")
    session = page.tab.context.new_cdp_session(page.tab)

    def nodes() -> int:
        session.send("HeapProfiler.collectGarbage")
        return session.send("Memory.getDOMCounters")["nodes"]

    page.js(GARBAGE, "Lyra2Explorer", 2)
    cost = {}
    for kind, cycles in ((other, max(12, times // 2)), ("Lyra2Explorer", times)):
        before = nodes()
        alive = page.js(GARBAGE, kind, cycles)
        cost[kind] = (nodes() - before) / cycles
    print(f"\nDOM nodes a cycle, {'nodes 2.0' if vue else 'classic'}: {cost}; Explorers alive after GC that are not on the page: {alive}")
    assert alive == 0
    assert cost["Lyra2Explorer"] <= more(cost[other])
    page.use(False)
    assert page.tab.evaluate("() => document.querySelectorAll('canvas.lyra2-stage').length") <= 1
