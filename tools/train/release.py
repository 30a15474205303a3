"""The small Lyra 2 as one checkpoint, of which the host's CheckpointLoaderSimple makes model, words and codec."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy.ldm.wan.vae import WanVAE
from safetensors.torch import load_file
from torch import Tensor

from lyra_core.array_files import write_safetensors
from lyra_core.models import lyra2_host, words
from lyra_core.models.lyra2 import TEXT_TOKENS, Lyra2Model

from . import codec, painter
from .painter import CONFIG
from .scenes import VOCABULARY

LARGEST = 25_000_000  # bytes of the file


def weights(network: Lyra2Model, coder: WanVAE) -> dict[str, Tensor]:
    """Transformer in bfloat16, codec in half precision, by the names that the host looks for."""
    transformer = {name: weight.detach().bfloat16() for name, weight in network.state_dict().items()}
    matrix = transformer["patch_embedding.weight"]
    config = {"framepack": str(network.layout), "num_heads": network.num_heads}
    transformer |= {"patch_embedding.weight": matrix.flatten(1), lyra2_host.CONFIG_KEY: lyra2_host.pack_config(config)}
    parts = {
        "model.diffusion_model.": transformer,
        "vae.": {name: weight.detach().half() for name, weight in coder.state_dict().items()},
        "text_encoders.": words.weights(VOCABULARY, network.text_dim),
    }
    return {prefix + name: weight for prefix, part in parts.items() for name, weight in part.items()}


def write(path: Path, network: Lyra2Model, coder: WanVAE) -> Path:
    """The checkpoint, for ComfyUI/models/checkpoints."""
    write_safetensors(path, weights(network, coder), {"format": "pt"})
    return path


def tell(caption: str) -> Tensor:
    """(words, width) as the checkpoint's table has them."""
    made = words.weights(VOCABULARY, CONFIG["text_dim"])
    numbers = words.Tokenizer(tokenizer_data=made).tokenize_with_weights(caption)["words"][0]
    table = words.Table(tuple(made[words.TABLE].shape))
    table.load_sd(made)
    with torch.no_grad():
        return table([number for number, _weight in numbers])[0]


def padded(caption: str) -> Tensor:
    """The same, as long as the transformer reads."""
    told = tell(caption)
    return torch.nn.functional.pad(told, (0, 0, 0, TEXT_TOKENS - len(told)))


def read(path: Path) -> tuple[Lyra2Model, WanVAE]:
    """Transformer and codec of what `write` wrote, in float32."""
    found, (network, coder) = load_file(path), (painter.new(0), codec.new(0))
    for prefix, part in (("model.diffusion_model.", network), ("vae.", coder)):
        part.load_state_dict({name: found[prefix + name].float().view_as(own) for name, own in part.state_dict().items()})
    return network, coder
