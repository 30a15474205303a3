"""Files of numbers in binary: NumPy's .npy and .npz, zip archives, and .safetensors.

What a header promises is compared with the bytes that are there, so that no damaged or hostile file takes memory, time or a
way out of its parser. Whatever is wrong is a FileError.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .files import FileError, check_size, parse_json, parsing, write_bytes

EXPANSION = 1032  # times that deflate can make something smaller
LONGEST_HEADER = 1 << 14  # bytes, of an array
LARGEST_HEADER = 1 << 26  # of a .safetensors file; a network of 1,500 tensors needs a three-hundredth
NO_NPZ = "not an npz archive, or it is cut off; save one with numpy.savez"
MOST_AXES, LONGEST_AXIS = 16, 1 << 48  # of a tensor; what is longer can't be counted through
PICKLED = "pickled Python objects are refused because reading them runs their code, so save plain numbers"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


# ------------------------------------------------------------------------------------------------------------------ archives


@contextmanager
def archive(
    source: BinaryIO, name: str | Path, what: str = "is cut off or damaged; download it again"
) -> Iterator[zipfile.ZipFile]:
    """A zip archive that can be what it says: plain members inside of it, each with as many bytes as it can hold.

    `what` is said of one that can't even be opened.
    """
    size = source.seek(0, os.SEEK_END)
    with parsing(name, what):
        opened = zipfile.ZipFile(source)
    with opened:
        for member in opened.infolist():
            if fault := _fault(member, size):
                raise FileError(
                    f"{name}: {member.filename[:80]!r} in it {fault}; it is damaged, fetch or save it again"
                )
        if len(set(opened.namelist())) != len(opened.namelist()):
            raise FileError(f"{name}: holds two members of one name; unpack it and save it again")
        yield opened


def _fault(member: zipfile.ZipInfo, size: int) -> str:
    """Why a member can't be what the directory of its archive says; empty if it can."""
    most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: EXPANSION}.get(member.compress_type)
    if most is None or member.flag_bits & 0x61:  # encrypted, or a patch of something
        return "is packed or encrypted in a way that is not read"
    if not 0 <= member.header_offset <= size - member.compress_size - 30:
        return "lies outside of the file"
    if member.file_size > most * member.compress_size or (most == 1 and member.file_size < member.compress_size):
        return f"would have {member.file_size:,} bytes, made of {member.compress_size:,}"
    return ""


# -------------------------------------------------------------------------------------------------------------------- arrays


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, of plain numbers and texts."""
    found = {}
    with open(path, "rb") as file, archive(file, path, NO_NPZ) as opened:
        members = [member for member in opened.infolist() if member.filename.endswith(".npy")]
        check_size(path, sum(member.file_size for member in members), os.fstat(file.fileno()).st_size, "its arrays")
        for member in members:
            what = f"its array {member.filename.removesuffix('.npy')[:80]!r} can't be read"
            with parsing(path, what), opened.open(member) as handle:
                found[member.filename.removesuffix(".npy")] = _array(handle, member.file_size, path, what)
    return found


def read_npy(path: str | Path) -> np.ndarray:
    """The array of a .npy, of plain numbers."""
    what = "no plain NumPy array"
    with parsing(path, what), open(path, "rb") as file:
        return _array(file, os.fstat(file.fileno()).st_size, path, what)


def _array(handle: BinaryIO, size: int, path: str | Path, what: str) -> np.ndarray:
    """The array that a file of `size` bytes holds, from its first byte to its last."""
    shape, fortran, dtype, start = _array_header(handle)
    if dtype.hasobject:
        raise FileError(f"{path}: {what}: {PICKLED}")
    if dtype.names or dtype.shape or dtype.kind not in "biufUS" or not dtype.itemsize:
        raise FileError(f"{path}: {what}: it holds {str(dtype)[:80]}, not plain numbers")
    count = prod(shape)
    if count * dtype.itemsize != size - start:
        raise FileError(
            f"{path}: {what}: {str(shape)[:80]} of {dtype} are {count * dtype.itemsize} bytes, found {size - start}"
        )
    content = bytearray(size - start)
    done = 0
    while done < len(content) and (step := handle.readinto(memoryview(content)[done:])):
        done += step
    if done < len(content) or handle.read(1):  # at the end, an archive compares its sum
        raise FileError(f"{path}: {what}: it was cut off")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _array_header(handle: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns come first, dtype, and at which byte the numbers start."""
    head = handle.read(8)
    width = {1: 2, 2: 4}.get(head[6] if head.startswith(b"\x93NUMPY") and len(head) == 8 else 0)
    if width is None:
        raise ValueError("it does not begin as one")
    size = handle.read(width)
    length = int.from_bytes(size, "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header would have {length} bytes")
    header = io.BytesIO(size + handle.read(length))
    parse = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse(header, max_header_size=LONGEST_HEADER)
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its shape is {str(shape)[:80]}")
    return shape, fortran, dtype, 8 + width + length


# --------------------------------------------------------------------------------------------------------------- .safetensors


def as_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """The content of a .safetensors file in pieces, the header first. What lies in order on the processor is not copied.

    The library's own writer hands the whole file over as one more copy, or says no more of a full disk than that it failed.
    """
    # the widest first: every number then lies at a multiple of its width
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    said, end = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        said[name] = {"dtype": KINDS[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    header = json.dumps(said, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return [len(header).to_bytes(8, "little") + header, *(bytes_of(tensors[name]) for name in names)]


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Make a .safetensors file, whole or not at all, as `files.write_bytes`; a process that is killed leaves nothing in its way.

    The library's own writer leaves a file of a random name, which nobody knows to be litter.
    """
    write_bytes(file, *as_safetensors(tensors, metadata))


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory, in order; shared with it where it can be."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file."""

    dtype: torch.dtype | None  # None: of a kind that is not read
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


@dataclass(frozen=True)
class Header:
    """What a .safetensors file begins with."""

    places: Mapping[str, Place]
    metadata: Mapping[str, str]
    raw: bytes  # with its length


def read_header(path: str | Path) -> Header:
    """The header of a .safetensors file, every place of which lies inside of it and none over another."""
    again = "it is cut off or no .safetensors file; download it again"
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        raw = handle.read(8)
        length = int.from_bytes(raw, "little")
        if len(raw) < 8 or length > min(LARGEST_HEADER, size - 8):
            raise FileError(f"{path} has {size} bytes and no readable header: {again}")
        raw += handle.read(length)
    try:
        said = parse_json(raw[8:].decode(), "the header")
        if not isinstance(said, dict):
            raise ValueError(f"a {type(said).__name__}")
        metadata = said.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError(f"its metadata {str(metadata)[:80]} are no texts")
        places = {name: _place(name, item, 8 + length) for name, item in said.items()}
    except ValueError as problem:
        raise FileError(f"{path} has {size} bytes and no readable header ({problem}): {again}") from None
    end = 8 + length
    for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].end)):
        if place.begin < end:
            raise FileError(f"{path} is damaged: {name[:80]!r} lies over another tensor; download it again")
        end = place.end
    if end > size:
        raise FileError(f"{path} has {size} bytes instead of {end}: it is cut off, download it again")
    return Header(places, metadata, raw)


def _place(name: str, item: object, start: int) -> Place:
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise ValueError(f"{name[:80]!r} is {str(item)[:80]}")
    kind, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(kind, str) or not _are_whole(shape, MOST_AXES) or not _are_whole(offsets, 2) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r} is {str(item)[:80]}")
    (begin, end), dtype = offsets, DTYPES.get(kind)
    if end < begin or (dtype and end - begin != prod(shape) * dtype.itemsize):
        raise ValueError(f"{name[:80]!r} has {end - begin} bytes for {shape} {kind}")
    return Place(dtype, tuple(shape), start + begin, start + end)


def _are_whole(numbers: object, most: int) -> bool:
    return (
        isinstance(numbers, list)
        and len(numbers) <= most
        and all(type(n) is int and 0 <= n <= LONGEST_AXIS for n in numbers)
    )
