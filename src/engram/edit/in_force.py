"""TODO edit.in_force"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from engram.edit.delta import Delta

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel
from engram.edit.stack import Stack
from engram.modules.fingerprints import fingerprint


def edited(lm: LanguageModel) -> list[str]:
    """Names of the weights that edits lie on at the moment."""
    return [name for name, weight in lm.model.named_parameters() if weight in _LAID]


@dataclass
class _Layer:
    """One edit's change on one parameter: what to put back, and the stack while it lies there."""

    saved: Tensor
    stack: Stack


# parameter (by identity, so tied weights are one) -> its layers, first laid first
_LAID: MutableMapping[Tensor, list[_Layer]] = WeakTensorKeyDictionary()


# module -> the changes that lie beside its weight (see attaching), first laid first
BESIDE: MutableMapping[nn.Module, list[Delta]] = WeakKeyDictionary()


def _with_beside(sha256: str, module: nn.Module) -> str:
    """What an edit made now is made on: the weight, and what lies beside it."""
    factors = [
        fingerprint(factor)
        for delta in BESIDE.get(module, ())
        for factor in delta.factors().values()
    ]
    return hashlib.sha256(" ".join([sha256, *factors]).encode()).hexdigest() if factors else sha256


def beside(model: nn.Module) -> list[str]:
    """What lies beside the weights of a model, module by module: part of what it computes, and in
    none of its tensors.
    """
    lying = {name: BESIDE[module] for name, module in model.named_modules() if module in BESIDE}
    return [
        f"{name} {fingerprint(factor)}"
        for name, deltas in lying.items()
        for d in deltas
        for factor in d.factors().values()
    ]
