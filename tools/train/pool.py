"""Examples by the hundred on one device: jobs from geometry made whole by networks, several at once, and kept as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lyra_core.conditioning.history import Guides
from lyra_core.training.contracts import Condition, Encoders, Example, Model
from lyra_core.training.examples import Sight, completed, warped_views
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import Sample
from lyra_core.training.self_augmentation import one_step_each, painted_over, spoiling_timestep

from .sights import Job


def on(device, sample: Sample) -> Sample:
    """A sample with all that it holds there."""
    latents = sample.latents
    if latents is not None:
        latents = replace(
            latents,
            stream=latents.stream.to(device),
            alone={frame: latent.to(device) for frame, latent in latents.alone.items()},
        )
    depths = {frame: depth.to(device) for frame, depth in sample.depths.items()}
    return replace(sample, frames=sample.frames.to(device), cameras=sample.cameras.to(device), depths=depths, latents=latents)


def encoders_on(device, codec, look, tell) -> Encoders:
    """Encoders whose pictures and words are there too; every caption is read once."""
    told = cache(lambda caption: tell(caption).to(device))
    return Encoders(codec, lambda picture: look(picture).to(device), told)


@torch.no_grad()
def finished(
    jobs: Sequence[Job], samples: Sequence[Sample], model: Model, encoders: Encoders, recipe: Recipe, seed: int
) -> list[Example]:
    """The examples of jobs, on the device of the samples, which are `prepared`. Each follows from its number and the model."""
    device = samples[0].latents.stream.device
    random = [torch.Generator().manual_seed(seed * 1_000_003 + job.number + 500_000) for job in jobs]
    sights = [_there(device, job.sights[0]) for job in jobs]
    warped = encoders.codec.encode_each(torch.stack([torch.cat([sight.warped[:1], sight.warped]) for sight in sights]))[:, :, 1:]
    made = [
        completed(samples[job.film], sight, encoders, recipe, generator, warped=latents)
        for job, sight, generator, latents in zip(jobs, sights, random, warped, strict=True)
    ]
    places = [place for place, job in enumerate(jobs) if job.kind == "spoilt"]
    if not places:
        return made
    times = [spoiling_timestep(recipe, random[place]) for place in places]
    noise = torch.stack([torch.randn(made[place].target.shape, generator=random[place]) for place in places])
    guesses = one_step_each(model, [made[place] for place in places], times, noise)
    for place, guess in zip(places, guesses, strict=True):
        job = jobs[place]
        spoilt, history = painted_over(samples[job.film], job.sights[0].window, guess, encoders, recipe)
        after = _there(device, job.sights[1])
        if bool((after.warped != -1).any()):  # it was not left out
            after = replace(after, warped=warped_views(spoilt, after.window, recipe)[0])
        made[place] = completed(spoilt, after, encoders, recipe, random[place], history=history)
    return made


def _there(device, sight: Sight) -> Sight:
    guides = Guides(*(part.to(device, torch.bfloat16) for part in sight.guides))
    return replace(sight, guides=guides, warped=sight.warped.to(device).float(), remembered=sight.remembered.to(device))


class Pool:
    """Up to so many examples on a device, the oldest replaced first."""

    def __init__(self, capacity: int):
        self.capacity, self.count, self.at = capacity, 0, 0
        self.parts: list[Tensor] = []

    def put(self, example: Example) -> None:
        parts = [example.target, example.remembered, *example.condition]
        if not self.parts:
            kinds = [torch.float32, torch.float32, *[torch.bfloat16] * len(example.condition)]
            self.parts = [
                torch.empty(self.capacity, *part.shape, dtype=kind, device=part.device)
                for part, kind in zip(parts, kinds, strict=True)
            ]
        for kept, part in zip(self.parts, parts, strict=True):
            kept[self.at] = part
        self.at = (self.at + 1) % self.capacity
        self.count = min(self.count + 1, self.capacity)

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """Targets, shares of what is remembered, and conditions of examples by number (B,)."""
        target, remembered, *condition = (part.index_select(0, chosen) for part in self.parts)
        return target, remembered, Condition(*condition)
