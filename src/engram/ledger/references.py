"""How a caller names what is in force: an entry by its number, 3; a fact of it, "3.1"; or the fact
itself.

Knows entries. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engram.errors import EngramError, FactError
from engram.facts import Fact
from engram.ledger.history import Entry, FactRef, shown

EntryRef = int | str | Fact


def fact_refs(which: Sequence[EntryRef], entries: Mapping[int, Entry]) -> tuple[FactRef, ...]:
    """Where the facts in force are that these name.

    Raises:
        EngramError: a name that is none, or of nothing in force.
        FactError: a fact that is not in force, or is so in several entries.
    """
    found: set[FactRef] = set()
    for each in which:
        found |= (
            {_of_fact(each, entries)} if isinstance(each, Fact) else set(_of_number(each, entries))
        )
    return tuple(sorted(found))


def entry_named(number: int, entries: Mapping[int, Entry]) -> Entry:
    """The entry of that number.

    Raises:
        EngramError: there is none.
    """
    if number not in entries:
        raise EngramError(
            f"there is no entry {number}; the ledger has {', '.join(map(str, entries)) or 'none yet'}"
        )
    return entries[number]


def _of_number(which: int | str, entries: Mapping[int, Entry]) -> list[FactRef]:
    number, dot, index = str(which).partition(".")
    if not number.isdecimal() or (dot and not index.isdecimal()):
        raise EngramError(
            f"{which!r} names no entry; expected its number, such as 3, or '3.1' for fact 1 of entry 3"
        )
    entry = entry_named(int(number), entries)
    found = [(entry.number, fact) for fact in entry.active if not dot or fact == int(index)]
    if not found:
        raise EngramError(
            f"{which} is not in force: entry {number} ({entry.status}) has {len(entry.facts)} facts, counted from 0, and of these "
            f"{', '.join(map(str, entry.active)) or 'none'} in force"
        )
    return found


def _of_fact(fact: Fact, entries: Mapping[int, Entry]) -> FactRef:
    active = {(entry.number, i): entry.facts[i] for entry in entries.values() for i in entry.active}
    found = [place for place, each in active.items() if _key(each) == _key(fact)]
    if len(found) == 1:
        return found[0]
    said = f"{fact.prompt_text!r} -> {fact.target!r}"
    if found:
        raise FactError(f"{said} is in force more than once, as {shown(found)}; give one of these")
    near = [
        f"{shown([place])}: {each.prompt_text!r} -> {each.target!r}"
        for place, each in active.items()
        if each.subject.strip() == fact.subject.strip()
    ]
    raise FactError(
        f"{said} is not in force; "
        + ("; ".join(near) or f"none of the {len(active)} facts is about that subject")
    )


def _key(fact: Fact) -> tuple[str, str, str]:
    return fact.subject.strip(), fact.prompt.strip(), fact.target.strip()
