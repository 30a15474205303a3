"""Gaussians as files: the usual 3DGS PLY, the 32-byte .splat, the compressed .spz, and plain points; for millions of rows.

All keep the world's axes (OpenCV: x right, y down, z forward) and its scene units. A PLY holds everything as float32, with
logarithms of scales and logits of opacities. A .splat and an .spz hold plain colour, opacity and rotation in 8 bits each.

Rows are made and written block by block in one buffer, so saving needs one block of memory and not a second copy of the
scene. A file is written beside its place and moved there in one step: it is there complete or not at all.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import FileError
from .gaussians import BROKEN, SH_DC, Gaussians, colors_to_sh, degree, sound

BLOCK = 1 << 16  # gaussians; 4.5 MB of rows without higher harmonics, which fit a processor's cache
LEAST_OPACITY = 1e-6  # a logit of 0 or 1 is infinite
LEAST_SCALE = 1e-8  # scene units; so is the logarithm of 0
LONGEST_HEADER = 1 << 20  # bytes; without end_header by then it is some other file

SPLAT = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("quat", "u1", 4)])
POINT = np.dtype([("point", "<f4", 3), ("rgb", "u1", 3)])

SPZ_MAGIC, SPZ_VERSION = 0x5053474E, 2
SPZ_CONTRAST = SH_DC / 0.15  # the colours that a byte of an .spz can hold: 0.5 -+ 0.94
FINEST = 12  # fractional bits of an .spz's 24-bit positions, as others write them: 0.24 thousandths of a scene unit

_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4"}
_TYPES |= {"double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
_TYPES |= {"float32": "f4", "float64": "f8"}
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}


class SplatFileError(FileError):
    """A file that holds no usable gaussians or can't be written; the message names it, what was found and what to do."""


# -------------------------------------------------------------------------------------------------------------------- PLY


@torch.no_grad()
def save_ply(gaussians: Gaussians, file: Path | str, *, block: int = BLOCK) -> None:
    """Write a binary little-endian 3DGS PLY with normals of zero; `block`: how many gaussians are converted at a time.

    Opacities are kept LEAST_OPACITY away from 0 and 1 and scales at least LEAST_SCALE, so what is exactly 0 or 1 stays
    finite in the file; rotations are written as they are. ValueError if a gaussian is broken (see
    `drawable`); SplatFileError if the disk is full or the place can't be written. Then the file is what it was before.
    """
    check(gaussians)
    if block < 1:
        raise ValueError(f"a block of {block} gaussians holds nothing; take at least 1")
    names = _properties(gaussians.sh.shape[1])
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(gaussians)}"]
    header = "\n".join([*lines, *(f"property float {name}" for name in names), "end_header\n"]).encode("ascii")
    rows = torch.zeros(min(block, len(gaussians)), len(names))  # the normals stay what they are now
    with _complete(Path(file), len(header) + 4 * len(names) * len(gaussians)) as handle:
        handle.write(header)
        for start in range(0, len(gaussians), block):
            part = gaussians.select(slice(start, start + block))
            _fill(rows[: len(part)], part, names)
            handle.write(rows[: len(part)].numpy().astype("<f4", copy=False))


def load_ply(file: Path | str) -> Gaussians:
    """Gaussians of any binary 3DGS PLY, on the CPU: properties in any order and of any number type, further ones ignored.

    Rotations become unit quaternions. SplatFileError if it is no such PLY, lacks a property, is shorter than its header
    says or holds gaussians that are not finite.
    """
    file = Path(file)
    layout, count, offset = _read_header(file)
    bands = _bands(file, layout.names or ())
    _check_length(file, layout, count, offset)
    gaussians = _unfilled(count, bands)
    for part, taken in _rows(file, layout, offset, gaussians):
        for names, values in _stored(part):
            for name, index in zip(names, np.ndindex(*values.shape[1:]), strict=True):
                values[(slice(None), *index)].numpy()[:] = taken[name]
        part.scales.exp_()
        part.opacities.sigmoid_()
    return _with_unit_rotations(file, gaussians)


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{i}" for i in range(count)]


def _properties(bands: int) -> list[str]:
    """All properties of a row in the order in which every 3DGS program writes them."""
    names = [name for group, _ in _stored(_unfilled(0, bands)) for name in group]
    return [*names[:3], "nx", "ny", "nz", *names[3:]]


def _stored(gaussians: Gaussians) -> Iterator[tuple[list[str], Tensor]]:
    """Groups of neighbouring properties and the views they stand for; f_rest runs over bands first: (N, 3, K - 1)."""
    yield ["x", "y", "z"], gaussians.means
    yield _numbered("f_dc", 3), gaussians.sh[:, 0]
    if gaussians.sh.shape[1] > 1:
        yield _numbered("f_rest", 3 * (gaussians.sh.shape[1] - 1)), gaussians.sh[:, 1:].mT
    yield ["opacity"], gaussians.opacities[:, None]
    yield _numbered("scale", 3), gaussians.scales
    yield _numbered("rot", 4), gaussians.quats


def _fill(rows: Tensor, part: Gaussians, names: list[str]) -> None:
    """Overwrite the rows (n, P) with what a PLY stores of these gaussians."""
    for group, values in _stored(part):
        if group[0] == "opacity":
            values = values.float().clamp(LEAST_OPACITY, 1 - LEAST_OPACITY).logit_()
        elif group[0] == "scale_0":  # not in the rows: three neighbouring values at a time it takes 16 times as long
            values = values.float().clamp_min(LEAST_SCALE).log_()
        rows.narrow(1, names.index(group[0]), len(group)).unflatten(1, values.shape[1:]).copy_(values)


def _read_header(file: Path) -> tuple[np.dtype, int, int]:
    """What one row of the PLY's vertices is, how many there are, and at which byte they start."""
    lines = []
    with open(file, "rb") as handle:
        if handle.readline(8).strip() != b"ply":
            raise SplatFileError(f"{file} is not a PLY: it doesn't start with the word ply")
        while (line := handle.readline(LONGEST_HEADER)).strip() != b"end_header":
            if not line or handle.tell() > LONGEST_HEADER:
                raise SplatFileError(f"{file} is cut off or not a PLY: its header has no end_header")
            lines.append(line.decode("ascii", "replace").split())
        offset = handle.tell()
    kind = next((words[1] for words in lines if words[:1] == ["format"] and len(words) > 1), "unknown")
    if kind not in _ORDERS:
        raise SplatFileError(f"{file} is a PLY of format {kind}; save it again as binary_little_endian")
    elements: list[tuple[str, int, list]] = []
    for words in lines:
        try:
            match words:
                case ["element", name, count]:
                    elements.append((name, int(count), []))
                case ["property", "list", *_, name]:
                    elements[-1][2].append((name, None))
                case ["property", number, name]:
                    elements[-1][2].append((name, _ORDERS[kind] + _TYPES[number]))
        except (KeyError, IndexError, ValueError) as error:
            raise SplatFileError(f"{file}: its header line '{' '.join(words)}' means nothing in a PLY") from error
    return _vertices(file, elements, offset)


def _vertices(file: Path, elements: list[tuple[str, int, list]], offset: int) -> tuple[np.dtype, int, int]:
    """The element that holds the gaussians; what stands before it is stepped over."""
    for name, count, properties in elements:
        if count < 0 or any(kind is None for _, kind in properties):
            raise SplatFileError(f"{file}: its element {name} has lists or a negative count; gaussians have neither")
        try:
            layout = np.dtype(properties)
        except ValueError as error:
            raise SplatFileError(f"{file}: its element {name} is ambiguous, {error}") from error
        if name == "vertex":
            return layout, count, offset
        offset += count * layout.itemsize
    raise SplatFileError(f"{file} has no element vertex, so no gaussians")


def _bands(file: Path, names: tuple[str, ...]) -> int:
    """How many spherical harmonics the properties hold per channel; SplatFileError if they are no gaussian's."""
    rest = sum(name.startswith("f_rest_") for name in names)
    bands = 1 + rest // 3
    if rest % 3 or math.isqrt(bands) ** 2 != bands:
        raise SplatFileError(
            f"{file} has {rest} properties f_rest, which fill no degree of harmonics: 0, 9, 24 or 45 do"
        )
    missing = sorted({*_properties(bands)} - {"nx", "ny", "nz"} - {*names})
    if missing:
        raise SplatFileError(f"{file} holds no gaussians of a usual 3DGS PLY: it lacks {', '.join(missing)}")
    return bands


# ----------------------------------------------------------------------------------------------------------------- .splat


@torch.no_grad()
def save_splat(gaussians: Gaussians, file: Path | str) -> None:
    """Write a .splat, 32 bytes each, large and opaque gaussians first, so that a viewer shows the scene as it loads.

    Plain colours and opacities are kept in 0..1 and rounded to 8 bits, rotations become unit quaternions of 8 bits; zero
    scales stay zero. The order among equals is kept. Errors as save_ply.
    """
    check(gaussians)
    # in double: the volume of a gaussian of 1e-15 scene units is zero in float32, and would be equal to any other zero
    weight = gaussians.opacities.to(torch.float64, copy=True)
    for axis in range(3):
        weight *= gaussians.scales[:, axis]
    order = weight.argsort(descending=True, stable=True)
    del weight
    plain = replace(gaussians, sh=gaussians.sh[:, :1])
    with _complete(Path(file), SPLAT.itemsize * len(gaussians)) as handle:
        for start in range(0, len(gaussians), BLOCK):
            chosen = order[start : start + BLOCK]  # index_select takes whole rows; an index is five times slower
            part = Gaussians(*(field.index_select(0, chosen).float() for field in vars(plain).values()))
            rows = np.empty(len(part), SPLAT)
            rows["mean"], rows["scale"] = part.means.cpu().numpy(), part.scales.cpu().numpy()
            rgba = torch.cat([part.colors, part.opacities[:, None]], 1).clamp(0, 1) * 255
            quats = part.quats / part.quats.norm(dim=1, keepdim=True)
            rows["rgba"] = rgba.round().to(torch.uint8).cpu().numpy()
            rows["quat"] = (quats * 128 + 128).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            handle.write(rows)


def load_splat(file: Path | str) -> Gaussians:
    """Gaussians of a .splat, on the CPU, in the file's order; SplatFileError if it can't be one."""
    file = Path(file)
    count, over = divmod(file.stat().st_size, SPLAT.itemsize)
    if over:
        size, whole = file.stat().st_size, count * SPLAT.itemsize
        raise SplatFileError(f"{file} has {size} bytes, {size - whole} more than {count} gaussians of {SPLAT.itemsize}")
    gaussians = _unfilled(count, 1)
    for part, taken in _rows(file, SPLAT, 0, gaussians):
        part.means.numpy()[:], part.scales.numpy()[:] = taken["mean"], taken["scale"]
        rgba = torch.from_numpy(taken["rgba"].astype(np.float32)) / 255
        part.sh[:], part.opacities[:] = colors_to_sh(rgba[:, :3]), rgba[:, 3]
        part.quats.numpy()[:] = (taken["quat"].astype(np.float32) - 128) / 128
    return _with_unit_rotations(file, gaussians)


# ------------------------------------------------------------------------------------------------------------------- .spz


@torch.no_grad()
def save_spz(gaussians: Gaussians, file: Path | str) -> None:
    """Write an .spz, version 2, plain colours, about 16 bytes each, in the axes of the PLY, as most programs expect it.

    Positions are as fine as 24 bits allow for the farthest gaussian, FINEST bits after the point at most; scales are kept
    within exp(-10) and exp(5.9) scene units. Errors as save_ply, and ValueError beyond 8 million scene units.
    """
    check(gaussians)
    farthest = max(map(abs, map(float, gaussians.means.aminmax()))) if len(gaussians) else 0.0
    bits = min(FINEST, math.floor(math.log2((2**23 - 1) / max(farthest, 1.0))))
    if bits < 0:
        raise ValueError(f"a gaussian lies {farthest:.3g} scene units out, too far for an .spz; `prune` the far ones")
    plain = replace(gaussians, sh=gaussians.sh[:, :1])
    with _complete(Path(file), 19 * len(gaussians)) as handle, gzip.GzipFile("", "wb", 6, handle, 0) as packed:
        packed.write(struct.pack("<IIIBBBB", SPZ_MAGIC, SPZ_VERSION, len(gaussians), 0, bits, 0, 0))
        # one attribute after the other, each of all gaussians; w of a rotation is left out, so it has to be positive
        for field, bytes_of in (
            ("means", lambda means: _int24((means.double() * 2**bits).round())),
            ("opacities", lambda opacities: _byte(opacities * 255)),
            ("sh", lambda sh: _byte(((sh * SH_DC) / SPZ_CONTRAST + 0.5) * 255)),
            ("scales", lambda scales: _byte((scales.clamp_min(1e-9).log() + 10) * 16)),
            ("quats", lambda quats: _byte((_upright(quats)[:, 1:] + 1) * 127.5)),
        ):
            for part in getattr(plain, field).split(BLOCK):
                packed.write(bytes_of(part.float()).cpu().numpy())


def _byte(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8).contiguous()


def _int24(values: Tensor) -> Tensor:
    """Whole numbers (n, 3) as bytes (n, 3, 3), the least significant one first."""
    return torch.stack([values.long() >> shift & 255 for shift in (0, 8, 16)], -1).to(torch.uint8)


def _upright(quats: Tensor) -> Tensor:
    """Unit quaternions (n, 4) with w >= 0: the same rotations."""
    return quats / quats.norm(dim=1, keepdim=True) * torch.where(quats[:, :1] < 0, -1.0, 1.0)


# ----------------------------------------------------------------------------------------------------------------- points


@torch.no_grad()
def save_points(points: Tensor, colors: Tensor, file: Path | str) -> None:
    """Write points (N, 3) with colours (N, 3) in 0..1 as a binary PLY of x y z and red green blue, 15 bytes each.

    ValueError if they are not as many or a number is NaN or infinite; SplatFileError if the place can't be written.
    """
    if points.shape != colors.shape or points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points {tuple(points.shape)} and colours {tuple(colors.shape)} should both be (N, 3)")
    blocks = list(zip(points.split(BLOCK), colors.split(BLOCK), strict=True))  # views
    broken = sum(int((~torch.isfinite(torch.cat(block, 1).float()).all(1)).sum()) for block in blocks)
    if broken:
        raise ValueError(f"{broken} of {len(points)} points have NaN or infinite values; leave them out")
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [f"property float {name}" for name in "xyz"]
    lines += [f"property uchar {name}" for name in ("red", "green", "blue")]
    header = "\n".join([*lines, "end_header\n"]).encode("ascii")
    with _complete(Path(file), len(header) + POINT.itemsize * len(points)) as handle:
        handle.write(header)
        for part, shades in blocks:
            rows = np.empty(len(part), POINT)
            rows["point"], rows["rgb"] = part.cpu().numpy(), _byte(shades.float() * 255).cpu().numpy()
            handle.write(rows)


# --------------------------------------------------------------------------------------------------------------------- all


def _unfilled(count: int, bands: int) -> Gaussians:
    shapes = (count, 3), (count, 4), (count, 3), (count,), (count, bands, 3)
    return Gaussians(*(torch.empty(shape) for shape in shapes))


def check(gaussians: Gaussians) -> None:
    """ValueError if the fields don't belong together or a gaussian can't be drawn."""
    bands = (degree(gaussians) + 1) ** 2 if gaussians.sh.ndim == 3 else 1
    for field, right in vars(_unfilled(0, bands)).items():
        shape, expected = tuple(getattr(gaussians, field).shape), (len(gaussians), *right.shape[1:])
        if shape != expected:
            raise ValueError(f"the {field} of {len(gaussians)} gaussians have shape {shape}, not {expected}")
    if broken := sound(gaussians, BLOCK)[1]:
        raise ValueError(f"{broken} of {len(gaussians)} gaussians {BROKEN}; `sound` leaves them out")


def _with_unit_rotations(file: Path, gaussians: Gaussians) -> Gaussians:
    """The gaussians just read, their rotations scaled in place; SplatFileError if any can't be drawn."""
    if broken := sound(gaussians, BLOCK)[1]:
        raise SplatFileError(f"{file}: {broken} of {len(gaussians)} gaussians {BROKEN}; remove them where it was made")
    for quats in gaussians.quats.split(BLOCK):
        quats /= quats.norm(dim=1, keepdim=True)
    return gaussians


def _check_length(file: Path, layout: np.dtype, count: int, offset: int) -> None:
    """SplatFileError if a file ends before its last row."""
    size, needed = file.stat().st_size, offset + count * layout.itemsize
    if size < needed:
        raise SplatFileError(
            f"{file} is cut off: {size} bytes of {needed} for {count} gaussians; fetch or save it again"
        )


def _rows(file: Path, layout: np.dtype, offset: int, gaussians: Gaussians) -> Iterator[tuple[Gaussians, np.ndarray]]:
    """Block by block the gaussians to be filled, and their rows in a file. A mapping would kill us if somebody cut it off."""
    with open(file, "rb") as handle:
        handle.seek(offset)
        for start in range(0, len(gaussians), BLOCK):
            part = gaussians.select(slice(start, start + BLOCK))
            rows = np.fromfile(handle, layout, len(part))
            if len(rows) < len(part):
                raise SplatFileError(f"{file} was cut off while it was read")
            yield part, rows


@contextmanager
def _complete(file: Path, size: int) -> Iterator[BinaryIO]:
    """A file to write `size` bytes to that takes its place once they are on the disk, and vanishes if anything fails."""
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, file)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise SplatFileError(
                f"{file} can't be written: {error.strerror}; it needs a folder that exists and {size / 1e6:.1f} MB"
            ) from error
        raise
