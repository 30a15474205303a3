"""The scores of a world as pictures, one per chunk: what fits least beside what it should be, and how the chunks compare."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .consistency import Consistency, Worst
from .world import World, to_float

TILE, GAP, LINE = 416, 8, 18  # pixels: width of a picture, between pictures, of a line of text
PAPER, INK, FAINT, MARK = (24, 24, 26), (232, 232, 232), (110, 110, 116), (240, 150, 60)
LOUDER = 5  # times: differences are small
CHARTS = (  # title, what is drawn of a chunk's scores, the value at the top of the chart; None: the largest
    ("known pixels against the memory, dB", lambda s: s.psnr_fitted, 60.0),
    ("TSED at 2 px", lambda s: s.tsed and s.tsed[2.0], 1.0),
    ("cameras found again", lambda s: s.registered, 1.0),
    ("rotation error, degrees", lambda s: s.degrees, None),
    ("translation error, scene units", lambda s: s.distance, None),
    ("flicker", lambda s: s.flicker, None),
    ("drift of colours", lambda s: s.drift, None),
    ("PSNR of revisits, dB", lambda s: s.revisit_psnr, 60.0),
)


def draw(world: World, found: Consistency) -> Tensor:
    """(C, H, W, 3) in 0..1: all of one size."""
    tall = round(TILE * world.size[0] / world.size[1])
    comes_back = any(worst.back is not None for worst in found.worst)
    return torch.stack([_sheet(world, found, index, tall, comes_back) for index in range(len(found.chunks))])


def _sheet(world: World, found: Consistency, index: int, tall: int, comes_back: bool) -> Tensor:
    rows, charts = 1 + comes_back, 2 * (3 * LINE + 60)
    canvas = Image.new("RGB", (3 * TILE + 4 * GAP, LINE + GAP + rows * (tall + LINE + GAP) + charts + GAP), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    scores, worst = found.chunks[index], found.worst[index]
    pen.text((GAP, 4), f"chunk {index} of {len(found.chunks)}, frames {scores.frames[0]} to {scores.frames[-1]}", INK, font)
    top = LINE + GAP
    for pictures, titles in _rows(world, worst):
        for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            at = GAP + column * (TILE + GAP)
            canvas.paste(_image(picture).resize((TILE, tall), Image.LANCZOS), (at, top + LINE))
            pen.text((at, top), title, INK, font)
        top += tall + LINE + GAP
    top = canvas.height - charts
    width = (canvas.width - GAP) // 4 - GAP
    for number, (title, of, most) in enumerate(CHARTS):
        corner = GAP + number % 4 * (width + GAP), top + number // 4 * (charts // 2)
        _chart(pen, font, corner, width, title, [of(chunk) for chunk in found.chunks], index, most)
    return to_float(torch.from_numpy(np.asarray(canvas).copy()))


def _rows(world: World, worst: Worst) -> list[tuple[tuple[Tensor, ...], tuple[str, ...]]]:
    frame = to_float(world.frame(worst.frame))
    known = (worst.control != 0.5).any(-1, keepdim=True)
    off = torch.where(known, (frame - worst.control).abs() * LOUDER, 0.0)
    titles = (f"frame {worst.frame}, as it was known before", f"frame {worst.frame}", f"difference, {LOUDER} times as loud")
    rows = [((worst.control, frame, off), titles)]
    if worst.back is not None:
        first, back = (to_float(world.frame(number)) for number in (worst.first, worst.back))
        seen = ~world.invented(worst.first)[..., None]
        off = torch.where(seen, (first - back).abs() * LOUDER, 0.0)
        titles = (f"frame {worst.first}", f"frame {worst.back}, which comes back to it", titles[2])
        rows.append(((first, back, off), titles))
    return rows


def _chart(pen, font, corner: tuple[int, int], width: int, title: str, values: list, index: int, most: float | None) -> None:
    """A bar per chunk, the one at hand marked, its number beside the title."""
    (left, top), height = corner, 60
    here = values[index]
    pen.text((left, top), title, FAINT if here is None else INK, font)
    pen.text((left, top + LINE), "-" if here is None else f"{here:.4g}", FAINT if here is None else MARK, font)
    there = [value for value in values if value is not None]
    scale = max(most or 0.0, *there, 1e-9) if there else 1.0
    base, step = top + 2 * LINE + height, width / len(values)
    pen.line([(left, base), (left + width, base)], fill=FAINT)
    for number, value in enumerate(values):
        if value is not None:
            reach = base - max(1, round(height * min(max(value / scale, 0), 1)))
            right = left + max((number + 1) * step - 2, number * step + 1)
            pen.rectangle([left + number * step, reach, right, base], fill=MARK if number == index else FAINT)


def _image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy())
