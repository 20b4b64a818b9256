"""Numbers that the published implementations compute on a tiny model; optional, since they are kept
outside the project.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import engram
from engram.model.language_model import LanguageModel
from tests.helpers.paths import SHARED

FOLDER = SHARED / "golden"
needed = pytest.mark.skipif(
    not FOLDER.exists(),
    reason="the published implementations' numbers (shared/golden) are not here",
)


@cache
def inputs() -> dict[str, Any]:
    return json.loads((FOLDER / "inputs.json").read_text())


@cache
def numbers(name: str) -> dict[str, Tensor]:
    """Tensors of one file; symmetric matrices, stored as upper triangles, are made whole."""
    tensors = {}
    with safe_open(str(FOLDER / f"{name}.safetensors"), "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if key.endswith("_triu"):
                size = int((8 * tensor.numel() + 1) ** 0.5 - 1) // 2
                rows, columns = torch.triu_indices(size, size)
                whole = tensor.new_zeros(size, size)
                whole[rows, columns] = whole[columns, rows] = tensor
                key, tensor = key.removesuffix("_triu"), whole
            tensors[key] = tensor
    return tensors


@cache
def model(dtype: torch.dtype = torch.float32) -> LanguageModel:
    return engram.load(FOLDER / "models/tiny-gpt2", dtype=dtype)


def relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())
