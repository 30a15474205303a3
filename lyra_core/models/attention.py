"""Attention by the fastest kernel of torch's, where the host leaves the kernel to torch.

The host puts FlashAttention 2 first. On Hopper cuDNN's is a third faster for a chunk's tokens, and a tenth faster again without
the last keys that fill no tile; elsewhere it may be slower or missing. So each device, precision and size is measured once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from comfy.ldm.modules import attention as host
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import kernels

WORTHWHILE = 2**23  # products of queries and keys from which on a measurement pays
TILE = 128  # keys that cuDNN takes at a time
OVERRIDE = "optimized_attention_override"  # where the host lets nodes put an attention of their own

Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def free_to_choose(transformer_options: dict, tokens: Tensor) -> dict:
    """The same options; on a GPU with a choice of ours where nobody chose: no flag of the host's, no node, no compiler."""
    nobody = host.optimized_attention is host.attention_pytorch and OVERRIDE not in transformer_options
    if not (nobody and tokens.is_cuda) or torch.compiler.is_compiling():
        return transformer_options
    return {**transformer_options, OVERRIDE: fastest}


def fastest(theirs: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **options) -> Tensor:
    """The host's contract of an override: (B, L, heads * width) of queries so, keys and values (B, S, heads * width)."""
    if mask is not None or not _worth_a_choice(q, k):
        return theirs(q, k, v, heads=heads, mask=mask, **options)
    return _chosen(q, k, v, heads)(q, k, v, heads)


def _worth_a_choice(q: Tensor, k: Tensor) -> bool:
    return (
        q.is_cuda
        and q.ndim == 3
        and q.dtype in (torch.float16, torch.bfloat16)
        and not (torch.is_grad_enabled() and q.requires_grad)
        and prod(q.shape[:2]) * k.shape[1] >= WORTHWHILE
    )


def _chosen(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Kernel:
    kind = ("attention", q.device, q.dtype, tuple(q.shape), k.shape[1], heads)
    tiles = (in_tiles,) if k.shape[1] % TILE and k.shape[1] > TILE else ()
    return kernels.fastest(kind, (by_host, by_cudnn, *tiles), q, k, v, heads)


def by_host(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return host.attention_pytorch(q, k, v, heads=heads)


def by_cudnn(q: Tensor, k: Tensor, v: Tensor, heads: int, kernel: SDPBackend = SDPBackend.CUDNN_ATTENTION) -> Tensor:
    """By this kernel of torch's; RuntimeError where it can't."""
    q, k, v = _by_heads(heads, q, k, v)
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def cudnn_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, H, L, W) by cuDNN, and the logarithms (B, H, L) of what its weights were divided by."""
    out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, sums.view(out.shape[:3])


def in_tiles(q: Tensor, k: Tensor, v: Tensor, heads: int, kernel: Callable = cudnn_sums) -> Tensor:
    """By cuDNN for as many keys as fill whole tiles and for the rest apart, brought together by what their weights sum to."""
    whole = k.shape[1] - k.shape[1] % TILE
    q, k, v = _by_heads(heads, q, k, v)
    (most, of_most), (rest, of_rest) = (kernel(q, k[:, :, part], v[:, :, part]) for part in (slice(whole), slice(whole, None)))
    share = torch.sigmoid(of_rest - of_most)[..., None].to(most)
    return torch.lerp(most, rest, share).transpose(1, 2).flatten(2)


def _by_heads(heads: int, *tensors: Tensor) -> list[Tensor]:
    return [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in tensors]
