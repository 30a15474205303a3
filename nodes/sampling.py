"""Sampling at the reference's exact schedules; every other sampler and scheduler of the host works as well."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..lyra_core.conditioning import schedules
from ..lyra_core.models.sampling import UniPC
from . import types
from .inputs import seed_input
from .node import Node


def full_schedule_inputs() -> list:
    """Widgets of the full-quality schedule."""
    return [
        io.Int.Input(
            "steps",
            default=35,
            min=1,
            max=1000,
            tooltip="More steps, finer details, more time. The reference walks with 35 and zooms with 50.",
        ),
        io.Float.Input(
            "shift",
            default=schedules.SHIFT,
            min=0.01,
            max=100.0,
            step=0.1,
            tooltip="Higher spends more steps on the composition, fewer on details. Lyra 2 was trained with 5.",
        ),
    ]


class Sigmas(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2Sigmas",
            display_name="Lyra 2 Sigmas",
            category=types.CATEGORY,
            description="The noise levels of the Lyra 2 reference. full: for Lyra2UniPC, CFG 5. DMD: four steps for the "
            "lcm sampler with the DMD LoRA at strength 1 and CFG 1.",
            inputs=[
                io.DynamicCombo.Input(
                    "schedule",
                    options=[io.DynamicCombo.Option("full", full_schedule_inputs()), io.DynamicCombo.Option("DMD", [])],
                    tooltip="full quality, or the four steps of the distilled model.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, schedule) -> io.NodeOutput:
        if schedule["schedule"] == "DMD":
            return io.NodeOutput(schedules.dmd())
        return io.NodeOutput(schedules.full(schedule["steps"], schedule["shift"]))


class UniPCSampler(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2UniPC",
            display_name="Lyra 2 UniPC",
            category=types.CATEGORY,
            description="The solver of the Lyra 2 reference (UniPC, order 2), from the diffusers library. Use it with "
            "Lyra 2 Sigmas. It starts from pure noise where the latent is empty.",
            inputs=[],
            outputs=[io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(UniPC())


class ChunkNoise:
    """The reference's noise, of the same numbers on every machine; each chunk has its own seed."""

    def __init__(self, seed: int):
        self.seed = seed

    def generate_noise(self, latent: dict) -> torch.Tensor:
        return schedules.initial_noise(tuple(latent["samples"].shape), self.seed)


class Noise(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2Noise",
            display_name="Lyra 2 Noise",
            category=types.CATEGORY,
            description="The Lyra 2 reference's noise for a chunk: its seed is the world's plus the chunk's number.",
            inputs=[types.History.Input("history", tooltip="Whose chunk it is."), seed_input()],
            outputs=[io.Noise.Output(display_name="noise")],
        )

    @classmethod
    def execute(cls, history, seed) -> io.NodeOutput:
        return io.NodeOutput(ChunkNoise(seed + history.chunk))
