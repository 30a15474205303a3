"""The transformer of the small Lyra 2: the pack's own network at the released layout, narrow, from nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lyra_core.conditioning.framepack import LYRA2, PATCH
from lyra_core.conditioning.history import SLOT_CHANNELS
from lyra_core.models.learning import as_model
from lyra_core.models.lyra2 import Lyra2Model
from lyra_core.training import state
from lyra_core.training.contracts import Condition, Encoders, Example, Model
from lyra_core.training.losses import flow_loss
from lyra_core.training.optimisation import everything, set_rate, tame, trained
from lyra_core.training.recipe import Recipe
from lyra_core.training.sample import Sample
from lyra_core.training.self_augmentation import training_example

from . import going_on

CONFIG = {
    "framepack": str(LYRA2),
    "rank": 24,
    "model_type": "t2v",  # no CLIP: its one size that the host loads has 1.3 GB
    "in_dim": 36,
    "out_dim": 16,
    "dim": 192,
    "ffn_dim": 512,
    "freq_dim": 256,
    "text_dim": 32,
    "num_heads": 3,
    "num_layers": 5,
}
# the reference's, but: remembered pixels count three times, and the warped frame is left out in a part of the samples
RECIPE = Recipe(remembered_weight=3.0, warp_drop=0.3)
RATE, LARGEST_NORM = 1e-3, 1.0
EXAMPLES = 48  # that are kept at hand; making one takes as long as several steps
RENEWED = 4  # steps after which one of them is made anew
REPORTED = 10  # steps between two reports, and checkpoints

SEEN, MEMORY = 1.0, 2.0  # how loud content and correspondences begin, in queries and keys


def new(seed: int, config: dict = CONFIG) -> Lyra2Model:
    """The network with weights to begin from.

    Its attention begins by looking where correspondences point: queries and keys are one projection, and a token's code is
    the mean of its coordinates' sines. History is embedded as the noisy latents are, enlarged patches as the reference's
    training begins with them. Found by itself, that would take longer than all the rest.
    """
    torch.manual_seed(seed)
    network = Lyra2Model(**config, device="cpu", dtype=torch.float32, operations=torch.nn)
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv3d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for layer in (network.head.head, network.time_projection[1]):
            layer.weight.mul_(0.02)
        network.head.modulation.zero_()
        _share_patches(network)
        for block in network.blocks:
            block.modulation.zero_()[:, [2, 5]] = 1.0
            for layer in (block.cross_attn.o, block.cam_encoder):
                layer.weight.mul_(0.1)
            _follow_correspondences(block, network.dim)
    return network.requires_grad_(True)


def _share_patches(network: Lyra2Model) -> None:
    """Each segment's embedding from the usual one: every weight k times along time and both sides, and divided as often."""
    base = network.patch_embedding.weight  # (dim, 36, 1, 2, 2)
    base[:, :16] *= 0.5
    for segment, embedding in zip(network.layout.segments, network.clean_patch_embeddings, strict=True):
        wide = base.clone()
        for axis, times in zip((2, 3, 4), segment.window, strict=True):
            wide = wide.repeat_interleave(times, axis) / times
        embedding.weight.copy_(wide.flatten(1))
        embedding.bias.zero_()


def _follow_correspondences(block, dim: int) -> None:
    """The code of a token: the means over its pixels of sine and cosine, at one and two octaves, of x, y and slot."""
    first, second = block.buffer_encoder
    rank, inputs = first.weight.shape
    tokens = inputs // 4  # of each of the four functions: slots x (4 maps x 64 pixels) x 2 x 2 latents
    slots = tokens // (SLOT_CHANNELS * PATCH**2)
    rows = first.weight.mul_(0.05).unflatten(1, (4, slots, 4, SLOT_CHANNELS // 4 * PATCH**2))
    for row, (function, which) in enumerate((function, which) for function in range(4) for which in range(3)):
        if row < rank:
            rows[row, function, :, which] += 1 / SLOT_CHANNELS
    nn.init.orthogonal_(second.weight)
    second.weight.mul_(MEMORY * dim**0.5 / slots**0.5)
    nn.init.orthogonal_(block.self_attn.q.weight)
    block.self_attn.q.weight.mul_(SEEN)
    block.self_attn.k.weight.copy_(block.self_attn.q.weight)


# ---------------------------------------------------------------------------------------------------------- training


def train(
    path: Path,
    network: Lyra2Model,
    samples: Sequence[Sample],
    encoders: Encoders,
    steps: int,
    recipe: Recipe = RECIPE,
    seed: int = 0,
    batch: int = 2,
    examples: int = EXAMPLES,
    say: Callable[[str], None] = print,
) -> Lyra2Model:
    """The network after so many steps; goes on from the checkpoint at `path`, with examples made anew, if there is one.

    Examples are kept and used for several steps: one in RENEWED steps is replaced, by one that this network spoils itself
    where the recipe says so.
    """
    optimiser = torch.optim.AdamW(trained(network, everything).values(), lr=RATE, betas=(0.9, 0.98), weight_decay=1e-2)
    settings = {"seed": seed, "steps": steps, "batch": batch, "recipe": hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}
    model, first, losses = spoken(network), going_on.resume(path, network, optimiser, settings), []
    if first >= steps:
        return network
    kept: list[Example] = []
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        while len(kept) < examples:
            kept.append(_made(samples, model, encoders, recipe, generator, first // RENEWED + len(kept)))
        if step > first and step % RENEWED == 0:
            number = step // RENEWED
            kept[number % examples] = _made(samples, model, encoders, recipe, generator, number)
        chosen = torch.randperm(len(kept), generator=generator)[:batch].tolist()
        set_rate(optimiser, RATE * min(1.0, (step + 1) / 40) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps))))
        losses.append(_step(network, optimiser, [kept[i] for i in chosen], recipe, generator))
        if (step + 1) % REPORTED == 0 or step + 1 == steps:
            going_on.keep(path, network, optimiser, step + 1, settings)
            say(f"transformer {step + 1}/{steps}: loss {sum(losses) / len(losses):.4f}")
            losses = []
    return network


def put_back(path: Path, network: Lyra2Model) -> None:
    """The weights that a training has got to."""
    network.load_state_dict(state.load(path).weights)


def spoken(network: Lyra2Model) -> Model:
    """The network as training calls it, its products in bfloat16, which processors have units for."""
    plain = as_model(network)

    def velocity(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        with torch.autocast(network.head.head.weight.device.type, torch.bfloat16):
            return plain(noisy, timesteps, condition).float()

    return velocity


def _made(samples, model: Model, encoders: Encoders, recipe: Recipe, generator, number: int) -> Example:
    sample = samples[int(torch.randint(len(samples), (), generator=generator))]
    made = training_example(sample, model, encoders, recipe, generator, number)
    half = Condition(*(part.to(torch.bfloat16) for part in made.condition))
    return replace(made, condition=half)


def _step(network, optimiser, chosen: list[Example], recipe: Recipe, generator) -> float:
    whole = [replace(example, condition=Condition(*(part.float() for part in example.condition))) for example in chosen]
    loss = flow_loss(spoken(network), whole, recipe, generator)
    optimiser.zero_grad()
    loss.backward()
    tame(network.parameters(), LARGEST_NORM)
    optimiser.step()
    return float(loss.detach())
