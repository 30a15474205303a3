"""Self-attention by the fastest kernel of torch's, where the host leaves the kernel to torch.

The host puts FlashAttention 2 first. On Hopper cuDNN's is a third faster for a chunk's tokens, elsewhere it may be slower or
missing; so each device, precision and size is measured once, when it first comes.
"""

from __future__ import annotations

import logging
from math import inf, prod

import torch
import torch.nn.functional as F
from comfy.ldm.modules import attention as host
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TRIES = 2  # of each kernel, after one to warm up
WORTHWHILE = 2**24  # products of queries and keys from which on a measurement pays

log = logging.getLogger(__name__)
_faster: dict[tuple, bool] = {}  # device, precision, size and heads -> whether cuDNN was faster there


def self_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, transformer_options: dict) -> Tensor:
    """(B, L, heads * width) of queries, keys and values of that shape: the host's attention, or cuDNN's where it is faster."""
    if _free_to_choose(q, transformer_options) and _cudnn_is_faster(q, k, v, heads):
        return by_cudnn(q, k, v, heads)
    return host.optimized_attention(q, k, v, heads=heads, transformer_options=transformer_options)


def _free_to_choose(q: Tensor, transformer_options: dict) -> bool:
    """Whether nobody chose a kernel: no flag of the host's, no node, no compiler; and whether there is one to choose."""
    return (
        host.optimized_attention is host.attention_pytorch
        and "optimized_attention_override" not in transformer_options
        and q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and not (torch.is_grad_enabled() and q.requires_grad)
        and not torch.compiler.is_compiling()
        and prod(q.shape[:2]) * q.shape[1] >= WORTHWHILE
    )


def by_cudnn(q: Tensor, k: Tensor, v: Tensor, heads: int, kernel: SDPBackend = SDPBackend.CUDNN_ATTENTION) -> Tensor:
    """As `self_attention`, by this kernel of torch's; RuntimeError where it can't."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _cudnn_is_faster(q: Tensor, k: Tensor, v: Tensor, heads: int) -> bool:
    """Measured on these very tensors, because a card that is full of weights has no room for others."""
    kind = (q.device, q.dtype, tuple(q.shape), heads)
    if kind not in _faster:
        theirs = milliseconds(lambda: host.attention_pytorch(q, k, v, heads=heads))
        try:
            ours = milliseconds(lambda: by_cudnn(q, k, v, heads))
        except RuntimeError as reason:  # no kernel for this card, this torch or this width, or no memory for it
            log.info("no attention by cuDNN for %s: %s", kind, reason)
            ours = inf
        log.info("attention of %s: %.1f ms by cuDNN, %.1f ms by the host's first choice", kind, ours, theirs)
        _faster[kind] = ours < theirs
    return _faster[kind]


def milliseconds(run) -> float:
    """The fastest of some tries on the current CUDA device."""
    run()
    times = []
    for _ in range(TRIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
