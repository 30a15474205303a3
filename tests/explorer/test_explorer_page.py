"""The Explorer in the real page, with real mouse and keyboard, in both of the host's frontends: one server, one browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

from lyra_core.cameras import next_path
from lyra_core.cameras.camera import quaternion_to_rotation, rotation_to_quaternion
from lyra_core.memory import point_cloud, preflight
from lyra_core.world import world_files

SIZE = (128, 208)
KEY = "{ R: [0, 0, 0, 1], T: [0.1, 0, 0.4], fov: 40 }"
FRONTENDS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes2"])


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
    chunks = page.chunks(name)
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


def test_the_same_with_a_newer_frontend(page_module, browser, newer_server, graph):
    page = page_module.ExplorerPage(browser, newer_server)
    try:
        test_begin_fly_lay_keys_grow_go_back_and_branch(page, graph, newer_server, vue=True)
    finally:
        page.tab.close()


# --------------------------------------------------------------------------------------------------------------- flow B


def test_the_transformer_shows_each_chunk_as_it_comes_and_makes_others_of_the_same_way(page_module, page, graphs, object_info):
    page.use(False)
    # steps enough that a chunk takes longer than a software-rendered page lags behind the server
    page.load(page_module.painted(graphs, object_info, "worlds/painted", steps=8))
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
    page.wait("!x.grow.busy && x.grow.state !== 'idle' || x.world.chain.length === 3", 900)
    page.wait("x.world.chain.length === 3 && !x.grow.busy && x.blockKeys.length === 3")
    assert [2, "running"] in page.tab.evaluate("window.seen"), "the first chunk was there before the second was done"
    assert page.x("x.settings.grown.length") == 2 and page.x("x.plan.keys.length") == 0
    assert [chunk["settings"]["seed"] for chunk in page.chunks("painted")[1:]] == [1, 1]
    # the same way with the next seed, ended by the page itself once it shows the first chunk
    page.js(
        "const { blockArrived } = x; x.blockArrived = function (state) { const done = blockArrived.call(this, state);"
        " if (x.world.chain.length === 2 && x.world.tree.length === 4) x.grow.stop(); return done; };"
    )
    page.focus()
    page.press("Shift+R")
    page.wait("x.world.tree.length === 4 && !x.grow.busy", 900)
    photo, *made = page.chunks("painted")
    assert [chunk["settings"]["seed"] for chunk in made] == [1, 1, 2] and page.x("x.world.state") == made[-1]["key"]
    assert [chunk["parent"] for chunk in made] == [photo["key"], made[0]["key"], photo["key"]]
    worlds = [world_files.load(page.server.output / "worlds" / "painted", branch=made[at]["key"]) for at in (0, 2)]
    torch.testing.assert_close(worlds[0].cameras.w2c, worlds[1].cameras.w2c)


def test_stop_ends_a_run_within_a_step_and_an_error_is_said_with_its_node(page_module, page, graphs, object_info, server):
    page.use(False)
    page.load(page_module.painted(graphs, object_info, "worlds/stopped", steps=1000))
    page.begin()
    page.js("x.settings.chunks = 1; x.setKeys([{ R: [0, 0, 0, 1], T: [0.2, 0, 0.2], fov: x.standing.fov }]); await x.startGrowing();")
    page.wait("x.grow.state === 'running' && x.grow.progress.stage === 'sample' && x.grow.progress.step > 0", 600)
    page.js("await x.grow.stop();")
    stopped = time.monotonic()
    while server.get("/queue")["queue_running"]:
        assert time.monotonic() < stopped + 20, "a step takes a fraction of a second, a thousand of them minutes"
        time.sleep(0.1)
    page.wait("x.grow.state === 'idle'")
    assert 0 < page.x("x.grow.progress.step") < 900
    assert page.x("x.plan.keys.length") == 1, "the path is kept"
    assert len(page.chunks("stopped")) == 1
    # 40 frames are no whole chunk of the transformer
    page.js("x.aim = function () { this.chunkFrames = 40; }; x.settings.chunks = 1; x.commit(); await x.startGrowing();")
    page.wait("x.grow.state === 'failed' && !x.refreshing", 600)
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


def test_handles_move_and_turn_a_key_in_a_zoomed_graph_and_leave_the_view_alone(page, graph, saved):
    saved("tools", chunks=1)
    page.use(False)
    page.load(graph("worlds/tools"))
    page.standing()
    page.see(0.4)
    page.wait("Math.abs(x.stage.canvas.width - x.view.getBoundingClientRect().width * x.stage.ratio) <= 1")
    page.see(1.3)
    page.wait("Math.abs(x.stage.canvas.width - x.view.getBoundingClientRect().width * x.stage.ratio) <= 1")
    page.js("x.flight.to({ R: [0, 0, 0, 1], T: [0, 0, -1], fov: 50 }, { glide: false });")
    page.js("x.setKeys([{ R: [0, 0, 0, 1], T: [0, 0, 0.5], fov: 40 }], 0);")
    page.focus()
    page.js("x.select(0);")
    for key, mode, axis in (("g", "translate", "X"), ("r", "rotate", "Y")):
        page.press(key)
        page.wait(f"x.gizmoShown && x.stage.gizmo?.mode === '{mode}' && x.hits.length === 1 && !x.stage.raf && !x.stage.drawing()")
        before, text = page.x("({ key: x.plan.keys[0], view: JSON.stringify(x.flight.pose) })"), page.x("x.textWidget.value")
        grip = grip_of(page, axis)
        page.tab.mouse.down()
        for step in range(1, 6):
            page.tab.mouse.move(grip[0] + 8 * step, grip[1])
        page.wait("x.gizmoDragging")
        page.tab.mouse.up()
        page.wait(f"!x.gizmoDragging && x.textWidget.value !== {json.dumps(text)}")
        after = page.x("x.plan.keys[0]")
        moved, turned = np.subtract(after["T"], before["key"]["T"]), np.subtract(after["R"], before["key"]["R"])
        if mode == "translate":
            assert moved[0] > 0.05 and np.abs(moved[1:]).max() < 1e-6 and np.abs(turned).max() < 1e-6, "along x of the world, no other way"
        else:
            assert abs(turned[1]) > 0.02 and np.abs(turned[[0, 2]]).max() < 1e-6 and np.abs(moved).max() < 1e-6, "about the vertical only"
        assert json.loads(page.x("x.textWidget.value"))["path"][1]["T"] == pytest.approx(after["T"], abs=1e-6)
        assert page.x("JSON.stringify(x.flight.pose)") == before["view"]
    assert page.errors == []


def grip_of(page, axis: str) -> list[float]:
    """Moves the mouse over the view until it is on the handle of an axis, from the key outwards; where that is."""
    box = page.tab.locator(".lyra2 .sink").bounding_box()
    x, y, width = page.x("[x.hits[0].x, x.hits[0].y, x.view.clientWidth]")
    scale = box["width"] / width
    for away in range(16, 160, 8):
        for right, down in ((1, 0), (0.7, 0.7), (0, 1)):
            at = [box["x"] + x * scale + away * right, box["y"] + y * scale + away * down]
            page.tab.mouse.move(*at)
            if page.x("x.stage.gizmo.axis") == axis:
                return at
    raise AssertionError(f"no handle of {axis} within 160 pixels of the key")


def test_files_presets_and_connected_cameras_become_the_path_and_go_out_in_every_format(page, graph, saved, room, tmp_path):
    saved("tools", chunks=1)
    page.use(False)
    page.load(graph("worlds/tools"))
    page.standing()
    page.js("await x.standAtLatest(); x.set('millimetres', false);")
    page.wait("x.world.chain.length === 2 && x.blockKeys.length === 2")
    page.focus()
    page.press("2")
    page.button("orbit left").click()
    page.wait("x.plan.keys.length === 4 && x.settled?.retrieved")
    planned = next_path.read(page.x("x.textWidget.value"))
    stand = world_files.load(page.server.output / "worlds" / "tools").last_camera
    cameras = next_path.cameras_of(planned, stand)
    kept = {}
    for label in ("Save", "npz", "transforms", "COLMAP"):
        with page.tab.expect_download() as download:
            page.button(label).click()
        kept[label] = tmp_path / f"{label} {download.value.suggested_filename}"
        download.value.save_as(kept[label])
    assert json.loads(kept["Save"].read_text()) == json.loads(page.x("x.textWidget.value"))
    assert zipfile.is_zipfile(kept["COLMAP"]) and "cameras.txt" in " ".join(zipfile.ZipFile(kept["COLMAP"]).namelist())
    for label in ("Save", "npz", "transforms"):
        page.button("Clear").click()
        page.wait("x.plan.keys.length === 0")
        with page.tab.expect_file_chooser() as chooser:
            page.button("Load").click()
        chooser.value.set_files(kept[label])
        page.wait("x.plan.keys.length > 0")
        again = next_path.cameras_of(next_path.read(page.x("x.textWidget.value")), stand)
        assert len(again) == len(cameras)
        assert (again.centers - cameras.centers).norm(dim=1).max() < 0.02 * page.x("x.depth"), label
    # what is no camera file is refused in words
    (tmp_path / "none.npz").write_bytes(b"no cameras")
    with page.tab.expect_file_chooser() as chooser:
        page.button("Load").click()
    chooser.value.set_files(tmp_path / "none.npz")
    page.wait("!x.panels.notice.hidden && x.panels.notice.textContent.includes('none.npz')")
    # a preset of the pack
    page.button("Clear").click()
    page.button("All presets …").click()
    page.button("dolly zoom").click()
    page.wait("x.plan.keys.length > 1")
    assert page.errors == []


def test_connected_cameras_are_offered_as_the_path_while_none_is_planned(page, graph):
    page.use(False)
    page.load(graph("worlds/offered", zooms=True))
    page.begin()
    page.wait("x.plan.keys.length > 0 && x.panels.status.textContent.includes('known')")
    plan = json.loads(page.x("x.textWidget.value"))
    assert plan["lyra2"]["frames"] == 17 and plan["path"][-1]["T"][2] > 0.5 and abs(plan["path"][-1]["T"][0]) < 0.05, "straight in"
    page.js(f"x.setKeys([{KEY}]); await x.beginWorld();")
    page.wait("x.grow.state === 'idle'")
    assert page.x("x.plan.keys.length") == 1, "what is planned is never replaced"


def test_a_chunk_costs_two_requests_and_is_not_rerolled_where_nothing_asks_for_the_seed(page, graph, saved):
    saved("again")
    page.use(False)
    page.load(graph("worlds/again"))
    page.standing()
    page.js(f"x.settings.chunks = 1; x.setKeys([{KEY}]);")
    page.wait("x.settled?.retrieved")
    page.requests.clear()
    page.js("await x.startGrowing();")
    page.wait("x.world.chain.length === 2 && !x.grow.busy && x.blockKeys.length === 2")
    fetched = [request for request in page.asked() if request.method == "GET"]
    assert [request.url.split("/lyra2/")[1].split("/")[0].split("?")[0] for request in fetched] == ["world", "points"]
    assert sum(request.sizes()["responseBodySize"] for request in fetched) <= 0.4e6
    assert page.x("x.settings.grown.length") == 1 and not page.x("x.canReroll()"), "the preview would make the very same chunk"
