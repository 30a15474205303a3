"""Camera files: one door for the reference's npz and camera paths, nerfstudio's files and COLMAP's text model.

What is read is checked; what is wrong is refused with the file, the value and a way out. Cameras of maps, whose
coordinates single precision can't hold, are moved near the origin; `Cameras.origin` says by how much, and every writer
moves them back.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..array_files import read_npz as read_arrays
from ..files import find, parse_json, read_json, reading, replacing, stays_inside, write_text
from .camera import Cameras, c2w_of_file, near_origin, quaternion_to_rotation, rotation_to_quaternion
from .camera_path import CameraPath, PathKey, path_cameras, spaced
from .colmap_files import files_of_model, read_colmap
from .colmap_files import save_colmap as save_colmap
from .nerfstudio_files import read_transforms, read_viewer_path
from .nerfstudio_files import save_transforms as save_transforms
from .records import (
    SCENE_UNITS,
    Note,
    PosedPictures,
    field_of_view,
    given,
    number,
    numbers,
    picture_size,
    position,
    refuse_other_lenses,
    silent,
)
from .trajectory import scale

PATH_SECONDS = 5.0  # how long a camera path without usable times takes
CURVES = ("as the file says", "through the keyframes", "B-spline")
FITS = ("stretch", "crop")
TRANSFORMS = "transforms.json"
LONGEST_NAME = 240  # characters of a file's name, less an ending; systems take 255
PICTURES = ("", ".png", ".jpg", ".jpeg", ".JPG", ".PNG", ".webp")  # endings that a name may lack

Size = tuple[int, int]


def load_cameras(
    path: str | Path,
    frames: int | None = None,
    pose_scale: float = 1.0,
    size: Size | None = None,
    stored_size: Size | None = None,
    curve: str = CURVES[0],
    motion: str = "uniform motion",
    fit: str = FITS[0],
    undistorted: bool = False,
    on_note: Note = silent,
) -> Cameras:
    """Cameras from an npz, a camera-path or transforms.json, or a COLMAP folder, whichever `path` is.

    `frames`: so many from the beginning, or of the whole camera path. `pose_scale` multiplies distances from the
    world's origin. `size` (height, width): the cameras of pictures stretched to it, or with `fit` "crop" enlarged evenly and
    cut. `stored_size`: see `load_npz`. `undistorted`: see `refuse_other_lenses`. For camera paths: `curve`, one of CURVES,
    and `motion`, how frames are spread over it (see `camera_path.resample`). on_note is told what to know of the result.
    """
    for what, value, choices in (("curve", curve, CURVES), ("fit", fit, FITS)):
        if value not in choices:
            raise ValueError(f"there is no {what} {value!r}; choose one of {', '.join(choices)}")
    with reading(path):
        return _load(Path(path), frames, pose_scale, size, stored_size, curve, motion, fit, undistorted, on_note)


def _load(
    path: Path,
    frames: int | None,
    pose_scale: float,
    size: Size | None,
    stored_size: Size | None,
    curve: str,
    motion: str,
    fit: str,
    undistorted: bool,
    on_note: Note,
) -> Cameras:
    wanted = (path, frames, pose_scale, size, fit, on_note)
    if path.is_dir():
        if files_of_model(path) is None and find(path, TRANSFORMS):
            wanted, path = (find(path, TRANSFORMS), *wanted[1:]), find(path, TRANSFORMS)
        else:
            return _finished(read_colmap(path, undistorted, on_note), *wanted)
    kind = path.suffix.lower() or path.resolve().suffix.lower()
    if kind == ".npz":
        return _finished(read_npz(path, stored_size, undistorted, on_note), *wanted)
    if kind != ".json":
        raise ValueError(
            f"{path}: can't read cameras from a file of type {path.suffix!r}; give an .npz, a .json "
            "(camera path or transforms.json) or a COLMAP folder with cameras.txt and images.txt"
        )
    record = given(_json_object(path))
    for key, read in (("frames", read_transforms), ("camera_path", read_viewer_path)):
        if key in record:
            return _finished(read(record, path, size, undistorted, on_note), *wanted)
    if "path" not in record:
        raise ValueError(
            f"{path}: neither a camera path (key 'path', or 'camera_path' of nerfstudio's viewer) nor a transforms.json "
            f"(key 'frames'); found the keys {sorted(record)[:8]}"
        )
    if frames is None or size is None:
        raise ValueError(
            f"{path}: a camera path has neither frames nor a picture size of its own; give `frames` "
            f"and `size`, found {frames} and {size}"
        )
    camera_path = load_camera_path(path)
    if curve != CURVES[0]:
        camera_path = replace(camera_path, through_keys=curve == CURVES[1])
    return _scaled(path_cameras(camera_path, size, frames, motion), path, pose_scale, record.get("units"), on_note)


def pictures_of(path: str | Path) -> list[Path]:
    """The pictures of a capture, a transforms.json or a COLMAP folder, in the order of its cameras; ValueError without them.

    They lie where the file says, beside it, or in a folder `images`; an ending may be left out.
    """
    with reading(path):
        return _pictures_of(Path(path))


def _pictures_of(path: Path) -> list[Path]:
    inner = find(path, TRANSFORMS) if path.is_dir() and files_of_model(path) is None else None
    path = inner or path
    record = None if path.is_dir() else given(_json_object(path)) if path.suffix.lower() == ".json" else {}
    if record is not None and "frames" not in record:
        raise ValueError(f"{path}: has no pictures; a capture is a transforms.json, or a COLMAP folder with its pictures")
    # the lens has no say in where the pictures are
    names = (read_colmap(path, True) if record is None else read_transforms(record, path, (1, 1), True)).names
    base = path if path.is_dir() else path.parent
    found = [_picture(base, name) for name in names]
    if missing := [name or "a frame without file_path" for name, file in zip(names, found, strict=True) if file is None]:
        raise ValueError(f"{path}: {len(missing)} of {len(names)} pictures are not there: {', '.join(missing[:3])}; put them into {base}")
    return found


def _picture(base: Path, name: str) -> Path | None:
    """The picture of this name in a folder; never one outside of it."""
    name = Path(name.replace("\\", "/")).as_posix()
    if max(map(len, name.split("/"))) > LONGEST_NAME:
        return None
    for place in (name, f"images/{name}", f"images/{Path(name).name}", Path(name).name) if name else ():
        for ending in PICTURES:
            file = base / f"{place}{ending}"
            if stays_inside(place) and file.is_file():
                return file
    return None


def files_read(path: str | Path) -> list[Path]:
    """The files that `load_cameras` would read."""
    path = Path(path)
    found = files_of_model(path) or [find(path, TRANSFORMS)] if path.is_dir() else [path]
    return [file for file in found if file]


def load_transforms(path: str | Path, size: Size | None = None) -> Cameras:
    """The frames of a transforms.json; pictures of one size."""
    with reading(path):
        return _finished(read_transforms(given(_json_object(path)), path, size), Path(path))


def load_colmap(folder: str | Path) -> Cameras:
    """The images of a COLMAP text model; pictures of one size."""
    with reading(folder):
        return _finished(read_colmap(folder), Path(folder))


def _finished(
    pictures: PosedPictures,
    path: Path,
    frames: int | None = None,
    pose_scale: float = 1.0,
    size: Size | None = None,
    fit: str = FITS[0],
    on_note: Note = silent,
) -> Cameras:
    """The first `frames` cameras, checked, near the origin, scaled about it, all for pictures of one size."""
    if frames is not None and not 1 <= frames <= len(pictures.w2c):
        raise ValueError(
            f"{path}: {frames} cameras wanted, {len(pictures.w2c)} found; ask for that many at most or "
            "give a longer trajectory"
        )
    pictures = pictures.first(frames).checked(path)
    if len(set(pictures.sizes)) > 1 and size is None:
        raise ValueError(
            f"{path}: pictures of different sizes {sorted(set(pictures.sizes))} (height, width); ask for one size"
        )
    w2c, K = pictures.w2c, pictures.K.clone()
    for chosen, cameras in pictures.in_one_size():
        _note_shape(cameras, size, fit, path, on_note)
        if size is not None and size != cameras.size:
            K[chosen] = (cameras.resized if fit == "stretch" else cameras.cropped)(size).K
    c2w, origin = near_origin(torch.linalg.inv(w2c))
    if any(origin):
        on_note(f"{path}: coordinates of a map; {_text(origin)} was taken off, and is put back when the cameras are saved")
        w2c = torch.linalg.inv(c2w)
    cameras = Cameras(w2c.float(), K.float(), size or pictures.sizes[0], origin)
    return _scaled(cameras, path, pose_scale, pictures.units, on_note)


def _scaled(cameras: Cameras, path: Path, pose_scale: float, units: object, on_note: Note) -> Cameras:
    if not 0 < pose_scale < math.inf:
        raise ValueError(f"{path}: the pose scale must be a positive number; found {pose_scale}")
    if pose_scale == 1:
        return cameras
    if units == SCENE_UNITS:
        on_note(f"{path}: was saved in the scene units of a world; pose_scale {pose_scale:g} takes it off that world's path")
    return scale(cameras, pose_scale, about="origin")


def _text(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" if abs(value) < 1e5 else f"{value:.0f}" for value in values) + ")"


def _note_shape(cameras: Cameras, size: Size | None, fit: str, path: Path, on_note: Note) -> None:
    (height, width), K = cameras.size, cameras.K[0]
    aspect = float(K[0, 0] / K[1, 1])
    if abs(aspect - 1) > 0.02:
        on_note(f"{path}: its lens has fx {K[0, 0]:.4g} and fy {K[1, 1]:.4g}; its pictures look {aspect:.3g} times as wide as life")
    if size is not None and abs(size[1] * height / (size[0] * width) - 1) > 0.02:
        done = "stretched" if fit == "stretch" else "cropped around their middle"
        on_note(f"{path}: cameras of pictures of {width}x{height}, for the same pictures {done} to {size[1]}x{size[0]}")


def _json_object(source: str | Path) -> dict:
    """The object in a JSON file, or in `source` itself if that begins with a brace."""
    inline, name = _is_inline(source), _name_of(source)
    record = parse_json(source, name) if inline else read_json(source)
    if not isinstance(record, dict):
        raise ValueError(f"{name}: expected a JSON object, found a {type(record).__name__}")
    return record


def _is_inline(source: str | Path) -> bool:
    return isinstance(source, str) and source.lstrip("\ufeff \t\r\n").startswith("{")


def _name_of(source: str | Path) -> str:
    return "the given JSON" if _is_inline(source) else str(source)


# --------------------------------------------------------------------------------------------- the reference's npz


def load_npz(
    path: str | Path,
    frames: int | None = None,
    pose_scale: float = 1.0,
    size: Size | None = None,
    stored_size: Size | None = None,
) -> Cameras:
    """The first `frames` cameras of an npz: w2c (N, 4, 4), intrinsics (N, 3, 3), image_height, image_width.

    `stored_size` (height, width) is what the intrinsics refer to if the file doesn't say; without either it is an
    error. The rest is as in `load_cameras`.
    """
    with reading(path):
        return _finished(read_npz(Path(path), stored_size), Path(path), frames, pose_scale, size)


def read_npz(
    path: Path, stored_size: Size | None = None, undistorted: bool = False, on_note: Note = silent
) -> PosedPictures:
    """What an npz says; whether its lenses can be of its pictures is not asked yet."""
    arrays = read_arrays(path)
    missing = [key for key in ("w2c", "intrinsics") if key not in arrays]
    if missing:
        raise ValueError(
            f"{path}: no {' and no '.join(missing)} in it, found {sorted(arrays)}; a trajectory has "
            "w2c (N, 4, 4), intrinsics (N, 3, 3), image_height and image_width"
        )
    for key in ("w2c", "intrinsics"):
        if arrays[key].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {key} should hold numbers; found {arrays[key].dtype}")
    w2c, K = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("w2c", "intrinsics"))
    if w2c.ndim == 3 and w2c.shape[1:] == (3, 4):
        w2c = torch.cat([w2c, w2c.new_tensor([0, 0, 0, 1]).expand(len(w2c), 1, 4)], 1)
    if K.shape in ((3, 3), (1, 3, 3)):  # one lens for all
        K = K.expand(len(w2c), 3, 3)
    if w2c.ndim != 3 or w2c.shape[1:] != (4, 4) or K.shape != (len(w2c), 3, 3):
        raise ValueError(
            f"{path}: expected w2c (N, 4, 4) and intrinsics (N, 3, 3), found {tuple(w2c.shape)} and "
            f"{tuple(K.shape)}; one camera and one intrinsic matrix per frame"
        )
    sizes = _npz_sizes(arrays, len(w2c), stored_size, path)
    if len(w2c):
        lens = {key: value.item() if value.size == 1 else value for key, value in arrays.items()}
        refuse_other_lenses(lens, K[0].numpy(), sizes[0], str(path), undistorted, on_note)
    return PosedPictures(w2c, K, sizes, str(arrays.get("units", "")))


def _npz_sizes(arrays: dict[str, np.ndarray], frames: int, stored_size: Size | None, path: Path) -> tuple[Size, ...]:
    if "image_height" not in arrays or "image_width" not in arrays:
        if stored_size is None:
            raise ValueError(
                f"{path}: no image_height and image_width, found {sorted(arrays)}; add them to the file "
                "or say which picture size its intrinsics are for"
            )
        return (stored_size,) * frames
    height, width = (arrays[key] for key in ("image_height", "image_width"))
    if height.dtype.kind not in "fiu" or width.dtype.kind not in "fiu":
        raise ValueError(f"{path}: image_height and image_width should be numbers; found {height.dtype} and {width.dtype}")
    if height.shape == width.shape == (frames,) and frames > 1:
        return tuple(picture_size(h, w, str(path)) for h, w in zip(height.tolist(), width.tolist(), strict=True))
    return (picture_size(height.tolist(), width.tolist(), str(path)),) * frames


def save_npz(path: str | Path, cameras: Cameras) -> None:
    """The cameras as a trajectory npz: float32, or float64 in the coordinates of the map that they came from."""
    w2c = torch.linalg.inv(c2w_of_file(cameras)) if any(cameras.origin) else cameras.w2c.float().cpu()
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            w2c=w2c.numpy(),
            intrinsics=cameras.K.float().cpu().numpy(),
            image_height=np.int64(cameras.size[0]),
            image_width=np.int64(cameras.size[1]),
            units=np.str_(SCENE_UNITS),
        )


# ------------------------------------------------------------------------------------ the reference's camera paths


def load_camera_path(source: str | Path) -> CameraPath:
    """A camera path as the reference's viewer saves it, from a JSON file or JSON text; see `camera_path_of`."""
    return camera_path_of(_json_object(source), _name_of(source))


def camera_path_of(said: dict, name: str) -> CameraPath:
    """The camera path that a JSON object of this name says.

    Times that are missing or don't increase are replaced by equal steps over the path's duration. Of a path planned in
    the Explorer (object `lyra2`) only its `before` counts here.
    """
    with reading(name):
        return _camera_path(given(said), name)


def _camera_path(record: dict, name: str) -> CameraPath:
    keys = record.get("path")
    if not isinstance(keys, list) or not keys:
        raise ValueError(f"{name}: a camera path needs a list of keyframes under 'path'; found {str(keys)[:80]}")
    order = record.get("spline_order", 3)
    if order not in (0, 1, 2, 3):
        raise ValueError(f"{name}: spline_order must be 0, 1, 2 or 3; found {order!r}")
    found = [_path_key(key, f"{name}: keyframe {i}") for i, key in enumerate(keys)]
    before = _before(record, name)
    c2w, origin = near_origin(torch.stack([key.c2w for key in (*found, *before)]))
    moved = [replace(key, c2w=its.float()) for key, its in zip((*found, *before), c2w, strict=True)]
    path = CameraPath(
        tuple(moved[: len(found)]),
        int(order),
        bool(record.get("loop", False)),
        bool(record.get("through_keys", False)),
        moved[-1] if before else None,
        origin,
    )
    stamps = [key.timestamp for key in path.keys]
    if stamps[0] >= 0 and all(a < b for a, b in pairwise(stamps)):
        return path
    seconds = number(record.get("duration_seconds") or PATH_SECONDS, f"{name}: duration_seconds")
    return spaced(path, seconds if seconds > 0 else PATH_SECONDS)


def _before(record: dict, name: str) -> tuple[PathKey, ...]:
    """Where a path that was planned in the Explorer came from (see `next_path`), if it says."""
    plan = record.get("lyra2")
    before = plan.get("before") if isinstance(plan, dict) else None
    return () if before is None else (_path_key(before, f"{name}: lyra2.before"),)


def _path_key(key: object, what: str) -> PathKey:
    key = given(key) if isinstance(key, dict) else key
    if not isinstance(key, dict) or not {"R", "T", "fov"} <= key.keys():
        raise ValueError(f"{what}: needs R (quaternion x y z w), T and fov; found {str(key)[:80]}")
    x, y, z, w = numbers(key["R"], (4,), f"{what}: R")
    if x * x + y * y + z * z + w * w < 1e-12:
        raise ValueError(f"{what}: R is the zero quaternion, which is no rotation; no turn is [0, 0, 0, 1]")
    fov = field_of_view(key["fov"], f"{what}: fov")
    R = quaternion_to_rotation(torch.tensor([w, x, y, z], dtype=torch.float64))
    T = position(key["T"], f"{what}: T")
    return PathKey(
        torch.cat([R, T[:, None]], 1),
        fov,
        number(key.get("timestamp", 0), f"{what}: timestamp"),
        tuple(numbers(key.get("up_dir", (0, 1, 0)), (3,), f"{what}: up_dir").tolist()),
        number(key.get("pixel_aspect", 1), f"{what}: pixel_aspect"),
        tuple(numbers(key.get("shift", (0, 0)), (2,), f"{what}: shift").tolist()),
    )


def save_camera_path(path: str | Path, camera_path: CameraPath) -> None:
    """A camera path that the reference's viewer reads.

    It ignores `through_keys` and draws its own spline, and it has no place for lenses of other than square pixels and
    with the principal point beside the middle: keyframes say that in further keys, pixel_aspect and shift, for us.
    """
    write_text(path, json.dumps({"units": SCENE_UNITS, **camera_path_record(camera_path)}, indent=1))


def camera_path_record(camera_path: CameraPath) -> dict:
    """A camera path as the JSON object that is saved."""
    origin, keys = torch.tensor(camera_path.origin).double(), []
    for key in camera_path.keys:
        w, x, y, z = rotation_to_quaternion(key.c2w[:, :3].double().cpu()).tolist()
        T = (key.c2w[:, 3].double().cpu() + origin if any(camera_path.origin) else key.c2w[:, 3]).tolist()
        keys.append({"R": [x, y, z, w], "T": T, "fov": key.fov, "timestamp": key.timestamp, "up_dir": list(key.up)})
        if key.pixel_aspect != 1:
            keys[-1]["pixel_aspect"] = key.pixel_aspect
        if any(key.shift):
            keys[-1]["shift"] = list(key.shift)
    record = {
        "loop": camera_path.loop,
        "time": 0.0,
        "duration_seconds": camera_path.duration,
        "spline_order": camera_path.spline_order,
        "path": keys,
    }
    return {**record, "through_keys": True} if camera_path.through_keys else record
