"""What a file may not do, one kind after the other: take memory, time or the process, lead elsewhere, or be what nothing can be."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lyra_core import array_files, files
from lyra_core.cameras import camera_files, captions, load3d, next_path
from lyra_core.cameras.camera import check, pinhole
from lyra_core.exports import bundle
from lyra_core.files import FileError
from lyra_core.memory import depth_files
from lyra_core.models import tensor_files
from lyra_core.splats import gaussians, splat_files
from lyra_core.world import world_files

SIZE = (16, 24)
DEEP = "[" * 100_000 + "]" * 100_000
HALF = '"\\ud800"'


def path_json(**changes) -> str:
    keys = [{"R": [0, 0, 0, 1], "T": [0, 0, i], "fov": 42} for i in range(3)]
    keys[1] |= changes
    return json.dumps({"path": keys})


def npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + content


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def peak(action) -> int:
    """Bytes that Python and NumPy had at once while something ran."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(says: str, read, *arguments, **named) -> str:
    with pytest.raises(FileError, match=says) as problem:
        read(*arguments, **named)
    return str(problem.value)


# ----------------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "text, says",
    [
        (DEEP, "10000[01] lists and objects lie inside each other, 64 may"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "lie inside each other"),
        ("9" * 5000, "a whole number of 5000 digits"),
        ("-1" + "0" * 400, "a whole number of 402 digits"),
        (HALF, "half of a character"),
        ('{"\\uDFFF": 1}', "half of a character"),
    ],
)
def test_json_that_takes_a_reader_apart_is_refused_by_every_reader_of_it(tmp_path, text, says):
    file = tmp_path / "file.json"
    wrapped = text if text.startswith("{") else f'{{"path": {text}, "frames": {text}, "0": {text}}}'
    file.write_text(wrapped)
    readers = {
        "camera file": lambda: camera_files.load_cameras(file, frames=3, size=SIZE),
        "camera path": lambda: camera_files.load_camera_path(wrapped),
        "captions": lambda: captions.load_captions(file),
        "plan": lambda: next_path.read(wrapped, str(file)),
        "any": lambda: files.read_json(file),
    }
    for name, read in readers.items():
        told = refused(says, read)
        assert name == "camera path" or file.name in told
    os.mkdir(tmp_path / "b")
    os.replace(file, tmp_path / "b" / "bundle.json")
    (tmp_path / "b" / "x.ply").touch()
    assert "bundle.json" in refused(says, bundle._check_replaceable, tmp_path / "b")
    os.mkdir(tmp_path / "w")
    (tmp_path / "w" / "world.json").write_text(wrapped)
    assert "world.json" in refused(says, world_files.load, tmp_path / "w")


def test_brackets_in_texts_are_no_depth():
    value = {"a": "[" * 200, 'b"\\': "\\", "c": ['\\"[[[', {"d": "]" * 99}]}
    assert files.parse_json(json.dumps(value), "x") == value
    refused("70 lists", files.parse_json, '{"a": "]]]]]]]]", "b": ' + "[" * 69 + "]" * 69 + "}", "x")


def test_whole_characters_and_large_seeds_are_read():
    assert files.parse_json('["\\ud83d\\ude00", 18446744073709551615, -9223372036854775808]', "x") == [
        "😀",
        2**64 - 1,
        -(2**63),
    ]


def test_a_text_that_is_too_long_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_TEXT", 1000)
    (tmp_path / "long.json").write_text("[" + "1," * 600 + "1]")
    refused(r"long\.json: is larger than", files.read_json, tmp_path / "long.json")


def test_the_longest_text_takes_no_more_than_two_gigabytes(tmp_path):
    # a hundredth of the longest, of lists of nothing, which take most
    text = "[" + "[]," * (files.LARGEST_TEXT // 300) + "[]]"
    assert peak(lambda: files.parse_json(text, "x")) < 20 << 20


@pytest.mark.parametrize(
    "change, says",
    [
        ({"fov": 0.5}, "between 1 and 170 degrees"),
        ({"fov": 179}, "between 1 and 170 degrees"),
        ({"T": [0, 1e15, 0]}, r"beyond 1e\+09"),
        ({"T": [0, "1e400", 0]}, "expected finite numbers"),
        ({"R": [0, 0, 0, 0]}, "zero quaternion"),
        ({"R": {"a": 1}}, "expected numbers"),
        ({"T": 10**19}, "expected finite numbers"),
        ({"timestamp": [[]]}, "expected"),
    ],
)
def test_keys_of_a_path_that_no_camera_can_have_are_refused(tmp_path, change, says):
    (tmp_path / "path.json").write_text(path_json(**change))
    assert "path.json" in refused(says, camera_files.load_cameras, tmp_path / "path.json", frames=4, size=SIZE)
    assert "the plan" in refused(says, next_path.read, path_json(**change), "the plan")


@pytest.mark.parametrize("size", [(16385, 24), (10**12, 10**12), (0, 24), ("x", 3), (2.5, 3)])
def test_pictures_of_impossible_sizes_are_refused_whoever_says_so(tmp_path, size):
    record = {"w": size[1], "h": size[0], "fl_x": 20, "frames": [{"transform_matrix": np.eye(4).tolist()}]}
    (tmp_path / "transforms.json").write_text(json.dumps(record))
    assert "transforms.json" in refused("picture", camera_files.load_cameras, tmp_path / "transforms.json")
    viewer = {
        "render_width": size[1],
        "render_height": size[0],
        "camera_path": [{"camera_to_world": np.eye(4).tolist(), "fov": 50}],
    }
    (tmp_path / "viewer.json").write_text(json.dumps(viewer))
    assert "viewer.json" in refused("picture", camera_files.load_cameras, tmp_path / "viewer.json")
    (tmp_path / "cameras.txt").write_text(f"1 PINHOLE {size[1]} {size[0]} 20 20 12 8\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 1 a.png\n\n")
    refused("picture", camera_files.load_colmap, tmp_path)
    if isinstance(size[0], int):
        with pytest.raises(ValueError, match="a picture 24 wide|a picture 1000000000000 wide"):
            check(replace(pinhole(SIZE, 20.0), size=size))


def test_cameras_beyond_the_end_of_the_world_are_refused_whoever_says_so(tmp_path):
    matrix = np.eye(4)
    matrix[0, 3] = 2e9
    record = {"w": 24, "h": 16, "fl_x": 20, "frames": [{"transform_matrix": matrix.tolist()}]}
    (tmp_path / "transforms.json").write_text(json.dumps(record))
    refused(r"transforms\.json: frame 0 stands at .*beyond", camera_files.load_cameras, tmp_path / "transforms.json")
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 24 16 20 20 12 8\n")
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 -3e9 0 1 a.png\n\n")
    refused("beyond", camera_files.load_colmap, tmp_path)
    w2c = np.tile(np.eye(4), (2, 1, 1))
    w2c[1, 2, 3] = 1e12
    np.savez(tmp_path / "t.npz", w2c=w2c, intrinsics=pinhole(SIZE, 20.0).K.numpy(), image_height=16, image_width=24)
    refused(r"t\.npz: frame 1 stands at", camera_files.load_npz, tmp_path / "t.npz")
    with pytest.raises(ValueError, match="camera 0: position.*beyond"):
        load3d.from_load3d({"position": {"x": 1e10}, "quaternion": {"w": 1}}, SIZE)


def test_rotations_of_numbers_that_overflow_are_no_rotations(tmp_path):
    matrix = np.eye(4)
    matrix[:3, :3] = [[1e200, 1e200, 0], [1e200, -1e200, 0], [0, 0, 1]]
    np.savez(
        tmp_path / "t.npz", w2c=matrix[None], intrinsics=pinhole(SIZE, 20.0).K.numpy(), image_height=16, image_width=24
    )
    refused("not orthonormal", camera_files.load_npz, tmp_path / "t.npz")


def test_what_comes_through_a_link_is_looked_at_like_a_file():
    for wrong in ({"quaternion": 3, "position": {}}, {"quaternion": [1, 2]}):
        with pytest.raises(ValueError, match="camera 0: quaternion"):
            load3d.from_load3d(wrong, SIZE)
    nested = [{}]
    for _ in range(10_000):
        nested = [nested]
    with pytest.raises(ValueError, match="in many lists"):
        load3d.from_load3d(nested, SIZE)


def test_captions_of_impossible_frames_are_refused_and_a_prompt_with_such_keys_stays_one(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"0": "a", "1" * 5000: "b"}))
    refused(r"c\.json: caption key", captions.load_captions, tmp_path / "c.json")
    assert captions.captions_in('{"%s": "b"}' % ("1" * 5000)) is None
    assert captions.captions_in(DEEP) is None


# ----------------------------------------------------------------------------------------------------------------------- texts


def test_names_with_numbers_of_any_length_are_sorted():
    names = ["a" + "9" * 5000, "a2", "a010", "a1" + "0" * 5000]
    assert sorted(names, key=files.natural) == ["a2", "a010", "a" + "9" * 5000, "a1" + "0" * 5000]


def test_colmap_texts_of_any_length_are_read_line_by_line(tmp_path):
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 24 16 20 20 12 8\n")
    points = "1.5 2.5 -1 " * 2_000
    (tmp_path / "images.txt").write_text("".join(f"{i} 1 0 0 0 0 0 0 1 {i}.png\n{points}\n" for i in range(40)))
    assert peak(lambda: camera_files.load_colmap(tmp_path)) < (tmp_path / "images.txt").stat().st_size
    assert len(camera_files.load_colmap(tmp_path)) == 40


@pytest.mark.parametrize(
    "raw, says",
    [
        (b"1 1 0 0 0 0 0 0 1 a\xff.png\n\n", "line 2 has the byte 0xff"),
        ("1 1 0 0 0 0 0 0 1 a.png\n".encode("utf-16"), "not UTF-8"),
        (b"1 1 0 0 0 0 0 0 1 a.png\0\n", "UTF-16 or binary"),
        (b"1 1 0 0 0 0 1e999 0 1 a.png\n\n", "expected finite numbers"),
        (
            b"# Number of images: " + b"9" * 5000 + b"\n1 1 0 0 0 0 0 0 1 a.png\n\n",
            "its header says 9{20} images, found 1",
        ),
    ],
)
def test_a_damaged_colmap_text_is_refused_with_its_line(tmp_path, raw, says):
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 24 16 20 20 12 8\n")
    (tmp_path / "images.txt").write_bytes((b"# of this model\n" if b"\xff." in raw else b"") + raw)
    assert "images.txt" in refused(says, camera_files.load_cameras, tmp_path)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 24 16 20 20 12 8\n")
    (tmp_path / "images.txt").write_text("# a\n" + "1" * 2000)
    refused("line 2 is longer than", camera_files.load_colmap, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------- arrays


def header(descr: str = "'<f8'", shape: str = "(1, 4, 4)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    "content, says",
    [
        (npy(header(shape="(536870912,)"), bytes(128)), "4294967296 bytes, found 128"),
        (npy(header(shape="(1152921504606846976, 16)"), bytes(128)), "bytes, found 128"),
        (npy(header(shape="(-1, 4)"), bytes(128)), "its shape is"),
        (npy(header(shape="(True,)"), bytes(8)), "its shape is|shape"),
        (npy(header(shape="(" * 9000), bytes(8)), "can't be read|no plain"),
        (npy(header(descr="'|O'"), bytes(128)), "pickled Python objects are refused"),
        (npy(header(descr="[('a', '<f8')]"), bytes(128)), "not plain numbers"),
        (npy(header(descr="('<f8', (9999999,))"), bytes(128)), "not plain numbers"),
        (npy(header(descr="'<U0'", shape="(4,)")), "not plain numbers"),
        (npy(header(), bytes(128), version=2)[:8] + b"\xff\xff\xff\xff", "its header would have 4294967295 bytes"),
        (npy(header(), bytes(127)), "128 bytes, found 127"),
        (b"hello", "does not begin as one"),
    ],
)
def test_arrays_that_promise_other_than_they_hold_are_refused(tmp_path, content, says):
    """Cameras and depth, whether alone or in an archive, through the one door."""
    good = npy(header("'<f8'", "(3, 3)"), bytes(72))
    for read in (camera_files.load_npz, depth_files.read, array_files.read_npz):
        told = refused(says, read, npz(tmp_path / "x.npz", w2c=content, intrinsics=good))
        assert "x.npz" in told and "'w2c'" in told
    (tmp_path / "x.npy").write_bytes(content)
    assert "x.npy" in refused(says, depth_files.read, tmp_path / "x.npy")


def test_a_promise_takes_no_memory(tmp_path):
    lying = npz(tmp_path / "x.npz", w2c=npy(header(shape="(268435456,)"), bytes(64)))

    def read() -> None:
        with pytest.raises(FileError):
            array_files.read_npz(lying)

    assert peak(read) < 1 << 20


def test_an_archive_that_was_made_to_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNASKED", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w2c.npy", npy(header(shape="(524288,)"), bytes(4 << 20)))
    refused(r"bomb\.npz: its arrays would take", camera_files.load_npz, tmp_path / "bomb.npz")


@pytest.mark.parametrize(
    "offset, value, says",
    [
        (24, b"\xff\xff\xff\xff", "would have 4,294,967,295 bytes, made of"),
        (20, b"\xff\xff\xff\x7f", "lies outside"),
        (42, b"\xff\xff\xff\x7f", "lies outside|cut off"),
        (10, b"\x63\x00", "packed or encrypted"),
        (8, b"\x01\x00", "packed or encrypted"),
        (8, b"\x20\x00", "packed or encrypted"),
        (16, b"\0\0\0\0", "Bad CRC"),
        (6, b"\xff\x00", "."),
    ],
)
def test_an_archive_whose_list_lies_is_refused(tmp_path, offset, value, says):
    content = bytearray(npz(tmp_path / "x.npz", w2c=npy(header(), bytes(128))).read_bytes())
    start = content.index(b"PK\x01\x02") + offset
    content[start : start + len(value)] = value
    (tmp_path / "x.npz").write_bytes(content)
    assert "x.npz" in refused(says, camera_files.load_npz, tmp_path / "x.npz")
    assert "x.npz" in refused(says, depth_files.read, tmp_path / "x.npz")


def test_arrays_of_every_plain_kind_are_what_numpy_reads(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=">f8").reshape(2, 3),
        "b": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "c": np.float32(3),
        "d": np.array("scene units"),
        "e": np.zeros((0, 4), np.int16),
        "f": np.array([True, False]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = array_files.read_npz(tmp_path / "x.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array), name
    np.save(tmp_path / "x.npy", arrays["b"])
    assert np.array_equal(array_files.read_npy(tmp_path / "x.npy"), arrays["b"])


# -------------------------------------------------------------------------------------------------------------------- pictures


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", width, height, 16, 0, 0, 0, 0, 0)


def tiff(*pages: tuple[int, int], order: str = "<", back: bool = False) -> bytes:
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    for number, (width, height) in enumerate(pages, 1):
        content += struct.pack(order + "HHHIIHHII", 2, 256, 4, 1, width, 257, 4, 1, height)
        content += struct.pack(order + "I", len(content) + 4 if number < len(pages) else 8 if back else 0)
    return content


@pytest.mark.parametrize(
    "content, name, says",
    [
        (png(100_000, 100_000), "d.png", "100000 x 100000; both sides are 1 to 16384"),
        (png(16384, 16384), "d.png", "would take 2,147,483,648 bytes"),
        (tiff((70_000, 2)), "d.tif", "70000 x 2"),
        (tiff((70_000, 2), order=">"), "d.tif", "70000 x 2"),
        (tiff(*[(4096, 4096)] * 20), "d.tif", "would take"),
        (tiff((8, 8), back=True), "d.tif", "no picture that OpenCV can read"),
        (tiff((8, 8))[:14], "d.tif", "no picture that OpenCV can read"),
    ],
)
def test_pictures_that_are_larger_than_their_files_can_be_are_refused_before_they_are_decoded(
    tmp_path, content, name, says
):
    (tmp_path / name).write_bytes(content)
    assert name in refused(says, depth_files.read, tmp_path / name)


def test_an_exr_that_promises_more_than_memory_is_refused_before_it_is_decoded(tmp_path):
    OpenEXR = pytest.importorskip("OpenEXR")
    OpenEXR.File({"type": OpenEXR.scanlineimage}, {"Z": np.ones((16, 24), np.float32)}).write(str(tmp_path / "d.exr"))
    content = bytearray((tmp_path / "d.exr").read_bytes())
    for name in (b"dataWindow\0box2i\0", b"displayWindow\0box2i\0"):
        start = content.index(name) + len(name) + 4
        content[start : start + 16] = struct.pack("<4i", 0, 0, 16383, 16383)
    large = tmp_path / "large.exr"
    large.write_bytes(content)
    assert len(depth_files.read(tmp_path / "d.exr").values) == 1
    refused(r"large\.exr: (its pixels would take|OpenEXR)", depth_files.read, large)
    content = content.replace(struct.pack("<4i", 0, 0, 16383, 16383), struct.pack("<4i", 0, 0, 99_999, 3))
    large.write_bytes(content)
    refused(r"large\.exr: .*100000 x 4", depth_files.read, large)


# ----------------------------------------------------------------------------------------------------------------------- splats


def splat(**changes) -> np.ndarray:
    row = np.zeros(2, splat_files.SPLAT)
    row["scale"], row["quat"] = 0.1, (255, 128, 128, 128)
    for field, value in changes.items():
        row[field][1] = value
    return row


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": (0.1, -0.1, 0.1)},
        {"mean": (0, 2e9, 0)},
        {"mean": (0, np.nan, 0)},
        {"scale": (0, 1e10, 0)},
        {"quat": 128},
    ],
)
def test_gaussians_that_nothing_can_be_are_refused(tmp_path, changes):
    splat(**changes).tofile(tmp_path / "s.splat")
    refused(r"s\.splat: 1 of 2 gaussians", splat_files.load_splat, tmp_path / "s.splat")


def test_rotations_of_any_length_come_out_with_a_length_of_one(tmp_path):
    some = gaussians.Gaussians(
        torch.zeros(4, 3),
        torch.eye(4) * torch.tensor([1e-11, 1e-3, 1e3, 1e8])[:, None],
        torch.ones(4, 3),
        torch.ones(4) / 2,
        torch.zeros(4, 1, 3),
    )
    splat_files.save_ply(some, tmp_path / "s.ply")
    assert torch.allclose(splat_files.load_ply(tmp_path / "s.ply").quats.norm(dim=1), torch.ones(4))


def test_gaussians_at_the_edge_of_what_is_possible_are_merged():
    random = torch.Generator().manual_seed(1)
    for scale in (0.0, 1e-30, 1.0, 1e8):
        means = torch.rand(40, 3, generator=random) * 8e8 - 4e8
        scales = torch.tensor([scale, 1e8, 0.0]).expand(40, 3).clone()
        some = gaussians.Gaussians(
            means,
            torch.rand(40, 4, generator=random) + 1e-3,
            scales,
            torch.rand(40, generator=random),
            torch.zeros(40, 1, 3),
        )
        found = gaussians.voxel_reduce(some, 4e8)
        assert len(found) < 40 and gaussians.drawable(found).all()


def test_gaussians_that_overflow_are_left_out_of_merging_and_do_not_end_it():
    random = torch.Generator().manual_seed(0)
    some = gaussians.Gaussians(
        torch.rand(20, 3, generator=random),
        torch.rand(20, 4, generator=random) + 0.1,
        torch.rand(20, 3, generator=random) * 0.1,
        torch.rand(20, generator=random),
        torch.zeros(20, 1, 3),
    )
    some.scales[3] = 1e30  # its covariance is infinite, and has no axes
    assert gaussians.drawable(gaussians.voxel_reduce(some, 2.0)).all()


@pytest.mark.parametrize(
    "line",
    [
        "element vertex " + "9" * 5000,
        "element vertex 99999999999999999999",
        "element vertex 4611686018427387904",
        "property float \u0663",
    ],
)
def test_a_ply_header_that_promises_too_much_is_refused(tmp_path, line):
    some = gaussians.Gaussians(
        torch.zeros(1, 3), torch.ones(1, 4), torch.ones(1, 3), torch.ones(1), torch.zeros(1, 1, 3)
    )
    splat_files.save_ply(some, tmp_path / "s.ply")
    content = (tmp_path / "s.ply").read_bytes().replace(b"element vertex 1", line.encode(), 1)
    (tmp_path / "s.ply").write_bytes(content)
    refused(r"s\.ply", splat_files.load_ply, tmp_path / "s.ply")


@pytest.mark.skipif(os.name == "nt", reason="an open file can't be cut off there")
def test_a_file_that_is_cut_off_while_it_is_read_is_an_error_and_no_dead_process(tmp_path, monkeypatch):
    np.repeat(splat(), 3000).tofile(tmp_path / "s.splat")
    real = np.fromfile

    def cut(handle, *rest):
        os.truncate(tmp_path / "s.splat", 32)
        return real(handle, *rest)

    monkeypatch.setattr(np, "fromfile", cut)
    refused("was cut off while it was read", splat_files.load_splat, tmp_path / "s.splat")


# -------------------------------------------------------------------------------------------------------------------- tensors


def safetensors(path: Path, head: object, content: bytes = b"") -> Path:
    raw = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content)
    return path


@pytest.mark.parametrize(
    "head, says",
    [
        ([], "no readable header"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "'a' is"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "'a' is"),
        ({"a": {"dtype": "F32", "shape": [[1]], "data_offsets": [0, 4]}}, "'a' is"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "'a' is"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "'a' is"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "'a' has 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "'a' has -4 bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "'a' is"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "instead of"),
        ({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, "'a' is"),
        ({"a": {"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]}}, "'a' is"),
        ({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, "lies over another tensor"),
        ({"__metadata__": {"a": [1]}}, "its metadata"),
        ({"__metadata__": 3}, "its metadata"),
        (b'{"a":' * 5000, "lie inside each other"),
        (b"[" * 5000 + b"]" * 5000, "lie inside each other"),
        (b"\xff\xfe", "no readable header"),
    ],
)
def test_a_header_of_tensors_that_can_t_be_is_refused_with_its_file(tmp_path, head, says):
    file = safetensors(tmp_path / "w.safetensors", head, bytes(4))
    assert "w.safetensors" in refused(says, tensor_files.read_entries, file)
    assert "w.safetensors" in refused(says, tensor_files.read_metadata, file)


@pytest.mark.parametrize("length", [2**63, 2**33, 5000])
def test_a_header_that_is_longer_than_its_file_is_not_made_room_for(tmp_path, length):
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    refused(
        r"w\.safetensors has 10 bytes and no readable header", tensor_files.read_entries, tmp_path / "w.safetensors"
    )


def torch_archive(path: Path, **records: bytes) -> Path:
    """What torch.save wrote, with some of its records replaced."""
    content = io.BytesIO()
    torch.save({"a": torch.ones(3)}, content)
    with zipfile.ZipFile(content) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            short = name.rpartition("/")[2].partition(".")[0]
            target.writestr(name, records.get(short, source.read(name)))
    return path


def test_an_archive_of_another_byte_order_is_refused_and_does_not_end_the_process(tmp_path):
    file = torch_archive(tmp_path / "w.pth", byteorder=b"big" if sys.byteorder == "little" else b"little")
    assert "w.pth" in refused("another byte order", tensor_files.read_entries, file)


@pytest.mark.parametrize(
    "call",
    [b"cbuiltins\nbytearray\n", b"ctorch\nFloatTensor\n", b"ctorch\nTensor\n", b"ctorch.storage\nUntypedStorage\n"],
)
def test_an_archive_that_asks_for_memory_is_refused_before_it_is_read(tmp_path, call):
    wish = b"\x80\x02}X\x01\x00\x00\x00a" + call + b"\x8a\x05\x00\x00\x00\x00\x02\x85Rs."  # call(2**33)
    assert "w.pth" in refused("of any size", tensor_files.read_entries, torch_archive(tmp_path / "w.pth", data=wish))


def test_names_of_tensors_are_texts(tmp_path):
    torch.save({(("a",) * 3,): torch.ones(1)}, tmp_path / "w.pth")
    refused("by the name of a tuple", tensor_files.read_entries, tmp_path / "w.pth")


# ---- folders of torch's distributed format


@pytest.fixture
def distributed(tmp_path) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save({"a": torch.arange(6.0)}, checkpoint_id=tmp_path / "d", no_dist=True)
    return tmp_path / "d"


def read_all(source: Path) -> dict:
    return {entry.name: entry.read(entry.dtype) for entry in tensor_files.read_entries(source)}


def changed(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # which this test has just made
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, 4))


def test_a_memo_of_two_billion_places_takes_none(distributed):
    (distributed / ".metadata").write_bytes(b"\x80\x04}r\xff\xff\xff\x7f.")
    limit = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), limit[1]))
    try:
        refused(r"\.metadata: is not read", tensor_files.read_entries, distributed)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 36) + b".",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        b"\x80\x04N.",
        b"\x80\x04]" + b"]a" * 50 + b".",
        b"",
        b"\x80\x04I" + b"9" * 5000 + b"\n.",
        b"\x80\x04cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x04\x00\x00\x00evilK\x01st" + b"b.",
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n.",
        b"\xff" * 40,
    ],
)
def test_a_list_of_pieces_that_is_none_is_refused_and_changes_nothing(distributed, content):
    from torch.distributed.checkpoint.metadata import Metadata

    (distributed / ".metadata").write_bytes(content)
    refused(r"\.metadata: is not read", tensor_files.read_entries, distributed)
    assert not hasattr(Metadata, "evil")


def test_a_piece_that_lies_elsewhere_is_not_read(distributed, tmp_path):
    piece = next(distributed.glob("*.distcp"))
    assert torch.equal(read_all(distributed)["a"], torch.arange(6.0))
    os.replace(piece, tmp_path / "elsewhere")
    piece.symlink_to(tmp_path / "elsewhere")
    refused("lies outside of the checkpoint, or is a link", tensor_files.read_entries, distributed)
    piece.unlink()

    def elsewhere(metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../elsewhere"

    changed(distributed, elsewhere)
    refused("lies outside of the checkpoint", tensor_files.read_entries, distributed)


def test_the_links_of_the_hub_s_cache_are_read(distributed, tmp_path):
    hub = tmp_path / "models--x--y"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    os.replace(distributed, hub / "snapshots" / "0123")
    for file in (hub / "snapshots" / "0123").iterdir():
        os.replace(file, hub / "blobs" / file.name.strip("."))
        file.symlink_to(f"../../blobs/{file.name.strip('.')}")
    assert torch.equal(read_all(hub / "snapshots" / "0123")["a"], torch.arange(6.0))


def test_a_tensor_that_is_larger_than_its_pieces_is_refused(distributed):
    def swell(metadata) -> None:
        stored, huge = metadata.state_dict_metadata["a"], torch.Size([1 << 40])
        metadata.state_dict_metadata["a"] = replace(stored, size=huge, chunks=[replace(stored.chunks[0], sizes=huge)])

    changed(distributed, swell)
    refused("more than its files hold", tensor_files.read_entries, distributed)


def test_a_piece_of_another_byte_order_is_refused(distributed):
    piece = next(distributed.glob("*.distcp"))
    content = piece.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sum_of_order = next(member.CRC for member in archive.infolist() if member.filename.endswith("byteorder"))
    assert content.count(b"little") == 1
    swapped = content.replace(b"little", b"elttil").replace(
        struct.pack("<I", sum_of_order), struct.pack("<I", crc32(b"elttil"))
    )
    piece.write_bytes(swapped)
    refused("another byte order", read_all, distributed)


# ------------------------------------------------------------------------------------------------------------------------ parts


@pytest.fixture(scope="module")
def checkpoints(comfy_host):
    from lyra_core.models import checkpoints

    return checkpoints


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("link", ["symbolic", "dangling", "hard", "folder"])
def test_a_conversion_does_not_go_on_through_a_link(checkpoints, tmp_path, link):
    q = "diffusion_model.blocks.1.self_attn.q"
    save_file(
        {f"{q}.lora_A.weight": torch.ones(3, 5120), f"{q}.lora_B.weight": torch.ones(5120, 3)},
        tmp_path / "lora.safetensors",
    )
    victim, part = tmp_path / "victim", tmp_path / "out.safetensors.part"
    if link != "dangling":
        victim.write_bytes(b"precious")
    if link == "folder":
        part.mkdir()
    elif link == "hard":
        os.link(victim, part)
    else:
        part.symlink_to(victim)
    refused(
        r"out\.safetensors\.part: is (a link|no file)",
        checkpoints.convert,
        tmp_path / "lora.safetensors",
        tmp_path / "out.safetensors",
    )
    assert victim.read_bytes() == b"precious" if link != "dangling" else not victim.exists()
    assert not (tmp_path / "out.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------- lyra2_config


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "[]",
        "null",
        '{"framepack": 3}',
        '{"framepack": ["f1k1_g20"]}',
        '{"num_heads": "2"}',
        '{"num_heads": 0}',
        '{"num_heads": 2.0}',
        '{"num_heads": true}',
        '{"num_heads": 5}',
        '{"num_heads": -2}',
        '{"framepack": "f9999k1_g20"}',
        '{"framepack": "' + "f1k1" * 5000 + '_g20"}',
        '{"num_heads": 1' + "0" * 5000 + "}",
        DEEP,
        "{",
        "\x00",
        HALF,
    ],
)
def test_a_configuration_that_can_t_be_is_refused_when_converted_and_when_loaded(checkpoints, tmp_path, text):
    host = checkpoints.lyra2_host
    tiny = {
        "rank": 4,
        "model_type": "i2v",
        "in_dim": 36,
        "out_dim": 16,
        "dim": 24,
        "ffn_dim": 32,
        "freq_dim": 8,
        "text_dim": 8,
        "num_heads": 2,
        "num_layers": 1,
    }
    shapes = host.weight_shapes({**tiny, "framepack": str(host.LYRA2)})
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(
        {**weights, host.CONFIG_KEY: torch.tensor(list(text.encode()), dtype=torch.uint8)}, tmp_path / "w.safetensors"
    )
    assert "w.safetensors" in refused(".", checkpoints.convert, tmp_path / "w.safetensors", tmp_path / "t.safetensors")
    import comfy.sd

    with pytest.raises(ValueError, match="lyra2_config|FramePack|layout"):
        comfy.sd.load_diffusion_model(str(tmp_path / "w.safetensors"))


def test_a_block_of_any_number_makes_no_network_of_as_many(checkpoints, tmp_path):
    host = checkpoints.lyra2_host
    for number in ("999999999", "x", "-1"):
        shapes = {
            "head.modulation": (1, 2, 256),
            "patch_embedding.weight": (256, 144),
            f"blocks.{number}.ffn.0.weight": (1, 1),
        }
        for i, segment in enumerate(host.LYRA2.segments):
            shapes[f"clean_patch_embeddings.{i}.weight"] = (
                256,
                36 * segment.patch[0] * segment.patch[1] * segment.patch[2],
            )
        with pytest.raises(ValueError, match=f"blocks.{number} is no block"):
            host.complete_config(shapes)


# ------------------------------------------------------------------------------------------------------------------------ LoRAs


@pytest.mark.parametrize(
    "change, says",
    [
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"rank_pattern": "ffn"}, "rank_pattern is"),
        ({"rank_pattern": {"ffn": "8"}}, "expected a positive number"),
        ({"alpha_pattern": {"ffn": 0}}, "expected a positive number"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "too involved"),
        ({"alpha_pattern": {".*.*.*.*x": 1}}, "too involved"),
        ({"alpha_pattern": {r"(.+)\1x": 1}}, "too involved"),
        ({"lora_alpha": {"a": 1}}, "must be numbers"),
        ({"r": [3]}, "must be numbers"),
        ({"r": -1}, "rank positive"),
    ],
)
def test_what_is_told_beside_a_lora_is_looked_at(checkpoints, tmp_path, change, says):
    q = "base_model.model.blocks.1.self_attn.q"
    save_file(
        {f"{q}.lora_A.weight": torch.ones(3, 24), f"{q}.lora_B.weight": torch.ones(24, 3)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 12, **change}))
    told = refused(says, checkpoints.convert, tmp_path / "adapter_model.safetensors", tmp_path / "t.safetensors")
    assert "adapter_config.json" in told


def test_factors_of_no_shape_are_refused_with_their_module(checkpoints, tmp_path):
    q = "base_model.model.blocks.1.self_attn.q"
    lokr = {f"{q}.lokr_w1": torch.ones(()), f"{q}.lokr_w2": torch.ones(12, 12)}
    loha = {f"{q}.hada_w{n}_{x}": torch.ones(24, 3) if x == "a" else torch.ones(3) for n in (1, 2) for x in "ab"}
    for tensors in (lokr, loha):
        save_file(tensors, tmp_path / "lora.safetensors")
        told = refused(
            "factors are matrices", checkpoints.convert, tmp_path / "lora.safetensors", tmp_path / "t.safetensors"
        )
        assert "lora.safetensors" in told and q in told


def test_weights_of_the_reconstructor_that_can_t_be_cut_are_refused(comfy_host, tmp_path):
    from lyra_core.models import da3_files

    for shape in ((), (4, 4)):
        weights = {"backbone.pretrained.blocks.0.attn.qkv.weight": torch.ones(shape), da3_files.MARKER: torch.ones(3)}
        save_file(weights, tmp_path / "da3.safetensors")
        refused(
            r"da3\.safetensors: .*qkv.* is not cut into 3|which is not cut into 3",
            da3_files.released_weights,
            tmp_path / "da3.safetensors",
        )


def test_patterns_as_people_write_them_are_taken(checkpoints):
    from lyra_core.models import lora_files

    for pattern in ("ffn.0", r"blocks\.\d+\.ffn\.0", "(q|k|v)", ".*self_attn.*q$", r"^blocks\.(1|2)\..*\.q"):
        assert lora_files._patterns({pattern: 4}, "x") == {pattern: 4}


# --------------------------------------------------------------------------------------------------------------- the launcher


def test_a_damaged_workflow_is_answered_in_one_line(tmp_path, launcher):
    prompts = launcher.prompts
    for graph in (
        {"nodes": [{"id": 1, "type": ["x"]}], "links": []},
        {"nodes": [{"id": 1, "type": "Note"}], "links": [], "definitions": {"subgraphs": ["x"]}},
        {"nodes": [{"id": 1, "type": "Note"}], "links": [], "definitions": "x"},
        {"nodes": [{"id": 1, "type": "Note", "inputs": True, "outputs": 3, "widgets_values": 7.5}], "links": [3]},
    ):
        (tmp_path / "w.json").write_text(json.dumps(graph))
        with pytest.raises(launcher.WorkflowError, match=r"w\.json") as told, prompts.about(tmp_path / "w.json"):
            prompts.to_api_format(prompts.read_workflow(tmp_path / "w.json"), {"Note": {"input": {}}})
            raise prompts.WorkflowError(
                f"{tmp_path / 'w.json'}: nothing to refuse"
            )  # what the converter leaves out is no error
        assert "\n" not in str(told.value)


def test_every_error_of_a_reader_is_of_one_kind():
    from lyra_core.exports.bundle import BundleError
    from lyra_core.splats.splat_files import SplatFileError

    assert all(
        issubclass(kind, FileError)
        for kind in (BundleError, SplatFileError, world_files.WorldFileError, world_files.DamagedFile)
    )
    assert issubclass(FileError, ValueError)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set on Linux only")
def test_a_header_that_promises_four_gigabytes_is_refused_where_there_is_only_half_of_one(project, tmp_path):
    """As a process of its own, with the limit that systems set."""
    npz(tmp_path / "x.npz", w2c=npy(header(shape="(536870912,)"), bytes(64)))
    code = (
        "import resource, sys; sys.path.append(sys.argv[1]); from lyra_core import array_files; import pathlib, os\n"
        "taken = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 29),) * 2)\n"
        "try:\n    array_files.read_npz(sys.argv[2])\nexcept array_files.FileError as problem:\n    print(problem)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(project), str(tmp_path / "x.npz")], capture_output=True, text=True
    )
    assert "x.npz" in done.stdout and not done.stderr
