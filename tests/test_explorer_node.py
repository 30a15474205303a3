"""The Explorer node: where it stands, what it plans, what it tells the page; and that growing moves it on, in the real host."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid

import pytest
import torch

from lyra_core.cameras import next_path, presets
from lyra_core.cameras.camera import pinhole
from lyra_core.memory.depth import room_box
from lyra_core.world import preview, world_files
from lyra_core.world.world import begin, rewind

SIZE = (64, 96)


def photo(seed: int = 0, prompt: str = ""):
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(noise, SIZE, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    camera = pinhole(SIZE, 80.0)
    camera.K[0, 0, 0], camera.K[0, 0, 2] = 84.0, 45.0  # neither square pixels nor a centred lens
    return begin(image, room_box(SIZE, camera.K[0], (0.5, 0.5), (0.15, 0.12, 0.85, 0.88), 5.0).depth, camera, prompt=prompt)


def walked(world, chunks: int = 2, **options):
    path = presets.preset("orbit_horizontal", world.last_camera, 1 + 8 * chunks, 5.0, "left", 0.3)
    return preview.explore(world, path, chunk_frames=8, **options)


def plan_from(world, frames: int = 81, **settings) -> str:
    cameras = presets.preset("horizontal_zoom", world.last_camera, frames, 5.0, "right", 0.3)
    return next_path.text_of(cameras, world.key, **settings)


@pytest.fixture
def node(pack):
    return pack.explorer.Explorer


@pytest.fixture
def folder(comfy_host) -> str:
    return f"worlds/{uuid.uuid4().hex}"


def saved(comfy_host, folder: str):
    return comfy_host / "output" / folder


def test_without_a_path_it_stands_at_the_begun_world_and_saves_it(node, folder, comfy_host):
    world = photo(prompt="a room")
    stand, cameras, captions, chunks, seed, place = (found := node.execute(folder, "", world)).args
    assert stand is world and world_files.load(saved(comfy_host, folder)).key == world.key
    assert len(cameras) == 1 and torch.equal(cameras.w2c, world.last_camera.w2c)
    assert json.loads(captions) == {"0": "a room"} and (chunks, place) == (0, folder)
    assert found.ui == {
        "lyra2_world": [{"folder": folder, "state": world.key, "parent": None, "chunks": 0, "frames": 1}]
    }


def test_it_stands_at_the_state_that_the_path_names_and_needs_no_world_for_it(node, folder, comfy_host):
    grown = walked(photo(), folder=saved(comfy_host, folder))
    path = json.dumps({"path": [], "lyra2": {"from": grown.keys[1]}})
    stand, cameras, *_ = (found := node.execute(folder, path)).args
    assert stand.key == grown.keys[1] and torch.equal(cameras.w2c, grown.chunks[0].cameras.w2c[-1:])
    assert found.ui["lyra2_world"][0] == {
        "folder": folder, "state": grown.keys[1], "parent": grown.keys[0], "chunks": 1, "frames": 9
    }  # fmt: skip


def test_standing_somewhere_does_not_change_what_is_latest(node, folder, comfy_host):
    first = photo()
    grown = walked(first, folder=saved(comfy_host, folder))
    node.execute(folder, "", first)
    assert world_files.latest(saved(comfy_host, folder))[0] == grown.key


def test_the_world_is_asked_for_only_where_the_folder_lacks_the_state(node, folder, comfy_host):
    grown = walked(photo(), folder=saved(comfy_host, folder))
    here, elsewhere = plan_from(grown), plan_from(photo(5))
    ask = node.check_lazy_status
    assert ask(folder=folder, path=here, world=None) == []
    assert ask(folder=folder, path=elsewhere, world=None) == ["world"]
    assert ask(folder=folder, path="", world=None, cameras=None) == ["world", "cameras"]
    assert ask(folder=folder, path="", world=grown, cameras=None) == ["cameras"]
    assert ask(folder=folder, path="") == []  # nothing is connected
    assert ask(folder=folder + "x", path=here, world=None, cameras=None) == ["world"]


def test_a_planned_path_begins_with_the_standing_camera_and_keeps_its_lens(node, folder, comfy_host):
    world = photo()
    text = json.loads(plan_from(world, captions={"0": "a door"}, seed=7))
    for key in text["path"][1:]:
        key["fov"] *= 0.8
    text["path"][0]["T"] = [0.1, 0, 0]  # rounded or edited: the standing camera counts
    _, cameras, captions, chunks, seed, _ = node.execute(folder, json.dumps(text), world).args
    assert (len(cameras), chunks, seed, json.loads(captions)) == (81, 1, 7, {"0": "a door"})
    assert torch.equal(cameras.w2c[0], world.last_camera.w2c[0]) and torch.equal(cameras.K[0], world.last_camera.K[0])
    K = cameras.K[-1]
    assert float(cameras.fov[-1].rad2deg()) == pytest.approx(text["path"][-1]["fov"], abs=1e-3)
    assert float(K[0, 0] / K[1, 1]) == pytest.approx(84 / 80, abs=1e-5) and K[:2, 2].tolist() == [45.0, 31.5]


def test_frames_that_fill_no_chunk_ask_for_the_next_one(node, folder):
    world = photo()
    counts = {frames: node.execute(folder, plan_from(world, frames), world).args[3] for frames in (2, 81, 82, 161)}
    assert counts == {2: 1, 81: 1, 82: 2, 161: 2}


def test_cameras_are_offered_as_a_path_that_begins_where_it_stands(node, folder):
    grown = walked(photo())
    cameras = presets.preset("horizontal_zoom", pinhole((128, 192), 160.0), 161, 5.0, "right", 0.3)
    found = node.execute(folder, "", grown, cameras)
    assert found.args[3] == 0, "they are offered, not taken"
    (text,) = found.ui["lyra2_path"]
    plan = next_path.read(text)
    assert plan.state == grown.key and plan.frames == 161 and len(plan.path.keys) == 21
    taken = node.execute(folder, text, grown).args[1]
    moved = torch.linalg.inv(taken.w2c[0]) @ taken.w2c[-1]
    asked = torch.linalg.inv(cameras.w2c[0]) @ cameras.w2c[-1]
    assert (taken.w2c[-1] @ torch.linalg.inv(taken.w2c[0]) - cameras.w2c[-1]).abs().max() < 1e-4, (moved, asked)
    assert "lyra2_path" not in node.execute(folder, text, grown, cameras).ui


def test_a_plan_for_a_state_that_is_nowhere_is_refused_and_without_a_plan_it_begins_anew(node, folder, comfy_host):
    world, other = photo(), photo(9)
    with pytest.raises(ValueError, match=f"state {other.key[:8]}, which is neither whole in {folder}"):
        node.execute(folder, plan_from(other), world)
    with pytest.raises(ValueError, match="no world.json|0 states"):
        node.execute(folder, plan_from(other))
    stand = node.execute(folder, json.dumps({"path": [], "lyra2": {"from": other.key}}), world).args[0]
    assert stand.key == world.key
    with pytest.raises(ValueError, match="no world is connected"):
        node.execute(folder + "x", "")


def test_an_earlier_state_of_the_connected_world_is_found_in_it(node, folder):
    grown = walked(photo())
    stand = node.execute(folder, plan_from(rewind(grown, 1)), grown).args[0]
    assert stand.key == grown.keys[1]


def test_a_state_that_lost_a_file_is_taken_from_the_connected_world_which_mends_it(node, folder, comfy_host):
    grown = walked(photo(), folder=saved(comfy_host, folder))
    lost = saved(comfy_host, folder) / f"{grown.keys[1][:24]}.safetensors"
    lost.unlink()
    text = plan_from(rewind(grown, 1))
    assert node.check_lazy_status(folder=folder, path=text, world=None) == ["world"]
    with pytest.raises(ValueError, match="is missing"):
        node.execute(folder, text)
    assert node.execute(folder, text, grown).args[0].key == grown.keys[1]
    assert lost.is_file() and world_files.load(saved(comfy_host, folder)).key == grown.key


def test_a_photo_of_another_size_is_begun_beside_the_first_in_the_same_folder(node, folder, comfy_host):
    grown = walked(photo(), folder=saved(comfy_host, folder))
    wide = begin(torch.zeros(64, 128, 3), torch.ones(64, 128), pinhole((64, 128), 80.0))
    stand = node.execute(folder, "", wide).args[0]
    assert stand.key == wide.key and stand.size == (64, 128)
    assert world_files.load(saved(comfy_host, folder)).key == grown.key, "the latest stays the latest"
    assert node.execute(folder, plan_from(stand)).args[0].size == (64, 128)
    assert node.execute(folder, plan_from(grown)).args[0].size == (64, 96)


def test_a_folder_with_one_photo_needs_no_world(node, folder, comfy_host):
    grown = walked(photo(), folder=saved(comfy_host, folder))
    assert node.execute(folder, "").args[0].key == grown.keys[0]
    world_files.save(photo(3), saved(comfy_host, folder))
    with pytest.raises(ValueError, match="2 photos to begin at"):
        node.execute(folder, "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", "not valid JSON"),
        ("[]", "list of keys"),
        ('{"path": {}}', "list of keys"),
        ('{"path": [], "lyra2": []}', "version 1"),
        ('{"path": [], "lyra2": {"version": 2}}', "version 1"),
        ('{"path": [], "lyra2": {"from": "../x"}}', "lyra2.from"),
        ('{"path": [], "lyra2": {"frames": 1}}', "lyra2.frames"),
        ('{"path": [], "lyra2": {"frames": true}}', "lyra2.frames"),
        ('{"path": [], "lyra2": {"seed": -1}}', "lyra2.seed"),
        ('{"path": [], "lyra2": {"motion": "fast"}}', "lyra2.motion"),
        ('{"path": [], "lyra2": {"captions": {"x": "y"}}}', "not a frame number"),
        ('{"path": [{}, {}]}', "R .quaternion"),
    ],
)
def test_a_text_that_is_no_plan_is_refused_with_what_it_should_be(node, folder, text, words):
    with pytest.raises(ValueError, match=words):
        node.execute(folder, text, photo())


def test_one_key_plans_nothing(node, folder):
    key = {"R": [0, 0, 0, 1], "T": [0, 0, 0], "fov": 42.0}
    assert node.execute(folder, json.dumps({"path": [key]}), photo()).args[3] == 0


def test_generators_return_the_world_unchanged_where_nothing_is_planned(pack, folder):
    world = photo()
    assert pack.world.PreviewChunks.execute(world, world.last_camera, 5, 80, folder).args[0] is world
    walk = presets.preset("spiral", world.last_camera, 81, 5.0)
    for cameras, chunks in ((world.last_camera, 2), (walk, 0)):
        found = pack.generation.Explore.execute(["16", 0], cameras, chunks, 0, {"quality": "DMD"}, folder)
        assert found.args[0] == ["16", 0] and found.expand == {}


def test_a_running_node_shows_four_pictures_a_second_and_the_last(pack, monkeypatch):
    shown, now = [], [100.0]
    monkeypatch.setattr(pack.types.time, "monotonic", lambda: now[0])

    class Bar:
        def __init__(self, total):
            pass

        def update_absolute(self, done, total, preview):
            shown.append((done, preview is not None))

    monkeypatch.setattr(pack.types, "ProgressBar", Bar)
    step, picture = pack.types.progress(40), torch.zeros(8, 8, 3, dtype=torch.uint8)
    for done in range(1, 41):  # 20 frames a second
        now[0] += 0.05
        step(done, 0, picture)
    assert [done for done, _ in shown] == list(range(1, 41))
    pictures = [done for done, picture in shown if picture]
    assert 8 <= len(pictures) <= 10 and pictures[-1] == 40
    assert min(b - a for a, b in zip(pictures[:-1], pictures[1:-1], strict=False)) >= 5


# ---------------------------------------------------------------------------------------------------- in the real host


@pytest.fixture(scope="module")
def host(launcher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    with launcher.Server(folder / "base", folder / "output") as running:
        yield running


class Page:
    """What a page hears of its own prompts."""

    def __init__(self, host):
        self.host, self.heard, self.name = host, [], uuid.uuid4().hex

    def queue(self, prompt: dict, *targets: str) -> list[dict]:
        """Run the prompt for these nodes; the messages that came meanwhile."""
        return asyncio.run(self._queue(prompt, targets))

    async def _queue(self, prompt: dict, targets: tuple[str, ...]) -> list[dict]:
        from aiohttp import ClientSession

        heard = []
        async with ClientSession() as session, session.ws_connect(self.host.url(f"/ws?clientId={self.name}")) as socket:
            body = {"prompt": prompt, "client_id": self.name}
            body |= {"partial_execution_targets": list(targets)} if targets else {}
            queued = await asyncio.to_thread(self.host.post, "/prompt", body)
            async for message in socket:
                if message.type.name != "TEXT":
                    continue
                message = json.loads(message.data)
                if message["data"].get("prompt_id") != queued["prompt_id"]:
                    continue
                heard.append({"at": time.monotonic(), **message})
                assert message["type"] not in ("execution_error", "execution_interrupted"), message
                if message["type"] == "execution_success":
                    return heard
        raise AssertionError("the socket closed")


def states_told(heard: list[dict]) -> list[tuple[str, dict]]:
    found = [m["data"] for m in heard if m["type"] == "executed" and "lyra2_world" in (m["data"]["output"] or {})]
    return [(data["display_node"], data["output"]["lyra2_world"][0]) for data in found]


def graph(path: str = "", chunk_frames: int = 16) -> dict:
    """A photo that is there already, begun, explored, previewed, saved elsewhere."""
    nodes = {
        "1": ("Lyra2LoadWorld", {"folder": "worlds/begun", "chunks": -1, "branch": ""}),
        "2": ("Lyra2Explorer", {"world": ["1", 0], "folder": "worlds/grown", "path": path}),
        "3": (
            "Lyra2PreviewChunks",
            {"world": ["2", 0], "cameras": ["2", 1], "captions": ["2", 2], "save_to": ["2", 5], "retrieve": 5,
             "chunk_frames": chunk_frames},
        ),
        "4": ("Lyra2SaveWorld", {"world": ["3", 0], "folder": "worlds/elsewhere"}),
    }  # fmt: skip
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


def test_begin_lay_a_path_grow_go_back_and_branch(host):
    world_files.save(photo(), host.output / "worlds" / "begun")
    page, grown = Page(host), host.output / "worlds" / "grown"
    begun = states_told(page.queue(graph(), "2"))
    assert [(node, told["chunks"]) for node, told in begun] == [("2", 0)]
    first = world_files.load(grown)
    assert first.key == begun[0][1]["state"] == host.get("/lyra2/world?folder=worlds/grown")["latest"]

    heard = page.queue(graph(plan_from(first, 33)), "3")
    told = [entry for node, entry in states_told(heard) if node == "3"]
    assert [entry["chunks"] for entry in told] == [1, 2, 2], "after every chunk, and at the end"
    assert told[0]["parent"] == first.key and told[1]["parent"] == told[0]["state"] and told[1] == told[2]
    between = [m["at"] for m in heard if m["type"] == "executed" and m["data"]["node"] == "3"]
    assert between[0] < between[1] < between[2] and not (host.output / "worlds" / "elsewhere").exists()

    empty = json.dumps({"path": [], "lyra2": {"from": told[1]["state"]}})
    again = states_told(page.queue(graph(empty), "3"))
    assert [(node, entry["state"]) for node, entry in again] == [("2", told[1]["state"])], "nothing is planned"

    page.queue(graph(plan_from(first, 17)), "3")
    tree = host.get("/lyra2/world?folder=worlds/grown")["tree"]
    children = [item for item in tree if item["parent"] == first.key]
    assert len(children) == 2 and len(tree) == 4


def test_a_plain_run_after_a_grow_leaves_the_world_as_it_is(host):
    world_files.save(photo(), host.output / "worlds" / "begun")
    page = Page(host)
    page.queue(graph(), "2")
    before = host.get("/lyra2/world?folder=worlds/grown")["latest"]
    page.queue(graph(json.dumps({"path": [], "lyra2": {"from": before}})))
    assert host.get("/lyra2/world?folder=worlds/grown")["latest"] == before
    assert world_files.latest(host.output / "worlds" / "elsewhere")[0] == before


def test_a_vanished_folder_is_begun_again_although_the_host_remembers_the_run(host):
    world_files.save(photo(), host.output / "worlds" / "begun")
    page, place = Page(host), host.output / "worlds" / "vanishing"
    prompt = graph()
    prompt["2"]["inputs"]["folder"] = "worlds/vanishing"
    page.queue(prompt, "2")
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    page.queue(prompt, "2")
    assert world_files.load(place).key == photo().key


def test_the_routes_answer_while_a_run_computes_and_foreign_pages_get_nothing(host):
    import urllib.error
    import urllib.request

    world_files.save(photo(), host.output / "worlds" / "begun")
    first = world_files.load(host.output / "worlds" / "begun")
    prompt = graph(plan_from(first, 81), 80)
    prompt["2"]["inputs"]["folder"] = "worlds/busy"
    run = threading.Thread(target=Page(host).queue, args=(prompt, "3"))
    run.start()
    slowest = 0.0
    while run.is_alive():
        begin_at = time.monotonic()
        assert host.get("/api/lyra2/worlds")
        slowest = max(slowest, time.monotonic() - begin_at)
        time.sleep(0.05)
    run.join()
    assert slowest < 5
    request = urllib.request.Request(host.url("/lyra2/worlds"), headers={"Origin": "http://evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=10)


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_the_node_speaks_the_page_s_languages_wholly(host, node, project, language):
    ours = json.loads((project / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))["Lyra2Explorer"]
    schema = node.define_schema()
    said = {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {i.id: {"name": i.id, "tooltip": i.tooltip} for i in schema.inputs},
        "outputs": {
            str(number): {"name": output.display_name} | ({"tooltip": output.tooltip} if output.tooltip else {})
            for number, output in enumerate(schema.outputs)
        },
    }
    assert (ours == said) == (language == "en"), "English is what the schema says, and only English"
    assert shape(ours) == shape(said)
    assert host.get("/i18n")[language]["nodeDefs"]["Lyra2Explorer"] == ours


def shape(texts):
    """The keys of nested texts; True where there is one."""
    return {key: shape(value) for key, value in texts.items()} if isinstance(texts, dict) else bool(texts)
