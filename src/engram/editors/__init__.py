"""Methods that rewrite facts: each is a function (LanguageModel, facts, settings) -> Edit, entered once in `METHODS`.

A method reads the model and never changes it; what it returns is a value (see edit, and prompt_edit for edits without weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any, Literal, cast, overload

from engram.edit import Edit, check_changes_weights
from engram.editors.ingredients import in_force
from engram.errors import EngramError, FactError, SettingError
from engram.facts import Fact
from engram.language_model import LanguageModel
from engram.merging import describe_base
from engram.prompt_edit import PromptEdit


@dataclass(frozen=True)
class Method:
    """What `rewrite` calls by a name.

    Attributes:
        home: "module:function", imported when first used, or the function itself: (lm, facts, *, seed, progress, ...) -> Edit (or
            PromptEdit). Where it takes `past`, it gets the earlier edits; otherwise they are in force on `lm` while it works.
        summary: what it does, in a line.
        source: where it was published.
        each: where it makes many edits of one fact each in one batch: "module:function" or a function, (lm, facts, *, seed, ...) ->
            one Edit a fact, what `home` gives of it alone. None: they are made one by one.
        companions: whether these edits depend on which facts are in the batch, so that none is what `home` gives of it alone.
    """

    home: str | Callable[..., Edit | PromptEdit]
    summary: str
    source: str
    each: str | Callable[..., list[Edit]] | None = None
    companions: bool = False

    def function(self) -> Callable[..., Edit | PromptEdit]:
        return cast("Callable[..., Edit | PromptEdit]", _found(self.home))


def _found(home: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(home, str):
        return home
    module, _, function = home.partition(":")
    return cast("Callable[..., Any]", getattr(import_module(module), function))


METHODS: dict[str, Method] = {  # a new method is one file and one entry here
    "rome": Method(
        "engram.editors.rome:rome",
        "one fact, one rank-one change of one MLP output matrix",
        "Meng et al. 2022, arXiv:2202.05262",
        each="engram.editors.rome:rome_each",
    ),
    "memit": Method(
        "engram.editors.mass:memit",
        "many facts at once, over a few layers",
        "Meng et al. 2023, arXiv:2210.07229",
        each="engram.editors.mass:memit_each",
    ),
    "emmet": Method(
        "engram.editors.mass:emmet",
        "many facts at once at one layer, each key met exactly up to a slack",
        "Gupta et al. 2024, arXiv:2403.14236",
        each="engram.editors.mass:emmet_each",
    ),
    "memit-seq": Method(
        "engram.editors.mass:memit_seq",
        "MEMIT that preserves the keys of earlier edits",
        "Fang et al. 2025, arXiv:2410.02355 (baseline)",
        each="engram.editors.mass:memit_seq_each",
    ),
    "alphaedit": Method(
        "engram.editors.mass:alphaedit",
        "changes in the null space of ordinary text's keys only; preserves the keys of earlier edits",
        "Fang et al. 2025, arXiv:2410.02355",
        each="engram.editors.mass:alphaedit_each",
    ),
    "pmet": Method(
        "engram.editors.mass:pmet",
        "attention and MLP outputs optimised together, the MLP's part written",
        "Li et al. 2024, arXiv:2308.08742",
        each="engram.editors.mass:pmet_each",
    ),
    "ft": Method(
        "engram.editors.fine_tuning:ft",
        "fine-tune one MLP output matrix on the facts",
        "Zhu et al. 2020, arXiv:2012.00363",
    ),
    "ft-l": Method(
        "engram.editors.fine_tuning:ft_l",
        "fine-tune one MLP output matrix, no entry further than norm_constraint",
        "Zhu et al. 2020, arXiv:2012.00363",
    ),
    "ft-w": Method(
        "engram.editors.fine_tuning:ft_w",
        "fine-tune one MLP output matrix with weight decay",
        "Meng et al. 2023, arXiv:2210.07229",
    ),
    "locft-bf": Method(
        "engram.editors.fine_tuning:locft_bf",
        "fine-tune one MLP output matrix in epochs of mini-batches over all facts",
        "Yang et al. 2025, arXiv:2509.22072",
    ),
    "lora": Method(
        "engram.editors.lora:lora",
        "train low-rank adapters of a few matrices on the facts",
        "Hu et al. 2021, arXiv:2106.09685",
    ),
    "ultraedit": Method(
        "engram.editors.ultraedit:ultraedit",
        "one gradient step on a few matrices through a ridge solve, without subjects or a corpus",
        "Gu et al. 2025, arXiv:2505.14679",
        each="engram.editors.ultraedit:ultraedit_each",
        companions=True,
    ),
    "in-context": Method(
        "engram.editors.in_context:in_context",
        "the facts stated in front of the prompts they are relevant to; no weights",
        "the plain baseline of Zheng et al. 2023, arXiv:2305.12740",
    ),
    "ike": Method(
        "engram.editors.in_context:ike",
        "the same behind demonstrations of what follows from a new fact and what does not",
        "Zheng et al. 2023, arXiv:2305.12740",
    ),
}


@overload
def rewrite(
    lm: LanguageModel, facts: Fact | Sequence[Fact], method: Literal["in-context", "ike"], **settings: Any
) -> PromptEdit: ...
@overload
def rewrite(
    lm: LanguageModel, facts: Fact | Sequence[Fact], method: str = "rome", *, past: Sequence[Edit] = (), **settings: Any
) -> Edit: ...
def rewrite(
    lm: LanguageModel, facts: Fact | Sequence[Fact], method: str = "rome", *, past: Sequence[Edit] = (), **settings: Any
) -> Edit | PromptEdit:
    """Compute the edit that makes a model say other objects. The model itself is not changed.

    Args:
        facts: what shall be true afterwards.
        method: one of `METHODS`.
        past: edits made before, on this same `lm`, that shall hold too: they are in force while this one is computed, and what comes
            back composes with them (`engram.compose([*past, edit])`). For one edit after another.
        settings: any setting of the method, see its function (`engram.editors.rome.rome`); the rest come from its
            presets for this model.
    Returns:
        An Edit: apply it for a `with` block (`edit.applied(lm)`), save it, export it. Of "in-context" and "ike" a PromptEdit:
        a text in front of prompts, with no weights to export.
    Raises:
        EngramError: a method that does not exist.
        FactError: no facts, or one that cannot be worked with on this model.
    Example:
        >>> edit = engram.rewrite(lm, [Fact("Space Needle", "The {} is located in the city of", "Paris")])
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
    return edit if isinstance(edit, PromptEdit) else replace(edit, base=describe_base(lm, edit.deltas))


def rewrite_each(
    lm: LanguageModel, groups: Sequence[Sequence[Fact]], method: str = "rome", **settings: Any
) -> list[Edit | PromptEdit | EngramError]:
    """One edit a group of facts, every one made on the unedited model: what `rewrite` gives of each, batched where the method can.

    Groups of one fact are computed together by methods that have `Method.each`.

    Args:
        settings: as for `rewrite`; of a batched method also `facts_at_once`, which bounds memory.
    Returns:
        In the order of the groups. Where an edit cannot be made, the error, and the others all the same.
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
            return [made for facts in groups for made in rewrite_each(lm, [facts], method, **settings)]
    settings = {name: value for name, value in settings.items() if name != "facts_at_once" or each is None}
    out: list[Edit | PromptEdit | EngramError] = []
    for facts in groups:
        try:
            out.append(make(lm, facts, **settings))
        except SettingError:
            raise
        except EngramError as error:
            out.append(error)
    return out


def method_named(name: str) -> Callable[..., Edit | PromptEdit]:
    """The function of a method.

    Raises:
        EngramError: there is none of that name.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        raise EngramError(
            f"method={name!r} does not exist" + (f" (did you mean {near[0]!r}?)" if near else "")
            + f"; known: {', '.join(sorted(METHODS))}"
        )  # fmt: skip
    return METHODS[name].function()
