"""Widgets that several nodes have."""

from __future__ import annotations

from comfy_api.latest import io

from ..lyra_core.memory.depth_alignment import ALIGNMENTS


def seed_input():
    return io.Int.Input(
        "seed",
        default=1,
        min=0,
        max=2**32 - 100_001,
        control_after_generate=True,
        tooltip="Chunk number c of a world uses seed + c. The same seed gives the same world.",
    )


def alignment_input():
    return io.Combo.Input(
        "alignment",
        options=list(ALIGNMENTS),
        default="memory",
        tooltip="Where the scale of the new depth comes from. memory: what the world knows already, safe for any camera move. "
        "cameras: the reference's way, which needs a moving camera and an estimator that says where it stood. none.",
    )


def save_input():
    return io.String.Input(
        "save_to",
        default="",
        tooltip="A folder in the output folder. The world is saved there after every chunk, and what was made there in the "
        "same way is taken from it instead of made again. Empty: not saved.",
    )
