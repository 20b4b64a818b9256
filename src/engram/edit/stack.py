"""TODO edit.stack"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.edit.delta import Delta
from engram.errors import BaseMismatchError, NonFiniteError

if TYPE_CHECKING:
    pass
from engram.modules.fingerprints import _name, fingerprint


def merge(weight: Tensor, deltas: Iterable[Delta], *, transposed: bool) -> Tensor:
    """`weight` + deltas, summed in float32 (float64 where one is), rounded once into `weight`'s
    dtype.

    Args:
        weight: on the CPU, as stored: [out, in], or [in, out] where `transposed`; not changed.
    Raises:
        NonFiniteError: the sum does not fit the dtype.
    """
    deltas = list(deltas)
    wide = reduce(
        torch.promote_types,
        (delta.left.dtype for delta in deltas),
        torch.promote_types(weight.dtype, torch.float32),
    )
    total = weight.to(wide, copy=True)
    for delta in deltas:
        dense = delta.dense(wide)
        total += dense.T if transposed else dense
    merged = total.to(weight.dtype)
    if not merged.isfinite().all():
        raise NonFiniteError(
            f"the edited weight does not fit {_name(weight.dtype)} (largest {float(total.abs().max()):.3g})"
        )
    return merged


@dataclass(frozen=True)
class Stack:
    """A weight and the changes that lie on it: every one of them made on `base`, summed and rounded
    together.

    So edits made on one base give the same weight as their composition, and taking one off is exact
    in any order. An edit made on already edited weights starts a stack of its own, with those
    weights as base.

    Attributes:
        base: CPU tensor as stored.
        deltas: in the order they came.
    """

    base: Tensor
    transposed: bool
    deltas: tuple[Delta, ...] = ()

    def weight(self) -> Tensor:
        return (
            merge(self.base, self.deltas, transposed=self.transposed) if self.deltas else self.base
        )

    def with_delta(self, delta: Delta, made_on: Mapping[str, Any], *, force: bool = False) -> Stack:
        """This stack and one change more.

        Args:
            made_on: the edit's record of its base weight; it has to be this base, or this stack's
                weight. Both are compared in the recorded dtype, so an edit made in float32 on a
                float16 checkpoint fits the checkpoint too.
            force: lay the change on the present weight whatever it is.
        Raises:
            BaseMismatchError: neither of them.
        """
        dtype = getattr(torch, made_on["dtype"])
        if fingerprint(self.base, dtype) == made_on["sha256"]:
            return Stack(self.base, self.transposed, (*self.deltas, delta))
        now = self.weight()
        fits = list(now.shape) == list(made_on["shape"])
        if fits and (force or (self.deltas and fingerprint(now, dtype) == made_on["sha256"])):
            return Stack(now, self.transposed, (delta,))
        raise BaseMismatchError(_mismatch(self.base, dtype, made_on))


def _mismatch(
    weight: Tensor, dtype: torch.dtype, made_on: Mapping[str, Any], packed: str | None = None
) -> str:
    if packed != made_on.get("quantised"):
        here, there = (
            packed or f"plain {_name(weight.dtype)}",
            made_on.get("quantised") or f"plain {made_on['dtype']}",
        )
        return (
            f"not the weight that the edit was made on: it is {here}, the edit was made on {there}. Load the model that the edit "
            "names, in the way it was loaded then, or pass force=True to lay the edit on it all the same"
        )
    if list(weight.shape) != list(made_on["shape"]):
        return (
            f"its shape is {list(weight.shape)}, the edit was made on {made_on['shape']}. "
            "Load the model that the edit names"
        )
    coarser = torch.finfo(weight.dtype).eps > torch.finfo(dtype).eps
    hint = (
        f" (it is in {_name(weight.dtype)}, the edit was made in {made_on['dtype']}: rounding may be all)"
        if coarser
        else ""
    )
    return (
        f"not the weight that the edit was made on (sha256 {fingerprint(weight, dtype)[:12]}, expected "
        f"{made_on['sha256'][:12]}){hint}. Load the model that the edit names, or pass force=True to apply "
        "it all the same"
    )
