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
from pathlib import Path

import torch
from torch import Tensor

from ..array_files import Place, as_safetensors, read_header
from ..files import FileError, parse_json
from ..memory.retrieval import Keyframe
from .world import Chunk, Latents, hashes

RECORD = "lyra"  # the one key of the header's metadata; several would be written in any order
PIECEWISE = ("frames", "invented")  # summed frame by frame, so that one can be read alone: Chunk.sums


class WorldFileError(FileError):
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


def encode(tensors: Mapping[str, Tensor], record: Mapping, sums: Mapping[str, list[str]]) -> list[bytes | memoryview]:
    """The content, in pieces, of a file that holds these tensors, their sums, and a record of plain JSON values.

    sums: those of PIECEWISE, as a chunk has them.
    """
    rest = sorted(tensors.keys() - sums.keys())
    said = {**record, "sums": {**sums, **dict(zip(rest, hashes(tensors[name] for name in rest), strict=True))}}
    return as_safetensors(tensors, {RECORD: json.dumps(said, sort_keys=True)})


def _sum(content) -> str:
    return hashlib.sha256(content).hexdigest()


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
        shape, begin, end, sums = place.shape, place.begin, place.end, self.sums_of(name)
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

    def sums_of(self, name: str) -> list[str]:
        """Of a tensor, or of each part of one of PIECEWISE; none in files of versions 1 and 2."""
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
    try:
        found = read_header(path)
        record = parse_json(found.metadata.get(RECORD, "{}"), "its record")
        if not isinstance(record, dict) or (record and not isinstance(record.get("sums"), dict)):
            raise FileError("its sums are none")
        _check_places(found.places, len(found.raw), path.stat().st_size)
    except FileNotFoundError:
        raise DamagedFile(path, "is missing") from None
    except OSError as problem:
        raise DamagedFile(path, f"can't be read ({problem.strerror})") from None
    except FileError as problem:
        raise DamagedFile(path, f"is damaged ({str(problem).removeprefix(f'{path} ')})") from None
    return ChunkFile(path, _sum(found.raw), found.places, record)


def _check_places(places: Mapping[str, Place], start: int, size: int) -> None:
    for place in sorted(places.values(), key=lambda place: (place.begin, place.end)):
        if place.begin != start:
            raise FileError("its tensors leave gaps")
        if place.dtype is None:
            raise FileError("it holds tensors of a kind that no world has")
        start = place.end
    if start != size:
        raise FileError(f"it has {size} bytes instead of {start}: it was cut off or changed")


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

    @cached_property
    def sums(self) -> dict[str, list[str]]:
        """As its file says, whose parts are compared with that whenever they are read."""
        if self._file is None or not self._file.record:
            return super().sums
        return {name: self._file.sums_of(name) for name in PIECEWISE}

    def frame(self, index: int) -> Tensor:
        return self._file.read("frames", index) if self._file else self.frames[index]

    def bits(self, index: int) -> Tensor:
        return self._file.read("invented", index) if self._file else self.invented_bits[index]


class SavedKeyframe(Keyframe):
    """A keyframe in the file of its chunk; its depth, which every plan looks at, is kept once it was read."""

    depth = _Stored(lambda file, keyframe: file.read(f"depth.{keyframe.frame}"), keep=True)
    image = _Stored(lambda file, keyframe: file.read(f"image.{keyframe.frame}"))
    latent = _Stored(lambda file, keyframe: file.read(f"latent.{keyframe.frame}"))
