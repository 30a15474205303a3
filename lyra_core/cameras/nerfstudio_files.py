"""nerfstudio's transforms.json, as COLMAP scripts, Blender add-ons and instant-ngp write it too, and its viewer's camera path."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..files import natural, write_text
from .camera import Cameras, c2w_of_file, flip_camera_axes
from .colmap_files import picture_names, without_skew
from .records import (
    SCENE_UNITS,
    Note,
    PosedPictures,
    field_of_view,
    given,
    intrinsics,
    number,
    picture_size,
    pose_matrix,
    posed,
    refuse_other_lenses,
    silent,
)

Size = tuple[int, int]


def read_transforms(
    record: dict, path: str | Path, size: Size | None = None, undistorted: bool = False, on_note: Note = silent
) -> PosedPictures:
    """The frames of a transforms.json in the order of their file names; intrinsics per frame or for all of them.

    `size` (height, width) is that of the pictures if the file doesn't say and gives its lens as an angle.
    """
    frames = record.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{path}: a transforms.json needs a list of frames; found {str(frames)[:80]}")
    for i, frame in enumerate(frames):
        if not isinstance(frame, dict) or frame.get("transform_matrix") is None:
            raise ValueError(f"{path}: frame {i}: needs a transform_matrix (4, 4); found {str(frame)[:80]}")
    names = [str(frame.get("file_path") or "") for frame in frames]
    order = list(range(len(frames)))
    if all(names):
        order.sort(key=lambda i: natural(names[i].removeprefix("./")))
        if order != sorted(order):
            on_note(f"{path}: put in the order of its file names, {names[order[0]]} first")
    elif any(names):
        on_note(f"{path}: left in the file's order, as not every frame has a file_path")
    c2w, Ks, sizes = [], [], []
    for i in order:
        lens, what = {**given(record), **given(frames[i])}, f"{path}: frame {i}"
        its_size = _size_of(lens, size, what)
        K = _intrinsics_of(lens, its_size, what)
        refuse_other_lenses(lens, K, its_size, what, undistorted, on_note if i == order[0] else silent)
        c2w.append(pose_matrix(frames[i]["transform_matrix"], f"{what}: transform_matrix"))
        Ks.append(K)
        sizes.append(its_size)
    opencv = flip_camera_axes(torch.from_numpy(np.stack(c2w)))
    return posed(opencv, Ks, sizes, path, record.get("units", ""), [names[i] for i in order])


def _size_of(lens: dict, asked: Size | None, what: str) -> Size:
    if "h" in lens and "w" in lens:
        return picture_size(lens["h"], lens["w"], what)
    missing = " and ".join(key for key in ("w", "h") if key not in lens)
    pixels = [key for key in ("fl_x", "fl_y", "cx", "cy") if key in lens]
    if asked is None or pixels:
        why = f", and {', '.join(pixels)} can't be read without them" if pixels else ""
        raise ValueError(
            f"{what}: no picture height and width, {missing} missing{why}; add w and h, the size of the pictures in pixels"
        )
    return asked


def _intrinsics_of(lens: dict, size: Size, what: str) -> np.ndarray:
    """K (3, 3), corner origin; a focal length may be given as a field of view."""
    focal: dict[str, float] = {}
    for axis, side in (("x", size[1]), ("y", size[0])):
        if f"fl_{axis}" in lens:
            focal[axis] = number(lens[f"fl_{axis}"], f"{what}: fl_{axis}")
        elif f"camera_angle_{axis}" in lens:
            angle = number(lens[f"camera_angle_{axis}"], f"{what}: camera_angle_{axis}")
            if not 0 < angle < math.pi:
                raise ValueError(f"{what}: camera_angle_{axis} must be between 0 and pi radians; found {angle:g}")
            focal[axis] = 0.5 * side / math.tan(angle / 2)
    if not focal:
        raise ValueError(f"{what}: no focal length, neither fl_x nor camera_angle_x; add one")
    one = next(iter(focal.values()))
    middle = (number(lens.get(key, 0.5 * side), f"{what}: {key}") for key, side in (("cx", size[1]), ("cy", size[0])))
    return intrinsics(focal.get("x", one), focal.get("y", one), *middle)


def save_transforms(path: str | Path, cameras: Cameras, names: Sequence[str] | None = None) -> None:
    """A nerfstudio transforms.json; `names` are the pictures' paths beside it."""
    names = picture_names(cameras, names, "images/")
    c2w = flip_camera_axes(c2w_of_file(cameras))
    frames = [
        {"file_path": name, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "transform_matrix": matrix}
        for name, (fx, fy, cx, cy), matrix in zip(
            names, without_skew(cameras, path).tolist(), c2w.tolist(), strict=True
        )
    ]
    record = {"camera_model": "PINHOLE", "w": cameras.size[1], "h": cameras.size[0]}
    record |= {"units": SCENE_UNITS, "frames": frames}
    write_text(path, json.dumps(record, indent=1))


# ----------------------------------------------------------------------------------------------- the viewer's camera path


def read_viewer_path(
    record: dict, path: str | Path, size: Size | None = None, undistorted: bool = False, on_note: Note = silent
) -> PosedPictures:
    """The frames of the camera path that nerfstudio's viewer renders, one after the other; square pixels, as it renders."""
    frames = record.get("camera_path")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{path}: a viewer's camera path needs a list 'camera_path'; found {str(frames)[:80]}")
    said = given(record)
    if "render_height" in said and "render_width" in said:
        size = picture_size(said["render_height"], said["render_width"], str(path))
    elif size is None:
        raise ValueError(f"{path}: no render_height and render_width; add them, or ask for a picture size")
    lens = {key: value for key, value in said.items() if key not in ("camera_path", "keyframes")}
    c2w, Ks = [], []
    for i, frame in enumerate(frames):
        what = f"{path}: frame {i}"
        if not isinstance(frame, dict) or not {"camera_to_world", "fov"} <= given(frame).keys():
            raise ValueError(f"{what}: needs camera_to_world (16 numbers) and fov; found {str(frame)[:80]}")
        fov = field_of_view(frame["fov"], f"{what}: fov")
        focal = 0.5 * size[0] / math.tan(math.radians(fov) / 2)
        K = intrinsics(focal, focal, size[1] / 2, size[0] / 2)
        refuse_other_lenses({**lens, **given(frame)}, K, size, what, undistorted, on_note if i == 0 else silent)
        c2w.append(pose_matrix(frame["camera_to_world"], f"{what}: camera_to_world"))
        Ks.append(K)
    aspect = number(frames[0].get("aspect") or size[1] / size[0], f"{path}: frame 0: aspect")
    if abs(aspect / (size[1] / size[0]) - 1) > 0.01:
        on_note(f"{path}: drawn for an aspect of {aspect:.3g}, rendered at {size[1]}x{size[0]} with square pixels")
    opencv = flip_camera_axes(torch.from_numpy(np.stack(c2w)))
    return posed(opencv, Ks, [size] * len(Ks), path)
