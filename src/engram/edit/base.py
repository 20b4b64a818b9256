"""TODO edit.base"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from engram.edit.delta import Delta
from engram.errors import BaseMismatchError, UnsupportedModelError
from engram.modules.weights import is_transposed, quantisation, values

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel
from engram.edit.in_force import _LAID, _with_beside
from engram.edit.stack import _mismatch
from engram.modules.fingerprints import _name, fingerprint


def describe_base(lm: LanguageModel, names: Iterable[str]) -> dict[str, Any]:
    """What `Edit.base` holds about the weights that an edit is made on, as they are now.

    Of a quantised weight it describes the numbers that the packed integers stand for, in float32,
    and says how they were packed; so an edit that was made on it also fits the same weight unpacked
    (`quantised.dequantised`).

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
            "sha256": _with_beside(fingerprint(weight), module),
            "dtype": _name(weight.dtype),
            "shape": list(weight.shape),
            "transposed": is_transposed(module),
        }
        if (scheme := quantisation(module)) is not None:
            tensors[name]["quantised"] = scheme
    return {"model": lm.name, "model_type": lm.model.config.model_type, "tensors": tensors}


def editable(lm: LanguageModel) -> list[str]:
    """Names of all weights that an edit can be laid on: floating-point matrices of linear maps, in
    memory.
    """
    linear = {
        f"{name}.weight": each
        for name, each in lm.model.named_modules()
        if isinstance(each, nn.Linear | Conv1D)
    }
    weights = {name: lm.model.get_parameter(name) for name in linear}
    return [
        name
        for name, weight in weights.items()
        if weight.is_floating_point() and not weight.is_meta
    ]


def check_base(module: nn.Module, delta: Delta, made_on: Mapping[str, Any]) -> None:
    """Raise unless a change fits beside the weight as it is: what is compared, and when it fits, is
    as in `Stack.with_delta`.

    Raises:
        BaseMismatchError: neither the weight that the change was made on, nor that weight with the
            edits that lie there now.
    """
    dtype, weight = getattr(torch, made_on["dtype"]), values(module)
    layers = _LAID.get(weight)
    base = layers[-1].stack.base if layers else weight
    now = _with_beside(fingerprint(weight, dtype), module)
    if made_on["sha256"] not in (fingerprint(base, dtype), now):
        raise BaseMismatchError(_mismatch(base, dtype, made_on, quantisation(module)))


def linear_module_of(lm: LanguageModel, name: str) -> nn.Module:
    """The linear module whose weight is the parameter of that name.

    Raises:
        BaseMismatchError: no such parameter; UnsupportedModelError: not the weight of a linear map.
    """
    home, _, leaf = name.rpartition(".")
    try:
        module, _parameter = lm.model.get_submodule(home), lm.model.get_parameter(name)
    except AttributeError as error:
        raise BaseMismatchError(
            f"{lm.name!r} ({lm.model.config.model_type}) has no parameter {name!r}; expected a model of the "
            "family that the edit was made on (Edit.base names it)"
        ) from error
    if leaf != "weight":
        raise UnsupportedModelError(
            f"{name} cannot be edited; expected the weight matrix of a linear map"
        )
    is_transposed(module)
    return module
