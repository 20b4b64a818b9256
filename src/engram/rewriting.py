"""TODO rewrite"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, Literal, overload

from engram.edit.base import describe_base
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.edit.recipe import check_changes_weights
from engram.editors.closed_form.inputs import in_force
from engram.editors.methods import METHODS, _found, method_named
from engram.errors import EngramError, FactError, SettingError
from engram.facts import Fact
from engram.model.language_model import LanguageModel


@overload
def rewrite(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    method: Literal["in-context", "ike"],
    **settings: Any,
) -> PromptEdit: ...


@overload
def rewrite(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    method: str = "rome",
    *,
    past: Sequence[Edit] = (),
    **settings: Any,
) -> Edit: ...


def rewrite(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    method: str = "rome",
    *,
    past: Sequence[Edit] = (),
    **settings: Any,
) -> Edit | PromptEdit:
    """Compute the edit that makes a model say other objects. The model itself is not changed.

    Args:
        facts: what shall be true afterwards.
        method: one of `METHODS`.
        past: edits made before, on this same `lm`, that shall hold too: they are in force while
            this one is computed, and what comes back composes with them (`engram.compose([*past,
            edit])`). For one edit after another.
        settings: any setting of the method, see its function
            (`engram.editors.closed_form.rome.rome`); the rest come from its presets for this model.
    Returns:
        An Edit: apply it for a `with` block (`edit.applied(lm)`), save it, export it. Of
            "in-context" and "ike" a PromptEdit:
        a text in front of prompts, with no weights to export.
    Raises:
        EngramError: a method that does not exist.
        FactError: no facts, or one that cannot be worked with on this model.
    Example:
        >>> edit = engram.rewrite(lm, [Fact("Space Needle", "The {} is located in the city of",
        "Paris")])
    """
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts:
        raise FactError("facts is empty; give at least one Fact(subject, prompt, target)")
    make = method_named(method)
    for each in past:
        check_changes_weights(each)
    if not past:
        return make(lm, facts, **settings)
    if "past" in signature(make).parameters:
        return make(lm, facts, past=past, **settings)
    with in_force(past, lm):
        edit = make(lm, facts, **settings)
    return (
        edit if isinstance(edit, PromptEdit) else replace(edit, base=describe_base(lm, edit.deltas))
    )


def rewrite_each(
    lm: LanguageModel, groups: Sequence[Sequence[Fact]], method: str = "rome", **settings: Any
) -> list[Edit | PromptEdit | EngramError]:
    """One edit a group of facts, every one made on the unedited model: what `rewrite` gives of
    each, batched where the method can.

    Groups of one fact are computed together by methods that have `Method.each`.

    Args:
        settings: as for `rewrite`; of a batched method also `facts_per_batch`, which bounds memory.
    Returns:
        In the order of the groups. Where an edit cannot be made, the error, and the others all the
        same.
    Raises:
        EngramError: a method that does not exist; SettingError: settings that it does not have.
    """
    make, each = method_named(method), METHODS[method].each
    if each is not None and groups and all(len(facts) == 1 for facts in groups):
        try:
            return list(_found(each)(lm, [facts[0] for facts in groups], **settings))
        except SettingError:
            raise
        except EngramError as error:  # of one of them: find out which
            if len(groups) == 1:
                return [error]
            return [
                made for facts in groups for made in rewrite_each(lm, [facts], method, **settings)
            ]
    settings = {
        name: value for name, value in settings.items() if name != "facts_per_batch" or each is None
    }
    out: list[Edit | PromptEdit | EngramError] = []
    for facts in groups:
        try:
            out.append(make(lm, facts, **settings))
        except SettingError:
            raise
        except EngramError as error:
            out.append(error)
    return out
