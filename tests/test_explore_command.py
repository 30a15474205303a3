"""`comfy.py explore`: the template with a photo or a world in place, offered where a page's address can name it."""

from __future__ import annotations

import json
import socket

import pytest
import torch

from lyra_core.cameras import next_path
from lyra_core.cameras.camera import pinhole
from lyra_core.world import world_files
from lyra_core.world.world import begin


@pytest.fixture(scope="module")
def explore(launcher):
    return launcher.tool("explore")


@pytest.fixture
def template(project, explore) -> dict:
    return json.loads((project / "workflows" / f"{explore.TEMPLATE}.json").read_text(encoding="utf-8"))


def inputs_of(launcher, server, workflow: dict, kind: str) -> dict:
    """What a node gets when the workflow is run."""
    prompt = launcher.to_api_format(workflow, server.get("/object_info"))
    (found,) = (node["inputs"] for node in prompt.values() if node["class_type"] == kind)
    return found


def test_the_host_offers_the_photo_s_own_workflow_where_the_address_says(launcher, explore, template, project, tmp_path):
    base, output = tmp_path / "base", tmp_path / "output"
    photo = project / "tools" / "demo" / "room.png"
    page = explore.offer(explore.with_photo(template, photo, (480, 832), base), base)
    assert page == "/?template=explore_and_grow&source=LyraWorlds-explore"
    with launcher.Server(base, output) as server:
        assert server.get("/api/workflow_templates")["LyraWorlds-explore"] == ["explore_and_grow"]
        offered = server.get("/api/workflow_templates/LyraWorlds-explore/explore_and_grow.json")
        assert inputs_of(launcher, server, offered, "LoadImage")["image"] == "room.png"
        scaled = inputs_of(launcher, server, offered, "ImageScale")
        assert (scaled["width"], scaled["height"], scaled["crop"]) == (480, 832, "center")
        assert inputs_of(launcher, server, offered, "Lyra2Explorer")["folder"] == "worlds/room"
        assert (base / "input" / "room.png").read_bytes() == photo.read_bytes()

        world = begin(torch.zeros(64, 96, 3), torch.ones(64, 96), pinhole((64, 96), 80.0))
        world_files.save(world, output / "walks" / "hall")
        standing = explore.with_world(offered, "walks/hall", world_files.latest(output / "walks" / "hall")[0])
        found = inputs_of(launcher, server, standing, "Lyra2Explorer")
        assert found["folder"] == "walks/hall" and next_path.read(found["path"]).state == world.key
        alone = {"stand": {"class_type": "Lyra2Explorer", "inputs": {"folder": found["folder"], "path": found["path"]}}}
        told = launcher.run_prompt(server, alone)["stand"]["lyra2_world"]
        assert [entry["state"] for entry in told] == [world.key]


def test_neither_a_photo_nor_a_world_is_refused(launcher, tmp_path):
    options = launcher.parser().parse_args(["explore", str(tmp_path)])
    with pytest.raises(launcher.WorkflowError, match="neither a photo nor the folder of a saved world"):
        launcher.explore(options)


def test_where_there_is_no_browser_that_could_show_the_page_the_address_is_said(launcher, monkeypatch, capsys):
    import webbrowser

    shown = []

    class Window(webbrowser.BackgroundBrowser):
        def open(self, address, *_):
            shown.append(address)
            return True

    class Answering:
        def poll(self):
            return None

    def none():
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.delenv("BROWSER", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for found in (none, lambda: webbrowser.GenericBrowser("lynx")):
            monkeypatch.setattr(webbrowser, "get", found)
            launcher.open_when_up(Answering(), port, "/?template=x")
            assert f"ssh -L {port}:127.0.0.1:{port}" in capsys.readouterr().out
        monkeypatch.setattr(webbrowser, "get", lambda: Window("firefox"))
        launcher.open_when_up(Answering(), port, "/?template=x")
    assert shown == [f"http://127.0.0.1:{port}/?template=x"] and "no browser" not in capsys.readouterr().out
