"""Wan VACE as a generator of chunks: its conditioning on the host's classes, and what its sampling needs beyond stock nodes.

With at most one reference, and masks that are the same over each group of frames that share a latent, the conditioning is bit
for bit that of the host's WanVaceToVideo. Beyond it: a latent is painted if any of its frames shall be, any number of
references, and known frames at the beginning that stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

CELL, FRAMES = 8, 4  # pixels a side and frames that one latent stands for
STEP = 16  # pixels that the sides of a video must be multiples of
HALF = 0.5  # of a control video: nothing is known, nothing is asked for
PINNED, TRUSTED, FREE = 0.0, 0.5, 1.0  # what a latent's noise mask says of a cell


@dataclass(frozen=True)
class Control:
    """What VACE is told of L frames, in T = (L - 1) / 4 + 1 latents behind n references."""

    frames: Tensor  # (1, 32, n + T, h, w) what to keep, and what guides what to paint; in the scale of the host's VAE
    mask: Tensor  # (1, 64, n + T, h, w) 1 = paint, a channel per pixel of a cell
    latent: Tensor  # (1, 16, n + T, h, w) known frames at their places, zeros elsewhere
    noise_mask: Tensor  # (1, 1, n + T, h, w) PINNED, TRUSTED or FREE
    references: int  # n: how many latents to cut off the front of what was sampled

    def entries(self, strength: float) -> dict:
        """For `conditioning_set_values` with `append`, on both prompts."""
        return {"vace_frames": [self.frames], "vace_mask": [self.mask], "vace_strength": [strength]}


def control(
    vae: VAE, video: Tensor, generate: Tensor, pinned: int = 1, references: Tensor | None = None, trust: bool = False
) -> Control:
    """Encode a control video (L, H, W, 3) and what to paint of it (L, H, W).

    pinned: so many frames at the beginning stay exactly as they are: 0, or 1 more than a multiple of 4. references
    (n, H, W, 3), each encoded alone. trust: what is known in all frames of a latent's group is marked, and the latent
    starts from the control video, for `trusting` to keep it in the first steps.
    """
    _check(video, generate, pinned, references)
    mask = generate.to(video)[..., None]
    kept, painted = ((video - HALF) * part + HALF for part in (1 - mask, mask))
    streams = [vae.encode(stream[..., :3]) for stream in (kept, painted)]
    looks = [vae.encode(picture[None, ..., :3]) for picture in (() if references is None else references)]
    nothing = comfy.latent_formats.Wan21().process_out(torch.zeros_like(streams[0][:, :, :1]))
    frames = torch.cat([*(torch.cat([look, nothing], 1) for look in looks), torch.cat(streams, 1)], 2)
    latents = streams[0].shape[2]
    groups = grouped(generate.to(frames))
    cells = _cells(groups)
    cells = torch.cat([cells.new_zeros(1, cells.shape[1], len(looks), *cells.shape[3:]), cells], 2)
    latent = torch.zeros(1, 16, latents, *cells.shape[3:], device=frames.device)
    noise_mask = torch.full_like(latent[:, :1], FREE)
    if trust:
        latent = vae.encode(video[..., :3]).to(latent)
        noise_mask[_cells(groups).amax(1, keepdim=True) == 0] = TRUSTED
    if pinned:
        known = vae.encode(video[:pinned, ..., :3])
        latent[:, :, : known.shape[2]] = known
        noise_mask[:, :, : known.shape[2]] = PINNED
    front = latent.new_zeros(1, 16, len(looks), *latent.shape[3:])
    latent, noise_mask = torch.cat([front, latent], 2), torch.cat([torch.full_like(front[:, :1], FREE), noise_mask], 2)
    return Control(frames, cells, latent, noise_mask, len(looks))


def grouped(generate: Tensor) -> Tensor:
    """(T, H, W): of masks (L, H, W) the union over the frames that each latent stands for: frame 0, then fours."""
    first, rest = generate[:1], generate[1:]
    return torch.cat([first, rest.view(-1, FRAMES, *rest.shape[1:]).amax(1)])


def _cells(masks: Tensor) -> Tensor:
    """(1, 64, T, h, w): masks (T, H, W) with a channel for each pixel of a cell, row by row."""
    count, height, width = masks.shape
    cells = masks.view(count, height // CELL, CELL, width // CELL, CELL).permute(2, 4, 0, 1, 3)
    return cells.reshape(1, CELL * CELL, count, height // CELL, width // CELL)


def _check(video: Tensor, generate: Tensor, pinned: int, references: Tensor | None) -> None:
    if video.ndim != 4 or video.shape[-1] < 3:
        raise ValueError(f"expected a control video (frames, height, width, 3), found {tuple(video.shape)}")
    length, height, width = video.shape[:3]
    if generate.shape != video.shape[:3]:
        one = " One mask is not repeated for all frames: give each frame its own." if len(generate) == 1 < length else ""
        raise ValueError(
            f"the control video is {length} frames of {width}x{height}, but its masks are {len(generate)} of "
            f"{generate.shape[-1]}x{generate.shape[-2]}.{one}"
        )
    if length % FRAMES != 1:
        raise ValueError(f"{length} frames: VACE makes 1 more than a multiple of {FRAMES}, such as {length // 4 * 4 + 1}")
    if height % STEP or width % STEP:
        raise ValueError(f"the control video is {width}x{height}; both sides must be multiples of {STEP}")
    if pinned and (pinned % FRAMES != 1 or pinned > length):
        raise ValueError(f"{pinned} frames can't be kept exactly: 0, 1, 5, 9, ... up to the video's {length}")
    if references is not None and tuple(references.shape[1:3]) != (height, width):
        found = f"{references.shape[2]}x{references.shape[1]}"
        raise ValueError(f"the references are {found}, the control video is {width}x{height}; resize them")


def check_model(model: ModelPatcher) -> None:
    """ValueError for a model that is no Wan VACE: it would ignore all that it is shown."""
    network = model.model
    if not isinstance(network, comfy.model_base.WAN21_Vace):
        kind = "the Lyra 2 transformer" if type(network).__name__ == "Lyra2Base" else f"a {type(network).__name__} model"
        raise ValueError(
            f"this is {kind}, not Wan VACE: its file has no vace_patch_embedding. Load wan2.1_vace_1.3B, wan2.1_vace_14B or "
            "the two of wan2.2_fun_vace, or choose another generator"
        )


# ----------------------------------------------------------------------------------------------------------- sampling


def trusting(model: ModelPatcher, sigmas: Tensor, steps: int) -> ModelPatcher:
    """The model with a noise mask of `Control`: what is known is kept in the first steps of these sigmas, then free.

    So geometry settles where the memory put it, and what a warp got wrong is painted over afterwards.
    """
    until = float(sigmas[min(steps, len(sigmas) - 1)])

    def kept(sigma: Tensor, denoise_mask: Tensor, extra_options: dict) -> Tensor:
        return (denoise_mask > (TRUSTED if float(sigma.max()) > until else PINNED)).to(denoise_mask)

    model = model.clone()
    model.set_model_denoise_mask_function(kept)
    return model


def split(sigmas: Tensor, boundary: float) -> tuple[Tensor, Tensor]:
    """Noise levels for the expert of those from `boundary` up, and for the one of those below; both share one."""
    high = int((sigmas[:-1] >= boundary).sum())
    if not 0 < high < len(sigmas) - 1:
        raise ValueError(
            f"the {len(sigmas) - 1} steps are all on one side of {boundary:g}: nothing is left for one of the two experts; "
            "use more steps or another boundary"
        )
    return sigmas[: high + 1], sigmas[high:]


@dataclass(frozen=True)
class Leftover:
    """A NOISE with which sampling goes on from where another model left it, while masked cells keep to the clean latent.

    A sampler starts at sigma * noise + (1 - sigma) * latent; this is the noise that makes it the state that was left.
    """

    left: Tensor  # samples with leftover noise, as the host hands them on
    sigma: float  # the noise level that they were left at
    seed: int = 0

    def generate_noise(self, latent: dict) -> Tensor:
        scale = comfy.latent_formats.Wan21()
        left, clean = (scale.process_in(samples.float()) for samples in (self.left, latent["samples"]))
        return (left - clean) * ((1 - self.sigma) / self.sigma)
