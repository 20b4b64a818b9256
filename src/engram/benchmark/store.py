"""A run in one SQLite file: the records, outcomes of the unedited model, and a row for each method
and record.

One process writes, a unit of work in a transaction: a kill at any moment loses the unit in flight
and nothing else. Knows rows; records and methods may be added later. Refuses to know how such a
file is begun and opened (see run_file), and what outcomes mean.
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

# `place` is the number in the data set and the order of everything that is read back. Outcomes of
# the unedited model depend on model and data only: one row serves all methods. Readings and texts
# are compressed JSON, not columns: a new kind of probe then needs no new table.
_TABLES = """
CREATE TABLE sessions (began TEXT NOT NULL, machine TEXT NOT NULL);
CREATE TABLE records (place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE methods (label TEXT PRIMARY KEY, method TEXT NOT NULL, settings TEXT NOT NULL);
CREATE TABLE unedited (place INTEGER PRIMARY KEY, outcome BLOB NOT NULL);
CREATE TABLE results (label TEXT NOT NULL, place INTEGER NOT NULL, outcome BLOB NOT NULL,
    seconds REAL NOT NULL, size INTEGER NOT NULL, error TEXT, PRIMARY KEY (label, place));
"""


class RunStore(RunFile):
    """An open file of a run. Made by `writing` or `reading`."""

    what, made_by = "a run of a benchmark", "engram bench -o {name}"
    tables, mark, alone = _TABLES, "results", True

    # -- writing -----------------------------------------------------------------------------------

    def begin_session(self, began: str, machine: Mapping[str, Any]) -> None:
        """Note time and machine: a run may be resumed on another machine."""
        with self._connection:
            self._connection.execute(
                "INSERT INTO sessions VALUES (?, ?)", (began, json.dumps(machine))
            )

    def add_records(self, records: Sequence[Record]) -> None:
        """Add the first records of the data set; those in the file have to be equal.

        Raises:
            SettingError: the file has another record at a place.
        """
        # Compared as JSON, not as compressed bytes: another zlib may compress to other bytes.
        packed = [_packed(record.to_dict()) for record in records]
        stored = dict(self._connection.execute("SELECT place, record FROM records"))
        for place, (record, data) in enumerate(zip(records, packed, strict=True)):
            if place in stored and zlib.decompress(stored[place]) != zlib.decompress(data):
                raise SettingError(
                    f"{self.path} was begun with another data set: its record {place} is not "
                    f"{record.id!r} as it is now. Resume with the same data, or choose another file"
                )
        rows = [
            (place, record.id, data)
            for place, (record, data) in enumerate(zip(records, packed, strict=True))
        ]
        with self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?)", rows)

    def add_method(self, label: str, method: str, settings: Mapping[str, Any]) -> None:
        """Add a method by the label of its results.

        Raises:
            SettingError: the label has results with other settings.
        """
        row = (method, json.dumps(settings, sort_keys=True))
        stored = self._connection.execute(
            "SELECT method, settings FROM methods WHERE label = ?", (label,)
        ).fetchone()
        # Without results the settings may still change: a typo costs no new file.
        begun = self._connection.execute(
            "SELECT 1 FROM results WHERE label = ?", (label,)
        ).fetchone()
        if begun and stored != row:
            raise SettingError(
                f"{self.path} has results of {label!r} with method {stored[0]!r} and settings "
                f"{stored[1]}; this call gives {row[0]!r} with {row[1]}. Choose another label"
            )
        with self._connection:
            self._connection.execute(
                # Not INSERT OR REPLACE: that makes a new row, and the method would move to the end.
                "INSERT INTO methods VALUES (?, ?, ?) ON CONFLICT (label) DO UPDATE "
                "SET method = excluded.method, settings = excluded.settings",
                (label, *row),
            )

    def add(self, label: str, measured: Iterable[tuple[int, Measured]], *, texts: bool) -> None:
        """Add results of one method, all of them or none.

        Args:
            measured: (place, result); replaces results in the file, but not outcomes of the
                unedited model.
            texts: whether outcomes of the unedited model are complete, texts included; others are
                not stored.
        """
        rows = list(measured)
        with self._connection:
            if texts:
                self._connection.executemany(
                    # The first outcome stays: every method is compared with the same numbers.
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
        """Return label -> (method, settings), in the order in which they were added."""
        rows = self._connection.execute(
            "SELECT label, method, settings FROM methods ORDER BY rowid"
        )
        return {label: (method, json.loads(settings)) for label, method, settings in rows}

    def records(self) -> dict[int, Record]:
        rows = self._connection.execute("SELECT place, record FROM records ORDER BY place")
        return {place: Record.from_dict(_unpacked(data)) for place, data in rows}

    def unedited(self) -> dict[int, Outcome]:
        """Return outcomes of the unedited model by place."""
        rows = self._connection.execute("SELECT place, outcome FROM unedited ORDER BY place")
        return {place: Outcome.from_dict(_unpacked(data)) for place, data in rows}

    def done(self, label: str) -> set[int]:
        """Return places that have a result and an unedited outcome to compare it with."""
        rows = self._connection.execute(
            # A result without an outcome to be compared with is measured again.
            "SELECT place FROM results JOIN unedited USING (place) WHERE label = ?",
            (label,),
        )
        return {place for (place,) in rows}

    def has_unedited(self) -> set[int]:
        """Return places that have an unedited outcome."""
        return {place for (place,) in self._connection.execute("SELECT place FROM unedited")}

    def results(self, label: str) -> dict[int, Measured]:
        """Return results of one method by place."""
        rows = self._connection.execute(
            "SELECT place, id, u.outcome, r.outcome, seconds, size, error FROM results r "
            "JOIN unedited u USING (place) JOIN records USING (place) "
            "WHERE label = ? ORDER BY place",
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
