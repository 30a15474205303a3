"""A world on disk: one folder, complete after every chunk.

    world.json                      every chunk ever saved here, its parent, its file, and which one is the latest
    <key>.safetensors               one chunk: frames, cameras, what was invented, depths of its keyframes

Files are named by what they contain and never change; each is written beside its place and moved there in one step, and
world.json last. So a crash costs at most the chunk that was being written, saving again costs only what is new, and a
branch is a second chunk with the same parent. Nothing in the folder is ever removed by saving.

A file that was lost, cut off or swapped since (cloud drives and copies do that) is written again by whoever has the world at
hand: by saving it, and by walking the same path again.
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
FOUND = ("tint",)  # settings that come out of making a chunk and do not go into it
FORMAT, VERSION = "lyra-world", 2  # 2: latents and exact last frames
WHOLE = 1 << 16  # numbers; larger tensors are compared at their ends


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


def save(world: World, folder: Path, keep_latest: bool = False) -> list[Path]:
    """Make `folder` hold this world as its latest state; returns the files that were written.

    What is there already is looked at, and written again unless it is what it should be. Other branches in the folder stay,
    and with `keep_latest` another state stays the latest. WorldFileError if the folder holds something else.
    """
    folder = Path(folder)
    try:
        entries = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    except WorldFileError as problem:
        raise WorldFileError(
            f"{problem}; or remove {MANIFEST} and save again: it then lists this world, and no other branches"
        ) from None
    if (
        not entries
        and folder.exists()
        and any(not f.name.endswith(".partial") and f.suffix != ".safetensors" for f in folder.iterdir())
    ):
        raise WorldFileError(f"{folder} holds other files but no {MANIFEST}; choose an empty folder or a saved world")
    folder.mkdir(parents=True, exist_ok=True)
    newest, size = latest(folder) if entries else (world.key, world.size)
    if size != world.size:
        raise WorldFileError(
            f"{folder} holds worlds of {size[1]}x{size[0]}, this one is {world.size[1]}x{world.size[0]}; choose another folder"
        )
    written = _complete(world, folder, entries)
    _write_manifest(folder, entries, newest if keep_latest else world.key, world.size)
    return [*written, folder / MANIFEST]


def _complete(world: World, folder: Path, entries: dict[str, Entry]) -> list[Path]:
    """Write those chunks of a world that the folder lacks or that are not what they should be, and list them in `entries`."""
    written = []
    for index, (key, chunk) in enumerate(zip(world.keys, (world.first, *world.chunks), strict=True)):
        tensors, entry = _tensors(world, index, chunk), entries.get(key)
        if entry and not _fault(folder, entry) and _holds(folder / entry.file, tensors):
            continue
        file = folder / f"{key[:24]}.safetensors"
        # copies, because safetensors refuses tensors that share memory
        content = serialize({n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()})
        _write(file, content)
        parent = world.keys[index - 1] if index else None
        entries[key] = Entry(key, parent, chunk.key, file.name, len(content), chunk.prompt, dict(chunk.settings))
        written.append(file)
    return written


def _write_manifest(folder: Path, entries: Mapping[str, Entry], latest: str, size: tuple[int, int]) -> None:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "size": list(size),
        "latest": latest,
        "chunks": [vars(e) for e in entries.values()],
    }
    _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _fault(folder: Path, entry: Entry) -> str:
    """Why a listed file can't be read, as far as a look at it from outside tells; empty if it can."""
    file = folder / entry.file
    if not file.is_file():
        return "is missing"
    if (found := file.stat().st_size) != entry.size:
        return f"has {found} bytes instead of {entry.size}: it was cut off or changed"
    return ""


def _holds(file: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds these tensors; of large ones the ends are compared, so that a save reads no whole world."""
    try:
        with safe_open(file, framework="pt") as found:
            names = set(found.keys())
            return all(name in names and _same(found, name, tensor) for name, tensor in tensors.items())
    except (SafetensorError, OSError, RuntimeError):
        return False


def _same(found, name: str, tensor: Tensor) -> bool:
    if tuple(found.get_slice(name).get_shape()) != tuple(tensor.shape):
        return False
    if tensor.ndim == 0 or tensor.numel() <= WHOLE:
        pairs = [(found.get_tensor(name), tensor)]
    else:
        ends = slice(0, 1), slice(len(tensor) - 1, len(tensor))
        pairs = [(found.get_slice(name)[end], tensor[end]) for end in ends]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _write(file: Path, content: bytes) -> None:
    """Write beside the file, flush to the disk, then move it there in one step."""
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        if partial.stat().st_size != len(content):
            raise WorldFileError(f"{file}: only {partial.stat().st_size} of {len(content)} bytes got onto the disk")
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _tensors(world: World, index: int, chunk: Chunk) -> dict[str, Tensor]:
    """What the file of a chunk holds; index 0 is the photo."""
    start = 0 if index == 0 else 1 + sum(len(c.frames) for c in world.chunks[: index - 1])
    tensors = {
        "first_frame": torch.tensor(start),
        "frames": chunk.frames,
        "w2c": chunk.cameras.w2c,
        "K": chunk.cameras.K,
        "invented": chunk.invented_bits,
    }
    if any(chunk.cameras.origin):
        tensors["origin"] = torch.tensor(chunk.cameras.origin, dtype=torch.float64)
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
    return tensors


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What a folder says it holds: entries by key, in the order they were saved, checked but not loaded."""
    return {e.key: e for e in _read(Path(folder))[1]}


def latest(folder: Path) -> tuple[str, tuple[int, int]]:
    """Key of the latest state of a saved world, and (height, width) of its frames."""
    manifest, _ = _read(Path(folder))
    return manifest["latest"], tuple(manifest["size"])


def holds(folder: Path, state: str) -> bool:
    """Whether a folder holds a state whose key begins so, with every file that it needs."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return False
    by_key = read_manifest(folder)
    found = [key for key in by_key if key.startswith(state)]
    return len(found) == 1 and not any(_fault(folder, entry) for entry in _ancestry(by_key, found[0], folder))


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
    _check_files(folder, chain)
    size = tuple(manifest["size"])
    parts, first = [], 0
    for entry in chain:
        parts.append(_load_chunk(folder, entry, size, first))
        first += len(parts[-1][0].frames)
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
    """The world one chunk on, if this very chunk was made in that folder before and its file is whole.

    Files of the chunks before it that were lost or damaged are written again.
    """
    folder = Path(folder)
    for entry in continuing(folder, world):
        asked = {name: value for name, value in entry.settings.items() if name not in FOUND}
        if entry.prompt == prompt and asked == settings and not _fault(folder, entry):
            try:
                chunk, keyframes = _load_chunk(folder, entry, world.size, len(world))
            except WorldFileError:
                continue  # it will be made again
            grown = World(world.first, (*world.chunks, chunk), world.memory.remember(*keyframes))
            if grown.key == entry.key:
                entries = read_manifest(folder)
                if _complete(world, folder, entries):
                    _write_manifest(folder, entries, latest(folder)[0], world.size)
                return grown
    return None


def _check_files(folder: Path, chain: list[Entry]) -> None:
    """WorldFileError that names every file of a state that is missing or cut off, and what can be done."""
    faults = [(index, entry, fault) for index, entry in enumerate(chain) if (fault := _fault(folder, entry))]
    if not faults:
        return
    lines = [f"{folder / entry.file} {fault}" + (f" (chunk {i})" if i else " (the photo)") for i, entry, fault in faults]
    whole = faults[0][0] - 1
    fewer = f", or load `chunks` {whole}, which are whole" if whole >= 0 else ""
    raise WorldFileError(
        f"{len(faults)} of {len(chain)} files of this state can't be read:\n"
        + "\n".join(lines)
        + "\nWhoever has this world open can save it to this folder again, which writes them; walking the same path again with "
        f"`save_to` on it makes them again; else restore them from a backup{fewer}"
    )


def _ancestry(by_key: dict[str, Entry], key: str, folder: Path) -> list[Entry]:
    chain = [by_key[key]]
    while chain[0].parent is not None:
        chain.insert(0, by_key[chain[0].parent])
        if len(chain) > len(by_key):
            raise WorldFileError(f"{folder / MANIFEST} is damaged: its chunks form a circle; restore it from a backup")
    return chain


def _load_chunk(folder: Path, entry: Entry, size: tuple[int, int], first: int) -> tuple[Chunk, list[Keyframe]]:
    file = folder / entry.file
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        frames = found["frames"]
        origin = tuple(found["origin"].tolist()) if "origin" in found else (0.0, 0.0, 0.0)
        cameras = check(Cameras(found["w2c"], found["K"], size, origin), str(file))
        if frames.dtype != torch.uint8 or frames.shape != (len(cameras), *size, 3):
            raise WorldFileError(
                f"{file}: expected {len(cameras)} frames of {size[1]}x{size[0]}, found {tuple(frames.shape)}"
            )
        if int(found["first_frame"]) != first:
            raise WorldFileError(
                f"{file} holds the frames from {int(found['first_frame'])} on, not those from {first}: it was swapped with another "
                "file; restore it, or save the world again"
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
        camera = Cameras(found[f"w2c.{frame}"], found[f"K.{frame}"], size, cameras.origin)
        return Keyframe(frame, depth, camera, found[f"image.{frame}"], latent)
    return Keyframe(frame, depth, cameras[frame - int(found["first_frame"])], latent=latent)
