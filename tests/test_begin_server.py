"""The real host: worlds from several photos, a video and a panorama, from the shipped workflows' files, without any weights."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import servers
import torch
from PIL import Image

from lyra_core.world import world_files

PHOTO = ("ImageScale.width=416", "ImageScale.height=240")
SHORT = ("Lyra2PreviewChunks.chunk_frames=8",)


@pytest.fixture(scope="module")
def base(pack, tmp_path_factory, project) -> Path:
    """Photos and a panorama of the demo's room, and a video of three of its views."""
    folder = tmp_path_factory.mktemp("begin")
    subprocess.run([sys.executable, str(project / "tools" / "demo" / "make_room.py"), str(folder / "input")], check=True)
    return folder


@pytest.fixture(scope="module")
def server(launcher, base):
    with launcher.Server(base, base / "output") as server:
        yield server


@pytest.fixture(scope="module")
def run(launcher, server, project):
    """Runs a shipped workflow with some settings; returns what it says and the suffixes of what it wrote."""

    def run(name: str, *settings: str) -> tuple[str, set[str]]:
        workflow = json.loads((project / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        object_info = servers.object_info(server)
        prompt = launcher.to_api_format(workflow, object_info)
        launcher.apply_settings(prompt, list(settings), server.base / "input", object_info)
        outputs = launcher.run_prompt(server, prompt)
        made = {file.suffix for file in launcher.output_files(outputs, server)}
        return "\n".join(launcher.output_texts(outputs)), made

    return run


def saved(base: Path, name: str):
    """The world that a workflow saved in a folder of the photo's own."""
    return world_files.load(next((base / "output" / "worlds").glob(f"{name}_*")))


def photos_of(base: Path, *names: str) -> list[str]:
    return [f"Photo {i}.image={name}" for i, name in enumerate(names, 1)]


def test_three_photos_become_a_world_that_is_walked(run, base):
    names = ("photo_1.png", "photo_2.png", "photo_3.png")
    said, made = run("photos_to_world", *photos_of(base, *names), *PHOTO, *SHORT, "Lyra2ZoomTrajectory.frames=17")
    assert {".mp4", ".ply", ".glb"} <= made
    assert said.count("matches fit") == 2 and "left out" not in said
    world = saved(base, "photos_to_world")
    assert len(world) == 17 and {-1, -2} <= {k.frame for k in world.memory.keyframes}
    centers = torch.stack([world.memory[i].camera.centers[0] for i in (-1, -2)])
    # which way, and how far of each other; the layout's scale is a guess
    assert 0.45 < float(centers[0].norm() / centers[1].norm()) < 0.65
    true = torch.tensor([[0.6, -0.1, 0.3], [1.1, -0.1, 0.6]])
    assert float(torch.cosine_similarity(centers, true).min()) > 0.95


def test_a_photo_whose_file_says_that_it_was_turned_stands_upright_and_one_of_another_place_is_left_out(run, base):
    upright = Image.open(base / "input" / "photo_2.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    upright.rotate(90, expand=True).save(base / "input" / "turned.jpg", exif=exif, quality=95)
    noise = np.random.default_rng(0).integers(0, 256, (480, 832, 3), dtype=np.uint8)
    Image.fromarray(noise).save(base / "input" / "elsewhere.png")
    names = ("photo_1.png", "turned.jpg", "elsewhere.png")
    said, _ = run("photos_to_world", *photos_of(base, *names), *PHOTO, *SHORT, "Lyra2ZoomTrajectory.frames=9")
    assert re.search(r"photo 2: \d+ of \d+ matches fit", said) and "on its side" not in said
    assert re.search(r"photo 3: left out, only \d+ matches fit", said)


def test_a_video_becomes_a_world(run, base, pack):
    video = importlib.import_module("lyra_pack.nodes.video")
    with Image.open(base / "input" / "photo_1.png") as opened:
        picture = np.array(opened.resize((624, 360)))
    # a window that slides over the picture: what a flat scene looks like to who walks along it
    frames = [torch.from_numpy(picture[60:300, x : x + 416].copy()) for x in range(0, 200, 5)]
    video.encode(str(base / "input" / "walk.mp4"), frames, Fraction(16), crf=12)
    said, made = run("video_to_world", "LoadVideo.file=walk.mp4", "Lyra2PickFrames.count=6", *PHOTO, *SHORT, "Lyra2ZoomTrajectory.frames=9")
    assert {".mp4", ".ply", ".glb"} <= made and re.search(r"frames \d+, \d+", said) and said.count("matches fit") >= 4


def test_a_panorama_becomes_a_world_that_is_looked_at_all_around(run, base):
    room = ("room_width=4.78", "room_length=8.0", "room_height=2.87", "camera_height=0.777")
    settings = [f"Lyra2Panorama.distance.{value}" for value in room]
    small = ("Lyra2Panorama.width=208", "Lyra2Panorama.height=112", "Lyra2PresetTrajectory.frames=25", "Lyra2ZoomTrajectory.frames=9")
    said, made = run("panorama_to_world", "LoadImage.image=panorama.png", *settings, *small, *SHORT)
    assert {".mp4", ".ply", ".glb"} <= made and "12 views of 208x112 see 9" in said
    world = saved(base, "panorama_to_world")
    behind = world.frame(12)
    assert len(world) == 33 and float(world.invented(12).float().mean()) < 0.05, "what is behind was in the panorama"
    assert float(behind.float().std()) > 20


def test_what_is_no_panorama_is_said(launcher, run, base):
    shutil.copyfile(base / "input" / "photo_1.png", base / "input" / "flat.png")
    with pytest.raises(launcher.WorkflowError, match="is 832x480; a whole equirectangular panorama is twice as wide as high"):
        run("panorama_to_world", "LoadImage.image=flat.png", "Lyra2PresetTrajectory.frames=25")
