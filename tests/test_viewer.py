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


# A headset of two eyes, EYES above the floor: what three.js asks of WebXR, drawn into a framebuffer that can be read.
HEADSET = """({ height, fov, aspect }) => {
    const SIDE = 96, wide = Math.round(SIDE * aspect);
    window.XRWebGLBinding = undefined;
    WebGL2RenderingContext.prototype.makeXRCompatible = async () => {};
    class Layer {
        constructor(session, gl) {
            Object.assign(this, { gl, framebuffer: gl.createFramebuffer(), framebufferWidth: 2 * wide, framebufferHeight: SIDE });
            const color = gl.createRenderbuffer(), depth = gl.createRenderbuffer();
            gl.bindFramebuffer(gl.FRAMEBUFFER, this.framebuffer);
            gl.bindRenderbuffer(gl.RENDERBUFFER, color);
            gl.renderbufferStorage(gl.RENDERBUFFER, gl.RGBA8, 2 * wide, SIDE);
            gl.framebufferRenderbuffer(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.RENDERBUFFER, color);
            gl.bindRenderbuffer(gl.RENDERBUFFER, depth);
            gl.renderbufferStorage(gl.RENDERBUFFER, gl.DEPTH24_STENCIL8, 2 * wide, SIDE);
            gl.framebufferRenderbuffer(gl.FRAMEBUFFER, gl.DEPTH_STENCIL_ATTACHMENT, gl.RENDERBUFFER, depth);
        }
        getViewport({ eye }) { return { x: eye === "left" ? 0 : wide, y: 0, width: wide, height: SIDE }; }
    }
    window.XRWebGLLayer = Layer;
    const f = 1 / Math.tan(fov / 2), near = 0.01, far = 1000;
    const projection = [f / aspect, 0, 0, 0, 0, f, 0, 0, 0, 0, (far + near) / (near - far), -1, 0, 0, 2 * far * near / (near - far), 0];
    const rigid = (x, y) => ({ matrix: new Float32Array([1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, x, y, 0, 1]), position: { x, y, z: 0 } });
    const views = [["left", -0.001], ["right", 0.001]].map(([eye, x]) =>
        ({ eye, projectionMatrix: new Float32Array(projection), transform: rigid(x, height) }));
    const fake = (globalThis.headset = { frames: 0, asked: [] });
    class Session extends EventTarget {
        renderState = { depthNear: 0.1, depthFar: 1000 };
        inputSources = [{ handedness: "left", gamepad: { axes: [0, 0, 0, 0] } }];
        enabledFeatures = ["local-floor"];
        environmentBlendMode = "opaque";
        visibilityState = "visible";
        updateRenderState(state) { Object.assign(this.renderState, state); }
        async requestReferenceSpace(kind) { fake.asked.push(kind); return new EventTarget(); }
        requestAnimationFrame(draw) {
            const frame = { session: this, getViewerPose: () => ({ views, transform: rigid(0, height) }), getPose: () => null };
            return requestAnimationFrame((now) => { if (this.over) return; draw(now, frame); fake.frames += 1; });
        }
        cancelAnimationFrame(number) { cancelAnimationFrame(number); }
        async end() { this.over = true; this.dispatchEvent(new Event("end")); }
    }
    fake.pixels = () => {
        const { gl, framebuffer } = fake.session.renderState.baseLayer, pixels = new Uint8Array(wide * SIDE * 4);
        gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffer);
        gl.readPixels(0, 0, wide, SIDE, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
        gl.bindFramebuffer(gl.FRAMEBUFFER, null);
        return [wide, SIDE, [...pixels]];
    };
    Object.defineProperty(navigator, "xr", { configurable: true, value: Object.assign(new EventTarget(), {
        isSessionSupported: async (mode) => mode === "immersive-vr",
        requestSession: async (mode, { requiredFeatures }) => {
            fake.asked.push(mode, ...requiredFeatures);
            return (fake.session = new Session());
        },
    }) });
}"""


def test_a_headset_stands_on_the_ground_and_sees_what_the_camera_does(browser, address, world):
    cameras, splat, around = world
    tab = browser.new_page(viewport={"width": 200, "height": 150})  # every frame is drawn by the processor
    facing = {"height": around.ground.eyes, "fov": float(cameras.fov[0]), "aspect": cameras.size[1] / cameras.size[0]}
    tab.add_init_script(f"({HEADSET})({json.dumps(facing)})")
    tab.set_default_timeout(300_000)
    tab.goto(address)
    tab.wait_for_function("() => globalThis.lyra2Viewer")
    tab.evaluate("async () => { await lyra2Viewer.ready; lyra2Viewer.go(0); }")
    tab.locator("button", has_text="VR").click()
    tab.wait_for_function("() => headset.frames > 3 && headset.pixels()[2].some((value, place) => place % 4 < 3 && value > 60)")
    tab.evaluate("() => new Promise(done => setTimeout(done, 1500))")
    assert tab.evaluate("() => headset.asked") == ["immersive-vr", "local-floor", "local-floor"]
    wide, high, values = tab.evaluate("() => headset.pixels()")
    shown = np.array(values, np.float32).reshape(high, wide, 4)[::-1, :, :3] / 255
    expected = rasterize.render(splat, cameras[0], backend="torch").images[0].movedim(-1, 0)[None]
    expected = torch.nn.functional.interpolate(expected, (high, wide), mode="bilinear", antialias=True)[0].movedim(0, -1).numpy()
    error = float(np.square(shown - expected)[8:-8, 8:-8].mean())
    assert -10 * np.log10(error) > 25, f"{-10 * np.log10(error):.1f} dB"
    start = tab.evaluate("() => lyra2Viewer.rig.position.toArray()")
    tab.evaluate("() => { headset.session.inputSources[0].gamepad.axes[3] = -1; }")
    tab.wait_for_function("z => lyra2Viewer.rig.position.z < z - 0.3", arg=start[2])
    x, y, z = tab.evaluate("() => lyra2Viewer.rig.position.toArray()")
    row, column = (int(i) for i in around.ground.cells_of(np.array(x), np.array(-z)))
    assert y == pytest.approx(-around.ground.height[row, column], abs=1e-4)  # at the feet: the headset knows how high the eyes are
    tab.evaluate("() => headset.session.end()")
    after = tab.evaluate("() => [lyra2Viewer.rig.position.y, lyra2Viewer.rig.scale.x]")
    assert after[0] == pytest.approx(y + around.ground.eyes, abs=0.05) and after[1] == 1
    tab.close()


def test_the_licences_and_the_record_lie_beside_the_page(world, libraries, tmp_path):
    cameras, _, _ = world
    assert "flies" in viewer_files.save(tmp_path / "viewer", libraries, Cameras(cameras.w2c, cameras.K, cameras.size), None, 0.0)
    licences = (tmp_path / "viewer" / "lib" / "LICENSES.txt").read_text()
    assert "three.js authors" in licences and "Spark" in licences and "Permission is hereby granted" in licences
    record = json.loads((tmp_path / "viewer" / "world.json").read_text())
    assert "map" not in record and len(record["cameras"]) == len(cameras) and record["bookmarks"] == [0, 1, 2, 3, 4]
