"""Camera files: the reference's npz, captions and camera paths, nerfstudio's transforms.json, COLMAP's text model.

What is read is checked; what is wrong is refused with the file, the value and a way out.
"""
from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import parse_json, read_json, read_text, replacing, write_text
from .camera import (
    Cameras,
    check,
    flip_camera_axes,
    from_corner_origin,
    quaternion_to_rotation,
    rotation_to_quaternion,
    to_corner_origin,
)
from .camera_path import CameraPath, PathKey, path_cameras, spaced
from .trajectory import scale

CHUNK_FRAMES = 80           # new frames per chunk of the Lyra 2 weights
PATH_SECONDS = 5.0          # how long a camera path without usable times takes
DISTORTIONS = ("k1", "k2", "k3", "k4", "p1", "p2")


CURVES = ("as the file says", "through the keyframes", "B-spline")


def load_cameras(path: str | Path, frames: int | None = None, pose_scale: float = 1.0,
                 size: tuple[int, int] | None = None, stored_size: tuple[int, int] | None = None,
                 curve: str = CURVES[0], motion: str = "uniform motion") -> Cameras:
    """Cameras from an npz, a camera-path or transforms.json, or a COLMAP folder, whichever `path` is.

    `frames`: so many from the beginning, or of the whole camera path. `pose_scale` multiplies distances from the
    world's origin. `size` (height, width) rescales the intrinsics. `stored_size`: see `load_npz`. For camera paths:
    `curve`, one of CURVES, and `motion`, how frames are spread over it (see `camera_path.resample`).
    """
    if curve not in CURVES:
        raise ValueError(f"there is no curve {curve!r}; choose one of {', '.join(CURVES)}")
    path = Path(path)
    if path.is_dir():
        return _finished(load_colmap(path), path, frames, pose_scale, size)
    if path.suffix.lower() == ".npz":
        return load_npz(path, frames, pose_scale, size, stored_size)
    if path.suffix.lower() != ".json":
        raise ValueError(f"{path}: can't read cameras from a file of type {path.suffix!r}; give an .npz, a .json "
                         "(camera path or transforms.json) or a COLMAP folder with cameras.txt and images.txt")
    record = _json_object(path)
    if "frames" in record:
        return _finished(load_transforms(path), path, frames, pose_scale, size)
    if "path" not in record:
        raise ValueError(f"{path}: neither a camera path (key 'path') nor a transforms.json (key 'frames'); "
                         f"found the keys {sorted(record)[:8]}")
    if frames is None or size is None:
        raise ValueError(f"{path}: a camera path has neither frames nor a picture size of its own; give `frames` "
                         f"and `size`, found {frames} and {size}")
    camera_path = load_camera_path(path)
    if curve != CURVES[0]:
        camera_path = replace(camera_path, through_keys=curve == CURVES[1])
    return _finished(path_cameras(camera_path, size, frames, motion), path, None, pose_scale, None)


def _finished(cameras: Cameras, path: Path, frames: int | None, pose_scale: float,
              size: tuple[int, int] | None) -> Cameras:
    """The first `frames` cameras, checked, scaled about the world's origin and resized."""
    if frames is not None and not 1 <= frames <= len(cameras):
        raise ValueError(f"{path}: {frames} cameras wanted, {len(cameras)} found; ask for that many at most or "
                         "give a longer trajectory")
    if not 0 < pose_scale < math.inf:
        raise ValueError(f"{path}: the pose scale must be a positive number; found {pose_scale}")
    cameras = scale(check(cameras[:frames], str(path)), pose_scale, about="origin")
    return cameras.resized(size) if size is not None and size != cameras.size else cameras


def _json_object(source: str | Path) -> dict:
    """The object in a JSON file, or in `source` itself if that begins with a brace."""
    inline = isinstance(source, str) and source.lstrip("\ufeff \t\r\n").startswith("{")
    name = "the given JSON" if inline else str(source)
    record = parse_json(source, name) if inline else read_json(source)
    if not isinstance(record, dict):
        raise ValueError(f"{name}: expected a JSON object, found a {type(record).__name__}")
    return record


def _name_of(source: str | Path) -> str:
    return "the given JSON" if isinstance(source, str) and source.lstrip().startswith("{") else str(source)


def _numbers(value: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    """float64 array of this shape, or a ValueError that begins with `what`."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: expected numbers of shape {shape}, found {str(value)[:80]!r}") from error
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{what}: expected finite numbers of shape {shape}, found {array.shape}: "
                         f"{str(value)[:80]}")
    return array


def _picture_size(height: object, width: object, what: str) -> tuple[int, int]:
    numbers = _numbers([height, width], (2,), f"{what}: picture height and width")
    if (numbers < 1).any() or (numbers != numbers.round()).any():
        raise ValueError(f"{what}: a picture {numbers[0]:g} high and {numbers[1]:g} wide; both must be whole "
                         "positive pixels")
    return int(numbers[0]), int(numbers[1])


def _intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64)


def _without_skew(cameras: Cameras, path: str | Path) -> Tensor:
    """Corner-origin fx, fy, cx, cy (F, 4), float64."""
    K = to_corner_origin(cameras.K.double().cpu())
    if (K[:, 0, 1].abs() > 1e-6 * K[:, 0, 0]).any():
        raise ValueError(f"{path}: this format has no place for a skew of {float(K[:, 0, 1].abs().max()):.4g}; "
                         "save an npz")
    return torch.stack([K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]], 1)


# --------------------------------------------------------------------------------------------- the reference's npz

def load_npz(path: str | Path, frames: int | None = None, pose_scale: float = 1.0,
             size: tuple[int, int] | None = None, stored_size: tuple[int, int] | None = None) -> Cameras:
    """The first `frames` cameras of an npz: w2c (N, 4, 4), intrinsics (N, 3, 3), image_height, image_width.

    `stored_size` (height, width) is what the intrinsics refer to if the file doesn't say; without either it is an
    error. The rest is as in `load_cameras`.
    """
    path = Path(path)
    arrays = _npz_arrays(path)
    missing = [key for key in ("w2c", "intrinsics") if key not in arrays]
    if missing:
        raise ValueError(f"{path}: no {' and no '.join(missing)} in it, found {sorted(arrays)}; a trajectory has "
                         "w2c (N, 4, 4), intrinsics (N, 3, 3), image_height and image_width")
    if "image_height" in arrays and "image_width" in arrays:
        stored_size = _picture_size(arrays["image_height"].tolist(), arrays["image_width"].tolist(), str(path))
    elif stored_size is None:
        raise ValueError(f"{path}: no image_height and image_width, found {sorted(arrays)}; add them to the file "
                         "or say which picture size its intrinsics are for")
    tensors = []
    for key in ("w2c", "intrinsics"):
        if arrays[key].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {key} should hold numbers; found {arrays[key].dtype}")
        tensors.append(torch.from_numpy(arrays[key].astype(np.float32)))
    w2c, K = tensors
    if w2c.shape[1:] != (4, 4) or K.shape[1:] != (3, 3) or len(w2c) != len(K):
        raise ValueError(f"{path}: expected w2c (N, 4, 4) and intrinsics (N, 3, 3), found {tuple(w2c.shape)} and "
                         f"{tuple(K.shape)}; one camera and one intrinsic matrix per frame")
    return _finished(Cameras(w2c, K, stored_size), path, frames, pose_scale, size)


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: not an npz archive; save one with numpy.savez")
    with np.load(path, allow_pickle=False) as archive:
        try:
            return {key: archive[key] for key in archive.files}
        except (ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path}: an array in it can't be read ({error}); pickled Python objects are refused "
                             "because reading them runs their code, so save plain numbers") from error


def save_npz(path: str | Path, cameras: Cameras) -> None:
    """The cameras as a trajectory npz, float32."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, w2c=cameras.w2c.float().cpu().numpy(), intrinsics=cameras.K.float().cpu().numpy(),
                 image_height=np.int64(cameras.size[0]), image_width=np.int64(cameras.size[1]))


# -------------------------------------------------------------------------------------------------------- captions

def load_captions(source: str | Path) -> dict[int, str]:
    """First frame -> text, in order, from a JSON file or JSON text like {"0": "a street", "81": "a square"}."""
    captions: dict[int, str] = {}
    for key, text in _json_object(source).items():
        if not key.strip().isdecimal():
            raise ValueError(f"{_name_of(source)}: caption key {key!r} is not a frame number; keys say from which "
                             'frame on a text counts, as in "0" or "81"')
        if not isinstance(text, str):
            raise ValueError(f"{_name_of(source)}: the caption of frame {key} is not a text; found {text!r}")
        if int(key) in captions:
            raise ValueError(f"{_name_of(source)}: frame {int(key)} has two captions; keep one")
        captions[int(key)] = text
    if not captions:
        raise ValueError(f"{_name_of(source)}: there is no caption in it; add at least one for frame 0")
    return dict(sorted(captions.items()))


def caption_for_chunk(captions: dict[int, str], chunk_index: int, frames: int,
                      chunk_frames: int = CHUNK_FRAMES) -> str:
    """The text of a chunk of a video of `frames` frames: the latest that begins by the chunk's first new frame."""
    kept = [key for key in captions if key < frames]
    if not kept:
        raise ValueError(f"no caption begins within the video's {frames} frames (they begin at {sorted(captions)})"
                         "; add one for frame 0")
    first_new = min(chunk_frames * chunk_index + 1, frames - 1)
    return captions[max((key for key in kept if key <= first_new), default=min(kept))]


# ------------------------------------------------------------------------------------ the reference's camera paths

def load_camera_path(source: str | Path) -> CameraPath:
    """A camera path as the reference's viewer saves it, from a JSON file or JSON text.

    Times that are missing or don't increase are replaced by equal steps over the path's duration. Of a path planned in
    the Explorer (object `lyra2`) only its `before` counts here.
    """
    record, name = _json_object(source), _name_of(source)
    keys = record.get("path")
    if not isinstance(keys, list) or not keys:
        raise ValueError(f"{name}: a camera path needs a list of keyframes under 'path'; found {str(keys)[:80]}")
    order = record.get("spline_order", 3)
    if order not in (0, 1, 2, 3):
        raise ValueError(f"{name}: spline_order must be 0, 1, 2 or 3; found {order!r}")
    path = CameraPath(tuple(_path_key(key, f"{name}: keyframe {i}") for i, key in enumerate(keys)), int(order),
                      bool(record.get("loop", False)), bool(record.get("through_keys", False)), _before(record, name))
    stamps = [key.timestamp for key in path.keys]
    if stamps[0] >= 0 and all(a < b for a, b in pairwise(stamps)):
        return path
    seconds = float(_numbers(record.get("duration_seconds") or PATH_SECONDS, (), f"{name}: duration_seconds"))
    return spaced(path, seconds if seconds > 0 else PATH_SECONDS)


def _before(record: dict, name: str) -> PathKey | None:
    """Where a path that was planned in the Explorer came from (see `next_path`)."""
    plan = record.get("lyra2")
    before = plan.get("before") if isinstance(plan, dict) else None
    return None if before is None else _path_key(before, f"{name}: lyra2.before")


def _path_key(key: object, what: str) -> PathKey:
    if not isinstance(key, dict) or not {"R", "T", "fov"} <= key.keys():
        raise ValueError(f"{what}: needs R (quaternion x y z w), T and fov; found {str(key)[:80]}")
    x, y, z, w = _numbers(key["R"], (4,), f"{what}: R")
    if x * x + y * y + z * z + w * w < 1e-12:
        raise ValueError(f"{what}: R is the zero quaternion, which is no rotation; no turn is [0, 0, 0, 1]")
    fov = float(_numbers(key["fov"], (), f"{what}: fov"))
    if not 0 < fov < 180:
        raise ValueError(f"{what}: fov must be between 0 and 180 degrees; found {fov:g}")
    R = quaternion_to_rotation(torch.tensor([w, x, y, z], dtype=torch.float64))
    T = torch.from_numpy(_numbers(key["T"], (3,), f"{what}: T"))
    up = _numbers(key.get("up_dir", (0, 1, 0)), (3,), f"{what}: up_dir")
    return PathKey(torch.cat([R, T[:, None]], 1).float(), fov,
                   float(_numbers(key.get("timestamp", 0), (), f"{what}: timestamp")), tuple(up.tolist()))


def save_camera_path(path: str | Path, camera_path: CameraPath) -> None:
    """A camera path that the reference's viewer reads; it ignores `through_keys` and draws its own spline."""
    write_text(path, json.dumps(camera_path_record(camera_path), indent=1))


def camera_path_record(camera_path: CameraPath) -> dict:
    """A camera path as the JSON object that is saved."""
    keys = []
    for key in camera_path.keys:
        w, x, y, z = rotation_to_quaternion(key.c2w[:, :3].double().cpu()).tolist()
        keys.append({"R": [x, y, z, w], "T": key.c2w[:, 3].tolist(), "fov": key.fov, "timestamp": key.timestamp,
                     "up_dir": list(key.up)})
    record = {"loop": camera_path.loop, "time": 0.0, "duration_seconds": camera_path.duration,
              "spline_order": camera_path.spline_order, "path": keys}
    return {**record, "through_keys": True} if camera_path.through_keys else record


# ------------------------------------------------------------------------------------------------- transforms.json

def load_transforms(path: str | Path) -> Cameras:
    """The frames of a nerfstudio transforms.json, in the file's order; intrinsics per frame or for all of them."""
    record = _json_object(path)
    frames = record.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{path}: a transforms.json needs a list of frames; found {str(frames)[:80]}")
    c2w, K, sizes = [], [], set()
    for i, frame in enumerate(frames):
        what = f"{path}: frame {i}"
        if not isinstance(frame, dict) or "transform_matrix" not in frame:
            raise ValueError(f"{what}: needs a transform_matrix (4, 4); found {str(frame)[:80]}")
        lens = {**record, **frame}
        bent = {key: lens[key] for key in DISTORTIONS if lens.get(key)}
        if bent:
            raise ValueError(f"{what}: has the lens distortion {bent}; cameras here are pinholes, so undistort "
                             "the pictures first")
        c2w.append(_numbers(frame["transform_matrix"], (4, 4), f"{what}: transform_matrix"))
        sizes.add(_picture_size(lens.get("h"), lens.get("w"), what))
        K.append(_transforms_intrinsics(lens, what))
    return _corner_origin_cameras(flip_camera_axes(torch.from_numpy(np.stack(c2w))), K, sizes, path)


def _transforms_intrinsics(lens: dict, what: str) -> np.ndarray:
    """K (3, 3), corner origin; a focal length may be given as the horizontal field of view."""
    fx = lens.get("fl_x")
    if fx is None and lens.get("camera_angle_x") is not None:
        fx = 0.5 * lens["w"] / math.tan(float(_numbers(lens["camera_angle_x"], (), f"{what}: camera_angle_x")) / 2)
    if fx is None:
        raise ValueError(f"{what}: no focal length, neither fl_x nor camera_angle_x; add one")
    cx, cy = lens.get("cx", 0.5 * lens["w"]), lens.get("cy", 0.5 * lens["h"])
    return _intrinsics(*_numbers([fx, lens.get("fl_y", fx), cx, cy], (4,), f"{what}: fl_x, fl_y, cx, cy"))


def _corner_origin_cameras(c2w: Tensor, K: list[np.ndarray], sizes: set[tuple[int, int]],
                           path: str | Path) -> Cameras:
    """Checked cameras of float64 OpenCV camera-to-world (F, 4, 4) and corner-origin K (3, 3) of each."""
    if len(sizes) > 1:
        raise ValueError(f"{path}: pictures of different sizes {sorted(sizes)} (height, width); bring them to one "
                         "size first")
    (size,) = sizes
    backward = check(Cameras(c2w, from_corner_origin(torch.from_numpy(np.stack(K))), size), str(path))
    return Cameras(torch.linalg.inv(c2w).float(), backward.K.float(), size)


def save_transforms(path: str | Path, cameras: Cameras, names: Sequence[str] | None = None) -> None:
    """A nerfstudio transforms.json; `names` are the pictures' paths beside it."""
    names = _picture_names(cameras, names, "images/")
    c2w = flip_camera_axes(torch.linalg.inv(cameras.w2c.double().cpu()))
    frames = [{"file_path": name, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "transform_matrix": matrix}
              for name, (fx, fy, cx, cy), matrix
              in zip(names, _without_skew(cameras, path).tolist(), c2w.tolist(), strict=True)]
    record = {"camera_model": "PINHOLE", "w": cameras.size[1], "h": cameras.size[0], "frames": frames}
    write_text(path, json.dumps(record, indent=1))


def _picture_names(cameras: Cameras, names: Sequence[str] | None, folder: str) -> Sequence[str]:
    names = names or [f"{folder}frame_{i:05d}.png" for i in range(len(cameras))]
    if len(names) != len(cameras) or len(set(names)) != len(names):
        raise ValueError(f"{len(cameras)} cameras need as many different picture names; found {len(names)}, "
                         f"{len(set(names))} of them different")
    return names


# ----------------------------------------------------------------------------------------------------- COLMAP text

def load_colmap(folder: str | Path) -> Cameras:
    """The images of a COLMAP text model, sorted by name; `folder` has cameras.txt, or sparse/0 in it does."""
    folder = Path(folder)
    places = [place for place in (folder, folder / "sparse" / "0", folder / "sparse")
              if (place / "images.txt").is_file()]
    if not places or not (places[0] / "cameras.txt").is_file():
        found = sorted(child.name for child in folder.iterdir())[:8]
        raise ValueError(f"{folder}: needs cameras.txt and images.txt, found {found}; convert a binary model with "
                         "`colmap model_converter --output_type TXT`")
    lenses = _colmap_lenses(places[0] / "cameras.txt")
    images = sorted(_colmap_images(places[0] / "images.txt"), key=lambda image: image[0])
    if not images:
        raise ValueError(f"{places[0]}: images.txt has no image in it; was anything registered?")
    unknown = sorted({lens for _, lens, _ in images} - lenses.keys())
    if unknown:
        raise ValueError(f"{places[0]}: images.txt uses the cameras {unknown}, cameras.txt has {sorted(lenses)}; "
                         "both files must be of one model")
    w2c = torch.from_numpy(np.stack([w2c for _, _, w2c in images]))
    return _corner_origin_cameras(torch.linalg.inv(w2c), [lenses[lens][1] for _, lens, _ in images],
                                  {lenses[lens][0] for _, lens, _ in images}, folder)


def _uncommented(path: Path) -> list[str]:
    return [line for line in read_text(path).splitlines() if not line.startswith("#")]


def _colmap_lenses(path: Path) -> dict[str, tuple[tuple[int, int], np.ndarray]]:
    """Camera id -> picture size and corner-origin K (3, 3)."""
    lenses = {}
    for line in filter(str.strip, _uncommented(path)):
        number, model, width, height, *rest = line.split() + [""] * 3
        parameters = [value for value in rest if value]
        if model not in ("PINHOLE", "SIMPLE_PINHOLE"):
            raise ValueError(f"{path}: camera {number} has the model {model!r}; undistort with `colmap "
                             "image_undistorter`, which writes PINHOLE")
        values = _numbers(parameters, (4 if model == "PINHOLE" else 3,), f"{path}: camera {number}: parameters")
        lenses[number] = (_picture_size(height, width, f"{path}: camera {number}"),
                          _intrinsics(*(values if model == "PINHOLE" else values[[0, 0, 1, 2]])))
    return lenses


def _colmap_images(path: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, camera id and w2c (4, 4) of each image, in the file's order."""
    lines = iter(_uncommented(path))
    for line in lines:
        if not line.strip():
            continue
        fields = line.split(maxsplit=9)
        if len(fields) < 10:
            raise ValueError(f"{path}: expected 'id qw qx qy qz tx ty tz camera name', found {line[:80]!r}")
        values = torch.from_numpy(_numbers(fields[1:8], (7,), f"{path}: image {fields[0]}"))
        if values[:4].norm() < 1e-6:
            raise ValueError(f"{path}: image {fields[0]} has the zero quaternion, which is no rotation")
        w2c = torch.eye(4, dtype=torch.float64)
        w2c[:3, :3], w2c[:3, 3] = quaternion_to_rotation(values[:4]), values[4:]
        yield fields[9].strip(), fields[8], w2c.numpy()
        next(lines, None)       # the image's 2-D points, on a line that is there even if it is empty


def save_colmap(folder: str | Path, cameras: Cameras, names: Sequence[str] | None = None,
                points: Tensor | None = None, colors: Tensor | None = None) -> None:
    """A COLMAP text model; `points` (N, 3) in the world, `colors` (N, 3) from 0 to 255 or none for grey."""
    folder, names = Path(folder), _picture_names(cameras, names, "")
    lenses, used = torch.unique(_without_skew(cameras, folder), dim=0, return_inverse=True)
    height, width = cameras.size
    write_text(folder / "cameras.txt", "".join(
        f"{i + 1} PINHOLE {width} {height} {_spaced_numbers(lens)}\n" for i, lens in enumerate(lenses)))
    q = rotation_to_quaternion(cameras.w2c[:, :3, :3].double().cpu())
    poses = torch.cat([q, cameras.w2c[:, :3, 3].double().cpu()], 1)
    write_text(folder / "images.txt", "".join(
        f"{i + 1} {_spaced_numbers(pose)} {lens + 1} {name}\n\n"
        for i, (pose, lens, name) in enumerate(zip(poses, used.tolist(), names, strict=True))))
    points = torch.empty(0, 3) if points is None else points.cpu()
    colors = torch.full(points.shape, 128) if colors is None else colors.cpu()
    write_text(folder / "points3D.txt", "".join(
        f"{i + 1} {_spaced_numbers(point)} {red} {green} {blue} 0\n"
        for i, (point, (red, green, blue)) in enumerate(zip(points, colors.int().tolist(), strict=True))))


def _spaced_numbers(values: Tensor) -> str:
    return " ".join(f"{value:.12g}" for value in values.tolist())
