"""What the small Lyra 2 must be able to do before it is shipped, each on scenes that it has not learned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

import torch
from comfy.ldm.wan.vae import WanVAE

from lyra_core.metrics.pictures import psnr
from lyra_core.training.contracts import Encoders, Model
from lyra_core.training.recipe import Recipe

from . import films, scoring
from .codec import TrainingCodec

CODEC, BELOW_PREVIEW, RETRIEVAL = 26.0, 1.0, 3.0  # dB
LONG = 10  # chunks


@dataclass(frozen=True)
class Gate:
    """One line: what was found, what was asked for, and whether that is met."""

    what: str
    found: str
    asked: str
    met: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.found} ({self.asked}): {'met' if self.met else 'MISSED'}"


def codec(network: WanVAE, recipe: Recipe, count: int = 16, size: tuple[int, int] = films.SIZE, frames: int = 33) -> Gate:
    coder, found = TrainingCodec(network), []
    for number in range(count):
        film = films.film(films.HELD_OUT + number, recipe, 1, size)
        true = film.pictures(range(frames))
        found.append(psnr(coder.decode(coder.encode(true)).clamp(-1, 1) * 0.5 + 0.5, true * 0.5 + 0.5))
    return Gate(f"codec, {count} scenes, dB", scoring.told(found), f"at least {CODEC:g}", mean(found) >= CODEC)


def painter(
    model: Model,
    encoders: Encoders,
    recipe: Recipe,
    count: int = 16,
    size: tuple[int, int] = films.SIZE,
    steps: int = scoring.SAMPLING,
) -> Iterator[Gate]:
    """All that the transformer must be able to do, dearest last."""
    kept = films.held_out(count, recipe, size=size)
    yield _seen(model, encoders, recipe, kept, steps)
    yield _retrieval(model, encoders, recipe, kept, steps)
    walk = scoring.walked(model, encoders, films.held_out(1, recipe, LONG, size)[0], recipe, 0, steps)
    finite = bool(torch.isfinite(walk).all())
    yield Gate(f"{LONG} chunks in a row", "finite" if finite else "not finite", "finite", finite)


def _seen(model, encoders, recipe, kept, steps) -> Gate:
    """Beside it the same for the preview as the codec gives it back, which is all that any transformer could reach."""
    below, through = [], []
    for number, film in enumerate(kept):
        window = film.windows(recipe.chunk, 1)[0]
        seen, true = scoring.parts(film, window, recipe).seen, scoring.truth(film, window)
        if int(seen.sum()) >= scoring.FEWEST:
            made = psnr(scoring.painted(model, encoders, film, window, recipe, number, steps), true, seen)
            preview = scoring.previewed(film, window)
            coded = scoring.coded(preview, film, encoders.codec, recipe)
            below.append(psnr(preview, true, seen) - made)
            through.append(psnr(coded, true, seen) - made)
    what = f"a chunk's seen pixels under the geometry preview, {len(below)} scenes, dB"
    found = f"{scoring.told(below)}; {scoring.told(through)} if the preview goes through the codec too"
    return Gate(what, found, f"at most {BELOW_PREVIEW:g}", bool(below) and mean(below) <= BELOW_PREVIEW)


def _retrieval(model, encoders, recipe, kept, steps) -> Gate:
    on, off = [], []
    for number, film in enumerate(kept):
        window = film.windows(recipe.chunk, recipe.windows)[-1]
        remembered, true = scoring.parts(film, window, recipe).remembered, scoring.truth(film, window)
        if int(remembered.sum()) < scoring.FEWEST:
            continue
        for found, shown in ((on, film), (off, scoring.forgetful(film, window))):
            found.append(psnr(scoring.painted(model, encoders, shown, window, recipe, number, steps), true, remembered))
    apart = len(on) > 1 and mean(on) - scoring.error(on) > mean(off) + scoring.error(off)
    gain = mean(on) - mean(off) if on else float("nan")
    told = f"{gain:.2f}: {scoring.told(on)} with, {scoring.told(off)} without"
    asked = f"at least {RETRIEVAL:g}, standard errors apart"
    return Gate(f"retrieval on remembered pixels, {len(on)} scenes, dB", told, asked, apart and gain >= RETRIEVAL)
