"""Words as vectors: a table in place of a text encoder, for small models that learn with a closed vocabulary.

The host's CLIPLoader knows no text encoder of less than a hundred million weights. A checkpoint may bring its own: this one
lies under text_encoders. of a Lyra 2 checkpoint, and the stock CheckpointLoaderSimple makes a CLIP of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn

from ..files import FileError

TABLE, VOCABULARY = "table.weight", "vocabulary"  # (1 + words, width), the first for all unknown; uint8, a word a line
MOST_TEXT = 1 << 16  # bytes of a vocabulary

log = logging.getLogger(__name__)


def weights(words: Sequence[str], width: int, seed: int = 0) -> dict[str, Tensor]:
    """A table of random vectors; what they mean is learned by the network that reads them."""
    table = torch.randn(1 + len(words), width, generator=torch.Generator().manual_seed(seed))
    return {TABLE: table, VOCABULARY: torch.tensor(list("\n".join(words).encode()), dtype=torch.uint8)}


def target(state: Mapping[str, Tensor], prefix: str) -> ClipTarget | None:
    """How the host makes a CLIP of a checkpoint that has a table; None for one that has none."""
    table = state.get(prefix + TABLE)
    if table is None or prefix + VOCABULARY not in state:
        return None
    words = vocabulary(state[prefix + VOCABULARY])
    if table.ndim != 2 or len(table) != 1 + len(words):
        raise FileError(f"{prefix}{TABLE} is {tuple(table.shape)} for {len(words)} words; it needs a row for each and one more")
    return ClipTarget(Tokenizer, partial(Table, tuple(table.shape)))


def vocabulary(text: Tensor) -> list[str]:
    """The words that `weights` wrote; FileError for anything else."""
    if text.dtype != torch.uint8 or text.numel() > MOST_TEXT:
        raise FileError(f"the checkpoint's vocabulary is {tuple(text.shape)} {text.dtype}, no text")
    try:
        return bytes(text.flatten().tolist()).decode().split("\n")
    except UnicodeDecodeError:
        raise FileError("the checkpoint's vocabulary is no UTF-8 text") from None


class Tokenizer:
    """The host's contract: text -> numbers of words, and how much each counts (always 1)."""

    def __init__(self, embedding_directory=None, tokenizer_data: Mapping = {}):  # noqa: B006  the host's signature
        self.words = vocabulary(tokenizer_data[VOCABULARY])
        self.numbers = {word: number for number, word in enumerate(self.words, 1)}

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict[str, list]:
        found = re.findall(r"\w+", text.lower())
        if unknown := sorted({word for word in found if word not in self.numbers}):
            log.warning("this small model does not know the words %s; it knows %s", ", ".join(unknown), " ".join(self.words))
        tokens = [(self.numbers.get(word, 0), 1.0) for word in found]
        return {"words": [[(*token, place) for place, token in enumerate(tokens)] if return_word_ids else tokens]}

    def untokenize(self, token_weight_pairs) -> list:
        return [(pair, ["?", *self.words][pair[0]]) for pair in token_weight_pairs]

    def state_dict(self) -> dict[str, Tensor]:
        return {VOCABULARY: torch.tensor(list("\n".join(self.words).encode()), dtype=torch.uint8)}


class Table(nn.Module):
    """The host's contract of a text encoder: numbers of words -> (1, words, width), each with its place in the text."""

    def __init__(self, shape: tuple[int, int], dtype=None, device="cpu", model_options: Mapping = {}):  # noqa: B006
        super().__init__()
        self.table = nn.Embedding(*shape, dtype=torch.float32, device=device)
        self.dtypes = {torch.float32}

    def set_clip_options(self, options) -> None:
        """There are no layers to choose from."""

    def reset_clip_options(self) -> None:
        """Nor any choice to take back."""

    def encode_token_weights(self, tokens: Mapping[str, list]) -> tuple[Tensor, None]:
        numbers = [token[0] for batch in tokens["words"] for token in batch]
        return self(numbers).cpu(), None

    def forward(self, numbers: Sequence[int]) -> Tensor:
        """(1, words, width); at least one row, for an empty text."""
        index = torch.tensor(numbers or [0], device=self.table.weight.device)
        return (self.table(index) + places(len(index), self.table.embedding_dim).to(index.device))[None]

    def load_sd(self, state: Mapping[str, Tensor]):
        return self.load_state_dict({TABLE: state[TABLE]}, strict=False)


def places(count: int, width: int) -> Tensor:
    """(count, width) sines and cosines that tell places in a text from each other."""
    rates = torch.exp(-torch.arange(0, width, 2) * (6.0 / width))
    angles = torch.arange(count)[:, None] * rates
    return torch.stack([torch.sin(angles), torch.cos(angles)], -1).flatten(1)[:, :width]
