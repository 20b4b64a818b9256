"""The history of a ledger: one event a line, as JSON, appended and never rewritten. What a ledger
holds now follows from it.

    {"what": "added", "entry": 1, "facts": [...], ...}      entries: 1 active
    {"what": "added", "entry": 2, "facts": [...], ...}      entries: 1, 2 active
    {"what": "removed", "gone": [[1, 0]], ...}              entries: 2 active, 1 removed

Knows lines and what events do to entries. Refuses to know edits and models.

An event has happened once its line ends with a newline on the disk. A writer that is killed within
a line leaves one without newline: readers ignore it, the next writer cuts it off.
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
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def format_refs(refs: Iterable[FactRef]) -> str:
    """Return facts as a caller would name them: "1.0, 3.1"."""
    return ", ".join(f"{number}.{fact}" for number, fact in refs)


def _numbers(entries: Iterable[int]) -> str:
    return f"entries {', '.join(map(str, entries))}"


@dataclass(frozen=True)
class Event:
    """One line of a ledger's history.

    Attributes:
        what: kind of event: an edit was added, or rolled back because the canary tripped; facts
            were removed; files were pruned.
        when: time in UTC.
        entry: number of the edit that was added or rolled back; `facts`, `method`, `identity` (of
            its deltas) and `weights` (names of those it changes) describe it.
        base_entries: entries that were applied to these weights when the edit was made.
        gone: facts that this event took out, by hand or because an added fact replaced them.
        dependents: active entries that were made on top of what went.
        canary: measurements with the whole ledger applied; empty where no model was given.
        tripped: the limits that were exceeded, in words.
        state: sha256 of every weight that the ledger changes, after the edit was added; empty where
            no model was given.
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
        """Return a record for JSON, without empty values."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        # empty fields are left out, since a fact has many and a history thousands of facts
        record["facts"] = [{k: v for k, v in fact.to_dict().items() if v} for fact in self.facts]
        return {name: value for name, value in record.items() if value}

    def __str__(self) -> str:
        if self.what == "removed":
            text = f"{self.when}  removed {format_refs(self.gone)}"
        else:
            subject = self.pruned if self.entry is None else (self.entry,)
            text = f"{self.when}  {self.what} {', '.join(map(str, subject))}"
        if self.canary:
            pairs = (f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.canary.items())
            text += f" ({', '.join(pairs)})"
        if self.what == "added" and self.gone:
            text += f"; in the place of {format_refs(self.gone)}"
        if self.tripped:
            text += f"; {'; '.join(self.tripped)}"
        if self.dependents:
            text += f"; {_numbers(self.dependents)} were made on top of what went"
        return text

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Event:
        """Return the event that gave this record."""
        facts = tuple(Fact.from_dict(fact) for fact in record.get("facts", ()))
        gone = tuple((int(entry), int(fact)) for entry, fact in record.get("gone", ()))
        lists = {
            name: tuple(record.get(name, ()))
            for name in ("weights", "base_entries", "dependents", "tripped", "pruned")
        }
        return cls(**{**record, **lists, "facts": facts, "gone": gone})


@dataclass(frozen=True)
class Entry:
    """One edit of a ledger, as it is now.

    Attributes:
        number: from 1, in the order they came; names the entry for `Ledger.remove`.
        facts: all facts of the edit, in force or not (subject, prompt, objects and relation; the
            edit has the rest).
        gone: indices of the facts that were taken out.
        method, identity, weights, when, base_entries, canary: see `Event`.
        rolled_back: True if the canary tripped, so that it was never in force.
        pruned: True if its files were deleted.
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
        ever = range(0 if self.rolled_back else len(self.facts))
        return tuple(i for i in ever if i not in self.gone)

    def __str__(self) -> str:
        """Return a line about the entry and one for each fact, in brackets if not in force."""
        lines = [
            f"{self.number}: {self.method}, {self.status}"
            + (f", on top of {_numbers(self.base_entries)}" * bool(self.base_entries))
        ]
        for i, fact in enumerate(self.facts):
            line = f"{format_refs([(self.number, i)])} {fact.prompt_text!r} -> {fact.target!r}"
            lines.append(f"  {line}" if i in self.active else f"  ({line})")
        return "\n".join(lines)

    @property
    def status(self) -> str:
        """The state of the entry in a word or two."""
        if self.rolled_back or not self.active:
            return "rolled back" if self.rolled_back else "removed"
        return f"{len(self.active)} of {len(self.facts)} facts" if self.gone else "active"


def entries_after(events: Iterable[Event]) -> dict[int, Entry]:
    """Return all entries by number, as they are after these events."""
    entries: dict[int, Entry] = {}
    for event in events:
        # an edit that was rolled back replaced nothing
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
    """The history's file. Each line is read once, since lines never change."""

    def __init__(self, path: Path) -> None:
        self.path, self._events, self._end = path, [], 0  # type: tuple[Path, list[Event], int]

    def events(self) -> tuple[Event, ...]:
        """Return everything that has happened so far, in any process.

        Raises:
            EngramFileError: a line that is no event.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._end)  # only what came since the last call
                whole, newline, _ = file.read().rpartition(b"\n")
            for line in whole.splitlines() if newline else ():
                self._events.append(Event.from_dict(json.loads(line)))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, EngramError) as error:
            raise EngramFileError(
                f"{self.path} is damaged at line {len(self._events) + 1}: {error}. Something other "
                "than engram has changed it; take the ledger from a backup"
            ) from error
        self._end += len(whole) + len(newline)
        return tuple(self._events)

    def append(self, event: Event) -> None:
        """Make an event happen: it is on the disk when this returns. The caller holds the lock.

        Raises:
            EngramFileError: it cannot be written, and has not happened.
        """
        self.events()  # moves `_end` to the end of the last whole line, also of other writers
        line = json.dumps(event.to_dict(), ensure_ascii=False) + "\n"
        try:
            with self.path.open("r+b") as file:
                file.truncate(self._end)  # what a killed writer left of a line
                file.seek(self._end)
                file.write(line.encode())
                file.flush()
                # the event has happened only when a power cut cannot undo it
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):  # on a full disk, cutting off still works
                os.truncate(self.path, self._end)
            raise EngramFileError(
                f"could not write {self.path}: {error}. The ledger is as it was; free some space"
            ) from error
