"""Lay edits beside a model's weights: the low-rank change is added to a module's output, and no
weight is touched.

So it works where a weight cannot be written into (quantised, offloaded) and rounds nothing into
half precision. Refuses to know how weights are stored (see weights) and how edits are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from engram.edit.applied import applied
from engram.edit.base import check_base, linear_module_of
from engram.edit.delta import Delta
from engram.edit.in_force import BESIDE
from engram.errors import BaseMismatchError, UnsupportedModelError
from engram.modules.hooks import overlay
from engram.modules.weights import is_writable, linear_shape

if TYPE_CHECKING:
    from engram.edit.edit import Edit
    from engram.model.language_model import LanguageModel


@contextmanager
def attached(edit: Edit, lm: LanguageModel, *, force: bool = False) -> Iterator[LanguageModel]:
    """Within the block `lm` computes as if it were edited, and none of its weights is touched.

    Every module that the edit changes gives out + left (right x): computed in the factors'
    precision, rounded once into the output's dtype, on the device where the module runs. The same
    as `applied` to rounding; on weights in half precision it is closer to the computed change,
    since nothing is rounded into a weight. Blocks nest, and edits add up, as with `applied`.

    Args:
        force: also on weights the edit was not made on, such as the quantised ones of the same
            model; their shape has to fit.
    Yields:
        `lm`.
    Raises:
        BaseMismatchError: the model's weights are not those the edit was made on.
        UnsupportedModelError: a weight that other modules use too, whose output would stay as it
            is.
    """
    modules = {name: linear_module_of(lm, name) for name in edit.deltas}
    for name, module in modules.items():  # all are checked before the first hook
        delta = edit.deltas[name]
        if delta.shape != linear_shape(module):
            raise BaseMismatchError(
                f"{name} of {lm.name!r} is [out, in] = {list(linear_shape(module))}, the edit changes one of {list(delta.shape)}. "
                "Load the model that the edit names"
            )
        _check_alone(lm, name)
        if not force:
            try:
                check_base(module, delta, edit.base["tensors"][name])
            except BaseMismatchError as error:
                raise BaseMismatchError(f"{name} of {lm.name!r}: {error}") from error
    with ExitStack() as stack:
        for name, module in modules.items():
            left_or, right_ri = edit.deltas[name].low_rank()
            stack.enter_context(overlay(module, left_or[None], right_ri[None]))
            stack.enter_context(_noted(module, edit.deltas[name]))
        yield lm


def laid(
    edit: Edit, lm: LanguageModel, *, force: bool = False
) -> AbstractContextManager[LanguageModel]:
    """`applied` where every weight that the edit changes can be written into, `attached` where one
    is quantised or offloaded.

    Also `attached` on top of what is attached already: an edit that was made there was not made on
    the bare weight.
    """
    on_top = any(BESIDE.get(linear_module_of(lm, name)) for name in edit.deltas)
    return (applied if can_apply(edit, lm) and not on_top else attached)(edit, lm, force=force)


def can_apply(edit: Edit, lm: LanguageModel) -> bool:
    """Whether every weight that the edit changes is plain floating point in memory."""
    return all(is_writable(linear_module_of(lm, name)) for name in edit.deltas)


@contextmanager
def _noted(module: nn.Module, delta: Delta) -> Iterator[None]:
    """Let merging know what lies beside the module, so that an edit made meanwhile says what it was
    made on.
    """
    BESIDE[module] = [*BESIDE.get(module, ()), delta]
    try:
        yield
    finally:
        BESIDE[module] = [each for each in BESIDE[module] if each is not delta]


def _check_alone(lm: LanguageModel, name: str) -> None:
    weight = lm.model.get_parameter(name)
    others = [
        other
        for other, each in lm.model.named_parameters(remove_duplicate=False)
        if each is weight and other != name
    ]
    if others:
        raise UnsupportedModelError(
            f"{name} is also {others[0]}, whose module would go on without the change; use edit.applied(lm), which changes both"
        )
