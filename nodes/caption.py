"""A prompt for the next chunk, written by a vision language model."""

from __future__ import annotations

from comfy_api.latest import io

from ..lyra_core.models.devices import geometry_device
from ..lyra_core.world import world as worlds
from ..lyra_core.world.caption import caption_pictures, caption_prompt
from . import types
from .node import Node


class CaptionPrompt(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2CaptionPrompt",
            display_name="Lyra 2 Caption Prompt",
            category=types.CATEGORY,
            description="Pictures and question for Generate Text with Qwen3-VL (sampling off), which answers with a prompt for the next "
            "chunks: the photo, the newest frame, and what is known of the views ahead.",
            inputs=[
                types.World.Input("world"),
                types.Cameras.Input("cameras", tooltip="Where to go; the first camera is where the world stands."),
                io.String.Input(
                    "hint", default="", multiline=True, tooltip="What should come into view, e.g. a staircase. May be empty."
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="For Generate Text."),
                io.Image.Output(display_name="pictures", tooltip="For Generate Text's image input."),
            ],
        )

    @classmethod
    def execute(cls, world, cameras, hint) -> io.NodeOutput:
        ahead = worlds.continuation(world, cameras)[0].to(geometry_device(world.size))
        pictures = caption_pictures(world, ahead)
        return io.NodeOutput(caption_prompt(len(pictures), hint), pictures)
