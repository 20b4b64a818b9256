"""What an edit was computed on: describe a model's weights, and compare them with a description.

Knows how weights are named, stored and hashed, and what is in force on them. Refuses to know edits
as a whole: it sees one module or one change at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engram.edit.in_force import WRITTEN, fingerprint_in_force
from engram.edit.stack import mismatch
from engram.errors import BaseMismatchError, UnsupportedModelError
from engram.modules.fingerprints import dtype_name, fingerprint
from engram.modules.weights import is_transposed, quantisation, values

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel


def describe_base(lm: LanguageModel, names: Iterable[str]) -> dict[str, Any]:
    """Describe these weights as they are now: what `Edit.base` holds.

    Of a quantised weight it describes the numbers that the packed integers represent, in float32,
    and how they were packed; so an edit that was made on it also fits the same weight unpacked
    (`engram.dequantised`).

    Args:
        names: parameters that the edit changes, as in `lm.model.state_dict()`.
    Returns:
        {"model", "model_type", "tensors": {name: {"sha256", "dtype", "shape", "transposed"[,
        "quantised"]}}}.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name in names:
        module = linear_module_of(lm, name)
        weight = values(module)
        tensors[name] = {
            "sha256": fingerprint_in_force(fingerprint(weight), module),
            "dtype": dtype_name(weight.dtype),
            "shape": list(weight.shape),
            "transposed": is_transposed(module),
        }
        if (scheme := quantisation(module)) is not None:
            tensors[name]["quantised"] = scheme
    return {"model": lm.name, "model_type": lm.model.config.model_type, "tensors": tensors}


def editable(lm: LanguageModel) -> list[str]:
    """Return the names of all weights that can be written into: floating-point matrices of linear
    maps, in memory.
    """
    # Embeddings are left out: an edit is a low-rank change of a map, and a table of rows is none.
    weights = {
        f"{name}.weight": module.weight
        for name, module in lm.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return [
        name
        for name, weight in weights.items()
        if weight.is_floating_point() and not weight.is_meta
    ]


def check_base(module: nn.Module, made_on: Mapping[str, Any]) -> None:
    """Raise unless a change may be attached beside the weight as it is; `Stack.with_delta` compares
    the same way.

    Raises:
        BaseMismatchError: neither the weight on which the change was computed, nor that weight with
            the edits that are in force now.
    """
    # Compared in the recorded dtype, so that an edit made in float32 fits a float16 checkpoint.
    dtype, weight = getattr(torch, made_on["dtype"]), values(module)
    below = WRITTEN.get(weight)
    base = below[-1].stack.base if below else weight
    now = fingerprint_in_force(fingerprint(weight, dtype), module)
    if made_on["sha256"] not in (fingerprint(base, dtype), now):
        raise BaseMismatchError(mismatch(base, dtype, made_on, quantisation(module)))


def linear_module_of(lm: LanguageModel, name: str) -> nn.Module:
    """Return the linear module whose weight is the parameter of that name.

    Raises:
        BaseMismatchError: no such parameter; UnsupportedModelError: not the weight of a linear map.
    """
    home, _, leaf = name.rpartition(".")
    try:
        module, _parameter = lm.model.get_submodule(home), lm.model.get_parameter(name)
    except AttributeError as error:
        raise BaseMismatchError(
            f"{lm.name!r} ({lm.model.config.model_type}) has no parameter {name!r}; expected a "
            "model of the family that the edit was made on (Edit.base names it)"
        ) from error
    if leaf != "weight":
        raise UnsupportedModelError(
            f"{name} cannot be edited; expected the weight matrix of a linear map"
        )
    is_transposed(module)  # raises for a module that is not a linear map, such as an embedding
    return module
