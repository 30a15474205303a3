"""The file of one chunk: its tensors, a sum of every piece of them, and a record of which state of which world it is.

A .safetensors file that any reader of those opens. It is read piece by piece, never mapped: a mapped file that somebody
cuts off kills the process that looks at it. Every piece is compared with its sum whenever it is read, so a flipped bit
becomes an error and no picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from ..memory.retrieval import Keyframe
from .world import Chunk, Latents

RECORD = "lyra"  # the one key of the header's metadata; several would be written in any order
PIECEWISE = ("frames", "invented")  # summed frame by frame, so that one can be read alone
LARGEST_HEADER = 1 << 24
TYPES = {
    "U8": torch.uint8, "BOOL": torch.bool, "I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16,
    "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class WorldFileError(ValueError):
    """A folder that holds no usable world; the message names the file, what was found and what to do."""


class DamagedFile(WorldFileError):
    """A file of a world that is not what was saved."""

    def __init__(self, path: Path, fault: str):
        super().__init__(f"{path} {fault}. {way_out(path.parent)}")
        self.fault = fault


def way_out(folder: Path) -> str:
    return (
        "Whoever made this world and has it still open can save it to this folder again, which writes what is damaged; "
        f"`python tools/comfy.py check {folder} --repair` keeps all that is whole; else restore it from a backup"
    )


def encode(tensors: Mapping[str, Tensor], record: Mapping) -> bytes:
    """The bytes of a file that holds these tensors, their sums, and a record of plain JSON values."""
    sums = {name: _sums(name, tensor) for name, tensor in sorted(tensors.items())}
    # copies, because safetensors refuses tensors that share memory
    apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return serialize(apart, {RECORD: json.dumps({**record, "sums": sums}, sort_keys=True)})


def header_sum(content: bytes) -> str:
    """A hash of the header that a file begins with."""
    return hashlib.sha256(content[: 8 + int.from_bytes(content[:8], "little")]).hexdigest()


def _sums(name: str, tensor: Tensor) -> str | list[str]:
    pieces = tensor.unbind() if name in PIECEWISE else [tensor]
    found = [_sum(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data) for piece in pieces]
    return found if name in PIECEWISE else found[0]


def _sum(content) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


@dataclass(frozen=True)
class ChunkFile:
    """A file whose header has been read."""

    path: Path
    header: str  # hash of the header
    places: Mapping[str, Place]
    record: Mapping  # with `sums` of every tensor; empty in files of versions 1 and 2, which have none

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or the part [index] of one of PIECEWISE; WorldFileError if it is not what was saved."""
        place = self.places[name]
        shape, begin, end, sums = place.shape, place.begin, place.end, self._sums_of(name)
        if index is not None:
            step = (end - begin) // shape[0]
            begin, shape = begin + index * step, shape[1:]
            end, sums = begin + step, sums[index : index + 1]
        content = _read(self.path, begin, end)
        step = len(content) // max(1, len(sums))
        for number, expected in enumerate(sums):
            if _sum(memoryview(content)[number * step : (number + 1) * step]) != expected:
                which = f"{name}[{number if index is None else index}]" if name in PIECEWISE else name
                raise DamagedFile(self.path, f"is damaged: its {which} is not what was saved, bits have changed")
        if not content:
            return torch.empty(shape, dtype=place.dtype)
        # torch's own memory is aligned, a bytearray's is not; matrix products round by alignment, and a walk that goes on
        # from a folder shall end in the same bits as one that never stopped
        return torch.frombuffer(content, dtype=torch.uint8).view(place.dtype).view(shape).clone()

    def _sums_of(self, name: str) -> list[str]:
        if not self.record:
            return []
        sums = self.record["sums"].get(name)
        expected = self.places[name].shape[0] if name in PIECEWISE else 1
        if len(found := sums if isinstance(sums, list) else [sums]) != expected:
            raise DamagedFile(self.path, f"is damaged: it has {len(found)} sums for its {name}, expected {expected}")
        return found

    def check(self) -> None:
        """Read it all; WorldFileError if anything is not what was saved."""
        for name in self.places:
            self.read(name)


def open_chunk(path: Path) -> ChunkFile:
    """The file of a chunk, of which only the header is read; WorldFileError if it is missing, cut off or no such file."""
    length = int.from_bytes(_read(path, 0, 8), "little")
    if length > LARGEST_HEADER:
        raise DamagedFile(path, f"is damaged: its header would have {length} bytes")
    header = bytes(_read(path, 8, 8 + length))
    try:
        places = json.loads(header)
        record = json.loads(places.pop("__metadata__", {}).get(RECORD, "{}"))
        if record and not isinstance(record["sums"], dict):
            raise ValueError("its sums are none")
        places = {str(name): _place(item, 8 + length) for name, item in places.items()}
        _check_places(places, 8 + length, path.stat().st_size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise DamagedFile(path, f"is damaged ({problem})") from None
    return ChunkFile(path, _sum(length.to_bytes(8, "little") + header), places, record)


def _place(item: Mapping, start: int) -> Place:
    shape, (begin, end), dtype = tuple(item["shape"]), item["data_offsets"], TYPES[item["dtype"]]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"a shape of {shape}")
    if end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for a shape of {shape}")
    return Place(dtype, shape, start + begin, start + end)


def _check_places(places: Mapping[str, Place], start: int, size: int) -> None:
    for place in sorted(places.values(), key=lambda place: (place.begin, place.end)):
        if place.begin != start:
            raise ValueError("its tensors overlap or leave gaps")
        start = place.end
    if start != size:
        raise ValueError(f"it has {size} bytes instead of {start}: it was cut off or changed")


def _read(path: Path, begin: int, end: int) -> bytearray:
    """Bytes of a file, whatever happens to it meanwhile; writable, as tensors are."""
    try:
        with open(path, "rb", buffering=0) as handle:
            size = handle.seek(0, 2)
            if size < end:
                raise DamagedFile(path, f"is damaged: it shrank to {size} bytes of {end} or more, it was cut off")
            handle.seek(begin)
            content, done = bytearray(end - begin), 0
            while done < len(content):
                count = handle.readinto(memoryview(content)[done:])
                if not count:
                    raise DamagedFile(path, "was cut off while it was read")
                done += count
            return content
    except FileNotFoundError:
        raise DamagedFile(path, "is missing") from None
    except OSError as problem:
        raise DamagedFile(path, f"can't be read ({problem.strerror})") from None


# ------------------------------------------------------------------------------------------------ parts read when needed


class _Stored:
    """A field that may hold a ChunkFile, from which it is then read each time; or once, with `keep`."""

    def __init__(self, read, keep: bool = False):
        self.read, self.keep = read, keep

    def __set_name__(self, owner, name: str) -> None:
        self.name = name

    def __get__(self, owner, kind=None):
        if owner is None:
            return self
        value = owner.__dict__[self.name]
        if isinstance(value, ChunkFile):
            value = self.read(value, owner)
            if self.keep:
                owner.__dict__[self.name] = value
        return value

    def __set__(self, owner, value) -> None:  # dataclasses come here once, from __init__
        owner.__dict__[self.name] = value


class SavedChunk(Chunk):
    """A chunk whose pictures, masks and latents stay in its file until they are looked at: every field may be that file."""

    frames = _Stored(lambda file, chunk: file.read("frames"))
    invented_bits = _Stored(lambda file, chunk: file.read("invented"))
    newest = _Stored(lambda file, chunk: file.read("newest"))
    latents = _Stored(lambda file, chunk: Latents(*(file.read(f"latents.{name}") for name in Latents._fields)))

    @cached_property
    def _file(self) -> ChunkFile | None:
        found = self.__dict__["frames"]
        return found if isinstance(found, ChunkFile) else None

    def frame(self, index: int) -> Tensor:
        return self._file.read("frames", index) if self._file else self.frames[index]

    def bits(self, index: int) -> Tensor:
        return self._file.read("invented", index) if self._file else self.invented_bits[index]


class SavedKeyframe(Keyframe):
    """A keyframe in the file of its chunk; its depth, which every plan looks at, is kept once it was read."""

    depth = _Stored(lambda file, keyframe: file.read(f"depth.{keyframe.frame}"), keep=True)
    image = _Stored(lambda file, keyframe: file.read(f"image.{keyframe.frame}"))
    latent = _Stored(lambda file, keyframe: file.read(f"latent.{keyframe.frame}"))
