"""A run in one SQLite file: begun with what it is about, written a transaction at a time, resumed
after a kill.

Knows the file, its version and who may write it. Refuses to mix runs: a file is resumed only with
the settings it was begun with. Its users say which rows it holds: benchmarks (benchmark/store) and
average traces (locate/trace_store).
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

from engram.errors import EngramFileError, SettingError
from engram.files.locks import locked

_ABOUT = "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);"
_MEMORY = Path(":memory:")


class RunFile:
    """An open file of a run, from `writing` or `reading`.

    Attributes:
        what, made_by: of errors: what the file holds, and what makes one.
        tables, mark: statements that make its tables, and the table by which it is known.
        version: of this layout.
        alone: whether one process at a time may write.
        hashed: what an error says instead of two values that are hashes.
    """

    what: ClassVar[str]
    made_by: ClassVar[str]
    tables: ClassVar[str]
    mark: ClassVar[str]
    version: ClassVar[int] = 1
    alone: ClassVar[bool] = False
    hashed: ClassVar[Mapping[str, str]] = {}

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection, self.path = connection, path

    @classmethod
    @contextmanager
    def writing(cls, path: str | Path | None, about: Mapping[str, Any]) -> Iterator[Self]:
        """Open a file to resume, or a new one; None keeps it in memory.

        Args:
            about: what has to be the same each time, such as the model and the data.
        Raises:
            SettingError: the file was begun with something else; the message says with what.
            EngramFileError: the file is something else, or cannot be written. EngramError: another
                process is writing it.
        """
        path = _MEMORY if path is None else Path(path)
        with ExitStack() as held:
            with cls._usable(path, OSError):
                if path != _MEMORY:
                    path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(cls._alone(path))
                connection = sqlite3.connect(path)
                held.callback(connection.close)
                file = cls(connection, path)
                if not file._has_tables():
                    file._begin(about)
                file._check(about)
            with cls._usable(path):
                yield file

    @classmethod
    @contextmanager
    def reading(cls, path: str | Path) -> Iterator[Self]:
        """Open a file that is only read.

        Raises:
            EngramFileError: not a file of such a run.
        """
        path = Path(path)
        if not path.is_file():
            raise EngramFileError(
                f"{path} is no file of a run; make one with {cls.made_by.format(name=path.name)}"
            )
        with ExitStack() as held, cls._usable(path, OSError):
            # not mode=ro: what a kill left half written is rolled back first, where the file may be
            # written to
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
            held.callback(connection.close)
            file = cls(connection, path)
            if not file._has_tables():
                raise EngramFileError(f"{path} is a database of something else, not {cls.what}")
            version = file.about().get("format_version")
            if version != cls.version:
                raise EngramFileError(
                    f"{path} has format version {version}, this engram reads {cls.version}"
                )
            yield file

    @classmethod
    def check(cls, path: str | Path) -> None:
        """Raise unless a run may be begun or resumed at `path`; before a model is loaded.

        Raises:
            EngramFileError: the file is something else. EngramError: another process writes it.
        """
        path = Path(path)
        if not path.exists():
            return
        with cls._usable(path, OSError), cls._alone(path):
            if path.stat().st_size:  # a kill may leave an empty file
                with cls.reading(path):
                    pass

    @classmethod
    def _alone(cls, path: Path) -> AbstractContextManager[None]:
        if not cls.alone or path == _MEMORY:
            return nullcontext()
        advice = "Wait until it is done, or write to another file"
        return locked(path.with_name(path.name + ".lock"), 0, path, advice)

    def about(self) -> dict[str, Any]:
        """Return what the run was begun with."""
        return {
            name: json.loads(value)
            for name, value in self._connection.execute("SELECT name, value FROM about")
        }

    def _has_tables(self) -> bool:
        return bool(
            self._connection.execute(
                "SELECT 1 FROM sqlite_master WHERE name = ?", (self.mark,)
            ).fetchone()
        )

    def _begin(self, about: Mapping[str, Any]) -> None:
        with self._connection:
            if self._connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise EngramFileError(
                    f"{self.path} is a database of something else; choose another name"
                )
            # tables and settings in one transaction: a kill leaves a whole file or an empty one
            self._connection.execute("BEGIN IMMEDIATE")
            for statement in filter(str.strip, (_ABOUT + self.tables).split(";")):
                self._connection.execute(statement)
            rows = {"format_version": self.version, **about}
            # sorted keys, so that equal settings are equal text
            pairs = [(name, json.dumps(value, sort_keys=True)) for name, value in rows.items()]
            self._connection.executemany("INSERT INTO about VALUES (?, ?)", pairs)

    def _check(self, about: Mapping[str, Any]) -> None:
        begun, now = self.about(), json.loads(json.dumps({"format_version": self.version, **about}))
        for name, value in now.items():
            if begun.get(name) != value:
                difference = f"{name}={begun.get(name)!r}, it is {value!r} now"
                raise SettingError(
                    f"{self.path} was begun with {self.hashed.get(name, difference)}. "
                    "Resume with the same settings, or choose another file"
                )

    @classmethod
    @contextmanager
    def _usable(cls, path: Path, *more: type[Exception]) -> Iterator[None]:
        """Raise errors of SQLite, and of `more` classes, with the file's name."""
        mistakes: tuple[type[Exception], ...] = (sqlite3.Error, zlib.error, *more)
        try:
            yield
        except mistakes as error:
            raise EngramFileError(
                f"{path} cannot be used for {cls.what}: {error}. Choose another name, or a folder "
                "that you may write to"
            ) from error
