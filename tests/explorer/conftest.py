"""One server and one browser for each file of tests of the Explorer's page, and worlds to look at."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lyra_core.cameras import presets
from lyra_core.cameras.camera import pinhole
from lyra_core.memory.depth import room_box
from lyra_core.world import preview, world_files
from lyra_core.world.world import begin

SIZE = (128, 208)


@pytest.fixture(scope="session")
def page_module():
    """page.py beside this file."""
    spec = importlib.util.spec_from_file_location("lyra_page", Path(__file__).parent / "page.py")
    module = sys.modules["lyra_page"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt install chromium, or set CHROMIUM)")
    return module


@pytest.fixture(scope="module")
def server(page_module, launcher, project, comfy_host, tiny_models, tmp_path_factory):
    base = tmp_path_factory.mktemp("explorer")
    (base / "input").mkdir()
    shutil.copyfile(project / "tools" / "demo" / "room.png", base / "input" / "photo.png")
    tiny_models.write_all(base / "models")
    with launcher.Server(base, base / "output", "--models-directory", str(base / "models")) as running:
        yield running


@pytest.fixture(scope="module")
def browser(page_module):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        running = page_module.launch(driver)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page(page_module, browser, server):
    return page_module.ExplorerPage(browser, server)


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="module")
def graph(page_module, object_info, graphs):
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
