"""The host's depth models behind one contract: frames, cameras and what is known in, depth out.

The models are the host's own, loaded by its own nodes; its memory management decides where they run. See
`lyra_core.memory.depth_alignment.DepthEstimator` for the contract, and `in_scene_units` for what happens to the scale.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import comfy.model_management as management
import torch
from comfy.ldm.moge.model import MoGeModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..cameras.camera import Cameras, from_normalized, rescaled_as_reference
from ..memory.depth_alignment import Estimate, stretched, to_one_scale
from ..memory.resampling import prepared
from ..splats.alignment import seen_from_first
from ..splats.reconstruct import FARTHEST_SKY, SKY, SKY_QUANTILE
from ..world.made_up import continued
from .da3_gaussians import CAMERA_HEADS, Da3Gaussians, OnStep
from .devices import geometry_device

log = logging.getLogger(__name__)

SKIES = ("unknown", "far")


def longest_side(size: tuple[int, int]) -> int:
    """At which longest side the reference runs Depth Anything 3: that of the frames (height, width)."""
    return max(size)


def _step(on_step: OnStep, done: int, total: int) -> None:
    management.throw_exception_if_processing_interrupted()
    on_step(done, total)


def _nothing(done: int, total: int) -> None:
    pass


# ------------------------------------------------------------------------------------------------- Depth Anything 3


@dataclass(frozen=True)
class Da3Estimator:
    """Depth Anything 3: all frames at once, with a camera encoder told where they were taken.

    Small, Base and larger multi-view models give one scale for all frames, and the cameras they believe in; Mono and Metric
    models look at each frame alone, and each is then brought to the scale of what is known of it. Only those see sky:
    unknown by default, since it is no geometry; "far" puts it where the reference does, at the farthest percent of the
    rest but at most 200.
    """

    model: ModelPatcher  # the host's, as LoadDA3Model gives it
    resolution: int = 0  # pixels of the longest side, rounded to 14s; 0: that of the frames, as the reference
    conditioned: bool = True  # tell a camera encoder where the frames were taken
    sky: str = "unknown"

    def __post_init__(self):
        if self.sky not in SKIES:
            raise ValueError(f"sky {self.sky!r}: expected {' or '.join(map(repr, SKIES))}")

    @torch.no_grad()
    def __call__(self, frames: Tensor, cameras: Cameras, known: Tensor, on_step: OnStep = _nothing) -> Estimate:
        network = self.model.model.diffusion_model
        together = network.cam_dec is not None or network.head_type == "dualdpt"
        pixels = prepared(frames, self.resolution or longest_side(cameras.size))
        model = _with_camera_heads(self.model)
        management.load_models_gpu([model], memory_required=_memory(network, pixels if together else pixels[:1]))
        if together:
            _step(on_step, 0, 1)
            conditions = camera_conditions(cameras, tuple(pixels.shape[2:])) if self.conditioned else {}
            found = _run(model, pixels[None], conditions)
            _step(on_step, 1, 1)
            return Estimate(
                self._depth(found, cameras.size), predicted_cameras(found, tuple(pixels.shape[2:]), cameras.size)
            )
        depths = []
        for done, picture in enumerate(pixels):
            _step(on_step, done, len(pixels))
            depths.append(self._depth(_run(model, picture[None, None], {}), cameras.size))
        _step(on_step, len(pixels), len(pixels))
        return Estimate(to_one_scale(torch.cat(depths), known))

    def _depth(self, found: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        depth = stretched(found["depth"], size)
        return _without_sky(depth, stretched(found["sky"], size), self.sky) if "sky" in found else depth


def _run(model: ModelPatcher, pixels: Tensor, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the network says of views (1, F, 3, h, w), as float32 on the CPU."""
    network, device = model.model.diffusion_model, model.load_device
    pixels = pixels.to(device, network.dtype or torch.float32)
    found = network(pixels, **{name: value.to(device) for name, value in conditions.items()})
    wanted = ("depth", "sky", "extrinsics", "intrinsics")
    return {name: found[name].float().cpu() for name in wanted if name in found}


def _memory(network, pixels: Tensor) -> int:
    """Bytes that looking at pixels (F, 3, h, w) takes: one number per pixel and channel of the backbone.

    Measured on Small in float32: 1300 bytes per pixel where this says 1536, whatever the width of the depth head.
    A network with heads that look at a few frames at a time knows better.
    """
    if isinstance(network, Da3Gaussians):
        return network.memory(len(pixels), *pixels.shape[2:], down_ratio=0)
    width = network.backbone.embeddings.cls_token.shape[-1]
    return pixels[:, 0].numel() * width * (network.dtype or torch.float32).itemsize


def _with_camera_heads(model: ModelPatcher) -> ModelPatcher:
    """The model whose camera encoder has as many attention heads as it was trained with.

    The host derives another number from the width. Its own nodes never give cameras, so there it doesn't matter.
    """
    encoder = model.model.diffusion_model.cam_enc
    if encoder is None:
        return model
    model = model.clone()
    for i, block in enumerate(encoder.trunk):
        if block.norm1.weight.shape[0] % CAMERA_HEADS == 0:
            model.add_object_patch(f"diffusion_model.cam_enc.trunk.{i}.attn.num_heads", CAMERA_HEADS)
    return model


def camera_conditions(cameras: Cameras, size: tuple[int, int]) -> dict[str, Tensor]:
    """Cameras as the network was trained with: seen from the first, at a median distance of 1, K at its picture size."""
    seen = rescaled_as_reference(seen_from_first(replace(cameras, w2c=cameras.w2c.float())), size)
    return {"extrinsics": seen.w2c[None], "intrinsics": seen.K[None].float()}


def predicted_cameras(found: dict[str, Tensor], seen: tuple[int, int], size: tuple[int, int]) -> Cameras | None:
    """The cameras that the network believes in, for frames of `size`; its K is for pictures of size `seen`."""
    if "extrinsics" not in found:
        return None
    w2c = torch.eye(4).repeat(found["extrinsics"].shape[1], 1, 1)
    w2c[:, :3] = found["extrinsics"][0, :, :3]
    K = found["intrinsics"][0] / torch.tensor([[seen[1]], [seen[0]], [1.0]])
    if not (torch.isfinite(w2c).all() and torch.isfinite(K).all()):
        log.warning("Depth Anything 3 found no cameras for these %d frames; their depth is used without", len(w2c))
        return None
    return Cameras(w2c, from_normalized(K, size), size)


def _without_sky(depth: Tensor, sky: Tensor, kind: str) -> Tensor:
    """Depth (F, H, W) where sky, a probability (F, H, W), is unknown or far away."""
    ground = sky < SKY
    if kind == "unknown" or not ground.any():
        return torch.where(ground, depth, 0.0)
    return torch.where(ground, depth, depth[ground].quantile(SKY_QUANTILE).clamp_max(FARTHEST_SKY))


# ------------------------------------------------------------------------------------------------------------- MoGe


@dataclass(frozen=True)
class MogeEstimator:
    """MoGe: one frame after the other, with the field of view it was generated for.

    Each frame comes with a scale of its own (v1), or a metric one that wavers from frame to frame (v2). So each is
    brought to the scale of what is known of it; a frame of which too little is known takes the middle of the others.
    """

    model: MoGeModel  # the host's, as LoadMoGeModel gives it
    detail: int = 9  # 0 fastest to 9 finest

    @torch.no_grad()
    def __call__(self, frames: Tensor, cameras: Cameras, known: Tensor, on_step: OnStep = _nothing) -> Estimate:
        depths = []
        for done, (frame, K) in enumerate(zip(frames, cameras.K, strict=True)):
            _step(on_step, done, len(frames))
            fov = 2 * math.degrees(math.atan(0.5 * cameras.size[1] / float(K[0, 0])))
            found = self._infer(frame.movedim(-1, 0)[None], fov)
            depth = found["depth"][0].float().cpu()  # infinite where MoGe sees nothing
            depths.append(torch.where(torch.isfinite(depth) & (depth > 0), depth, 0.0))
        _step(on_step, len(frames), len(frames))
        return Estimate(to_one_scale(torch.stack(depths), known))

    def _infer(self, picture: Tensor, fov: float) -> dict[str, Tensor]:
        try:
            return self.model.infer(picture, resolution_level=self.detail, fov_x=fov)
        except NotImplementedError as error:
            # the host loads MoGe in the text encoders' precision, which on a CPU is one that it can't resize pictures in
            raise ValueError(f"MoGe can't run here as loaded; start ComfyUI with --fp32-text-enc ({error})") from error


# ------------------------------------------------------------------------------------------------------- no network


@dataclass(frozen=True)
class MemoryEstimator:
    """What the memory knows already, its holes filled from their surroundings: needs no weights, sees nothing new."""

    def __call__(self, frames: Tensor, cameras: Cameras, known: Tensor, on_step: OnStep = _nothing) -> Estimate:
        if not known.any():
            raise ValueError(f"the memory knows nothing of these {len(known)} frames; use a depth model for them")
        depths, there = [], known.to(geometry_device(known.shape[-2:], make_room=False))
        farthest = there.max()
        for done, depth in enumerate(there):
            _step(on_step, done, len(known))
            depths.append(_filled(depth, farthest))
        _step(on_step, len(known), len(known))
        return Estimate(torch.stack(depths).to(known.device), scaled=True)


def _filled(depth: Tensor, otherwise: Tensor) -> Tensor:
    """Depth (H, W) whose holes continue what is around them, the farther side first; all `otherwise` if nothing is known."""
    seen = depth > 0
    if not seen.any():
        return torch.full_like(depth, float(otherwise))
    filled = depth.clone()
    if not seen.all():
        filled[~seen] = continued(depth[..., None], depth, seen)[:, 0]
    return filled
