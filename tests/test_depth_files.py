"""Depth files arrive in metres at every pixel, or not at all."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import cv2
import numpy as np
import OpenEXR
import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras.camera import pinhole
from lyra_core.memory import depth_files
from lyra_core.memory.depth_files import MEASURES, Recipe, depth_maps, own_lens, read, summary

CASE = Path(__file__).parent / "cases" / "depth-files-in-metres"
SIZE = (48, 64)
K = pinhole(SIZE, 60.0).K[0]
DEPTH = np.tile(np.linspace(0.5, 9, 64, dtype=np.float32), (48, 1))
DEPTH[:5] = 0  # sky


def loaded(path, recipe=None, channel="", size=SIZE):
    (found,) = depth_maps(read(path, channel), recipe or Recipe(), size, pinhole(size, 60.0).K[0])
    return found.depth


def assert_is_the_depth(found, atol=1e-3):
    assert torch.equal(found == 0, torch.from_numpy(DEPTH == 0))
    assert_close(found, torch.from_numpy(DEPTH), atol=atol, rtol=0)


def exr(path, channels, **header):
    OpenEXR.File({"type": OpenEXR.scanlineimage, **header}, channels).write(str(path))
    return path


@pytest.mark.parametrize("name", ["depth_y.exr", "depth_z.exr", "depth_rgb.exr", "depth.tif", "depth_mm.png"])
def test_each_file_of_the_case_is_half_a_metre_to_nine_with_its_sky_unknown(name):
    assert_is_the_depth(loaded(CASE / name))


@pytest.mark.parametrize(
    "names", [["V"], ["depth.V"], ["ViewLayer.Depth.Z"], ["Z", "R", "G", "B", "A"], ["Depth.R", "R", "G", "B"], ["distance"]]
)
@pytest.mark.parametrize("compression", ["ZIP", "PIZ", "RLE", "NO", "ZIPS"])
def test_an_exr_s_depth_is_found_by_its_name(tmp_path, names, compression):
    other = np.random.default_rng(0).random(SIZE, dtype=np.float32)
    channels = {name: DEPTH if i == 0 else other + i for i, name in enumerate(names)}
    path = exr(tmp_path / "d.EXR", channels, compression=getattr(OpenEXR, f"{compression}_COMPRESSION"))
    assert_is_the_depth(loaded(path))


def test_half_floats_whole_numbers_and_tiles_are_read(tmp_path):
    assert_is_the_depth(loaded(exr(tmp_path / "half.exr", {"Z": DEPTH.astype(np.float16)})), atol=5e-3)
    millimetres = (DEPTH * 1000).round().astype(np.uint32)
    assert_is_the_depth(loaded(exr(tmp_path / "uint.exr", {"Z": millimetres}), Recipe("millimetres")))
    tiles = OpenEXR.TileDescription()
    tiles.xSize = tiles.ySize = 16
    tiled = {"type": OpenEXR.tiledimage, "tiles": tiles}
    OpenEXR.File(tiled, {"Z": DEPTH}).write(str(tmp_path / "tiles.exr"))
    assert_is_the_depth(loaded(tmp_path / "tiles.exr"))


def test_the_part_of_an_exr_that_holds_the_depth_is_found(tmp_path):
    parts = [
        OpenEXR.Part({"type": OpenEXR.scanlineimage, "name": "beauty"}, {n: DEPTH + i for i, n in enumerate("RGB")}),
        OpenEXR.Part({"type": OpenEXR.scanlineimage, "name": "depth"}, {"V": DEPTH}),
    ]
    OpenEXR.File(parts).write(str(tmp_path / "parts.exr"))
    assert_is_the_depth(loaded(tmp_path / "parts.exr"))


@pytest.mark.parametrize(
    "names, says",
    [
        ("RGB", "has colours, no depth"),
        (["left.Z", "right.Z"], "not one channel that must be the depth; it has the channels left.Z, right.Z"),
        (["a", "b"], "it has the channels a, b: name one"),
    ],
)
def test_an_exr_without_a_certain_depth_is_refused_by_what_it_has(tmp_path, names, says):
    path = exr(tmp_path / "d.exr", {name: DEPTH + i for i, name in enumerate(names)})
    with pytest.raises(ValueError, match=f"d.exr: .*{says}"):
        read(path)
    assert_is_the_depth(loaded(path, channel=names[0]))
    with pytest.raises(ValueError, match="no channel called Q; it has the channels"):
        read(path, "Q")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["d.tif", "d.TIFF"])
def test_float_tiffs_are_metres(tmp_path, dtype, name):
    (tmp_path / name).write_bytes(cv2.imencode(".tif", DEPTH.astype(dtype))[1])
    assert_is_the_depth(loaded(tmp_path / name))


@pytest.mark.parametrize(
    "per_metre, recipe",
    [
        (1000, Recipe()),
        (1000, Recipe("millimetres")),
        (100, Recipe("centimetres")),
        (5000, Recipe("millimetres", 0.2)),  # TUM
        (256, Recipe("metres", 1 / 256)),  # KITTI
    ],
)
@pytest.mark.parametrize("ending", [".png", ".tif", ".npy"])
def test_whole_numbers_have_a_unit_or_a_scale(tmp_path, per_metre, recipe, ending):
    whole = (DEPTH * per_metre).round().astype(np.uint16)
    path = tmp_path / f"d{ending}"
    np.save(path, whole) if ending == ".npy" else path.write_bytes(cv2.imencode(ending, whole)[1])
    assert_is_the_depth(loaded(path, recipe), atol=0.5 / per_metre + 1e-4)


def test_arrays_are_found_by_name_or_because_there_is_no_other(tmp_path):
    np.savez(tmp_path / "a.npz", depth=DEPTH, image=np.zeros((*SIZE, 3)), K=np.eye(3))
    np.savez_compressed(tmp_path / "b.npz", anything=DEPTH, w2c=np.eye(4)[None])
    np.savez(tmp_path / "c.npz", DEPTH[None, ..., None])
    np.savez(tmp_path / "d.npz", left=DEPTH, right=DEPTH)
    for name in "abc":
        assert_is_the_depth(loaded(tmp_path / f"{name}.npz"))
    with pytest.raises(ValueError, match="it has the arrays left, right: name one"):
        read(tmp_path / "d.npz")
    assert_is_the_depth(loaded(tmp_path / "d.npz", channel="right"))


def test_whatever_marks_the_unknown_is_unknown(tmp_path):
    marked = DEPTH.copy()
    marked[:5] = np.array([0, np.inf, np.nan, 1e10, -1], np.float32)[:, None]
    np.save(tmp_path / "d.npy", marked)
    assert_is_the_depth(loaded(tmp_path / "d.npy"))
    whole = (DEPTH * 1000).round().astype(np.uint16)
    whole[:5] = 65535
    (tmp_path / "d.png").write_bytes(cv2.imencode(".png", whole)[1])
    assert_is_the_depth(loaded(tmp_path / "d.png"))
    near = loaded(tmp_path / "d.npy", Recipe(far=4.0))
    assert near.max() <= 4 and torch.equal(near > 0, torch.from_numpy((DEPTH > 0) & (DEPTH <= 4)))


def test_distances_along_the_ray_and_disparities_become_depth(tmp_path):
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    longer = np.sqrt(((u - 31.5) / 60) ** 2 + ((v - 23.5) / 60) ** 2 + 1)
    np.save(tmp_path / "rays.npy", DEPTH * longer)
    assert_is_the_depth(loaded(tmp_path / "rays.npy", Recipe(measure=MEASURES[1])))
    disparity = np.where(DEPTH > 0, 1 / np.maximum(DEPTH, 0.1), 0)
    np.save(tmp_path / "disparity.npy", disparity)
    assert_is_the_depth(loaded(tmp_path / "disparity.npy", Recipe(measure=MEASURES[2])))
    (tmp_path / "d.png").write_bytes(cv2.imencode(".png", (disparity * 20000).round().astype(np.uint16))[1])
    assert_is_the_depth(loaded(tmp_path / "d.png", Recipe(scale=1 / 20000, measure=MEASURES[2])), atol=5e-3)


def test_a_file_of_another_shape_is_the_whole_photo_squeezed_and_says_so(tmp_path):
    np.save(tmp_path / "d.npy", DEPTH)
    stored, size = read(tmp_path / "d.npy"), (96, 256)
    (found,) = depth_maps(stored, Recipe(), size, pinhole(size, 200.0).K[0])
    assert_close(found.K, pinhole(size, 200.0).K[0])
    assert_close(found.depth, torch.from_numpy(DEPTH).repeat_interleave(2, 0).repeat_interleave(4, 1))
    assert "64 x 48 was taken as the whole photo of 256 x 96, squeezed" in summary(found, stored)


def test_a_lens_beside_the_depth_is_used_in_pixels_and_in_units_of_the_picture(tmp_path):
    pixels = np.array([[60, 0, 30], [0, 62, 25], [0, 0, 1]], np.float64)
    normalised = (pixels + [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]) / [[64], [48], [1]]
    for name, lens in (("pixels", pixels), ("normalised", normalised)):
        np.savez(tmp_path / f"{name}.npz", depth=DEPTH, intrinsics=lens)
        found = own_lens(read(tmp_path / f"{name}.npz"), (96, 128))
        assert_close(found, torch.tensor([[120.0, 0, 60.5], [0, 124, 50.5], [0, 0, 1]]))
    with pytest.raises(ValueError, match="64 x 48 and come with a lens, the photo is 64 x 64"):
        own_lens(read(tmp_path / "pixels.npz"), (64, 64))
    np.savez(tmp_path / "bad.npz", depth=DEPTH, intrinsics=100 * pixels)
    with pytest.raises(ValueError, match="bad.npz.*principal point|bad.npz.*field of view"):
        own_lens(read(tmp_path / "bad.npz"), SIZE)


@pytest.mark.parametrize(
    "values, says",
    [
        ((DEPTH * 1000).astype(np.float32), "is the unit or the scale another"),
        (np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(SIZE), "nothing in it is beyond 1"),
        (np.linspace(1, 65000, 48 * 64).reshape(SIZE).astype(np.uint16), "fill 16 bits"),
    ],
)
def test_numbers_that_are_hardly_metres_get_a_word(tmp_path, values, says):
    np.save(tmp_path / "d.npy", values)
    stored = read(tmp_path / "d.npy")
    assert says in summary(depth_maps(stored, Recipe(), SIZE, K)[0], stored)
    np.save(tmp_path / "good.npy", DEPTH)
    good = read(tmp_path / "good.npy")
    report = summary(depth_maps(good, Recipe(), SIZE, K)[0], good)
    assert "doubtful" not in report and "0.5 to 9, median" in report and "10.4 % unknown" in report


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("ending", [".exr", ".tif", ".png", ".npy", ".npz"])
def test_a_file_that_lost_its_end_is_refused(tmp_path, ending, share):
    noise = (9 * np.random.default_rng(0).random((120, 160))).astype(np.float32)
    path = tmp_path / f"d{ending}"
    if ending == ".exr":
        exr(path, {"Z": noise})
    elif ending == ".npy":
        np.save(path, noise)
    elif ending == ".npz":
        np.savez(path, depth=noise)
    else:
        whole = (1000 * noise).astype(np.uint16) if ending == ".png" else noise
        path.write_bytes(cv2.imencode(ending, whole)[1])
    assert read(path).values.shape == (1, 120, 160)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"d\{ending}: .*(cut off|no plain NumPy)"):
        read(path)


def test_what_is_no_depth_file_is_refused_by_name_and_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    np.save(tmp_path / "object.npy", np.array([Bomb()], object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("cut.exr", "cut.tif", "cut.png", "cut.npy", "cut.npz"):
        source = CASE / {"exr": "depth_z.exr", "tif": "depth.tif", "png": "depth_mm.png"}.get(name[4:], "depth_mm.png")
        (tmp_path / name).write_bytes(source.read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "8bit.png").write_bytes(cv2.imencode(".png", (DEPTH * 20).astype(np.uint8))[1])
    (tmp_path / "colour.png").write_bytes(cv2.imencode(".png", np.dstack([DEPTH, DEPTH + 1, DEPTH]).astype(np.uint16))[1])
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    np.save(tmp_path / "line.npy", np.ones(7))
    (tmp_path / "d.jpg").write_bytes(b"x")
    names = ["object.npy", "pickle.npy", "8bit.png", "colour.png", "text.npy", "line.npy", "d.jpg", "missing.png", "empty.png"]
    for name in names + ["cut.exr", "cut.tif", "cut.png", "cut.npy", "cut.npz"]:
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_the_node_lists_depth_files_without_litter_and_follows_their_content(pack, comfy_host):
    nodes = importlib.import_module("lyra_pack.nodes.depth")
    folder = comfy_host / "input" / "depths"
    folder.mkdir()
    (folder / "cave_10.EXR").write_bytes((CASE / "depth_z.exr").read_bytes())
    (folder / "cave_2.png").write_bytes((CASE / "depth_mm.png").read_bytes())
    for litter in ("._cave_2.png", ".DS_Store", "notes.txt"):
        (folder / litter).write_bytes(b"litter")
    names = [name for name in nodes._depth_names() if name.startswith("depths/")]
    assert names == ["depths/cave_2.png", "depths/cave_10.EXR"]
    photo = torch.zeros(1, *SIZE, 3)
    prints = [nodes.LoadDepth.fingerprint_inputs(name) for name in names]
    for name in names:
        maps, picture, report = nodes.LoadDepth.execute(name, photo).args
        assert_is_the_depth(maps[0].depth)
        assert picture.shape == (1, *SIZE, 3) and "0.5 to 9" in report and "60 degrees assumed" in report
        assert_close(maps[0].K, pinhole(SIZE, 32 / np.tan(np.radians(30))).K[0], check_dtype=False)
    (folder / "cave_2.png").write_bytes((CASE / "depth_mm.png").read_bytes() + b"!")
    assert nodes.LoadDepth.fingerprint_inputs(names[0]) not in prints
    with pytest.raises(ValueError, match="holds the depth of 1 pictures, there are 2 photos"):
        nodes.LoadDepth.execute(names[0], photo.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="another shape"):
        nodes.LoadDepth.execute(names[0], photo, cameras=pinhole((64, 48), 60.0))


def test_importing_the_pack_reads_no_depth_library():
    source = Path(depth_files.__file__).read_text(encoding="utf-8")
    assert not any(line.startswith(("import cv2", "import OpenEXR")) for line in source.splitlines())
