"""A viewer in an export: a page that any file server shows, with three.js and spark of the host's own frontend."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..cameras.camera import Cameras
from .upright import turned_cameras
from .walkable import Walkable

OWN = Path(__file__).parent / "viewer"
BOOKMARKS = 8  # cameras that have a button, spread over the path
NEEDED = ("three.core.js", "three.module.js", "Pass.js", "spark.module.js")
MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files
(the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge,
publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so,
subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR
ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH
THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def save(folder: Path, libraries: Mapping[str, str], cameras: Cameras, found: Walkable | None, radius: float, metres: float = 1.0) -> str:
    """Write the page into a folder beside splat.spz; says what is in it.

    libraries: as `web_libraries.extract` gives them; radius: of who walks, scene units, of which each is so many `metres`.
    """
    (folder / "lib").mkdir(parents=True)
    for file in sorted(OWN.iterdir()):
        shutil.copyfile(file, folder / file.name)
    for name in NEEDED:
        (folder / "lib" / name).write_text(libraries[name], encoding="utf-8")
    (folder / "lib" / "LICENSES.txt").write_text(_licences(libraries), encoding="utf-8")
    (folder / "world.json").write_text(json.dumps(_record(cameras, found, radius, metres)), encoding="utf-8")
    return f"{len(cameras)} cameras; " + ("walks on the map" if found else "flies: there is no map of the ground")


def _licences(libraries: Mapping[str, str]) -> str:
    year = re.search(r"Copyright ([\d-]+) Three\.js Authors", libraries["three.core.js"])
    three = f"three.js: Copyright {year[1] if year else ''} three.js authors".replace("  ", " ")
    return f"{three}\nSpark: Copyright 2025 World Labs Technologies, Inc.\n\nBoth under the MIT licence:\n\n{MIT}"


def _record(cameras: Cameras, found: Walkable | None, radius: float, metres: float) -> dict:
    level = torch.eye(3) if found is None else found.ground.level
    cameras = turned_cameras(cameras, level)
    fov, c2w = cameras.fov.rad2deg().tolist(), cameras.c2w[:, :3].flatten(1).tolist()
    chosen = np.unique(np.linspace(0, len(cameras) - 1, min(len(cameras), BOOKMARKS)).round().astype(int)).tolist()
    record = {
        "splat": "../splat.spz",
        "level": level.flatten().tolist(),  # rows of the rotation from the axes of splat.spz to those of all that follows
        "metres": metres,
        "aspect": cameras.size[1] / cameras.size[0],
        "cameras": [{"c2w": pose, "fov": degrees} for pose, degrees in zip(c2w, fov, strict=True)],
        "bookmarks": chosen,
    }
    if found is not None:
        ground, (rows, columns) = found.ground, found.state.shape
        record |= {
            "eyes": ground.eyes,
            "map": {
                "corner": ground.corner, "cell": ground.cell, "rows": rows, "columns": columns, "radius": radius,
                "state": _packed(found.state.astype(np.int8)), "height": _packed(ground.height.astype("<f4")),
            },
        }  # fmt: skip
    return record


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
