"""Released Lyra 2.0 transformers and LoRAs become one .safetensors file that the host's stock loaders take.

Sources are torch DCP folders, .pth and .safetensors files. Each is read as a list of entries, whose tensors are fetched
one by one, so memory holds a single tensor and never the file; and nothing is unpickled that is not a tensor.

An interrupted conversion leaves `<target>.part`, and converting again continues there. A file gets its final name only
after all of it was read back and compared with the source.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ..framepack import LYRA2
from . import lyra2_host

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
PIECE = 1 << 24  # bytes that are compared at a time

PREFIXES = re.compile(r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|net\.)+")
TRAINING_ONLY = re.compile(
    r"(^|\.)(_extra_state|accum_(video_sample_counter|image_sample_counter|iteration|train_in_hours))$"
)
LORA = re.compile(r"^lora_unet_|\.lora[._]|\.(alpha|diff|diff_b)$")
LORA_ENDING = re.compile(r"\.(lora[._].*|alpha|diff|diff_b|dora_scale|set_weight|reshape_weight)$")


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


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    kind: str  # "model" or "LoRA"
    tensors: int
    bytes: int  # of the file
    dropped: tuple[str, ...]  # keys that only training needs
    unknown: tuple[str, ...]  # modules of a LoRA that Lyra 2 does not have, block numbers replaced by N

    def __str__(self) -> str:
        lines = [
            f"{self.kind}: {self.tensors} tensors, {self.bytes / 1e6:.1f} MB, every tensor compared with the source"
        ]
        if self.dropped:
            lines.append(f"{len(self.dropped)} entries that only training needs were left out")
        if self.unknown:
            lines.append(f"Lyra 2 has no such modules, they will do nothing:\n{lyra2_host.listed(list(self.unknown))}")
        return "\n".join(lines)


def convert(
    source: Path,
    target: Path,
    dtype: torch.dtype = torch.bfloat16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    stored: Mapping | None = None,
) -> Report:
    """Convert a Lyra 2 transformer, its floating-point weights to `dtype`, or a LoRA, its dtypes kept, into `target`.

    `on_progress` gets the bytes done and the bytes in total, of writing and then verifying; it may raise to interrupt.
    `stored` tells what shapes don't (framepack, num_heads) and is only needed for other networks than the released one.
    ValueError names the file, what was found and what to do; the target appears only if all went well.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors")
    if target.exists():
        raise ValueError(f"{target} exists already; remove it or choose another name")
    found = read_entries(source)
    dropped = tuple(entry.name for entry in found if TRAINING_ONLY.search(entry.name))
    entries = [entry for entry in found if entry.name not in dropped]
    if odd := [entry.name for entry in entries if entry.dtype is None]:
        raise ValueError(f"{source} holds what is no plain tensor; remove it:\n{lyra2_host.listed(odd)}")
    if _of_lora(entries):
        renamed = list(_renamed(source, entries, lora_key).values())
        return Report("LoRA", len(renamed), _save(renamed, target, on_progress), dropped, _unknown_modules(renamed))
    weights = _model(source, entries, dtype, stored)
    return Report("model", len(weights), _save(weights, target, on_progress), dropped, ())


def is_lora(source: Path) -> bool:
    """Whether a source holds a LoRA and not a whole model; ValueError as in convert."""
    return _of_lora(read_entries(Path(source)))


def _of_lora(entries: list[Entry]) -> bool:
    return any(LORA.search(entry.name) for entry in entries)


# ------------------------------------------------------------------------------------------------- what is written


def _model(source: Path, entries: list[Entry], dtype: torch.dtype, stored: Mapping | None) -> list[Entry]:
    """The entries of a transformer under the network's names, checked, and its configuration last."""
    named = _renamed(source, entries, lambda name: PREFIXES.sub("", name))
    if not any(name.startswith("clean_patch_embeddings.") for name in named):
        kind = "a plain Wan transformer" if "patch_embedding.weight" in named else "something else"
        raise ValueError(
            f"{source} holds no Lyra 2 transformer, clean_patch_embeddings are missing; it is {kind} "
            f"with {len(named)} tensors:\n{lyra2_host.listed(list(named), 5)}"
        )
    own = named.pop(lyra2_host.CONFIG_KEY, None)
    embedding = named.get("patch_embedding.weight")
    if embedding is not None and len(embedding.shape) == 5:
        # A matrix as in the reference: hosts without this pack would load a convolution as plain Wan.
        named[embedding.name] = replace(embedding, shape=(embedding.shape[0], prod(embedding.shape[1:])))
    shapes = {name: entry.shape for name, entry in named.items()}
    try:
        stored = stored or (own and lyra2_host.unpack_config(own.read(own.dtype)))
        config = lyra2_host.complete_config(shapes, stored)
    except ValueError as problem:
        raise ValueError(f"{source}: {problem}") from problem
    if wrong := lyra2_host.faults(shapes, config):
        raise ValueError(f"{source} does not hold exactly Lyra 2's weights:\n{lyra2_host.listed(wrong)}")
    packed = lyra2_host.pack_config(config)
    weights = [replace(e, dtype=dtype) if e.dtype.is_floating_point else e for e in named.values()]
    return [*weights, Entry(lyra2_host.CONFIG_KEY, tuple(packed.shape), packed.dtype, packed.to)]


def lora_key(name: str) -> str:
    """The host's form of a LoRA's key: diffusion_model.<module>.<ending>, or lora_unet_<module>.<ending> as it is."""
    name = re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", name)  # PEFT names its adapter
    return name if name.startswith("lora_unet_") else "diffusion_model." + PREFIXES.sub("", name)


def _unknown_modules(entries: list[Entry]) -> tuple[str, ...]:
    def generic(module: str) -> str:
        return re.sub(r"blocks([._])\d+", r"blocks\1N", module)

    modules = (re.sub(r"^diffusion_model\.|^lora_unet__?", "", LORA_ENDING.sub("", entry.name)) for entry in entries)
    # names don't depend on sizes, and every block has the same
    weights = lyra2_host.weight_shapes({"framepack": str(LYRA2), "rank": 1, "model_type": "i2v", "num_layers": 1})
    known = {generic(weight.removesuffix(".weight")).replace(".", "_") for weight in weights}
    return tuple(sorted({m for m in map(generic, modules) if m.replace(".", "_") not in known}))


def _renamed(source: Path, entries: list[Entry], rename: Callable[[str], str]) -> dict[str, Entry]:
    """Entries by their new names."""
    renamed = [replace(entry, name=rename(entry.name)) for entry in entries]
    counts = Counter(entry.name for entry in renamed)
    if twice := [old.name for old, entry in zip(entries, renamed, strict=True) if counts[entry.name] > 1]:
        raise ValueError(
            f"{source} holds several tensors for one key; keep one of each in a file:\n{lyra2_host.listed(twice)}"
        )
    return {entry.name: entry for entry in renamed}


# ------------------------------------------------------------------------------------------------------- writing


def _save(entries: list[Entry], target: Path, on_progress: Callable[[int, int], None]) -> int:
    """Write, read back, compare, and only then give the file its name; returns its size in bytes."""
    # wide types first keep every tensor aligned
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header = _header(entries)
    starts = list(accumulate((entry.size for entry in entries), initial=len(header)))
    size, part = starts[-1], target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    missing = size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(target.parent).free
    if missing > free:
        raise ValueError(f"{target} needs {missing / 1e9:.2f} GB more, but the disk has {free / 1e9:.2f} GB free")
    done = _resume(part, header, starts)
    on_progress(starts[done], 2 * size)
    with open(part, "r+b") as handle:
        handle.seek(starts[done])
        for entry, end in zip(entries[done:], starts[done + 1 :], strict=True):
            handle.write(_bytes(entry).numpy())
            on_progress(end, 2 * size)
        handle.flush()
        os.fsync(handle.fileno())
    if differing := _first_difference(part, entries, starts, on_progress):
        part.unlink()
        raise ValueError(
            f"{part} does not hold what the source does: {differing} differs. It was removed; convert again, "
            "and if this comes back, check the disk"
        )
    os.replace(part, target)
    return size


def _header(entries: list[Entry]) -> bytes:
    """The first bytes of a .safetensors file with these tensors one after another."""
    ends = list(accumulate(entry.size for entry in entries))
    tensors = {
        entry.name: {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": (end - entry.size, end)}
        for entry, end in zip(entries, ends, strict=True)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _resume(part: Path, header: bytes, starts: list[int]) -> int:
    """How many complete tensors `part` has; cut off behind them, or started anew if it was meant to hold others."""
    found = b""
    if part.exists():
        with open(part, "rb") as handle:
            found = handle.read(len(header))
    if found != header:
        part.write_bytes(header)
        return 0
    done = bisect_right(starts, part.stat().st_size) - 1
    os.truncate(part, starts[done])
    return done


def _first_difference(part: Path, entries: list[Entry], starts: list[int], on_progress) -> str | None:
    """Name of a tensor that `part` does not hold bit by bit."""
    with open(part, "rb") as handle:
        handle.seek(starts[0])
        for entry, end in zip(entries, starts[1:], strict=True):
            if any(handle.read(len(piece)) != piece.numpy().tobytes() for piece in _bytes(entry).split(PIECE)):
                return entry.name
            on_progress(starts[-1] + end, 2 * starts[-1])
    return None


def _bytes(entry: Entry) -> Tensor:
    """(size,) uint8: the tensor as it lies in a file."""
    return entry.read(entry.dtype).contiguous().reshape(-1).view(torch.uint8)


# ------------------------------------------------------------------------------------------------------- reading


def read_entries(source: Path) -> list[Entry]:
    """All that a source holds, in its order; nothing is read but names, shapes and dtypes. ValueError if it is damaged."""
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    if not source.is_dir():
        reader = {".safetensors": _safetensors, ".pth": _pickled, ".pt": _pickled}.get(source.suffix)
        if reader is None:
            raise ValueError(f"{source} is no .safetensors, .pth or .pt file and no folder of a checkpoint")
        return reader(source)
    for folder in (source, source / "model", source / "model" / "model"):
        if (folder / ".metadata").is_file():
            return _distributed(folder)
    shards = sorted(source.glob("*.safetensors"))
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


def _safetensors(file: Path) -> list[Entry]:
    found = file.stat().st_size
    with open(file, "rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        text = handle.read(start - 8) if start <= found else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
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
