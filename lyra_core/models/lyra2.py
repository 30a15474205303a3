"""The Lyra 2.0 transformer: Wan 2.1 image-to-video with a packed history, camera rays and correspondences.

What is not Wan: clean history latents stand in front of those to generate, in patches that grow with their age
(framepack.py); every block adds an encoding of each token's camera rays and correspondences to the queries and keys
of its self-attention, never to the values; only the new latents are predicted. Everything else is the host's.

Weights keep the reference's names. Batches share one history, or bring as many as they have samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import pi, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules import attention
from comfy.ldm.wan.model import WanAttentionBlock, WanModel, WanSelfAttention
from comfy.model_management import cast_to, supports_fp64
from torch import Tensor, nn

from ..conditioning.framepack import PATCH, FramePackLayout, Segment
from ..conditioning.history import RAY_CHANNELS, SLOT_CHANNELS
from .attention import free_to_choose

TEXT_TOKENS = 512  # the text is padded with zeros to exactly this length
OCTAVES = 2  # sine and cosine at pi and 2 pi


class HistoryMaps(NamedTuple):
    """What the network is told of a chunk, besides its noisy latents; every tensor (B, C, T, h, w) in latent pixels."""

    latents: Tensor  # 36 channels, history slots: clean latents in the model's scale | 4 known-mask | the latents again
    rays: Tensor  # RAY_CHANNELS, history slots then new latents
    correspondences: Tensor  # SLOT_CHANNELS per spatial slot, spatial slots then new latents
    frames: tuple[int, ...] | None = None  # which new latents of the chunk these are, if not all

    def to(self, *args, **kwargs) -> HistoryMaps:
        return HistoryMaps(*(tensor.to(*args, **kwargs) for tensor in self[:3]), self.frames)

    def at(self, frames: list[int], rows: slice, columns: slice) -> HistoryMaps:
        """A part of the picture, and only some of the new latents."""
        new = self.rays.shape[2] - self.latents.shape[2]
        rays, correspondences = (
            maps[:, :, [*range(maps.shape[2] - new), *(maps.shape[2] - new + frame for frame in frames)], rows, columns]
            for maps in (self.rays, self.correspondences)
        )
        frames = tuple(frames if self.frames is None else (self.frames[frame] for frame in frames))
        return HistoryMaps(self.latents[..., rows, columns], rays, correspondences, frames)


class HistoryTokens(NamedTuple):
    """The maps as tokens: all that is constant over a chunk. L tokens, those of the history first."""

    tokens: Tensor  # (B, history tokens, dim) embedded history
    positions: Tensor  # (1, L, 3) float32: time, row, column
    rope: Tensor  # (1, L, 1, head_dim / 2, 2, 2) float32 rotations of the positions
    rays: Tensor  # (B, L, 4 RAY_CHANNELS)
    correspondences: Tensor  # (blocks, B, L, rank), zero where a token has none

    def to(self, device) -> HistoryTokens:
        return HistoryTokens(*(tensor.to(device) for tensor in self))

    def at(self, frames: list[int]) -> HistoryTokens:
        """The same for only some of the new latents."""
        known = self.tokens.shape[1]
        times = self.positions[0, known:, 0]
        rows = (times == times[0]).sum()  # tokens of a latent: they share its time
        new = torch.arange(len(times), device=times.device).unflatten(0, (-1, int(rows)))[frames].flatten()
        index = torch.cat([torch.arange(known, device=times.device), known + new])
        return self._replace(
            positions=self.positions[:, index],
            rope=self.rope[:, index],
            rays=self.rays[:, index],
            correspondences=self.correspondences[:, :, index],
        )


class GuidedSelfAttention(WanSelfAttention):
    """Self-attention whose queries and keys, not values, also see a bias per token."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, transformer_options: dict) -> Tensor:
        """The host's attention; where an engine that shares the tokens out puts its own."""
        return attention.optimized_attention(q, k, v, heads=heads, transformer_options=transformer_options)

    def forward(self, x: Tensor, guide: tuple[Tensor, Callable[[Tensor], Tensor]], transformer_options={}) -> Tensor:  # noqa: B006
        """guide: the rotations of the tokens, and what adds the bias to them."""
        rope, guided = guide
        batch, length = x.shape[:2]
        towards = guided(x)

        def rotated(projected: Tensor) -> Tensor:
            return apply_rope1(projected.view(batch, length, self.num_heads, self.head_dim), rope)

        q, k = rotated(self.norm_q(self.q(towards))), rotated(self.norm_k(self.k(towards)))
        del towards  # as large as all the tokens
        out = self.attend(q.flatten(2), k.flatten(2), self.v(x), self.num_heads, transformer_options)
        for patch in transformer_options.get("patches", {}).get("attn1_patch", []):
            out = patch({"x": out, "q": q, "k": k, "transformer_options": transformer_options})
        return self.o(out)


class Lyra2Block(WanAttentionBlock):
    """A Wan block whose self-attention is guided by rays and correspondences."""

    def __init__(
        self,
        cross_attn_type,
        dim,
        ffn_dim,
        num_heads,
        window_size=(-1, -1),
        qk_norm=True,
        cross_attn_norm=False,
        eps=1e-6,
        *,
        slots: int,
        rank: int,
        operation_settings,
    ):
        super().__init__(
            cross_attn_type, dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps, operation_settings
        )
        self.self_attn = GuidedSelfAttention(
            dim, num_heads, window_size, qk_norm, eps, operation_settings=operation_settings
        )
        linear = operation_settings["operations"].Linear
        placed = {"bias": False, "device": operation_settings["device"], "dtype": operation_settings["dtype"]}
        self.cam_encoder = linear(PATCH**2 * RAY_CHANNELS, dim, **placed)
        encoded = 2 * OCTAVES * PATCH**2 * slots * SLOT_CHANNELS
        self.buffer_encoder = nn.Sequential(linear(encoded, rank, **placed), linear(rank, dim, **placed))

    def forward(
        self,
        x,
        e,
        freqs,
        context,
        context_img_len=257,
        transformer_options={},  # noqa: B006
        *,
        rays: Tensor,
        correspondences: Tensor,
    ):
        """As the host's block; rays (B or 1, L, C) and correspondences (B or 1, L, rank) guide the self-attention.

        The host's sums in fewer passes over the tokens: a norm, its scale and its shift at once, and what guides in one product.
        """
        shift, scale, gate, shift_2, scale_2, gate_2 = (cast_to(self.modulation, x.dtype, x.device)[:, None] + e).unbind(2)
        guide = freqs, partial(self._guided, rays=rays, correspondences=correspondences)
        x = torch.addcmul(x, self.self_attn(modulated(self.norm1, x, shift, scale), guide, transformer_options), gate)
        x = x + self.cross_attn(self.norm3(x), context, context_img_len=context_img_len, transformer_options=transformer_options)
        for patch in transformer_options.get("patches", {}).get("attn2_patch", []):
            x = patch({"x": x, "transformer_options": transformer_options})
        return torch.addcmul(x, self.ffn(modulated(self.norm2, x, shift_2, scale_2)), gate_2)

    def _guided(self, x: Tensor, rays: Tensor, correspondences: Tensor) -> Tensor:
        """x and what rays and correspondences add to it."""
        layers = self.cam_encoder, self.buffer_encoder[1]
        if len(x) > 1 or not all(is_plain(layer, x) for layer in layers):
            return x + (layers[0](rays) + layers[1](correspondences))
        told, weights = torch.cat([rays, correspondences], -1), torch.cat([layer.weight for layer in layers], 1)
        return torch.addmm(x[0], told[0], weights.T)[None]


def modulated(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """shift + norm(x) (1 + scale), shift and scale (B, 1, dim): one pass where all tokens share them."""
    if len(shift) > 1:
        return torch.addcmul(shift, norm(x), 1 + scale)
    return F.layer_norm(x, norm.normalized_shape, (1 + scale).flatten(), shift.flatten(), norm.eps)


def is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer only multiplies by its weight as it lies there: not quantised, cast, offloaded, patched or listened to."""
    host = (getattr(layer, name, ()) for name in ("comfy_cast_weights", "weight_function"))
    others = (vars(layer).get(name) for name in ("forward", "_forward_hooks", "_forward_pre_hooks"))
    weight = layer.weight
    return not any((*host, *others)) and type(weight.data) is Tensor and (weight.dtype, weight.device) == (x.dtype, x.device)


class Lyra2Model(WanModel):
    """The transformer; `framepack` is its layout in FramePackLayout's notation, `rank` the width of the correspondences.

    Takes the new latents (B, 36, T, h, w), noisy latents | mask | condition latents, and HistoryMaps or their
    HistoryTokens; predicts the velocity (B, 16, T, h, w), noise minus image. h and w are even. One of the model type "t2v"
    does without CLIP's view of the newest frame.
    """

    def __init__(self, framepack: str, rank: int, device=None, dtype=None, operations=None, **wan):
        layout = FramePackLayout.parse(framepack)

        def block(*args, **kwargs):
            return Lyra2Block(*args, slots=layout.slots("spatial"), rank=rank, **kwargs)

        super().__init__(**wan, wan_attn_block_class=block, device=device, dtype=dtype, operations=operations)
        self.layout, self.rank = layout, rank
        # float32 as the host keeps the usual patch embedding
        self.clean_patch_embeddings = nn.ModuleList(
            operations.Linear(self.in_dim * prod(s.patch), self.dim, device=device, dtype=torch.float32)
            for s in self.layout.segments
        )
        # the reference computes time and head in float32 from low-precision weights; so does a layer that casts its own
        for layer in (self.time_embedding[0], self.time_embedding[2], self.time_projection[1], self.head.head):
            layer.comfy_cast_weights = True

    # ------------------------------------------------------------------------------------------ once per chunk

    def encode(self, maps: HistoryMaps, device=None, dtype=None) -> HistoryTokens:
        """All that a chunk's steps share. The maps may lie elsewhere: they move to `device` piece by piece."""
        device, dtype = device or maps.latents.device, dtype or maps.latents.dtype
        height, width = maps.latents.shape[-2:]
        tokens = self.embed_history(maps.latents.to(device, dtype))
        positions = self.positions(height, width, maps.rays.shape[2] - self.layout.slots(), device)
        if maps.frames is not None:  # their place in the whole chunk
            times = positions.new_tensor(maps.frames) + self.layout.slots()
            positions[0, tokens.shape[1] :, 0] = times.repeat_interleave(prod(_grid(height, width)))
        return HistoryTokens(
            tokens=tokens,
            positions=positions,
            rope=self.rope(positions),
            rays=self.ray_tokens(maps.rays.to(device, dtype)),
            correspondences=self.encode_correspondences(maps.correspondences, device, dtype),
        )

    def embed_history(self, latents: Tensor) -> Tensor:
        """Tokens (B, history tokens, dim) of history latents (B, 36, slots, h, w)."""
        parts = latents.split([s.slots for s in self.layout.segments], 2)
        patches = [patchify(part, s.patch) for part, s in zip(parts, self.layout.segments, strict=True)]
        embedded = [embed(p.float()) for embed, p in zip(self.clean_patch_embeddings, patches, strict=True)]
        return torch.cat(embedded, 1).to(latents.dtype)

    def positions(self, height: int, width: int, new_latents: int, device) -> Tensor:
        """(1, L, 3) float32 times, rows and columns of the tokens for latents of this size."""
        grids = (
            torch.cartesian_prod(*(torch.tensor(axis, device=device, dtype=torch.float32) for axis in axes))
            for axes in self.layout.token_positions(height, width, new_latents)
        )
        return torch.cat(list(grids))[None]

    def rope(self, positions: Tensor) -> Tensor:
        """Rotations for positions (1, L, 3): angles are linear in the position, so a mean position has the mean angle."""
        return self.rope_embedder(positions).movedim(1, 2)

    def ray_tokens(self, rays: Tensor) -> Tensor:
        """(B, L, 4 RAY_CHANNELS): 2x2 latents per token, averaged over the window that a history token stands for."""
        *parts, new = rays.split([s.slots for s in self.layout.segments] + [rays.shape[2] - self.layout.slots()], 2)
        pooled = [
            pool(unshuffle(part).float(), s.window).to(rays.dtype)
            for part, s in zip(parts, self.layout.segments, strict=True)
        ]
        return torch.cat([part.flatten(2).mT for part in (*pooled, unshuffle(new))], 1)

    def encode_correspondences(self, maps: Tensor, device, dtype) -> Tensor:
        """(blocks, B, L, rank) from (B, slots SLOT_CHANNELS, spatial slots + new latents, h, w).

        One latent at a time, because the sines and cosines of all tokens would take gigabytes.
        """
        batch, _, frames, height, width = maps.shape
        new = frames - self.layout.slots("spatial")
        length = self.layout.history_tokens(height, width) + new * prod(_grid(height, width))
        out = torch.zeros(len(self.blocks), batch, length, self.rank, device=device, dtype=dtype)
        for (start, segment), frame in zip(self.seen_latents(height, width, new), maps.unbind(2), strict=True):
            encoded = octaves(correspondence_tokens(frame.to(device, dtype), segment))
            for i, block in enumerate(self.blocks):
                out[i, :, start : start + encoded.shape[1]] = block.buffer_encoder[0](encoded)
        return out

    def seen_latents(self, height: int, width: int, new: int) -> Iterator[tuple[int, Segment]]:
        """First token and segment of every latent that has correspondences, in the order of their maps."""
        start = 0
        for segment in (*self.layout.segments, Segment(new, "spatial", 1)):
            per_latent = prod(segment.grid(height, width)[1:])
            if segment.source == "spatial":
                yield from ((start + i * per_latent, segment) for i in range(segment.slots))
            start += prod(segment.grid(height, width))

    # ------------------------------------------------------------------------------------------- once per step

    def _forward(
        self,
        x,
        timestep,
        context,
        clip_fea=None,
        time_dim_concat=None,
        transformer_options={},  # noqa: B006
        history: HistoryMaps | HistoryTokens | None = None,
        **kwargs,
    ):
        if history is None:
            raise ValueError("a Lyra 2 model needs a chunk's history in its conditioning: use Lyra2ChunkConditioning")
        if isinstance(history, HistoryMaps):
            history = self.encode(history)
        new = self.patch_embedding(x.float()).to(x.dtype)
        grid = tuple(new.shape[2:])
        transformer_options["grid_sizes"] = grid
        new = new.flatten(2).mT
        time = self.time_embedding(sinusoid(timestep.flatten(), self.freq_dim))[:, None]
        tokens = self.run_blocks(
            torch.cat([for_batch(history.tokens, len(x)), new], 1),
            self.time_projection(time).unflatten(2, (6, self.dim)).to(x.dtype),
            self._scaled_rope(history, transformer_options),
            self._context(context, clip_fea),
            clip_fea.shape[1] if self.img_emb is not None else 0,
            for_batch(history.rays, len(x), shared=True),
            [for_batch(part, len(x), shared=True) for part in history.correspondences],
            transformer_options,
            {"x": x, "vec": time, "img_offset": history.tokens.shape[1]},
        )
        return self.unpatchify(self.head(tokens[:, -new.shape[1] :].float(), time), grid)

    def _context(self, text: Tensor, image: Tensor | None) -> Tensor:
        """What cross-attention reads: the picture first, if this network looks at one, then the text."""
        text = self.text_embedding(text)
        return text if self.img_emb is None else torch.cat([self.img_emb(image), text], 1)

    def run_blocks(
        self, tokens, modulation, rope, context, image_tokens, rays, correspondences, transformer_options, patch_args
    ) -> Tensor:
        """The transformer proper: all that is per token has the L tokens on axis 1, so an engine may split them."""
        transformer_options = free_to_choose(transformer_options, tokens)
        patches, replaced = (transformer_options.get(key, {}) for key in ("patches", "patches_replace"))
        transformer_options["total_blocks"] = len(self.blocks)
        transformer_options["block_type"] = "double"
        for i, block in enumerate(self.blocks):
            transformer_options["block_index"] = i

            def run(args, block=block, i=i):
                out = block(
                    args["img"],
                    e=args["vec"],
                    freqs=args["pe"],
                    context=args["txt"],
                    context_img_len=image_tokens,
                    transformer_options=args["transformer_options"],
                    rays=rays,
                    correspondences=correspondences[i],
                )
                return {"img": out}

            args = {
                "img": tokens,
                "txt": context,
                "vec": modulation,
                "pe": rope,
                "transformer_options": transformer_options,
            }
            replacement = replaced.get("dit", {}).get(("double_block", i))
            tokens = (replacement(args, {"original_block": run}) if replacement else run(args))["img"]
            for patch in patches.get("double_block", []):
                args = {"img": tokens, "block_index": i, "transformer_options": transformer_options, **patch_args}
                tokens = patch(args)["img"]
        return tokens

    def _scaled_rope(self, history: HistoryTokens, transformer_options) -> Tensor:
        """The rotations, with the scales and shifts that a ScaleROPE node asks for."""
        options = transformer_options.get("rope_options")
        if not options:
            return history.rope
        axes = ("t", "y", "x")
        scale = history.positions.new_tensor([options.get(f"scale_{axis}", 1.0) for axis in axes])
        shift = history.positions.new_tensor([options.get(f"shift_{axis}", 0.0) for axis in axes])
        return self.rope(history.positions * scale + shift)


# ------------------------------------------------------------------------------------------------------- tensor crossings


def _grid(height: int, width: int) -> tuple[int, int]:
    return height // PATCH, width // PATCH


def pad_end(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Repeat the last entry along the last three axes until they have these sizes."""
    for axis, size in zip((-3, -2, -1), sizes, strict=True):
        if x.shape[axis] < size:
            last = x.narrow(axis, x.shape[axis] - 1, 1)
            missing = [size - x.shape[axis] if a == x.ndim + axis else -1 for a in range(x.ndim)]
            x = torch.cat([x, last.expand(missing)], axis)
    return x


def windowed(x: Tensor, window: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) as (B, C, t, wt, h, wh, w, ww), the end repeated where a window sticks out."""
    counts = [-(-length // step) for length, step in zip(x.shape[2:], window, strict=True)]
    x = pad_end(x, tuple(count * step for count, step in zip(counts, window, strict=True)))
    return (
        x.unflatten(4, (counts[2], window[2])).unflatten(3, (counts[1], window[1])).unflatten(2, (counts[0], window[0]))
    )


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Tokens (B, L, C pt ph pw), the channel slowest, of latents (B, C, T, h, w)."""
    return windowed(x, patch).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def pool(x: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Means over windows of (B, C, T, H, W)."""
    return windowed(x, window).mean((3, 5, 7))


def unshuffle(x: Tensor) -> Tensor:
    """(B, C, T, h, w) -> (B, 4 C, T, h / 2, w / 2): 2x2 latents become channels, the old channel slowest."""
    return F.pixel_unshuffle(x.movedim(2, 1), PATCH).movedim(1, 2)


def correspondence_tokens(maps: Tensor, segment: Segment) -> Tensor:
    """Tokens (B, n, 4 C) of one latent's maps (B, C, h, w); coarser segments average whole windows first."""
    rows, columns = segment.grid(*maps.shape[-2:])[1:]
    if segment.kernel > 1:
        maps = F.avg_pool2d(maps.float(), segment.kernel).to(maps.dtype)
    maps = pad_end(maps, (maps.shape[1], PATCH * rows, PATCH * columns))
    return F.pixel_unshuffle(maps, PATCH).flatten(2).mT


def widened(embedding: Tensor, segment: Segment) -> Tensor:
    """A patch embedding (dim, C PATCH^2) stretched to a segment's patches: where training starts from a plain Wan.

    Each value is repeated over the pixels that take its pixel's place and divided by their number.
    """
    window = segment.window
    patches = embedding.unflatten(1, (-1, 1, PATCH, PATCH))
    for axis, count in zip((2, 3, 4), window, strict=True):
        patches = patches.repeat_interleave(count, axis)
    return patches.flatten(1) / prod(window)


def octaves(x: Tensor) -> Tensor:
    """(B, n, C) -> (B, n, 4 C): sines, then cosines, of pi x and then of 2 pi x, computed in float32."""
    angles = [x.float() * (pi * 2**octave) for octave in range(OCTAVES)]
    return torch.cat([f(angle).to(x.dtype) for angle in angles for f in (torch.sin, torch.cos)], -1)


def sinusoid(timesteps: Tensor, channels: int) -> Tensor:
    """Float32 embedding (B, channels) of timesteps 0 .. 1000, cosines first; float64 inside as in the reference."""
    half = channels // 2
    precise = torch.float64 if supports_fp64(timesteps.device) else torch.float32
    rates = 10000 ** -(torch.arange(half, device=timesteps.device, dtype=precise) / half)
    angles = timesteps.to(precise)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def for_batch(x: Tensor, batch: int, shared: bool = False) -> Tensor:
    """Repeat the samples of x in turn until there are `batch`; a single one stays a view, or itself where it may be shared."""
    if len(x) in (batch, 1):
        return x if len(x) == batch or shared else x.expand(batch, *x.shape[1:])
    return x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch]
