"""Released Lyra 2.0 transformers and LoRAs become one .safetensors file that the host's stock loaders take.

Sources are what `tensor_files` reads; memory holds a single tensor and never the file.

An interrupted conversion leaves `<target>.part`, and converting again continues there. A file gets its final name only
after all of it was read back and compared with the source.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..files import check_part, reading
from . import lora_files, lyra2_host
from .tensor_files import NAMES, Entry, read_entries

PIECE = 1 << 24  # bytes that are compared at a time

PREFIXES = re.compile(r"^(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|net\.)+")
TRAINING_ONLY = re.compile(
    r"(^|\.)(_extra_state|accum_(video_sample_counter|image_sample_counter|iteration|train_in_hours))$"
)


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    kind: str  # "model" or "LoRA"
    tensors: int
    bytes: int  # of the file
    dropped: tuple[str, ...]  # keys that only training needs
    unknown: tuple[str, ...]  # modules of a LoRA that Lyra 2 does not have, block numbers replaced by N; left out
    notes: tuple[str, ...] = ()  # further lines on a LoRA

    def __str__(self) -> str:
        lines = [
            f"{self.kind}: {self.tensors} tensors, {self.bytes / 1e6:.1f} MB, every tensor compared with the source"
        ]
        if self.dropped:
            lines.append(f"{len(self.dropped)} entries that only training needs were left out")
        if self.unknown:
            lines.append(f"Lyra 2 has no such modules, they were left out:\n{lyra2_host.listed(list(self.unknown))}")
        return "\n".join([*lines, *self.notes])


def convert(
    source: Path,
    target: Path,
    dtype: torch.dtype = torch.bfloat16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    stored: Mapping | None = None,
) -> Report:
    """Convert a Lyra 2 transformer, its floating-point weights to `dtype`, or a LoRA, its dtypes kept, into `target`.

    What is told beside a LoRA, its adapter_config.json or metadata, becomes tensors in it (see `lora_files`).

    `on_progress` gets the bytes done and the bytes in total, of writing and then verifying; it may raise to interrupt.
    `stored` tells what shapes don't (framepack, num_heads) and is only needed for other networks than the released one.
    ValueError names the file, what was found and what to do; the target appears only if all went well.
    """
    source, target = Path(source), Path(target)
    with reading(source):
        return _convert(source, target, dtype, on_progress, stored)


def _convert(source: Path, target: Path, dtype: torch.dtype, on_progress: Callable[[int, int], None], stored: Mapping | None) -> Report:
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
        lora = lora_files.converted(source, entries)
        size = _save(lora.entries, target, on_progress)
        return Report("LoRA", len(lora.entries), size, dropped, lora.unknown, lora.notes)
    weights = _model(source, entries, dtype, stored)
    return Report("model", len(weights), _save(weights, target, on_progress), dropped, ())


def is_lora(source: Path) -> bool:
    """Whether a source holds a LoRA and not a whole model; ValueError as in convert."""
    return _of_lora(read_entries(Path(source)))


def _of_lora(entries: list[Entry]) -> bool:
    return any(lora_files.split(entry.name) for entry in entries)


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
    check_part(part)
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
