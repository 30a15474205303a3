"""Saved worlds that are being looked at: opened once, and what a browser asks of them computed once.

For one thread. States are named by what they contain, so nothing kept here can grow stale; whether a folder still holds a
state is asked of the folder every time.
"""

from __future__ import annotations

import gzip
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..cameras.trajectory import center_depth
from ..memory import point_cloud, preflight
from . import world_files
from .world import World, rewind

WORLDS, BLOCK_BYTES, CLOUDS = 3, 64 * 2**20, 3


class MissingState(ValueError):
    """The folder does not hold this state."""


@dataclass(frozen=True)
class Points:
    """What the last chunk of a state adds."""

    packed: bytes  # the block of `point_cloud`, compressed by gzip
    coarse: np.ndarray  # (N, 3) world points of all but the finest level

    @property
    def size(self) -> int:
        return len(self.packed) + self.coarse.nbytes


@dataclass
class OpenWorlds:
    """A few worlds, their blocks of points, and numbers of theirs that never change."""

    worlds: OrderedDict[tuple[Path, str], World] = field(default_factory=OrderedDict)
    blocks: OrderedDict[str, Points] = field(default_factory=OrderedDict)
    clouds: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict)
    facts: dict[Hashable, float] = field(default_factory=dict)

    def world(self, folder: Path, state: str) -> World:
        """The world at a state, given by its whole key."""
        for (place, _), world in self.worlds.items():
            if place == folder and state in world.keys:
                self.worlds.move_to_end((place, world.key))
                return world if world.key == state else rewind(world, world.keys.index(state))
        latest = world_files.latest(folder)[0]
        # states are mostly asked for one after the other, so that one which holds them all serves best
        head = latest if state in chain_of(folder, latest) else state
        self.worlds[folder, head] = world_files.load(folder, branch=head)
        while len(self.worlds) > WORLDS:
            self.worlds.popitem(last=False)
        return self.world(folder, state)

    def points(self, folder: Path, state: str) -> Points:
        """What the last chunk of a state adds to the states before it."""
        if state not in self.blocks:
            block = _block(self.world(folder, state))
            packed = gzip.compress(point_cloud.encode(block), 1, mtime=0)
            self.blocks[state] = Points(packed, block.points(preflight.LEVELS))
            while len(self.blocks) > 1 and sum(found.size for found in self.blocks.values()) > BLOCK_BYTES:
                self.blocks.popitem(last=False)
        self.blocks.move_to_end(state)
        return self.blocks[state]

    def cloud(self, folder: Path, state: str) -> np.ndarray:
        """World points (N, 3) of all chunks of a state, without the finest level."""
        if state not in self.clouds:
            chain = chain_of(folder, state)
            self.clouds[state] = np.concatenate([self.points(folder, key).coarse for key in chain])
            while len(self.clouds) > CLOUDS:
                self.clouds.popitem(last=False)
        self.clouds.move_to_end(state)
        return self.clouds[state]

    def depth(self, folder: Path, state: str) -> float:
        """How far away the scene is, in scene units: the 25 % quantile of the photo's depth."""
        photo = chain_of(folder, state)[0]
        return self._once(("depth", photo), lambda: center_depth(self.world(folder, photo).memory.keyframes[0].depth))

    def frames(self, folder: Path, entry: world_files.Entry) -> int:
        """How many frames a saved chunk has."""
        return int(self._once(("frames", entry.content), lambda: world_files.frames_of(folder, entry)))

    def _once(self, name: Hashable, compute: Callable[[], float]) -> float:
        if name not in self.facts:
            self.facts[name] = compute()
        return self.facts[name]


def chain_of(folder: Path, state: str) -> list[str]:
    """Keys of the states from the photo to this one; MissingState if the folder does not hold it."""
    return [entry.key for entry in _chain(world_files.read_manifest(folder), state)]


def whole_key(folder: Path, state: str) -> str:
    """The key that begins so, or the latest for an empty text; MissingState if there is none or are several."""
    if not state:
        return world_files.latest(folder)[0]
    found = [key for key in world_files.read_manifest(folder) if key.startswith(state)]
    if len(found) != 1:
        raise MissingState(f"{len(found)} states of this world have a key that begins with {state}")
    return found[0]


def summary(opened: OpenWorlds, folder: Path, state: str) -> dict:
    """Everything about a folder that its browser tree shows, standing at `state` (a whole key)."""
    entries = world_files.read_manifest(folder)
    chain = _chain(entries, state)
    return {
        "latest": world_files.latest(folder)[0],
        "state": state,
        "size": list(world_files.size_of(folder, chain[0])),
        "depth": opened.depth(folder, state),
        "frames": sum(opened.frames(folder, entry) for entry in chain),
        "chain": [entry.key for entry in chain],
        "tree": [
            {
                "state": entry.key,
                "parent": entry.parent,
                "prompt": entry.prompt,
                "generator": entry.settings.get("generator"),
                "seed": entry.settings.get("seed"),
                "frames": opened.frames(folder, entry),
            }
            for entry in entries.values()
        ],
    }


def saved_in(base: Path) -> Iterator[Path]:
    """Folders below `base` that hold a world, by name; links are not followed."""
    for file in sorted(Path(base).rglob(world_files.MANIFEST)):
        if file.is_file() and file.resolve() == Path(base).resolve() / file.relative_to(base):
            yield file.parent


def _chain(entries: dict[str, world_files.Entry], state: str) -> list[world_files.Entry]:
    chain, key = [], state
    while key is not None:
        if key not in entries or len(chain) > len(entries):
            raise MissingState(f"this world has no state {key}")
        chain.append(entries[key])
        key = entries[key].parent
    return chain[::-1]


def _block(world: World) -> point_cloud.Block:
    chunk = world.chunks[-1] if world.chunks else world.first
    first = len(world) - len(chunk)
    views, earlier = [], []
    for keyframe in world.memory.keyframes:
        frame = keyframe.frame
        if not world.chunks or frame >= first:  # further photos count as the first, whatever their numbers
            views.append(point_cloud.view_of(keyframe, world.frame(frame), world.invented(frame)))
        else:
            earlier.append(point_cloud.view_of(keyframe))
    return point_cloud.block(views, earlier, chunk.cameras)
