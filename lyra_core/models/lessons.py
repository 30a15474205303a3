"""A training as a whole, with the host's networks: from a folder of videos to what the stock LoRA loader takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..training import loop, sets
from ..training.contracts import Encoders, Model
from ..training.examples import evaluating, example, prepared
from ..training.loop import Course, Step
from ..training.optimisation import Filter
from ..training.painting import paint
from ..training.recipe import Recipe
from ..training.sample import Sample, mirrored
from ..training.state import State
from ..world.world import to_uint8
from . import adapters, generation, planner, streaming_vae
from .devices import geometry_device, this_card
from .learning import HostCodec, padded

Pause = Callable[[], None]
FILE = "training.safetensors"  # of a training, in its folder


@dataclass(frozen=True)
class Networks:
    """All that a training needs of the host."""

    model: ModelPatcher
    clip: comfy.sd.CLIP
    clip_vision: comfy.clip_vision.ClipVisionModel | None  # None only for a model without image embedding
    vae: comfy.sd.VAE


@dataclass(frozen=True)
class Lesson:
    """What is trained, and how it runs; what is learned from and how fast are Recipe's and Course's."""

    chosen: Filter
    rank: int | None  # of a LoRA; None: the weights themselves
    offload: bool = False
    checkpointed: bool = True
    half: bool = False
    look_every: int = 0  # steps from one painted preview to the next; 0: none
    look_steps: int = 8


@dataclass(frozen=True)
class Learned:
    lora: dict[str, Tensor]
    state: State


def recipe_for(model: ModelPatcher, **changes) -> Recipe:
    """The reference's recipe with the layout of a model."""
    return Recipe(layout=model.model.diffusion_model.layout, **changes)


@torch.inference_mode(False)
def teach(
    folder: Path,
    networks: Networks,
    recipe: Recipe,
    course: Course,
    lesson: Lesson,
    file: Path | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_picture: Callable[[int, Tensor], None] = lambda step, picture: None,
    on_note: Callable[[str], None] = lambda note: None,
    pause: Pause = lambda: None,
) -> Learned:
    """Train on a set, going on with `file` if it is there; `on_picture(step, (H, 2 W, 3) uint8)` gets what the network paints now.

    ValueError and FileError by name for what does not fit; LossError for a loss that is no number.
    """
    samples = sets.read(folder)
    if recipe.self_augmented and recipe.photo_only < 1:  # one chunk is spoilt, the next one goes on from it
        needed = 1 + 2 * recipe.chunk
        if short := [sample.name for sample in samples if len(sample) < needed]:
            on_note(f"{', '.join(short[:5])}: shorter than two chunks, so walked there and back")
        samples = [mirrored(sample, needed) for sample in samples]
    trainee = _trainee(networks.model, lesson, course.seed)
    if networks.clip_vision is None and trainee.network.img_emb is not None:
        raise ValueError("this model looks at the newest frame through CLIP; connect or name clip_vision_h")
    on_note(estimate(trainee, samples[0].size, recipe, course, lesson))
    texts = _texts(networks.clip, {"", *(text for sample in samples for text in sample.captions.values())})
    streaming_vae.load(networks.vae, tuple(side // 8 for side in samples[0].size))
    encoders = Encoders(HostCodec(networks.vae), _eyes(networks.clip_vision), padded(lambda caption: texts[caption]))
    samples = [_prepared(folder, sample, encoders, recipe, pause) for sample in samples]
    beside = [encoder.patcher for encoder in (networks.vae, networks.clip_vision) if encoder is not None]
    needed = planner.teaching(trainee.network, samples[0].size, 2).working * planner.GIB
    with adapters.in_place(trainee, beside, needed, lesson.offload, lesson.checkpointed, lesson.half, pause) as model:
        encoders = replace(encoders, geometry=geometry_device(samples[0].size, make_room=False))

        def stepped(step: Step) -> None:
            if lesson.look_every and step.number % lesson.look_every == 0:
                on_picture(step.number, _painted(samples[0], model, encoders, recipe, lesson.look_steps, pause))
            on_step(step)

        state = loop.train(samples, model, encoders, recipe, trainee.weights, course, file, stepped, pause)
    return Learned(trainee.lora(), state)


def _trainee(model: ModelPatcher, lesson: Lesson, seed: int) -> adapters.Trainee:
    if lesson.rank is None:
        return adapters.of_all_weights(model, lesson.chosen)
    return adapters.with_adapters(model, lesson.chosen, lesson.rank, seed)


@torch.no_grad()
def _texts(clip: comfy.sd.CLIP, captions: set[str]) -> dict[str, Tensor]:
    """(tokens, width) of each caption, all at once so that the text encoder may go."""
    return {text: clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0][0].float().cpu() for text in sorted(captions)}


def _eyes(clip_vision: comfy.clip_vision.ClipVisionModel | None) -> Callable[[Tensor], Tensor]:
    if clip_vision is None:
        return lambda picture: torch.zeros(1, 1)

    @torch.no_grad()
    def look(picture: Tensor) -> Tensor:
        return generation.look_at(clip_vision, picture)[0].float().cpu()

    return look


def _prepared(folder: Path, sample: Sample, encoders: Encoders, recipe: Recipe, pause: Pause) -> Sample:
    """The sample with its latents, which are kept beside it."""
    pause()
    ready = prepared(sample, encoders.codec, recipe)
    if ready is not sample:
        sets.keep_latents(folder, ready)
    return ready


def _painted(sample: Sample, model: Model, encoders: Encoders, recipe: Recipe, steps: int, pause: Pause) -> Tensor:
    """(H, 2 W, 3) uint8: the last frame of the first chunk as it is and as the network paints it now."""
    still, first = evaluating(recipe), sample.windows(recipe.chunk, 1)[0]
    shown = example(sample, first, encoders, still, torch.Generator().manual_seed(0))
    noise = torch.randn(shown.target.shape, generator=torch.Generator().manual_seed(1))
    latents = paint(model, shown.condition, noise, steps, pause)
    frames = encoders.codec.decode(latents, sample.latents.stream[:, : recipe.still])
    return to_uint8(torch.cat([sample.picture(first.frames[-1]), frames[-1]], 1) * 0.5 + 0.5)


def estimate(trainee: adapters.Trainee, size: tuple[int, int], recipe: Recipe, course: Course, lesson: Lesson) -> str:
    """Memory and time of a training, counted before it begins."""
    found = planner.teaching(
        trainee.network,
        size,
        2 if lesson.half or trainee.patcher.model.get_dtype_inference() in (torch.bfloat16, torch.float16) else 4,
        sum(weight.numel() for weight in trainee.weights.values()),
        trainee.patcher.model_size(),
        lesson.checkpointed,
    )
    return "\n".join(found.lines(this_card(), course.steps * course.batch, recipe.self_augmented))


def summary(state: State) -> str:
    """Where a training has got to, in a line."""
    if not state.losses:
        return "nothing was learned yet"
    part = max(1, len(state.losses) // 10)
    first, last = (sum(some) / len(some) for some in (state.losses[:part], state.losses[-part:]))
    return f"{state.step} steps; loss {first:.4f} over the first {part}, {last:.4f} over the last {part}"
