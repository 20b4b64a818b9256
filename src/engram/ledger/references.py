"""How a caller names what is in force: an entry by its number, 3; a fact of it, "3.1"; or the fact
itself.

    3                       every fact of entry 3 that is in force: (3, 0), (3, 1)
    "3.1"                   (3, 1)
    Fact("ABBA", ...)       the one place where that fact is in force: (2, 0)

Knows entries. Refuses to know files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engram.errors import EngramError, FactError
from engram.facts import Fact
from engram.ledger.history import Entry, FactRef, format_refs

EntryRef = int | str | Fact


def resolve_refs(refs: Sequence[EntryRef], entries: Mapping[int, Entry]) -> tuple[FactRef, ...]:
    """Return the facts in force that these names refer to.

    Raises:
        EngramError: not the form of a name, or nothing in force has it.
        FactError: a fact that is not in force, or is in force in several entries.
    """
    facts: set[FactRef] = set()
    for ref in refs:
        facts.update(
            [_of_fact(ref, entries)] if isinstance(ref, Fact) else _of_number(ref, entries)
        )
    return tuple(sorted(facts))  # a fact that is named twice counts once


def find_entry(number: int, entries: Mapping[int, Entry]) -> Entry:
    """Return the entry of that number.

    Raises:
        EngramError: there is none.
    """
    if number not in entries:
        raise EngramError(
            f"there is no entry {number}; the ledger has "
            f"{', '.join(map(str, entries)) or 'none yet'}"
        )
    return entries[number]


def _of_number(ref: int | str, entries: Mapping[int, Entry]) -> list[FactRef]:
    number, dot, index = str(ref).partition(".")
    if not number.isdecimal() or (dot and not index.isdecimal()):
        raise EngramError(
            f"{ref!r} names no entry; expected its number, such as 3, or '3.1' for fact 1 of entry "
            "3"
        )
    entry = find_entry(int(number), entries)
    facts = [(entry.number, fact) for fact in entry.active if not dot or fact == int(index)]
    if not facts:
        raise EngramError(
            f"{ref} is not in force: entry {number} ({entry.status}) has {len(entry.facts)} facts, "
            f"counted from 0, and of these {', '.join(map(str, entry.active)) or 'none'} in force"
        )
    return facts


def _of_fact(fact: Fact, entries: Mapping[int, Entry]) -> FactRef:
    active = {(entry.number, i): entry.facts[i] for entry in entries.values() for i in entry.active}
    equal = [ref for ref, other in active.items() if _key(other) == _key(fact)]
    if len(equal) == 1:
        return equal[0]
    wanted = f"{fact.prompt_text!r} -> {fact.target!r}"
    if equal:
        raise FactError(
            f"{wanted} is in force more than once, as {format_refs(equal)}; give one of these"
        )
    # the usual mistake: the right subject with another prompt or object
    near = [
        f"{format_refs([ref])}: {other.prompt_text!r} -> {other.target!r}"
        for ref, other in active.items()
        if other.subject.strip() == fact.subject.strip()
    ]
    raise FactError(
        f"{wanted} is not in force; "
        + ("; ".join(near) or f"none of the {len(active)} facts is about that subject")
    )


def _key(fact: Fact) -> tuple[str, str, str]:
    return fact.subject.strip(), fact.prompt.strip(), fact.target.strip()
