"""The paper's ablation at home: five small transformers of one parent, each trained as long, on scenes of boxes.

LYRA2_TINY names the folder of `train-tiny` (default output/lyra_tiny): its films are used, and its checkpoint is the parent, or
fresh weights where there is none. LYRA2_ABLATION is "steps,scenes,walks,chunks": how long each learns, how many held-out scenes are
painted, along how many a walk goes, and how far. LYRA2_PROCESSES (0) of them make examples and paint scenes meanwhile. All goes on
where it was stopped; after LIMIT seconds, if it is given, the table is printed of what is there by then.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module
from math import hypot
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from . import Result

BUDGET = (4000, 16, 16, 10)  # steps, scenes, walks, chunks of a walk
BEGIN = 96  # examples before the first step at most
TITLE = "toy scale, synthetic scenes"
# style consistency and camera control in the paper's table
PAPER = {
    "full": (85.07, 63.87),
    "global point cloud": (82.42, 49.86),
    "no correspondences": (83.28, 57.29),
    "no FramePack": (80.61, 62.62),
    "no self-augmentation": (77.98, 53.92),
}
CHANGES = {
    "full": {},
    "global point cloud": {"memory": "cloud"},
    "no correspondences": {"correspondences": False},
    "no FramePack": {"history": "newest"},
    "no self-augmentation": {"self_augmented": 0.0},
}
LOWER = ("GMSD", "slope", "degrees", "units", "reprojection")  # what is better if it is lower
COLOURS = ((240, 150, 60), (90, 170, 250), (120, 210, 120), (230, 110, 140), (190, 150, 240))
Scores = dict[str, list[float]]


def ablation() -> Iterator[Result]:
    began, limit = time.monotonic(), float(os.environ.get("LIMIT", "inf"))
    marks, painter, scoring = (import_module(f"train.{part}") for part in ("marks", "painter", "scoring"))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    folder = Path(os.environ.get("LYRA2_TINY", "output/lyra_tiny"))
    (steps, count, walks, chunks), record = budget(), json.loads((folder / "made.json").read_text())
    place = kept_apart(folder / "ablation", {"steps": steps, "chunks": chunks, "made": record})
    recipes = {name: replace(painter.RECIPE, **changes) for name, changes in CHANGES.items()}
    processes, todo = int(os.environ.get("LYRA2_PROCESSES", "0")), marks.tasks(count, walks)
    print(f"{TITLE}: {steps} steps each, from {record['parent']}; {count} scenes, {walks} walks of {chunks} chunks", flush=True)
    with marks.Markers(place, recipes, todo, chunks, tuple(record["size"]), processes) as markers:
        missing = [name for name in recipes if not (place / f"{marks.checkpoint(name)}.safetensors").exists()]
        if missing:
            yield from learned(folder, place, {name: recipes[name] for name in missing}, steps, record, processes)
        markers.finish(lambda: limit - (time.monotonic() - began))
    table, curves = {}, {}
    for name in recipes:
        table[name], curves[name] = marks.gathered(place, name, todo)
        yield from rows(name, table[name], table["full"], scoring)
    picture = folder / "ablation.png"
    draw(curves, f"{TITLE}: {steps} steps").save(picture)
    (folder / "ablation.json").write_text(json.dumps({"budget": budget(), "made": record, "scores": table, "curves": curves}, indent=1))
    yield Result("curves and numbers", f"{picture.name}, ablation.json")


def kept_apart(place: Path, settings: dict) -> Path:
    """The folder of what is trained and marked; ValueError if it is of another ablation."""
    place.mkdir(parents=True, exist_ok=True)
    told = place / "settings.json"
    if told.exists() and json.loads(told.read_text()) != settings:
        raise ValueError(f"{place} is of an ablation with {told.read_text()}; move it away to begin another one")
    told.write_text(json.dumps(settings))
    return place


def budget() -> tuple[int, int, int, int]:
    """BUDGET, or what LYRA2_ABLATION says; ValueError for anything but four whole numbers."""
    text = os.environ.get("LYRA2_ABLATION", ",".join(map(str, BUDGET)))
    try:
        steps, count, walks, chunks = (int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f'LYRA2_ABLATION is {text!r}; write steps, scenes, walks and their chunks, such as "200,4,2,10"') from None
    return steps, count, walks, chunks


def learned(folder: Path, place: Path, recipes: dict, steps: int, record: dict, processes: int) -> Iterator[Result]:
    """Train those networks one after the other; a line for each that can't be."""
    codec, films, painter, release, sights, marks = (
        import_module(f"train.{part}") for part in ("codec", "films", "painter", "release", "sights", "marks")
    )
    contracts = import_module("lyra_core.training.contracts")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = folder / "lyra_tiny.safetensors"
    parent, coder = release.read(begun) if begun.exists() else (painter.new(record["seed"]), codec.read(folder / "codec.safetensors"))
    coder = coder.to(device)
    eyes = codec.TrainingCodec(coder, codec.fingerprint(coder))
    encoders = contracts.Encoders(eyes, lambda picture: torch.zeros(1, 1), release.padded)
    course = painter.Course(steps, record["batch"], record["examples"], min(record["examples"], BEGIN), seed=record["seed"] + 1)
    names = [films.name(number) for number in films.learned(record["films"], record["seed"])]
    with ExitStack() as stack:
        each = -(-processes // 4)  # they are ahead of the training, all at the same time
        makers = {
            name: stack.enter_context(
                sights.Makers(folder / "films", names, recipe, course.seed, 0, each, place / f"{marks.checkpoint(name)}.sights")
            )
            for name, recipe in recipes.items()
        }
        size = tuple(record["size"])
        samples = films.training_set(folder / "films", record["films"], painter.RECIPE, eyes, record["seed"], size, device=device)
        for name, recipe in recipes.items():
            file = place / f"{marks.checkpoint(name)}.safetensors"
            file.with_suffix(".none").unlink(missing_ok=True)
            try:
                say = partial(print, f"{name}:", flush=True)
                network, training = copy.deepcopy(parent).requires_grad_(True).to(device), file.with_suffix(".training.safetensors")
                made = painter.train(training, network, makers[name], samples, encoders, course, recipe, say)
                release.write(file, made, coder)
            except (RuntimeError, ValueError) as problem:  # the others are compared all the same
                file.with_suffix(".none").touch()
                yield Result(name, f"not trained: {problem}", "is trained", False)


def rows(name: str, found: Scores, full: Scores, scoring) -> Iterator[Result]:
    """A line a number; beside it, whether it points where the paper's does: the full method ahead of what lacks a part."""
    style, control = PAPER[name]
    yield Result(f"{name}; the paper: style consistency, camera control", f"{style:.2f}, {control:.2f}")
    for measure, values in found.items():
        towards = _towards(measure, values, full.get(measure, []), scoring) if name != "full" and full.get(measure) else ""
        yield Result(f"  {measure}", scoring.told(values) + towards)


def _towards(measure: str, values: list[float], full: list[float], scoring) -> str:
    difference = mean(values) - mean(full)
    worse = difference > 0 if any(word in measure for word in LOWER) else difference < 0
    apart = min(len(values), len(full)) > 1 and abs(difference) > hypot(scoring.error(values), scoring.error(full))
    return ("  as the paper" if worse else "  the other way") + ("" if apart else ", within the errors")


def draw(curves: dict, title: str) -> Image.Image:
    """Colour and sharpness along the walks, a line for each of the five: the mean over scenes."""
    width, height, edge = 520, 300, 46
    font = ImageFont.load_default(14)
    canvas = Image.new("RGB", (2 * width, height + 40 + 20 * len(curves)), (24, 24, 26))
    pen = ImageDraw.Draw(canvas)
    pen.text((edge, 8), title, (232, 232, 232), font)
    labels = {"colour": "distance of mean colours from the true ones", "sharpness": "log of sharpness over the true one"}
    for column, (what, label) in enumerate(labels.items()):
        lines = {name: Tensor(found[what]).mean(0) for name, found in curves.items() if found.get(what)}
        if not lines:
            continue
        values = torch.stack([*lines.values(), torch.zeros_like(next(iter(lines.values())))])
        low, high = float(values.min()), max(float(values.max()), float(values.min()) + 1e-6)
        left, base, reach = column * width + edge, height, height - 2 * edge

        def place(step: int, value: float, left=left, base=base, reach=reach, low=low, high=high, last=values.shape[1] - 1):
            return left + step * (width - 2 * edge) / max(1, last), base - (value - low) / (high - low) * reach

        pen.text((left, 34), label, (232, 232, 232), font)
        for value in (low, 0.0, high):
            pen.line([place(0, value), place(values.shape[1] - 1, value)], (80, 80, 86))
            pen.text((left - 44, place(0, value)[1] - 8), f"{value:.2f}", (160, 160, 166), ImageFont.load_default(11))
        for colour, line in zip(COLOURS, lines.values(), strict=False):
            pen.line([place(step, float(value)) for step, value in enumerate(line)], colour, 2)
        pen.text((left, base + 6), f"chunk 1 to {values.shape[1]}", (160, 160, 166), font)
    for row, (name, colour) in enumerate(zip(curves, COLOURS, strict=False)):
        pen.text((edge, height + 34 + 20 * row), name, colour, font)
    return canvas


BENCHES = {"ablation": ablation}
