"""The routes of the Explorer's page: what they answer, what they refuse, what they keep, over real HTTP."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import math
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from PIL import Image

from lyra_core.cameras import camera_files, next_path, presets
from lyra_core.cameras.camera import pinhole
from lyra_core.exports import web_libraries
from lyra_core.memory import point_cloud
from lyra_core.memory.depth import room_box
from lyra_core.world import preview, world_files
from lyra_core.world.world import begin, rewind

SIZE = (64, 96)


def frontend() -> Path:
    import comfyui_frontend_package

    return Path(comfyui_frontend_package.__file__).parent / "static"


class Server:
    """The routes on a server of their own, in a thread: requests come from outside, as a page's do."""

    def __init__(self, routes_module):
        self.routes = routes_module.Routes(str(frontend()))
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.url = self.run(self._start())

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    async def _start(self) -> str:
        table, app = web.RouteTableDef(), web.Application()
        self.routes.add_to(table)
        app.add_routes(table)
        self.server, self.session = TestServer(app), ClientSession(auto_decompress=False)
        await self.server.start_server()
        return str(self.server.make_url("/")).rstrip("/")

    async def _ask(self, method: str, path: str, **options):
        async with self.session.request(method, self.url + path, **options) as answer:
            return answer.status, answer.headers, await answer.read()

    def get(self, path: str, **headers):
        return self.run(self._ask("GET", path, headers=headers))

    def post(self, path: str, body):
        options = {"data": body} if isinstance(body, bytes) else {"json": body}
        status, headers, content = self.run(self._ask("POST", path, **options))
        return status, headers, content

    def stop(self) -> None:
        self.run(self.session.close())
        self.run(self.server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="module")
def server(pack):
    running = Server(pack.routes)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def output(comfy_host) -> Path:
    return comfy_host / "output"


def photo(seed: int = 0):
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(noise, SIZE, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    camera = pinhole(SIZE, 80.0)
    depth = room_box(SIZE, camera.K[0], (0.5, 0.5), (0.15, 0.12, 0.85, 0.88), 5.0).depth
    return begin(image, depth, camera, prompt="a room")


@pytest.fixture(scope="module")
def world(output):
    """Two chunks of 16 frames to the left, saved in worlds/room, and another second chunk from the same first."""
    path = presets.preset("orbit_horizontal", pinhole(SIZE, 80.0), 33, 5.0, "left", 0.4)
    grown = preview.explore(photo(), path, chunk_frames=16, folder=output / "worlds" / "room")
    first = rewind(grown, 1)
    other = presets.preset("rotate_spot", first.last_camera, 17, 5.0, "right", 30.0)
    preview.explore(first, other, chunk_frames=16, folder=output / "worlds" / "room", prompts=lambda chunk: "a door")
    return grown


def answer(found) -> dict:
    status, _, content = found
    assert status == 200, content
    return json.loads(content)


def test_a_world_is_summed_up_with_its_chain_and_its_tree(server, world, output):
    found = answer(server.get("/lyra2/world?folder=worlds/room"))
    assert found["folder"] == "worlds/room" and found["size"] == list(SIZE)
    assert found["latest"] == found["state"] == world_files.latest(output / "worlds" / "room")[0]
    assert found["chain"][:2] == list(world.keys[:2]) and len(found["chain"]) == 3
    assert found["frames"] == 33 and found["depth"] == pytest.approx(float(world.memory.keyframes[0].depth.quantile(0.25)))
    tree = {item["state"]: item for item in found["tree"]}
    assert len(tree) == 4 and {item["parent"] for item in tree.values()} == {None, world.keys[0], world.keys[1]}
    assert [tree[key]["frames"] for key in found["chain"]] == [1, 16, 16]
    assert tree[world.keys[0]]["prompt"] == "a room" and tree[found["latest"]]["prompt"] == "a door"
    assert tree[found["latest"]]["generator"] == "geometry preview" and tree[found["latest"]]["seed"] is None


def test_any_state_can_be_stood_at_and_a_page_that_knows_it_is_told_so(server, world):
    status, headers, content = server.get(f"/lyra2/world?folder=worlds/room&state={world.keys[1][:8]}")
    found = json.loads(content)
    assert found["state"] == world.keys[1] and found["chain"] == list(world.keys[:2]) and found["frames"] == 17
    assert headers["Cache-Control"] == "no-cache"
    again = server.get(f"/lyra2/world?folder=worlds/room&state={world.keys[1][:8]}", **{"If-None-Match": headers["ETag"]})
    assert again[0] == 304 and not again[2]
    other = server.get("/lyra2/world?folder=worlds/room", **{"If-None-Match": headers["ETag"]})
    assert other[0] == 200


def test_the_folders_with_worlds_are_listed_and_a_damaged_one_says_so(server, world, output):
    damaged = output / "worlds" / "damaged"
    damaged.mkdir()
    (damaged / "world.json").write_text("{")
    found = {item["folder"]: item for item in answer(server.get("/lyra2/worlds"))}
    assert found["worlds/room"]["states"] == 4 and found["worlds/room"]["size"] == list(SIZE)
    assert "damaged" in found["worlds/damaged"]["error"] and str(output) not in json.dumps(found)
    status, _, content = server.get("/lyra2/world?folder=worlds/damaged")
    assert status == 400 and str(output) not in content.decode() and "restore" in json.loads(content)["error"]


def test_points_of_a_state_are_what_its_last_chunk_adds_and_are_kept_by_the_page(server, world):
    seen = []
    for index, key in enumerate(world.keys):
        path = f"/lyra2/points/{key}?folder=worlds/room"
        status, headers, content = server.get(path, **{"Accept-Encoding": "gzip"})
        assert status == 200 and headers["Content-Encoding"] == "gzip" and "immutable" in headers["Cache-Control"]
        block = point_cloud.decode(gzip.decompress(content))
        plain = server.get(path, **{"Accept-Encoding": "identity"})
        assert plain[2] == gzip.decompress(content) and "Content-Encoding" not in plain[1]
        assert server.get(path, **{"If-None-Match": headers["ETag"]})[0] == 304
        assert len(block.frames) == (16 if index else 1) and block.size == SIZE
        seen.append(set(block.views["frame"].tolist()))
    assert seen == [{0}, {8, 16}, {24, 32}]


def test_a_frame_is_a_picture_of_the_asked_width(server, world):
    for frame, width, expected in ((0, "", 96), (20, 48, 48), (32, 5000, 96)):
        status, headers, content = server.get(f"/lyra2/frame/{world.key}/{frame}?folder=worlds/room&width={width}")
        picture = Image.open(io.BytesIO(content))
        assert status == 200 and headers["Content-Type"] == "image/jpeg" and "immutable" in headers["Cache-Control"]
        assert picture.size == (expected, expected * 2 // 3)
        small = np.asarray(Image.fromarray(world.frame(frame).numpy()).resize(picture.size), dtype=float)
        assert np.abs(np.asarray(picture, dtype=float) - small).mean() < 6
    assert server.get(f"/lyra2/frame/{world.key}/33?folder=worlds/room")[0] == 404
    assert server.get(f"/lyra2/frame/{world.key}/-1?folder=worlds/room")[0] == 404
    assert server.get(f"/lyra2/frame/{world.key}/x?folder=worlds/room")[0] == 400


def planned(world, frames: int = 81, angle: float = 30.0) -> dict:
    cameras = presets.preset("rotate_spot", world.last_camera, frames, 5.0, "right", angle)
    return json.loads(next_path.text_of(cameras, world.key))


def test_a_preflight_tells_what_is_known_and_how_much_happens(server, world):
    asked = {"folder": "worlds/room", "state": world.key, "path": planned(world)}
    found = answer(server.post("/lyra2/preflight", asked))
    assert found["frames"] == 81 and [view["frame"] for view in found["views"]] == [*range(8, 81, 8)]
    assert 0 <= min(v["coverage"] for v in found["views"]) < 0.9 < found["views"][0]["coverage"]
    assert found["effort"] == [pytest.approx(30 / 22, abs=1e-3)] and "retrieved" not in found
    clear = {view["clearance"] for view in found["views"]}
    assert max(clear) - min(clear) < 1e-4 and found["nearest"]["distance"] / found["depth"] == pytest.approx(min(clear))
    text = answer(server.post("/lyra2/preflight", {**asked, "path": json.dumps(asked["path"]), "retrieve": True}))
    assert text["views"] == found["views"] and len(text["retrieved"]) == 1
    assert text["retrieved"][0] and set(text["retrieved"][0]) <= set(world.memory.frames)
    still = answer(server.post("/lyra2/preflight", {**asked, "path": ""}))
    assert still["frames"] == 1 and [view["frame"] for view in still["views"]] == [0] and still["effort"] == []


def test_the_newest_preflight_of_a_client_overtakes_those_that_have_not_begun(server, world):
    gate, asked = threading.Event(), {"folder": "worlds/room", "path": planned(world), "client": "me"}
    server.routes.work.worker.submit(gate.wait, 30)  # the worker is busy

    async def race():
        mine = [asyncio.create_task(server._ask("POST", "/lyra2/preflight", json=asked)) for _ in range(3)]
        other = asyncio.create_task(server._ask("POST", "/lyra2/preflight", json={**asked, "client": "you"}))
        for _ in range(200):
            await asyncio.sleep(0.02)
            if sum(task.done() for task in mine) == 2:
                break
        gate.set()
        return [(await task)[0] for task in [*mine, other]]

    statuses = server.run(race())
    assert sorted(statuses[:3]) == [200, 409, 409] and statuses[3] == 200 and server.routes.work.newest == {}


def test_retrieval_does_not_hold_up_the_others(server, world, pack, monkeypatch):
    begun, gate, asked = threading.Event(), threading.Event(), {"folder": "worlds/room", "path": planned(world)}

    def slow(*_):
        begun.set()
        return [] if gate.wait(30) else None

    monkeypatch.setattr(pack.routes.paths, "_retrieved", slow)

    async def race():
        retrieving = asyncio.create_task(server._ask("POST", "/lyra2/preflight", json={**asked, "retrieve": True}))
        await asyncio.to_thread(begun.wait, 30)
        quick = (await asyncio.wait_for(server._ask("POST", "/lyra2/preflight", json=asked), 20))[0]
        waiting = not retrieving.done()
        gate.set()
        return quick, waiting, (await retrieving)[0]

    assert server.run(race()) == (200, True, 200)


def test_a_preset_begins_where_the_world_stands(server, world):
    listed = {item["name"]: item for item in answer(server.get("/lyra2/presets"))}
    assert set(listed) == set(presets.PRESETS) and listed["dolly_zoom"]["strength"] is None
    assert listed["rotate_spot"]["strength"] == {"default": 30.0, "unit": "degrees"} and "left" in listed["spiral"]["directions"]
    asked = {"folder": "worlds/room", "state": world.key, "preset": "rotate_spot", "direction": "left", "strength": 20}
    plan = next_path.read(answer(server.post("/lyra2/preset", asked))["path"])
    assert plan.state == world.key and plan.frames == 81 and plan.path.before is not None
    cameras = next_path.cameras_of(plan, world.last_camera)
    expected = presets.preset("rotate_spot", world.last_camera, 81, 5.0, "left", 20.0)
    assert (cameras.centers - expected.centers).abs().max() < 1e-3 * 5  # it came walking, and ends that smoothly
    assert (cameras.w2c[:, :3, :3] - expected.w2c[:, :3, :3]).abs().max() < 0.01
    status, _, content = server.post("/lyra2/preset", {**asked, "preset": "loop"})
    assert status == 400 and "rotate_spot" in json.loads(content)["error"]


@pytest.mark.parametrize("name", ["npz", "nerfstudio transforms.json", "camera path json", "colmap text"])
def test_a_path_is_saved_in_every_format_and_comes_back(server, world, tmp_path, name):
    plan = planned(world, 17)
    asked = {"folder": "worlds/room", "state": world.key, "path": plan, "format": name}
    status, headers, content = server.post("/lyra2/path", asked)
    assert status == 200 and "attachment" in headers["Content-Disposition"]
    expected = next_path.cameras_of(next_path.read(json.dumps(plan)), world.last_camera)
    if name == "colmap text":
        zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path)
        cameras = camera_files.load_colmap(tmp_path)
    else:
        file = tmp_path / headers["Content-Disposition"].split('"')[1]
        file.write_bytes(content)
        cameras = camera_files.load_cameras(file, 17, size=SIZE, motion="time")
        loaded = server.post(f"/lyra2/cameras?folder=worlds/room&name={file.name}&frames=17&state={world.key}", content)
        back = next_path.cameras_of(next_path.read(answer(loaded)["path"]), world.last_camera)
        assert (back.centers - expected.centers).abs().max() < 1e-2
    assert (cameras.w2c - expected.w2c).abs().max() < 1e-3
    assert server.post("/lyra2/path", {**asked, "format": "exe"})[0] == 400


def test_the_page_comes_as_one_module_in_its_language_and_again_only_if_it_has_changed(server, project):
    status, headers, content = server.get("/lyra2/page/zh.mjs", **{"Accept-Encoding": "gzip"})
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "text/javascript", "no-cache")
    text = gzip.decompress(content).decode()
    assert json.loads((project / "js" / "texts" / "zh.json").read_text(encoding="utf-8"))["grow"] in text
    assert server.get("/lyra2/page/zh.mjs", **{"If-None-Match": headers["ETag"]})[0] == 304
    assert server.get("/lyra2/page/en.mjs", **{"If-None-Match": headers["ETag"]})[0] == 200
    assert server.get("/lyra2/page/xx.mjs")[2] == server.get("/lyra2/page/en.mjs")[2] != server.get("/lyra2/page/ja.mjs")[2]
    assert server.get("/lyra2/page/..%2f..%2fREADME.mjs")[2] == server.get("/lyra2/page/en.mjs")[2], "a name is looked up, not opened"


def test_the_libraries_are_served_and_nothing_beside_them(server):
    found = answer(server.get("/lyra2/lib"))
    assert found["files"] == list(web_libraries.FILES)
    status, headers, content = server.get(f"/lyra2/lib/{found['version']}/three.module.js", **{"Accept-Encoding": "gzip"})
    assert status == 200 and "javascript" in headers["Content-Type"] and "immutable" in headers["Cache-Control"]
    assert b"./three.core.js" in gzip.decompress(content)
    assert server.get(f"/lyra2/lib/{found['version']}/package.json")[0] == 404
    assert server.get(f"/lyra2/lib/{found['version']}/..%2f..%2findex.html")[0] == 404
    assert server.get("/lyra2/lib/0/three.module.js")[0] == 404
    assert answer(server.get("/lyra2/world?folder=worlds/room"))["library"] == found["version"]


OUTSIDE = ["..", "../output", "/etc", "", " ", "worlds/../../input", "worlds/none", "worlds/link", "worlds/manifest", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_folder_outside_or_without_a_world_is_not_found(server, world, output, tmp_path, name):
    outside = output.parent / "elsewhere"
    if not outside.exists():
        world_files.save(rewind(world, 0), outside)
        (output / "worlds" / "link").symlink_to(outside)
        (output / "worlds" / "manifest").mkdir()
        (output / "worlds" / "manifest" / "world.json").symlink_to(outside / "world.json")
    asked = {"folder": name, "path": "", "preset": "spiral", "format": "npz"}
    answers = [server.run(server._ask("GET", path, params={"folder": name})) for path in (
        "/lyra2/world", f"/lyra2/points/{world.key}", f"/lyra2/frame/{world.key}/0")]
    answers += [server.post(f"/lyra2/{path}", asked) for path in ("preflight", "preset", "path")]
    answers.append(server.run(server._ask("POST", "/lyra2/cameras", params={"folder": name, "name": "a.npz"}, data=b"")))
    for status, _, content in answers:
        assert status == 404 and str(output.parent) not in content.decode(), content
    assert name not in {item["folder"] for item in answer(server.get("/lyra2/worlds"))}


@pytest.mark.parametrize("state", ["..", "0" * 7, "g" * 64, "0" * 65, "ABCDEF01", "00000000"])
def test_a_state_that_is_none_or_is_not_there_is_not_found(server, world, state):
    paths = (f"/lyra2/world?folder=worlds/room&state={state}", f"/lyra2/points/{state}?folder=worlds/room",
             f"/lyra2/frame/{state}/0?folder=worlds/room")
    for path in paths:
        assert server.get(path)[0] == 404
    status, _, content = server.post("/lyra2/preflight", {"folder": "worlds/room", "state": state, "path": ""})
    assert status == 404 and json.loads(content)["error"]


def test_fewer_than_eight_letters_of_a_key_are_none(server, world):
    assert server.get(f"/lyra2/points/{world.key[:8]}?folder=worlds/room")[0] == 200
    assert server.get(f"/lyra2/points/{world.key[:7]}?folder=worlds/room")[0] == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"\xff", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b" " * 2**20, "256 kB"),
        ({"folder": "worlds/room", "path": "x"}, "not valid JSON"),
        ({"folder": "worlds/room", "path": {"path": [{"R": [0, 0, 0, 0], "T": [0, 0, 0], "fov": 42}] * 2}}, "quaternion"),
        ({"folder": "worlds/room", "path": {"path": [], "lyra2": {"version": 2}}}, "version"),
        ({"folder": "worlds/room", "path": {"path": [], "lyra2": {"frames": 10**9}}}, "8001"),
        ({"folder": "worlds/room", "path": "", "chunk_frames": 0}, "chunk_frames"),
    ],
)
def test_a_body_that_is_no_request_is_refused_with_the_reason(server, world, body, words):
    status, _, content = server.post("/lyra2/preflight", body)
    assert status == 400 and words in json.loads(content)["error"]


def test_a_file_that_holds_no_cameras_is_refused_by_its_own_name(server, world):
    for name, content, words in (("a.npz", b"PK", "npz"), ("b.json", b"{}", "camera path"), ("c.exe", b"", "type")):
        status, _, found = server.post(f"/lyra2/cameras?folder=worlds/room&name={name}", content)
        assert status == 400 and words in json.loads(found)["error"] and "/tmp" not in found.decode()


def test_a_folder_that_vanished_is_not_found_though_it_was_open(server, output):
    folder = output / "worlds" / "gone"
    world_files.save(photo(3), folder)
    key = world_files.latest(folder)[0]
    assert server.get(f"/lyra2/points/{key}?folder=worlds/gone")[0] == 200
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert server.get(f"/lyra2/points/{key}?folder=worlds/gone")[0] == 404


def test_numbers_that_are_unknown_are_null(server, output):
    """Standing where nothing was ever seen is allowed; JSON has no infinity."""
    folder = output / "worlds" / "blind"
    world = photo(4)
    depth = torch.zeros(SIZE)
    depth[0, 1] = 2.0  # between the points of the coarser levels
    camera = pinhole(SIZE, 80.0)
    world_files.save(begin(torch.zeros(*SIZE, 3), depth, camera), folder)
    found = answer(server.post("/lyra2/preflight", {"folder": "worlds/blind", "path": planned(world)}))
    assert found["nearest"]["distance"] is None and found["views"][0]["clearance"] is None and math.isfinite(found["depth"])
