"""Sharper splats."""

from __future__ import annotations

import torch
from comfy.model_management import free_memory, get_torch_device
from comfy_api.latest import io, ui

from ..lyra_core.cameras.camera import Cameras
from ..lyra_core.memory.depth import DepthMap, resized
from ..lyra_core.splats import rasterize
from ..lyra_core.splats.gaussians import Gaussians
from ..lyra_core.splats.optimize import optimize
from . import types
from .inputs import seed_input
from .node import Node
from .splat import sound_splat, to_splat

BYTES_PER_GAUSSIAN = 3200  # parameters, gradients, Adam's two moments, what drawing keeps; 3,191 measured on an H200


class OptimizeSplat(Node):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Lyra2OptimizeSplat",
            display_name="Lyra 2 Optimize Splat",
            category=types.CATEGORY,
            description="Fits a splat to the frames it was made of: sharper, and without seams between chunks. Every eighth frame is "
            "held out, and what shows those best is kept. Needs an NVIDIA GPU and gsplat (pip install gsplat).",
            inputs=[
                io.Splat.Input("splat", tooltip="About 3 million at most fit a usual card; prune it first."),
                io.Image.Input("images", tooltip="The frames to show."),
                types.Cameras.Input("cameras", tooltip="Where they were taken; of Lyra 2 Reconstruct its view_cameras."),
                types.Depth.Input("depth", optional=True, tooltip="How far what they show is, to hold surfaces in place."),
                io.Int.Input(
                    "steps", default=3000, min=1, max=100_000, tooltip="1000 is quick, 3000 balanced, 7000 thorough."
                ),
                io.Boolean.Input(
                    "refine_cameras", default=True, tooltip="Let cameras move a hair; the first one stays."
                ),
                io.Boolean.Input(
                    "exposure", default=True, tooltip="Let each frame be a little brighter or bluer than the scene."
                ),
                seed_input(2**32 - 1, "Order in which frames are taken.", default=0),
            ],
            outputs=[
                io.Splat.Output(display_name="splat"),
                types.Cameras.Output(display_name="cameras"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, splat, images, cameras, steps=3000, refine_cameras=True, exposure=True, seed=0, depth=None
    ) -> io.NodeOutput:
        device = get_torch_device()
        render = rasterize.differentiable(device)
        depths = depth and [_depth(each, cameras.size) for each in depth]
        on_step = types.progress(steps)
        # nodes run in inference mode, whose tensors no gradient can pass through; so all of it is copied
        with torch.inference_mode(False), torch.enable_grad():
            gaussians, broken = sound_splat(splat)
            free_memory(BYTES_PER_GAUSSIAN * len(gaussians), device)
            gaussians = Gaussians(*(field.clone().to(device) for field in vars(gaussians).values()))
            like = gaussians.means
            cameras = Cameras(cameras.w2c.clone().to(like), cameras.K.clone().to(like), cameras.size)
            images = types.colour(images).clone()
            depths = depths and [each.clone() for each in depths]
            found = optimize(
                render, gaussians, images, cameras, depths, steps, refine_cameras, exposure, seed, on_step
            )
        kept, report = to_splat(found.gaussians.to("cpu")), found.report + (f"; {broken} left out" if broken else "")
        return io.NodeOutput(kept, found.cameras.to("cpu"), report, ui=ui.PreviewText(report))


def _depth(known: DepthMap, size: tuple[int, int]) -> torch.Tensor:
    return resized(known, size).depth
