"""A run in one SQLite file: begun with what it is about, written a transaction at a time, resumed
after a kill.

Knows the file, its version and who may write it. Refuses to mix runs: a file is resumed only with
the settings it was begun with. Its users say which rows it holds: benchmarks (benchmark/store) and
average traces (locate/trace_store).
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from engram.checks import briefly
from engram.errors import EngramFileError, SettingError
from engram.files.checksums import stamped, verified
from engram.files.forms import parsed, parsed_row
from engram.files.locks import locked
from engram.files.names import check_regular, open_regular

Form = TypeVar("Form")

_ABOUT = "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);"
_MEMORY = Path(":memory:")
_LARGEST = 1 << 24  # bytes of a row's contents when they are unpacked; they are some thousand
_JOURNAL_MARK = bytes.fromhex("d9d505f920a163d7")  # of SQLite's journals


class _AboutRow(NamedTuple):
    name: str
    value: str


class RunFile:
    """An open file of a run, from `writing` or `reading`.

    Attributes:
        what, made_by: of errors: what the file holds, and what makes one.
        tables, mark: statements that make its tables, and the table by which it is known.
        about_form: of what a run is begun with.
        version: of this layout.
        alone: whether one process at a time may write.
        hashed: what an error says instead of two values that are hashes.
    """

    what: ClassVar[str]
    made_by: ClassVar[str]
    tables: ClassVar[str]
    mark: ClassVar[str]
    about_form: ClassVar[Any] = dict[str, Any]
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
                file = cls(held.enter_context(_connected(path, "rwc")), path)
                if not file._schema():
                    file._begin(about)
                file._check_schema()
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
        if not path.exists() or path.is_dir():
            raise EngramFileError(
                f"{path} is no file of a run; make one with {cls.made_by.format(name=path.name)}"
            )
        with ExitStack() as held, cls._usable(path, OSError):
            # not mode=ro: what a kill left half written is rolled back first, where the file may be
            # written to
            file = cls(held.enter_context(_connected(path, "rw")), path)
            file._check_schema()
            version = file._stored_about().get("format_version")
            if version != cls.version:
                raise EngramFileError(
                    f"{path} has format version {briefly(version)}, this engram reads {cls.version}"
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
        if not path.name:  # "" and "." are this folder: a lock beside it would be outside of it
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        advice = "Wait until it is done, or write to another file"
        return locked(path.with_name(path.name + ".lock"), 0, path, advice)

    def about(self) -> dict[str, Any]:
        """Return what the run was begun with.

        Raises:
            EngramFileError: it is damaged.
        """
        about, where = self._stored_about(), f"{self.path}, table about,"
        parsed(self.about_form, json.dumps(about), where)
        return verified(about, where)

    def _stored_about(self) -> dict[str, Any]:
        return {
            name: parsed(Any, value, f"{self.path}, table about, {briefly(name)},")
            for name, value in self._rows(_AboutRow, "about", "SELECT name, value FROM about")
        }

    def _rows(
        self, form: type[Form], table: str, query: str, values: tuple[object, ...] = ()
    ) -> Iterator[Form]:
        """Yield rows of a query as values of `form`, a NamedTuple of its columns."""
        for row in self._connection.execute(query, values):
            yield parsed_row(form, row, f"{self.path}, table {table},")

    def _schema(self) -> set[tuple[str, str]]:
        return _schema(self._connection)

    def _check_schema(self) -> None:
        """Raise unless the file has our tables and nothing else: no triggers and no views, which
        would run when a row is read or written.
        """
        found, ours = self._schema(), _schema_of(_ABOUT + self.tables)
        if self.mark not in {name for name, _ in found}:
            raise EngramFileError(
                f"{self.path} is a database of something else, not {self.what}; choose another name"
            )
        if lacking := sorted(ours - found):
            raise sqlite3.DatabaseError(f"no such table as ours: {lacking[0][0]}")
        if added := sorted(found - ours):
            raise sqlite3.DatabaseError(f"it has what no run has: {briefly(added[0][0])}")

    def _begin(self, about: Mapping[str, Any]) -> None:
        with self._connection:
            # tables and settings in one transaction: a kill leaves a whole file or an empty one
            self._connection.execute("BEGIN IMMEDIATE")
            if self._schema():
                return  # another process has begun it in the meantime
            for statement in filter(str.strip, (_ABOUT + self.tables).split(";")):
                self._connection.execute(statement)
            rows = {"format_version": self.version, **about}
            # sorted keys, so that equal settings are equal text
            pairs = [
                (name, json.dumps(value, sort_keys=True)) for name, value in stamped(rows).items()
            ]
            self._connection.executemany("INSERT INTO about VALUES (?, ?)", pairs)

    def _check(self, about: Mapping[str, Any]) -> None:
        begun = self._stored_about()
        now = json.loads(json.dumps({"format_version": self.version, **about}))
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
        mistakes: tuple[type[Exception], ...] = (sqlite3.Error, *more)
        try:
            yield
        except mistakes as error:
            raise EngramFileError(
                f"{path} cannot be used for {cls.what}: {error}. Choose another name, or a folder "
                "that you may write to"
            ) from error


def unzipped(data: bytes, where: str) -> bytes:
    """Return what zlib packed, if it is no larger than any row's contents can be.

    Raises:
        EngramFileError: damaged, or larger: a few bytes may unpack to more than the memory holds.
    """
    unpacker = zlib.decompressobj()
    try:
        contents = unpacker.decompress(data, _LARGEST)
        whole = unpacker.eof
    except zlib.error as error:
        raise EngramFileError(f"{where} is damaged: {error}") from error
    if not whole:
        problem = "cut short" if len(contents) < _LARGEST else "larger than any that engram writes"
        raise EngramFileError(f"{where} is damaged: it is {problem}")
    return contents


@contextmanager
def _connected(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Open a database that somebody else may have written: its contents are data only."""
    name = str(path)
    if path != _MEMORY:
        _check_files(path)
        name = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(name, uri=True)
    try:
        # functions in a schema are not called, and pages are looked at before they are used
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        yield connection
    finally:
        connection.close()


def _check_files(path: Path) -> None:
    """Raise unless the database and what SQLite keeps beside it are regular files, and its journal
    is of this file alone.
    """
    if path.exists() and not path.is_dir():  # of a folder SQLite itself says that it is none
        check_regular(path)
    for end in ("-journal", "-wal", "-shm"):
        beside = path.with_name(path.name + end)
        if not os.path.lexists(beside):
            continue
        if not stat.S_ISREG(beside.lstat().st_mode):
            raise EngramFileError(f"{beside} is no regular file; remove it to use {path.name}")
        if end == "-journal":
            with open_regular(beside) as file:
                file.seek(max(0, beside.stat().st_size - len(_JOURNAL_MARK)))
                ends = file.read() == _JOURNAL_MARK
            # A journal of several databases ends so, with the name of a file that SQLite deletes.
            if ends:
                raise EngramFileError(
                    f"{beside} is no journal of a run: it names another file; remove it to use "
                    f"{path.name}"
                )


def _schema(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    """Return (name, statement) of everything in a database but what SQLite adds by itself."""
    rows = connection.execute("SELECT type, name, sql FROM sqlite_master")
    return {
        (str(name), " ".join(str(sql).split()))
        for kind, name, sql in rows
        if not (str(name).startswith("sqlite_") and kind in ("table", "index"))
    }


@cache
def _schema_of(statements: str) -> set[tuple[str, str]]:
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(statements)
        return _schema(connection)
    finally:
        connection.close()
