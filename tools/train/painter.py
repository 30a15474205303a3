"""The transformer of the small Lyra 2: the pack's own network at the released layout, narrow, from nothing."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lyra_core.conditioning.framepack import LYRA2, PATCH, Segment
from lyra_core.conditioning.history import SLOT_CHANNELS
from lyra_core.conditioning.schedules import TRAIN_STEPS
from lyra_core.models.learning import differentiable
from lyra_core.models.lyra2 import HistoryTokens, Lyra2Model, correspondence_tokens, octaves
from lyra_core.training import state
from lyra_core.training.contracts import Condition, Encoders, Model
from lyra_core.training.losses import timestep_table, weight_table, weighted_error
from lyra_core.training.optimisation import everything, tamed, trained
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import Sample

from . import going_on, pool, recording
from .sights import Makers

CONFIG = {
    "framepack": str(LYRA2),
    "rank": 20,
    "model_type": "t2v",  # no CLIP: its one size that the host loads has 1.3 GB
    "in_dim": 36,
    "out_dim": 16,
    "dim": 192,
    "ffn_dim": 512,
    "freq_dim": 256,
    "text_dim": 32,
    "num_heads": 6,
    "num_layers": 6,
}
# the reference's, but: remembered pixels count three times, and the warped frame is left out in a part of the samples; a tenth of
# them is spoilt instead of a third, because those take longest to make; noise levels suit latents of 8x12 better
RECIPE = Recipe(remembered_weight=3.0, warp_drop=0.3, self_augmented=0.5, shift=3.0)
RATE, LARGEST_NORM, WARM_UP = 1e-3, 1.0, 100
AVERAGE = 0.999  # of the mean of the weights that stays in a step; less at first
EXAMPLES = 48  # that are kept at hand; making one takes as long as several steps
RENEWED = 4  # steps after which one of them is made anew
TOGETHER = 8  # examples that are made at once
SPENT = 0.35  # of the time at most that goes into examples, if the clock ends the training
REPORTED, SAVED = 20, 75.0  # steps between two reports; seconds between two checkpoints

SEEN, MEMORY = 1.0, 2.0  # how loud content and correspondences begin, in queries and keys
BRANCH, COPIED = 0.1, 0.12  # how loud a block's branches begin, and what attention takes from other tokens
NOISY, WARPED = 0.9, 0.6  # of the noisy latents and of the warped frame's, what the velocity begins as
TURNED = 1.0  # radians that two tokens' rotations may differ by where correspondences are compared
REACH = (45, 4, 6)  # tokens' distances along time, rows and columns


def new(seed: int, config: dict = CONFIG) -> Lyra2Model:
    """The network with weights to begin from.

    What it paints begins as the warped frame: noisy latents and the frame's go through the blocks side by side, and the head takes
    the difference, which is about the velocity from there. Its attention begins by looking where correspondences point: queries
    and keys are one projection, a token's code is the mean of its coordinates' sines, and it lies where rotations hardly turn it.
    What attention brings is what the other token shows, in the frame's place. History is embedded as the noisy latents are,
    enlarged patches as the reference's training begins with them. Found by itself, that would take longer than all the rest.
    """
    torch.manual_seed(seed)
    network = Lyra2Model(**config, device="cpu", dtype=torch.float32, operations=torch.nn)
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv3d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    with torch.no_grad():
        network.time_projection[1].weight.mul_(0.02)
        network.head.modulation.zero_()
        _begin_with_the_warped_frame(network)
        _share_patches(network)
        for block in network.blocks:
            block.modulation.zero_()[:, [2, 5]] = 1.0
            for layer in (block.cross_attn.o, block.cam_encoder):
                layer.weight.mul_(0.1)
            block.ffn[2].weight.mul_(BRANCH)
            _follow_correspondences(block, network)
    return network.requires_grad_(True)


def _begin_with_the_warped_frame(network: Lyra2Model) -> None:
    """A token holds its noisy latents, then those that are shown with them, as far as there is room; the head takes one less the other."""
    embedding, head = network.patch_embedding.weight, network.head.head.weight
    channels = network.out_dim
    head.mul_(0.02)
    room = min(2 * channels * PATCH**2, network.dim * 2 // 3)  # some of a narrow network's channels are left to it
    for which, (first, share) in enumerate(((0, NOISY), (network.in_dim - channels, -WARPED))):
        for place in range(room // 2):
            channel, (row, column) = place // PATCH**2, divmod(place % PATCH**2, PATCH)
            token = which * (room // 2) + place
            embedding[token] = 0.0
            embedding[token, first + channel, 0, row, column] = 1.0
            head[(row * PATCH + column) * channels + channel, token] = share


def _share_patches(network: Lyra2Model) -> None:
    """Each segment's embedding from the usual one: every weight k times along time and both sides, and divided as often."""
    base = network.patch_embedding.weight  # (dim, 36, 1, 2, 2)
    for segment, embedding in zip(network.layout.segments, network.clean_patch_embeddings, strict=True):
        wide = base.clone()
        for axis, times in zip((2, 3, 4), segment.window, strict=True):
            wide = wide.repeat_interleave(times, axis) / times
        embedding.weight.copy_(wide.flatten(1))
        embedding.bias.zero_()


def _follow_correspondences(block, network: Lyra2Model) -> None:
    """The code of a token: the means over its pixels of sine and cosine, at one and two octaves, of x, y and slot."""
    first, second = block.buffer_encoder
    rank, inputs = first.weight.shape
    tokens = inputs // 4  # of each of the four functions: slots x (4 maps x 64 pixels) x 2 x 2 latents
    slots = tokens // (SLOT_CHANNELS * PATCH**2)
    rows = first.weight.mul_(0.05).unflatten(1, (4, slots, 4, SLOT_CHANNELS // 4 * PATCH**2))
    for row, (function, which) in enumerate((function, which) for function in range(4) for which in range(3)):
        if row < rank:
            rows[row, function, :, which] += 1 / SLOT_CHANNELS
    attention, dim, heads = block.self_attn, network.dim, block.self_attn.num_heads
    nn.init.orthogonal_(attention.q.weight)
    steady = _hardly_turned(attention.head_dim)
    code = torch.zeros(heads, attention.head_dim, rank)
    for head in range(heads):
        code[head, steady] = nn.init.orthogonal_(torch.empty(len(steady), rank))
    # before the projection, so that after it the code is in those places of each head
    second.weight.copy_(attention.q.weight.T @ code.flatten(0, 1))
    second.weight.mul_(MEMORY * dim**0.5 / slots**0.5 / heads**0.5)
    attention.q.weight.mul_(SEEN)
    attention.k.weight.copy_(attention.q.weight)
    nn.init.orthogonal_(attention.v.weight)
    attention.o.weight.copy_(attention.v.weight.T * COPIED)


def _hardly_turned(width: int) -> list[int]:
    """Places of a head of this width that rotations leave nearly as they are, between any two tokens."""
    axes = (width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))
    turns = [10000 ** (-pair / (axis // 2)) * reach for axis, reach in zip(axes, REACH, strict=True) for pair in range(axis // 2)]
    return [2 * pair + part for pair, turn in enumerate(turns) if turn < TURNED for part in (0, 1)]


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Course:
    """How long is learned, and from how much. With `minutes` the rate falls by the clock, and the clock ends the training."""

    steps: int
    batch: int = 2
    examples: int = EXAMPLES  # that are kept at hand at most
    begin: int = EXAMPLES  # of them before the first step
    minutes: float | None = None
    rate: float = RATE
    seed: int = 0

    def settings(self, recipe: Recipe) -> dict:
        """What must be the same for a training to go on."""
        told = {"seed": self.seed, "batch": self.batch, "recipe": hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}
        return told | ({"minutes": self.minutes} if self.minutes else {"steps": self.steps})


def train(
    path: Path,
    network: Lyra2Model,
    makers: Makers,
    samples: Sequence[Sample],
    encoders: Encoders,
    course: Course,
    recipe: Recipe = RECIPE,
    say: Callable[[str], None] = print,
    kept: Callable[[Lyra2Model, int], None] = lambda network, step: None,
) -> Lyra2Model:
    """The network, on its device, with the mean of the weights that it had in its last steps.

    Goes on from the checkpoint at `path`, with examples made anew, if there is one. `samples` are those that `makers` look at,
    `prepared`. Examples are kept and used for several steps, then replaced by others, which this network spoils itself
    where the recipe says so. `kept` is told of every checkpoint. ValueError if the loss is no number any more.
    """
    began, learner, settings = time.monotonic(), Learner(network, recipe, course), course.settings(recipe)
    first, done = learner.resume(path, settings)
    if max(first / course.steps, done) >= 1:
        return learner.averaged()
    makers.next = first // RENEWED if not makers.processes else makers.next
    store = Store(makers, samples, encoders, spoken(network), recipe, course, network.head.head.weight.device)
    store.fill()
    say(f"{store.examples.count} examples after {time.monotonic() - began:.0f} s")
    if learner.prepare(store.examples):
        say("a step is recorded")
    _steps(path, learner, store, first, going_on.Progress(course.steps, course.minutes, done), settings, say, kept)
    return learner.averaged()


def _steps(
    path: Path, learner: Learner, store: Store, first: int, progress: going_on.Progress, settings: dict, say, kept
) -> None:
    course, step, losses = learner.course, first, []
    saved, done, ended = time.monotonic(), progress(first), False
    while not ended:
        store.renew(step - first)
        rate = course.rate * min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        losses.append(learner.step(store.examples, step, rate))
        step += 1
        done = progress(step)  # asked once a step: the clock goes on
        ended = done >= 1 or step == course.steps
        if ended or step % REPORTED == 0:
            mean, losses = float(torch.stack(losses).mean()), []  # the only place where the device is waited for
            if not math.isfinite(mean):
                raise ValueError(f"the loss at step {step} is {mean}; {path}, if it is there, is of before")
            say(f"transformer {step}: loss {mean:.4f}, {store.makers.next} examples so far, {100 * done:.0f} %")
        if ended or time.monotonic() - saved > SAVED:
            kept(learner.averaged(), step)
            learner.keep(path, step, settings, done)
            saved = time.monotonic()


class Store:
    """The examples that a training chooses from, and how they are replaced."""

    def __init__(self, makers: Makers, samples, encoders: Encoders, model: Model, recipe: Recipe, course: Course, device):
        self.makers, self.model, self.recipe, self.course = makers, model, recipe, course
        self.samples = [pool.on(device, sample) for sample in samples]
        self.encoders = pool.encoders_on(device, encoders.codec, encoders.look, encoders.tell)
        self.examples, self.began, self.spent = pool.Pool(course.examples), time.monotonic(), 0.0

    def fill(self) -> None:
        wanted = min(self.course.begin, self.course.examples)
        while self.examples.count < wanted:
            self._more(min(TOGETHER, wanted - self.examples.count))
        self.began, self.spent = time.monotonic(), 0.0

    def renew(self, step: int) -> None:
        """After so many steps: one for every RENEWED steps, or all that geometry is there for, while that leaves time to learn."""
        if self.course.minutes is None:
            if step and step % (RENEWED * TOGETHER) == 0:
                self._more(TOGETHER)
        elif self.makers.ready(TOGETHER) and self.spent <= SPENT * (time.monotonic() - self.began):
            self._more(TOGETHER)

    def _more(self, count: int) -> None:
        began = time.monotonic()
        jobs = [self.makers.take() for _ in range(count)]
        for example in pool.finished(jobs, self.samples, self.model, self.encoders, self.recipe, self.course.seed):
            self.examples.put(example)
        self.spent += time.monotonic() - began


class Learner:
    """A network, its optimiser and the mean of its weights. On CUDA a step is recorded once and played from then on."""

    def __init__(self, network: Lyra2Model, recipe: Recipe, course: Course):
        self.network, self.recipe, self.course = network, recipe, course
        self.device = network.head.head.weight.device
        self.weights = list(trained(network, everything).values())
        self.optimiser = recording.optimiser(self.weights, course.rate, betas=(0.9, 0.98), weight_decay=1e-2)
        self.average = [weight.detach().clone() for weight in self.weights]
        self.times = timestep_table(recipe.shift).to(self.device)
        self.worth = weight_table(recipe.shift).to(self.device)
        self.recording = recording.Recording(self._learn, self.weights, self.optimiser)

    def prepare(self, examples: pool.Pool) -> bool:
        """Record a step if that can be done here; weights and moments stay as they are."""
        return self.recording.ready(*self._drawn(examples, 0))

    def step(self, examples: pool.Pool, step: int, rate: float) -> Tensor:
        """Step number `step`, which says what is drawn; its loss, a scalar on the device."""
        recording.set_rate(self.optimiser, rate)
        loss = self.recording(*self._drawn(examples, step))
        torch._foreach_lerp_(self.average, [weight.detach() for weight in self.weights], 1 - min(AVERAGE, (1 + step) / (10 + step)))
        return loss

    def _drawn(self, examples: pool.Pool, step: int) -> tuple[Tensor, ...]:
        """What `_learn` takes, of this step."""
        random = torch.Generator(self.device).manual_seed(self.course.seed * 1_000_003 + step)
        chosen = torch.rand(examples.count, generator=random, device=self.device).argsort()
        if len(chosen) < self.course.batch:
            chosen = chosen.repeat(-(-self.course.batch // len(chosen)))
        target, remembered, condition = examples.batch(chosen[: self.course.batch])
        # one in each of as many equal parts of the normal distribution: the same levels on average, with less chance in them
        share = (torch.arange(len(target), device=self.device) + torch.rand(len(target), generator=random, device=self.device)) / len(target)
        drawn = torch.sigmoid(torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))) * TRAIN_STEPS
        drawn = drawn.long().clamp_max(TRAIN_STEPS - 1)
        noise = torch.randn(target.shape, generator=random, device=self.device)
        return (target, remembered, noise, self.times[drawn], self.worth[drawn], *condition)

    def _learn(self, target: Tensor, remembered: Tensor, noise: Tensor, times: Tensor, worth: Tensor, *condition: Tensor) -> Tensor:
        sigmas = (times / TRAIN_STEPS).view(-1, 1, 1, 1, 1)
        velocity = spoken(self.network)(sigmas * noise + (1 - sigmas) * target, times, Condition(*condition))
        loss = weighted_error(velocity, noise - target, worth, remembered, self.recipe)
        self.optimiser.zero_grad()
        loss.backward()
        tamed(self.weights, LARGEST_NORM)
        self.optimiser.step()
        return loss.detach()

    # ------------------------------------------------------------------------------------------------------- kept

    def keep(self, path: Path, step: int, settings: dict, done: float) -> None:
        """The state after so many steps, `done` of all, and the mean of the weights beside it."""
        names = [name for name, _weight in self.network.named_parameters()]
        mean = {name: weight.cpu().contiguous() for name, weight in zip(names, self.average, strict=True)}
        state.save(state.State(step, mean, {}, torch.Generator().get_state(), (), settings), _mean(path, step))
        going_on.keep(path, self.network, self.optimiser, step, settings, done)
        for old in path.parent.glob(f"{path.stem}.mean-*"):
            if old != _mean(path, step):
                old.unlink()

    def resume(self, path: Path, settings: dict) -> tuple[int, float]:
        """Put a kept state back; how many steps it had made, and how much was done."""
        step, done = going_on.resume(path, self.network, self.optimiser, settings)
        if step:
            mean = state.load(_mean(path, step)).weights
            for (name, _weight), kept in zip(self.network.named_parameters(), self.average, strict=True):
                kept.copy_(mean[name])
        return step, done

    def averaged(self) -> Lyra2Model:
        """The network with the mean of its weights."""
        network = copy.deepcopy(self.network)
        with torch.no_grad():
            for weight, mean in zip(network.parameters(), self.average, strict=True):
                weight.copy_(mean)
        return network


def _mean(path: Path, step: int) -> Path:
    return path.with_name(f"{path.stem}.mean-{step}{path.suffix}")


def reached(path: Path) -> int:
    """How many steps a training has made."""
    return state.load(path).step if path.exists() else 0


def put_back(path: Path, network: Lyra2Model) -> None:
    """The mean of the weights that a training has got to."""
    network.load_state_dict(state.load(_mean(path, state.load(path).step)).weights)


def spoken(network: Lyra2Model) -> Model:
    """The network as training calls it, on its own device, its products in bfloat16, which processors have units for."""

    def velocity(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        where = network.head.head.weight.device
        noisy, shown = noisy.to(where), Condition(*(part.to(where) for part in condition))
        with torch.autocast(where.type, torch.bfloat16), differentiable():
            painted = torch.cat([noisy, torch.ones_like(noisy[:, :4]), shown.warped.to(noisy)], 1)
            history = told(network, shown)
            return network(painted, timesteps.to(where), shown.text.to(noisy), history=history, transformer_options={}).float()

    return velocity


def told(network: Lyra2Model, shown: Condition) -> HistoryTokens:
    """What `network.encode` makes of a batch, in few large products instead of many that fit a small card."""
    latents = shown.history.float()
    height, width = latents.shape[-2:]
    tokens = network.embed_history(torch.cat([latents, torch.ones_like(latents[:, :4]), latents], 1))
    positions, rope = places(network, height, width, shown.warped.shape[2], latents.device)
    return HistoryTokens(tokens, positions, rope, network.ray_tokens(shown.rays), _codes(network, shown.correspondences))


def places(network: Lyra2Model, height: int, width: int, new: int, device) -> tuple[Tensor, Tensor]:
    """Positions of tokens and their rotations; made once for each size."""
    kept = network.__dict__.setdefault("_places", {})
    key = (height, width, new, str(device))
    if key not in kept:
        positions = network.positions(height, width, new, device)
        kept[key] = positions, network.rope(positions)
    return kept[key]


def _codes(network: Lyra2Model, maps: Tensor) -> Tensor:
    """(blocks, B, L, rank) of correspondences (B, C, T, h, w): latents of a kind together, and the blocks' matrices as one."""
    height, width = maps.shape[-2:]
    weights = torch.cat([block.buffer_encoder[0].weight for block in network.blocks])
    parts, at = [], 0
    new = maps.shape[2] - network.layout.slots("spatial")
    for segment in (*network.layout.segments, Segment(new, "spatial", 1)):
        if segment.source == "temporal":
            parts.append(maps.new_zeros(len(maps), math.prod(segment.grid(height, width)), len(weights), dtype=torch.bfloat16))
            continue
        some = maps[:, :, at : at + segment.slots].movedim(2, 1).flatten(0, 1)
        at += segment.slots
        code = F.linear(octaves(correspondence_tokens(some, segment)), weights.to(some.dtype))
        parts.append(code.unflatten(0, (len(maps), -1)).flatten(1, 2).to(torch.bfloat16))
    return torch.cat(parts, 1).unflatten(2, (len(network.blocks), -1)).movedim(2, 0)
