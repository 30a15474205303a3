"""COLMAP's text model: cameras.txt, images.txt, points3D.txt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import find, is_litter, natural, read_lines, write_text
from .camera import Cameras, c2w_of_file, quaternion_to_rotation, rotation_to_quaternion, to_corner_origin
from .records import (
    SCENE_UNITS,
    Note,
    PosedPictures,
    intrinsics,
    numbers,
    picture_size,
    posed,
    refuse_other_lenses,
    silent,
)

# the parameters of each lens model, in COLMAP's order; f stands for fx and fy
MODELS = {
    "SIMPLE_PINHOLE": "f cx cy",
    "PINHOLE": "fx fy cx cy",
    "SIMPLE_RADIAL": "f cx cy k1",
    "RADIAL": "f cx cy k1 k2",
    "OPENCV": "fx fy cx cy k1 k2 p1 p2",
    "FULL_OPENCV": "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6",
    "FOV": "fx fy cx cy omega",
    "SIMPLE_FISHEYE": "f cx cy",
    "FISHEYE": "fx fy cx cy",
    "OPENCV_FISHEYE": "fx fy cx cy k1 k2 k3 k4",
    "SIMPLE_RADIAL_FISHEYE": "f cx cy k1",
    "RADIAL_FISHEYE": "f cx cy k1 k2",
    "THIN_PRISM_FISHEYE": "fx fy cx cy k1 k2 p1 p2 k3 k4 sx1 sy1",
    "RAD_TAN_THIN_PRISM_FISHEYE": "fx fy cx cy k0 k1 k2 k3 k4 k5 p0 p1 s0 s1 s2 s3",
}
COUNT = re.compile(r"#\s*Number of (cameras|images):\s*(\d+)", re.IGNORECASE)
PLACES = ("", "sparse/0", "sparse", "0", "colmap/sparse/0")


def files_of_model(folder: Path) -> tuple[Path, Path] | None:
    """cameras.txt and images.txt of the model in a folder, in capitals or not, in it or in its sparse/0."""
    for place in PLACES:
        inner: Path | None = folder
        for part in filter(None, place.split("/")):
            inner = inner and find(inner, part)
        files = inner is not None and inner.is_dir() and (find(inner, "cameras.txt"), find(inner, "images.txt"))
        if files and all(files):
            return files
    return None


def read_colmap(folder: str | Path, undistorted: bool = False, on_note: Note = silent) -> PosedPictures:
    """The images of a COLMAP text model, in the order of their names; ValueError for what can't be a model of pinholes."""
    files = files_of_model(Path(folder))
    if files is None:
        found = sorted(child.name for child in Path(folder).iterdir() if not is_litter(child.name))[:8]
        raise ValueError(
            f"{folder}: needs cameras.txt and images.txt, found {found}; convert a binary model with "
            "`colmap model_converter --output_type TXT`"
        )
    lenses = dict(_lenses(files[0], undistorted, on_note))
    images, units = _images(files[1])
    images.sort(key=lambda image: natural(image[0]))
    if not images:
        raise ValueError(f"{files[1]}: has no image in it; was anything registered?")
    unknown = sorted({lens for _, lens, _ in images} - lenses.keys())
    if unknown:
        raise ValueError(
            f"{files[1]}: uses the cameras {unknown}, cameras.txt has {sorted(lenses)}; both files must be of one model"
        )
    sizes, Ks = zip(*(lenses[lens] for _, lens, _ in images), strict=True)
    w2c = torch.from_numpy(np.stack([w2c for _, _, w2c in images]))
    return posed(torch.linalg.inv(w2c), list(Ks), list(sizes), folder, units, [name for name, _, _ in images])


def _lines(path: Path, comments: list[str]) -> Iterator[str]:
    """The lines that are neither comments nor blank; comments are put into the list."""
    for line in map(str.strip, read_lines(path)):
        if line.startswith("#"):
            comments.append(line)
        elif line:
            yield line


def _check_count(path: Path, what: str, comments: list[str], found: int) -> None:
    promised = next((m[2] for m in map(COUNT.match, comments) if m and m[1].lower() == what), str(found))
    if promised.lstrip("0") != str(found).lstrip("0"):
        promised = promised[:20]
        raise ValueError(
            f"{path}: its header says {promised} {what}, found {found}; lines were cut off or joined, so export it again"
        )


def _lenses(path: Path, undistorted: bool, on_note: Note) -> Iterator[tuple[str, tuple[tuple[int, int], np.ndarray]]]:
    """Camera id, picture size and corner-origin K (3, 3)."""
    comments: list[str] = []
    lines = list(_lines(path, comments))
    _check_count(path, "cameras", comments, len(lines))
    for line in lines:
        identity, model, width, height, *parameters = [*line.split(), "", "", ""][: max(4, len(line.split()))]
        what = f"{path}: camera {identity}"
        if model.upper() not in MODELS:
            raise ValueError(
                f"{what} has the model {model!r}; undistort with `colmap image_undistorter`, which writes PINHOLE"
            )
        names = MODELS[model.upper()].split()
        values = numbers(parameters, (len(names),), f"{what}: parameters")
        lens = dict(zip(names, values.tolist(), strict=True))
        K = intrinsics(lens.get("fx", lens.get("f")), lens.get("fy", lens.get("f")), lens["cx"], lens["cy"])
        size = picture_size(height, width, what)
        refuse_other_lenses({"camera_model": model, **lens}, K, size, what, undistorted, on_note)
        yield identity, (size, K)


def _images(path: Path) -> tuple[list[tuple[str, str, np.ndarray]], str]:
    """Name, camera id and w2c (4, 4) of each image, in the file's order, and what distances are in, if the file says.

    After each image comes a line of its points, which is blank if it has none. Editors and scripts remove blank lines,
    so a line is known by what is on it, and the number of images is compared with the header.
    """
    found, comments, points_may_follow = [], [], False
    for line in _lines(path, comments):
        if points_may_follow and _is_points(line):
            points_may_follow = False
            continue
        found.append(_image(line, path))
        points_may_follow = True
    _check_count(path, "images", comments, len(found))
    return found, SCENE_UNITS if f"# Units: {SCENE_UNITS}" in comments else ""


def _is_points(line: str) -> bool:
    """Whether a line is x, y and the number of a point, over and over."""
    fields = line.split()
    return len(fields) % 3 == 0 and all(map(_is_number, fields)) and all(re.fullmatch(r"-?\d+", f) for f in fields[2::3])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _image(line: str, path: Path) -> tuple[str, str, np.ndarray]:
    fields = line.split(maxsplit=9)
    if len(fields) < 10:
        raise ValueError(f"{path}: expected 'id qw qx qy qz tx ty tz camera name', found {line[:80]!r}")
    values = torch.from_numpy(numbers(fields[1:8], (7,), f"{path}: image {fields[0]}"))
    if values[:4].norm() < 1e-6:
        raise ValueError(f"{path}: image {fields[0]} has the zero quaternion, which is no rotation")
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3, :3], w2c[:3, 3] = quaternion_to_rotation(values[:4]), values[4:]
    return fields[9].strip(), fields[8], w2c.numpy()


def save_colmap(
    folder: str | Path,
    cameras: Cameras,
    names: Sequence[str] | None = None,
    points: Tensor | None = None,
    colors: Tensor | None = None,
) -> None:
    """A COLMAP text model; `points` (N, 3) in the world, `colors` (N, 3) from 0 to 255 or none for grey."""
    folder, names = Path(folder), picture_names(cameras, names, "")
    lenses, used = torch.unique(without_skew(cameras, folder), dim=0, return_inverse=True)
    height, width = cameras.size
    lines = [f"{i + 1} PINHOLE {width} {height} {_spaced_numbers(lens)}\n" for i, lens in enumerate(lenses)]
    write_text(folder / "cameras.txt", "".join([f"# Number of cameras: {len(lines)}\n", *lines]))
    w2c = torch.linalg.inv(c2w_of_file(cameras))
    poses = torch.cat([rotation_to_quaternion(w2c[:, :3, :3]), w2c[:, :3, 3]], 1)
    images = [
        f"{i + 1} {_spaced_numbers(pose)} {lens + 1} {name}\n\n"
        for i, (pose, lens, name) in enumerate(zip(poses, used.tolist(), names, strict=True))
    ]
    write_text(folder / "images.txt", "".join([f"# Number of images: {len(images)}\n# Units: {SCENE_UNITS}\n", *images]))
    points = torch.empty(0, 3) if points is None else points.cpu().double() + torch.tensor(cameras.origin).double()
    colors = torch.full(points.shape, 128) if colors is None else colors.cpu()
    write_text(
        folder / "points3D.txt",
        "".join(
            f"{i + 1} {_spaced_numbers(point)} {red} {green} {blue} 0\n"
            for i, (point, (red, green, blue)) in enumerate(zip(points, colors.int().tolist(), strict=True))
        ),
    )


def picture_names(cameras: Cameras, names: Sequence[str] | None, folder: str) -> Sequence[str]:
    """As many different names as cameras, made up if none are given."""
    names = names or [f"{folder}frame_{i:05d}.png" for i in range(len(cameras))]
    if len(names) != len(cameras) or len(set(names)) != len(names):
        raise ValueError(
            f"{len(cameras)} cameras need as many different picture names; found {len(names)}, "
            f"{len(set(names))} of them different"
        )
    return names


def without_skew(cameras: Cameras, path: str | Path) -> Tensor:
    """Corner-origin fx, fy, cx, cy (F, 4), float64; ValueError for what such a format has no place for."""
    K = to_corner_origin(cameras.K.double().cpu())
    if (K[:, 0, 1].abs() > 1e-6 * K[:, 0, 0]).any():
        raise ValueError(
            f"{path}: this format has no place for a skew of {float(K[:, 0, 1].abs().max()):.4g}; save an npz"
        )
    return torch.stack([K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2]], 1)


def _spaced_numbers(values: Tensor) -> str:
    return " ".join(f"{value:.15g}" for value in values.tolist())
