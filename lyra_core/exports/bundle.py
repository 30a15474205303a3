"""A bundle: one folder with a world in every form that engines, viewers and simulators open, and a README about it.

The files are written to a folder beside, which takes the bundle's place once everything is in it. So a bundle is there
complete or not at all, and whatever goes wrong leaves the earlier one as it was. A folder that is no bundle, or has come
to hold files of someone else, is never replaced.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cameras import camera_files
from ..cameras.camera import Cameras
from ..files import FileError, read_json
from ..splats.gaussians import Gaussians

MANIFEST = "bundle.json"
FORMAT, VERSION = "lyra-bundle", 1
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave behind; nobody misses it

SPARSE_POINTS = 100_000  # of points3D.txt: where a trainer begins, and text is slow

OPENCV = "x right, y down, z forward"
Y_UP = "x right, y up, z backward"
Z_UP = "z up, x right, y into the picture"


class BundleError(FileError):
    """A folder that can't become a bundle; the message names it, what was found and what to do."""


@dataclass(frozen=True)
class Kind:
    """What the README says of a file."""

    what: str
    axes: str
    opens: str


KINDS = {
    "splat.ply": Kind(
        "the gaussians, exact",
        OPENCV,
        "SuperSplat, PlayCanvas, Spark, gsplat; Unity, Unreal, Godot and Blender with a 3DGS plugin",
    ),
    "splat.spz": Kind("the gaussians, smallest, plain colours in 8 bits", OPENCV, "SuperSplat, Spark, Babylon.js"),
    "splat.splat": Kind(
        "the gaussians, large ones first, plain colours in 8 bits", OPENCV, "antimatter15/splat, Spark, Babylon.js"
    ),
    "viewer": Kind(
        "a page that shows splat.spz: orbit, walk on the map, the cameras as bookmarks, headsets; with three.js and Spark (MIT)",
        "",
        "any browser, from a file server: `python -m http.server` in this folder, then /viewer/",
    ),
    "points.ply": Kind("the centres of the gaussians with their colours", OPENCV, "MeshLab, CloudCompare, Open3D"),
    "mesh.glb": Kind("the surface as it was connected, coloured", Y_UP, "Blender, Unity, Unreal, Godot, three.js"),
    "collision.glb": Kind("the surface with fewer faces, to bump into", Y_UP, "Unity, Unreal, Godot as a collider"),
    "world.usdz": Kind(
        "one USD stage: gaussians (ParticleField3DGaussianSplat), labelled surfaces that collide, places to begin at, physics, moving camera",
        Z_UP,
        "Isaac Sim 6, Omniverse, usdview 26.3 or newer; Blender and Houdini for the camera",
    ),
    "ground.glb": Kind("the ground under the path that nobody saw, continued from the floor", Y_UP, "beside collision.glb"),
    "world.xml": Kind(
        "the ground as a height field, what stands on it as boxes or convex parts, places to begin at; metres", "z up, x right, y ahead", "MuJoCo"
    ),
    "map": Kind(
        "where a body can stand and go: map.pgm with map.yaml, map.png, map.npz; metres",
        "x right, y ahead",
        "ROS map_server and Nav2, NumPy",
    ),
    "cameras.npz": Kind("the cameras: w2c, intrinsics, image_height, image_width", OPENCV, "NumPy, Lyra 2 itself"),
    "camera_path.json": Kind("the cameras as keyframes", OPENCV, "the Lyra 2 viewer, this pack"),
    "colmap": Kind(
        "pictures, their cameras and first points: sparse/0, images, transforms.json",
        OPENCV,
        "COLMAP; trainers such as gsplat, Brush, PostShot, nerfstudio",
    ),
    "flythrough.mp4": Kind("the frames, one after the other", "", "anything that plays video"),
}
LAYER = "world.usdc"  # instead of world.usdz, for a world too large for a package

PROGRAMS = {
    "Blender": {
        "mesh.glb": "File > Import > glTF 2.0, mesh.glb: it arrives upright",
        "world.usdz": "for the camera File > Import > Universal Scene Description, world.usdz",
        "splat.ply": "splat.ply needs a 3DGS add-on; if it lies on its face, turn it by -90 degrees about x",
    },
    "Unity": {
        "mesh.glb": "mesh.glb with the glTFast package",
        "collision.glb": "collision.glb as a Mesh Collider",
        "splat.ply": "splat.ply with the UnityGaussianSplatting package",
    },
    "Unreal": {
        "mesh.glb": "import mesh.glb (Interchange)",
        "collision.glb": "collision.glb as a static mesh with `Use Complex Collision As Simple`",
        "splat.ply": "splat.ply with a 3DGS plugin",
    },
    "Godot": {
        "mesh.glb": "drop mesh.glb into the project",
        "collision.glb": "on collision.glb choose Mesh > Create Collision Shape > Trimesh",
        "splat.ply": "splat.ply with a 3DGS plugin",
    },
    "Isaac Sim": {
        "world.usdz": "open world.usdz (6.0 or newer draws the gaussians); the collision mesh is static and not drawn",
        "splat.ply": "for 5.x turn splat.ply into a NuRec volume with 3DGRUT",
    },
    "SuperSplat": {"splat.ply": "drag splat.ply into superspl.at/editor"},
    "COLMAP": {"colmap": "File > Import model, colmap/sparse/0; trainers take the folder colmap"},
}

LICENCES = {
    "lyra 2": "Lyra 2 weights made frames of this world: NVIDIA Internal Scientific Research and Development Model "
    "License. Research only, NOT FOR COMMERCIAL USE.",
    "wan vace": "Wan VACE painted frames of this world: Apache-2.0, commercial use allowed; LoRAs that it was used with may "
    "say otherwise.",
    "geometry preview": "Geometry preview: no model licence. Its frames are the photo's own pixels, moved and softened.",
}
MODELS = {
    "not stated": "Which model estimated the depth or made the gaussians was not stated; ask whoever made this world.",
    "MoGe": "MoGe estimated the geometry: MIT.",
    "Depth Anything 3 small, base, metric, mono": "Depth Anything 3 (small, base, metric-large or mono-large) estimated "
    "the geometry: Apache-2.0.",
    "Depth Anything 3 large, giant, nested": "Depth Anything 3 (large, giant or nested) estimated the geometry: "
    "CC BY-NC 4.0, NOT FOR COMMERCIAL USE.",
    "Lyra 2 reconstruction": "The Lyra 2 reconstruction weights made the gaussians: NVIDIA Internal Scientific Research "
    "and Development Model License. Research only, NOT FOR COMMERCIAL USE.",
    "none": "No model estimated the geometry.",
}


# ------------------------------------------------------------------------------------------------------------- the folder


@contextmanager
def writing(folder: Path | str) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when all has gone well, and vanishes otherwise.

    BundleError if `folder` holds anything but an earlier bundle, or if the disk is full or can't be written.
    """
    folder = Path(folder)
    partial, earlier = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "earlier"))
    try:
        if earlier.exists() and not folder.exists():  # the last export was cut off between two moves
            os.replace(earlier, folder)
        _check_replaceable(folder)
        for left in (partial, earlier):
            if left.exists():
                shutil.rmtree(left)
        partial.mkdir(parents=True)
        yield partial
        _write_manifest(partial)
        _swap(folder, partial, earlier)
    except Exception as error:
        failure = error if isinstance(error, OSError) else error.__cause__  # other writers say it in their own words
        if not isinstance(failure, OSError):
            raise
        raise BundleError(
            f"{folder} can't be written: {failure.strerror or failure}; what was there before is unchanged"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; choose another folder")
    held = _files(folder)
    if not held:
        return
    manifest = folder / MANIFEST
    try:
        record = read_json(manifest) if manifest.is_file() else {}
    except FileError as error:
        raise BundleError(f"{manifest} is damaged ({str(error).removeprefix(f'{manifest}: ')}); move the folder away or choose another one") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("files"), dict):
        raise BundleError(f"{folder} holds files but no bundle, such as {held[0]}; choose another folder")
    foreign = [name for name in held if name not in record["files"] and name != MANIFEST]
    if foreign:
        raise BundleError(
            f"{folder} has come to hold {len(foreign)} files that no export wrote, such as {foreign[0]}; a new export "
            "would remove them: move them away or choose another folder"
        )


def _files(folder: Path) -> list[str]:
    """Names of all files in it, relative to it, sorted."""
    return sorted(
        f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir() and f.name not in LITTER
    )


def _write_manifest(folder: Path) -> None:
    sizes = {name: (folder / name).stat().st_size for name in _files(folder)}
    text = json.dumps({"format": FORMAT, "version": VERSION, "files": sizes}, indent=1)
    with open(folder / MANIFEST, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _swap(folder: Path, partial: Path, earlier: Path) -> None:
    """A folder can't be replaced in one step; between the two, `earlier` is what `writing` goes back to."""
    if folder.exists():
        os.replace(folder, earlier)
    try:
        os.replace(partial, folder)
    except BaseException:
        with suppress(OSError):
            os.replace(earlier, folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- for trainers


def save_colmap(
    folder: Path,
    cameras: Cameras,
    picture: Callable[[int], Tensor],
    every: int,
    gaussians: Gaussians | None = None,
    on_picture: Callable[[Tensor], None] = lambda picture: None,
) -> int:
    """Every so many frames as a COLMAP data set in folder/colmap; returns how many.

    picture: frame -> (H, W, 3) uint8. Up to SPARSE_POINTS of the gaussians' centres, spread evenly over them, are its points.
    """
    place, frames = folder / "colmap", list(range(0, len(cameras), every))
    (place / "images").mkdir(parents=True)
    names = [f"frame_{frame:05d}.png" for frame in frames]
    for frame, name in zip(frames, names, strict=True):
        image = picture(frame)
        Image.fromarray(image.cpu().numpy()).save(place / "images" / name)
        on_picture(image)
    points = colors = None
    if gaussians is not None:
        chosen = torch.linspace(0, len(gaussians) - 1, min(len(gaussians), SPARSE_POINTS)).long()
        part = gaussians.select(chosen)
        points, colors = part.means, (part.colors.clamp(0, 1) * 255).round()
    camera_files.save_colmap(place / "sparse" / "0", cameras[frames], names, points, colors)
    camera_files.save_transforms(place / "transforms.json", cameras[frames], [f"images/{name}" for name in names])
    return len(frames)


def spread(points: Tensor) -> list[float]:
    """How long, high and deep (x, y, z) the box is that holds the middle 98 % of points (N, 3) along each axis."""
    if not len(points):
        return [0.0, 0.0, 0.0]
    sample = points[:: max(1, len(points) // 200_000)].float().cpu().numpy()
    low, high = np.quantile(sample, (0.01, 0.99), axis=0)
    return (high - low).tolist()


# ------------------------------------------------------------------------------------------------------------- the README


def licences(generators: Sequence[str] | None, model: str = "not stated") -> list[str]:
    """A sentence per maker: generators as a world's chunks name them (None: not stated), and one of MODELS."""
    if generators is None:
        known = ["What made the frames was not stated. If it was Lyra 2: research only, NOT FOR COMMERCIAL USE."]
    else:
        unknown = "{!r} made frames of this world; ask whoever made it about its licence."
        known = [LICENCES.get(generator, unknown.format(generator)) for generator in generators]
    return [*known, MODELS[model], "The rights in the photo that it began with stay with whoever took it."]


def readme(
    folder: Path,
    title: str,
    facts: Mapping[str, str],
    skipped: Mapping[str, str],
    terms: Sequence[str],
    metres_per_unit: float = 1.0,
    size: Sequence[float] | None = None,
    origin: Sequence[float] = (0.0, 0.0, 0.0),
    level: Tensor | None = None,
) -> str:
    """What the files in a folder are. facts: file -> how much is in it; skipped: file -> why it is not there.

    origin: what to add to all coordinates to get those of the map that the cameras came from; level: the rotation (3, 3) that
    makes the floor level, as `exports.upright` finds it.
    """
    lines = [f"# {title}", "", "A world, exported by ComfyUI-LyraWorlds.", "", "## Files", ""]
    lines += ["| file | what it is | in it | size | axes | opens in |", "|---|---|---|---|---|---|"]
    for known, kind in KINDS.items():
        name = _name(folder, known)
        if (folder / name).exists():
            cells = (f"`{name}`", kind.what, facts.get(name, ""), _size(folder / name), kind.axes, kind.opens)
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Programs are named by what their makers document. `{MANIFEST}` lists what belongs to this export."]
    if skipped:
        lines += ["", "Not here:", "", *(f"- `{name}`: {why}" for name, why in skipped.items())]
    lines += ["", "## Axes and units", "", *_measures(metres_per_unit, size, origin), *_leveled(level)]
    lines += ["", "## How to open it", ""]
    for program, ways in PROGRAMS.items():
        names = {known: _name(folder, known) for known in ways}
        if how := "; ".join(ways[n].replace(n, names[n]) for n in ways if (folder / names[n]).exists()):
            lines.append(f"- **{program}**: {how}.")
    lines += ["", "## Licences", "", *(f"- {sentence}" for sentence in terms), ""]
    return "\n".join(lines)


def _name(folder: Path, name: str) -> str:
    """What this file is called here."""
    return LAYER if name == "world.usdz" and (folder / LAYER).exists() else name


def report(folder: Path, facts: Mapping[str, str], skipped: Mapping[str, str], terms: Sequence[str]) -> str:
    """The README in short."""
    lines = [str(folder), "", *(f"{name}: {fact}, {_size(folder / name)}" for name, fact in facts.items())]
    lines += [f"no {name}: {why}" for name, why in skipped.items()]
    return "\n".join([*lines, "", *terms])


def _measures(metres_per_unit: float, size: Sequence[float] | None, origin: Sequence[float] = (0.0, 0.0, 0.0)) -> list[str]:
    lines = [
        "All files have the same numbers in the same scene units, those of the depth that the world began with; only the "
        "axes differ, so the files fit onto each other once their axes do. The first camera usually stands at the origin.",
        "",
        f"- {OPENCV}: (x, y, z). As all 3DGS files; a viewer that shows the splat upside down wants half a turn about x.",
        f"- {Y_UP}: (x, -y, -z). Blender turns it to z up by itself.",
        f"- {Z_UP}: (x, z, -y).",
        "",
    ]
    if metres_per_unit == 1.0:
        lines.append(
            "A scene unit counts as one metre. That is true only if the depth was metric; otherwise export again with "
            "`metres_per_unit`."
        )
    else:
        lines.append(
            f"A scene unit is {metres_per_unit:g} metres: scale by {metres_per_unit:g} on import. The USD file says so itself."
        )
    if any(origin):
        added = ", ".join(f"{value:.3f}" for value in origin)
        lines += ["", f"The cameras came from a map: add ({added}) to (x, y, z) of the OpenCV axes for its coordinates."]
    if size is not None:
        across, tall, deep = (f"{length:.3g}" for length in size)
        lines += [
            "",
            f"98 % of the gaussians lie within {across} (width) x {tall} (height) x {deep} (depth) scene units.",
        ]
    return lines


def _leveled(level: Tensor | None) -> list[str]:
    if level is None or torch.equal(level, torch.eye(3)):
        return []
    degrees = math.degrees(math.acos(min(1.0, float(level[1, 1]))))
    rows = "; ".join(", ".join(f"{value:.5f}" for value in row) for row in level.tolist())
    return [
        "",
        f"The photo was taken {degrees:.1f} degrees aslant. So that gravity is straight down, `world.xml`, `map` and the viewer are "
        "turned until the floor is level, and so is all in `world.usdz`, by the transform of `/World`; the other files are not. "
        f"Rows of that rotation, for the OpenCV axes: {rows}.",
    ]


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    total = float(sum(f.stat().st_size for f in files))
    for unit in ("B", "kB", "MB"):
        if total < 1000:
            return f"{total:.3g} {unit}"
        total /= 1000
    return f"{total:.3g} GB"
