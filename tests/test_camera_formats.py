"""Files of cameras as people bring them: order, counts, sizes, map coordinates, texts of any editor, links and litter."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lyra_core.cameras import camera_files as cf
from lyra_core.cameras import trajectory
from lyra_core.cameras.camera import Cameras, about, join, pinhole, quaternion_to_rotation
from lyra_core.cameras.camera_path import path_of

CASES = Path(__file__).parent / "cases"


def centers(source, **options):
    return cf.load_cameras(source, **options).centers[:, 0].tolist()


def at(x, **frame):
    matrix = np.eye(4)
    matrix[0, 3] = x
    return dict(transform_matrix=matrix.tolist()) | frame


def transforms(folder, frames, **record):
    base = dict(w=64, h=48, fl_x=50.0, fl_y=50.0, cx=32.0, cy=24.0, frames=frames)
    (folder / "transforms.json").write_text(json.dumps(base | record))
    return folder / "transforms.json"


# order


def test_frames_of_the_case_come_in_the_order_of_their_names():
    notes = []
    assert centers(CASES / "transforms-out-of-order" / "transforms.json", on_note=notes.append) == [1, 2, 3, 4, 5, 6]
    assert "in the order of its file names, images/frame_00001.png first" in notes[0]


@pytest.mark.parametrize("names", [
    ["10.png", "2.png", "1.png"], ["images/frame_10.jpg", "./images/frame_2.jpg", "images/frame_1.jpg"],
    ["IMG_10.PNG", "img_9.png", "Img_1.png"], ["b/1.png", "a/10.png", "a/2.png"]])
def test_names_are_ordered_as_people_count(names, tmp_path):
    assert centers(transforms(tmp_path, [at(3.0, file_path=names[0]), at(2.0, file_path=names[1]), at(1.0, file_path=names[2])])) == [
        1, 2, 3]  # fmt: skip
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 64 48 50 50 32 24\n")
    (tmp_path / "images.txt").write_text("".join(f"{i} 1 0 0 0 {-x} 0 0 1 {name.removeprefix('./')}\n\n"
                                                 for i, (x, name) in enumerate(zip((3, 2, 1), names, strict=True), 1)))
    assert centers(tmp_path) == [1, 2, 3]


def test_frames_without_names_stay_as_they_are(tmp_path):
    assert centers(transforms(tmp_path, [at(2.0), at(1.0), at(3.0)])) == [2, 1, 3]
    notes = []
    assert centers(transforms(tmp_path, [at(2.0, file_path="b"), at(1.0)]), on_note=notes.append) == [2, 1]
    assert "not every frame has a file_path" in notes[0]


def test_the_first_frames_are_those_of_the_first_names(tmp_path):
    frames = [at(float(i), file_path=f"{i}.png") for i in (3, 11, 1, 2)]
    assert centers(transforms(tmp_path, frames), frames=3) == [1, 2, 3]


# what is left out, and what is null


def test_null_is_as_if_it_were_not_there(tmp_path):
    frames = [at(1.0, file_path="a", w=None, fl_x=None, k1=None), at(2.0, file_path=None)]
    found = cf.load_cameras(transforms(tmp_path, frames, fl_y=None, cx=None, cy=None, camera_model=None, camera_angle_x=None))
    assert_close(found.K, pinhole((48, 64), 50.0, 2).K)
    with pytest.raises(ValueError, match="needs a transform_matrix"):
        cf.load_cameras(transforms(tmp_path, [dict(transform_matrix=None)]))
    key = {"R": [0, 0, 0, 1], "T": [0, 0, 0], "fov": 50, "timestamp": None, "up_dir": None, "shift": None}
    path = cf.load_camera_path(json.dumps({"path": [key, key], "loop": None, "spline_order": None, "duration_seconds": None}))
    assert path.spline_order == 3 and not path.loop and path.duration == 5


def test_the_cases_without_a_size_take_the_one_asked_for_or_say_what_is_missing():
    case = CASES / "transforms-without-size"
    found = cf.load_cameras(case / "blender.json", size=(480, 832))
    assert found.size == (480, 832)
    assert_close(found.K[0], pinhole((480, 832), 416 / math.tan(0.6911112 / 2)).K[0], atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="blender.json: frame 0: no picture height and width, w and h missing; add w and h"):
        cf.load_cameras(case / "blender.json")
    text = cf.load_cameras(case / "sizes_as_text.json")
    assert text.size == (48, 64)
    assert_close(text.K, pinhole((48, 64), 50.0).K)


def test_pixels_of_a_picture_of_unknown_size_are_not_guessed(tmp_path):
    for missing in (dict(w=None, h=None), dict(h=None)):
        with pytest.raises(ValueError, match="h missing, and fl_x, fl_y, cx, cy can't be read without them"):
            cf.load_cameras(transforms(tmp_path, [at(0.0)], **missing), size=(480, 832))


@pytest.mark.parametrize("value", ["64", 64.0, [64], [[64.0]], "64.0"])
def test_numbers_may_be_texts_or_lists_of_one(value, tmp_path):
    found = cf.load_cameras(transforms(tmp_path, [at(0.0)], w=value, fl_x=["50"], cx="32"))
    assert found.size == (48, 64) and found.K[0, 0, 0] == 50


@pytest.mark.parametrize("value", ["wide", [64, 64], "64px", float("nan"), -64, 64.5, {"value": 64}, True])
def test_a_size_that_is_none_is_refused_by_name(value, tmp_path):
    with pytest.raises(ValueError, match="transforms.json: frame 0"):
        cf.load_cameras(transforms(tmp_path, [at(0.0)], w=value))


@pytest.mark.parametrize("shape", ["flat", "3x4", "flat 3x4"])
def test_matrices_are_read_in_every_shape(shape, tmp_path):
    matrix = np.array(at(2.0)["transform_matrix"])[: 3 if "3x4" in shape else 4]
    frame = dict(transform_matrix=(matrix.reshape(-1) if "flat" in shape else matrix).tolist())
    assert centers(transforms(tmp_path, [frame])) == [2]


def test_one_lens_short_matrices_and_sizes_of_one_are_read_in_an_npz(tmp_path):
    K, w2c = pinhole((48, 64), 50.0).K[0].numpy(), np.tile(np.eye(4), (5, 1, 1))
    w2c[:, 0, 3] = np.arange(5)
    full = dict(w2c=w2c, intrinsics=np.tile(K, (5, 1, 1)), image_height=48, image_width=64)
    changes = [{}, dict(intrinsics=K), dict(intrinsics=K[None]), dict(w2c=w2c[:, :3]), dict(image_height=[48], image_width=[64]),
               dict(image_height=[[48]], image_width=np.array([64.0])), dict(image_height=[48] * 5, image_width=[64] * 5)]
    for change in changes:
        np.savez(tmp_path / "t.npz", **(full | change))
        found = cf.load_cameras(tmp_path / "t.npz")
        assert found.size == (48, 64) and torch.equal(found.w2c, torch.from_numpy(w2c).float())
        assert_close(found.K, pinhole((48, 64), 50.0, 5).K)
    for bad in (dict(intrinsics=np.tile(K, (4, 1, 1))), dict(image_height=[48] * 3), dict(w2c=np.eye(4))):
        np.savez(tmp_path / "t.npz", **(full | bad))
        with pytest.raises(ValueError, match="t.npz"):
            cf.load_cameras(tmp_path / "t.npz")


# several sizes


def test_pictures_of_several_sizes_are_each_brought_to_the_one_asked_for(tmp_path):
    sizes = [(48, 64), (96, 128), (64, 48)]
    frames = [at(float(i), file_path=f"{i}.png", w=w, h=h, fl_x=w / 2, fl_y=w / 2, cx=w / 2, cy=h / 2)
              for i, (h, w) in enumerate(sizes)]
    file = transforms(tmp_path, frames)
    with pytest.raises(ValueError, match=r"different sizes \[\(48, 64\), \(64, 48\), \(96, 128\)\].*ask for one size"):
        cf.load_cameras(file)
    notes = []
    found = cf.load_cameras(file, size=(96, 128), fit="crop", on_note=notes.append)
    assert found.size == (96, 128)
    assert_close(found.K[:2], pinhole((96, 128), 64.0, 2).K)
    assert_close(found.K[2], pinhole((96, 128), 64.0).K[0])     # 48 wide became 128 wide, and 75 rows went
    assert len(notes) == 1 and "pictures of 48x64, for the same pictures cropped" in notes[0]
    assert_close(cf.load_cameras(file, size=(96, 128)).K[2, (0, 1), (0, 1)], torch.tensor([64.0, 36.0]))     # stretched
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "cameras.txt").write_text("1 PINHOLE 64 48 32 32 32 24\n2 SIMPLE_PINHOLE 128 96 64 64 48\n")
    (tmp_path / "m" / "images.txt").write_text("1 1 0 0 0 0 0 0 2 a\n\n2 1 0 0 0 0 0 0 1 b\n\n")
    assert_close(cf.load_cameras(tmp_path / "m", size=(96, 128)).K, pinhole((96, 128), 64.0, 2).K)
    np.savez(tmp_path / "t.npz", w2c=np.tile(np.eye(4), (2, 1, 1)), image_height=[48, 96], image_width=[64, 128],
             intrinsics=np.stack([pinhole((48, 64), 32.0).K[0], pinhole((96, 128), 64.0).K[0]]))
    assert_close(cf.load_cameras(tmp_path / "t.npz", size=(96, 128)).K, pinhole((96, 128), 64.0, 2).K)


def test_a_bad_lens_among_several_sizes_is_found_by_its_own_size(tmp_path):
    frames = [at(0.0, file_path="a"), at(1.0, file_path="b", w=640, h=480)]     # with the lens of 64x48
    with pytest.raises(ValueError, match="pictures of 640x480: frame 0 has its principal point"):
        cf.load_cameras(transforms(tmp_path, frames), size=(48, 64))


# COLMAP's two lines


def colmap(folder, images, lenses="1 PINHOLE 64 48 50 50 32 24\n"):
    folder.mkdir(exist_ok=True)
    (folder / "cameras.txt").write_text(lenses)
    (folder / "images.txt").write_text(images)
    return folder


IMAGES = [f"{i + 1} 1 0 0 0 {-i} 0 0 1 frame_{i:03d}.png" for i in range(6)]


def test_six_images_of_the_case_are_six_though_their_blank_lines_are_gone():
    assert centers(CASES / "colmap-blank-lines-gone") == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("between", ["\n", "\n\n", "\n\n\n", "\n \t\n", "\r\n\r\n", "\n10.5 20 3 11 21 -1\n", "\n# a note\n\n",
                                     "\n1 2 3\n\n"])
@pytest.mark.parametrize("header", ["", "# Number of images: 6\n", "# Number of images: 6, mean observations per image: 0\n"])
def test_images_are_told_from_their_points_whatever_lies_between(header, between, tmp_path):
    assert centers(colmap(tmp_path, header + between.join(IMAGES) + between)) == [0, 1, 2, 3, 4, 5]


def test_some_blank_lines_may_be_gone(tmp_path):
    lines = [IMAGES[0], "", IMAGES[1], "1 2 3 4 5 -1", IMAGES[2], IMAGES[3], "", IMAGES[4], IMAGES[5]]
    assert centers(colmap(tmp_path, "\n".join(lines))) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("images", ["\n\n".join(IMAGES[:4]), "\n\n".join([*IMAGES, IMAGES[0]]),
                                    "\n\n".join([IMAGES[0] + " " + IMAGES[1], *IMAGES[2:]])])
def test_what_the_header_promises_must_be_there(images, tmp_path):
    with pytest.raises(ValueError, match="images.txt: its header says 6 images, found [457]"):
        cf.load_cameras(colmap(tmp_path, "# Number of images: 6\n" + images + "\n"))
    with pytest.raises(ValueError, match="cameras.txt: its header says 2 cameras, found 1"):
        cf.load_cameras(colmap(tmp_path, "\n\n".join(IMAGES), "# Number of cameras: 2\n1 PINHOLE 64 48 50 50 32 24\n"))


# nerfstudio's viewer


def viewer(folder, **changes):
    back = np.diag([1.0, 1, 1, 1])
    frames = []
    for i in range(4):
        back[0, 3], back[2, 3] = i, -i
        frames.append(dict(camera_to_world=back.reshape(-1).tolist(), fov=60.0, aspect=64 / 48))
    keyframe = dict(matrix=json.dumps(back.T.reshape(-1).tolist()), fov=60, aspect=64 / 48)
    record = dict(keyframes=[keyframe] * 2, camera_type="perspective", render_height=48, render_width=64, camera_path=frames,
                  fps=24, seconds=4 / 24, smoothness_value=0.5, is_cycle=False, crop=None)
    (folder / "camera_path.json").write_text(json.dumps(record | changes))
    return folder / "camera_path.json"


def test_a_path_of_nerfstudio_s_viewer_is_read_as_it_renders_it(tmp_path):
    found = cf.load_cameras(viewer(tmp_path))
    assert found.size == (48, 64)
    assert_close(found.K, pinhole((48, 64), 24 / math.tan(math.radians(30)), 4).K)
    assert_close(found.centers, torch.tensor([[i, 0, -i] for i in range(4)], dtype=torch.float32))
    assert_close(found.c2w[0, :3, :3], torch.diag(torch.tensor([1.0, -1, -1])))     # looks along -z, as OpenGL
    assert cf.load_cameras(viewer(tmp_path), 3, 2.0, (96, 128)).centers[2].tolist() == [4, 0, -4]


def test_a_viewer_path_without_a_size_takes_the_one_asked_for(tmp_path):
    file = viewer(tmp_path, render_height=None)
    assert cf.load_cameras(file, size=(96, 128)).size == (96, 128)
    with pytest.raises(ValueError, match="no render_height and render_width"):
        cf.load_cameras(file)


@pytest.mark.parametrize("change, says", [
    (dict(camera_type="equirectangular"), "lens model 'equirectangular'"), (dict(camera_type="fisheye"), "lens model 'fisheye'"),
    (dict(camera_type="vr180"), "lens model 'vr180'"), (dict(camera_path=[]), "needs a list 'camera_path'"),
    (dict(camera_path=[dict(fov=60)]), "frame 0: needs camera_to_world"),
    (dict(camera_path=[dict(camera_to_world=[1, 2, 3], fov=60)]), r"camera_to_world: expected"),
    (dict(camera_path=[dict(camera_to_world=np.eye(4).tolist(), fov=180)]), "found 180"),
    (dict(camera_path=[dict(camera_to_world=np.eye(4).T.reshape(-1).tolist()[:15] + [2], fov=60)]), "last row"),
    (dict(camera_path=[dict(camera_to_world=(2 * np.eye(4)).reshape(-1).tolist(), fov=60)]), "not orthonormal")])
def test_a_viewer_path_that_can_not_be_is_refused(change, says, tmp_path):
    with pytest.raises(ValueError, match=f"camera_path.json.*{says}"):
        cf.load_cameras(viewer(tmp_path, **change))


# maps

UTM = torch.tensor([448_251.123, 5_411_932.456, 120.789], dtype=torch.float64)


def on_the_map(frames=6):
    """Camera-to-world, OpenCV, float64, a walk of centimetres and turns far from the origin of a map."""
    generator = torch.Generator().manual_seed(5)
    c2w = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    c2w[:, :3, :3] = quaternion_to_rotation(torch.randn(frames, 4, generator=generator, dtype=torch.float64))
    c2w[:, :3, 3] = UTM + 0.05 * torch.arange(frames)[:, None] * torch.tensor([1.0, 0.5, 0.25])
    return c2w


def write_map(kind, folder):
    c2w = on_the_map()
    if kind == "npz":
        np.savez(folder / "m.npz", w2c=torch.linalg.inv(c2w).numpy(), intrinsics=pinhole((48, 64), 50.0).K[0].numpy(),
                 image_height=48, image_width=64)
        return folder / "m.npz"
    gl = (c2w @ torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))).tolist()
    if kind == "transforms":
        return transforms(folder, [dict(file_path=f"{i}.png", transform_matrix=m) for i, m in enumerate(gl)])
    if kind == "viewer":
        return viewer(folder, camera_path=[dict(camera_to_world=m, fov=60) for m in gl])
    from lyra_core.cameras.camera import rotation_to_quaternion
    w2c = torch.linalg.inv(c2w)
    poses = torch.cat([rotation_to_quaternion(w2c[:, :3, :3]), w2c[:, :3, 3]], 1).tolist()
    return colmap(folder / "m", "".join(f"{i + 1} {' '.join(map(repr, p))} 1 {i}.png\n\n" for i, p in enumerate(poses)))


def original(cameras):
    """Camera centres in the coordinates of the file, float64."""
    R, t = cameras.w2c[:, :3, :3].double(), cameras.w2c[:, :3, 3].double()
    return -torch.linalg.solve(R, t) + torch.tensor(cameras.origin, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["npz", "transforms", "viewer", "colmap"])
def test_cameras_of_a_map_stand_near_the_origin_and_know_where_they_came_from(kind, tmp_path):
    notes = []
    found = cf.load_cameras(write_map(kind, tmp_path), on_note=notes.append)
    assert found.origin == (448251.0, 5411932.0, 121.0) and "(448251, 5411932, 121) was taken off" in notes[0]
    assert found.centers.abs().max() < 1 and found.w2c.dtype == torch.float32
    assert_close(original(found), on_the_map()[:, :3, 3], atol=1e-6, rtol=0)
    steps = found.centers.diff(dim=0).norm(dim=1)
    assert_close(steps, torch.full((5,), 0.05 * (1 + 0.25 + 0.0625) ** 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("save, name", [(cf.save_npz, "s.npz"), (cf.save_transforms, "s.json"), (cf.save_colmap, "model"),
                                        (lambda path, c: cf.save_camera_path(path, path_of(c)), "path.json")])
def test_cameras_of_a_map_are_saved_where_they_were(save, name, tmp_path):
    cameras = cf.load_cameras(write_map("npz", tmp_path))
    save(tmp_path / name, cameras)
    again = cf.load_cameras(tmp_path / name, *((6, 1.0, (48, 64)) if name == "path.json" else ()), motion="time")
    assert_close(original(again)[[0, -1]], on_the_map()[[0, -1], :3, 3], atol=1e-4, rtol=0)
    if name != "path.json":     # that spreads its frames anew
        assert_close(original(again), on_the_map()[:, :3, 3], atol=1e-4, rtol=0)
        assert_close(again.w2c[:, :3, :3], cameras.w2c[:, :3, :3], atol=1e-6, rtol=0)


def test_what_others_read_in_a_saved_map_file_is_right_by_their_own_arithmetic(tmp_path):
    cameras = cf.load_cameras(write_map("colmap", tmp_path))
    cf.save_npz(tmp_path / "s.npz", cameras)
    w2c = np.load(tmp_path / "s.npz")["w2c"]
    by_transpose = -(w2c[:, :3, :3].transpose(0, 2, 1) @ w2c[:, :3, 3:])[..., 0]
    assert w2c.dtype == np.float64 and np.abs(by_transpose - on_the_map()[:, :3, 3].numpy()).max() < 1e-4
    cf.save_colmap(tmp_path / "out", cameras, points=torch.tensor([[1.0, 2, 3]]))
    assert (tmp_path / "out" / "points3D.txt").read_text().startswith("1 448252 5411934 124 ")
    matrix = json.loads((cf.save_transforms(tmp_path / "s.json", cameras), (tmp_path / "s.json").read_text())[1])["frames"][0]
    assert np.abs(np.array(matrix["transform_matrix"])[:3, 3] - UTM.numpy()).max() < 1e-4


def test_paths_of_one_map_meet_though_each_was_moved_on_its_own(tmp_path):
    cameras = cf.load_cameras(write_map("npz", tmp_path))
    elsewhere = about(cameras, (448000.0, 5411000.0, 0.0))
    assert_close(original(elsewhere), original(cameras), atol=1e-4, rtol=0)
    both = join(cameras, elsewhere)
    assert both.origin == cameras.origin
    assert_close(both.w2c[6:], cameras.w2c, atol=1e-3, rtol=0)
    moved = trajectory.chain(cameras, elsewhere[[5, 4, 3]])
    assert moved.origin == cameras.origin and len(moved) == 8
    assert_close(moved.w2c[6], cameras.w2c[4] @ torch.linalg.inv(cameras.w2c[5]) @ cameras.w2c[5], atol=1e-3, rtol=0)


def test_cameras_near_the_origin_stay_as_they_are(tmp_path):
    w2c = np.tile(np.eye(4), (3, 1, 1))
    w2c[:, 0, 3] = [-999, 5, 40_000]
    np.savez(tmp_path / "t.npz", w2c=w2c, intrinsics=pinhole((48, 64), 50.0).K[0].numpy(), image_height=48, image_width=64)
    found = cf.load_cameras(tmp_path / "t.npz")
    assert found.origin == (0, 0, 0) and torch.equal(found.w2c, torch.from_numpy(w2c).float())


def test_a_pose_scale_acts_about_where_the_world_s_origin_came_to_lie(tmp_path):
    plain, doubled = (cf.load_cameras(write_map("npz", tmp_path), pose_scale=s) for s in (1.0, 2.0))
    assert doubled.origin == plain.origin
    assert_close(doubled.centers, 2 * plain.centers, atol=1e-5, rtol=0)


# our own files


def test_files_of_our_own_say_their_units_and_whoever_scales_them_hears_of_it(tmp_path):
    cameras = Cameras(torch.eye(4).repeat(3, 1, 1), pinhole((48, 64), 50.0, 3).K, (48, 64))
    cf.save_npz(tmp_path / "s.npz", cameras)
    cf.save_transforms(tmp_path / "s.json", cameras)
    cf.save_colmap(tmp_path / "model", cameras)
    cf.save_camera_path(tmp_path / "p.json", path_of(cameras))
    for name in ("s.npz", "s.json", "model", "p.json"):
        notes = []
        cf.load_cameras(tmp_path / name, 3, size=(48, 64), on_note=notes.append)
        assert notes == []
        cf.load_cameras(tmp_path / name, 3, 1.1, (48, 64), on_note=notes.append)
        assert len(notes) == 1 and "saved in the scene units of a world; pose_scale 1.1" in notes[0]


# texts, links, litter

WINDOWS = CASES / "text-files-from-windows"


def test_texts_of_windows_are_read_or_named():
    assert_close(cf.load_cameras(WINDOWS / "transforms_bom.json").K, pinhole((48, 64), 50.0).K)
    assert len(cf.load_cameras(WINDOWS / "scan")) == 1
    for name in ("transforms_utf16.json", "scan_utf16"):
        with pytest.raises(ValueError, match=f"{name}.*UTF-16.*save it as UTF-8"):
            cf.load_cameras(WINDOWS / name)


@pytest.mark.parametrize("encoding, works", [("utf-8", True), ("utf-8-sig", True), ("utf-16", False), ("utf-16-le", False),
                                             ("utf-32", False), ("latin-1", False)])
def test_every_text_is_read_by_the_one_reader(encoding, works, tmp_path):
    lens, images = "# für alle\r\n1 PINHOLE 64 48 50 50 32 24\r\n", "# für\r\n1 1 0 0 0 0 0 0 1 straße.png\r\n\r\n"
    folder = colmap(tmp_path / "m", "")
    (folder / "cameras.txt").write_bytes(lens.encode(encoding))
    (folder / "images.txt").write_bytes(images.encode(encoding))
    record = json.dumps(dict(w=64, h=48, fl_x=50, frames=[at(0.0, file_path="straße.png")]), ensure_ascii=False)
    (tmp_path / "t.json").write_bytes(record.encode(encoding))
    for source in (folder, tmp_path / "t.json"):
        if works:
            assert len(cf.load_cameras(source)) == 1
        else:
            with pytest.raises(ValueError, match=r"(?s)(cameras\.txt|t\.json).*UTF-8"):
                cf.load_cameras(source)


@pytest.mark.parametrize("names", [("CAMERAS.TXT", "IMAGES.TXT"), ("Cameras.txt", "Images.TXT"), ("cameras.txt", "images.txt")])
@pytest.mark.parametrize("place", ["", "sparse/0", "Sparse/0", "0"])
def test_a_colmap_folder_is_found_in_capitals_and_among_litter(names, place, tmp_path):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, ("1 PINHOLE 64 48 50 50 32 24\n", "\n\n".join(IMAGES) + "\n\n"), strict=True):
        (folder / name).write_text(text)
        (folder / f"._{name}").write_bytes(b"\0\5\26\7")
    for litter in (".DS_Store", "desktop.ini", "Thumbs.db"):
        (folder / litter).write_bytes(b"\0\1")
    assert centers(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert sorted(file.name for file in cf.files_read(tmp_path)) == sorted(names)


def test_links_are_followed_and_endings_may_be_in_capitals(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    cf.save_npz(there / "WALK.NPZ", pinhole((48, 64), 50.0, 3))
    transforms(there, [at(1.0)]).rename(there / "T.JSON")
    colmap(there / "model", "\n\n".join(IMAGES))
    for link, target in (("a.npz", "WALK.NPZ"), ("linked", "WALK.NPZ"), ("b.Json", "T.JSON"), ("scan", "model")):
        (tmp_path / link).symlink_to(there / target)
        assert len(cf.load_cameras(tmp_path / link)) in (1, 3, 6)
    (tmp_path / "scan2").mkdir()
    for name in ("cameras.txt", "images.txt"):
        os.symlink(there / "model" / name, tmp_path / "scan2" / name)
    assert centers(tmp_path / "scan2") == [0, 1, 2, 3, 4, 5]


def test_a_folder_that_holds_a_transforms_json_is_that_file(tmp_path):
    file = transforms(tmp_path, [at(1.0), at(2.0)])
    assert centers(tmp_path) == [1, 2] and cf.files_read(tmp_path) == [file]
