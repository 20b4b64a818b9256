"""Which weights an edit was made on: a ledger's base, or the base with some of its entries applied.
Fingerprints of the weights decide.

Knows descriptions of weights (edit.base.describe_base) and events. Refuses to know the weights
themselves. An entry that changes other weights than the edit does leaves no trace here, though the
edit was computed with it in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from engram.edit.edit import Edit
from engram.errors import BaseMismatchError
from engram.ledger.history import Entry, Event, entries_after


def find_base_entries(
    edit: Edit, base: Mapping[str, Any], events: Sequence[Event]
) -> tuple[int, ...] | None:
    """Return the entries that were applied to the weights an edit was made on.

    Args:
        base: the ledger's base.
        events: the history; each event with a canary recorded the state of the weights.
    Returns:
        () for the base itself, the entries in force at the latest recorded state that fits, or
        None where no state fits.
    Raises:
        BaseMismatchError: it was made on a model of another family or other sizes.
    """
    weights, known = edit.base["tensors"], base["tensors"]
    # what can never fit is an error; what may have been made on some state is searched for below
    unknown = [
        name
        for name in weights
        if name not in known or known[name]["shape"] != weights[name]["shape"]
    ]
    if edit.base["model_type"] != base["model_type"] or unknown:
        lacks = ""
        if unknown:
            lacks = f", which has no weight {unknown[0]} of {weights[unknown[0]]['shape']}"
        raise BaseMismatchError(
            f"the edit was made on {edit.base['model']!r} ({edit.base['model_type']}), the ledger "
            f"is about {base['model']!r} ({base['model_type']}){lacks}. A ledger holds edits of "
            "one model: Ledger.create makes one for that"
        )
    if _same(weights, known, {}):
        return ()
    # the latest first: a removal can bring an earlier state back, and either answer holds then
    for last in range(len(events), 0, -1):
        if (state := events[last - 1].state) and _same(weights, known, state):
            return entries_changing(weights, entries_after(events[:last]).values())
    return None


def entries_changing(weights: Collection[str], entries: Iterable[Entry]) -> tuple[int, ...]:
    """Return the numbers of the entries in force that change some of these weights."""
    return tuple(
        entry.number
        for entry in entries
        if entry.active and not set(weights).isdisjoint(entry.weights)
    )


def unknown_origin(edit: Edit, base: Mapping[str, Any], *, compared_now: bool) -> str:
    """Return why an edit that was made on unknown weights is refused, and what to do.

    Args:
        compared_now: whether the weights with what is in force now were compared, too.
    """
    # the dtype is the likeliest reason: the same model, loaded in another precision
    name, weight = next(iter(edit.base["tensors"].items()))
    ours, its = base["tensors"][name]["dtype"], weight["dtype"]
    if ours != its:
        return (
            f"the edit was made in {its}, the ledger's base is in {ours}: load the model in {ours} "
            f"(engram.load({base['model']!r}, dtype={ours!r})) and make the edit again"
        )
    hint = (
        ""
        if compared_now
        else " If everything in force was applied when the edit was made, give the model: "
        "add(edit, lm)."
    )
    return (
        f"the edit was made on weights ({name}) that are neither the ledger's base, "
        f"{base['model']!r}, nor the base with what was in force on it.{hint} Otherwise make it "
        "again, on the unedited model or within `with ledger.applied(lm):`"
    )


def _same(weights: Mapping[str, Any], base: Mapping[str, Any], state: Mapping[str, str]) -> bool:
    """Return whether weights are the base's, with the sha256 of `state` where it has one."""
    return all(
        weights[name] == {**base[name], "sha256": state.get(name, base[name]["sha256"])}
        for name in weights
    )
