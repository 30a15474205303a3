"""How well a world holds together: a table, a picture per chunk, and the numbers."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..lyra_core.models.devices import geometry_device
from ..lyra_core.world import consistency, consistency_picture
from ..lyra_core.world import world as worlds
from . import types
from .node import Node

NOTHING_GROWN = "Nothing has grown yet: this world is the photo alone."


class Consistency(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2Consistency",
            display_name="Lyra 2 Consistency",
            category=types.CATEGORY,
            search_aliases=["PSNR", "SSIM", "TSED", "metrics", "quality"],
            is_output_node=True,
            description="How well a world holds together, whoever painted it, without any weights: against what was known before each "
            "chunk, the photo's colours, the neighbours in time, frames of the same place (PSNR, SSIM), and the commanded cameras (TSED, "
            "RotErr, TransErr, ATE).",
            inputs=[
                types.World.Input("world"),
                io.Int.Input(
                    "frames",
                    default=consistency.FRAMES,
                    min=1,
                    max=100,
                    optional=True,
                    tooltip="How many keyframes of each chunk are looked at, spread evenly; about a second of CPU time each at 832x480.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The table."),
                io.Float.Output(
                    display_name="psnr",
                    tooltip="dB, of frames that come back; where none does, of the known pixels against the memory; 0 if there is neither.",
                ),
                io.Image.Output(display_name="pictures", tooltip="One per chunk."),
                io.String.Output(display_name="scores", tooltip="All numbers as JSON; null where nothing can be said."),
            ],
        )

    @classmethod
    def execute(cls, world, frames=consistency.FRAMES) -> io.NodeOutput:
        if not world.chunks:
            photo = worlds.to_float(world.frame(0))[None]
            return io.NodeOutput(NOTHING_GROWN, 0.0, photo, "{}", ui=ui.PreviewText(NOTHING_GROWN))
        types.afford(4 * 8 * len(world) ** 2, f"comparing {len(world)} cameras with each other")
        found = consistency.measure(world, frames, geometry_device(world.size), types.progress())
        report, drawn = consistency.table(found), consistency_picture.draw(world, found)
        psnr = found.whole.revisit_psnr or found.whole.psnr or 0.0
        shown = ui.PreviewImage(drawn, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(report, psnr, drawn, json.dumps(found.as_plain()), ui=shown)
