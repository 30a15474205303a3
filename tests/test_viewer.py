"""The page in an export, in a real browser: what it draws at a camera, where one can walk, and how it fits a phone."""

from __future__ import annotations

import io
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from explorer.page import CHROMIUM, FLAGS
from PIL import Image
from test_ground import BODY, room, seen_surface, walk

from lyra_core.cameras.camera import Cameras
from lyra_core.exports import viewer_files, walkable, web_libraries
from lyra_core.exports.ground import ground
from lyra_core.splats import gaussians, rasterize, splat_files

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt install chromium, or set CHROMIUM)"),
    pytest.mark.skipif(find_spec("comfyui_frontend_package") is None, reason="the host's frontend has the libraries"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_args):
        pass


@pytest.fixture(scope="module")
def libraries() -> dict[str, str]:
    import comfyui_frontend_package

    root = Path(comfyui_frontend_package.__file__).parent / "static"
    return web_libraries.extract(web_libraries.find(root, root))


@pytest.fixture(scope="module")
def world():
    """Cameras, gaussians of a coloured room with a box, and its map."""
    cameras = walk()
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(1, 3, 8, 13, generator=generator)  # soft: the two renderers blur edges of a pixel differently
    colours = torch.nn.functional.interpolate(coarse, cameras.size, mode="bilinear")[0].movedim(0, -1)
    views = [(colours, room(cameras[i]), cameras[i]) for i in (0, 4)]
    mesh = seen_surface(cameras)
    return cameras, gaussians.fuse(views), walkable.walkable(ground(mesh, cameras), mesh, cameras, BODY)


@pytest.fixture(scope="module")
def address(world, libraries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    cameras, splat, around = world
    splat_files.save_spz(splat, folder / "splat.spz")
    viewer_files.save(folder / "viewer", libraries, cameras, around, BODY.radius)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/viewer/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


def opened(browser, address: str, width: int, height: int):
    tab = browser.new_page(viewport={"width": width, "height": height})
    problems = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.set_default_timeout(120_000)
    tab.goto(address)
    tab.wait_for_function("() => globalThis.lyra2Viewer")
    assert tab.evaluate("async () => { await lyra2Viewer.ready; return document.getElementById('said').textContent; }") == ""
    assert not problems
    return tab


def picture(tab) -> np.ndarray:
    tab.evaluate("() => new Promise(done => setTimeout(done, 1500))")  # the splats are sorted on another thread
    return np.asarray(Image.open(io.BytesIO(tab.locator("canvas").screenshot())).convert("RGB")).astype(np.float32) / 255


def test_a_camera_shows_what_our_own_renderer_shows(browser, address, world):
    cameras, splat, _ = world
    height, width = cameras.size
    tab = opened(browser, address, width, height)
    tab.add_style_tag(content="nav { display: none; }")
    tab.evaluate("() => lyra2Viewer.setMode('walk')")
    for number in (0, 4):
        tab.evaluate("number => lyra2Viewer.go(number)", number)
        shown = picture(tab)
        expected = rasterize.render(splat, cameras[number], backend="torch").images[0].numpy()
        error = float(np.square(shown - expected)[8:-8, 8:-8].mean())
        assert -10 * np.log10(error) > 30, f"camera {number}: {-10 * np.log10(error):.1f} dB"
    tab.close()


def test_one_walks_on_free_ground_and_not_through_the_box(browser, address, world):
    cameras, _, around = world
    tab = opened(browser, address, 640, 400)
    start = tab.evaluate("() => { lyra2Viewer.setMode('walk'); lyra2Viewer.go(0); return lyra2Viewer.rig.position.toArray(); }")
    tab.locator("canvas").click()
    tab.keyboard.down("w")
    tab.wait_for_function("z => lyra2Viewer.rig.position.z < z - 0.3", arg=start[2])
    tab.keyboard.up("w")
    x, y, z = tab.evaluate("() => lyra2Viewer.rig.position.toArray()")
    row, column = (int(i) for i in around.ground.cells_of(np.array(x), np.array(-z)))
    assert y == pytest.approx(around.ground.eyes - around.ground.height[row, column], abs=1e-4)
    blocked = tab.evaluate("""() => {
        const { rig, view, move, free } = lyra2Viewer;
        rig.position.set(0.9, 0, -3.9); view.yaw = 0;
        for (let i = 0; i < 100; i++) move(0, -0.05);
        return [rig.position.toArray(), free(rig.position)];
    }""")
    (x, _, z), stands_free = blocked
    assert stands_free and -z < 4.4  # the box begins there
    tab.close()


def test_a_phone_has_every_button_in_reach(browser, address):
    tab = opened(browser, address, 390, 780)
    sizes = tab.evaluate(
        "() => [...document.querySelectorAll('button')].map(b => b.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    assert len(sizes) >= 3 and all(width >= 44 and height >= 44 for width, height in sizes)
    assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    tab.locator("button", has_text="Orbit").click()
    before = tab.evaluate("() => lyra2Viewer.rig.position.toArray()")
    tab.mouse.move(200, 300)
    tab.mouse.down()
    tab.mouse.move(260, 320, steps=4)
    tab.mouse.up()
    assert tab.evaluate("() => lyra2Viewer.rig.position.toArray()") != before
    assert tab.evaluate("() => lyra2Viewer.view.mode") == "orbit"
    tab.close()


def test_the_licences_and_the_record_lie_beside_the_page(world, libraries, tmp_path):
    cameras, _, _ = world
    assert "flies" in viewer_files.save(tmp_path / "viewer", libraries, Cameras(cameras.w2c, cameras.K, cameras.size), None, 0.0)
    licences = (tmp_path / "viewer" / "lib" / "LICENSES.txt").read_text()
    assert "three.js authors" in licences and "Spark" in licences and "Permission is hereby granted" in licences
    record = json.loads((tmp_path / "viewer" / "world.json").read_text())
    assert "map" not in record and len(record["cameras"]) == len(cameras) and record["bookmarks"] == [0, 1, 2, 3, 4]
