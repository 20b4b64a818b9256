"""A run in one SQLite file: the records, what the unedited model makes of them, and a row a method
and record.

Written by one process, a unit of work in a transaction: killing it at any moment loses what is in
    flight and nothing else. Knows
rows: more records and more methods may be added. How the file is begun and opened, run_file knows.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram.benchmark.data.records import Record
from engram.benchmark.metrics.outcomes import Measured, Outcome
from engram.errors import SettingError
from engram.files.run_file import RunFile

_TABLES = """
CREATE TABLE sessions (began TEXT NOT NULL, machine TEXT NOT NULL);
CREATE TABLE records (place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE methods (label TEXT PRIMARY KEY, method TEXT NOT NULL, settings TEXT NOT NULL);
CREATE TABLE unedited (place INTEGER PRIMARY KEY, outcome BLOB NOT NULL);
CREATE TABLE results (label TEXT NOT NULL, place INTEGER NOT NULL, outcome BLOB NOT NULL, seconds REAL NOT NULL,
    size INTEGER NOT NULL, error TEXT, PRIMARY KEY (label, place));
"""


class RunStore(RunFile):
    """An open file of a run. Made by `writing` or `reading`."""

    what, made_by = "a run of a benchmark", "engram bench -o {name}"
    tables, mark, alone = _TABLES, "results", True

    # -- writing -----------------------------------------------------------------------------------

    def begin_session(self, began: str, machine: Mapping[str, Any]) -> None:
        """Note who is writing now: a run may go on on another machine."""
        with self._connection:
            self._connection.execute(
                "INSERT INTO sessions VALUES (?, ?)", (began, json.dumps(machine))
            )

    def add_records(self, records: Sequence[Record]) -> None:
        """The first records of the data set; those that are there already have to be the same.

        Raises:
            SettingError: another record stands at a place.
        """
        packed = [_packed(record.to_dict()) for record in records]
        there = dict(self._connection.execute("SELECT place, record FROM records"))
        for place, (record, data) in enumerate(zip(records, packed, strict=True)):
            if place in there and zlib.decompress(there[place]) != zlib.decompress(data):
                raise SettingError(
                    f"{self.path} was begun with another data set: its record {place} is not {record.id!r} as it is now. Go on with "
                    "the same data, or choose another file"
                )
        rows = [
            (place, record.id, data)
            for place, (record, data) in enumerate(zip(records, packed, strict=True))
        ]
        with self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?)", rows)

    def add_method(self, label: str, method: str, settings: Mapping[str, Any]) -> None:
        """A method by the name under which its results are kept.

        Raises:
            SettingError: the label has results with other settings.
        """
        row = (method, json.dumps(settings, sort_keys=True))
        there = self._connection.execute(
            "SELECT method, settings FROM methods WHERE label = ?", (label,)
        ).fetchone()
        begun = self._connection.execute(
            "SELECT 1 FROM results WHERE label = ?", (label,)
        ).fetchone()
        if begun and there != row:
            raise SettingError(
                f"{self.path} has results of {label!r} with method {there[0]!r} and settings {there[1]}, now asked for is {row[0]!r} "
                f"with {row[1]}. Give these another label"
            )
        with self._connection:
            self._connection.execute(
                "INSERT INTO methods VALUES (?, ?, ?) ON CONFLICT (label) DO UPDATE SET method = excluded.method, "
                "settings = excluded.settings",
                (label, *row),
            )

    def add(self, label: str, measured: Iterable[tuple[int, Measured]], *, texts: bool) -> None:
        """Results of one method, all of them or none.

        Args:
            measured: (place, result), instead of what is there. Outcomes of the unedited model that
                are there stay.
            texts: whether outcomes of the unedited model are complete, texts included; others are
                not kept.
        """
        rows = list(measured)
        with self._connection:
            if texts:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO unedited VALUES (?, ?)",
                    [(at, _packed(m.before.to_dict())) for at, m in rows],
                )
            self._connection.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (label, at, _packed(m.after.to_dict()), m.seconds, m.size, m.error)
                    for at, m in rows
                ],
            )

    # -- reading -----------------------------------------------------------------------------------

    def sessions(self) -> list[dict[str, Any]]:
        rows = self._connection.execute("SELECT began, machine FROM sessions ORDER BY rowid")
        return [{"began": began, **json.loads(machine)} for began, machine in rows]

    def methods(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Label -> (method, settings), in the order in which they were added."""
        rows = self._connection.execute(
            "SELECT label, method, settings FROM methods ORDER BY rowid"
        )
        return {label: (method, json.loads(settings)) for label, method, settings in rows}

    def records(self) -> dict[int, Record]:
        rows = self._connection.execute("SELECT place, record FROM records ORDER BY place")
        return {place: Record.from_dict(_unpacked(data)) for place, data in rows}

    def unedited(self) -> dict[int, Outcome]:
        """Outcomes of the unedited model by place."""
        rows = self._connection.execute("SELECT place, outcome FROM unedited ORDER BY place")
        return {place: Outcome.from_dict(_unpacked(data)) for place, data in rows}

    def done(self, label: str) -> set[int]:
        """Places that have a result and an unedited outcome to compare it with."""
        rows = self._connection.execute(
            "SELECT place FROM results JOIN unedited USING (place) WHERE label = ?", (label,)
        )
        return {place for (place,) in rows}

    def has_unedited(self) -> set[int]:
        """Places whose unedited outcome is there."""
        return {place for (place,) in self._connection.execute("SELECT place FROM unedited")}

    def results(self, label: str) -> dict[int, Measured]:
        """Results of one method by place."""
        rows = self._connection.execute(
            "SELECT place, id, u.outcome, r.outcome, seconds, size, error FROM results r JOIN unedited u USING (place) "
            "JOIN records USING (place) WHERE label = ? ORDER BY place",
            (label,),
        )
        return {
            place: Measured(
                id,
                Outcome.from_dict(_unpacked(was)),
                Outcome.from_dict(_unpacked(now)),
                seconds,
                size,
                error,
            )
            for place, id, was, now, seconds, size, error in rows
        }


def _packed(value: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), 6)


def _unpacked(data: bytes) -> dict[str, Any]:
    return dict(json.loads(zlib.decompress(data)))
