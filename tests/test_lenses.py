"""Whether a lens and a picture belong together, for every source of cameras."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras import camera_files as cf
from lyra_core.cameras.camera import (
    Cameras,
    check_lens,
    join,
    pinhole,
    project,
    rescaled_as_reference,
    to_corner_origin,
)
from lyra_core.cameras.camera_path import CameraPath, PathKey, path_cameras, path_of

CASES = Path(__file__).parent / "cases"
SIZE = (480, 832)
GOOD = (748.8, 748.8, 415.5, 239.5)


def lens(fx, fy, cx, cy, frames=5):
    return np.tile(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), (frames, 1, 1))


def cameras_of(*numbers, size=SIZE):
    return Cameras(torch.eye(4)[None], torch.from_numpy(lens(*numbers, 1)).float(), size)


# one place decides

WRONG = {
    "normalised": ((0.9, 1.56, 0.5, 0.5), "0.9, 1.56 for a picture 832 wide.*179.8.*look normalised"),
    "normalised by the width alone": ((0.9, 0.9, 0.5, 0.29), "look normalised"),
    "in half widths, as OpenGL": ((1.8, 3.1, 0.0, 0.0), "field of view"),
    "an identity": ((1.0, 1.0, 0.0, 0.0), "field of view"),
    "wider than any lens": ((20.0, 20.0, 415.5, 239.5), "field of view"),
    "narrower than any lens": ((60000.0, 60000.0, 415.5, 239.5), "field of view"),
    "too narrow one way": ((5000.0, 60000.0, 415.5, 239.5), "field of view"),
    "normalised across only": ((748.8, 1.56, 415.5, 0.5), "field of view|times as high"),
    "long pixels": ((300.0, 900.0, 415.5, 239.5), "stretched"),
    "of 1920x1080": ((1728.0, 1728.0, 959.5, 539.5), "middle of a picture 1920 wide and 1080 high"),
    "of 1280x720": ((1152.0, 1152.0, 639.5, 359.5), "middle of a picture 1280 wide and 720 high"),
    "of 960x540": ((864.0, 864.0, 479.5, 269.5), "middle of a picture 960 wide"),
    "of 416x240": ((374.4, 374.4, 207.5, 119.5), "middle of a picture 416 wide"),
    "of 640x480": ((500.0, 500.0, 1279.5, 959.5), "far outside"),
    "of the latents": ((93.6, 93.6, 51.5, 29.5), "middle of a picture 104 wide"),
    "of a picture on its side": ((748.8, 748.8, 239.5, 415.5), "middle of a picture 480 wide and 832 high"),
    "without a principal point": ((748.8, 748.8, 0.0, 0.0), "principal point at 0, 0"),
    "far outside": ((748.8, 748.8, 3000.0, 239.5), "far outside"),
}
RIGHT = {
    "usual": GOOD,
    "with a lens shift": (400.0, 400.0, 515.5, 239.5),
    "of pixels 1.5 times as wide": (600.0, 400.0, 415.5, 239.5),
    "of an anamorphic lens": (800.0, 400.0, 415.5, 239.5),
    "with the middle as a fit gives it": (748.8, 751.0, 421.3, 233.0),
    "of a picture cut from the left of a larger one": (748.8, 748.8, 830.0, 239.5),
    "of a perspective that was straightened": (748.8, 748.8, 415.5, 470.0),
    "wide": (60.0, 60.0, 415.5, 239.5),
    "long": (20000.0, 20000.0, 415.5, 239.5),
}


def as_npz(folder, fx, fy, cx, cy):
    np.savez(folder / "t.npz", w2c=np.tile(np.eye(4), (5, 1, 1)), intrinsics=lens(fx, fy, cx, cy), image_height=480,
             image_width=832)
    return folder / "t.npz"


def as_transforms(folder, fx, fy, cx, cy):
    record = dict(w=832, h=480, fl_x=fx, fl_y=fy, cx=cx + 0.5, cy=cy + 0.5)
    frames = [dict(file_path=f"{i}.png", transform_matrix=np.eye(4).tolist()) for i in range(5)]
    (folder / "transforms.json").write_text(json.dumps(record | dict(frames=frames)))
    return folder / "transforms.json"


def as_colmap(folder, fx, fy, cx, cy):
    (folder / "cameras.txt").write_text(f"1 PINHOLE 832 480 {fx} {fy} {cx + 0.5} {cy + 0.5}\n")
    (folder / "images.txt").write_text("".join(f"{i} 1 0 0 0 0 0 0 1 {i}.png\n\n" for i in range(1, 6)))
    return folder


@pytest.mark.parametrize("source", [as_npz, as_transforms, as_colmap])
@pytest.mark.parametrize("name", WRONG)
def test_a_lens_that_can_not_be_of_its_picture_is_refused_from_every_file(name, source, tmp_path):
    numbers, says = WRONG[name]
    with pytest.raises(ValueError, match=f"(?s){tmp_path.name}.*frame 0 has.*({says})"):
        cf.load_cameras(source(tmp_path, *numbers))


@pytest.mark.parametrize("source", [as_npz, as_transforms, as_colmap])
@pytest.mark.parametrize("name", RIGHT)
def test_a_lens_that_can_be_of_its_picture_is_read_as_it_is_from_every_file(name, source, tmp_path):
    found = cf.load_cameras(source(tmp_path, *RIGHT[name]))
    assert_close(found.K, torch.from_numpy(lens(*RIGHT[name])).float(), atol=1e-3, rtol=1e-6)


def test_normalised_intrinsics_of_the_case_are_refused_by_name():
    with pytest.raises(ValueError, match=r"trajectory.npz.*0.9, 1.56 for a picture 832 wide.*look normalised: multiply row 0"):
        cf.load_cameras(CASES / "npz-normalised-intrinsics" / "trajectory.npz", size=SIZE)


@pytest.mark.parametrize("fov", [0.5, 174.0])
def test_a_camera_path_is_held_to_the_same_rule(fov):
    keys = tuple(PathKey(torch.eye(4)[:3], fov, float(i)) for i in range(3))
    with pytest.raises(ValueError, match="camera path: frame 0 has focal lengths.*field of view"):
        path_cameras(CameraPath(keys), SIZE, 5)


def test_small_pictures_may_have_any_principal_point_that_is_given():
    assert check_lens(pinhole((2, 3), 4.0)) and check_lens(pinhole((1, 1), 1.0))


# other sizes

def test_what_is_in_the_middle_of_a_picture_stays_in_the_middle_at_any_size():
    for size in ((240, 416), (960, 1664), (479, 831), (100, 300)):
        assert_close(pinhole(SIZE, 748.8).resized(size).K[0, :2, 2], torch.tensor([(size[1] - 1) / 2, (size[0] - 1) / 2]))
    corners = to_corner_origin(cameras_of(700.0, 710.0, 400.0, 200.0).resized((960, 416)).K)
    assert_close(corners[0], torch.tensor([[350.0, 0, 200.25], [0, 1420, 401], [0, 0, 1]]))


def test_a_point_falls_on_the_same_place_of_the_stretched_picture():
    point, camera = torch.tensor([[0.4, -0.3, 5.0]]), cameras_of(700.0, 710.0, 400.0, 200.0)
    (before, _), (after, _) = project(point, camera), project(point, camera.resized((960, 416)))
    assert_close((after + 0.5) / torch.tensor([416.0, 960]), (before + 0.5) / torch.tensor([832.0, 480]))


def test_the_reference_s_own_rescale_stands_beside_it():
    found = rescaled_as_reference(cameras_of(700.0, 710.0, 400.0, 200.0), (240, 1664))
    assert_close(found.K[0], torch.tensor([[1400.0, 0, 800], [0, 355, 100], [0, 0, 1]]))


@pytest.mark.parametrize("stored, asked", [((480, 640), (480, 832)), ((1920, 1080), (480, 832)), ((512, 512), (832, 480))])
def test_cameras_of_another_shape_are_cut_as_their_pictures_are(stored, asked):
    camera = pinhole(stored, 500.0)
    found = camera.cropped(asked)
    assert found.size == asked and found.K[0, 0, 0] == found.K[0, 1, 1] and check_lens(found)
    assert_close(found.K[0, :2, 2], torch.tensor([(asked[1] - 1) / 2, (asked[0] - 1) / 2]))
    edge = torch.tensor([[0.0, (stored[0] / 2) / 500.0, 1.0], [(stored[1] / 2) / 500.0, 0.0, 1.0]])
    pixels = project(edge, found)[0][0][(0, 1), (1, 0)] + 0.5     # y of the lower edge, x of the right one
    inside = pixels / torch.tensor([asked[0], asked[1]])
    assert inside.min() == pytest.approx(1, abs=1e-4) and inside.max() >= 1     # one side fits, the other is cut


# what the formats hold

def saved_as_path(name, tmp_path):
    cameras = cf.load_cameras(CASES / "camera-path-loses-lens-shift" / name)
    cf.save_camera_path(tmp_path / "p.json", path_of(cameras))
    return cameras, cf.load_cameras(tmp_path / "p.json", len(cameras), size=SIZE)


def test_a_lens_shift_and_wide_pixels_survive_a_camera_path(tmp_path):
    before, after = saved_as_path("shifted.npz", tmp_path)
    assert_close(after.K, before.K, atol=1e-3, rtol=0)
    assert project(torch.tensor([[0.0, 0, 5]]), after)[0][0, 0, 0] == pytest.approx(515.5, abs=1e-3)
    _, wide = saved_as_path("wide.npz", tmp_path)
    assert project(torch.tensor([[1.0, 0, 5]]), wide)[0][0, 0, 0] == pytest.approx(535.5, abs=1e-3)


@pytest.mark.parametrize("asked", [(240, 416), (960, 1664), (480, 480)])
def test_a_lens_shift_in_a_camera_path_goes_with_the_picture_s_height(asked, tmp_path):
    camera = cameras_of(400.0, 400.0, 515.5, 209.5)
    cf.save_camera_path(tmp_path / "p.json", path_of(join(camera, camera)))
    found = cf.load_cameras(tmp_path / "p.json", 2, size=asked)
    half = asked[0] / 480
    assert_close(found.K[0, :2, 2] + 0.5, torch.tensor([asked[1] / 2 + 100 * half, asked[0] / 2 - 30 * half]), atol=1e-3, rtol=0)
    assert found.K[0, 0, 0] == pytest.approx(400 * half)


def test_a_shift_that_changes_along_the_path_is_kept_at_its_keys(tmp_path):
    K = torch.from_numpy(lens(500.0, 500.0, 415.5, 239.5, 4)).float()
    K[:, 0, 2] += torch.tensor([0.0, 30, 60, 20])
    w2c = torch.eye(4).repeat(4, 1, 1)
    w2c[:, 0, 3] = torch.arange(4.0)
    cf.save_camera_path(tmp_path / "p.json", path_of(Cameras(w2c, K, SIZE)))
    for curve in cf.CURVES:
        found = cf.load_cameras(tmp_path / "p.json", 31, size=SIZE, curve=curve, motion="time" if curve == cf.CURVES[1] else "arc length")
        assert found.K[0, 0, 2] == pytest.approx(415.5, abs=0.1) and found.K[-1, 0, 2] == pytest.approx(435.5, abs=0.1)
        assert found.K[:, 0, 2].max() > 450


def test_files_of_ordinary_lenses_have_the_reference_s_keys_only(tmp_path):
    cf.save_camera_path(tmp_path / "p.json", path_of(pinhole(SIZE, 500.0, 3)))
    keys = json.loads((tmp_path / "p.json").read_text())["path"]
    assert all(key.keys() == {"R", "T", "fov", "timestamp", "up_dir"} for key in keys)


def test_a_camera_path_says_what_it_has_no_place_for():
    K = torch.from_numpy(lens(*GOOD, 3)).float()
    K[1, 0, 1] = 12.0
    with pytest.raises(ValueError, match="no place for a skew of 12; save an npz"):
        path_of(Cameras(torch.eye(4).repeat(3, 1, 1), K, SIZE))
    bad = {"path": [{"R": [0, 0, 0, 1], "T": [0, 0, 0], "fov": 50, "shift": 3}]}
    with pytest.raises(ValueError, match="keyframe 0: shift: expected finite numbers"):
        cf.load_camera_path(json.dumps(bad))


# lens models and terms

def transforms(folder, size=(48, 64), frame=(), **record):
    frames = [dict(file_path="a.png", transform_matrix=np.eye(4).tolist()) | dict(frame)]
    base = dict(w=size[1], h=size[0], fl_x=50.0, fl_y=50.0, cx=size[1] / 2, cy=size[0] / 2, frames=frames)
    (folder / "transforms.json").write_text(json.dumps(base | record))
    return folder / "transforms.json"


@pytest.mark.parametrize("name, says", [("fisheye.json", "OPENCV_FISHEYE"), ("ngp.json", "is_fisheye True")])
def test_the_fisheyes_of_the_case_are_refused_by_name(name, says):
    with pytest.raises(ValueError, match=f"{name}: frame 0: has .*{says}"):
        cf.load_cameras(CASES / "transforms-fisheye" / name)


BENT = [
    dict(camera_model="OPENCV_FISHEYE"), dict(camera_model="fisheye"), dict(camera_model="THIN_PRISM_FISHEYE"),
    dict(camera_model="FISHEYE624"), dict(is_fisheye=True), dict(is_fisheye=1), dict(is_fisheye="true"),
    dict(fisheye=True), dict(k1=0.05), dict(k5=0.1), dict(k6=-0.1), dict(s1=0.01), dict(omega=0.9), dict(p2=0.01),
    dict(tau_x=0.1), dict(distortion_params=[0.1, 0, 0, 0, 0, 0]), dict(dist_coeffs=[[0.1, 0, 0, 0, 0]]),
    dict(ftheta_p1=0.01), dict(k1="0.05"), dict(frame=dict(k1=0.05)), dict(frame=dict(camera_model="OPENCV_FISHEYE")),
]  # fmt: skip
NO_PINHOLES = [
    dict(camera_model="EQUIRECTANGULAR"), dict(camera_model="ORTHOPHOTO"), dict(camera_model="OMNIDIRECTIONALSTEREO_L"),
    dict(is_equirectangular=True), dict(is_panorama=True), dict(camera_model="VR180_L"), dict(camera_type="spherical"),
    dict(ortho=True),
]  # fmt: skip
STRAIGHT = [
    dict(camera_model="PINHOLE"), dict(camera_model="SIMPLE_PINHOLE"), dict(camera_model="OPENCV", k1=0, k2=0.0, p1=0, p2=0),
    dict(k1=1e-12, k2=-1e-12, p1=1e-13), dict(is_fisheye=False), dict(is_fisheye="false"), dict(k1=None, camera_model=None),
    dict(distortion_params=[0, 0, 0, 0, 0, 0]), dict(camera_model="opencv", k6=1e-9), dict(aabb_scale=16, scale=2.0),
    dict(camera_model="FULL_OPENCV", k4=0, k5=0, k6=0, s1=0), dict(k1="0"), dict(camera_model="perspective"),
]  # fmt: skip


@pytest.mark.parametrize("record", BENT + NO_PINHOLES, ids=str)
def test_what_is_no_pinhole_is_refused_by_name(record, tmp_path):
    said = str([*(record.get("frame") or record)][0])
    with pytest.raises(ValueError, match="transforms.json: frame 0: has .*pinholes") as refusal:
        cf.load_cameras(transforms(tmp_path, **record))
    assert said in str(refusal.value) or "lens model" in str(refusal.value)


@pytest.mark.parametrize("record", STRAIGHT, ids=str)
def test_distortion_that_is_zero_for_the_picture_is_none(record, tmp_path):
    assert_close(cf.load_cameras(transforms(tmp_path, **record)).K, pinhole((48, 64), 50.0).K)


@pytest.mark.parametrize("record", BENT, ids=str)
def test_a_path_alone_may_take_the_lens_without_its_distortion_and_hears_of_it(record, tmp_path):
    notes = []
    found = cf.load_cameras(transforms(tmp_path, **record), undistorted=True, on_note=notes.append)
    assert_close(found.K, pinhole((48, 64), 50.0).K)
    assert len(notes) == 1 and "left out" in notes[0]


@pytest.mark.parametrize("record", NO_PINHOLES, ids=str)
def test_a_panorama_has_no_lens_to_take(record, tmp_path):
    with pytest.raises(ValueError, match="pinhole views"):
        cf.load_cameras(transforms(tmp_path, **record), undistorted=True)


@pytest.mark.parametrize("zero, model", [
    ("0 0 0 0", "OPENCV 64 48 50 50 32 24"), ("1e-12 0 0 1e-13", "OPENCV 64 48 50 50 32 24"),
    ("0", "SIMPLE_RADIAL 64 48 50 32 24"), ("0 0", "RADIAL 64 48 50 32 24"), ("0", "FOV 64 48 50 50 32 24"),
    ("0 0 0 0 0 0 0 0", "FULL_OPENCV 64 48 50 50 32 24")])
def test_a_colmap_camera_of_a_bent_model_that_is_straight_is_read(zero, model, tmp_path):
    as_colmap(tmp_path, *GOOD)
    (tmp_path / "cameras.txt").write_text(f"1 {model} {zero}\n")
    assert_close(cf.load_cameras(tmp_path).K, pinhole((48, 64), 50.0, 5).K)
    (tmp_path / "cameras.txt").write_text(f"1 {model} {' '.join(['0.3'] * len(zero.split()))}\n")
    with pytest.raises(ValueError, match="camera 1: has the lens distortion .*0.3.*undistort"):
        cf.load_cameras(tmp_path)
    assert_close(cf.load_cameras(tmp_path, undistorted=True).K, pinhole((48, 64), 50.0, 5).K)


@pytest.mark.parametrize("line", ["OPENCV_FISHEYE 64 48 50 50 32 24 0 0 0 0", "SIMPLE_RADIAL_FISHEYE 64 48 50 32 24 0",
                                  "THIN_PRISM_FISHEYE 64 48 50 50 32 24 0 0 0 0 0 0 0 0"])
def test_a_colmap_fisheye_is_refused_even_without_terms(line, tmp_path):
    as_colmap(tmp_path, *GOOD)
    (tmp_path / "cameras.txt").write_text(f"1 {line}\n")
    with pytest.raises(ValueError, match=f"lens model '{line.split()[0]}'"):
        cf.load_cameras(tmp_path)


def test_an_npz_that_speaks_of_its_distortion_is_heard(tmp_path):
    def with_(**more):
        np.savez(tmp_path / "t.npz", w2c=np.eye(4)[None], intrinsics=lens(*GOOD, 1), image_height=480, image_width=832, **more)
        return cf.load_cameras(tmp_path / "t.npz")

    assert len(with_(dist_coeffs=np.zeros(5))) == len(with_(k1=np.float32(0))) == len(with_(is_fisheye=False)) == 1
    for more, says in ((dict(distortion=np.array([0.1, 0])), r"distortion\[0\] 0.1"), (dict(k1=0.1), "k1 0.1"),
                       (dict(camera_model="OPENCV_FISHEYE"), "OPENCV_FISHEYE"), (dict(is_fisheye=True), "is_fisheye")):
        with pytest.raises(ValueError, match=f"t.npz: has .*{says}"):
            with_(**more)


def test_lenses_by_their_angle_follow_each_side(tmp_path):
    across, down = math.radians(70), math.radians(50)
    no = dict(fl_x=None, fl_y=None, cx=None, cy=None)
    both = cf.load_cameras(transforms(tmp_path, camera_angle_x=across, camera_angle_y=down, **no)).K[0]
    assert_close(both.diagonal(), torch.tensor([32 / math.tan(across / 2), 24 / math.tan(down / 2), 1]))
    only = cf.load_cameras(transforms(tmp_path, camera_angle_y=down, **no)).K[0]
    assert_close(only.diagonal()[:2], torch.full((2,), 24 / math.tan(down / 2)))
    with pytest.raises(ValueError, match="between 0 and pi radians; found 70"):
        cf.load_cameras(transforms(tmp_path, camera_angle_x=70.0, **no))
