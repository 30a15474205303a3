"""What every comparison with golden numbers is made of. One module per golden folder: check_for(golden) is its check."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One comparison, or the reason why there is none."""

    case: str
    metric: str = ""
    value: float = 0.0
    limit: float = 0.0
    skip: str = ""

    @property
    def ok(self) -> bool:
        return self.value <= self.limit  # NaN is not

    def __str__(self) -> str:
        if self.skip:
            return f"{self.case} - - - skip:{self.skip}"
        return f"{self.case} {self.metric} {self.value:.3g} {self.limit:.3g} {'ok' if self.ok else 'FAIL'}"


@dataclass(frozen=True)
class Golden:
    """The files of one name in one folder: what .json, .npz and .safetensors share."""

    folder: Path
    name: str

    @property
    def json(self) -> object:
        return json.loads((self.folder / f"{self.name}.json").read_text(encoding="utf-8"))

    @property
    def arrays(self) -> dict[str, Tensor]:
        """Everything in the npz; 0-d arrays too."""
        with np.load(self.folder / f"{self.name}.npz", allow_pickle=False) as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything in the safetensors file; int8 that the JSON lists under q8 stands for q 2^-e."""
        exponents = self.json.get("q8", {})
        stored = load_file(self.folder / f"{self.name}.safetensors")
        return {
            key: value.float() * 2.0 ** -exponents[key] if key in exponents else value for key, value in stored.items()
        }

    def beside(self, name: str) -> Golden:
        return Golden(self.folder, name)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def distance(found: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected values; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def furthest(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite if the shapes differ."""
    return float((found.double() - expected.double()).abs().max()) if found.shape == expected.shape else math.inf
