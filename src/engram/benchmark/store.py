"""A run in one SQLite file: the records, outcomes of the unedited model, and a row for each method
and record.

One process writes, a unit of work in a transaction: a kill at any moment loses the unit in flight
and nothing else. Knows rows; records and methods may be added later. Refuses to know how such a
file is begun and opened (see run_file), and what outcomes mean.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from annotated_types import Ge
from typing_extensions import TypedDict

from engram.benchmark.data.records import Form, Record
from engram.benchmark.metrics.outcomes import MeasureConfig, Measured, Outcome
from engram.errors import EngramFileError, SettingError
from engram.files.forms import parsed
from engram.files.run_file import RunFile, unzipped

Place = Annotated[int, Ge(0)]
T = TypeVar("T")

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


class _About(TypedDict):
    model: str
    identity: str
    dtype: str
    dataset: str
    form: Form
    config: MeasureConfig


class _Packed(NamedTuple):
    place: Place
    packed: bytes


class _RecordRow(NamedTuple):
    place: Place
    id: str
    record: bytes


class _MethodRow(NamedTuple):
    label: str
    method: str
    settings: str


class _SessionRow(NamedTuple):
    began: str
    machine: str


class _PlaceRow(NamedTuple):
    place: Place


class _ResultRow(NamedTuple):
    place: Place
    id: str
    before: bytes
    after: bytes
    seconds: Annotated[float, Ge(0)]
    size: Annotated[int, Ge(0)]
    error: str | None


class RunStore(RunFile):
    """An open file of a run. Made by `writing` or `reading`."""

    what, made_by = "a run of a benchmark", "engram bench -o {name}"
    tables, mark, alone, about_form = _TABLES, "results", True, _About

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
        stored = dict(self._unpacked("records", "record"))
        for place, (record, data) in enumerate(zip(records, packed, strict=True)):
            if place in stored and stored[place] != zlib.decompress(data):
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
        query = "SELECT began, machine FROM sessions ORDER BY rowid"
        return [
            {"began": row.began, **self._json(dict[str, Any], row.machine, "sessions", row.began)}
            for row in self._rows(_SessionRow, "sessions", query)
        ]

    def methods(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Return label -> (method, settings), in the order in which they were added."""
        query = "SELECT label, method, settings FROM methods ORDER BY rowid"
        return {
            row.label: (row.method, self._json(dict[str, Any], row.settings, "methods", row.label))
            for row in self._rows(_MethodRow, "methods", query)
        }

    def records(self) -> dict[int, Record]:
        query = "SELECT place, id, record FROM records ORDER BY place"
        records: dict[int, Record] = {}
        for place, id, packed in self._rows(_RecordRow, "records", query):
            records[place] = self._json(Record, packed, "records", place)
            if records[place].id != id:
                raise EngramFileError(
                    f"{self._where('records', place)} is damaged: id={id!r}, expected that of its "
                    f"record, {records[place].id!r}"
                )
        return records

    def unedited(self) -> dict[int, Outcome]:
        """Return outcomes of the unedited model by place."""
        return {
            place: parsed(Outcome, contents, self._where("unedited", place))
            for place, contents in self._unpacked("unedited", "outcome")
        }

    def done(self, label: str) -> set[int]:
        """Return places that have a result and an unedited outcome to compare it with."""
        # A result without an outcome to be compared with is measured again.
        query = "SELECT place FROM results JOIN unedited USING (place) WHERE label = ?"
        return {row.place for row in self._rows(_PlaceRow, "results", query, (label,))}

    def has_unedited(self) -> set[int]:
        """Return places that have an unedited outcome."""
        return {
            row.place for row in self._rows(_PlaceRow, "unedited", "SELECT place FROM unedited")
        }

    def results(self, label: str) -> dict[int, Measured]:
        """Return results of one method by place."""
        query = (
            "SELECT place, id, u.outcome, r.outcome, seconds, size, error FROM results r "
            "JOIN unedited u USING (place) JOIN records USING (place) "
            "WHERE label = ? ORDER BY place"
        )
        return {
            row.place: Measured(
                row.id,
                self._json(Outcome, row.before, "unedited", row.place),
                self._json(Outcome, row.after, "results", row.place),
                row.seconds,
                row.size,
                row.error,
            )
            for row in self._rows(_ResultRow, "results", query, (label,))
        }

    def _unpacked(self, table: str, column: str) -> Iterator[tuple[int, bytes]]:
        query = f"SELECT place, {column} FROM {table} ORDER BY place"
        for place, packed in self._rows(_Packed, table, query):
            yield place, unzipped(packed, self._where(table, place))

    def _json(self, form: type[T] | Any, data: str | bytes, table: str, place: int | str) -> T:
        """Return what a row holds, packed if it is bytes, as a value of `form`."""
        where = self._where(table, place)
        value: T = parsed(form, unzipped(data, where) if isinstance(data, bytes) else data, where)
        return value

    def _where(self, table: str, place: int | str) -> str:
        return f"{self.path}, table {table}, {place!r},"


def _packed(value: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), 6)
