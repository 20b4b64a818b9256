"""The traces of a run in one SQLite file: a row for each fact, written a batch at a time, so that a
killed run can resume.

Knows keys and bytes. Refuses to know how such a file is created and opened: see files/run_file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple, TypeVar

from annotated_types import Ge

from engram.files.run_file import RunFile
from engram.locate.trace import CausalTrace

_HASHED = {  # settings that are kept as a hash, which would say nothing
    "weights": "other weights of the model",
    "tokenizer": "another tokenizer",
    "noise_subjects": "noise measured on other subjects "
    "(the list's own, unless noise_subjects says whose)",
    "pairs": "another list of facts, so that other facts are paired",
}
_TABLES = """
CREATE TABLE facts (
    key TEXT PRIMARY KEY, number INTEGER NOT NULL, prompt TEXT NOT NULL, skipped TEXT, trace BLOB
);
"""


class StoredRow(NamedTuple):
    """A finished fact: its trace, or the reason why it was skipped."""

    key: str
    number: int  # in the list of facts
    prompt: str
    skipped: str | None
    trace: CausalTrace | None


class _KeyRow(NamedTuple):
    key: str


class _TraceRow(NamedTuple):
    key: str
    number: Annotated[int, Ge(0)]
    prompt: str
    trace: bytes


class _SkippedRow(NamedTuple):
    key: str
    number: Annotated[int, Ge(0)]
    prompt: str
    skipped: str


class TraceStore(RunFile):
    """An open file of a run, from `writing` or `reading`."""

    what, made_by = "a run of traces", "engram.average_trace(..., out='{name}')"
    tables, mark = _TABLES, "facts"
    hashed = _HASHED

    def keys(self) -> set[str]:
        """Return the keys of finished facts, skipped ones included."""
        return {row.key for row in self._rows(_KeyRow, "facts", "SELECT key FROM facts")}

    def add(self, rows: Iterable[StoredRow]) -> None:
        """Write rows, all of them or none.

        A fact that another process has finished in the meantime stays as it is.
        """
        with self._connection:
            self._connection.executemany(
                # not REPLACE: the other process may have returned its trace already
                "INSERT OR IGNORE INTO facts VALUES (?, ?, ?, ?, ?)",
                [(*row[:-1], row.trace and row.trace.to_bytes()) for row in rows],
            )

    def traces(self, keys: Sequence[str] | None = None) -> list[CausalTrace]:
        """Return the traces of these facts, in this order; default: all, in the order of their
        list.
        """
        query = f"{_SELECT} trace FROM facts WHERE skipped IS NULL ORDER BY number, rowid"
        rows = ((row.key, row.trace) for row in self._rows(_TraceRow, "facts", query))
        return [CausalTrace.from_bytes(data, str(self.path)) for data in _chosen(rows, keys)]

    def skipped(self, keys: Sequence[str] | None = None) -> list[tuple[str, str]]:
        """Return (prompt, reason) of the facts that were left out, ordered as `traces` are."""
        query = f"{_SELECT} skipped FROM facts WHERE skipped IS NOT NULL ORDER BY number, rowid"
        rows = self._rows(_SkippedRow, "facts", query)
        return _chosen(((row.key, (row.prompt, row.skipped)) for row in rows), keys)


_SELECT = "SELECT key, number, prompt,"
T = TypeVar("T")


def _chosen(rows: Iterable[tuple[str, T]], keys: Sequence[str] | None) -> list[T]:
    by_key = dict(rows)
    return [by_key[key] for key in (by_key if keys is None else keys) if key in by_key]
