"""Steps, one after the other: drawn, learned from, saved every few minutes, gone on with after whatever ended them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from . import state as states
from .contracts import Encoders, Model
from .losses import flow_loss
from .optimisation import (
    CYCLE,
    LARGEST_NORM,
    LEARNING_RATE,
    WARM_UP,
    WEIGHT_DECAY,
    optimiser,
    rate_factor,
    set_rate,
    tame,
)
from .recipe import Recipe
from .sample import Sample
from .self_augmentation import training_example
from .state import State


class LossError(ValueError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Course:
    """How long and how fast is learned; the reference's numbers unless said otherwise. ValueError for what can't be."""

    steps: int
    rate: float = LEARNING_RATE
    decay: float = WEIGHT_DECAY
    warm_up: int = WARM_UP
    cycle: int = CYCLE  # steps until the lowest rate
    largest_norm: float = LARGEST_NORM
    batch: int = 1  # examples of a step
    at_once: int = 1  # of them through the network together
    seed: int = 0
    save_every: float = 300.0  # seconds

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or not 1 <= self.at_once <= self.batch:
            raise ValueError(f"{self.steps} steps of {self.batch} examples, {self.at_once} at once: each must be 1 at least")
        if not 0 < self.rate < 10 or self.decay < 0 or self.largest_norm <= 0:
            raise ValueError(f"learning rate {self.rate}, decay {self.decay}, norm {self.largest_norm}: they must be positive")

    def settings(self, recipe: Recipe) -> dict:
        """What must be the same for a training to go on."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("steps", "save_every")}
        told = {name: value for name, value in vars(recipe).items() if name != "layout"}
        corruption = None if recipe.corruption is None else list(recipe.corruption)
        return {**kept, **told, "corruption": corruption, "layout": str(recipe.layout)}


@dataclass(frozen=True)
class Step:
    """What there is to say of a step."""

    number: int  # from 1
    loss: float
    norm: float  # of the gradients before they were clipped
    rate: float
    saved: bool


def train(
    samples: Sequence[Sample],
    model: Model,
    encoders: Encoders,
    recipe: Recipe,
    weights: Mapping[str, nn.Parameter],
    course: Course,
    file: Path | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    pause: Callable[[], None] = lambda: None,
) -> State:
    """Train the weights in place, and give where that has got to.

    `file` holds the training: it is gone on with if it is there, written every `save_every` seconds, and at the end, whatever
    ends it. `pause` is called several times in a step, and may raise. LossError for a loss that is no number; ValueError if the
    file is of another training.
    """
    adam, random = optimiser(weights.values(), course.rate, course.decay), torch.Generator().manual_seed(course.seed)
    settings, step, losses = course.settings(recipe), 0, []
    if file is not None and file.exists():
        found = states.load(file)
        _check_settings(found, settings, file)
        states.restore(found, weights, adam, random)
        step, losses = found.step, list(found.losses)
    saved, before = time.monotonic(), random.get_state()
    try:
        while step < course.steps:
            before = random.get_state()
            adam.zero_grad()
            loss = _gradients(samples, model, encoders, recipe, course, step, random, pause)
            rate = course.rate * rate_factor(step, course.warm_up, course.cycle)
            norm = tame(weights.values(), course.largest_norm)
            set_rate(adam, rate)
            adam.step()
            losses.append(loss)
            step, before = step + 1, random.get_state()
            due = file is not None and time.monotonic() - saved >= course.save_every
            if due:
                _save(states.capture(step, weights, adam, before, losses, settings), file)
                saved = time.monotonic()
            on_step(Step(step, loss, norm, rate, due))
    finally:
        reached = states.capture(step, weights, adam, before, losses, settings)
        if file is not None:
            _save(reached, file)
    return reached


def _gradients(samples, model, encoders, recipe, course, step, random, pause) -> float:
    """Gradients of one step in the weights, and its loss; LossError if that is no number."""
    total, left = 0.0, course.batch
    while left:
        count, shown = min(left, course.at_once), []
        for _ in range(count):
            pause()
            sample = samples[int(torch.randint(len(samples), (), generator=random))]
            shown.append(training_example(sample, model, encoders, recipe, random, step))
        pause()
        loss = flow_loss(model, shown, recipe, random)
        if not torch.isfinite(loss):
            raise LossError(
                f"the loss of step {step + 1} is {float(loss.detach())}, so training stopped before it could spoil the weights; take a "
                "lower learning rate, or weights in bfloat16 instead of float16. The last good state is kept"
            )
        pause()
        (loss * (count / course.batch)).backward()
        total, left = total + float(loss.detach()) * count / course.batch, left - count
    return total


def _save(state: State, file: Path) -> None:
    """Only what can be gone on with: the file of before is better than weights that are no numbers."""
    if state.finite:
        states.save(state, file)


def _check_settings(found: State, settings: Mapping, file: Path) -> None:
    differing = sorted(name for name in {*settings, *found.settings} if settings.get(name) != found.settings.get(name))
    if differing:
        told = ", ".join(f"{name} was {found.settings.get(name)} and is {settings.get(name)}" for name in differing[:3])
        raise ValueError(f"{file} is of a training with other settings: {told}. Set them back, or begin another training")
