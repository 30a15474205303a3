"""A world on disk: one folder, complete after every chunk.

    world.json                      every chunk ever saved here, its parent, its file, and which one is the latest
    <key>.safetensors               one chunk: frames, cameras, what was invented, depths of its keyframes

Files are named by what they contain and never change; each is written beside its place and moved there in one step, and
world.json last. So a crash costs at most the chunk that was being written, saving again costs only what is new, and a
branch is a second chunk with the same parent. Nothing in the folder is ever removed by saving.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ..cameras.camera import Cameras, check
from ..memory.retrieval import Keyframe, SpatialMemory
from .world import Chunk, Latents, World

MANIFEST = "world.json"
FORMAT, VERSION = "lyra-world", 2  # 2: latents and exact last frames


class WorldFileError(ValueError):
    """A folder that holds no usable world; the message names the file, what was found and what to do."""


@dataclass(frozen=True)
class Entry:
    """One saved chunk, as world.json lists it."""

    key: str  # of the world's state after it
    parent: str | None  # key of the state before it; None for the photo
    content: str  # key of the chunk alone
    file: str  # plain name inside the folder
    size: int  # of that file, bytes
    prompt: str
    settings: Mapping


def save(world: World, folder: Path) -> list[Path]:
    """Make `folder` hold this world as its latest state; returns the files that were written.

    Other branches in the folder stay. WorldFileError if the folder holds something else.
    """
    folder = Path(folder)
    entries = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    if (
        not entries
        and folder.exists()
        and any(not f.name.endswith(".partial") and f.suffix != ".safetensors" for f in folder.iterdir())
    ):
        raise WorldFileError(f"{folder} holds other files but no {MANIFEST}; choose an empty folder or a saved world")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, (key, chunk) in enumerate(zip(world.keys, (world.first, *world.chunks), strict=True)):
        if key in entries:
            continue
        file = folder / f"{key[:24]}.safetensors"
        _write(file, serialize(_tensors(world, index, chunk)))
        entries[key] = Entry(
            key,
            world.keys[index - 1] if index else None,
            chunk.key,
            file.name,
            file.stat().st_size,
            chunk.prompt,
            dict(chunk.settings),
        )
        written.append(file)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "size": list(world.size),
        "latest": world.key,
        "chunks": [vars(e) for e in entries.values()],
    }
    _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return [*written, folder / MANIFEST]


def _write(file: Path, content: bytes) -> None:
    """Write beside the file, flush to the disk, then move it there in one step."""
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _tensors(world: World, index: int, chunk: Chunk) -> dict[str, Tensor]:
    start = 0 if index == 0 else 1 + sum(len(c.frames) for c in world.chunks[: index - 1])
    tensors = {
        "first_frame": torch.tensor(start),
        "frames": chunk.frames,
        "w2c": chunk.cameras.w2c,
        "K": chunk.cameras.K,
        "invented": chunk.invented_bits,
    }
    if chunk.newest is not None:
        tensors["newest"] = chunk.newest
    if chunk.latents is not None:
        tensors |= {f"latents.{name}": tensor for name, tensor in chunk.latents._asdict().items()}
    for keyframe in world.memory.keyframes:
        if start <= keyframe.frame < start + len(chunk.frames) or (index == 0 and keyframe.frame < 0):
            tensors[f"depth.{keyframe.frame}"] = keyframe.depth
            if keyframe.latent is not None:
                tensors[f"latent.{keyframe.frame}"] = keyframe.latent
        if index == 0 and keyframe.frame < 0:
            tensors |= {
                f"image.{keyframe.frame}": keyframe.image,
                f"w2c.{keyframe.frame}": keyframe.camera.w2c,
                f"K.{keyframe.frame}": keyframe.camera.K,
            }
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }  # safetensors refuses tensors that share memory


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What a folder says it holds: entries by key, in the order they were saved, checked but not loaded."""
    return {e.key: e for e in _read(Path(folder))[1]}


def latest(folder: Path) -> tuple[str, tuple[int, int]]:
    """Key of the latest state of a saved world, and (height, width) of its frames."""
    manifest, _ = _read(Path(folder))
    return manifest["latest"], tuple(manifest["size"])


def frames_of(folder: Path, entry: Entry) -> int:
    """How many frames a saved chunk has, without reading them."""
    file = Path(folder) / entry.file
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_slice("frames").get_shape()[0]
    except (SafetensorError, OSError) as problem:
        raise WorldFileError(f"{file} is damaged or missing ({problem}); restore it") from None


def _read(folder: Path) -> tuple[dict, list[Entry]]:
    file = folder / MANIFEST
    if not file.is_file():
        raise WorldFileError(f"{folder} holds no {MANIFEST}; it is not a saved world")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        kind, version = manifest["format"], manifest["version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as problem:
        raise WorldFileError(f"{file} is damaged ({problem}); restore it from a backup") from None
    if kind != FORMAT or not isinstance(version, int) or version > VERSION:
        raise WorldFileError(
            f"{file} is {kind!r} version {version!r}; this pack reads {FORMAT!r} up to version {VERSION}, update it"
        )
    try:
        entries = [Entry(**{name: item[name] for name in Entry.__dataclass_fields__}) for item in manifest["chunks"]]
        latest, keys = manifest["latest"], {e.key for e in entries}
    except (KeyError, TypeError) as problem:
        raise WorldFileError(f"{file} is damaged: {problem} is missing; restore it from a backup") from None
    for entry in entries:
        if Path(entry.file).name != entry.file or entry.file in ("", ".", "..") or (folder / entry.file).is_symlink():
            raise WorldFileError(
                f"{file} names {entry.file!r}, which is not a plain file of this folder; it is not read"
            )
    if latest not in keys or any(e.parent is not None and e.parent not in keys for e in entries):
        raise WorldFileError(f"{file} is damaged: a chunk's predecessor is not listed; restore it from a backup")
    return manifest, entries


def load(folder: Path, chunks: int | None = None, branch: str = "") -> World:
    """The latest state of a saved world, or the one whose key starts with `branch`, after its first `chunks` chunks.

    Frames stay on disk until they are looked at. WorldFileError for anything damaged, newer, or not listed.
    """
    folder = Path(folder)
    manifest, entries = _read(folder)
    by_key = {e.key: e for e in entries}
    heads = [k for k in by_key if k.startswith(branch)] if branch else [manifest["latest"]]
    if len(heads) != 1:
        raise WorldFileError(
            f"{len(heads)} states in {folder} have a key that starts with {branch!r}; there are {sorted(k[:8] for k in by_key)}"
        )
    chain = _ancestry(by_key, heads[0], folder)
    if chunks is not None:
        if not 0 <= chunks < len(chain):
            raise WorldFileError(f"{folder}: this branch has {len(chain) - 1} chunks; there is no state after {chunks}")
        chain = chain[: chunks + 1]
    size = tuple(manifest["size"])
    parts = [_load_chunk(folder, entry, size) for entry in chain]
    memory = SpatialMemory(tuple(k for _, keyframes in parts for k in keyframes))
    world = World(parts[0][0], tuple(chunk for chunk, _ in parts[1:]), memory)
    if world.keys != tuple(e.key for e in chain):
        raise WorldFileError(
            f"{folder / MANIFEST} and its chunks do not belong together; restore the folder from a backup"
        )
    return world


def continuing(folder: Path, world: World) -> list[Entry]:
    """The saved chunks that follow this state of the world, in the order they were saved."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return []
    return [e for e in read_manifest(folder).values() if e.parent == world.key]


def made_before(folder: Path, world: World, prompt: str, settings: Mapping) -> World | None:
    """The saved world one chunk on, if this very chunk was made in that folder before."""
    same = (e for e in continuing(folder, world) if e.prompt == prompt and e.settings == settings)
    return next((load(folder, branch=e.key) for e in same), None)


def _ancestry(by_key: dict[str, Entry], key: str, folder: Path) -> list[Entry]:
    chain = [by_key[key]]
    while chain[0].parent is not None:
        chain.insert(0, by_key[chain[0].parent])
        if len(chain) > len(by_key):
            raise WorldFileError(f"{folder / MANIFEST} is damaged: its chunks form a circle; restore it from a backup")
    return chain


def _load_chunk(folder: Path, entry: Entry, size: tuple[int, int]) -> tuple[Chunk, list[Keyframe]]:
    file = folder / entry.file
    if not file.is_file():
        raise WorldFileError(f"{file} is missing; restore it, or load fewer chunks")
    if file.stat().st_size != entry.size:
        raise WorldFileError(
            f"{file} has {file.stat().st_size} bytes instead of {entry.size}: it was cut off or changed; "
            "restore it, or load the chunks before it"
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        frames = found["frames"]
        cameras = check(Cameras(found["w2c"], found["K"], size), str(file))
        if frames.dtype != torch.uint8 or frames.shape != (len(cameras), *size, 3):
            raise WorldFileError(
                f"{file}: expected {len(cameras)} frames of {size[1]}x{size[0]}, found {tuple(frames.shape)}"
            )
        bits = found["invented"]
        if bits.dtype != torch.uint8 or bits.shape != (len(cameras), size[0], size[1] // 8):
            raise WorldFileError(f"{file}: its mask of invented pixels is {tuple(bits.shape)}; restore it")
        keyframes = [_keyframe(found, int(name[6:]), cameras, size) for name in found if name.startswith("depth.")]
        parts = [found.get(f"latents.{name}") for name in Latents._fields]
    except (SafetensorError, KeyError, IndexError, RuntimeError) as problem:
        raise WorldFileError(f"{file} is damaged ({problem}); restore it, or load the chunks before it") from None
    latents = None if any(part is None for part in parts) else Latents(*parts)
    chunk = Chunk(frames, bits, cameras, entry.prompt, entry.settings, found.get("newest"), latents)
    chunk.__dict__["key"] = entry.content  # what the property caches; hashing again would read every frame
    return chunk, sorted(keyframes, key=lambda k: (k.frame < 0, abs(k.frame)))


def _keyframe(found: dict[str, Tensor], frame: int, cameras: Cameras, size: tuple[int, int]) -> Keyframe:
    depth, latent = found[f"depth.{frame}"], found.get(f"latent.{frame}")
    if frame < 0:
        camera = Cameras(found[f"w2c.{frame}"], found[f"K.{frame}"], size)
        return Keyframe(frame, depth, camera, found[f"image.{frame}"], latent)
    return Keyframe(frame, depth, cameras[frame - int(found["first_frame"])], latent=latent)
