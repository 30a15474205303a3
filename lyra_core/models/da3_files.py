"""Depth Anything 3 with a Gaussian head from the files as they were published.

Of the nested model only the part `da3.` matters: the metric branch has no say in the gaussians as soon as cameras are
given. A fine-tuned part is completed by the file it was tuned from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import torch
from torch import Tensor

from ..files import reading
from .da3_gaussians import FLOAT32, MARKER, OnStep, architecture, faults, nothing
from .lyra2_host import listed
from .tensor_files import Entry, read_entries

# the names of the published files' backbone, and the host's
RENAMED = (
    (r"^(cls_token|camera_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.([qk]_norm)\.", r".attention.\1."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
    (r"^norm\.", "layernorm."),
)
BACKBONE = "backbone.pretrained."
QKV = ".attn.qkv."


def host_names(name: str) -> list[str]:
    """A published key under the host's names: one, or the three parts that it is cut into along its first axis."""
    if not name.startswith(BACKBONE):
        return [name]
    name = name.removeprefix(BACKBONE)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    names = [name.replace(QKV, f".attention.attention.{part}.") for part in ("query", "key", "value")]
    return ["backbone." + name for name in (names if QKV in name else [name])]


def host_weights(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights under published names as the host's."""
    for name, weight in weights.items():
        names = host_names(name)
        yield from zip(names, weight.chunk(len(names)) if len(names) > 1 else (weight,), strict=True)


def released_weights(
    source: Path, base: Path | None = None, dtype: torch.dtype | None = None, on_step: OnStep = nothing
) -> dict[str, Tensor]:
    """The weights of a published file under the host's names: the backbone as `dtype`, the heads in float32.

    source: .pt, .pth, .safetensors or a folder of them; the nested model, its part `da3.` alone, or the host's layout.
    base: where the source is a fine-tuned part, the file it was tuned from. on_step: bytes read, and in all.
    FileError if it is another model, or weights are missing or of the wrong size, with their names.
    """
    with reading(source):
        return _released_weights(source, base, dtype, on_step)


def _released_weights(source: Path, base: Path | None, dtype: torch.dtype | None, on_step: OnStep) -> dict[str, Tensor]:
    found = _entries(source)
    rest = {} if base is None else _entries(base)
    if MARKER not in found and MARKER not in rest:
        raise ValueError(
            f"{source} has no Gaussian head ({len(found)} tensors of Depth Anything 3 were found): "
            "take the reconstruction weights of Lyra 2, or Depth Anything 3 giant or nested"
        )
    needed = {**rest, **found}
    total, done = sum(entry.size for entry in needed.values()), 0
    weights: dict[str, Tensor] = {}
    for name, entry in needed.items():
        parts = len(host_names(name))
        if parts > 1 and (not entry.shape or entry.shape[0] % parts):
            raise ValueError(f"{source}: {name} is {entry.shape}, which is not cut into {parts}; download it again")
        kind = torch.float32 if name.startswith(FLOAT32) else dtype or entry.dtype
        weights.update(host_weights({name: entry.read(kind)}))
        done += entry.size
        on_step(done, total)
    if wrong := faults({key: tuple(weight.shape) for key, weight in weights.items()}, _architecture(source, weights)):
        hint = "name the base it was tuned from" if base is None else f"{base} is not its base"
        raise ValueError(f"{source} is not complete, or of another size; {hint}:\n{listed(wrong)}")
    return weights


def _architecture(source: Path, weights: Mapping[str, Tensor]) -> dict:
    try:
        return architecture({key: tuple(weight.shape) for key, weight in weights.items()})
    except ValueError as problem:
        raise ValueError(f"{source}: {problem}. If it is a fine-tuned part, name its base too") from problem


def _entries(source: Path) -> dict[str, Entry]:
    """Entries of the part that makes gaussians, by published or host names without any prefix."""
    entries = {re.sub(r"^(module\.)?(model\.)?", "", e.name): e for e in read_entries(Path(source)) if e.dtype}
    nested = {name.removeprefix("da3."): e for name, e in entries.items() if name.startswith("da3.")}
    parts = ("backbone.", "head.", "gs_head.", "cam_enc.", "cam_dec.")
    return {name: e for name, e in (nested or entries).items() if name.startswith(parts)}


def load(source: Path, base: Path | None = None, dtype: torch.dtype | None = None, on_step: OnStep = nothing):
    """A published file as the host's model patcher; `dtype` of the backbone, by default what the device is best at."""
    device = management.get_torch_device()
    if dtype is None:
        half = (torch.bfloat16, management.should_use_bf16), (torch.float16, management.should_use_fp16)
        dtype = next((kind for kind, usable in half if usable(device)), torch.float32)
    weights = released_weights(source, base, dtype, on_step)
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    if patcher is None:
        width = weights["backbone.embeddings.cls_token"].shape[-1]
        raise ValueError(f"{source}: the host knows no Depth Anything 3 of width {width}; take the giant, 1536 wide")
    return patcher
