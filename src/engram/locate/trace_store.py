"""The traces of a run in one SQLite file: a row a fact, written a batch at a time, taken up again after a kill.

Knows keys and bytes. Refuses to mix runs: what a file was begun with is written in it and has to be asked for again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from engram.errors import EditFileError, SettingError
from engram.locate.causal_trace import CausalTrace

FORMAT_VERSION = 1
_HASHED = {  # settings that are kept as a hash, which would say nothing
    "weights": "other weights of the model",
    "tokenizer": "another tokenizer",
    "noise_subjects": "noise measured on other subjects (the list's own, unless noise_subjects says whose)",
    "pairs": "another list of facts, so that other facts are paired",
}
_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE facts (key TEXT PRIMARY KEY, number INTEGER NOT NULL, prompt TEXT NOT NULL, skipped TEXT, trace BLOB);
"""


class TraceStore:
    """An open file of a run. Made by `writing` or `reading`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self.path = connection, path

    @classmethod
    @contextmanager
    def writing(cls, path: str | Path | None, about: dict[str, Any]) -> Iterator[TraceStore]:
        """A file to go on with, or a new one; None keeps it in memory.

        Raises:
            SettingError: the file was begun with other settings; the message says which.
            EditFileError: the file is something else, or cannot be written.
        """
        path = Path(":memory:") if path is None else Path(path)
        with _usable(path):
            if path != Path(":memory:"):
                path.parent.mkdir(parents=True, exist_ok=True)
            store = cls(sqlite3.connect(path), path)
        try:
            with _usable(path):
                if not store._has_tables():
                    store._begin(about)
                store._check(about)
            yield store
        finally:
            store._connection.close()

    @classmethod
    @contextmanager
    def reading(cls, path: str | Path) -> Iterator[TraceStore]:
        """A file that is only read.

        Raises:
            EditFileError: not a file of such a run.
        """
        path = Path(path)
        if not path.is_file():
            raise EditFileError(f"{path} is no file of a run; make one with engram.average_trace(..., out={path.name!r})")
        try:
            # not mode=ro: what a kill left half written is rolled back first, where the file may be written to
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
            try:
                store = cls(connection, path)
                version = store.about().get("format_version")
                if version != FORMAT_VERSION:
                    raise EditFileError(f"{path} has format version {version}, this engram reads {FORMAT_VERSION}")
                yield store
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise EditFileError(
                f"{path} is not a file of a run of traces ({error}); engram.average_trace writes one"
            ) from error

    def _has_tables(self) -> bool:
        return bool(self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'facts'").fetchone())

    def _begin(self, about: dict[str, Any]) -> None:
        rows = {"format_version": FORMAT_VERSION, **about}
        with self._connection:
            if self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise EditFileError(f"{self.path} is a database of something else; choose another name")
            self._connection.execute("BEGIN IMMEDIATE")
            for statement in filter(str.strip, _TABLES.split(";")):
                self._connection.execute(statement)
            pairs = [(name, json.dumps(value, sort_keys=True)) for name, value in rows.items()]
            self._connection.executemany("INSERT INTO about VALUES (?, ?)", pairs)

    def _check(self, about: dict[str, Any]) -> None:
        there, asked = self.about(), json.loads(json.dumps({"format_version": FORMAT_VERSION, **about}))
        for name, value in asked.items():
            if there.get(name) != value:
                begun = f"{name}={there.get(name)!r}, now asked for is {value!r}"
                raise SettingError(
                    f"{self.path} was begun with {_HASHED.get(name, begun)}. Go on with the same settings, or choose another file"
                )

    def about(self) -> dict[str, Any]:
        """What the run was begun with."""
        return {name: json.loads(value) for name, value in self._connection.execute("SELECT name, value FROM about")}

    def keys(self) -> set[str]:
        """The facts that are finished, skipped ones included."""
        return {key for (key,) in self._connection.execute("SELECT key FROM facts")}

    def add(self, rows: Iterable[tuple[str, int, str, str | None, CausalTrace | None]]) -> None:
        """Write (key, number in the list, prompt, reason why it was skipped, trace) rows, all of them or none.

        A fact that another process has finished in the meantime stays as it is.
        """
        with _usable(self.path), self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO facts VALUES (?, ?, ?, ?, ?)",
                [(key, n, prompt, why, trace and trace.to_bytes()) for key, n, prompt, why, trace in rows],
            )

    def traces(self, keys: Sequence[str] | None = None) -> list[CausalTrace]:
        """The traces of these facts, in this order; default: all, in the order of the list that they came from."""
        found = self._connection.execute("SELECT key, trace FROM facts WHERE skipped IS NULL ORDER BY number, rowid")
        return [CausalTrace.from_bytes(data, str(self.path)) for data in _chosen(found, keys)]

    def skipped(self, keys: Sequence[str] | None = None) -> list[tuple[str, str]]:
        """(prompt, reason) of those of these facts that were left out, ordered as `traces` are."""
        found = self._connection.execute(
            "SELECT key, prompt, skipped FROM facts WHERE skipped IS NOT NULL ORDER BY number, rowid"
        )
        return _chosen(((key, (prompt, why)) for key, prompt, why in found), keys)


T = TypeVar("T")


def _chosen(rows: Iterable[tuple[str, T]], keys: Sequence[str] | None) -> list[T]:
    by_key = dict(rows)
    return [by_key[key] for key in (by_key if keys is None else keys) if key in by_key]


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Mistakes of the file system and of SQLite, told with the file's name."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise EditFileError(
            f"{path} cannot be used for a run of traces: {error}. Choose another name, or a folder that you may write to"
        ) from error
