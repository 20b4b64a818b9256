"""Attach changes beside a model's weights: a low-rank change is added to a module's output, and
no weight is touched.

So it works where a weight cannot be written into (quantised, offloaded), and it rounds nothing into
half precision. Refuses to know how weights are stored (modules/weights.py) and how edits are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from engram.edit.base import check_base, linear_module_of
from engram.edit.changes import WeightChanges
from engram.edit.delta import Delta
from engram.edit.in_force import ATTACHED
from engram.errors import BaseMismatchError, UnsupportedModelError
from engram.modules.hooks import overlay
from engram.modules.weights import linear_shape

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel


@contextmanager
def attached(
    changes: WeightChanges, lm: LanguageModel, *, force: bool = False
) -> Iterator[LanguageModel]:
    """Let `lm` compute as if it were edited for the length of the block; no weight is touched.

    Every changed module gives out + left (right x): computed in the factors' precision, rounded
    once into the output's dtype, on the device where the module runs. That equals writing into the
    weights up to rounding; in half precision it is closer to the computed change, since nothing is
    rounded into a weight. Blocks nest, and edits add up.

    Args:
        force: attach also to weights on which the changes were not computed, such as the quantised
            ones of the same model; their shape has to fit.
    Raises:
        BaseMismatchError: the weights are not those on which the changes were computed.
        UnsupportedModelError: a weight that other modules use too: their output would not change.
    """
    modules = {name: linear_module_of(lm, name) for name in changes.deltas}
    for name, module in modules.items():  # all are checked before the first hook
        delta = changes.deltas[name]
        if delta.shape != linear_shape(module):
            raise BaseMismatchError(
                f"{name} of {lm.name!r} is [out, in] = {list(linear_shape(module))}, the edit "
                f"changes one of {list(delta.shape)}. Load the model that the edit names"
            )
        _check_not_shared(lm, name)
        if not force:
            try:
                check_base(module, changes.made_on(name))
            except BaseMismatchError as error:
                raise BaseMismatchError(f"{name} of {lm.name!r}: {error}") from error
    with ExitStack() as stack:
        for name, module in modules.items():
            # A batch of one: the same change for every row. A dense change costs d_out x d_in once
            # more here, its other factor being the identity.
            left_or, right_ri = changes.deltas[name].low_rank()
            stack.enter_context(overlay(module, left_or[None], right_ri[None]))
            stack.enter_context(_registered(module, changes.deltas[name]))
        yield lm


@contextmanager
def _registered(module: nn.Module, delta: Delta) -> Iterator[None]:
    """Register the change, so that an edit made meanwhile records on what it was made."""
    ATTACHED[module] = [*ATTACHED.get(module, ()), delta]
    try:
        yield
    finally:
        # By identity: Delta compares by value, and the same change may be attached twice.
        ATTACHED[module] = [other for other in ATTACHED[module] if other is not delta]


def _check_not_shared(lm: LanguageModel, name: str) -> None:
    # The hook is on one module: a head tied to the embedding would compute without the change.
    weight = lm.model.get_parameter(name)
    others = [
        other
        for other, parameter in lm.model.named_parameters(remove_duplicate=False)
        if parameter is weight and other != name
    ]
    if others:
        raise UnsupportedModelError(
            f"{name} is also {others[0]}, whose module would compute without the change; use "
            "edit.applied(lm, how='weights'), which changes both"
        )
