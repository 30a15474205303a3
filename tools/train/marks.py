"""Marks of several networks on held-out scenes, each a file, made by processes of their own: `python -m train.marks`, told on stdin.

A process makes its scenes once and lets each network paint them as soon as the network's checkpoint is there.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from .processes import Processes, give_way

WAIT = 0.1  # seconds between two looks
Kind = Literal["chunk", "walk"]


@dataclass(frozen=True)
class Task:
    """One scene that everybody paints: a chunk after true ones, or a whole walk."""

    kind: Kind
    number: int

    def file(self, folder: Path, name: str) -> Path:
        return folder / f"{checkpoint(name)}.{self.kind}-{self.number}.json"


def checkpoint(name: str) -> str:
    """What a network's files begin with."""
    return name.replace(" ", "-")


def tasks(scenes: int, walks: int) -> list[Task]:
    """Walks take longest, so they come first; a process more or less then changes little."""
    return [Task("walk", n) for n in range(walks)] + [Task("chunk", n) for n in range(scenes)]


def make(
    folder: Path,
    recipes: Mapping[str, object],
    todo: Sequence[Task],
    chunks: int,
    size: tuple[int, int],
    awaited: bool = False,
) -> None:
    """The marks that are missing in `folder`, where NAME.safetensors are; NAME.none says that one never comes.

    A network that is not there is `awaited`, or left out.
    """
    import torch

    from . import films, scoring

    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = next(iter(recipes.values()))

    @cache
    def scene(task: Task):
        long = task.kind == "walk"
        film = films.filmed([films.HELD_OUT + task.number], recipe, chunks if long else films.CHUNKS, size, True, device)[0]
        return film, None if long else scoring.parts(film, film.windows(recipe.chunk, recipe.windows)[-1], recipe)

    for name in recipes:  # in the order in which they are trained
        missing = [task for task in todo if not task.file(folder, name).exists()]
        if missing and awaited:
            scene(missing[0])  # there is time for it
        network = _read(folder / f"{checkpoint(name)}.safetensors", device, awaited) if missing else None
        for task in missing if network else ():
            film, parts = scene(task)
            if task.kind == "walk":
                found = walk_marks(*network, film, recipes[name], task.number)
            else:
                found = {"scores": chunk_marks(*network, film, recipes[name], task.number, parts)}
            _write(task.file(folder, name), found)


def chunk_marks(model, encoders, film, recipe, number: int, parts) -> dict[str, float]:
    """Of the last chunk, painted after the true ones: remembered and new pixels, and where its last frame seems to be taken from."""
    from . import films, scenes, scoring

    window = film.windows(recipe.chunk, recipe.windows)[-1]
    true, found = scoring.truth(film, window), {}
    made = scoring.painted(model, encoders, film, window, recipe, number)
    for part in ("remembered", "new"):
        found |= {f"{part}: {measure}": value for measure, value in scoring.alike(made, true, getattr(parts, part)).items()}
    if "remembered: PSNR" in found:
        blind = scoring.painted(model, encoders, scoring.forgetful(film, window), window, recipe, number)
        found["remembered, without retrieval: PSNR"] = scoring.psnr(blind, true, parts.remembered)
    found["reprojection error"] = scoring.reprojected(made, film, window)
    scene = scenes.scene(films.HELD_OUT + number)
    degrees, units = scoring.camera_error(made[-1], scene, film.cameras[window.first + window.count - 1])
    return {**found, "camera, degrees": degrees, "camera, units": units}


def walk_marks(model, encoders, film, recipe, number: int) -> dict[str, dict]:
    """Along a walk, each chunk painted after painted ones: curves of colour and sharpness, and their slopes."""
    from . import scoring

    made = scoring.walked(model, encoders, film, recipe, number)
    curves = scoring.drift(made, film.frames[1:].float() / 255, recipe.chunk)
    return {"scores": {f"{what}, slope a chunk": abs(scoring.slope(values)) for what, values in curves.items()}, "curves": curves}


def gathered(folder: Path, name: str, todo: Sequence[Task]) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """All marks of a network that are there, by what they tell."""
    scores, curves = defaultdict(list), defaultdict(list)
    for file in sorted(task.file(folder, name) for task in todo):
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        for kept, part in ((scores, found["scores"]), (curves, found.get("curves", {}))):
            for what, value in part.items():
                kept[what].append(value)
    return dict(scores), dict(curves)


def _read(file: Path, device: str, awaited: bool):
    """A network with all that it is asked through; None if it is not there."""
    import torch

    from lyra_core.training.contracts import Encoders

    from . import codec, painter, release

    while not (file.exists() or file.with_suffix(".none").exists()) and awaited:
        time.sleep(WAIT)
    if not file.exists():
        return None
    network, coder = (part.to(device).requires_grad_(False) for part in release.read(file))
    encoders = Encoders(codec.TrainingCodec(coder, codec.fingerprint(coder)), lambda picture: torch.zeros(1, 1), release.padded)
    return painter.spoken(network), encoders


def _write(path: Path, found: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    os.replace(part, path)


class Markers(Processes):
    """So many processes that make the missing marks while networks are still trained; none: `finish` makes them here."""

    def __init__(self, folder: Path, recipes: Mapping, todo: Sequence[Task], chunks: int, size: tuple[int, int], processes: int):
        from .sights import as_json

        super().__init__()
        self.here = partial(make, folder, recipes, todo, chunks, size)
        told = {"folder": str(folder), "recipes": {name: as_json(recipe) for name, recipe in recipes.items()}}
        told |= {"chunks": chunks, "size": list(size)}
        for first in range(processes):
            mine = [[task.kind, task.number] for task in todo[first::processes]]
            self.start(["train.marks"], {**told, "tasks": mine})

    def finish(self, left: Callable[[], float]) -> None:
        """Wait for the processes while there is time, or make what is missing here."""
        if not self.processes:
            self.here()
        while left() > 0 and any(process.poll() is None for process in self.processes):
            time.sleep(WAIT)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WAIT)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    asked = json.load(sys.stdin)
    import host

    host.boot()
    import torch

    from .sights import of_json

    torch.set_num_threads(1)
    give_way()
    recipes = {name: of_json(told) for name, told in asked["recipes"].items()}
    todo = [Task(kind, number) for kind, number in asked["tasks"]]
    make(Path(asked["folder"]), recipes, todo, asked["chunks"], tuple(asked["size"]), awaited=True)


if __name__ == "__main__":
    main()
