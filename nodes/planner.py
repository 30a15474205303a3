"""What a card can do, before anything is downloaded or run."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..lyra_core.models import planner
from ..lyra_core.models.devices import this_card
from . import types
from .node import Node


class Planner(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2Planner",
            display_name="Lyra 2 Planner",
            category=types.CATEGORY,
            is_output_node=True,
            description="Whether Lyra 2 fits a card, what is offloaded, how long a walk takes and what it takes on disk. From "
            "what was measured on one card, scaled to others; what is an estimate says so.",
            inputs=[
                io.Int.Input("width", default=832, min=16, max=4096, step=16, tooltip="Of the frames, in pixels."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Of the frames, in pixels."),
                io.Int.Input("chunks", default=3, min=1, max=10_000, tooltip="Chunks of 80 frames."),
                io.Combo.Input(
                    "quality", options=list(planner.STEPS), tooltip="distilled: four steps (DMD). full: 35 steps with CFG."
                ),
                io.Combo.Input(
                    "precision", options=list(planner.PRECISIONS), tooltip="Of the transformer's weights, as its loader has it."
                ),
                io.Float.Input(
                    "memory", default=0.0, min=0.0, max=2048.0, step=0.5, tooltip="GiB of the card. 0: this computer's card."
                ),
                io.Float.Input(
                    "speed",
                    default=0.0,
                    min=0.0,
                    max=100_000.0,
                    tooltip="TFLOP/s that its products of bf16 matrices reach. 0: this computer's card.",
                ),
            ],
            outputs=[io.Boolean.Output(display_name="fits"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, width, height, chunks, quality, precision, memory, speed) -> io.NodeOutput:
        card = planner.card_of(memory, speed, this_card)
        fits, report = planner.report(card, (height, width), chunks, quality, precision)
        return io.NodeOutput(fits, report, ui=ui.PreviewText(report))
