"""A run in one SQLite file: the records, what the unedited model makes of them, and a row a method and record.

Written by one process, a unit of work in a transaction: killing it at any moment loses what is in flight and nothing else. Knows
rows. Refuses to mix runs: what a file was begun with has to be asked for again; more records and more methods may be added.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from engram.errors import EditFileError, SettingError
from engram.evaluate.bench.outcomes import Measured, Outcome
from engram.evaluate.data.records import Record
from engram.locking import locked

FORMAT_VERSION = 1
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sessions (began TEXT NOT NULL, machine TEXT NOT NULL);
CREATE TABLE records (place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE methods (label TEXT PRIMARY KEY, method TEXT NOT NULL, settings TEXT NOT NULL);
CREATE TABLE unedited (place INTEGER PRIMARY KEY, outcome BLOB NOT NULL);
CREATE TABLE results (label TEXT NOT NULL, place INTEGER NOT NULL, outcome BLOB NOT NULL, seconds REAL NOT NULL,
    size INTEGER NOT NULL, error TEXT, PRIMARY KEY (label, place));
"""


class RunStore:
    """An open file of a run. Made by `writing` or `reading`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self.path = connection, path

    @classmethod
    @contextmanager
    def writing(cls, path: str | Path, about: Mapping[str, Any]) -> Iterator[RunStore]:
        """A file to go on with, or a new one.

        Args:
            about: what has to be the same each time: model, data set, what is measured.
        Raises:
            SettingError: the file was begun with something else; the message says with what.
            EditFileError: the file is something else, or cannot be written. EngramError: another process is writing it.
        """
        path = Path(path)
        advice = "Wait until it is done, or write to another file"
        with ExitStack() as held:
            with _usable(path, OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(path.with_name(path.name + ".lock"), 0, path, advice))
                connection = sqlite3.connect(path)
                held.callback(connection.close)
                store = cls(connection, path)
                if not store._has_tables():
                    store._begin(about)
                store._check(about)
            with _usable(path):
                yield store

    @classmethod
    @contextmanager
    def reading(cls, path: str | Path) -> Iterator[RunStore]:
        """A file that is only read.

        Raises:
            EditFileError: not a file of such a run.
        """
        path = Path(path)
        if not path.is_file():
            raise EditFileError(f"{path} is no file of a run; make one with engram bench -o {path.name}")
        with _usable(path, OSError):
            # not mode=ro: what a kill left half written is rolled back first, where the file may be written to
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
            try:
                store = cls(connection, path)
                if not store._has_tables():
                    raise EditFileError(f"{path} is a database of something else; engram bench writes runs")
                version = store.about().get("format_version")
                if version != FORMAT_VERSION:
                    raise EditFileError(f"{path} has format version {version}, this engram reads {FORMAT_VERSION}")
                yield store
            finally:
                connection.close()

    def _has_tables(self) -> bool:
        return bool(self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'results'").fetchone())

    def _begin(self, about: Mapping[str, Any]) -> None:
        with self._connection:
            if self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise EditFileError(f"{self.path} is a database of something else; choose another name")
            self._connection.execute("BEGIN IMMEDIATE")
            for statement in filter(str.strip, _TABLES.split(";")):
                self._connection.execute(statement)
            rows = {"format_version": FORMAT_VERSION, **about}
            pairs = [(name, json.dumps(value, sort_keys=True)) for name, value in rows.items()]
            self._connection.executemany("INSERT INTO about VALUES (?, ?)", pairs)

    def _check(self, about: Mapping[str, Any]) -> None:
        there, asked = self.about(), json.loads(json.dumps({"format_version": FORMAT_VERSION, **about}))
        for name, value in asked.items():
            if there.get(name) != value:
                raise SettingError(
                    f"{self.path} was begun with {name}={there.get(name)!r}, now asked for is {value!r}. Go on with the same, or "
                    "choose another file"
                )

    # -- writing -----------------------------------------------------------------------------------------------------

    def begin_session(self, began: str, machine: Mapping[str, Any]) -> None:
        """Note who is writing now: a run may go on on another machine."""
        with self._connection:
            self._connection.execute("INSERT INTO sessions VALUES (?, ?)", (began, json.dumps(machine)))

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
        rows = [(place, record.id, data) for place, (record, data) in enumerate(zip(records, packed, strict=True))]
        with self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?)", rows)

    def add_method(self, label: str, method: str, settings: Mapping[str, Any]) -> None:
        """A method by the name under which its results are kept.

        Raises:
            SettingError: the label has results with other settings.
        """
        row = (method, json.dumps(settings, sort_keys=True))
        there = self._connection.execute("SELECT method, settings FROM methods WHERE label = ?", (label,)).fetchone()
        begun = self._connection.execute("SELECT 1 FROM results WHERE label = ?", (label,)).fetchone()
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
            measured: (place, result), instead of what is there. Outcomes of the unedited model that are there stay.
            texts: whether outcomes of the unedited model are complete, texts included; others are not kept.
        """
        rows = list(measured)
        with self._connection:
            if texts:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO unedited VALUES (?, ?)", [(at, _packed(m.before.to_dict())) for at, m in rows]
                )
            self._connection.executemany(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)",
                [(label, at, _packed(m.after.to_dict()), m.seconds, m.size, m.error) for at, m in rows],
            )

    # -- reading -----------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What the run was begun with."""
        return {name: json.loads(value) for name, value in self._connection.execute("SELECT name, value FROM about")}

    def sessions(self) -> list[dict[str, Any]]:
        rows = self._connection.execute("SELECT began, machine FROM sessions ORDER BY rowid")
        return [{"began": began, **json.loads(machine)} for began, machine in rows]

    def methods(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Label -> (method, settings), in the order in which they were added."""
        rows = self._connection.execute("SELECT label, method, settings FROM methods ORDER BY rowid")
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
        rows = self._connection.execute("SELECT place FROM results JOIN unedited USING (place) WHERE label = ?", (label,))
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
            place: Measured(id, Outcome.from_dict(_unpacked(was)), Outcome.from_dict(_unpacked(now)), seconds, size, error)
            for place, id, was, now, seconds, size, error in rows
        }


def _packed(value: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), 6)


def _unpacked(data: bytes) -> dict[str, Any]:
    return dict(json.loads(zlib.decompress(data)))


@contextmanager
def _usable(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Mistakes of SQLite, and of `more` kinds, told with the file's name."""
    mistakes: tuple[type[Exception], ...] = (sqlite3.Error, zlib.error, *more)
    try:
        yield
    except mistakes as error:
        raise EditFileError(
            f"{path} cannot be used for a run of a benchmark: {error}. Choose another name, or a folder that you may write to"
        ) from error
