"""What a card can do: whether a walk fits, what is offloaded, and how long it takes.

Sums of what was measured on one card (MEASURED), scaled to another by how much faster that multiplies matrices. Whatever is
not of the measured card, size and precision is an estimate, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..conditioning.framepack import LYRA2, PATCH

GIB = 2**30
PARAMETERS = 17.03e9  # of the released transformer, rays and correspondences included
PRECISIONS = {"bf16": 2, "fp8": 1}  # bytes a parameter
STEPS = {"distilled": 4, "full": 70}  # forward passes a chunk: DMD; 35 steps with both sides of CFG
SIZE = (480, 832)  # height and width of what was measured
CHUNK_FRAMES = 80
CHUNK_ON_DISK = 116e6  # bytes at SIZE, as the geometry preview's; a painted one had 141e6 in proportion
LEFT_TO_OTHERS = 1.4  # GiB: the driver's context and what the host keeps free


@dataclass(frozen=True)
class Card:
    """A GPU: its memory in GiB, and what its products of bf16 matrices reach in TFLOP/s."""

    name: str
    memory: float
    speed: float


def card_of(memory: float, speed: float, here: Callable[[], Card | None]) -> Card:
    """The card of so many GiB and TFLOP/s; what is 0 is this computer's, and without a GPU the measured card's."""
    if memory and speed:
        return Card(f"a card of {memory:g} GiB and {speed:g} TFLOP/s", memory, speed)
    card = here() or replace(MEASURED.card, name=f"{MEASURED.card.name} (there is no GPU here)")
    return card if not (memory or speed) else Card(f"{card.name}, changed", memory or card.memory, speed or card.speed)


@dataclass(frozen=True)
class Measured:
    """One card's day: seconds and GiB at SIZE, random weights of the released size."""

    card: Card
    date: str
    forward: float  # one pass of the transformer, all weights on the card
    plain: float  # the same by the host's attention, which training keeps
    attention: float  # share of it that grows with the square of the tokens
    working: float  # GiB beside the weights while it runs
    rest: float  # of a chunk beside its passes: guides, packing, VAE, depth, saving
    first: float  # more for a world's first chunk
    link: float  # GiB/s at which weights that don't fit come from memory, once a pass


MEASURED = Measured(
    card=Card("NVIDIA H200", 139.8, 783.0),
    date="2026-11-27",
    forward=3.63,
    plain=4.9,
    attention=0.56,
    working=5.2,
    rest=4.0,
    first=4.5,
    link=4.0,
)


@dataclass(frozen=True)
class Forecast:
    """What a walk of some chunks needs."""

    card: Card
    fits: bool
    needed: float  # GiB that have to be free on the card at least
    offloaded: float  # GiB of weights that come from memory in every pass
    seconds: float  # for a chunk
    first: float  # for a world's first chunk
    chunks: int
    system: float  # GiB of the computer's memory for weights and the world
    disk: float  # GB of the world's folder
    measured: bool  # whether card, size and precision are those that were measured

    def lines(self) -> list[str]:
        kind = f"measured on {MEASURED.date}, random weights" if self.measured else "an estimate"
        if not self.fits:
            return [
                f"{self.card.name}: does not fit. The transformer's work alone takes {self.needed:.1f} GiB of "
                f"{self.card.memory:.1f}; choose a smaller picture ({kind})"
            ]
        total = self.first + (self.chunks - 1) * self.seconds
        where = (
            "all weights stay on the card"
            if self.offloaded == 0
            else f"{self.offloaded:.1f} GiB of weights are offloaded and come back in every pass"
        )
        return [
            f"{self.card.name}: fits; {where}",
            f"{self.chunks} chunks of {CHUNK_FRAMES} frames: {_time(total)}; {_time(self.first)} for the first, "
            f"{_time(self.seconds)} for each other ({kind})",
            f"memory of the computer: {self.system:.0f} GiB; the world on disk: {self.disk:.2f} GB",
        ]


def forecast(
    card: Card, size: tuple[int, int] = SIZE, chunks: int = 1, quality: str = "distilled", precision: str = "bf16"
) -> Forecast:
    """For pictures of (height, width), multiples of 16. ValueError for a card without speed, or unknown choices."""
    if quality not in STEPS or precision not in PRECISIONS:
        raise ValueError(f"{quality!r} and {precision!r}: expected one of {', '.join(STEPS)} and one of {', '.join(PRECISIONS)}")
    if not (card.memory > 0 and card.speed > 0):
        raise ValueError(f"{card.name}: {card.memory} GiB and {card.speed} TFLOP/s; both must be more than nothing")
    if chunks < 1 or any(side < 16 or side % 16 for side in size):
        raise ValueError(f"{chunks} chunks of {size[1]}x{size[0]}: at least one, and sides that are multiples of 16")
    share, slower = tokens(size) / tokens(SIZE), MEASURED.card.speed / card.speed
    pixels = size[0] * size[1] / (SIZE[0] * SIZE[1])
    weights, working = PARAMETERS * PRECISIONS[precision] / GIB, MEASURED.working * share
    layer = weights / 40
    needed = working + 2 * layer + LEFT_TO_OTHERS
    offloaded = max(0.0, weights + working + LEFT_TO_OTHERS - card.memory)
    computing = MEASURED.forward * slower * (MEASURED.attention * share**2 + (1 - MEASURED.attention) * share)
    passing = computing + offloaded / MEASURED.link
    seconds = STEPS[quality] * passing + MEASURED.rest * pixels * max(1.0, slower)
    same_card = (card.memory, card.speed) == (MEASURED.card.memory, MEASURED.card.speed)
    known = same_card and tuple(size) == SIZE and precision == "bf16"
    return Forecast(
        card=card,
        fits=needed <= card.memory,
        needed=needed,
        offloaded=offloaded,
        seconds=seconds,
        first=seconds + MEASURED.first * pixels * max(1.0, slower),
        chunks=chunks,
        system=weights + 11 + chunks * CHUNK_ON_DISK * pixels / GIB,  # 11: the text encoder
        disk=chunks * CHUNK_ON_DISK * pixels / 1e9,
        measured=known,
    )


def tokens(size: tuple[int, int]) -> int:
    """Tokens of a pass over pictures of (height, width): the history's and the new ones."""
    rows, columns = (side // 8 for side in size)
    return LYRA2.history_tokens(rows, columns) + LYRA2.new_latents * (rows // PATCH) * (columns // PATCH)


def largest(card: Card, precision: str, shape: tuple[int, int] = SIZE) -> tuple[int, int] | None:
    """The largest (height, width) of about this shape that fits a card; None if nothing does."""
    for width in range(shape[1], 15, -16):
        size = (max(16, round(width * shape[0] / shape[1] / 16) * 16), width)
        if forecast(card, size, precision=precision).fits:
            return size
    return None


def report(card: Card, size: tuple[int, int], chunks: int, quality: str, precision: str) -> tuple[bool, str]:
    """Whether a walk fits, and all that there is to say of it; what would fit instead if it doesn't."""
    found = forecast(card, size, chunks, quality, precision)
    lines = found.lines()
    if not found.fits:
        smaller = largest(card, precision, size)
        lines += [f"{smaller[1]}x{smaller[0]} would fit" if smaller else "no size does; use the geometry preview or Wan VACE 1.3B"]
    return found.fits, "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


# --------------------------------------------------------------------------------------------------------------- training

KEPT = 24  # tensors of tokens x width that a block keeps for its gradients: 9 of self-attention, 8 of cross-attention, 7 of sums and norms
KEPT_WIDE = 3  # tensors of tokens x inner width: of the feed-forward, before and after its activation, and a gradient
TRAINED_BYTES = 16  # of a trained number: itself, its gradient and AdamW's two moments, in float32
ENCODERS = 1.6  # GiB: the VAE and CLIP vision, which stay beside the transformer
AGAIN = 4.0  # forward passes that a step costs: one, one again for the checkpoints, and gradients, which are two
SPOILING = 0.35  # of the steps spoil a chunk first: one pass more, and a chunk decoded and encoded


@dataclass(frozen=True)
class Teaching:
    """Memory in GiB, and time, that a training takes. Counted from shapes, not measured."""

    weights: float
    trained: float
    working: float
    tokens: int
    share: float  # of the work of one pass that the released model does at SIZE

    @property
    def needed(self) -> float:
        return self.weights + self.trained + self.working + ENCODERS + LEFT_TO_OTHERS

    def lines(self, card: Card | None, steps: int, spoiling: float = 1.0) -> list[str]:
        told = (
            f"memory of the card: {self.needed:.1f} GiB (weights {self.weights:.1f}, what is trained {self.trained:.2f}, a step "
            f"{self.working:.1f}, encoders and the rest {ENCODERS + LEFT_TO_OTHERS:.1f}); counted, not measured"
        )
        if card is None:
            return [told, "time: not known without a GPU; the first steps tell"]
        fits = "fits" if self.needed <= card.memory else "does not fit: switch offload on, or take smaller pictures"
        seconds = self.seconds(card, spoiling)
        lasts = f"time: about {seconds:.1f} s a step, {_time(steps * seconds)} in all; an estimate"
        return [f"{card.name}, {card.memory:.0f} GiB: {fits}", told, lasts]

    def seconds(self, card: Card, spoiling: float = 1.0) -> float:
        """Of a step, on a card."""
        passes = AGAIN + SPOILING * spoiling
        return (passes * MEASURED.plain + SPOILING * spoiling * MEASURED.rest) * self.share * MEASURED.card.speed / card.speed


def teaching(
    network, size: tuple[int, int], width: int, trained: int = 0, weight_bytes: float = 0, checkpointed: bool = True
) -> Teaching:
    """What training a Lyra2Model on pictures of (height, width) takes; `width` bytes a number, `trained` numbers of it."""
    rows, columns = (side // 8 for side in size)
    layout, block = network.layout, network.blocks[0]
    new = layout.new_latents * (rows // PATCH) * (columns // PATCH)
    count = layout.history_tokens(rows, columns) + new
    dim, depth, inner = network.dim, len(network.blocks), block.ffn_dim
    one_block = count * (KEPT * dim + KEPT_WIDE * inner)
    blocks = depth * count * dim + one_block if checkpointed else depth * one_block
    encoded = (layout.slots("spatial") + layout.new_latents) * (rows // PATCH) * (columns // PATCH) * block.buffer_encoder[0].in_features
    guides = count * block.cam_encoder.in_features + 2 * depth * count * network.rank + encoded
    work = count * _parameters(depth, dim, inner) + depth * 2 * count**2 * dim
    every = tokens(SIZE)
    released = every * _parameters(40, 5120, 13824) + 40 * 2 * every**2 * 5120
    return Teaching(
        weight_bytes / GIB, trained * TRAINED_BYTES / GIB, (blocks + guides) * width / GIB, count, work / released
    )


def _parameters(depth: int, dim: int, inner: int) -> int:
    """Of the blocks' matrices, about: self-attention, cross-attention and feed-forward."""
    return depth * (8 * dim**2 + 2 * dim * inner)
