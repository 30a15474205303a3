"""One world on several GPUs: each of N processes does a share of the transformer's tokens.

Every process runs the whole workflow (`tools/comfy.py run --gpus N` starts them) and comes to the same tensors; only the
blocks are shared out. A process keeps a run of the L tokens. For self-attention the processes swap, so that each has all
tokens of some of the heads, and swap back (DeepSpeed's Ulysses); nothing else looks from one token at another.

Why not another engine: Raylight and xFuser swap in the same way, but bring their own forward pass for each network they know.
Raylight takes this one for a Wan, because it is derived from it, and would leave out what guides its attention; xFuser needs
diffusers' pipelines. torch's context_parallel wants lengths that N divides and has kernels for CUDA only, so that nothing of
it can be tried without cards. Plain collectives are less than either would need here, and gloo has them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .lyra2 import GuidedSelfAttention, Lyra2Model

log = logging.getLogger(__name__)
RANK, RANKS, MEETING = "LYRA2_RANK", "LYRA2_RANKS", "LYRA2_MEETING"  # this process's number, how many, host:port of the first
SHARES = "lyra2_token_shares"  # in the options of a forward pass: how many tokens each process has
PATCHES = ("double_block", "attn1_patch")  # of other nodes: they would see a share and take it for all tokens


def join(environment: Mapping[str, str] = os.environ) -> bool:
    """Take part in what these variables say, from now on and in every Lyra 2 model; False if they say nothing."""
    if RANK not in environment:
        return False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rank, ranks = int(environment[RANK]), int(environment[RANKS])
    dist.init_process_group(backend, init_method=f"tcp://{environment[MEETING]}", rank=rank, world_size=ranks)
    Lyra2Model.run_blocks = run_share(Lyra2Model.run_blocks)
    GuidedSelfAttention.attend = staticmethod(attend_together)
    log.info("this is process %d of %d that share out the tokens, over %s", rank, ranks, backend)
    return True


def shares(length: int, ranks: int) -> list[int]:
    """How many tokens each process has, the first ones one more where it does not come out even."""
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


def run_share(run_blocks):
    """Lyra2Model.run_blocks for this process's tokens; returns all of them."""

    def run(self, tokens, modulation, rope, context, image_tokens, rays, correspondences, transformer_options, patch_args) -> Tensor:
        check(transformer_options, self.num_heads)
        agree(tokens)
        sizes, rank = shares(tokens.shape[1], dist.get_world_size()), dist.get_rank()
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        own = run_blocks(
            self, tokens[:, mine], modulation, rope[:, mine], context, image_tokens, rays[:, mine],
            [part[:, mine] for part in correspondences], {**transformer_options, SHARES: sizes}, patch_args,
        )  # fmt: skip
        return torch.cat(swap([own] * len(sizes), [(len(own), size, own.shape[2]) for size in sizes]), 1)

    return run


def check(transformer_options: Mapping, heads: int) -> None:
    """ValueError for what can't be shared out."""
    ranks = dist.get_world_size()
    if heads % ranks:
        raise ValueError(f"{heads} heads can't be shared by {ranks} GPUs; take one of {[n for n in range(1, heads + 1) if heads % n == 0]}")
    used = [name for name in PATCHES if transformer_options.get("patches", {}).get(name)]
    if used or transformer_options.get("patches_replace", {}).get("dit"):
        raise ValueError(f"another node patches the model's blocks ({', '.join(used) or 'dit'}), which needs all tokens: run it on one GPU")


def agree(tokens: Tensor) -> None:
    """RuntimeError unless every process is at the same step: mixed up, they would make a picture of two."""
    sums = tokens.float()
    mine = torch.stack([*sums.new_tensor(tokens.shape[:2]), sums.mean(), sums.std()])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    if any(not torch.allclose(one, mine, rtol=0.02, atol=1e-3) for one in theirs):
        raise RuntimeError("the GPUs are not at the same step of the workflow; begin again with a world that none of them has open")


attend_alone = GuidedSelfAttention.attend  # as it is before `join`


def attend_together(q: Tensor, k: Tensor, v: Tensor, heads: int, transformer_options: dict) -> Tensor:
    """Self-attention of all tokens, of which this process has a share (B, l, heads * width)."""
    sizes = transformer_options[SHARES]
    ranks, (batch, own, width) = len(sizes), q.shape
    there, back = ([(batch, size, width // ranks) for size in lengths] for lengths in (sizes, [own] * ranks))
    q, k, v = (torch.cat(swap(x.chunk(ranks, 2), there), 1) for x in (q, k, v))
    out = attend_alone(q, k, v, heads // ranks, transformer_options)
    return torch.cat(swap(out.split(sizes, 1), back), 2)


def swap(parts, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Part r goes to process r; from each one comes a tensor of these shapes."""
    sent = torch.cat([part.flatten() for part in parts])
    lengths = [torch.Size(shape).numel() for shape in shapes]
    got = sent.new_empty(sum(lengths))
    dist.all_to_all_single(got, sent, lengths, [part.numel() for part in parts])
    return [part.view(shape) for part, shape in zip(got.split(lengths), shapes, strict=True)]
