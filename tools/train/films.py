"""Scenes as the training core takes them: videos with cameras, exact depth, captions and latents, kept as a training set."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lyra_core.training import sets
from lyra_core.training.contracts import Codec
from lyra_core.training.examples import prepared
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import Sample
from lyra_core.world.world import to_uint8

from . import scenes

SIZE = (64, 96)  # pictures' height and width
CHUNKS = 3  # of a film that is learned from
HELD_OUT = 1_000_000  # scenes from this number on are never learned from


def film(seed: int, recipe: Recipe, chunks: int = CHUNKS, size: tuple[int, int] = SIZE, comes_back: bool | None = None) -> Sample:
    """One walk of so many chunks through one scene; of four scenes, two come back."""
    scene = scenes.scene(seed)
    back = seed // 2 % 2 == 0 if comes_back is None else comes_back
    walk = scenes.walk(scene, seed, 1 + chunks * recipe.chunk, size, back)
    pictures, depths = scenes.render([scene], [walk])
    known = {frame: depths[0, frame].clone() for frame in range(0, len(walk), recipe.stride)}
    return Sample(f"scene-{seed}", to_uint8(pictures[0]), walk, known, {0: scene.caption})


def training_set(
    folder: Path,
    count: int,
    recipe: Recipe,
    codec: Codec | None = None,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
    say: Callable[[str], None] = print,
) -> list[Sample]:
    """The films of so many scenes, with their latents if there is a codec. Those that the folder holds already are not made again."""
    began = time.monotonic()
    for number in range(seed * 10_000, seed * 10_000 + count):
        source = {"scene": number, "size": list(size), "chunks": CHUNKS}
        if not sets.holds(folder, f"scene-{number}", source):
            sets.add(folder, film(number, recipe, size=size), source, recipe.chunk)
    kept = []
    for number in range(seed * 10_000, seed * 10_000 + count):
        found = sets.read_one(folder, f"scene-{number}")
        if codec is not None and (found.latents is None or found.latents.codec != codec.name):
            found = prepared(found, codec, recipe)
            sets.keep_latents(folder, found)
        kept.append(found)
    say(f"{count} films of {CHUNKS * recipe.chunk + 1} frames, {time.monotonic() - began:.0f} s")
    return kept


def held_out(count: int, recipe: Recipe, chunks: int = CHUNKS, size: tuple[int, int] = SIZE) -> list[Sample]:
    """Films of scenes that nobody has learned from; all of them come back."""
    return [film(HELD_OUT + number, recipe, chunks, size, comes_back=True) for number in range(count)]

