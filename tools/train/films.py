"""Scenes as the training core takes them: videos with cameras, exact depth, captions and latents, kept as a training set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lyra_core.training import sets
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import CleanLatents, Sample, candidates, codec_key, still
from lyra_core.world.world import to_uint8

from . import scenes

if TYPE_CHECKING:
    from .codec import TrainingCodec

SIZE = (64, 96)  # pictures' height and width
CHUNKS = 3  # of a film that is learned from
TOGETHER, WRITERS = 8, 8  # films on a GPU at once; threads that wait for the disk
HELD_OUT = 1_000_000  # scenes from this number on are never learned from


def film(seed: int, recipe: Recipe, chunks: int = CHUNKS, size: tuple[int, int] = SIZE, comes_back: bool | None = None) -> Sample:
    """One walk of so many chunks through one scene; of four scenes, two come back."""
    return filmed([seed], recipe, chunks, size, comes_back)[0]


def filmed(
    seeds: Sequence[int],
    recipe: Recipe,
    chunks: int = CHUNKS,
    size: tuple[int, int] = SIZE,
    comes_back: bool | None = None,
    device=None,
) -> list[Sample]:
    """The same of several scenes, traced together on `device`."""
    made = [scenes.scene(seed) for seed in seeds]
    back = [seed // 2 % 2 == 0 if comes_back is None else comes_back for seed in seeds]
    walks = [
        scenes.walk(scene, seed, 1 + chunks * recipe.chunk, size, returns)
        for scene, seed, returns in zip(made, seeds, back, strict=True)
    ]
    pictures, depths = scenes.render(made, walks, device=device)
    frames, known = to_uint8(pictures).cpu(), range(0, 1 + chunks * recipe.chunk, recipe.stride)
    depths = depths[:, :: recipe.stride].cpu()
    return [
        Sample(f"scene-{seed}", frames[i], walks[i], {frame: depths[i, k].clone() for k, frame in enumerate(known)}, {0: scene.caption})
        for i, (seed, scene) in enumerate(zip(seeds, made, strict=True))
    ]


def training_set(
    folder: Path,
    count: int,
    recipe: Recipe,
    codec: TrainingCodec | None = None,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
    say: Callable[[str], None] = print,
    device="cpu",
) -> list[Sample]:
    """The films of so many scenes, with their latents if there is a codec, made on `device`. What the folder holds is not made again."""
    began = time.monotonic()
    numbers = learned(count, seed)
    sources = {number: {"scene": number, "size": list(size), "chunks": CHUNKS} for number in numbers}
    missing = [number for number in numbers if not sets.holds(folder, name(number), sources[number])]
    together = TOGETHER if str(device).startswith("cuda") else 1
    kept = {number: sets.read_one(folder, name(number)) for number in numbers if number not in set(missing)}
    with ThreadPoolExecutor(WRITERS) as writers:
        waiting = []
        for some in _groups(missing, together):
            for number, made in zip(some, filmed(some, recipe, size=size, device=device), strict=True):
                waiting.append(writers.submit(sets.add, folder, made, sources[number], recipe.chunk))
                kept[number] = made
        for one in waiting:
            one.result()
        say(f"{len(missing)} films of {CHUNKS * recipe.chunk + 1} frames made, {time.monotonic() - began:.0f} s")
        kept = {number: kept[number] for number in numbers}
        if codec is None:
            return list(kept.values())
        key = codec_key(codec, recipe.still, recipe.chunk, recipe.stride)
        without = [number for number, found in kept.items() if found.latents is None or found.latents.codec != key]
        waiting = []
        for some in _groups(without, together):
            for number, found in zip(some, with_latents([kept[number] for number in some], codec, recipe, device), strict=True):
                waiting.append(writers.submit(sets.keep_latents, folder, found))
                kept[number] = found
        for one in waiting:
            one.result()
    say(f"{len(kept)} films with their latents, {time.monotonic() - began:.0f} s")
    return list(kept.values())


def learned(count: int, seed: int = 0) -> range:
    """The numbers of the scenes that are learned from."""
    return range(seed * 10_000, seed * 10_000 + count)


def name(number: int) -> str:
    return f"scene-{number}"


def _groups(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def with_latents(samples: Sequence[Sample], codec: TrainingCodec, recipe: Recipe, device="cpu") -> list[Sample]:
    """The samples as `prepared` makes them, all of one length, encoded together on `device`."""
    key = codec_key(codec, recipe.still, recipe.chunk, recipe.stride)
    whole = (len(samples[0]) - 1) // recipe.chunk * recipe.chunk
    videos = [torch.cat([still(sample, recipe.still), sample.pictures(range(1, 1 + whole))]) for sample in samples]
    streams = codec.encode_each(torch.stack(videos).to(device)).cpu()
    made = []
    for sample, stream in zip(samples, streams, strict=True):
        ids = sorted({0, *candidates(sample, recipe.stride)})
        alone = codec.encode_each(sample.pictures(ids)[:, None].to(device))[:, :, 0].cpu()
        made.append(replace(sample, latents=CleanLatents(stream.clone(), dict(zip(ids, alone, strict=True)), key)))
    return made


def held_out(count: int, recipe: Recipe, chunks: int = CHUNKS, size: tuple[int, int] = SIZE) -> list[Sample]:
    """Films of scenes that nobody has learned from; all of them come back."""
    return [film(HELD_OUT + number, recipe, chunks, size, comes_back=True) for number in range(count)]

