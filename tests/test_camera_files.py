import io
import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras import camera_files as cf
from lyra_core.cameras.camera import Cameras, pinhole, quaternion_to_rotation, to_corner_origin
from lyra_core.cameras.camera_path import CameraPath, PathKey
from lyra_core.cameras.trajectory import scale
from lyra_core.files import replacing

SIZE = (48, 64)


@pytest.fixture
def cameras():
    generator = torch.Generator().manual_seed(3)
    w2c = torch.eye(4).repeat(6, 1, 1)
    w2c[:, :3, :3] = quaternion_to_rotation(torch.randn(6, 4, generator=generator))
    w2c[:, :3, 3] = torch.randn(6, 3, generator=generator)
    K = pinhole(SIZE, 50.0, 6).K + torch.tensor([[2.0, 0, 1], [0, 1, -2], [0, 0, 0]])
    K[3:] += torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 0, 0]])
    return Cameras(w2c, K, SIZE)


def same(a, b):
    assert a.size == b.size
    assert_close(a.w2c, b.w2c, atol=1e-5, rtol=0)
    assert_close(a.K, b.K, atol=1e-4, rtol=0)


def npz(path, **changes):
    """A good trajectory of five cameras, but for the changes; None leaves an array out."""
    arrays = dict(w2c=np.tile(np.eye(4), (5, 1, 1)), intrinsics=np.tile([[50.0, 0, 31.5], [0, 50, 23.5], [0, 0, 1]], (5, 1, 1)),
                  image_height=np.array(48), image_width=np.array(64)) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


# every format

@pytest.mark.parametrize("save, name", [(cf.save_npz, "cameras.npz"), (cf.save_transforms, "transforms.json"),
                                        (cf.save_colmap, "model")])
def test_every_format_gives_back_what_was_saved(save, name, cameras, tmp_path):
    save(tmp_path / name, cameras)
    same(cf.load_cameras(tmp_path / name), cameras)
    same(cf.load_cameras(tmp_path / name, frames=4, pose_scale=2.0, size=(24, 128)),
         scale(cameras[:4], 2.0, "origin").resized((24, 128)))
    with pytest.raises(ValueError, match="7 cameras wanted, 6 found"):
        cf.load_cameras(tmp_path / name, frames=7)


def test_a_camera_path_becomes_cameras_of_the_wanted_size(tmp_path):
    file = tmp_path / "path.json"
    keys = tuple(PathKey(torch.eye(4)[:3], fov, stamp) for fov, stamp in ((60.0, 1.0), (50.0, 2.0)))
    cf.save_camera_path(file, CameraPath(keys))
    found = cf.load_cameras(file, frames=9, size=SIZE)
    assert len(found) == 9 and found.size == SIZE
    assert found.K[0, 1, 1] == pytest.approx(0.5 * 48 / math.tan(math.radians(30)), rel=1e-4)
    assert found.K[0, 0, 2] == 31.5
    with pytest.raises(ValueError, match="neither frames nor a picture size"):
        cf.load_cameras(file)


@pytest.mark.parametrize("name, text, says", [
    ("a.txt", "", "can't read cameras from a file of type '.txt'"), ("a.json", "{}", "neither a camera path"),
    ("b.json", "[1]", "expected a JSON object"), ("c.json", "{oops", "not valid JSON")])
def test_other_files_are_refused(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says) as refusal:
        cf.load_cameras(tmp_path / name)
    assert name in str(refusal.value)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(cameras, tmp_path):
    file = tmp_path / "transforms.json"
    file.write_text("old")
    skewed = cameras.K.clone()
    skewed[:, 0, 1] = 3.0
    with pytest.raises(ValueError, match="no place for a skew of 3"):
        cf.save_transforms(file, Cameras(cameras.w2c, skewed, SIZE))
    with pytest.raises(RuntimeError), replacing(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and [child.name for child in tmp_path.iterdir()] == ["transforms.json"]


# npz

def test_intrinsics_follow_the_picture_size_around_its_middle(tmp_path):
    K = np.tile([[50.0, 7, 30], [0, 60, 20], [0, 0, 1]], (5, 1, 1))
    found = cf.load_npz(npz(tmp_path / "t.npz", intrinsics=K), size=(96, 32))
    assert_close(found.K[0], torch.tensor([[25.0, 3.5, 14.75], [0, 120, 40.5], [0, 0, 1]]))
    assert found.size == (96, 32)


def test_intrinsics_without_a_size_need_one_from_the_caller(tmp_path):
    file = npz(tmp_path / "t.npz", image_height=None)
    with pytest.raises(ValueError, match="no image_height and image_width"):
        cf.load_npz(file, size=SIZE)
    assert_close(cf.load_npz(file, size=(24, 32), stored_size=SIZE).K, pinhole((24, 32), 25.0, 5).K)


def test_only_the_frames_asked_for_need_to_be_good(tmp_path):
    w2c = np.tile(np.eye(4), (5, 1, 1))
    w2c[4] = np.nan
    file = npz(tmp_path / "t.npz", w2c=w2c)
    assert len(cf.load_npz(file, 4)) == 4
    with pytest.raises(ValueError, match="frame 4 has NaN"):
        cf.load_npz(file)


BAD = {
    "no w2c in it": dict(w2c=None), "no intrinsics in it": dict(intrinsics=None),
    r"found \(5, 3, 3\)": dict(w2c=np.zeros((5, 3, 3))), r"found \(5, 4, 4\) and \(4, 3, 3\)":
        dict(intrinsics=np.ones((4, 3, 3))),
    "not orthonormal": dict(w2c=np.tile(np.diag([2.0, 2, 2, 1]), (5, 1, 1))),
    "is mirrored": dict(w2c=np.tile(np.diag([1.0, -1, 1, 1]), (5, 1, 1))),
    "focal lengths": dict(intrinsics=np.tile(np.diag([-5.0, 5, 1]), (5, 1, 1))),
    "whole positive pixels": dict(image_width=np.array(0)),
    "should hold numbers": dict(w2c=np.full((5, 4, 4), "a")),
    "pickled Python objects": dict(w2c=np.array([{"a": 1}], dtype=object)),
}


@pytest.mark.parametrize("says", BAD)
def test_a_bad_trajectory_is_refused_with_its_name_and_reason(says, tmp_path):
    file = npz(tmp_path / "bad.npz", **BAD[says])
    with pytest.raises(ValueError, match=says) as refusal:
        cf.load_npz(file)
    assert "bad.npz" in str(refusal.value)


def test_what_is_no_archive_is_refused_and_never_unpickled(tmp_path):
    plain, half = io.BytesIO(), io.BytesIO()
    np.save(plain, np.zeros(3))
    np.savez(half, w2c=np.zeros((5, 4, 4)))
    for contents in (b"hello", plain.getvalue(), half.getvalue()[:300]):
        (tmp_path / "x.npz").write_bytes(contents)
        with pytest.raises(ValueError, match="x.npz: not an npz archive"):
            cf.load_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("pose_scale", [0, -1, math.nan])
def test_a_pose_scale_is_positive(pose_scale, tmp_path):
    with pytest.raises(ValueError, match="pose scale"):
        cf.load_npz(npz(tmp_path / "t.npz"), pose_scale=pose_scale)


# camera paths

def test_a_camera_path_survives_the_reference_format(tmp_path, cameras):
    keys = tuple(PathKey(c2w[:3], 40.0 + i, float(i + 1), (0.0, 0.6, 0.8)) for i, c2w in enumerate(cameras.c2w))
    for path in (CameraPath(keys, 2, True), CameraPath(keys, through_keys=True)):
        cf.save_camera_path(tmp_path / "p.json", path)
        again = cf.load_camera_path(tmp_path / "p.json")
        assert (again.spline_order, again.loop) == (path.spline_order, path.loop)
        assert again.through_keys == path.through_keys
        for a, b in zip(again.keys, path.keys, strict=True):
            assert_close(a.c2w, b.c2w, atol=1e-6, rtol=0)
            assert (a.fov, a.timestamp, a.up) == (b.fov, b.timestamp, b.up)


def test_the_reference_format_has_the_scalar_of_a_quaternion_last():
    turn = math.sin(math.radians(45))
    record = {"path": [{"R": [0, turn, 0, turn], "T": [1, 2, 3], "fov": 50}]}
    (key,) = cf.load_camera_path(json.dumps(record)).keys
    assert_close(key.c2w, torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3]]), atol=1e-6, rtol=0)


def test_times_that_do_not_increase_are_replaced():
    frame = {"R": [0, 0, 0, 1], "T": [0, 0, 0], "fov": 50}
    path = cf.load_camera_path(json.dumps({"path": [frame] * 4, "duration_seconds": 2}))
    assert [key.timestamp for key in path.keys] == [0.5, 1, 1.5, 2] and path.spline_order == 3


GOOD_KEY = {"R": [0, 0, 0, 1], "T": [0, 0, 0], "fov": 50}


@pytest.mark.parametrize("record, says", [
    ({"path": []}, "list of keyframes"), ({}, "list of keyframes"),
    ({"path": [GOOD_KEY], "spline_order": 5}, "found 5"),
    ({"path": [GOOD_KEY, GOOD_KEY | {"R": [0, 0, 0, 0]}]}, "keyframe 1: R is the zero quaternion"),
    ({"path": [GOOD_KEY | {"R": [0, 0, 1]}]}, r"R: expected finite numbers of shape \(4,\)"),
    ({"path": [GOOD_KEY | {"T": [0, 0, math.nan]}]}, "T: expected finite"), ({"path": [{"fov": 3}]}, "needs R"),
    ({"path": [GOOD_KEY | {"fov": 180}]}, "found 180"),
    ({"path": [GOOD_KEY | {"T": ["a", 0, 0]}]}, "T: expected numbers")])
def test_a_bad_camera_path_is_refused(record, says):
    with pytest.raises(ValueError, match=says):
        cf.load_camera_path(json.dumps(record))


# transforms.json

def test_transforms_hold_opengl_cameras_with_corner_origin(cameras, tmp_path):
    cf.save_transforms(tmp_path / "t.json", cameras, [f"{i}.jpg" for i in range(6)])
    record = json.loads((tmp_path / "t.json").read_text())
    frame = record["frames"][2]
    matrix = torch.tensor(frame["transform_matrix"])
    assert_close(matrix[:3, 3], cameras.centers[2], atol=1e-5, rtol=0)
    assert_close(-matrix[:3, 2], cameras.c2w[2, :3, 2], atol=1e-5, rtol=0)      # looks along -z
    assert frame["cx"] == pytest.approx(float(cameras.K[2, 0, 2]) + 0.5) and frame["file_path"] == "2.jpg"
    assert (record["h"], record["w"]) == SIZE


def transforms(tmp_path, frame=(), **record):
    file = tmp_path / "transforms.json"
    frames = [dict(transform_matrix=np.eye(4).tolist()) | dict(frame)]
    file.write_text(json.dumps(dict(w=64, h=48, fl_x=50, frames=frames) | record))
    return file


def test_transforms_may_leave_the_obvious_out(tmp_path):
    found = cf.load_transforms(transforms(tmp_path))
    assert_close(to_corner_origin(found.K[0]), torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]))
    wide = cf.load_transforms(transforms(tmp_path, fl_x=None, camera_angle_x=math.pi / 2))
    assert wide.K[0, 0, 0] == pytest.approx(32)


@pytest.mark.parametrize("record, says", [
    (dict(frames=[]), "list of frames"), (dict(frames=[{}]), "frame 0: needs a transform_matrix"),
    (dict(frame=dict(transform_matrix=[[1, 0], [0, 1]])), r"found \(2, 2\)"), (dict(k1=0.1), "undistort"),
    (dict(fl_x=None), "no focal length"), (dict(w=None), "picture height and width"),
    (dict(frame=dict(transform_matrix=(2 * np.eye(4)).tolist())), "not orthonormal"),
    (dict(frames=[dict(transform_matrix=np.eye(4).tolist(), w=w) for w in (64, 32)]), "different sizes")])
def test_bad_transforms_are_refused(record, says, tmp_path):
    with pytest.raises(ValueError, match=says) as refusal:
        cf.load_transforms(transforms(tmp_path, **record))
    assert "transforms.json" in str(refusal.value)


# COLMAP

IMAGES = "7 1 0 0 0 1 2 3 1 a c.png\n\n2 2 0 0 0 0 0 0 1 a b.png\n1 2 -1\n"


def colmap(folder, lens="1 SIMPLE_PINHOLE 64 48 50 32 24", images=IMAGES):
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text(f"# id model size parameters\n{lens}\n")
    (folder / "images.txt").write_text(f"# two lines each\n{images}")
    return folder


def test_colmap_images_come_in_the_order_of_their_names(tmp_path):
    colmap(tmp_path / "sparse" / "0")
    found = cf.load_colmap(tmp_path)
    assert_close(found.w2c[:, :3, 3], torch.tensor([[0.0, 0, 0], [1, 2, 3]]))
    assert_close(found.w2c[:, :3, :3], torch.eye(3).repeat(2, 1, 1))
    assert_close(to_corner_origin(found.K[0]), torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]))


def test_saved_colmap_models_share_lenses_and_take_points(cameras, tmp_path):
    cf.save_colmap(tmp_path, cameras, points=torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert len((tmp_path / "cameras.txt").read_text().splitlines()) == 3
    assert (tmp_path / "points3D.txt").read_text() == "1 1 2 3 128 128 128 0\n2 4 5 6 128 128 128 0\n"


@pytest.mark.parametrize("change, says", [
    (dict(lens="1 OPENCV 64 48 50 50 32 24 0.1 0 0 0"), "k1 0.1.*image_undistorter"),
    (dict(lens="1 SPIRAL 64 48 50"), "model 'SPIRAL'.*image_undistorter"),
    (dict(lens="1 PINHOLE 64 48 50"), "parameters"), (dict(lens="1 PINHOLE"), "camera 1"),
    (dict(lens="2 SIMPLE_PINHOLE 64 48 50 32 24"), r"uses the cameras \['1'\]"),
    (dict(images="1 1 0 0 0\n"), "expected 'id qw"), (dict(images=""), "no image in it"),
    (dict(images="1 0 0 0 0 0 0 0 1 a\n\n"), "zero quaternion"),
    (dict(images="1 x 0 0 0 0 0 0 1 a\n\n"), "image 1")])
def test_bad_colmap_models_are_refused(change, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        cf.load_colmap(colmap(tmp_path / "model", **change))


def test_a_binary_colmap_model_is_named_as_such(tmp_path):
    (tmp_path / "images.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found \['images.bin'\]; convert a binary model"):
        cf.load_cameras(tmp_path)


def test_picture_names_must_be_as_many_as_cameras_and_different(cameras, tmp_path):
    with pytest.raises(ValueError, match="found 2, 1 of them different"):
        cf.save_colmap(tmp_path, cameras, ["a", "a"])


def test_a_camera_path_follows_the_chosen_curve_and_starts_at_its_first_key_whatever_the_time_stamps(tmp_path):
    path = [{"R": [0, 0, 0, 1], "T": [x, 0, z], "fov": 50.0, "timestamp": t, "up_dir": [0, 1, 0]}
            for x, z, t in ((0, 0, 0.0), (1, 1, 2.0), (2, -1, 4.0), (3, 0, 6.0))]
    file = tmp_path / "path.json"
    file.write_text(json.dumps({"loop": False, "spline_order": 3, "path": path}))
    keys = torch.tensor([p["T"] for p in path], dtype=torch.float32)
    through, beside = (cf.load_cameras(file, 97, size=(48, 64), curve=c).centers for c in ("through the keyframes", "B-spline"))
    assert torch.equal(cf.load_cameras(file, 97, size=(48, 64)).centers, beside)       # what the file says
    for centers in (through, beside):
        torch.testing.assert_close(centers[[0, -1]], keys[[0, -1]], atol=1e-4, rtol=0)
    assert torch.cdist(keys, through).amin(1).max() < 0.05 < torch.cdist(keys, beside).amin(1).max()
    with pytest.raises(ValueError, match="no curve 'straight'"):
        cf.load_cameras(file, 97, size=(48, 64), curve="straight")
