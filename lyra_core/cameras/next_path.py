"""The next path, as it is planned in the Explorer: the reference's camera-path JSON with one more object.

    {..., "path": [keys], "lyra2": {"version": 1, "from": "<key of a state, or empty: the photo>", "frames": 81,
     "motion": "uniform motion", "captions": {"0": "text"}, "seed": 1, "before": {"R": [x,y,z,w], "T": [x,y,z], "fov": 42}}}

The first key is the camera where the world stands. A plan without further keys is no path at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ..files import parse_json, reading
from .camera import Cameras, about, check
from .camera_files import camera_path_of, camera_path_record
from .camera_path import CameraPath, PathKey, path_cameras
from .captions import captions_of

VERSION = 1
CHUNK_FRAMES = 80  # of the Lyra 2 weights
FRAMES = 1 + CHUNK_FRAMES  # if the plan does not say
LONGEST = 8001
KEY_STRIDE, MOST_KEYS = 8, 100  # of cameras that become a path to edit
DIGITS = 6
BEFORE = 8  # frames before the standing camera


@dataclass(frozen=True)
class NextPath:
    """Where to go from one state of a world."""

    path: CameraPath | None = None  # None: nothing is planned
    state: str = ""  # key of the state it begins at; empty: the photo
    frames: int = FRAMES  # the standing camera included
    motion: str = "uniform motion"  # see `camera_path.resample`
    captions: Mapping[int, str] = field(default_factory=dict)  # by frame of this path
    seed: int = 1

    @property
    def chunks(self) -> int:
        """How many chunks of 80 frames it takes; 0 if nothing is planned."""
        return 0 if self.path is None else -(-(self.frames - 1) // CHUNK_FRAMES)


def read(text: str, name: str = "the path") -> NextPath:
    """The plan in a JSON text; an empty text plans nothing. ValueError names what was found and what is expected."""
    if not text.strip():
        return NextPath()
    with reading(name):
        return _read(parse_json(text, name), text, name)


def _read(record: object, text: str, name: str) -> NextPath:
    keys = record.get("path") if isinstance(record, dict) else None
    if not isinstance(keys, list):
        raise ValueError(f"{name}: expected a JSON object with a list of keys under 'path'; found {text[:80]!r}")
    plan = record.get("lyra2", {})
    if not isinstance(plan, dict) or plan.get("version", VERSION) != VERSION:
        raise ValueError(f"{name}: 'lyra2' should be an object of version {VERSION}; found {str(plan)[:80]}")
    state, captions = plan.get("from", ""), plan.get("captions") or {}
    if not isinstance(state, str) or state.strip("0123456789abcdef"):
        raise ValueError(f"{name}: lyra2.from should be the key of a state, hexadecimal, or empty; found {state!r}")
    return NextPath(
        # with less than two keys there is nowhere to go
        camera_path_of(record, name) if len(keys) > 1 else None,
        state,
        _whole(plan.get("frames", FRAMES), 2, LONGEST, f"{name}: lyra2.frames"),
        _motion(plan.get("motion", "uniform motion"), name),
        captions_of(captions, name) if captions else {},
        _whole(plan.get("seed", 1), 0, 2**64 - 1, f"{name}: lyra2.seed"),
    )


def _whole(value: object, low: int, high: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{what} should be a whole number from {low} to {high}; found {value!r}")
    return value


def _motion(value: object, name: str) -> str:
    if value not in ("uniform motion", "arc length", "time"):
        raise ValueError(f"{name}: lyra2.motion should be uniform motion, arc length or time; found {value!r}")
    return value


def cameras_of(plan: NextPath, standing: Cameras) -> Cameras:
    """The planned cameras, the first of which is `standing` (one camera) itself; only that if nothing is planned.

    Aspect of the pixels and principal point are those of the standing camera; the focal length follows the keys.
    """
    if plan.path is None:
        return standing
    cameras = about(path_cameras(plan.path, standing.size, plan.frames, plan.motion), (0.0, 0.0, 0.0))
    K = standing.K.repeat(len(cameras), 1, 1)
    K[:, :2, :2] *= (cameras.K[:, 1, 1].to(K) / K[:, 1, 1])[:, None, None]
    w2c = cameras.w2c.to(standing.w2c)
    w2c[0], K[0] = standing.w2c[0], standing.K[0]
    return check(replace(cameras, w2c=w2c, K=K, origin=standing.origin), "the planned path")


def text_of(cameras: Cameras, state: str = "", before: Cameras | None = None, **settings) -> str:
    """Cameras as a path to edit, of at most 100 keys on a curve through them.

    The first camera is where the world stands at `state`; `before` (one camera) is where it came from; `settings` are
    further entries of the `lyra2` object.
    """
    last = len(cameras) - 1
    stride = max(KEY_STRIDE, math.ceil(last / (MOST_KEYS - 1)))
    some = cameras[[*range(0, last, stride), last]]
    keys = tuple(
        PathKey(c2w[:3], math.degrees(fov), float(i + 1))
        for i, (c2w, fov) in enumerate(zip(some.c2w, some.fov.tolist(), strict=True))
    )
    record = camera_path_record(CameraPath(keys, through_keys=True))
    plan = {"version": VERSION, "from": state, "frames": max(last + 1, 2), "motion": "uniform motion", **settings}
    if before is not None:
        came = camera_path_record(CameraPath((PathKey(before.c2w[0, :3], math.degrees(before.fov[0])),)))["path"][0]
        plan["before"] = {name: came[name] for name in ("R", "T", "fov")}
    return json.dumps(_rounded({**record, "lyra2": plan}), ensure_ascii=False)


def _rounded(value):
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def moved_to(cameras: Cameras, standing: Cameras) -> Cameras:
    """The same motion beginning at the standing camera; to the last bit the same if it begins there anyway."""
    if torch.equal(cameras.w2c[0], standing.w2c[0]):
        return cameras
    to_here = torch.linalg.inv(cameras.w2c[0].double()) @ standing.w2c[0].double()
    return replace(cameras, w2c=(cameras.w2c.double() @ to_here).to(cameras.w2c))
