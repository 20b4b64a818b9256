"""The history of a ledger: a line of JSON an event, appended and never rewritten. What a ledger
holds now is read off it.

Knows lines, locks, and what events do to entries. Refuses to know edits and models.

An event has happened once its line stands there with its newline. A writer killed in the middle of
a line leaves one without
end: readers overlook it, the next writer cuts it off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from engram.errors import EngramError, EngramFileError
from engram.facts import Fact

What = Literal["added", "rolled back", "removed", "pruned"]
FactRef = tuple[int, int]  # number of an entry, index of a fact in its edit


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def shown(gone: Iterable[FactRef]) -> str:
    """Places as a caller would name them."""
    return ", ".join(f"{number}.{fact}" for number, fact in gone)


def _numbers(entries: Iterable[int]) -> str:
    return f"entries {', '.join(map(str, entries))}"


@dataclass(frozen=True)
class Event:
    """One line of a ledger's history.

    Attributes:
        what: happened: an edit was added, or rolled back because the canary tripped; facts were
            removed; files were pruned.
        when: in UTC.
        entry: number of the edit that was added or rolled back; `facts`, `method`, `identity` (of
            its deltas) and `weights` (names of those it changes) are its own.
        base_entries: entries that lay on these weights when the edit was made.
        gone: places of the facts that this event took out, by hand or because an added fact
            replaced them.
        dependents: active entries that were made on top of what went.
        canary: measured with the whole ledger applied; empty where no model was at hand. `tripped`:
            what was too much.
        state: sha256 of every weight that the ledger changes, once the edit was added; empty where
            no model was at hand.
        pruned: entries whose files were deleted.
    """

    what: What
    when: str = field(default_factory=now)
    entry: int | None = None
    facts: tuple[Fact, ...] = ()
    method: str | None = None
    identity: str | None = None
    weights: tuple[str, ...] = ()
    base_entries: tuple[int, ...] = ()
    gone: tuple[FactRef, ...] = ()
    dependents: tuple[int, ...] = ()
    canary: dict[str, float] = field(default_factory=dict)
    tripped: tuple[str, ...] = ()
    state: dict[str, str] = field(default_factory=dict)
    pruned: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; what is empty is left out."""
        record = {each.name: getattr(self, each.name) for each in fields(self)}
        record["facts"] = [{k: v for k, v in fact.to_dict().items() if v} for fact in self.facts]
        return {name: value for name, value in record.items() if value}

    def __str__(self) -> str:
        told = f"{self.when}  {self.what} {', '.join(map(str, self.pruned)) if self.entry is None else self.entry}"
        told = told if self.what != "removed" else f"{self.when}  removed {shown(self.gone)}"
        measured = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.canary.items())
        told += f" ({', '.join(measured)})" if self.canary else ""
        told += (
            f"; in the place of {shown(self.gone)}" if self.what == "added" and self.gone else ""
        )
        told += f"; {'; '.join(self.tripped)}" if self.tripped else ""
        return told + (
            f"; {_numbers(self.dependents)} stand on what went" if self.dependents else ""
        )

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Event:
        """What `to_dict` gave."""
        facts = tuple(Fact.from_dict(each) for each in record.get("facts", ()))
        gone = tuple((int(entry), int(fact)) for entry, fact in record.get("gone", ()))
        lists = {
            name: tuple(record.get(name, ()))
            for name in ("weights", "base_entries", "dependents", "tripped", "pruned")
        }
        return cls(**{**record, **lists, "facts": facts, "gone": gone})


@dataclass(frozen=True)
class Entry:
    """One edit of a ledger, as it stands now.

    Attributes:
        number: from 1, in the order they came; by it an entry is removed.
        facts: of the edit, with those that are no longer in force (subject, prompt, objects and
            relation; the edit has all).
        gone: indices of the facts that were taken out.
        method, identity, weights, when, base_entries, canary: see `Event`.
        rolled_back: the canary tripped, it was never in force.
        pruned: its files were deleted.
    """

    number: int
    facts: tuple[Fact, ...]
    method: str
    identity: str
    weights: tuple[str, ...]
    when: str
    base_entries: tuple[int, ...] = ()
    canary: dict[str, float] = field(default_factory=dict)
    gone: frozenset[int] = frozenset()
    rolled_back: bool = False
    pruned: bool = False

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the facts that are in force."""
        return (
            ()
            if self.rolled_back
            else tuple(i for i in range(len(self.facts)) if i not in self.gone)
        )

    def __str__(self) -> str:
        """The entry in a line, and a line a fact; those no longer in force in brackets."""
        lines = [
            f"{self.number}: {self.method}, {self.status}"
            + (f", on top of {_numbers(self.base_entries)}" * bool(self.base_entries))
        ]
        for i, fact in enumerate(self.facts):
            line = f"{shown([(self.number, i)])} {fact.prompt_text!r} -> {fact.target!r}"
            lines.append(f"  {line}" if i in self.active else f"  ({line})")
        return "\n".join(lines)

    @property
    def status(self) -> str:
        """In a word or two."""
        if self.rolled_back or not self.active:
            return "rolled back" if self.rolled_back else "removed"
        return f"{len(self.active)} of {len(self.facts)} facts" if self.gone else "active"


def entries_after(events: Iterable[Event]) -> dict[int, Entry]:
    """All entries by number, as they stand after these events."""
    entries: dict[int, Entry] = {}
    for event in events:
        for number, fact in event.gone if event.what != "rolled back" else ():
            entries[number] = replace(entries[number], gone=entries[number].gone | {fact})
        for number in event.pruned:
            entries[number] = replace(entries[number], pruned=True)
        if event.entry is not None:
            entries[event.entry] = Entry(
                event.entry,
                event.facts,
                str(event.method),
                str(event.identity),
                event.weights,
                event.when,
                event.base_entries,
                event.canary,
                rolled_back=event.what == "rolled back",
            )
    return entries


class History:
    """The file; lines are read once, since they never change."""

    def __init__(self, path: Path) -> None:
        self.path, self._events, self._end = path, [], 0  # type: tuple[Path, list[Event], int]

    def events(self) -> tuple[Event, ...]:
        """Everything that has happened so far, in any process.

        Raises:
            EditFileError: a line that is no event.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._end)
                whole, newline, _ = file.read().rpartition(b"\n")
            for line in whole.splitlines() if newline else ():
                self._events.append(Event.from_dict(json.loads(line)))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, EngramError) as error:
            raise EngramFileError(
                f"{self.path} is damaged at line {len(self._events) + 1}: {error}. Something else than engram has changed it; "
                "take the ledger from a backup"
            ) from error
        self._end += len(whole) + len(newline)
        return tuple(self._events)

    def append(self, event: Event) -> None:
        """Make an event happen, on the disk when this returns. The caller holds the lock.

        Raises:
            EditFileError: it cannot be written, and has not happened.
        """
        self.events()
        line = json.dumps(event.to_dict(), ensure_ascii=False) + "\n"
        try:
            with self.path.open("r+b") as file:
                file.truncate(self._end)
                file.seek(self._end)
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self._end)
            raise EngramFileError(
                f"could not write {self.path}: {error}. The ledger is as it was; free some space"
            ) from error
