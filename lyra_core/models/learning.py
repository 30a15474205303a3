"""How networks of the host are called by `training`: its codec, its eyes and words, and the transformer itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.latent_formats
import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.sd import VAE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..training.contracts import Condition, Model
from . import streaming_vae
from .lyra2 import TEXT_TOKENS, HistoryMaps, Lyra2Model
from .streaming_vae import FRAMES, PAIR

SCALE = comfy.latent_formats.Wan21()


@dataclass(frozen=True)
class HostCodec:
    """A Wan 2.1 VAE of the host. The caller has loaded it (`streaming_vae.load`)."""

    vae: VAE

    def __post_init__(self):
        streaming_vae.network_of(self.vae)

    @property
    def name(self) -> str:
        """Changes with its weights, of which the ends stand for all."""
        network, digest = streaming_vae.network_of(self.vae), hashlib.sha256()
        for layer in (network.encoder.conv1, network.conv1, network.conv2, network.decoder.conv1):
            digest.update(layer.weight.detach().float().cpu().contiguous().numpy().tobytes())
        return f"wan-{digest.hexdigest()[:12]}"

    @torch.no_grad()
    def encode(self, frames: Tensor, before: Tensor | None = None) -> Tensor:
        """(16, T, h, w) of frames (F, H, W, 3); ValueError for numbers of frames that can't be streamed."""
        reach = streaming_vae.encoder_reach(streaming_vae.network_of(self.vae))
        groups = -(-reach // (PAIR * FRAMES))
        context = frames[:0] if before is None else before[-(1 + groups * PAIR * FRAMES) :].to(frames)
        made = streaming_vae.encode(self.vae, torch.cat([context, frames]), streaming_vae.fresh(self.vae))
        latents = torch.cat(list(made), 1)
        new = len(frames) // FRAMES if len(context) else latents.shape[1]
        return SCALE.process_in(latents[None])[0][:, -new:]

    @torch.no_grad()
    def decode(self, latents: Tensor, before: Tensor | None = None) -> Tensor:
        """(F, H, W, 3), not clamped, of latents (16, T, h, w); ValueError for numbers of latents that can't be streamed."""
        reach = streaming_vae.decoder_reach(streaming_vae.network_of(self.vae))
        context = latents[:, :0] if before is None else before[:, -(reach + 1 + reach % 2) :]
        whole = SCALE.process_out(torch.cat([context.to(latents), latents], 1)[None])[0]
        frames = torch.cat([part.cpu() for part in streaming_vae.decode(self.vae, whole, streaming_vae.fresh(self.vae))])
        return frames[-FRAMES * latents.shape[1] :] if context.shape[1] else frames


def as_model(
    network: Lyra2Model,
    device=None,
    dtype: torch.dtype = torch.float32,
    checkpointed: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> Model:
    """The network as it is trained. `checkpointed`: blocks are computed again for their gradients, not kept.

    `pause` is called before every block, and may raise.
    """

    def velocity(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        where = device or next(network.parameters()).device
        noisy, shown = noisy.to(where, dtype), Condition(*(part.to(where, dtype) for part in condition))
        known = torch.ones_like(shown.history[:, :4])
        maps = HistoryMaps(torch.cat([shown.history, known, shown.history], 1), shown.rays, shown.correspondences)
        with differentiable():
            return network(
                torch.cat([noisy, torch.ones_like(noisy[:, :4]), shown.warped], 1),
                timesteps.to(where),
                shown.text,
                clip_fea=shown.image,
                history=maps,
                transformer_options=_block_by_block(network, checkpointed, pause),
            )

    return velocity


@contextmanager
def differentiable() -> Iterator[None]:
    """While the host takes only operations that have gradients; it has faster ones without."""
    management = comfy.model_management
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


def _block_by_block(network: Lyra2Model, checkpointed: bool, pause: Callable[[], None]) -> dict:
    """Options that put themselves in front of each block, by the host's own way of replacing one."""

    def block(args, extra):
        def run(tokens: Tensor) -> Tensor:
            pause()
            with differentiable():
                return extra["original_block"]({**args, "img": tokens})["img"]

        tokens = args["img"]
        return {"img": checkpoint(run, tokens, use_reentrant=False, preserve_rng_state=False) if checkpointed else run(tokens)}

    return {"patches_replace": {"dit": {("double_block", i): block for i in range(len(network.blocks))}}}


def padded(tell: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Texts (tokens, width) as the transformer reads them: cut to TEXT_TOKENS, or zeros after them."""

    def told(caption: str) -> Tensor:
        text = tell(caption)[:TEXT_TOKENS]
        return F.pad(text, (0, 0, 0, TEXT_TOKENS - len(text)))

    return told
