"""The host's own cameras (LOAD3D_CAMERA): a dict per camera, y up, looking down -z, and no picture size.

    {"position": {x, y, z}, "target": {x, y, z}, "quaternion": {x, y, z, w}, "fov": degrees, "zoom": 1, "cameraType": ...}

Its world is ours turned half around x: (x, -y, -z). So it is for the host's splats too, which is why its renderer shows a
splat of ours at the pixel where ours does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .camera import (
    AXES_FLIP,
    Cameras,
    check,
    from_corner_origin,
    quaternion_to_rotation,
    rotation_to_quaternion,
    to_corner_origin,
)
from .records import given, number, numbers, position

FOVS = ("vertical", "shorter side")  # what `fov` is of: in the host's 3D viewers, and in its splat renderer
DEEPEST = 8  # lists of cameras in each other
FOV = 35.0  # degrees: the host's own, where a camera doesn't say


def from_load3d(cameras: Mapping | Iterable, size: tuple[int, int], fov_of: str = FOVS[0]) -> Cameras:
    """Cameras for pictures of `size` (height, width) of one of the host's, or of several in any nesting of lists.

    `fov_of` is one of FOVS. ValueError for what is no perspective camera.
    """
    records = list(_flat(cameras))
    if not records:
        raise ValueError("there is no camera in this LOAD3D_CAMERA; move the view of the 3D node once, or connect another")
    c2w = torch.stack([_c2w_of(record, f"camera {i}") for i, record in enumerate(records)])
    K = torch.stack([_K_of(record, size, fov_of, f"camera {i}") for i, record in enumerate(records)])
    w2c = torch.linalg.inv(c2w)
    return check(Cameras(w2c.float(), from_corner_origin(K).float(), size), "LOAD3D_CAMERA")


def _flat(cameras: object, depth: int = 0) -> Iterable[Mapping]:
    if isinstance(cameras, Mapping):
        yield given(cameras)
    elif isinstance(cameras, (list, tuple)) and depth < DEEPEST:
        for camera in cameras:
            yield from _flat(camera, depth + 1)
    elif cameras is not None:
        raise ValueError(
            f"expected a LOAD3D_CAMERA, a dict or a list of dicts, found a {type(cameras).__name__}{' in many lists' * (depth > 1)}"
        )


def _c2w_of(record: Mapping, what: str) -> Tensor:
    """(4, 4) float64, OpenCV axes."""
    if str(record.get("cameraType", "perspective")).lower().startswith("ortho"):
        raise ValueError(f"{what} is orthographic; cameras here are pinholes, so switch the 3D view to perspective")
    place = _xyz(record.get("position"), f"{what}: position")
    if "quaternion" in record:
        if not isinstance(record["quaternion"], Mapping):
            raise ValueError(f"{what}: quaternion: expected x, y, z and w, found {str(record['quaternion'])[:80]}")
        x, y, z, w = (number(given(record["quaternion"]).get(k, k == "w"), f"{what}: quaternion") for k in "xyzw")
        q = torch.tensor([w, x, y, z], dtype=torch.float64)
        if q.norm() < 1e-6:
            raise ValueError(f"{what} has the zero quaternion, which is no rotation")
        R = quaternion_to_rotation(q)
    else:
        R = _looking(place, _xyz(record.get("target"), f"{what}: target"), what)
    flip = torch.tensor(AXES_FLIP, dtype=torch.float64)
    c2w = torch.eye(4, dtype=torch.float64)
    c2w[:3, :3], c2w[:3, 3] = flip[:, None] * R * flip, flip * place
    return c2w


def _xyz(point: object, what: str) -> Tensor:
    point = given(point) if isinstance(point, Mapping) else {}
    return position([point.get(axis, 0.0) for axis in "xyz"], what)


def _looking(place: Tensor, target: Tensor, what: str) -> Tensor:
    """The rotation (3, 3) of three.js's lookAt: y up, or z where that is the way it looks."""
    back = place - target
    if back.norm() < 1e-9:
        raise ValueError(f"{what} stands at its target and has no quaternion, so nothing says where it looks")
    back = back / back.norm()
    up = torch.tensor([0.0, 1, 0], dtype=torch.float64)
    if abs(float(back @ up)) > 0.999:
        up = torch.tensor([0.0, 0, 1], dtype=torch.float64)
    right = torch.linalg.cross(up, back)
    right = right / right.norm()
    return torch.stack([right, torch.linalg.cross(back, right), back], 1)


def _K_of(record: Mapping, size: tuple[int, int], fov_of: str, what: str) -> Tensor:
    """(3, 3) float64 with the origin in the picture's corner."""
    fov = number(record.get("fov") or FOV, f"{what}: fov")
    zoom = number(record.get("zoom") or 1.0, f"{what}: zoom")
    if not (0 < fov < 180 and zoom > 0):  # both together are what `check` looks at
        raise ValueError(f"{what}: fov must be between 0 and 180 degrees and zoom positive; found {fov:g} and {zoom:g}")
    focal = _side(size, fov_of) / 2 / math.tan(math.radians(fov) / 2) * zoom
    aspect = number(record.get("pixel_aspect", 1), f"{what}: pixel_aspect")
    across, down = numbers(record.get("shift", (0, 0)), (2,), f"{what}: shift")
    middle = [size[1] / 2 + across * size[0], size[0] / 2 + down * size[0]]
    return torch.tensor([[focal * aspect, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]], dtype=torch.float64)


def _side(size: tuple[int, int], fov_of: str) -> int:
    if fov_of not in FOVS:
        raise ValueError(f"a field of view can be of {' or '.join(map(repr, FOVS))}; found {fov_of!r}")
    return size[0] if fov_of == FOVS[0] else min(size)


def to_load3d(cameras: Cameras, distance: float = 1.0, fov_of: str = FOVS[0]) -> list[dict]:
    """One of the host's cameras for each, with its target `distance` scene units ahead.

    Lenses of other than square pixels, and with the principal point beside the middle, are said in further keys that
    only `from_load3d` knows, as in camera paths: pixel_aspect, and shift in picture heights. ValueError for a skew.
    """
    height, width = cameras.size
    flip = torch.tensor(AXES_FLIP, dtype=torch.float64)
    c2w, K = torch.linalg.inv(cameras.w2c.double().cpu()), to_corner_origin(cameras.K.double().cpu())
    if (K[:, 0, 1].abs() > 1e-6 * K[:, 0, 0]).any():
        raise ValueError(f"a LOAD3D_CAMERA has no place for a skew of {float(K[:, 0, 1].abs().max()):.4g}")
    quaternions = rotation_to_quaternion(flip[:, None] * c2w[:, :3, :3] * flip)
    found = []
    for pose, (w, x, y, z), lens in zip(c2w, quaternions.tolist(), K, strict=True):
        place, ahead = flip * pose[:3, 3], flip * (pose[:3, 3] + distance * pose[:3, 2])
        record = {
            "position": dict(zip("xyz", place.tolist(), strict=True)),
            "target": dict(zip("xyz", ahead.tolist(), strict=True)),
            "quaternion": {"x": x, "y": y, "z": z, "w": w},
            "fov": 2 * math.degrees(math.atan(_side(cameras.size, fov_of) / 2 / float(lens[1, 1]))),
            "aspect": width / height,
            "zoom": 1.0,
            "cameraType": "perspective",
        }
        aspect = float(lens[0, 0] / lens[1, 1])
        shift = ((lens[:2, 2] - lens.new_tensor([width / 2, height / 2])) / height).tolist()
        if abs(aspect - 1) > 1e-6:
            record["pixel_aspect"] = aspect
        if max(map(abs, shift)) > 1e-6:
            record["shift"] = shift
        found.append(record)
    return found
