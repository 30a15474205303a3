"""FramePack layouts: which past latents the transformer sees, and how coarsely. Ints and fractions only, no tensors.

The history in front of the latents to generate is a row of slots. Runs of slots form segments; a segment of kernel k
is cut into patches k times larger than the usual (1, 2, 2) latents, so that old frames cost few tokens. Temporal
slots hold the anchor (the first latent) and the latest latents in order of time; spatial slots hold the frames
retrieved from memory, each encoded alone, and are never packed along time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

LATENT_FRAMES = 4  # frames per latent of the video VAE, after the first
PATCH = 2  # latent rows and columns per token of kernel 1

Source = Literal["temporal", "spatial"]
_LETTERS = {"temporal": "k", "spatial": "s"}


@dataclass(frozen=True)
class Segment:
    """A run of history slots that are cut into patches of one size."""

    slots: int
    source: Source
    kernel: int

    @property
    def window(self) -> tuple[int, int, int]:
        """How many kernel-1 tokens (time, rows, columns) one token of this segment stands for."""
        return (self.kernel if self.source == "temporal" else 1, self.kernel, self.kernel)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents (time, rows, columns) in one token."""
        return (self.window[0], PATCH * self.kernel, PATCH * self.kernel)

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Tokens (time, rows, columns) for latents of this height and width; a patch that sticks out counts whole."""
        extent = (self.slots, height, width)
        return tuple(-(-length // step) for length, step in zip(extent, self.patch, strict=True))


@dataclass(frozen=True)
class FramePackLayout:
    """The history's segments in order, and the number of latents generated after them."""

    segments: tuple[Segment, ...]
    new_latents: int

    @classmethod
    def parse(cls, text: str) -> FramePackLayout:
        """From the reference's notation, e.g. f1k1f4s2_g20: 1 temporal slot of kernel 1, 4 spatial of kernel 2, 20 new.

        ValueError for anything else.
        """
        match = re.fullmatch(r"((?:f[1-9]\d{0,2}[ks][1-9]\d{0,2}){1,64})_g([1-9]\d{0,2})", text, re.ASCII)
        if not match:
            raise ValueError(f"{text[:80]!r} is no FramePack layout; expected something like {LYRA2}")
        sources: dict[str, Source] = {letter: source for source, letter in _LETTERS.items()}
        runs = re.findall(r"f(\d+)([ks])(\d+)", match[1])
        segments = (Segment(int(slots), sources[letter], int(kernel)) for slots, letter, kernel in runs)
        return cls(tuple(segments), int(match[2]))

    def __str__(self) -> str:
        runs = (f"f{s.slots}{_LETTERS[s.source]}{s.kernel}" for s in self.segments)
        return f"{''.join(runs)}_g{self.new_latents}"

    def slots(self, source: Source | None = None) -> int:
        """Number of history slots, of one source or of both."""
        return sum(s.slots for s in self.segments if source in (None, s.source))

    @property
    def new_frames(self) -> int:
        return self.new_latents * LATENT_FRAMES

    def positions(self, source: Source) -> list[int]:
        """Where the slots of one source lie in the history."""
        sources = [s.source for s in self.segments for _ in range(s.slots)]
        return [position for position, other in enumerate(sources) if other == source]

    def history_tokens(self, height: int, width: int) -> int:
        """Tokens of the history for latents of this height and width."""
        return sum(prod(s.grid(height, width)) for s in self.segments)

    def token_positions(self, height: int, width: int, new_latents: int) -> Iterator[tuple[list[float], ...]]:
        """Per segment, and last for the new latents: positions along (time, rows, columns) of its grid of tokens.

        A token lies in the middle of what it covers, counted in slots and kernel-1 tokens; a window that sticks out
        counts the last position again. Time is the place in the row of slots, not when a frame was made.
        """
        start = 0
        for segment in (*self.segments, Segment(new_latents, "spatial", 1)):
            extents = (segment.slots, height // PATCH, width // PATCH)
            starts = (start, 0, 0)
            yield tuple(
                [first + centre for centre in _centres(extent, window, count)]
                for first, extent, window, count in zip(
                    starts, extents, segment.window, segment.grid(height, width), strict=True
                )
            )
            start += segment.slots


def _centres(extent: int, window: int, count: int) -> list[float]:
    """Mean positions of `count` windows over 0 .. extent-1, where positions past the end count as the last one."""
    return [sum(min(i * window + j, extent - 1) for j in range(window)) / window for i in range(count)]


LYRA2 = FramePackLayout(
    new_latents=20,
    segments=(
        Segment(1, "temporal", 1),
        Segment(4, "spatial", 2),
        Segment(1, "spatial", 1),
        Segment(16, "temporal", 4),
        Segment(2, "temporal", 2),
        Segment(1, "temporal", 1),
    ),
)


def temporal_latents(layout: FramePackLayout, history: int) -> list[int]:
    """Which of `history` latents fill the temporal slots: the first one, then the latest.

    ValueError if there are too few: the start of a world is padded by repeating its photo, never by holes.
    """
    count = layout.slots("temporal")
    if history < count:
        raise ValueError(f"{count} temporal slots need {count} latents of history, found {history}")
    return [0, *range(history - count + 1, history)]


def spatial_frames(layout: FramePackLayout, retrieved: Sequence[int], first: int = 0) -> list[int]:
    """Which frames fill the spatial slots: the retrieved ones, best last, after as many of frame `first` as are missing."""
    count = layout.slots("spatial")
    if len(retrieved) > count:
        raise ValueError(f"{len(retrieved)} frames were retrieved for {count} spatial slots")
    return [first] * (count - len(retrieved)) + list(retrieved)
