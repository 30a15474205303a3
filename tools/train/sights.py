"""What geometry says of windows of films, made ahead by processes of their own: `python -m train.sights FOLDER`, told on stdin.

Sight number n follows from seed, recipe and n alone. Each is a safetensors file that is taken away when it is read, so that
the makers stay a little ahead of the training, no more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from lyra_core.array_files import as_safetensors
from lyra_core.conditioning.framepack import FramePackLayout
from lyra_core.conditioning.history import Guides
from lyra_core.training import sets
from lyra_core.training.examples import Sight, draw_window, sighted
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import Sample, Window
from lyra_core.training.self_augmentation import Kind, kind_of

from .processes import Processes, give_way

AHEAD = 24  # files that a process leaves unread before it waits
WAIT = 0.02  # seconds between two looks
PATIENCE = 120.0  # seconds without a sight after which a training gives up


@dataclass(frozen=True)
class Job:
    """An example to make: of which film and kind, and its window; of one to be spoilt that window and the one after."""

    number: int
    film: int
    kind: Kind
    sights: tuple[Sight, ...]


def job(samples: Sequence[Sample], recipe: Recipe, seed: int, number: int) -> Job:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    kind = kind_of(number, recipe, generator)
    film = int(torch.randint(len(samples), (), generator=generator))
    sample = samples[film]
    if kind == "photo":
        return Job(number, film, kind, (sighted(sample, sample.windows(recipe.chunk, 1)[0], recipe, generator, photo_only=True),))
    window = draw_window(sample, recipe, generator, room=int(kind == "spoilt"))
    windows = [window]
    if kind == "spoilt":
        windows.append(Window(window.segment + 1, window.first + window.count, window.count))
    return Job(number, film, kind, tuple(sighted(sample, window, recipe, generator) for window in windows))


# --------------------------------------------------------------------------------------------------------------- as files


def write(made: Job, path: Path) -> None:
    tensors, told = {}, {"number": made.number, "film": made.film, "kind": made.kind, "sights": []}
    for place, sight in enumerate(made.sights):
        parts = {"rays": sight.guides.rays, "correspondences": sight.guides.correspondences, "warped": sight.warped}
        tensors |= {f"{place}/{name}": part.to(torch.bfloat16) for name, part in parts.items()}
        tensors[f"{place}/remembered"] = sight.remembered
        told["sights"].append({"window": asdict(sight.window), "retrieved": sight.retrieved, "caption": sight.caption})
    part = path.with_suffix(".part")
    with open(part, "wb") as file:  # it is read once and need not last
        file.writelines(as_safetensors(tensors, {"job": json.dumps(told)}))
    os.replace(part, path)


def read(path: Path) -> Job:
    with safetensors.safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["job"])
    tensors, found = load_file(path), []
    for place, sight in enumerate(told["sights"]):
        rays, correspondences, warped, remembered = (
            tensors[f"{place}/{name}"] for name in ("rays", "correspondences", "warped", "remembered")
        )
        window = Window(**sight["window"])
        found.append(Sight(window, sight["retrieved"], Guides(rays, correspondences), warped, remembered, sight["caption"]))
    return Job(told["number"], told["film"], told["kind"], tuple(found))


class _Films(Sequence):
    """The videos of a set by number, each read when it is asked for, and waited for if it is still being made."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> Sample:
        began, record = time.monotonic(), self.folder / f"{self.names[number]}{sets.RECORD}"
        while not record.exists() and time.monotonic() - began < PATIENCE:
            time.sleep(WAIT)
        return sets.read_one(self.folder, self.names[number], latents=False)


# ------------------------------------------------------------------------------------------------------------ in processes


class Makers(Processes):
    """So many processes that make the sights `first`, first + 1, ... of the films of a folder; none: they are made when asked for.

    Sights are taken in their order, or, if they need not be `ordered`, as they come.
    """

    def __init__(
        self,
        films: Path,
        names: Sequence[str],
        recipe: Recipe,
        seed: int,
        first: int,
        processes: int,
        folder: Path,
        ordered: bool = True,
    ):
        self.samples, self.recipe, self.seed, self.next, self.folder = _Films(films, names), recipe, seed, first, folder
        super().__init__()
        self.ordered = ordered
        if processes:
            folder.mkdir(parents=True, exist_ok=True)
            self._clear()
        told = {"films": str(films), "names": list(names), "recipe": as_json(recipe), "seed": seed, "every": processes}
        for number in range(first, first + processes):
            self.start(["train.sights", str(self.folder)], {**told, "first": number}, CUDA_VISIBLE_DEVICES="")

    def ready(self, count: int = 1) -> bool:
        """Whether so many are there, or are to be made here."""
        return not self.processes or len(self._waiting(count)) == count

    def take(self) -> Job:
        """One more, waited for if need be; RuntimeError if it does not come."""
        began = time.monotonic()
        while not self.ready():
            gone = [process.poll() for process in self.processes if process.poll() is not None]
            if gone and (self.ordered or len(gone) == len(self.processes)) or time.monotonic() - began > PATIENCE:
                raise RuntimeError(f"sight {self.next} does not come; what the processes printed says why")
            time.sleep(WAIT)
        self.next += 1
        if not self.processes:
            return job(self.samples, self.recipe, self.seed, self.next - 1)
        path = self._waiting(1, self.next - 1)[0]
        found = read(path)
        path.unlink()
        return found

    def _waiting(self, count: int, first: int | None = None) -> list[Path]:
        """Files of so many sights, fewer if they are not all there."""
        if not self.ordered:
            return sorted(self.folder.glob("*.safetensors"))[:count]
        first = self.next if first is None else first
        paths = [self.folder / f"{number:08d}.safetensors" for number in range(first, first + count)]
        return [path for path in paths if path.exists()]

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        if self.processes:
            self._clear()

    def _clear(self) -> None:
        """Take away what processes made or had begun to make."""
        for left in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.part")):
            left.unlink()


def as_json(recipe: Recipe) -> dict:
    return {field.name: getattr(recipe, field.name) for field in fields(recipe)} | {"layout": str(recipe.layout)}


def of_json(told: Mapping) -> Recipe:
    corruption = told["corruption"] and tuple(told["corruption"])
    return Recipe(**{**told, "layout": FramePackLayout.parse(told["layout"]), "corruption": corruption})


def main(folder: Path) -> None:
    """Make every so many-th sight until the process that asked is gone."""
    asked, parent, mine = json.load(sys.stdin), os.getppid(), []
    torch.set_num_threads(1)
    give_way()
    films, recipe = _Films(Path(asked["films"]), asked["names"]), of_json(asked["recipe"])
    number = asked["first"]
    while os.getppid() == parent:
        mine = [path for path in mine if path.exists()] if len(mine) >= AHEAD else mine
        if len(mine) >= AHEAD:
            time.sleep(WAIT)
            continue
        path = folder / f"{number:08d}.safetensors"
        write(job(films, recipe, asked["seed"], number), path)
        mine.append(path)
        number += asked["every"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
