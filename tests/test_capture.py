"""Lyra2LoadCapture: pictures with the cameras of a transforms.json or a COLMAP model, and a world from them."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lyra_core.cameras import camera_files
from lyra_core.memory.depth import DepthMap

SIZE = (240, 400)
PLACES = [(0.0, 0, 0), (0.5, 0, 0.1, -7), (1.0, 0.1, 0.3, -14), (1.5, 0.1, 0.5, -22)]


@pytest.fixture(scope="module")
def scan(comfy_host, scenes):
    """Folders in the input folder, and (cameras, pictures, depths) that are in both."""
    cameras = scenes.standing(PLACES, SIZE, 290.0)
    pictures, depths = scenes.traced(scenes.FURNISHED, cameras)
    base = comfy_host / "input" / "scans"
    (base / "nerf" / "images").mkdir(parents=True)
    (base / "colmap" / "images").mkdir(parents=True)
    names = [f"photo_{i}.png" for i in (8, 9, 10, 11)]
    for name, picture in zip(names, pictures, strict=True):
        file = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
        for kind in ("nerf", "colmap"):
            file.save(base / kind / "images" / name)
    camera_files.save_transforms(base / "nerf" / "transforms.json", cameras, [f"images/{name}" for name in names])
    camera_files.save_colmap(base / "colmap", cameras, names)
    yield base, cameras, pictures, depths
    shutil.rmtree(base)


@pytest.fixture(scope="module")
def node(pack):
    return importlib.import_module("lyra_pack.nodes.photos")


def load(node, name: str, **values):
    return node.LoadCapture.execute(f"scans/{name}", **{"width": SIZE[1], "height": SIZE[0], **values}).args


@pytest.mark.parametrize("name", ["nerf/transforms.json", "colmap"])
def test_pictures_come_with_their_cameras(node, scan, name):
    _, cameras, pictures, _ = scan
    images, found, report = load(node, name)
    assert_close(images, pictures, atol=0.5 / 255 + 1e-6, rtol=0)
    assert_close(found.w2c, cameras.w2c, atol=1e-5, rtol=0)
    assert_close(found.K, cameras.K, atol=1e-3, rtol=0)
    assert report.startswith("photo_8.png, photo_9.png, photo_10.png, photo_11.png")


def test_pictures_are_cropped_as_their_cameras_are(node, scan):
    _, cameras, pictures, _ = scan
    images, found, _ = load(node, "colmap", width=160, height=160)
    assert_close(found.K, cameras.cropped((160, 160)).K, atol=1e-3, rtol=0)
    middle = torch.nn.functional.interpolate(pictures.movedim(-1, 1)[..., 80:320], (160, 160), mode="bilinear", antialias=True)
    assert float((images - middle.movedim(1, -1)).abs().mean()) < 0.02


def test_some_of_many_are_spread_over_the_rest(node, scan):
    assert len(load(node, "nerf/transforms.json", count=2)[0]) == 2
    assert load(node, "nerf/transforms.json", count=2, first=1)[2].startswith("photo_9.png, photo_11.png")
    assert load(node, "nerf/transforms.json", count=8, step=2)[2].startswith("photo_8.png, photo_10.png")
    with pytest.raises(ValueError, match="4 pictures; there are not two from number 3 on"):
        load(node, "nerf/transforms.json", first=3)


def test_a_scan_gives_depths_the_scale_of_its_cameras(node, scan):
    _, cameras, pictures, depths = scan
    images, found, _ = load(node, "colmap")
    maps = tuple(DepthMap(depth * scale, found.K[0], "any scale") for depth, scale in zip(depths, (1, 0.2, 5, 3), strict=True))
    _, scaled, seen, _ = node.Photos.execute(images, {"places": node.KNOWN, "cameras": found, "depth": maps}).args
    assert len(scaled) == 4
    for its, depth in zip(scaled, depths, strict=True):
        assert float((its.depth / depth).median()) == pytest.approx(1, abs=0.02)
    assert_close(seen.w2c, found.w2c)


def test_a_picture_that_is_not_there_is_named(node, scan):
    (scan[0] / "nerf" / "images" / "photo_9.png").rename(scan[0] / "away.png")
    try:
        with pytest.raises(ValueError, match="1 of 4 pictures are not there: images/photo_9.png"):
            load(node, "nerf/transforms.json")
    finally:
        (scan[0] / "away.png").rename(scan[0] / "nerf" / "images" / "photo_9.png")


def test_names_without_ending_are_found_and_names_that_lead_elsewhere_are_not(node, scan, tmp_path):
    base = scan[0] / "nerf"
    record = json.loads((base / "transforms.json").read_text())
    shutil.copytree(base, scan[0] / "other")
    for frame in record["frames"]:
        frame["file_path"] = "./" + frame["file_path"].removesuffix(".png")
    (scan[0] / "other" / "transforms.json").write_text(json.dumps(record))
    assert len(load(node, "other/transforms.json")[0]) == 4
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(Path(scan[0]) / "outside.png")
    record["frames"][0]["file_path"] = "../outside.png"
    (scan[0] / "other" / "transforms.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="not there: ../outside.png"):
        load(node, "other/transforms.json")


def test_what_has_no_pictures_is_no_capture(node, scan, comfy_host):
    (comfy_host / "input" / "scans" / "path.json").write_text(json.dumps({"path": []}))
    with pytest.raises(ValueError, match="transforms.json"):
        camera_files.pictures_of(comfy_host / "input" / "scans" / "path.json")
