"""TODO edit.recipe"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from engram.errors import EngramError, FactError
from engram.facts import Fact

if TYPE_CHECKING:
    pass


def library_versions() -> dict[str, str]:
    """Versions of what computes an edit: engram, torch, transformers."""
    found = {}
    for package in ("engram", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[package] = "unknown"
    return found


def fact_index(facts: Sequence[Fact], fact: Fact | int) -> int:
    """Where a fact, or an index from either end, stands among an edit's facts.

    Raises:
        FactError: nowhere.
    """
    if isinstance(fact, int) and -len(facts) <= fact < len(facts):
        return fact % len(facts)
    if isinstance(fact, Fact) and fact in facts:
        return facts.index(fact)
    held = "; ".join(
        f"{i}: {each.prompt_text!r} -> {each.target!r}" for i, each in enumerate(facts[:8])
    )
    raise FactError(
        f"{fact!r} is not a fact of this edit, which has {len(facts)} ({held}). Give one of them or its index"
    )


def check_changes_weights(edit: Any) -> None:
    """Refuse an edit that has no weights to add or to write.

    Raises:
        EngramError: it is a text in front of prompts.
    """
    if not edit.deltas:
        raise EngramError(
            f"{edit!r} is a text in front of prompts and has no weights to add, write or export. Use it with applied(lm), which "
            "nests with edits of weights; for a change of the weights, rewrite the facts by another method, such as 'rome'"
        )


def plain(name: str, value: Any) -> Any:
    """`value` as JSON gives it back, so that an edit equals its loaded self."""
    try:
        return json.loads(json.dumps(dict(value) if isinstance(value, Mapping) else value))
    except (TypeError, ValueError) as error:
        raise EngramError(
            f"{name} of an edit has to be numbers, strings, lists and dicts, as in JSON: {error}"
        ) from error
