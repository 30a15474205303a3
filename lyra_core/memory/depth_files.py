"""Depth in files: EXR, float TIFF, 16-bit PNG, NumPy arrays, as cameras, renderers and other networks write it.

Nothing is scaled or cut off on the way in; `Recipe` says what the numbers are. OpenEXR reads EXR, because OpenCV's wheels
come without it (5.0) or need a variable set before the first import and know only colours and luminance (4.x).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..array_files import read_npy, read_npz
from ..cameras.camera import LARGEST_PICTURE, Cameras, check_lens, from_normalized
from ..files import check_size, parsing, reading
from .depth import DepthMap, depth_map, onto, rays, same_shape

ENDINGS = (".exr", ".npy", ".npz", ".png", ".tif", ".tiff")
UNITS = {"metres": 1.0, "centimetres": 0.01, "millimetres": 0.001}
AUTO = "as usual for the file"
MEASURES = ("depth", "distance along the ray", "disparity (1 / depth)")
NAMES = ("depth", "z", "distance", "dist", "range", "disparity", "v", "y", "r", "arr_0")  # of channels and arrays, best first
LENSES = ("K", "intrinsics", "intrinsic", "camera_matrix")
NEAREST, FARTHEST = 0.02, 500.0  # metres; a median depth beyond speaks for another unit
FULL = 60000  # of 65535; whole numbers up to there are a picture's rather than millimetres


@dataclass(frozen=True)
class Stored:
    """What a file holds, as it stands there."""

    values: Tensor  # (F, H, W) float32; what the file itself marks as unknown is 0
    whole: bool  # whole numbers, which are millimetres as a rule
    name: str  # of file and channel, for people
    K: Tensor | None = None  # (3, 3) that lies beside the depth; pixels of it, or in units of the picture


@dataclass(frozen=True)
class Recipe:
    """What the numbers in a file are."""

    unit: str = AUTO  # one of UNITS; AUTO: whole numbers are millimetres, others metres
    scale: float = 1.0  # by which the stored numbers are multiplied first, such as 1/256 or 0.2
    measure: str = MEASURES[0]
    far: float = 10000.0  # scene units; whatever is farther is sky and unknown


def read(path: str | Path, channel: str = "") -> Stored:
    """The numbers of a depth file; channel: which of an EXR's channels or an .npz's arrays, empty for the one of depth.

    FileError that names the file and what is wrong with it.
    """
    with reading(path):
        return _read(Path(path), channel)


def _read(path: Path, channel: str) -> Stored:
    reader = {".exr": _read_exr, ".npy": _read_npy, ".npz": _read_npz}.get(path.suffix.lower(), _read_picture)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: a depth file ends with one of {', '.join(ENDINGS)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    name, array, K = reader(path, channel)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {name} holds {array.dtype}, not numbers")
    if array.dtype.itemsize == 1:
        raise ValueError(
            f"{path}: {name} has 8 bits a pixel, too few for metres; if it is a disparity picture, load it with Load Image "
            "and take the source 'depth picture' of Lyra 2 Depth"
        )
    whole = array.dtype.kind in "iu"
    if whole:
        array = np.where(array == np.iinfo(array.dtype).max, 0, array)  # the mark of cameras that saw nothing
    return Stored(torch.from_numpy(_views(path, name, array).astype(np.float32)), whole, f"{path.name}{name}", K)


def depth_maps(stored: Stored, recipe: Recipe, size: tuple[int, int], K: Tensor) -> tuple[DepthMap, ...]:
    """Each view of a file as the depth (H, W) of a photo of `size` whose lens is K (3, 3).

    A file of another shape is the whole photo, squeezed.
    """
    if recipe.measure not in MEASURES:
        raise ValueError(f"measure {recipe.measure!r}: expected one of {', '.join(MEASURES)}")
    if recipe.scale <= 0 or recipe.far <= 0:
        raise ValueError(f"scale {recipe.scale:g} and far {recipe.far:g} must be positive")
    unit = ("millimetres" if stored.whole else "metres") if recipe.unit == AUTO else recipe.unit
    values = stored.values * recipe.scale
    if recipe.measure == MEASURES[2]:
        unit = "metres" if recipe.unit == AUTO else unit  # of 1 / depth; what is stored as a whole number has a scale
        values = torch.where(values > 0, 1 / values.clamp_min(1e-30), 0.0)
    values = values * UNITS[unit]
    views = torch.stack([onto(view, size) for view in values])
    if recipe.measure == MEASURES[1]:
        views = views / rays(size, K).norm(dim=-1)
    views = torch.where(views <= recipe.far, views, 0.0)
    source = f"{stored.name}, {recipe.measure} in {unit}"
    return tuple(depth_map(view, K, source) for view in views)


def own_lens(stored: Stored, size: tuple[int, int]) -> Tensor | None:
    """The lens (3, 3) that lies in the file, for a photo of `size`; None if there is none.

    ValueError if it can't be one, or if the file's pictures have another shape than the photo.
    """
    if stored.K is None:
        return None
    own = tuple(stored.values.shape[1:])
    if not same_shape(own, size):
        raise ValueError(
            f"{stored.name}: its pictures are {own[1]} x {own[0]} and come with a lens, the photo is {size[1]} x {size[0]}, "
            "another shape; crop both alike, or connect cameras"
        )
    K = from_normalized(stored.K, own) if stored.K[:2].abs().max() <= 4 else stored.K
    return check_lens(Cameras(torch.eye(4)[None], K[None], own), stored.name).resized(size).K[0]


def summary(found: DepthMap, stored: Stored) -> str:
    """What a map holds, and a word if it is hardly what was asked for."""
    known = found.depth[found.depth > 0]
    median = float(known.median())
    lines = [
        f"{found.source}: {float(known.min()):.4g} to {float(known.max()):.4g}, median {median:.4g}; "
        f"{100 * (1 - len(known) / found.depth.numel()):.1f} % unknown"
    ]
    own = tuple(stored.values.shape[1:])
    if not same_shape(own, found.size):
        lines.append(f"  {own[1]} x {own[0]} was taken as the whole photo of {found.size[1]} x {found.size[0]}, squeezed")
    if stored.whole and stored.values.max() > FULL:
        lines.append("  doubtful: its numbers fill 16 bits, as those of a picture without a unit do")
    if not stored.whole and 0.99 < stored.values.max() <= 1:
        lines.append("  doubtful: nothing in it is beyond 1, as in a picture without a unit")
    if not NEAREST < median < FARTHEST:
        lines.append(f"  doubtful: half of it is beyond {median:.3g} metres; is the unit or the scale another?")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ formats


def _views(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """(F, H, W) of an array (H, W), (F, H, W), (H, W, 1) or of equal colours."""
    if array.ndim in (3, 4) and array.shape[-1] in (1, 3, 4):
        grey = array[..., :3]
        if not np.array_equal(grey.min(-1), grey.max(-1), equal_nan=True):
            raise ValueError(f"{path}: {name} has colours, no depth; name the channel, or save the depth in grey")
        array = array[..., 0]
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 4 and 1 in array.shape[:2]:
        array = array.reshape(-1, *array.shape[2:])
    if array.ndim != 3 or not len(array) or not 2 <= min(array.shape[1:]) <= max(array.shape[1:]) <= LARGEST_PICTURE:
        raise ValueError(
            f"{path}: {name} has shape {array.shape}; expected (height, width) or (views, height, width), "
            f"2 to {LARGEST_PICTURE} pixels each way"
        )
    return array


def _read_picture(path: Path, channel: str) -> tuple[str, np.ndarray, None]:
    import cv2

    content = path.read_bytes()
    with parsing(path, "no picture that OpenCV can read; is it cut off?"):
        sizes = list(_page_sizes(content))
    for width, height in sizes:
        if not 1 <= min(width, height) <= max(width, height) <= LARGEST_PICTURE:
            raise ValueError(f"{path}: a picture of {width} x {height}; both sides are 1 to {LARGEST_PICTURE} pixels")
    check_size(path, sum(8 * width * height for width, height in sizes), len(content), "its pixels")
    try:
        _, pages = cv2.imdecodemulti(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pages = ()
    if len({page.shape for page in pages}) != 1:
        raise ValueError(f"{path}: no picture that OpenCV can read; is it cut off, or of another kind than its name says?")
    return "", np.stack(pages), None


def _page_sizes(content: bytes) -> Iterator[tuple[int, int]]:
    """(width, height) that a PNG or the pages of a TIFF say of themselves; nothing for others, which OpenCV refuses."""
    if content.startswith(b"\x89PNG"):
        yield struct.unpack_from(">II", content, 16)
    if content[:4] not in (b"II*\0", b"MM\0*"):  # a BigTIFF is not read
        return
    order = "<" if content.startswith(b"II") else ">"
    (page,), seen = struct.unpack_from(order + "I", content, 4), set()
    while page and page not in seen:
        seen.add(page)
        (count,), sides = struct.unpack_from(order + "H", content, page), {}
        for tag in range(page + 2, page + 2 + 12 * count, 12):
            name, kind = struct.unpack_from(order + "HH", content, tag)
            if name in (256, 257):
                (sides[name],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), content, tag + 8)
        yield sides.get(256, 0), sides.get(257, 0)
        (page,) = struct.unpack_from(order + "I", content, page + 2 + 12 * count)


def _read_npy(path: Path, channel: str) -> tuple[str, np.ndarray, None]:
    return "", read_npy(path), None


def _read_npz(path: Path, channel: str) -> tuple[str, np.ndarray, Tensor | None]:
    arrays = read_npz(path)
    depths = {name: array for name, array in arrays.items() if sum(side > 4 for side in array.shape) > 1}
    name = _chosen(path, channel, {name: name for name in (arrays if channel else depths)}, "arrays")
    beside = [arrays[key] for key in LENSES if key in arrays and arrays[key].dtype.kind in "fiu"]
    lenses = [array.reshape(-1, 3, 3)[0] for array in beside if array.shape[-2:] == (3, 3) and array.size]
    return f" [{name}]", arrays[name], torch.from_numpy(lenses[0].astype(np.float32)) if lenses else None


def _read_exr(path: Path, channel: str) -> tuple[str, np.ndarray, None]:
    try:
        import OpenEXR
    except ImportError:
        raise ImportError(f"{path}: EXR files need OpenEXR: pip install OpenEXR") from None
    with parsing(path, "OpenEXR can't read it"):
        _check_exr(path, OpenEXR.File(str(path), header_only=True))
    try:
        file = OpenEXR.File(str(path), separate_channels=True)
        layers = {
            f"{part.name()}.{name}" if len(file.parts) > 1 else name: layer
            for part in file.parts
            for name, layer in part.channels.items()
        }
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: OpenEXR can't read it ({error})") from None
    if not layers or not all(part.channels for part in file.parts):  # OpenEXR only prints a warning
        raise ValueError(f"{path}: OpenEXR finds no pixels in it; is it cut off?")
    name = _chosen(path, channel, {name: name.rpartition(".")[2] for name in layers}, "channels")
    if layers[name].xSampling != 1 or layers[name].ySampling != 1:
        raise ValueError(f"{path}: its channel {name} is subsampled")
    stem, _, last = name.rpartition(".")
    colours = [layers[other].pixels for c in "RGB" if (other := f"{stem}.{c}" if stem else c) in layers]
    if not channel and last in "RGB" and len(colours) == 3:
        return f" [{name}]", np.stack(colours, -1), None  # equal in all three, or refused
    pixels = layers[name].pixels
    return f" [{name}]", pixels.astype(np.float32) if pixels.dtype.kind == "u" else pixels, None


def _check_exr(path: Path, file) -> None:
    """FileError if the pixels that the headers promise can't be there."""
    needed = 0
    for part in file.parts:
        low, high = (tuple(map(int, corner)) for corner in part.header["dataWindow"])
        width, height = (end - begin + 1 for begin, end in zip(low, high, strict=True))
        if not 1 <= min(width, height) <= max(width, height) <= LARGEST_PICTURE:
            raise ValueError(f"{path}: a picture of {width} x {height}; both sides are 1 to {LARGEST_PICTURE} pixels")
        needed += 4 * width * height * len(part.header["channels"])
    check_size(path, needed, path.stat().st_size, "its pixels")


def _chosen(path: Path, asked: str, names: dict[str, str], kind: str) -> str:
    """Which of these (full name: last part of it) holds the depth: that asked for, a depth's by its name, or the only one."""
    if asked:
        found = [n for n, last in names.items() if asked.casefold() in (n.casefold(), last.casefold())]
    else:
        deep = [n for n in names if "depth" in n.casefold()]
        ranks = [[n for n, last in names.items() if last.casefold() == known] for known in NAMES]
        among = [[n for n in rank if n in deep] for rank in ranks] + [deep] + ranks + [list(names)]
        found = next(filter(None, among), [])
    if len(found) != 1:
        what = f"no {kind[:-1]} called {asked}" if asked and not found else f"not one {kind[:-1]} that must be the depth"
        raise ValueError(f"{path}: {what}; it has the {kind} {', '.join(names) or 'none'}: name one of them")
    return found[0]
