"""What both kinds of edits share: versions, facts by index, settings as JSON.

Knows facts and plain values. Refuses to know weights and texts in front of prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engram.errors import EngramError, FactError
from engram.facts import Fact


def library_versions() -> dict[str, str]:
    """Return the versions of what computes an edit: engram, torch, transformers."""
    versions = {}
    for package in ("engram", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            versions[package] = "unknown"
    return versions


def staying(facts: Sequence[Fact], gone: Sequence[Fact | int]) -> list[int]:
    """Return the indices of the facts that stay when those of `gone` are taken out.

    Args:
        gone: each a fact of the edit, or its index from either end.
    Raises:
        FactError: a fact that is not in the edit, or none would stay.
    """
    # As indices, since a fact may be named twice, once as itself and once by its number.
    numbers = {_index(facts, fact) for fact in gone}
    rest = [i for i in range(len(facts)) if i not in numbers]
    if not rest:
        raise FactError(
            "all facts of the edit would go; an edit without facts is the unedited model"
        )
    return rest


def _index(facts: Sequence[Fact], fact: Fact | int) -> int:
    if isinstance(fact, int) and -len(facts) <= fact < len(facts):
        return fact % len(facts)
    if isinstance(fact, Fact) and fact in facts:
        return facts.index(fact)
    first = "; ".join(f"{i}: {f.prompt_text!r} -> {f.target!r}" for i, f in enumerate(facts[:8]))
    raise FactError(
        f"{fact!r} is not a fact of this edit, which has {len(facts)} ({first}). Give one of them "
        "or its index"
    )


def check_changes_weights(edit: Any) -> None:
    """Raise if an edit has no weights to add or to write.

    Raises:
        EngramError: it is a text in front of prompts.
    """
    if not edit.changes_weights:
        raise EngramError(
            f"{edit!r} is a text in front of prompts and has no weights to add, write or export. "
            "Use it with applied(lm), which nests with edits of weights; for a change of the "
            "weights, rewrite the facts by another method, such as 'rome'"
        )


def as_dict(receipt: Any) -> Any:
    """Return a receipt as a dict: it is one, or has `to_dict()`."""
    return receipt.to_dict() if hasattr(receipt, "to_dict") else receipt


def plain(name: str, value: Any) -> Any:
    """Return `value` as JSON gives it back, so that an edit equals its loaded self."""
    # There and back: tuples become lists and int keys strings now, not at the first save.
    try:
        text = json.dumps(
            dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False
        ).encode()
        return json.loads(text)
    # also lists in lists without end, and texts that no file can hold
    except (TypeError, ValueError, RecursionError) as error:
        raise EngramError(
            f"{name} of an edit has to be numbers, strings, lists and dicts, as in JSON: {error}"
        ) from error
