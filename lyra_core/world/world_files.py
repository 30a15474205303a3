"""A world on disk: one folder, complete after every chunk.

    world.json                      every chunk ever saved here, its parent, its file, and which one is the latest
    <key>.safetensors               one chunk: frames, cameras, what was invented, depths of its keyframes
    world.lock                      who is just adding to world.json

Files are named by what they contain and never change; each is written beside its place and moved there in one step, and
world.json last. So a crash costs at most the chunk that was being written, saving again costs only what is new, and a
branch is a second chunk with the same parent. Nothing in the folder is ever removed by saving. Several processes may save
to one folder: each writes its own files, and adds them to the list while it holds the lock.

world.json ends with a seal, a hash of all it says, and says of each file the hash of its header; the header has sums of
all that the file holds. The list, prompts and settings are compared when a folder is opened, tensors whenever they are
read. Files of versions 1 and 2 have no sums: they are read whole when they are opened, and compared with the content key,
which covers everything but the depths and latents of keyframes.

A file that was lost, cut off, damaged or swapped since (disks, cloud drives and copies do that) is written again by whoever
has the world at hand: by saving it, and by walking the same path again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from ..cameras.camera import Cameras, check
from ..memory.retrieval import SpatialMemory
from .chunk_files import (
    ChunkFile,
    DamagedFile,
    SavedChunk,
    SavedKeyframe,
    WorldFileError,
    encode,
    open_chunk,
    way_out,
)
from .world import LARGEST_SIDE, Chunk, Latents, World

MANIFEST, LOCK, ASIDE = "world.json", "world.lock", ".damaged"
FOUND = ("tint",)  # settings that come out of making a chunk and do not go into it
FORMAT, VERSION = "lyra-world", 3  # 2: latents and exact last frames; 3: sums of everything


class NewerVersion(WorldFileError):
    """A world that a later version of this pack has saved."""


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
    header: str = ""  # hash of the file's header, which has sums of all the rest; empty for a file without sums

    @property
    def record(self) -> dict:
        """What the file says of itself too."""
        return {name: getattr(self, name) for name in ("key", "parent", "content", "prompt", "settings")}


def save(
    world: World, folder: Path, keep_latest: bool = False, on_chunk: Callable[[int, int], None] = lambda done, total: None
) -> list[Path]:
    """Make `folder` hold this world as its latest state; returns the files that were written.

    What is there already is looked through, once per process, and written again unless it is what it should be. Other
    branches in the folder stay, and with `keep_latest` another state stays the latest. `on_chunk(done, total)` is called for
    each chunk before anything is listed. WorldFileError if the folder holds something else, TimeoutError if another process
    does not let go of it, OSError that says what is needed.
    """
    folder = Path(folder)
    try:
        entries = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    except WorldFileError as problem:
        raise WorldFileError(
            f"{problem}; or remove {MANIFEST} and save again: it then lists this world, and no other branches"
        ) from None
    if not entries and folder.exists() and any(not _is_ours(f.name) for f in folder.iterdir()):
        raise WorldFileError(f"{folder} holds other files but no {MANIFEST}; choose an empty folder or a saved world")
    with files.explained(folder / MANIFEST):
        folder.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Entry, Path]] = []
    try:
        for index, key in enumerate(world.keys):
            if key not in entries or damage(folder, entries[key]):
                written.append(_write_beside(world, index, folder))
            on_chunk(index + 1, len(world.keys))
        return _add(folder, entries, written, world, keep_latest)
    finally:
        for _, partial in written:
            partial.unlink(missing_ok=True)


def _is_ours(name: str) -> bool:
    return name == LOCK or name.endswith((files.PARTIAL, ".safetensors", ASIDE))


def _write_beside(world: World, index: int, folder: Path) -> tuple[Entry, Path]:
    """A chunk on the disk, flushed, under a name that nobody else has, and how it will be listed."""
    chunk, key = (world.first, *world.chunks)[index], world.keys[index]
    parent = world.keys[index - 1] if index else None
    entry = Entry(key, parent, chunk.key, f"{key[:24]}.safetensors", 0, chunk.prompt, dict(chunk.settings))
    content = encode(_tensors(world, index, chunk), entry.record, chunk.sums)
    entry = replace(entry, size=sum(map(len, content)), header=hashlib.sha256(content[0]).hexdigest())
    return entry, _beside(folder / entry.file, *content)


def _beside(file: Path, *content: bytes | memoryview) -> Path:
    try:
        return files.write_partial(file, *content)
    except ValueError as problem:
        raise WorldFileError(str(problem)) from None


def _add(
    folder: Path, known: Mapping[str, Entry], written: list[tuple[Entry, Path]], world: World, keep_latest: bool
) -> list[Path]:
    """Move files to their places and list them, beside what others have listed since `known` was read."""
    moved = []
    with files.locked(folder / LOCK) as is_held:
        files.sweep(folder)
        entries, newest, size = {}, world.key, world.size
        if (folder / MANIFEST).exists():
            entries = read_manifest(folder)
            newest, size = latest(folder) if keep_latest else (newest, size)
        for entry, partial in written:
            theirs = entries.get(entry.key)
            if theirs is not None and theirs != known.get(entry.key) and not _fault(folder, theirs):
                continue  # another process has just saved the same chunk
            with files.explained(folder / entry.file, entry.size):
                os.replace(partial, folder / entry.file)
            entries[entry.key] = entry
            _trust(_which(folder, entry))  # what was just written need not be looked through
            moved.append(folder / entry.file)
        for key in world.keys:
            entries.setdefault(key, known.get(key))
        if moved:
            files.flush(folder)
        write_manifest(folder, entries, newest, size, is_held)
    return [*moved, folder / MANIFEST]


def write_manifest(
    folder: Path, entries: Mapping[str, Entry], latest: str, size: tuple[int, int], is_held: Callable[[], bool]
) -> None:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "size": list(size),
        "latest": latest,
        "chunks": [vars(e) for e in entries.values()],
    }
    content = json.dumps({**manifest, "seal": _seal(manifest)}, indent=1).encode()
    partial = _beside(folder / MANIFEST, content)
    try:
        if not is_held():
            raise TimeoutError(f"{folder}: this process stood still for so long that another one took its lock; save again")
        with files.explained(folder / MANIFEST, len(content)):
            os.replace(partial, folder / MANIFEST)
            files.flush(folder)
    finally:
        partial.unlink(missing_ok=True)


def _seal(manifest: Mapping) -> str:
    """A hash of all that world.json says."""
    said = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ what is damaged


def _fault(folder: Path, entry: Entry) -> str:
    """Why a listed file can't be read, as far as a look at its header tells; empty if it can."""
    file = folder / entry.file
    if not file.is_file():
        return "is missing"
    if (found := file.stat().st_size) != entry.size:
        return f"has {found} bytes instead of {entry.size}: it was cut off or changed"
    try:
        return _mismatch(open_chunk(file), entry)
    except DamagedFile as problem:
        return problem.fault


def _mismatch(file: ChunkFile, entry: Entry) -> str:
    if file.header == entry.header or (not entry.header and not file.record):
        return ""
    if file.record.get("key", entry.key) != entry.key:
        first = int(file.read("first_frame")) if "first_frame" in file else "?"
        return f"holds the frames from {first} on of another state: it was swapped with another file"
    return "is damaged: its header is not the one that was saved"


def damage(folder: Path, entry: Entry) -> str:
    """Why a listed file is not what it should be, by all that is in it; looked through once per process and file."""
    if fault := _fault(folder, entry):
        return fault
    which = _which(folder, entry)
    if which not in _whole:
        try:
            file = open_chunk(folder / entry.file)
            if entry.header:
                file.check()
            elif fault := content_fault(file, entry.prompt, entry.settings, entry.content):
                return fault
        except DamagedFile as problem:
            return problem.fault
        _trust(which)
    return ""


_whole: set[tuple] = set()  # files that are what they should be, as long as nobody touches them; of this process


def _trust(which: tuple) -> None:
    if len(_whole) >= 4096:
        _whole.clear()  # they are looked through once more
    _whole.add(which)


def _which(folder: Path, entry: Entry) -> tuple:
    stat = (folder / entry.file).stat()
    said = json.dumps([entry.prompt, entry.settings, entry.content, entry.header])
    return str(folder / entry.file), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, said


def content_fault(file: ChunkFile, prompt: str, settings: Mapping, content: str) -> str:
    """Whether a file, with its prompt and settings, is the chunk that its content key says."""
    missing = [name for name in ("frames", "invented", "w2c", "K") if name not in file]
    if missing:
        return f"is damaged: it has no {' and no '.join(missing)}"
    parts = {name: file.read(name) for name in ("frames", "invented", "w2c", "K")}
    size = tuple(parts["frames"].shape[1:3])
    cameras, latents = Cameras(parts["w2c"], parts["K"], size), None
    if all(f"latents.{name}" in file for name in Latents._fields):
        latents = Latents(*(file.read(f"latents.{name}") for name in Latents._fields))
    newest = file.read("newest") if "newest" in file else None
    found = Chunk(parts["frames"], parts["invented"], cameras, prompt, settings, newest, latents)
    return "" if found.key == content else "is damaged: it, its prompt or its settings do not fit its content key"


def _tensors(world: World, index: int, chunk: Chunk) -> dict[str, Tensor]:
    """What the file of a chunk holds; index 0 is the photo."""
    start = 0 if index == 0 else 1 + sum(len(c) for c in world.chunks[: index - 1])
    tensors = {
        "first_frame": torch.tensor(start),
        "frames": chunk.frames,
        "w2c": chunk.cameras.w2c,
        "K": chunk.cameras.K,
        "invented": chunk.invented_bits,
    }
    if any(chunk.cameras.origin):
        tensors["origin"] = torch.tensor(chunk.cameras.origin, dtype=torch.float64)
    if (newest := chunk.newest) is not None:
        tensors["newest"] = newest
    if (latents := chunk.latents) is not None:
        tensors |= {f"latents.{name}": tensor for name, tensor in latents._asdict().items()}
    for keyframe in world.memory.keyframes:
        if start <= keyframe.frame < start + len(chunk) or (index == 0 and keyframe.frame < 0):
            tensors[f"depth.{keyframe.frame}"] = keyframe.depth
            if (latent := keyframe.latent) is not None:
                tensors[f"latent.{keyframe.frame}"] = latent
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
    return _shape(folder, entry)[0]


def size_of(folder: Path, entry: Entry) -> tuple[int, int]:
    """(height, width) of a saved chunk's frames, without reading them; each photo of a folder may have a size of its own."""
    return _shape(folder, entry)[1:]


def _shape(folder: Path, entry: Entry) -> tuple[int, int, int]:
    file = open_chunk(Path(folder) / entry.file)
    shape = tuple(file.places["frames"].shape) if "frames" in file else ()
    if len(shape) != 4 or not shape[0] or not all(0 < side <= LARGEST_SIDE for side in shape[1:3]):
        raise DamagedFile(file.path, f"is damaged: its frames are {shape}" if shape else "is damaged: it has no frames")
    return shape[:3]


def _read(folder: Path) -> tuple[dict, list[Entry]]:
    file = folder / MANIFEST
    if not file.is_file():
        raise WorldFileError(f"{folder} holds no {MANIFEST}; it is not a saved world")
    try:
        manifest = files.read_json(file)
        kind, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise DamagedFile(file, f"is damaged ({problem})") from None
    if kind != FORMAT or type(version) is not int or not 1 <= version <= VERSION:
        is_newer = kind == FORMAT and type(version) is int and version > VERSION
        raise (NewerVersion if is_newer else WorldFileError)(
            f"{file} is {kind!r} version {version!r}; this pack reads {FORMAT!r} of versions 1 to {VERSION}, update it"
        )
    try:
        entries = [read_entry(item, version) for item in manifest["chunks"]]
        latest, keys, size = manifest["latest"], {e.key for e in entries}, manifest["size"]
    except KeyError as problem:
        raise DamagedFile(file, f"is damaged: {problem} is missing") from None
    except (TypeError, ValueError) as problem:
        raise DamagedFile(file, f"is damaged: {problem}") from None
    for entry in entries:
        if not is_plain(entry.file) or (folder / entry.file).is_symlink():
            raise WorldFileError(
                f"{file} names {entry.file!r}, which is not a plain file of this folder; it is not read"
            )
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n <= LARGEST_SIDE for n in size)):
        raise DamagedFile(file, f"is damaged: its size is {str(size)[:80]}")
    if not isinstance(latest, str) or latest not in keys or any(e.parent not in {None, *keys} for e in entries):
        raise DamagedFile(file, "is damaged: a chunk's predecessor is not listed")
    if len(keys) != len(entries):
        raise DamagedFile(file, "is damaged: a state is listed twice")
    if (version >= 3 or "seal" in manifest) and manifest.get("seal") != _seal(manifest):
        raise DamagedFile(file, _changed(folder, entries))
    return manifest, entries


def read_entry(item: Mapping, version: int) -> Entry:
    """A line of world.json; KeyError or ValueError that names the field that is not what it should be."""
    if not isinstance(item, dict):
        raise ValueError(f"a chunk is {str(item)[:80]}")
    wanted = {"key": str, "parent": (str, type(None)), "content": str, "file": str, "size": int, "prompt": str, "settings": dict}
    wanted |= {"header": str} if version >= 3 else {}
    for name, kind in wanted.items():
        if not isinstance(item[name], kind) or isinstance(item[name], bool):
            raise ValueError(f"{name} of a chunk is {str(item[name])[:80]}")
    return Entry(**{name: item[name] for name in wanted})


def is_plain(name: str) -> bool:
    """Whether this can be the name of a file of a world."""
    fits = name.isprintable() and len(name.encode(errors="replace")) <= 255
    return fits and Path(name).name == name and not name.startswith(".") and not set(name) & set('\\/:')


def _changed(folder: Path, entries: list[Entry]) -> str:
    """What world.json says otherwise than the files that it lists."""
    found = []
    for entry in entries:
        try:
            record = open_chunk(folder / entry.file).record
        except DamagedFile:
            continue
        names = [name for name, value in entry.record.items() if record and record.get(name) != value]
        found += [f"the {name} of {entry.file}" for name in names]
    what = f": {', '.join(found[:4])}" if found else ""
    return f"is not what was saved{what}; the list and its chunks do not belong together"


def load(folder: Path, chunks: int | None = None, branch: str = "") -> World:
    """The latest state of a saved world, or the one whose key starts with `branch`, after its first `chunks` chunks.

    Frames, depths and latents stay on disk until they are looked at, and are compared with their sums then; cameras, prompts
    and settings at once. WorldFileError for anything damaged, newer, or not listed.
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
    size = size_of(folder, chain[0])
    parts, first = [], 0
    for entry in chain:
        parts.append(load_chunk(folder, entry, size, first))
        first += len(parts[-1][0])
    memory = SpatialMemory(tuple(k for _, keyframes in parts for k in keyframes))
    world = World(parts[0][0], tuple(chunk for chunk, _ in parts[1:]), memory)
    if world.keys != tuple(e.key for e in chain):
        raise WorldFileError(f"{folder / MANIFEST} and its chunks do not belong together. {way_out(folder)}")
    return world


def continuing(folder: Path, world: World) -> list[Entry]:
    """The saved chunks that follow this state of the world, in the order they were saved."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return []
    return [e for e in read_manifest(folder).values() if e.parent == world.key]


def made_before(
    folder: Path, world: World, prompt: str, settings: Mapping, on_chunk: Callable[[int, int], None] = lambda done, total: None
) -> World | None:
    """The world one chunk on, if this very chunk was made in that folder before and its file is whole.

    Files of the chunks before it that were lost or damaged are written again. `on_chunk(done, total)` is called for each
    file that is looked through.
    """
    folder = Path(folder)
    for entry in continuing(folder, world):
        asked = {name: value for name, value in entry.settings.items() if name not in FOUND}
        if entry.prompt == prompt and asked == settings and not damage(folder, entry):
            try:
                chunk, keyframes = load_chunk(folder, entry, world.size, len(world))
            except WorldFileError:
                continue  # it will be made again
            grown = World(world.first, (*world.chunks, chunk), world.memory.remember(*keyframes))
            if grown.key == entry.key:
                chain = _ancestry(read_manifest(folder), entry.key, folder)
                for done, before in enumerate(chain, 1):
                    if damage(folder, before):
                        save(grown, folder, keep_latest=True, on_chunk=on_chunk)
                        break
                    on_chunk(done, len(chain))
                return grown
    return None


def _check_files(folder: Path, chain: list[Entry]) -> None:
    """WorldFileError that names every file of a state that is missing or damaged, and what can be done."""
    # files without sums are looked through now, as their parts can't be when they are read
    found = [(_fault if entry.header else damage)(folder, entry) for entry in chain]
    faults = [(index, entry, fault) for index, (entry, fault) in enumerate(zip(chain, found, strict=True)) if fault]
    if not faults:
        return
    lines = [f"{folder / entry.file} {fault}" + (f" (chunk {i})" if i else " (the photo)") for i, entry, fault in faults]
    whole = faults[0][0] - 1
    fewer = f", or load `chunks` {whole}, which are whole" if whole >= 0 else ""
    raise WorldFileError(
        f"{len(faults)} of {len(chain)} files of this state can't be read:\n"
        + "\n".join(lines)
        + "\nWhoever made this world and has it still open can save it to this folder again, which writes them; walking the same path again with "
        f"`save_to` on it makes them again; `python tools/comfy.py check {folder} --repair` keeps all that is whole; else "
        f"restore them from a backup{fewer}"
    )


def _ancestry(by_key: dict[str, Entry], key: str, folder: Path) -> list[Entry]:
    chain = [by_key[key]]
    while chain[0].parent is not None:
        chain.insert(0, by_key[chain[0].parent])
        if len(chain) > len(by_key):
            raise WorldFileError(f"{folder / MANIFEST} is damaged: its chunks form a circle; restore it from a backup")
    return chain


def load_chunk(folder: Path, entry: Entry, size: tuple[int, int], first: int) -> tuple[Chunk, list[SavedKeyframe]]:
    file = open_chunk(folder / entry.file)
    if fault := _mismatch(file, entry):
        raise DamagedFile(file.path, fault)
    try:
        origin = tuple(file.read("origin").tolist()) if "origin" in file else (0.0, 0.0, 0.0)
        cameras = check(Cameras(file.read("w2c"), file.read("K"), size, origin), str(file.path))
        _check_parts(file, len(cameras), size)
        if (found := int(file.read("first_frame"))) != first:
            raise DamagedFile(
                file.path, f"holds the frames from {found} on, not those from {first}: it was swapped with another file"
            )
        names = [name for name in file.places if name.startswith("depth.")]
        keyframes = [_keyframe(file, int(name[6:]), cameras, first, size) for name in names]
    except DamagedFile:
        raise
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError) as problem:
        raise DamagedFile(file.path, f"is damaged ({problem})") from None
    newest = file if "newest" in file else None
    latents = file if all(f"latents.{name}" in file for name in Latents._fields) else None
    chunk = SavedChunk(file, file, cameras, entry.prompt, entry.settings, newest, latents)
    chunk.__dict__["key"] = entry.content  # what the property caches; hashing again would read every frame
    return chunk, sorted(keyframes, key=lambda k: (k.frame < 0, abs(k.frame)))


def _check_parts(file: ChunkFile, frames: int, size: tuple[int, int]) -> None:
    wanted = {
        "frames": (torch.uint8, (frames, *size, 3)),
        "invented": (torch.uint8, (frames, size[0], size[1] // 8)),
        "first_frame": (torch.int64, ()),
    }
    for name, (dtype, shape) in wanted.items():
        place = file.places[name]
        if (place.dtype, place.shape) != (dtype, shape):
            raise DamagedFile(
                file.path, f"is damaged: its {name} are {place.dtype} {place.shape}, expected {dtype} {shape} for "
                f"{frames} frames of {size[1]}x{size[0]}"
            )  # fmt: skip


def _keyframe(file: ChunkFile, frame: int, cameras: Cameras, first: int, size: tuple[int, int]) -> SavedKeyframe:
    if file.places[f"depth.{frame}"].shape != size:
        raise DamagedFile(file.path, f"is damaged: its depth.{frame} is {file.places[f'depth.{frame}'].shape}")
    latent = file if f"latent.{frame}" in file else None
    if frame < 0:
        camera = Cameras(file.read(f"w2c.{frame}"), file.read(f"K.{frame}"), size, cameras.origin)
        return SavedKeyframe(frame, file, camera, file if f"image.{frame}" in file else None, latent)
    return SavedKeyframe(frame, file, cameras[frame - first], latent=latent)
