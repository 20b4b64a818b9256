"""Put changes of weights in force on a model in memory, and take them off again, bit for bit.

Knows weights, how they are stored, and which changes are in force. Refuses to know files and how
edits are made. There are two ways: `written` changes the weights themselves; `attached`
(attached.py) adds the change to a module's output, for weights that cannot be written into.
`applied` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from engram.checks import one_of
from engram.edit.attached import attached
from engram.edit.base import linear_module_of
from engram.edit.changes import WeightChanges
from engram.edit.in_force import ATTACHED, WRITTEN, WrittenEdit
from engram.edit.stack import Stack, merge
from engram.errors import BaseMismatchError, NonFiniteError, UnsupportedModelError
from engram.modules.weights import is_transposed, is_writable, quantisation

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel

How = Literal["auto", "weights", "beside"]


@contextmanager
def applied(
    changes: WeightChanges, lm: LanguageModel, *, how: How = "auto", force: bool = False
) -> Iterator[LanguageModel]:
    """Put `changes` in force on `lm` for the length of the block.

    Args:
        how: "weights" writes into the weights; "beside" leaves them alone and adds the change to
            the module's output; "auto" writes where every weight can be written into and nothing is
            attached beside one of them, and attaches otherwise. Changes that were computed beside
            others were not computed on the bare weight, so they are attached too.
        force: apply also to weights on which the changes were not computed; their shape has to fit.
    Yields:
        `lm`.
    Raises:
        SettingError: no such `how`.
        BaseMismatchError: the weights are not those on which the changes were computed; nothing is
            changed.
        NonFiniteError: an edited weight does not fit the model's dtype; nothing is changed.
        UnsupportedModelError: how="weights" on quantised or offloaded weights; how="beside" on a
            weight that other modules use too.
    """
    one_of("how", how, get_args(How))
    if how == "auto":
        # An edit computed beside an attached one fits the weight together with that one only.
        on_top = any(ATTACHED.get(linear_module_of(lm, name)) for name in changes.deltas)
        how = "weights" if can_write(lm, changes.deltas) and not on_top else "beside"
    put_in_force = written if how == "weights" else attached
    with put_in_force(changes, lm, force=force):
        yield lm


def can_write(lm: LanguageModel, names: Iterable[str]) -> bool:
    """Return whether all these weights are plain floating point in memory."""
    return all(is_writable(linear_module_of(lm, name)) for name in names)


@contextmanager
def written(
    changes: WeightChanges, lm: LanguageModel, *, force: bool = False
) -> Iterator[LanguageModel]:
    """Write `changes` into the weights for the length of the block; then every bit comes back.

    Blocks nest. Changes made on the unedited model fit inside another edit's block (the result is
    their composition), and so do changes made within that block. Weights are saved on the CPU and
    merged there, so a GPU needs no room.

    Raises: see `applied`.
    """
    done: list[tuple[nn.Parameter, WrittenEdit]] = []
    # Weight by weight, not all merged first: merging needs a copy of one weight at a time, and the
    # `finally` takes back those that were written when a later one does not fit.
    try:
        for name, delta in changes.deltas.items():
            weight, transposed = _weight(lm, name)
            below = WRITTEN.get(weight, [])
            # The bits themselves are saved: subtracting the change again would round differently.
            saved = weight.detach().to("cpu", copy=True)
            # The newest stack knows every change below it, so it is extended and not started again.
            stack = below[-1].stack if below else Stack(saved, transposed)
            try:
                stack = stack.with_delta(delta, changes.made_on(name), force=force)
                merged = stack.weight()
            except (BaseMismatchError, NonFiniteError) as error:
                raise type(error)(f"{name} of {lm.name!r}: {error}") from error
            entry = WrittenEdit(saved, stack)
            done.append((weight, entry))  # before writing: an interrupt now puts `saved` back
            WRITTEN[weight] = [*below, entry]
            _write(weight, merged)
        yield lm
    finally:
        # The newest goes first, as blocks end: tied weights have two entries on one parameter.
        for weight, entry in reversed(done):
            _take_off(weight, entry)


def rounding_cost(changes: WeightChanges, lm: LanguageModel) -> dict[str, float]:
    """Return ||(W_edited - W) - delta|| / ||delta|| of each weight (Frobenius): the share of the
    change that one rounding into the model's dtype loses.

    It is about 1e-6 or less in float32; in half precision it depends on how small the change is
    compared to the weight. It is measured on the unedited weights, also within an edit's block. The
    base is not checked, and `lm` is not changed.
    """
    costs = {}
    for name, delta in changes.deltas.items():
        weight, transposed = _weight(lm, name)
        below = WRITTEN.get(weight)
        base = below[0].saved if below else weight.detach().cpu()
        # Both sides in float64: in float32 the subtraction would lose what is to be measured.
        exact = delta.dense(torch.float64)
        rounded = merge(base, [delta], transposed=transposed).double() - base.double()
        norm = float(exact.norm())
        lost = (rounded.T if transposed else rounded) - exact
        costs[name] = float(lost.norm()) / norm if norm else 0.0
    return costs


@torch.no_grad()
def _write(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value)


def _take_off(weight: Tensor, entry: WrittenEdit) -> None:
    """Take one edit off a weight and put its bits back.

    Blocks may end in another order than they began (an ExitStack, two threads of a notebook). An
    edit below another one hands its bits up and goes when that one goes:

        begun:  A(saved=w0) B(saved=w0+A)
        A ends: B(saved=w0)                the weight keeps w0+A+B
        B ends: the weight is w0 again
    """
    entries = WRITTEN.get(weight, [])
    # Not registered: an interrupt came between the note in `done` and the registry.
    if entry not in entries or entry is entries[-1]:
        _write(weight, entry.saved)
    else:
        entries[entries.index(entry) + 1].saved = entry.saved
    # A new list and an entry that goes when empty: `edited` asks only whether a weight has one.
    if rest := [other for other in entries if other is not entry]:
        WRITTEN[weight] = rest
    else:
        WRITTEN.pop(weight, None)


def _weight(lm: LanguageModel, name: str) -> tuple[nn.Parameter, bool]:
    """Return the parameter of that name and whether it is stored [in, out]."""
    module = linear_module_of(lm, name)
    if not is_writable(module):
        scheme = quantisation(module)
        if scheme:
            state = f"is quantised ({scheme})"
            unpack = "; or unpack that one matrix for a while: engram.dequantised(lm, layer)"
        else:
            state, unpack = "is offloaded (on the meta device between forward passes)", ""
        raise UnsupportedModelError(
            f"{name} {state}, so no change can be written into it. Apply the edit beside it: "
            "edit.applied(lm, how='beside'), or ship it as a LoRA adapter: "
            f"edit.to_peft(folder){unpack}"
        )
    return lm.model.get_parameter(name), is_transposed(module)
