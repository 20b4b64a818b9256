"""Compute edits: `rewrite` calls a method of the table by its name.

Knows the order: check the facts, choose layers in place of "auto", put earlier edits in
force, call the method. So a method takes numbers only, and knows neither cards nor other edits'
files. Refuses to know what a method computes. (The module's name is not `rewrite`: that would hide
the function `engram.rewrite`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, Literal, cast, overload

from engram.checks import checked_call
from engram.edit.base import describe_base
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.edit.recipe import check_changes_weights
from engram.editors.closed_form.inputs import in_force
from engram.editors.methods import METHODS, check_method, method_named
from engram.editors.presets import preset, preset_layers
from engram.errors import EngramError, FactError, SettingError
from engram.evaluate.answers import says_objects
from engram.facts import Fact
from engram.layers.choice import choose_layers
from engram.model.language_model import LanguageModel
from engram.model.tokens import spaced

# Settings that a layer card must not get: it decides the layers itself, measures each layer's own
# second moments, and edits one fact at a time on the model as it is.
_NOT_FOR_A_CARD = ("layer", "layers", "second_moments", "past", "facts_per_batch", "workers")
_NAMED = 5  # facts that an error about several names


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


@checked_call
def rewrite(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    method: str = "rome",
    *,
    past: Sequence[Edit | PromptEdit] = (),
    **settings: Any,
) -> Edit | PromptEdit:
    """Compute the edit that makes a model state new objects. The model itself is not changed.

    Args:
        facts: what shall be true afterwards.
        method: one of `METHODS`.
        past: earlier edits of this same `lm` that shall stay true: they are in force while this
            edit is computed, and the result composes with them
            (`engram.compose([*past, edit])`). For one edit after another.
        settings: any setting of the method, see its function, such as
            `engram.editors.closed_form.rome.rome`; its presets for this model give the others.
            layer="auto" (layers="auto" of a method that edits several) chooses by the model's
            layer card, see `engram.layer_card`; a model without a card gets a quick one.
    Returns:
        An Edit: apply it for a `with` block (`edit.applied(lm)`), save it, export it. The methods
        "in-context" and "ike" return a PromptEdit: text in front of prompts, without weights.
    Raises:
        EngramError: a method that does not exist.
        FactError: no facts, a fact that this model cannot represent, or one whose new object the
            model says already.
    Example:
        >>> fact = engram.Fact("Space Needle", "The {} is located in the city of", "Paris")
        >>> edit = engram.rewrite(lm, fact, layer=1, steps=5)
        >>> with edit.applied(lm):
        ...     text = lm.generate("The Space Needle is located in the city of", 1)
    """
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts:
        raise FactError("facts is empty; give at least one Fact(subject, prompt, target)")
    # First, so that a misspelt method fails before a card is measured or an edit put in force.
    function = method_named(method)
    for edit in past:
        check_changes_weights(edit)
    past = cast("Sequence[Edit]", past)
    check_method(method, settings, lm.name)
    with in_force(past, lm):
        _check_not_said(lm, facts)
    settings = _with_numbered_layers(lm, facts, method, settings)
    # A method that takes `past` measures on the base first, and preserves earlier keys if it can.
    # For the others earlier edits are simply part of the model.
    if not past:
        return function(lm, facts, **settings)
    if "past" in signature(function).parameters:
        return function(lm, facts, past=past, **settings)
    with in_force(past, lm):
        computed = function(lm, facts, **settings)
    if isinstance(computed, PromptEdit):
        return computed
    # Described as it is without the past ones: composed with them, it has to share their base.
    return replace(computed, base=describe_base(lm, computed.deltas))


@checked_call
def rewrite_each(
    lm: LanguageModel, groups: Sequence[Sequence[Fact]], method: str = "rome", **settings: Any
) -> list[Edit | PromptEdit | EngramError]:
    """Compute one edit per group of facts, each on the unedited model, as `rewrite` would alone.

    Groups of one fact are computed together by methods that have a `Method.batch_function`.

    Args:
        settings: as for `rewrite`; of a batched method also `facts_per_batch`, which bounds memory.
    Returns:
        In the order of the groups. Where an edit cannot be computed, its error takes the place; the
        other edits are not affected.
    Raises:
        EngramError: a method that does not exist, or no layer to choose; SettingError: settings
            that the method does not have.
    """
    function, batch_function = method_named(method), METHODS[method].load_batch()
    check_method(method, settings, lm.name)
    settings = _with_numbered_layers(
        lm, [fact for facts in groups for fact in facts], method, settings
    )
    if batch_function is not None and groups and all(len(facts) == 1 for facts in groups):
        try:
            return list(batch_function(lm, [facts[0] for facts in groups], **settings))
        except SettingError:
            raise  # it is the caller's mistake and would come again with every fact
        except EngramError as error:
            # One fact of the batch fails, and the error does not say which: try them one by one.
            if len(groups) == 1:
                return [error]
            return [
                out for facts in groups for out in rewrite_each(lm, [facts], method, **settings)
            ]
    if batch_function is not None:  # not all groups are single facts, and ROME's function has none
        settings.pop("facts_per_batch", None)
    results: list[Edit | PromptEdit | EngramError] = []
    for facts in groups:
        try:
            results.append(function(lm, facts, **settings))
        except SettingError:
            raise
        except EngramError as error:
            results.append(error)
    return results


def _check_not_said(lm: LanguageModel, facts: Sequence[Fact]) -> None:
    """Raise where the model says a new object already: an edit of it would change nothing but
    numbers, and its receipt would praise it for what the model knew.

    Benchmarks use `rewrite_each`, which has no such check: their records are what is measured.

    Raises:
        FactError: facts whose prompts the model continues with their targets, named.
    """
    says = says_objects(lm, [(fact.prompt_text, fact.target) for fact in facts])
    said = [n for n, known in enumerate(says) if known]
    if not said:
        return
    words = {n: f"{spaced(facts[n].target)!r} already after {facts[n].prompt_text!r}" for n in said}
    if len(facts) == 1:
        raise FactError(
            f"there is nothing to rewrite: the model says {words[0]}; give another target"
        )
    named = ", ".join(f"{words[n]} (facts[{n}])" for n in said[:_NAMED])
    more = f" and {len(said) - _NAMED} more" if len(said) > _NAMED else ""
    raise FactError(
        f"there is nothing to rewrite for {len(said)} of {len(facts)} facts: the model says "
        f"{named}{more}; leave them out, or give other targets"
    )


def _with_numbered_layers(
    lm: LanguageModel, facts: Sequence[Fact], method: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return a copy of `settings` in which numbers replace layer="auto" or layers="auto".

    A method that edits several layers gets as many as its preset has. The card is one of this very
    method with these settings: the best layer of one method need not be that of another one.
    """
    takes = signature(method_named(method)).parameters
    name = next((n for n in ("layer", "layers") if n in takes and settings.get(n) == "auto"), None)
    if name is None:
        return dict(settings)
    about = {key: value for key, value in settings.items() if key not in _NOT_FOR_A_CARD}
    count = 1
    if name == "layers":
        count = len(preset_layers({**preset(method, lm.name), **about}, lm.n_layers, "layers"))
    chosen = choose_layers(lm, count, facts=facts, method=method, **about)
    return {**settings, name: chosen[0] if name == "layer" else chosen}
