"""Released files become files for the host's own loaders."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..lyra_core.models import checkpoints
from . import types
from .node import Node


class ConvertCheckpoint(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2ConvertCheckpoint",
            display_name="Lyra 2 Convert Checkpoint",
            category=types.CATEGORY,
            description="Turns the released Lyra 2 transformer (a folder of .distcp files, a .pth or a .safetensors "
            "file) into one bfloat16 file for Load Diffusion Model, or a LoRA (the reference's, PEFT's with its "
            "adapter_config.json, diffusers', kohya's) into one of which the LoRA loaders use all. "
            "Run again after an interrupt, it continues. Nothing in a pickle is run.",
            inputs=[
                io.String.Input(
                    "source", default="lyra2/model", tooltip="The file or folder, inside ComfyUI's models folder."
                ),
                io.String.Input(
                    "name",
                    default="lyra2",
                    tooltip="Name of the new file in models/diffusion_models, or in models/loras for a LoRA.",
                ),
            ],
            outputs=[io.String.Output(display_name="report")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, source, name) -> io.NodeOutput:
        models = Path(folder_paths.models_dir)
        path = types.inside(models, source)
        folder = models / ("loras" if checkpoints.is_lora(path) else "diffusion_models")
        target = types.inside(folder, f"{name.removesuffix('.safetensors')}.safetensors")
        report = f"{checkpoints.convert(path, target, on_progress=types.progress())}\nwrote {target}"
        return io.NodeOutput(report, ui=ui.PreviewText(report))
