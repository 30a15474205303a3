"""Training sets: a folder with two files for each video, NAME.safetensors and NAME.json.

The first holds frames (F, H, W, 3) uint8, w2c (F, 4, 4), K (F, 3, 3), which frames have depth, depths (N, H, W) and, where a codec
was at hand, its latents in NAME.latents.safetensors; the second captions, size, what it was made from, and how many bytes the
first has. The second is written last: a video without it is not there, so what was interrupted is made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .. import files
from ..array_files import as_safetensors, read_header, write_safetensors
from ..cameras.camera import Cameras
from ..world.world import World
from .sample import CleanLatents, Sample

VERSION = 1
RECORD, TENSORS, LATENTS = ".json", ".safetensors", ".latents.safetensors"
PARTS = {"frames": torch.uint8, "w2c": torch.float32, "K": torch.float32, "known": torch.int64, "depths": torch.float32}


class SetError(files.FileError):
    """A training set that can't be read or added to: the video, what was found there, and the way out."""


# ------------------------------------------------------------------------------------------------------------------ made


def of_world(world: World, name: str) -> Sample:
    """All frames of a world; it holds their cameras, depths and prompts. Views that are in no chunk are left out."""
    frames = torch.stack([world.frame(frame) for frame in range(len(world))])
    depths = {k.frame: k.depth for k in world.memory.keyframes if k.frame >= 0}
    captions, first = {0: world.first.prompt}, 1
    for chunk in world.chunks:
        captions[first], first = chunk.prompt, first + len(chunk)
    return Sample(name, frames, world.cameras, depths, captions)


def remarks(world: World, name: str) -> list[str]:
    """What to know of a world that is learned from, a line each."""
    made = {str(chunk.settings.get("generator", "unknown")) for chunk in world.chunks}
    lines = [f"{name}: chunks by {', '.join(sorted(made))}"]
    if made == {"geometry preview"}:
        lines.append(
            f"{name}: the geometry preview made all of it, so what is learned is how cameras move and what was seen before, not how a "
            "place goes on where nobody has looked"
        )
    if left := sum(keyframe.frame < 0 for keyframe in world.memory.keyframes):
        lines.append(f"{name}: {left} further photos are in no chunk and are left out")
    return lines


def missing_depths(sample: Sample, chunk: int, windows: int) -> list[int]:
    """Frames that a window begins after and whose depth is not known."""
    return [window.newest for window in sample.windows(chunk, windows) if window.newest not in sample.depths]


# --------------------------------------------------------------------------------------------------------------- written


def add(folder: Path, sample: Sample, source: Mapping, chunk: int) -> Path:
    """Write a video into a set, whole or not at all; its record.

    `source`: plain JSON values that say what it was made from. SetError if its size is not the set's, if it is shorter than a
    chunk or a depth is missing that every walk needs; OSError that names the way out where the disk is full.
    """
    _check_name(sample.name)
    size = size_of(folder)
    if size not in (None, sample.size):
        raise SetError(
            f"{folder}: {sample.name} is {sample.size[1]}x{sample.size[0]} and the set {size[1]}x{size[0]}; a set has one size: "
            "resize it, or make another set of it"
        )
    if missing := missing_depths(sample, chunk, len(sample)):
        raise SetError(
            f"{sample.name}: frame {missing[0]} has no depth (and {len(missing) - 1} more), where a chunk begins; give depth "
            "for every 8th frame at least, or have it estimated"
        )
    known = sorted(sample.depths)
    tensors = {
        "frames": sample.frames,
        "w2c": sample.cameras.w2c.float(),
        "K": sample.cameras.K.float(),
        "known": torch.tensor(known),
        "depths": torch.stack([sample.depths[frame].float() for frame in known]),
    }
    content = as_safetensors(tensors)
    record = {
        "version": VERSION,
        "frames": len(sample),
        "size": list(sample.size),
        "bytes": sum(map(len, content)),
        "origin": list(sample.cameras.origin),
        "captions": {str(first): text for first, text in sample.captions.items()},
        "source": dict(source),
    }
    place = folder / f"{sample.name}{RECORD}"
    files.write_bytes(folder / f"{sample.name}{TENSORS}", *content)
    files.write_bytes(place, json.dumps(record, indent=1).encode())
    return place


def keep_latents(folder: Path, sample: Sample) -> None:
    """Write the latents of a sample beside it, so that the next training need not make them."""
    made = sample.latents
    known = sorted(made.alone)
    tensors = {"stream": made.stream, "frames": torch.tensor(known), "alone": torch.stack([made.alone[frame] for frame in known])}
    write_safetensors(folder / f"{sample.name}{LATENTS}", tensors, {"codec": made.codec})


def holds(folder: Path, name: str, source: Mapping) -> bool:
    """Whether a set has this video, made from just this."""
    record = folder / f"{name}{RECORD}"
    return record.is_file() and _record(record).get("source") == json.loads(json.dumps(dict(source)))


def _check_name(name: str) -> None:
    if not name or "/" in name or not files.stays_inside(name) or files.is_litter(name) or len(name) > 100:
        raise SetError(f"{name[:80]!r} is no name for a video of a set; use letters, digits and -")


# ------------------------------------------------------------------------------------------------------------------ read


def names(folder: Path) -> list[str]:
    """The videos of a set, in natural order; SetError if there is no such folder."""
    if not folder.is_dir():
        raise SetError(f"{folder}: there is no such training set; make it with Lyra2TrainingSet or the command trainset")
    found = [file.name.removesuffix(RECORD) for file in folder.glob(f"*{RECORD}") if not files.is_litter(file.name)]
    return sorted(found, key=files.natural)


def size_of(folder: Path) -> tuple[int, int] | None:
    """(height, width) of a set; None if it is empty."""
    found = names(folder) if folder.is_dir() else []
    return tuple(_record(folder / f"{found[0]}{RECORD}")["size"]) if found else None


def read(folder: Path) -> list[Sample]:
    """All videos of a set; nothing of them is in memory before it is asked for. SetError by name for what does not fit."""
    found = names(folder)
    if not found:
        raise SetError(f"{folder}: the training set is empty; add worlds, videos or scenes to it")
    samples = [read_one(folder, name) for name in found]
    for sample in samples:
        if sample.size != samples[0].size:
            one, other = ("x".join(map(str, s.size[::-1])) for s in (samples[0], sample))
            raise SetError(f"{folder}: {samples[0].name} is {one} and {sample.name} {other}; a set has one size: take one of them out")
    return samples


def read_one(folder: Path, name: str, latents: bool = True) -> Sample:
    """One video of a set, with its latents if they are there and wanted."""
    record, file = _record(folder / f"{name}{RECORD}"), folder / f"{name}{TENSORS}"
    if not file.is_file():
        raise SetError(f"{file}: is gone, but {name}{RECORD} says that it is there; make the video again")
    if file.stat().st_size != record["bytes"]:
        raise SetError(f"{file}: has {file.stat().st_size} bytes instead of {record['bytes']}; make the video again")
    tensors = _tensors(file, PARTS)
    frames, size = record["frames"], tuple(record["size"])
    expected = {"frames": (frames, *size, 3), "w2c": (frames, 4, 4), "K": (frames, 3, 3), "depths": (len(tensors["known"]), *size)}
    for part, shape in expected.items():
        if tuple(tensors[part].shape) != shape:
            raise SetError(f"{file}: {part} are {tuple(tensors[part].shape)} instead of {shape}; make the video again")
    cameras = Cameras(tensors["w2c"], tensors["K"], size, tuple(record["origin"]))
    depths = dict(zip(tensors["known"].tolist(), tensors["depths"], strict=True))
    with files.reading(file):
        sample = Sample(name, tensors["frames"], cameras, depths, {int(first): text for first, text in record["captions"].items()})
    return replace(sample, latents=_latents(folder / f"{name}{LATENTS}") if latents else None)


def _latents(file: Path) -> CleanLatents | None:
    if not file.is_file():
        return None
    tensors = _tensors(file, {"stream": torch.float32, "frames": torch.int64, "alone": torch.float32})
    with files.reading(file):
        codec = read_header(file).metadata.get("codec", "")
    return CleanLatents(tensors["stream"], dict(zip(tensors["frames"].tolist(), tensors["alone"], strict=True)), codec)


def _tensors(file: Path, parts: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    with files.reading(file):
        places = read_header(file).places
    for part, dtype in parts.items():
        if part not in places or places[part].dtype != dtype:
            found = places[part].dtype if part in places else "missing"
            raise SetError(f"{file}: {part} should be {dtype} and is {found}; make the video again")
    with files.parsing(file, "is no whole safetensors file; make the video again"):
        return safetensors.torch.load_file(file)


def _record(file: Path) -> dict:
    record = files.read_json(file)
    said = record if isinstance(record, dict) else {}
    size, captions, origin = said.get("size"), said.get("captions"), said.get("origin")
    whole = all(type(said.get(key)) is int for key in ("frames", "bytes")) and isinstance(size, list) and len(size) == 2
    whole = whole and all(type(side) is int and side > 0 for side in size) and isinstance(captions, dict)
    whole = whole and isinstance(origin, list) and len(origin) == 3 and all(type(axis) in (int, float) for axis in origin)
    if not whole or not all(key.isdecimal() and isinstance(text, str) for key, text in captions.items()):
        raise SetError(f"{file}: is no record of a video (frames, size, bytes, captions); make the video again")
    if said.get("version") != VERSION:
        raise SetError(f"{file}: is of version {said.get('version')}, this pack reads {VERSION}; update the pack")
    return said
