"""Files of tensors, whatever wrote them: .safetensors, what torch.save made, and folders of torch's distributed format.

Each is read as a list of entries, whose tensors are fetched one by one; and nothing is unpickled that is not a tensor.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    """All that a source holds, in its order; nothing is read but names, shapes and dtypes. ValueError if it is damaged."""
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
    told = [_header(shard)[0].get("__metadata__") for shard in shards if shard.suffix == ".safetensors"]
    return {key: text for metadata in told if isinstance(metadata, dict) for key, text in metadata.items()}


def _header(file: Path) -> tuple[dict, int]:
    """The header of a .safetensors file, and at which byte its tensors start."""
    found = file.stat().st_size
    with open(file, "rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        text = handle.read(start - 8) if start <= found else b""
    try:
        header = json.loads(text)
        header.get("__metadata__")
        return header, start
    except (ValueError, AttributeError) as problem:
        raise ValueError(
            f"{file} has {found} bytes and no readable header ({problem!r}): it is cut off or no .safetensors file; "
            "download it again"
        ) from None


def _safetensors(file: Path) -> list[Entry]:
    (header, start), found = _header(file), file.stat().st_size
    header.pop("__metadata__", None)
    try:
        items = [(name, t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for name, t in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"{file} has {found} bytes and no readable header ({problem!r}): it is cut off or no .safetensors file; "
            "download it again"
        ) from None
    needed = start + max((end for *_, end in items), default=0)
    if needed > found:
        raise ValueError(f"{file} has {found} bytes instead of {needed}: it is cut off, download it again")
    return [
        _ranged(file, name, DTYPES.get(kind), shape, start + begin, end - begin)
        for name, kind, shape, begin, end in items
    ]


def _ranged(file: Path, name: str, dtype: torch.dtype | None, shape: tuple[int, ...], offset: int, size: int) -> Entry:
    if dtype is None:
        return Entry(name)
    if size != prod(shape) * dtype.itemsize:
        raise ValueError(f"{file} is damaged: {name} has {size} bytes for {shape} {dtype}; download it again")
    return Entry(name, shape, dtype, _from_file(file, offset, shape, torch.empty(shape, device="meta").stride(), dtype))


def _pickled(file: Path) -> list[Entry]:
    """What torch.save wrote: a dictionary of tensors, or one under "state_dict", "module" or "model"."""
    records = _records(file)
    try:
        # fake tensors know where they lie in the file; BytesIO is how TransformerEngine may save its state
        with torch.serialization.safe_globals([io.BytesIO]), FakeTensorMode():
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"{file} can't be read as a dictionary of tensors, and nothing else in it will be run; "
            f"save only the state_dict: {problem}"
        ) from None
    for key in ("state_dict", "module", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{file} holds a {type(tensors).__name__}, not a dictionary of tensors; save only the state_dict"
        )
    return [_located(file, records, str(name), value) for name, value in tensors.items()]


def _records(file: Path) -> dict[int, int]:
    """Where the zip's records start, and their sizes in bytes. torch computes places; a zip of another tool has others."""
    with open(file, "rb") as handle:
        if handle.read(2) != b"PK":
            raise ValueError(
                f"{file} is no zip; if it is of an old torch, load it there and torch.save its state_dict anew"
            )
        try:
            listing = zipfile.ZipFile(handle).infolist()
        except zipfile.BadZipFile as problem:
            raise ValueError(f"{file} is cut off or damaged ({problem}); download it again") from None
        records = {}
        for record in listing:
            handle.seek(record.header_offset + 26)  # lengths of the name and the extra field, which precede the content
            start = record.header_offset + 30 + sum(struct.unpack("<HH", handle.read(4)))
            records[start] = record.file_size if record.compress_type == zipfile.ZIP_STORED else 0
    return records


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


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what a DCP folder's .metadata consists of, and nothing else: a pickle could run any program."""

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
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not needed in a checkpoint")


def _distributed(folder: Path) -> list[Entry]:
    """What torch.distributed.checkpoint wrote; a tensor may lie in pieces in several files."""
    if not torch.distributed.is_available():
        raise ValueError(f"{folder} needs a torch with torch.distributed, which this one lacks; convert it elsewhere")
    # here, because it takes a second and not every torch has it
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _distributed_metadata(folder)
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)

    def fetch(name: str, shape: torch.Size) -> Callable[[torch.dtype], Tensor]:
        def read(dtype: torch.dtype) -> Tensor:
            wanted = {name: torch.empty(shape, dtype=dtype)}
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            planner.set_up_planner(wanted, metadata, is_coordinator=True)
            try:
                reader.read_data(planner.create_local_plan(), planner).wait()
            except (RuntimeError, pickle.UnpicklingError) as problem:
                raise ValueError(f"{folder}: {name} is damaged, download it again: {problem}") from None
            return wanted[name]

        return read

    entries = []
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or stored.properties.dtype not in NAMES:
            entries.append(Entry(name))
            continue
        if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
            raise ValueError(f"{folder / '.metadata'} has only parts of {name}; download the checkpoint again")
        entries.append(Entry(name, tuple(stored.size), stored.properties.dtype, fetch(name, stored.size)))
    return entries


def _distributed_metadata(folder: Path):
    """torch's Metadata, after a look whether its files are there."""
    file = folder / ".metadata"
    try:
        with open(file, "rb") as handle:
            metadata = _MetadataUnpickler(handle).load()
        ends: dict[str, int] = {}
        for piece in metadata.storage_data.values():
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{file} is not read ({problem}); download the checkpoint again, from its publisher") from None
    for name, end in ends.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found < end:
            raise ValueError(f"{folder / name} has {found} bytes instead of {end}; download it again")
    return metadata
