"""Depth Anything 3 as `lyra_core.reconstruct` asks for it: frames and cameras in, views out; and metres from its metric kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..cameras.camera import Cameras
from ..memory.depth_alignment import stretched
from ..memory.resampling import prepared
from ..splats.reconstruct import Views, in_metres
from .da3_gaussians import Da3Gaussians, OnStep
from .depth_estimators import camera_conditions, longest_side, predicted_cameras


@dataclass(frozen=True)
class Reconstructor:
    """A `reconstruct.Look` of the host's model with a Gaussian head."""

    model: ModelPatcher
    down_ratio: int = 2  # pixels that the network sees for every gaussian, along each side
    resolution: int = 0  # pixels of the longest side, rounded to 14s; 0: that of the frames, as the reference
    on_step: OnStep = lambda done, total: None

    def __post_init__(self):
        if not isinstance(self.model.model.diffusion_model, Da3Gaussians):
            raise ValueError(
                "this Depth Anything 3 has no Gaussian head; load Lyra 2's reconstruction weights or Depth Anything 3 "
                "giant with Lyra2LoadReconstructor"
            )
        if self.down_ratio < 1:
            raise ValueError(f"one gaussian for every {self.down_ratio} pixels: give 1 or more")

    @torch.no_grad()
    def __call__(self, frames: Tensor, told: Cameras | None, gaussians: bool) -> Views:
        if not torch.isfinite(frames).all():
            raise ValueError(f"these {len(frames)} images have NaN or infinite pixels; look at where they were made")
        pixels = prepared(frames, self.resolution or longest_side(frames.shape[1:3]))
        size, network = tuple(pixels.shape[2:]), self.model.model.diffusion_model
        ratio = self.down_ratio if gaussians else 0
        management.load_models_gpu([self.model], memory_required=network.memory(len(pixels), *size, ratio))
        told = {} if told is None else camera_conditions(told, size)
        device = self.model.load_device
        found = network(
            pixels[None].to(device, network.dtype or torch.float32),
            **{name: value.to(device) for name, value in told.items()},
            down_ratio=ratio,
            on_step=self._step,
        )
        found = {name: value.float().cpu() for name, value in found.items()}
        cameras = predicted_cameras(found, size, tuple(frames.shape[1:3]))
        if cameras is None:
            raise ValueError(
                f"the network finds no cameras for these {len(frames)} frames; do they show a still scene?"
            )
        if not torch.isfinite(found["depth"]).all():
            raise ValueError("the network's depth is not finite; load it with weight_dtype bf16 or fp32")
        return Views(found["depth"], found["depth_conf"], cameras, found.get("raw"), found.get("density"))

    def _step(self, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        self.on_step(done, total)


def metres(model: ModelPatcher) -> Callable[[Tensor, Views], Views]:
    """Brings views to metres by Depth Anything 3 Metric, which sees each frame alone; ValueError for another model."""
    network = model.model.diffusion_model
    if not getattr(network, "has_sky", False):
        raise ValueError("this Depth Anything 3 knows no metres; take DA3METRIC-LARGE")

    @torch.no_grad()
    def to_metres(frames: Tensor, views: Views) -> Views:
        pixels = prepared(frames, max(views.depth.shape[1:]))
        management.load_models_gpu([model])
        found = []
        for picture in pixels:
            management.throw_exception_if_processing_interrupted()
            found.append(network(picture[None, None].to(model.load_device, network.dtype or torch.float32)))
        # fitted to 14s twice, the size may be another one
        size = tuple(views.depth.shape[1:])
        metric, sky = (stretched(torch.cat([seen[name].cpu() for seen in found]), size) for name in ("depth", "sky"))
        seen = Views(views.depth, views.confidence, views.cameras.resized(tuple(pixels.shape[2:])))
        moved, _ = in_metres(seen, metric, sky)
        return Views(moved.depth, moved.confidence, Cameras(moved.cameras.w2c, views.cameras.K, views.cameras.size))

    return to_metres
