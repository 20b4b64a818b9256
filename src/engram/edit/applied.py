"""Lay edits on a model in memory and take them off again, bit for bit.

Knows weights, how they are stored, and which edits lie on them at the moment. Refuses to know files
and how edits are made. Weights that cannot be written into take an edit beside them: see
attaching.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engram.errors import BaseMismatchError, NonFiniteError, UnsupportedModelError
from engram.modules.weights import is_transposed, is_writable, quantisation

if TYPE_CHECKING:
    from engram.edit.edit import Edit
    from engram.model.language_model import LanguageModel
from engram.edit.base import linear_module_of
from engram.edit.in_force import _LAID, _Layer
from engram.edit.stack import Stack, merge


@contextmanager
def applied(edit: Edit, lm: LanguageModel, *, force: bool = False) -> Iterator[LanguageModel]:
    """Within the block `lm`'s weights are edited; however it ends, every bit of them comes back.

    Blocks nest. An edit made on the unedited model fits inside another edit's block (the result is
    their composition), and so does one made within that block. Weights are saved on the CPU and
    merged there, so a GPU needs no room.

    Args:
        force: apply also to weights the edit was not made on; their shape has to fit.
    Yields:
        `lm`.
    Raises:
        BaseMismatchError: the model's weights are not those the edit was made on; nothing is
            changed.
        NonFiniteError: an edited weight does not fit the model's dtype; nothing is changed.
    """
    laid: list[tuple[nn.Parameter, _Layer]] = []
    try:
        for name, delta in edit.deltas.items():
            weight, transposed = _weight(lm, name)
            layers = _LAID.get(weight, [])
            saved = weight.detach().to("cpu", copy=True)
            below = layers[-1].stack if layers else Stack(saved, transposed)
            try:
                stack = below.with_delta(delta, edit.base["tensors"][name], force=force)
                merged = stack.weight()
            except (BaseMismatchError, NonFiniteError) as error:
                raise type(error)(f"{name} of {lm.name!r}: {error}") from error
            layer = _Layer(saved, stack)
            laid.append((weight, layer))  # first: an interrupt from here on puts `saved` back
            _LAID[weight] = [*layers, layer]
            _write(weight, merged)
        yield lm
    finally:
        for weight, layer in reversed(laid):
            _lift(weight, layer)


def rounding_cost(edit: Edit, lm: LanguageModel) -> dict[str, float]:
    """||(W_edited - W) - delta|| / ||delta|| of each weight (Frobenius): the share that rounding
    once loses.

    About 1e-6 and less in float32; in half precision what it is depends on how small the change is
    against the weight. Measured on the unedited weights, also within an edit's block. The base is
    not checked, and `lm` is not changed.
    """
    costs = {}
    for name, delta in edit.deltas.items():
        weight, transposed = _weight(lm, name)
        layers = _LAID.get(weight)
        base = layers[0].saved if layers else weight.detach().cpu()
        wanted = delta.dense(torch.float64)
        change = merge(base, [delta], transposed=transposed).double() - base.double()
        norm = float(wanted.norm())
        costs[name] = (
            float(((change.T if transposed else change) - wanted).norm()) / norm if norm else 0.0
        )
    return costs


@torch.no_grad()
def _write(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value)


def _lift(weight: Tensor, layer: _Layer) -> None:
    """Take a layer off and put its bits back.

    A layer below another one (blocks left out of order) goes when that one goes, with its bits.
    """
    layers = _LAID.get(weight, [])
    at = next((i for i, each in enumerate(layers) if each is layer), None)
    if at is None or at == len(layers) - 1:
        _write(weight, layer.saved)
    else:
        layers[at + 1].saved = layer.saved
    rest = [each for each in layers if each is not layer]
    if rest:
        _LAID[weight] = rest
    else:
        _LAID.pop(weight, None)


def _weight(lm: LanguageModel, name: str) -> tuple[nn.Parameter, bool]:
    """The parameter of that name and whether it is stored [in, out]."""
    module = linear_module_of(lm, name)
    if not is_writable(module):
        scheme = quantisation(module)
        how = (
            f"is quantised ({scheme})"
            if scheme
            else "is offloaded (on the meta device between forward passes)"
        )
        unpack = (
            "; or unpack that one matrix for a while: engram.dequantised(lm, layer)"
            if scheme
            else ""
        )
        raise UnsupportedModelError(
            f"{name} {how}, so no change can be written into it. Lay the edit beside it: edit.attached(lm), or ship it as "
            f"a LoRA adapter: edit.to_peft(folder){unpack}"
        )
    return lm.model.get_parameter(name), is_transposed(module)
