"""A weight and the changes on it, summed and rounded together.

Knows one tensor and low-rank changes. Refuses to know models and which edits are in force.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from engram.edit.delta import Delta
from engram.errors import BaseMismatchError, NonFiniteError
from engram.modules.fingerprints import dtype_name, fingerprint


def merge(weight: Tensor, deltas: Sequence[Delta], *, transposed: bool) -> Tensor:
    """Return `weight` + deltas, summed in float32 (in float64 where one of them is) and rounded
    once into the dtype of `weight`.

    Args:
        weight: on the CPU, as stored: [out, in], or [in, out] where `transposed`; not changed.
    Raises:
        NonFiniteError: the sum does not fit the dtype.
    """
    wide = reduce(
        torch.promote_types,
        (delta.left.dtype for delta in deltas),
        torch.promote_types(weight.dtype, torch.float32),
    )
    # All changes are added before the one rounding: rounding after each would make the result
    # depend on their order.
    total = weight.to(wide, copy=True)
    for delta in deltas:
        dense = delta.dense(wide)
        total += dense.T if transposed else dense
    merged = total.to(weight.dtype)
    # After the cast: a sum within float32 may be beyond float16, whose largest number is 65,504.
    if not merged.isfinite().all():
        raise NonFiniteError(
            f"the edited weight does not fit {dtype_name(weight.dtype)} (largest "
            f"{float(total.abs().max()):.3g})"
        )
    return merged


@dataclass(frozen=True)
class Stack:
    """A weight and the changes on it: every one computed on `base`, summed and rounded together.

    So edits made on one base give the same weight as their composition, and taking one off is exact
    in any order. An edit made on weights that are edited already starts a stack of its own, with
    those weights as its base:

        base w0; A made on w0       stack (w0; A)        weight round(w0 + A)
        B made on w0, too           stack (w0; A, B)     weight round(w0 + A + B), rounded once
        C made on that weight w1    stack (w1; C)        weight round(w1 + C)

    Attributes:
        base: CPU tensor as stored.
        deltas: in the order in which they were applied.
    """

    base: Tensor
    transposed: bool
    deltas: tuple[Delta, ...] = ()

    def weight(self) -> Tensor:
        return (
            merge(self.base, self.deltas, transposed=self.transposed) if self.deltas else self.base
        )

    def with_delta(self, delta: Delta, made_on: Mapping[str, Any], *, force: bool = False) -> Stack:
        """Return this stack with one change more.

        Args:
            made_on: description of the weight on which the change was computed; it has to be this
                base, or this stack's weight. Both are compared in the recorded dtype, so an edit
                made in float32 on a float16 checkpoint fits the checkpoint too.
            force: apply the change to the present weight whatever it is.
        Raises:
            BaseMismatchError: neither of them.
        """
        # The base comes first: an edit that fits both is summed with the others, rounded once.
        dtype = getattr(torch, made_on["dtype"])
        if fingerprint(self.base, dtype) == made_on["sha256"]:
            return Stack(self.base, self.transposed, (*self.deltas, delta))
        # Only now, since it merges a whole matrix: the usual edit fits the base.
        now = self.weight()
        fits = list(now.shape) == list(made_on["shape"])
        if fits and (force or (self.deltas and fingerprint(now, dtype) == made_on["sha256"])):
            return Stack(now, self.transposed, (delta,))
        raise BaseMismatchError(mismatch(self.base, dtype, made_on))


def mismatch(
    weight: Tensor, dtype: torch.dtype, made_on: Mapping[str, Any], packed: str | None = None
) -> str:
    """Return in words how a weight differs from the one that `made_on` describes.

    Args:
        dtype: in which the two are compared, the recorded one.
        packed: how the weight is quantised, if it is.
    """
    if packed != made_on.get("quantised"):
        now = packed or f"plain {dtype_name(weight.dtype)}"
        then = made_on.get("quantised") or f"plain {made_on['dtype']}"
        return (
            f"not the weight that the edit was made on: it is {now}, the edit was made on {then}. "
            "Load the model that the edit names, in the way it was loaded then, or pass force=True "
            "to apply it all the same"
        )
    if list(weight.shape) != list(made_on["shape"]):
        return (
            f"its shape is {list(weight.shape)}, the edit was made on {made_on['shape']}. "
            "Load the model that the edit names"
        )
    # Only where the model is the coarser one: a float16 weight cannot tell two float32 ones apart.
    coarser = torch.finfo(weight.dtype).eps > torch.finfo(dtype).eps
    hint = (
        f"; the model is in {dtype_name(weight.dtype)} and the edit in {made_on['dtype']}, so "
        "rounding alone may explain it"
    )
    return (
        f"not the weight that the edit was made on (sha256 {fingerprint(weight, dtype)[:12]}, "
        f"expected {made_on['sha256'][:12]}{hint if coarser else ''}). Load the model that the "
        "edit names, or pass force=True to apply it all the same"
    )
