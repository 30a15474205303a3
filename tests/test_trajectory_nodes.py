"""What the nodes of camera paths list, read again, and say."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lyra_core.cameras import camera_files
from lyra_core.cameras.camera import Cameras, pinhole

CASES = Path(__file__).parent / "cases"


@pytest.fixture
def inputs(pack, tmp_path, monkeypatch):
    """An empty input folder."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


@pytest.fixture
def nodes(pack):
    return pack.trajectory


def options(nodes, name):
    return next(i for i in nodes.LoadTrajectory.define_schema().inputs if i.id == name).options


def load(nodes, file, frames=3, **changes):
    settings = dict(pose_scale=1.0, width=96, height=64, captions="none", curve=camera_files.CURVES[0], motion="time")
    return nodes.LoadTrajectory.execute(file, frames, **(settings | changes))


def test_files_folders_and_links_are_listed_and_litter_is_not(nodes, inputs, tmp_path):
    shutil.copytree(CASES / "colmap-folder-edited" / "before", inputs / "scan")
    shutil.copytree(inputs / "scan", inputs / "CAPITALS")
    for name in ("cameras.txt", "images.txt"):
        (inputs / "CAPITALS" / name).rename(inputs / "CAPITALS" / name.upper())
    (inputs / "half").mkdir()
    (inputs / "half" / "my_cameras.txt").write_text("no model")
    camera_files.save_npz(tmp_path / "elsewhere" / "walk.npz", pinhole((64, 96), 80.0, 3))
    for name in ("frame_10.npz", "frame_2.NPZ", "._frame_2.npz", ".DS_Store", "Thumbs.db", "__MACOSX/x.npz"):
        (inputs / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "elsewhere" / "walk.npz", inputs / name)
    (inputs / "linked").symlink_to(tmp_path / "elsewhere")
    (inputs / "captions.JSON").write_text('{"0": "a"}')
    assert options(nodes, "file") == [
        "captions.JSON", "frame_2.NPZ", "frame_10.npz", "linked/walk.npz", "CAPITALS", "scan",
        "shipped: walk.json",
    ]  # fmt: skip
    assert options(nodes, "captions") == ["none", "captions.JSON", "shipped: captions.json"]
    for name in ("linked/walk.npz", "frame_2.NPZ", "CAPITALS", "scan"):
        assert len(load(nodes, name).args[0]) == 3


@pytest.mark.parametrize("name", ["../secret.npz", "/etc/passwd", "scan/../../secret.npz"])
def test_names_do_not_lead_out_of_the_input_folder(name, pack, inputs):
    (inputs.parent / "secret.npz").write_text("x")
    with pytest.raises(ValueError, match="is no path inside the input folder"):
        pack.types.input_path(name)


def test_a_folder_that_was_edited_is_read_again(nodes, inputs):
    shutil.copytree(CASES / "colmap-folder-edited" / "before", inputs / "scan")
    before = nodes.LoadTrajectory.fingerprint_inputs("scan", "none")
    assert before == nodes.LoadTrajectory.fingerprint_inputs(file="scan", captions="none", frames=3)
    (inputs / "scan" / ".DS_Store").write_text("opened in a file manager")
    (inputs / "scan" / "points3D.txt").write_text("1 0 0 0 0 0 0 0")  # is not read
    assert nodes.LoadTrajectory.fingerprint_inputs("scan", "none") == before
    assert load(nodes, "scan").args[0].centers[:, 0].tolist() == [0, 1, 2]
    shutil.copy(CASES / "colmap-folder-edited" / "after" / "images.txt", inputs / "scan" / "images.txt")
    assert nodes.LoadTrajectory.fingerprint_inputs("scan", "none") != before
    assert load(nodes, "scan").args[0].centers[:, 0].tolist() == [0, 10, 20]


@pytest.mark.parametrize("change", ["cameras.txt", "IMAGES.TXT", "a link", "sparse/0", "captions", "the same size and time"])
def test_every_file_that_is_read_counts_for_the_fingerprint(change, nodes, inputs, tmp_path):
    import os

    (inputs / "captions.json").write_text('{"0": "a"}')
    place = tmp_path / "elsewhere" if change == "a link" else inputs / "scan"
    inner = place / "sparse" / "0" if change == "sparse/0" else place
    shutil.copytree(CASES / "colmap-folder-edited" / "before", inner)
    images = inner / "images.txt"
    if change == "IMAGES.TXT":
        images = images.rename(inner / change)
    if change == "a link":
        (inputs / "scan").symlink_to(place)
    edited = {"cameras.txt": inner / "cameras.txt", "captions": inputs / "captions.json"}.get(change, images)
    before, stamp = nodes.LoadTrajectory.fingerprint_inputs("scan", "captions.json"), edited.stat()
    edited.write_text(edited.read_text().replace("-1 0 0", "-3 0 0").replace("80 80", "90 90").replace('"a"', '"b"'))
    os.utime(edited, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert nodes.LoadTrajectory.fingerprint_inputs("scan", "captions.json") != before


def test_any_folder_has_a_fingerprint_of_all_that_is_in_it(pack, tmp_path):
    fingerprint = pack.types.fingerprint
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.bin").write_bytes(b"1")
    seen = [fingerprint(tmp_path / "a")]
    (tmp_path / "a" / ".DS_Store").write_bytes(b"1")
    assert fingerprint(tmp_path / "a") == seen[0]
    (tmp_path / "a" / "b" / "x.bin").write_bytes(b"2")
    seen.append(fingerprint(tmp_path / "a"))
    (tmp_path / "a" / "b" / "x.bin").rename(tmp_path / "a" / "b" / "y.bin")
    seen += [fingerprint(tmp_path / "a"), fingerprint(tmp_path / "none"), fingerprint()]
    assert len(set(seen)) == 5


def test_what_was_done_to_the_cameras_is_said_in_the_node(nodes, inputs):
    record = dict(w=640, h=480, fl_x=500.0, camera_model="OPENCV", k1=0.1, frames=[
        dict(file_path=f"{i}.png", transform_matrix=[[1, 0, 0, 5e5 + i], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        for i in (2, 1, 0)])  # fmt: skip
    (inputs / "t.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="t.json: frame 2: has the lens distortion k1 0.1.*take the lens without its distortion"):
        load(nodes, "t.json")
    out = load(nodes, "t.json", without_distortion=True)
    report = out.args[2]
    for words in ("3 cameras of 96x64, a way of 2 scene units", "order of its file names", "k1 0.1", "taken off", "cropped"):
        assert words in report
    assert out.ui.as_dict()["text"] == (report,)
    assert out.args[0].K[0, 0, 0] == out.args[0].K[0, 1, 1] == pytest.approx(75)
    stretched = load(nodes, "t.json", without_distortion=True, fit="stretch")
    assert stretched.args[0].K[0].diagonal()[:2].tolist() == pytest.approx([75, 500 * 64 / 480])


def test_what_was_saved_loads_at_the_defaults_as_it_was(nodes, inputs, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(inputs))
    default = next(i for i in nodes.LoadTrajectory.define_schema().inputs if i.id == "pose_scale").default
    w2c = torch.eye(4).repeat(5, 1, 1)
    w2c[:, 2, 3] = -torch.arange(5.0)
    cameras = Cameras(w2c, pinhole((64, 96), 80.0, 5).K, (64, 96))
    for kind in nodes.SaveTrajectory.FORMATS:
        saved = nodes.SaveTrajectory.execute(cameras, "walk", kind).ui["files"][0]["filename"]
        found = load(nodes, saved, 5, pose_scale=default)
        torch.testing.assert_close(found.args[0].w2c, w2c, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.args[0].K, cameras.K, atol=1e-3, rtol=0)
        assert "scene units of a world" not in found.args[2]
        assert "scene units of a world; pose_scale 1.1" in load(nodes, saved, 5, pose_scale=1.1).args[2]


# the begin of a path, and what is said with each chunk


@pytest.fixture
def begun(pack):
    from lyra_core.memory.depth import plane

    camera = pinhole((32, 48), 40.0)
    return pack.world.worlds.begin(torch.rand(32, 48, 3), plane((32, 48), camera.K[0], 2.0).depth, camera)


def path(frames, begin=0.0, zoom=1.0):
    w2c = torch.eye(4).repeat(frames, 1, 1)
    w2c[:, 2, 3] = -begin - 0.01 * torch.arange(frames)
    return Cameras(w2c, pinhole((32, 48), 40.0 * zoom, frames).K, (32, 48))


@pytest.mark.parametrize("zoom", [1.0, 1.25])
@pytest.mark.parametrize("begin, says", [(0.0, "goes on where the world stands"), (0.4, "0.4 scene units away")])
def test_nodes_that_walk_show_where_the_path_begins(pack, begun, begin, says, zoom):
    says = "focal length 1.25 times" if zoom != 1 else says
    planned = pack.world.RetrieveHistory.execute(begun, path(9, begin, zoom), 5, 1, 8)
    walked = pack.world.PreviewChunks.execute(begun, path(9, begin, zoom), 5, 8, "")
    for out in (planned, walked):
        shown = out.ui if isinstance(out.ui, dict) else out.ui.as_dict()
        assert says in out.args[-1] and shown["text"] == (out.args[-1],)
    for node, outputs in ((pack.world.RetrieveHistory, 5), (pack.world.PreviewChunks, 2), (pack.generation.Explore, 2)):
        names = [o.display_name for o in node.define_schema().outputs]
        assert names[-1] == "report" and len(names) == outputs


def test_each_chunk_of_explore_says_where_it_begins_and_passes_it_on(pack, begun, monkeypatch):
    monkeypatch.setattr(pack.generation.worlds, "plan", lambda *_: None)
    links = {name: [name, 0] for name in ("model", "clip", "clip_vision", "vae", "depth_estimator")}
    quality = {"quality": "DMD", "dmd_lora": pack.generation.IN_THE_MODEL}
    settings = dict(prompt="{day|night} street", negative="", quality=quality, seed=1, retrieve=5, views=1, alignment="memory",
                    save_to="", index=0, made_with="")
    out = pack.generation.ExploreChunk.execute(begun, path(81, 0.4), **links, **settings, report="before")
    nodes = {node["class_type"]: node["inputs"] for node in out.expand.values()}
    said = nodes["Lyra2AppendChunk"]["before"]
    assert said.startswith("before\nchunk 0: ") and "0.4 scene units away" in said
    assert out.ui.as_dict()["text"] == (said,) and out.result[1][1] == 1      # the report of the appended chunk
    assert nodes["Lyra2AppendChunk"]["prompt"] == "{day|night} street"


@pytest.mark.parametrize("captions, expected", [
    ("", ["", ""]), ("{}", ["", ""]), ("{day|night} street", ["{day|night} street"] * 2),
    ('{"0": "a", "5": "b"}', ["a", "b"]), ('{"0": "a", "1": "b"}', ["a", "b"]), ("/etc/hostname", ["/etc/hostname"] * 2)])
def test_the_preview_keeps_captions_or_the_text_as_it_is(pack, begun, captions, expected):
    walked = pack.world.PreviewChunks.execute(begun, path(9), 0, 4, "", captions)
    assert [chunk.prompt for chunk in walked.args[0].chunks] == expected
