"""Files of tensors, whatever wrote them: .safetensors, what torch.save made, and folders of torch's distributed format.

Each is read as a list of entries, whose tensors are fetched one by one; and nothing is unpickled that is not a tensor.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ..array_files import DTYPES, archive, read_header
from ..files import FileError, check_size, parsing, reading

NAMES = {dtype: name for name, dtype in DTYPES.items()}
BYTES = "builtins bytearray"
LARGEST_METADATA = 1 << 26  # bytes of a list of a checkpoint's pieces


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not yet read; only a name for what is no plain tensor."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    read: Callable[[torch.dtype], Tensor] | None = None  # reads it and converts it to this dtype

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize  # bytes


def read_entries(source: Path) -> list[Entry]:
    """All that a source holds, in its order; nothing is read but names, shapes and dtypes. FileError if it is damaged."""
    with reading(source):
        return _read_entries(source)


def _read_entries(source: Path) -> list[Entry]:
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if not source.is_dir():
        reader = {".safetensors": _safetensors, ".pth": _pickled, ".pt": _pickled, ".bin": _pickled}.get(source.suffix)
        if reader is None:
            raise ValueError(f"{source} is no .safetensors, .pth, .pt or .bin file and no folder of a checkpoint")
        return reader(source)
    for folder in (source, source / "model", source / "model" / "model"):
        if (folder / ".metadata").is_file():
            return _distributed(folder)
    shards = sorted(source.glob("*.safetensors"))
    if not shards and (source / "adapter_model.bin").is_file():  # an adapter as PEFT saved it before safetensors
        return _pickled(source / "adapter_model.bin")
    if not shards:
        raise ValueError(
            f"{source} holds neither .metadata with .distcp files nor .safetensors files: name a checkpoint"
        )
    return [entry for shard in shards for entry in _safetensors(shard)]


def _from_file(
    file: Path, offset: int, shape: tuple, stride: tuple, dtype: torch.dtype
) -> Callable[[torch.dtype], Tensor]:
    """Entry.read for a tensor that lies in a file as it would in memory. Mapped pages would count as used memory."""
    count = prod(shape) and 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))

    def read(wanted: torch.dtype) -> Tensor:
        flat = torch.empty(count, dtype=dtype)
        with open(file, "rb") as handle:
            handle.seek(offset)
            if handle.readinto(flat.view(torch.uint8).numpy()) < count * dtype.itemsize:
                raise ValueError(f"{file} became shorter while it was read; convert again")
        return flat.as_strided(shape, stride).to(wanted)

    return read


def read_metadata(source: Path) -> dict[str, str]:
    """What .safetensors files say beside their tensors; nothing for other files. ValueError if it is damaged."""
    shards = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    told = [read_header(shard).metadata for shard in shards if shard.suffix == ".safetensors"]
    return {key: text for metadata in told for key, text in metadata.items()}


def _safetensors(file: Path) -> list[Entry]:
    return [
        Entry(name)
        if place.dtype is None
        else Entry(name, place.shape, place.dtype, _from_file(file, place.begin, place.shape, _stride(place.shape), place.dtype))
        for name, place in read_header(file).places.items()
    ]


def _stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor whose numbers lie one after the other."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _pickled(file: Path) -> list[Entry]:
    """What torch.save wrote: a dictionary of tensors, or one under "state_dict", "module" or "model"."""
    records = _records(file)
    what = "can't be read as a dictionary of tensors, and nothing else in it will be run; save only the state_dict"
    # fake tensors know where they lie in the file; BytesIO is how TransformerEngine may save its state
    with parsing(file, what), torch.serialization.safe_globals([io.BytesIO]), FakeTensorMode():
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "module", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{file} holds a {type(tensors).__name__}, not a dictionary of tensors; save only the state_dict"
        )
    if odd := [type(name).__name__ for name in tensors if not isinstance(name, (str, int))]:
        raise FileError(f"{file} holds tensors by the name of a {odd[0]}; save only the state_dict")
    return [_located(file, records, str(name), value) for name, value in tensors.items()]


def _records(file: Path) -> dict[int, int]:
    """Where the zip's records start, and their sizes in bytes. torch computes places; a zip of another tool has others."""
    with open(file, "rb") as handle:
        if handle.read(2) != b"PK":
            raise ValueError(
                f"{file} is no zip; if it is of an old torch, load it there and torch.save its state_dict anew"
            )
        with archive(handle, file) as opened, parsing(file, "is cut off or damaged; download it again"):
            records = {}
            for member in opened.infolist():
                if member.filename.endswith(("/byteorder", "/data.pkl")):
                    check_size(file, member.file_size, file.stat().st_size, member.filename)
                    _check_record(file, member.filename, opened.read(member))
                handle.seek(member.header_offset + 26)  # lengths of the name and the extra field, which precede the content
                start = member.header_offset + 30 + sum(struct.unpack("<HH", handle.read(4)))
                records[start] = member.file_size if member.compress_type == zipfile.ZIP_STORED else 0
    return records


def _check_record(file: Path, name: str, content: bytes) -> None:
    """FileError for what torch must not be given: numbers of another byte order, on which it crashes, and wishes for memory."""
    if name.endswith("/byteorder"):
        if content.decode("latin-1") != sys.byteorder:
            raise FileError(
                f"{file} was written on a machine of another byte order ({content[:9]!r}, this one is {sys.byteorder}); "
                "load it there, and save its state_dict as .safetensors"
            )
        return
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and (argument.endswith(("Tensor", "UntypedStorage", "TypedStorage")) or argument == BYTES):
            raise FileError(f"{file} makes a {argument.replace(' ', '.')} of any size, which no state_dict needs; save only that")


def _located(file: Path, records: dict[int, int], name: str, value) -> Entry:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in NAMES:
        return Entry(name)
    storage, shape, stride = value.untyped_storage(), tuple(value.shape), value.stride()
    place = storage._checkpoint_offset
    if storage.nbytes() > records.get(place, 0):
        raise ValueError(f"{file} was packed by another program than torch ({name}); unpack it and torch.save it anew")
    offset = place + value.storage_offset() * value.dtype.itemsize
    return Entry(name, shape, value.dtype, _from_file(file, offset, shape, stride, value.dtype))


# ------------------------------------------------------------------------------------------- torch's distributed format


class _MetadataUnpickler(pickle._Unpickler):
    """Builds what a DCP folder's .metadata consists of, and nothing else: a pickle could run any program.

    The one in Python, whose memory is a dictionary: that in C makes as many places as a file asks for.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta BytesStorageMetadata "
        "TensorStorageMetadata ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
        "torch": "Size",
        "collections": "OrderedDict",
    }

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePosixPath  # where it was saved, on a system that may not be this one
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module[:80]}.{name[:80]}, which is not needed in a checkpoint")

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):  # its state would become that of all that are made of it
            raise pickle.UnpicklingError("it changes a class, which is not needed in a checkpoint")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _distributed(folder: Path) -> list[Entry]:
    """What torch.distributed.checkpoint wrote; a tensor may lie in pieces in several files."""
    if not torch.distributed.is_available():
        raise ValueError(f"{folder} needs a torch with torch.distributed, which this one lacks; convert it elsewhere")
    # here, because it takes a second and not every torch has it
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _distributed_metadata(folder)
    reader = FileSystemReader(folder)
    with parsing(folder / ".metadata", "is not read; download the checkpoint again, from its publisher"):
        reader.set_up_storage_reader(metadata, is_coordinator=True)
    pieces: dict[str, list] = {}
    for index, piece in metadata.storage_data.items():
        pieces.setdefault(index.fqn, []).append(piece)

    def fetch(name: str, shape: torch.Size) -> Callable[[torch.dtype], Tensor]:
        def read(dtype: torch.dtype) -> Tensor:
            with parsing(folder, f"{name} is damaged, download it again"):
                for piece in pieces[name]:
                    _check_piece(folder, piece)
                wanted = {name: torch.empty(shape, dtype=dtype)}
                planner = DefaultLoadPlanner(flatten_state_dict=False)
                planner.set_up_planner(wanted, metadata, is_coordinator=True)
                reader.read_data(planner.create_local_plan(), planner).wait()
            return wanted[name]

        return read

    entries = []
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or stored.properties.dtype not in NAMES:
            entries.append(Entry(name))
            continue
        if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
            raise FileError(f"{folder / '.metadata'} has only parts of {name}; download the checkpoint again")
        entry = Entry(name, tuple(stored.size), stored.properties.dtype, fetch(name, stored.size))
        if entry.size > sum(piece.length for piece in pieces.get(name, ())):
            raise FileError(f"{folder / '.metadata'} says that {name} is {entry.shape}, more than its files hold; download it again")
        entries.append(entry)
    return entries


def _check_piece(folder: Path, piece) -> None:
    """FileError unless a piece of a file is an archive of torch whose numbers are of this machine's byte order."""
    name = folder / piece.relative_path
    with open(name, "rb") as handle:
        handle.seek(piece.offset)
        content = io.BytesIO(handle.read(piece.length))
    with archive(content, name) as opened:
        for member in opened.infolist():
            if member.filename.endswith(("/byteorder", "/data.pkl")):
                _check_record(name, member.filename, opened.read(member))


def _distributed_metadata(folder: Path):
    """torch's Metadata, after a look whether it is one and its files are there, none of them elsewhere."""
    file = folder / ".metadata"
    with open(file, "rb") as handle:
        content = handle.read(LARGEST_METADATA + 1)
    if len(content) > LARGEST_METADATA:
        raise FileError(f"{file} is larger than {LARGEST_METADATA >> 20} MB, which no list of pieces is")
    ends: dict[str, int] = {}
    with parsing(file, "is not read; download the checkpoint again, from its publisher"):
        for _ in pickletools.genops(content):  # whether all that it says is there, before memory is taken for it
            pass
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        for piece in _pieces(metadata):
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    places = [folder.resolve()]
    if "snapshots" in places[0].parts:  # of the hub's cache, which keeps the files themselves beside them
        places.append(Path(*places[0].parts[: places[0].parts.index("snapshots")], "blobs"))
    for name, end in ends.items():
        if not any((folder / name).resolve().is_relative_to(place) for place in places):
            raise FileError(f"{folder / name} lies outside of the checkpoint, or is a link that leads there; it is not read")
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found < end:
            raise FileError(f"{folder / name} has {found} bytes instead of {end}; download it again")
    return metadata


def _pieces(metadata) -> list:
    """The pieces of files that a Metadata lists; TypeError or ValueError unless it is one from top to bottom."""
    from torch.distributed.checkpoint import metadata as kinds
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    def need(value: object, kind: type, what: str) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")

    def need_lengths(value: object, what: str) -> None:
        if not isinstance(value, (tuple, list)) or not all(type(length) is int and length >= 0 for length in value):
            raise ValueError(f"{what} is no list of lengths")

    need(metadata, kinds.Metadata, "it")
    need(metadata.state_dict_metadata, dict, "its list of tensors")
    need(metadata.storage_data, dict, "its list of pieces")
    for name, stored in metadata.state_dict_metadata.items():
        need(name, str, "the name of a tensor")
        if isinstance(stored, kinds.TensorStorageMetadata):
            need(stored.properties, kinds.TensorProperties, f"what {name} is")
            need(stored.properties.dtype, torch.dtype, f"the dtype of {name}")
            need_lengths(stored.size, f"the size of {name}")
            for chunk in stored.chunks:
                need(chunk, kinds.ChunkStorageMetadata, f"a part of {name}")
                need_lengths(chunk.sizes, f"a part of {name}")
                need_lengths(chunk.offsets, f"a part of {name}")
    for index, piece in metadata.storage_data.items():
        need(index, kinds.MetadataIndex, "a place")
        need(piece, _StorageInfo, "a piece")
        need(piece.relative_path, str, "the name of a piece")
        need_lengths([piece.offset, piece.length], "where a piece is")
    return list(metadata.storage_data.values())
