"""A bundle is there complete or not at all, never at the cost of what lay there before, and says what is in it."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from lyra_core.cameras.camera import Cameras, project, quaternion_to_rotation
from lyra_core.exports import bundle
from lyra_core.exports.bundle import BundleError, licences, readme, save_colmap, spread, writing
from lyra_core.splats.gaussians import Gaussians, colors_to_sh


def make(folder, **files):
    with writing(folder) as place:
        for name, text in files.items():
            (place / "sub").mkdir(exist_ok=True)
            (place / "sub" / name).write_text(text)


def held(folder):
    """Name and text of every file in a folder, the manifest left out."""
    return {f.name: f.read_text() for f in folder.rglob("*") if f.is_file() and f.name != bundle.MANIFEST}


# ------------------------------------------------------------------------------------------------------------- the folder


def test_a_bundle_appears_when_all_of_it_is_there(tmp_path):
    folder = tmp_path / "some" / "where" / "world"
    with writing(folder) as place:
        (place / "a").write_text("new")
        assert not folder.exists() and place.parent == folder.parent
    assert held(folder) == {"a": "new"} and [f.name for f in folder.parent.iterdir()] == ["world"]
    record = json.loads((folder / bundle.MANIFEST).read_text())
    assert record["format"] == "lyra-bundle" and record["files"] == {"a": 3}


def test_a_new_bundle_replaces_an_earlier_one_and_all_that_was_in_it(tmp_path):
    make(tmp_path / "world", a="old", b="old")
    (tmp_path / "world" / ".DS_Store").write_text("litter")
    make(tmp_path / "world", a="new")
    assert held(tmp_path / "world") == {"a": "new"} and [f.name for f in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_whatever_goes_wrong_leaves_the_earlier_bundle(tmp_path, error):
    make(tmp_path / "world", a="old")
    with (
        pytest.raises(BundleError if isinstance(error, OSError) else type(error)),
        writing(tmp_path / "world") as place,
    ):
        (place / "a").write_text("new")
        raise error
    assert held(tmp_path / "world") == {"a": "old"} and [f.name for f in tmp_path.iterdir()] == ["world"]


@pytest.mark.parametrize("move", [1, 2])
def test_a_move_that_fails_leaves_the_earlier_bundle(tmp_path, monkeypatch, move):
    make(tmp_path / "world", a="old")
    moves, replace = [], os.replace

    def fails(source, target):
        moves.append(target)
        if len(moves) == move:
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(bundle.os, "replace", fails)
    with pytest.raises(
        BundleError, match="world can't be written: Permission denied; what was there before is unchanged"
    ):
        make(tmp_path / "world", a="new")
    monkeypatch.undo()
    assert held(tmp_path / "world") == {"a": "old"} and [f.name for f in tmp_path.iterdir()] == ["world"]


def test_an_export_that_was_killed_between_two_moves_is_taken_back_by_the_next(tmp_path):
    make(tmp_path / "world", a="old")
    os.replace(tmp_path / "world", tmp_path / ".world.earlier")
    (tmp_path / ".world.partial").mkdir()
    (tmp_path / ".world.partial" / "half").write_text("a file")
    with pytest.raises(ValueError, match="fails too"), writing(tmp_path / "world") as place:
        assert list(place.iterdir()) == []
        raise ValueError("fails too")
    assert held(tmp_path / "world") == {"a": "old"} and [f.name for f in tmp_path.iterdir()] == ["world"]


def test_writers_that_say_it_in_their_own_words_are_understood(tmp_path):
    with pytest.raises(BundleError, match="world can't be written: No space left; "), writing(tmp_path / "world"):
        try:
            raise OSError(errno.ENOSPC, "No space left")
        except OSError as error:
            raise ValueError("this file can't be written") from error
    assert not list(tmp_path.iterdir())


def foreign(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")


def of_another_program(folder):
    foreign(folder)
    (folder / bundle.MANIFEST).write_text('{"format": "other", "files": {"thesis.txt": 4}}')


def damaged(folder):
    foreign(folder)
    (folder / bundle.MANIFEST).write_text("{")


def with_a_file_of_mine(folder):
    make(folder, a="old")
    (folder / "sub" / "thesis.txt").write_text("mine")


def a_file(folder):
    folder.write_text("mine")


@pytest.mark.parametrize(
    "prepare, says",
    [
        (foreign, "holds files but no bundle, such as thesis.txt; choose another folder"),
        (of_another_program, "holds files but no bundle"),
        (damaged, "bundle.json is damaged"),
        (with_a_file_of_mine, "1 files that no export wrote, such as sub/thesis.txt; a new export would remove them"),
        (a_file, "is a file; choose another folder"),
    ],
)
def test_what_is_not_ours_is_never_replaced(tmp_path, prepare, says):
    prepare(tmp_path / "world")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=says), writing(tmp_path / "world"):
        pytest.fail("nothing should be written")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "world").mkdir()
    make(tmp_path / "world", a="new")
    assert held(tmp_path / "world") == {"a": "new"}


# ----------------------------------------------------------------------------------------------------------------- colmap


def walk(frames=7, size=(48, 80)):
    """Cameras that turn and move about a point before them, with pixels that aren't square."""
    generator = torch.Generator().manual_seed(1)
    w2c = torch.eye(4).repeat(frames, 1, 1)
    turns = torch.tensor([8.0, 0, 0, 0]) + torch.randn(frames, 4, generator=generator)
    w2c[:, :3, :3] = quaternion_to_rotation(turns)
    w2c[:, :3, 3] = torch.tensor([0, 0, 6.0]) + torch.randn(frames, 3, generator=generator)
    K = torch.tensor([[70.0, 0, 33.0], [0, 55.0, 27.5], [0, 0, 1]]).repeat(frames, 1, 1)
    return Cameras(w2c, K, size)


def picture(frame, size=(48, 80)):
    return torch.full((*size, 3), 10 * frame, dtype=torch.uint8)


def blobs(count=500):
    generator = torch.Generator().manual_seed(3)
    quats = torch.zeros(count, 4)
    quats[:, 0] = 1
    colors = torch.rand(count, 3, generator=generator)
    means = torch.randn(count, 3, generator=generator)
    return Gaussians(means, quats, torch.full((count, 3), 0.1), torch.ones(count), colors_to_sh(colors))


@pytest.fixture
def model(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="COLMAP itself reads what was written; pip install pycolmap")
    shown = []
    assert save_colmap(tmp_path, walk(), picture, 3, blobs(), shown.append) == 3
    assert [int(image[0, 0, 0]) for image in shown] == [0, 30, 60]
    return pycolmap.Reconstruction(str(tmp_path / "colmap" / "sparse" / "0"))


def test_colmap_reads_cameras_pictures_and_points(model, tmp_path):
    (camera,) = model.cameras.values()
    assert camera.model.name == "PINHOLE" and (camera.height, camera.width) == (48, 80)
    assert camera.params.tolist() == pytest.approx([70, 55, 33.5, 28.0])  # its top-left pixel has its centre at 0.5
    images = sorted(model.images.values(), key=lambda image: image.name)
    assert [image.name for image in images] == ["frame_00000.png", "frame_00003.png", "frame_00006.png"]
    for image, frame in zip(images, (0, 3, 6), strict=True):
        np.testing.assert_allclose(image.cam_from_world().matrix(), walk().w2c[frame, :3], atol=1e-6)
        pixels = np.asarray(Image.open(tmp_path / "colmap" / "images" / image.name))
        np.testing.assert_array_equal(pixels, picture(frame))
    points = sorted(model.points3D.items())
    np.testing.assert_allclose([p.xyz for _, p in points], blobs().means, atol=1e-6)
    np.testing.assert_array_equal([p.color for _, p in points], (blobs().colors * 255).round())


def test_colmap_s_own_projection_meets_our_pixels(model):
    pixels, z = project(blobs().means, walk())
    compared = 0
    for image in model.images.values():
        frame = int(image.name[6:11])
        for mean, pixel, depth in zip(blobs().means[:40], pixels[frame], z[frame], strict=False):
            if depth > 0.5:
                theirs = image.project_point(mean.double().numpy())
                assert theirs == pytest.approx((pixel + 0.5).tolist(), abs=0.01)
                compared += 1
    assert compared > 60


def test_many_gaussians_become_a_spread_of_points(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "SPARSE_POINTS", 50)
    save_colmap(tmp_path, walk(), picture, 8, blobs())
    rows = np.loadtxt(tmp_path / "colmap" / "sparse" / "0" / "points3D.txt")
    assert len(rows) == 50
    chosen = [int(np.abs(blobs().means.numpy() - row[1:4]).sum(1).argmin()) for row in rows]
    assert chosen[0] == 0 and chosen[-1] == 499 and 8 <= min(np.diff(chosen)) <= max(np.diff(chosen)) <= 12


def test_without_gaussians_there_are_no_points_and_transforms_find_the_pictures(tmp_path):
    save_colmap(tmp_path, walk(), picture, 1)
    assert (tmp_path / "colmap" / "sparse" / "0" / "points3D.txt").read_text() == ""
    frames = json.loads((tmp_path / "colmap" / "transforms.json").read_text())["frames"]
    assert len(frames) == 7 and all((tmp_path / "colmap" / frame["file_path"]).is_file() for frame in frames)


# ------------------------------------------------------------------------------------------------------------- the README


def test_the_readme_tells_what_is_there_and_why_the_rest_is_not(tmp_path):
    (tmp_path / "splat.ply").write_bytes(bytes(1_230_000))
    (tmp_path / "colmap" / "images").mkdir(parents=True)
    (tmp_path / "colmap" / "images" / "a.png").write_bytes(bytes(700))
    (tmp_path / "colmap" / "b.txt").write_bytes(bytes(250))
    text = readme(
        tmp_path, "my world", {"splat.ply": "7 gaussians", "colmap": "1 picture"}, {"mesh.glb": "no mesh"}, ["free"]
    )
    assert text.startswith("# my world\n") and text.endswith("- free\n")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    assert list(rows) == ["`splat.ply`", "`colmap`"]
    assert all(part in rows["`splat.ply`"] for part in ("7 gaussians", "1.23 MB", "y down", "SuperSplat"))
    assert "950 B" in rows["`colmap`"] and "- `mesh.glb`: no mesh" in text
    assert "SuperSplat**: drag" in text and "glTF" not in text and "usdz" not in text


def test_a_large_world_s_layer_is_told_by_its_own_name(tmp_path):
    (tmp_path / "world.usdc").write_bytes(b"")
    text = readme(tmp_path, "w", {"world.usdc": "7 gaussians"}, {}, [])
    assert "| `world.usdc` | one USD stage" in text and "7 gaussians" in text and "world.usdz" not in text
    assert "**Isaac Sim**: open world.usdc (6.0 or newer" in text


def test_the_readme_says_what_a_unit_is_worth_and_how_large_it_is(tmp_path):
    plain = readme(tmp_path, "w", {}, {}, [])
    assert "A scene unit counts as one metre. That is true only if the depth was metric" in plain
    scaled = readme(tmp_path, "w", {}, {}, [], 0.25, [1.0, 2.0, 30.0])
    assert "A scene unit is 0.25 metres: scale by 0.25 on import" in scaled and "counts as one metre" not in scaled
    assert "1 (width) x 2 (height) x 30 (depth)" in scaled and "gaussians lie within" not in plain


def test_the_axes_that_the_readme_tells_are_those_of_the_files():
    from lyra_core.cameras.camera import AXES_FLIP
    from lyra_core.exports.usd_files import TO_Z_UP

    x, y, z = 2.0, 3.0, 5.0
    text = "\n".join(bundle._measures(1.0, None))
    assert f"{bundle.Y_UP}: (x, -y, -z)" in text and AXES_FLIP == (1, -1, -1)
    assert f"{bundle.Z_UP}: (x, z, -y)" in text
    assert (np.array([x, y, z, 1]) @ np.array(TO_Z_UP)).tolist() == [x, z, -y, 1]


@pytest.mark.parametrize("size, text", [(0, "0 B"), (999, "999 B"), (25_600, "25.6 kB"), (3_000_000_000, "3 GB")])
def test_sizes_are_told_in_three_digits(tmp_path, size, text):
    with open(tmp_path / "a", "wb") as handle:
        handle.truncate(size)
    assert bundle._size(tmp_path / "a") == text


def test_the_size_of_a_scene_is_not_that_of_its_sky():
    points = torch.rand(10_000, 3) * torch.tensor([1.0, 2.0, 4.0])
    points[:50] *= 1e4
    assert spread(points) == pytest.approx([1, 2, 4], rel=0.05) and spread(points[:0]) == [0, 0, 0]


# --------------------------------------------------------------------------------------------------------------- licences


def test_lyra_s_weights_and_giant_depth_are_not_for_commercial_use():
    lyra, giant, _ = licences(["lyra 2"], "Depth Anything 3 large, giant, nested")
    assert "NVIDIA" in lyra and "NOT FOR COMMERCIAL USE" in lyra
    assert "CC BY-NC 4.0" in giant and "NOT FOR COMMERCIAL USE" in giant
    assert "NOT FOR COMMERCIAL USE" in licences([], "Lyra 2 reconstruction")[0]


def test_a_geometry_preview_has_no_model_licence():
    preview, moge, photo = licences(["geometry preview"], "MoGe")
    assert "no model licence" in preview and "MIT" in moge and "photo" in photo
    assert not any("COMMERCIAL" in sentence for sentence in (preview, moge, photo))


def test_what_was_not_stated_is_said_to_be_unknown():
    assert "not stated" in licences(None)[0] and "NOT FOR COMMERCIAL USE" in licences(None)[0]
    assert "'other' made frames" in licences(["lyra 2", "other"])[1] and len(licences(["lyra 2", "other"])) == 4


def test_the_readme_gives_back_the_place_on_the_map_that_cameras_came_from(tmp_path):
    told = readme(tmp_path, "a", {}, {}, [], origin=(448251.0, 5411932.0, 120.5))
    assert "add (448251.000, 5411932.000, 120.500) to (x, y, z)" in told
    assert "map" not in readme(tmp_path, "a", {}, {}, [])


def test_a_world_that_was_turned_level_says_so_with_its_rotation(tmp_path):
    level = quaternion_to_rotation(torch.tensor([[0.9961947, 0.0871557, 0.0, 0.0]]))[0]  # by 10 degrees about x
    text = readme(tmp_path, "w", {}, {}, [], level=level)
    assert "10.0 degrees aslant" in text and "1.00000, 0.00000, 0.00000; 0.00000, 0.98481, -0.17365" in text
    assert "aslant" not in readme(tmp_path, "w", {}, {}, [], level=torch.eye(3))
