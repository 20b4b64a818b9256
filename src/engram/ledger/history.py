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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from engram.errors import EngramFileError
from engram.facts import Fact
from engram.files.checksums import FIELD, checksum, note_unchecked
from engram.files.forms import parsed
from engram.files.names import open_regular

What = Literal["added", "rolled back", "removed", "pruned"]
Number = Annotated[int, Ge(1)]  # of an entry
FactRef = tuple[Number, Annotated[int, Ge(0)]]  # and the index of a fact in its edit


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
    entry: Number | None = None
    facts: tuple[Fact, ...] = ()
    method: str | None = None
    identity: str | None = None
    weights: tuple[str, ...] = ()
    base_entries: tuple[Number, ...] = ()
    gone: tuple[FactRef, ...] = ()
    dependents: tuple[Number, ...] = ()
    canary: dict[str, float] = field(default_factory=dict)
    tripped: tuple[str, ...] = ()
    state: dict[str, str] = field(default_factory=dict)
    pruned: tuple[Number, ...] = ()

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
        _apply(event, entries)
    return entries


def _apply(event: Event, entries: dict[int, Entry]) -> None:
    """Change `entries` to what they are after the event."""
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


def _fault(event: Event, entries: Mapping[int, Entry]) -> str | None:
    """Return why an event cannot have happened to these entries; None if it can.

    Fields have the right types. A line that was moved, repeated or left out fits no entries.
    """
    new, added = event.what in ("added", "rolled back"), (event.entry, event.facts, event.method)
    try:
        datetime.fromisoformat(event.when)
    except ValueError:
        return f"when={event.when!r}, expected a time such as {now()}"
    if new:
        if event.entry != len(entries) + 1:
            return f"entry={event.entry}, expected {len(entries) + 1}, the next number"
        if not all((*added, event.identity, event.weights)):
            return "facts, method, identity or weights are missing; an entry has them all"
        if any(e.active and e.identity == event.identity for e in entries.values()):
            return f"identity={event.identity!r} is that of an entry in force"
    elif any((*added, event.identity, event.weights, event.base_entries, event.state)):
        return f"entry={event.entry}: an entry comes with {event.what!r}, expected 'added'"
    if bool(event.tripped) != (event.what == "rolled back"):
        return f"tripped={list(event.tripped)}, expected limits where an edit was rolled back"
    if bool(event.pruned) != (event.what == "pruned"):
        return f"pruned={list(event.pruned)}, expected entries where files were pruned"
    if event.what == "removed" and not event.gone:
        return "gone=[], expected the facts that were removed"
    if event.what == "pruned" and event.gone:
        return f"gone={format_refs(event.gone)}, expected none where files were pruned"
    for name in ("base_entries", "dependents", "pruned"):
        if unknown := set(getattr(event, name)) - set(entries):
            return f"{name}={min(unknown)}, which is no entry before this line"
    for number in event.pruned:
        if entries[number].active or entries[number].pruned:
            return f"pruned={number}, expected an entry with no fact in force and with its files"
    for number, fact in event.gone:
        if number not in entries or fact not in entries[number].active:
            return f"gone={number}.{fact}, which is not in force before this line"
    if len(set(event.gone)) < len(event.gone):
        return f"gone={format_refs(event.gone)}, expected each fact once"
    return None


class History:
    """The history's file. Each line is read once, since lines never change.

    A line's checksum is that of its contents and of the line before: a line that was changed, moved
    or left out is noticed. (Lines that are cut off at the end are not: only a backup knows them.)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: list[Event] = []
        self._entries: dict[int, Entry] = {}
        self._end = 0
        self._last = ""  # checksum of the last line, "" where an older engram wrote it

    def events(self) -> tuple[Event, ...]:
        """Return everything that has happened so far, in any process.

        Raises:
            EngramFileError: a line that is no event, or cannot follow from those before it.
        """
        try:
            with open_regular(self.path) as file:
                file.seek(self._end)  # only what came since the last call
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError as error:
            raise EngramFileError(f"{self.path} cannot be read: {error}. {_ADVICE}") from error
        for line in whole.split(b"\n") if newline else ():
            self._read(line)
            self._end += len(line) + 1
        return tuple(self._events)

    def _read(self, line: bytes) -> None:
        where = f"{self.path}, line {len(self._events) + 1},"
        event: Event = parsed(Event, line, where, advice=_ADVICE)
        fault = _fault(event, self._entries)
        record: dict[str, Any] = json.loads(line)
        found = record.pop(FIELD, "")
        if found != (_chained(record, self._last) if found or self._last else ""):
            fault = fault or (
                "its contents or the line before are not those that were written (another checksum)"
            )
        if fault:
            raise EngramFileError(f"{where} is damaged: {fault}. {_ADVICE}")
        if not found and not self._events:  # said once, of the first line
            note_unchecked(self.path)
        _apply(event, self._entries)
        self._events.append(event)
        self._last = found

    def append(self, event: Event) -> None:
        """Make an event happen: it is on the disk when this returns. The caller holds the lock.

        Raises:
            EngramFileError: it cannot be written, and has not happened.
        """
        self.events()  # moves `_end` to the end of the last whole line, also of other writers
        record = event.to_dict()
        line = json.dumps(record | {FIELD: _chained(record, self._last)}, ensure_ascii=False) + "\n"
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


_ADVICE = "Something other than engram has changed it; take the ledger from a backup"


def _chained(record: Mapping[str, Any], last: str) -> str:
    return checksum({**record, "after": last})
