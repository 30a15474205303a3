"""What of a saved world is whole, and keeping all that is: every file is read, nothing is ever deleted."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..memory.retrieval import SpatialMemory
from . import world_files
from .chunk_files import ChunkFile, DamagedFile, WorldFileError, open_chunk
from .world import World
from .world_files import ASIDE, LOCK, MANIFEST, Entry


@dataclass(frozen=True)
class Finding:
    """One state of a world, and what is wrong with the file that it adds; nothing if that is whole."""

    entry: Entry
    fault: str
    is_listed: bool  # in world.json
    is_reachable: bool  # whether it and all states before it are whole

    def __str__(self) -> str:
        where = "" if self.is_listed else ", not listed"
        what = self.fault or ("whole" if self.is_reachable else "whole, but a state before it is not")
        return f"{self.entry.file} (state {self.entry.key[:8]}{where}): {what}"


@dataclass(frozen=True)
class Report:
    """All that was found in a folder."""

    folder: Path
    fault: str  # of world.json
    findings: tuple[Finding, ...]
    strangers: Mapping[str, str]  # unlisted files that can't be read, and why
    unknown: tuple[str, ...]  # unlisted files that do not say of which world they are

    @property
    def is_whole(self) -> bool:
        return not self.fault and all(f.is_reachable for f in self.findings if f.is_listed)

    def lines(self) -> list[str]:
        """What a person is told."""
        kept = sum(f.is_reachable for f in self.findings)
        said = [f"{MANIFEST}: {self.fault or 'whole'}", *map(str, self.findings)]
        said += [f"{name} (not listed): {why}" for name, why in self.strangers.items()]
        said += [f"{name} (not listed): does not say of which world it is" for name in self.unknown]
        return [*said, f"{kept} of {len(self.findings)} states are whole in {self.folder}"]


def check(folder: Path) -> Report:
    """Read everything in a world's folder; WorldFileError if there is nothing of a world in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise WorldFileError(f"{folder} is no folder; name the folder that holds {MANIFEST}")
    fault, listed = _listed(folder)
    own, strangers, unknown = _unlisted(folder, {entry.file for entry in listed.values()})
    if not listed and not own and not (folder / MANIFEST).exists():
        raise WorldFileError(f"{folder} holds no {MANIFEST} and no file of a world; it is not a saved world")
    entries = {**own, **listed}
    if fault:  # then what a file says of itself is worth more than the list
        entries |= {key: _of_itself(folder, entry) for key, entry in listed.items()}
    entries = {key: entries[key] for key in [*listed, *(key for key in own if key not in listed)]}
    faults = {key: _damage(folder, entry) for key, entry in entries.items()}
    whole = {key for key in entries if _reaches_the_photo(key, entries, faults)}
    found = tuple(Finding(entry, faults[key], key in listed, key in whole) for key, entry in entries.items())
    return Report(folder, fault, found, strangers, tuple(unknown))


def repair(folder: Path) -> list[str]:
    """Make world.json list all states that are whole, and set damaged files aside; what was done, in words."""
    folder = Path(folder)
    with files.locked(folder / LOCK) as is_held:
        report, said = check(folder), []
        kept = {f.entry.key: f.entry for f in report.findings if f.is_reachable}
        if not kept:
            raise WorldFileError(f"{folder}: not even the photo of it is whole; nothing was changed, restore it from a backup")
        newest = _newest(folder, report, kept)
        damaged = [f.entry.file for f in report.findings if f.fault] + list(report.strangers)
        lost = [f.entry.key[:8] for f in report.findings if f.is_listed and not f.is_reachable]
        if (report.fault or lost) and (folder / MANIFEST).exists():
            said.append(f"{MANIFEST} as it was is now {_set_aside(folder / MANIFEST, shutil.copyfile).name}")
        for name in dict.fromkeys(damaged):
            if (folder / name).exists():
                said.append(f"{name} is now {_set_aside(folder / name).name}")
        world_files.write_manifest(folder, kept, newest, world_files.size_of(folder, kept[newest]), is_held)
        said.append(f"{MANIFEST} lists {len(kept)} states, the latest is {newest[:8]}")
        if lost:
            said.append(f"not listed any more: {', '.join(lost)}; walking the same paths again makes them again")
    return said


def _listed(folder: Path) -> tuple[str, dict[str, Entry]]:
    """What is wrong with world.json, and its entries as far as they can be read."""
    try:
        return "", world_files.read_manifest(folder)
    except world_files.NewerVersion:
        raise
    except DamagedFile as problem:
        fault = problem.fault
    except WorldFileError as problem:
        fault = str(problem)
    try:
        items = files.read_json(folder / MANIFEST)["chunks"]
    except (ValueError, OSError, KeyError, TypeError):
        return fault, {}
    found = {}
    for item in items if isinstance(items, list) else ():
        try:
            entry = world_files.read_entry(item, 3 if isinstance(item, dict) and "header" in item else 2)
        except (ValueError, KeyError):
            continue
        if world_files.is_plain(entry.file) and not (folder / entry.file).is_symlink():
            found[entry.key] = entry
    return fault, found


def _unlisted(folder: Path, listed: set[str]) -> tuple[dict[str, Entry], dict[str, str], list[str]]:
    """States of files that no list names, by what they say of themselves; files that are damaged; files that say nothing."""
    own, strangers, unknown = {}, {}, []
    for file in sorted(folder.glob("*.safetensors")):
        if file.name in listed or file.is_symlink():
            continue
        try:
            entry = _entry_of(open_chunk(file))
        except DamagedFile as problem:
            strangers[file.name] = problem.fault
            continue
        if entry is not None:
            own[entry.key] = entry
        else:
            unknown.append(file.name)
    return own, strangers, unknown


def _of_itself(folder: Path, entry: Entry) -> Entry:
    try:
        return _entry_of(open_chunk(folder / entry.file)) or entry
    except DamagedFile:
        return entry


def _entry_of(file: ChunkFile) -> Entry | None:
    """How a file would be listed, by its own record."""
    record = {name: value for name, value in file.record.items() if name != "sums"}
    try:
        length = file.path.stat().st_size
        return world_files.read_entry({**record, "file": file.path.name, "size": length, "header": file.header}, 3)
    except (KeyError, ValueError):
        return None


def _damage(folder: Path, entry: Entry) -> str:
    """What is wrong with a file, by all its sums, its content key and the key of its state."""
    if fault := world_files.damage(folder, entry):
        return fault
    try:
        file = open_chunk(folder / entry.file)
        if entry.header and (fault := world_files.content_fault(file, entry.prompt, entry.settings, entry.content)):
            return fault
        if _key(file, entry) != entry.key:
            return "is damaged: it does not fit the key of its state"
    except DamagedFile as problem:
        return problem.fault
    except (KeyError, IndexError, RuntimeError, ValueError) as problem:
        return f"is damaged ({problem})"
    return ""


def _key(file: ChunkFile, entry: Entry) -> str:
    """The key of the state after a chunk, as `World.keys` has it."""
    if entry.parent is not None:
        return hashlib.sha256((entry.parent + entry.content).encode()).hexdigest()
    size = world_files.size_of(file.path.parent, entry)
    chunk, keyframes = world_files.load_chunk(file.path.parent, entry, size, 0)
    return World(chunk, (), SpatialMemory(tuple(keyframes))).key


def _reaches_the_photo(key: str, entries: Mapping[str, Entry], faults: Mapping[str, str]) -> bool:
    seen = set()
    while key is not None:
        if key in seen or faults.get(key, "is not there"):
            return False
        seen.add(key)
        key = entries[key].parent
    return True


def _newest(folder: Path, report: Report, kept: Mapping[str, Entry]) -> str:
    """The latest state, or the nearest one before it that is kept; the last of the list if that is not known."""
    entries = {f.entry.key: f.entry for f in report.findings}
    try:
        key = files.read_json(folder / MANIFEST)["latest"]
    except (ValueError, OSError, KeyError, TypeError):
        key = None
    seen = set()
    while isinstance(key, str) and key in entries and key not in kept and key not in seen:
        seen.add(key)
        key = entries[key].parent
    return key if key in kept else _deepest(kept)


def _deepest(kept: Mapping[str, Entry]) -> str:
    def depth(key: str) -> int:
        parent = kept[key].parent
        return 0 if parent is None else 1 + depth(parent)

    return max(kept, key=depth)


def _set_aside(file: Path, move: Callable[[Path, Path], object] = os.rename) -> Path:
    """Give a file, or a copy of it, a name that no world looks at."""
    names = (f"{file.name}{number or ''}{ASIDE}" for number in range(10**6))
    place = next(file.with_name(name) for name in names if not file.with_name(name).exists())
    with files.explained(file):
        move(file, place)
    return place
