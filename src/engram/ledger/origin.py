"""On which weights an edit was made: a ledger's base, or the base with entries on it; told by the
weights' fingerprints.

Knows descriptions of weights (merging.describe_base) and events. Refuses to know the weights
themselves. What lay on other weights than those an edit changes leaves no print here, though the
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
    """Entries that lay on the weights: none where it was the base, those of the latest noted state
    that fits, or None: unknown.

    Raises:
        BaseMismatchError: it was made on a model of another family or other sizes.
    """
    wanted = edit.base["tensors"]
    known = base["tensors"]
    strange = [
        name
        for name in wanted
        if name not in known or known[name]["shape"] != wanted[name]["shape"]
    ]
    if edit.base["model_type"] != base["model_type"] or strange:
        lacks = (
            f", which has no weight {strange[0]} of {wanted[strange[0]]['shape']}"
            if strange
            else ""
        )
        raise BaseMismatchError(
            f"the edit was made on {edit.base['model']!r} ({edit.base['model_type']}), the ledger is about {base['model']!r} "
            f"({base['model_type']}){lacks}. A ledger holds edits of one model: Ledger.create makes one for that"
        )
    if _stood(wanted, known, {}):
        return ()
    for last in range(len(events), 0, -1):
        if (state := events[last - 1].state) and _stood(wanted, known, state):
            return entries_changing(wanted, entries_after(events[:last]).values())
    return None


def entries_changing(weights: Collection[str], entries: Iterable[Entry]) -> tuple[int, ...]:
    """Numbers of the entries in force that change some of these weights."""
    return tuple(
        entry.number
        for entry in entries
        if entry.active and not set(weights).isdisjoint(entry.weights)
    )


def unknown_origin(edit: Edit, base: Mapping[str, Any], *, looked: bool) -> str:
    """Why an edit that was made on unknown weights is refused, and what to do.

    Args:
        looked: whether the weights with what is in force now were compared, too.
    """
    name, wanted = next(iter(edit.base["tensors"].items()))
    here, there = base["tensors"][name]["dtype"], wanted["dtype"]
    if here != there:
        return (
            f"the edit was made in {there}, the ledger's base is in {here}: load the model in {here} "
            f"(engram.load({base['model']!r}, dtype={here!r})) and make the edit again"
        )
    hint = (
        ""
        if looked
        else " If the ledger was applied as it is now when the edit was made, give the model: add(edit, lm)."
    )
    return (
        f"the edit was made on weights ({name}) that are neither the ledger's base, {base['model']!r}, nor the base with what was "
        f"in force on it.{hint} Otherwise make it again, on the unedited model or within `with ledger.applied(lm):`"
    )


def _stood(wanted: Mapping[str, Any], base: Mapping[str, Any], state: Mapping[str, str]) -> bool:
    """Whether weights described as `wanted` are the base's, with a state's where it has some."""
    return all(
        wanted[name] == {**base[name], "sha256": state.get(name, base[name]["sha256"])}
        for name in wanted
    )
