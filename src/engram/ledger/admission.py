"""What is checked before a ledger puts an edit in force, and what is logged about it.

Knows entries, events, conflicts and the canary. Refuses to know files: the ledger writes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from math import isfinite

from engram.edit.base import describe_base
from engram.edit.edit import Edit
from engram.edit.folder_format import change_identity
from engram.edit.in_force import edited
from engram.errors import BaseMismatchError, EngramError, NonFiniteError
from engram.evaluate.canary import Canary
from engram.ledger.conflicts import Conflict
from engram.ledger.history import Entry, Event, FactRef, format_refs
from engram.model.language_model import LanguageModel

log = logging.getLogger(__name__)


def check_unedited(lm: LanguageModel) -> None:
    """Raise BaseMismatchError while edits are applied to a model."""
    if weights := edited(lm.model):
        raise BaseMismatchError(
            f"edits are applied to {lm.name!r} at the moment ({weights[0]}); leave their `with` "
            "block first: a ledger applies everything in force to the unedited model"
        )


def check_new(edit: Edit, in_force: Sequence[Entry]) -> None:
    """Raise EngramError where an entry in force has the very same deltas."""
    for entry in in_force:
        if entry.identity == change_identity(edit.deltas):
            raise EngramError(
                f"the edit is in force already, as entry {entry.number} ({entry.status}); added "
                "twice it would count twice. Remove that entry first"
            )


def check_not_below(replaced: Collection[FactRef], below: Collection[int]) -> None:
    """Raise EngramError where an edit replaces facts of an entry that it was made on top of.

    Its delta was computed with that entry in place; without it, the sum would say something else.

    Args:
        replaced: facts that the edit replaces. below: entries that it was made on top of.
    """
    for number, fact in sorted(replaced):
        if number in below:
            raise EngramError(
                f"the edit was made on top of entry {number}, which it is to replace: without it, "
                "it would say something else. Make it where that one is not: with "
                f"ledger.applied(lm, without=['{number}.{fact}']): engram.rewrite(...); or add it "
                "without replace"
            )


def warn(
    conflicts: Collection[Conflict],
    replaced: Collection[FactRef],
    below: Collection[int],
    in_force: Sequence[Entry],
) -> None:
    """Log conflicts that stay, and entries below the edit that have lost facts.

    A conflict with an entry that the edit was made on top of is none: its values took the entry
    into account.
    """
    for conflict in conflicts:
        if (conflict.entry, conflict.index) not in replaced and conflict.entry not in below:
            log.warning("%s", conflict)
    if lost := sorted(set(below) - {entry.number for entry in in_force if not entry.gone}):
        log.warning(
            "the edit was made on top of entries %s, of which some facts are no longer in force; "
            "verify it",
            ", ".join(map(str, lost)),
        )


def warn_about_dependents(event: Event) -> None:
    """Log the entries that were made on top of what an event took out."""
    if event.dependents:
        log.warning(
            "%s went, and entries %s were made on top of it: their deltas stay as they are, but "
            "were computed with it in place; verify them",
            format_refs(event.gone),
            ", ".join(map(str, event.dependents)),
        )


def with_canary(event: Event, everything: Edit, lm: LanguageModel, canary: Canary) -> Event:
    """Return the event with the canary's measurements, as "rolled back" where it is beyond a limit.

    Args:
        event: the edit's "added" event.
        everything: all that would be in force, as one edit of the base.
        lm: the unedited base.
    """
    # the base is measured every time: the ledger does not record the text's perplexity, and a
    # canary of another text may be given
    before = canary.perplexity(lm)
    try:
        with everything.applied(lm, how="weights"):
            after = canary.perplexity(lm)
            tensors = describe_base(lm, everything.deltas)["tensors"]
    except NonFiniteError as error:  # the sum does not fit the weights' dtype
        return replace(event, what="rolled back", tripped=(str(error),))
    checks = canary.checks(lm, everything, before, after)
    # JSON has no infinity; where a value is not finite, `tripped` says so in words
    values = {
        check.name: check.value
        for check in checks
        if check.value is not None and isfinite(check.value)
    }
    tripped = tuple(
        f"{check.name} is {check.value:.3f}, at most {check.limit:g} allowed"
        for check in checks
        if check.passed is False
    )
    if tripped:
        return replace(event, what="rolled back", canary=values, tripped=tripped)
    # by this state, an edit that is made on top of everything in force is recognised later
    state = {name: tensor["sha256"] for name, tensor in tensors.items()}
    return replace(event, canary=values, state=state)
