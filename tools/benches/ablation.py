"""The paper's ablation at home: five small transformers of one parent, each trained as long, on scenes of boxes.

LYRA2_TINY names the folder of `train-tiny` (default output/lyra_tiny): its codec and films are used, and its transformer is
the parent; without one, all begin from the same fresh weights. LYRA2_ABLATION is "steps,scenes,walks,chunks": how long each
learns, how many held-out scenes are painted, along how many a walk goes, and how far. Trainings go on where they were stopped.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
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
    parts = ("codec", "films", "painter", "release", "scoring")
    codec, films, painter, release, scoring = (import_module(f"train.{part}") for part in parts)
    contracts = import_module("lyra_core.training.contracts")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    folder = Path(os.environ.get("LYRA2_TINY", "output/lyra_tiny"))
    steps, count, walks, chunks = budget()
    record = json.loads((folder / "made.json").read_text())
    network = codec.read(folder / "codec.safetensors").to("cuda" if torch.cuda.is_available() else "cpu")
    coder = codec.TrainingCodec(network, codec.fingerprint(network))
    encoders = contracts.Encoders(coder, lambda picture: torch.zeros(1, 1), release.padded)
    samples = films.training_set(folder / "films", record["films"], painter.RECIPE, coder, record["seed"], tuple(record["size"]))
    kept = films.held_out(count, painter.RECIPE, size=tuple(record["size"]))
    long = films.held_out(walks, painter.RECIPE, chunks, tuple(record["size"]))
    parent = record["parent"]
    print(f"{TITLE}: {steps} steps each on {len(samples)} films, from {parent}; {count} scenes, {walks} walks of {chunks} chunks", flush=True)
    table, curves = {}, {}
    for name, changes in CHANGES.items():
        recipe = replace(painter.RECIPE, **changes)
        learned = trained(folder, name, recipe, samples, encoders, steps, record)
        table[name], curves[name] = scores(painter.spoken(learned), encoders, recipe, kept, long, scoring)
        yield from rows(name, table[name], table["full"], scoring)
    picture = folder / "ablation.png"
    draw(curves, f"{TITLE}: {steps} steps").save(picture)
    (folder / "ablation.json").write_text(json.dumps({"budget": budget(), "made": record, "scores": table, "curves": curves}, indent=1))
    yield Result("curves and numbers", f"{picture.name}, ablation.json")


def budget() -> tuple[int, int, int, int]:
    """BUDGET, or what LYRA2_ABLATION says; ValueError for anything but four whole numbers."""
    text = os.environ.get("LYRA2_ABLATION", ",".join(map(str, BUDGET)))
    try:
        steps, count, walks, chunks = (int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f'LYRA2_ABLATION is {text!r}; write steps, scenes, walks and their chunks, such as "200,4,2,10"') from None
    return steps, count, walks, chunks


def trained(folder: Path, name: str, recipe, samples, encoders, steps: int, record: dict):
    """One of the five, from the parent's weights."""
    painter = import_module("train.painter")
    network = painter.new(record["seed"]).to("cuda" if torch.cuda.is_available() else "cpu")
    if record["transformer_steps"]:
        painter.put_back(folder / "transformer.training.safetensors", network)
    file = folder / f"ablation-{name.replace(' ', '-')}.training.safetensors"
    course = painter.Course(steps, record["batch"], record["examples"], record["examples"], seed=record["seed"] + 1)
    names = [sample.name for sample in samples]
    with import_module("train.sights").Makers(folder / "films", names, recipe, course.seed, 0, 0, folder / "sights") as makers:
        say = partial(print, f"{name}:", flush=True)
        return painter.train(file, network, makers, samples, encoders, course, recipe, say)


def scores(model, encoders, recipe, kept: list, long: list, scoring) -> tuple[Scores, dict[str, list[list[float]]]]:
    """Every number of every scene, and the curves along walks."""
    found: Scores = defaultdict(list)
    curves: dict[str, list[list[float]]] = {"colour": [], "sharpness": []}
    scenes, films = import_module("train.scenes"), import_module("train.films")
    for number, film in enumerate(kept):
        window = film.windows(recipe.chunk, recipe.windows)[-1]
        where, true = scoring.parts(film, window, recipe), scoring.truth(film, window)
        made = scoring.painted(model, encoders, film, window, recipe, number)
        for part in ("remembered", "new"):
            for measure, value in scoring.alike(made, true, getattr(where, part)).items():
                found[f"{part}: {measure}"].append(value)
        found["reprojection error"].append(scoring.reprojected(made, film, window))
        scene = scenes.scene(films.HELD_OUT + number)
        degrees, units = scoring.camera_error(made[-1], scene, film.cameras[window.first + window.count - 1])
        found["camera, degrees"].append(degrees)
        found["camera, units"].append(units)
    for number, film in enumerate(long):
        made = scoring.walked(model, encoders, film, recipe, number)
        for what, values in scoring.drift(made, film.frames[1:].float() / 255, recipe.chunk).items():
            curves[what].append(values)
            found[f"{what}, slope a chunk"].append(abs(scoring.slope(values)))
    return dict(found), curves


def rows(name: str, found: Scores, full: Scores, scoring) -> Iterator[Result]:
    """A line a number; beside it, whether it points where the paper's does: the full method ahead of what lacks a part."""
    style, control = PAPER[name]
    yield Result(f"{name}; the paper: style consistency, camera control", f"{style:.2f}, {control:.2f}")
    for measure, values in found.items():
        towards = _towards(measure, values, full[measure], scoring) if name != "full" and full.get(measure) else ""
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
        lines = {name: Tensor(found[what]).mean(0) for name, found in curves.items() if found[what]}
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
