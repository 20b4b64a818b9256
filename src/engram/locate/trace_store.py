"""The traces of a run in one SQLite file: a row a fact, written a batch at a time, taken up again
after a kill.

Knows keys and bytes. How the file is begun and opened, run_file knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from engram.files.run_file import RunFile
from engram.locate.trace import CausalTrace

_HASHED = {  # settings that are kept as a hash, which would say nothing
    "weights": "other weights of the model",
    "tokenizer": "another tokenizer",
    "noise_subjects": "noise measured on other subjects (the list's own, unless noise_subjects says whose)",
    "pairs": "another list of facts, so that other facts are paired",
}
_TABLES = """
CREATE TABLE facts (key TEXT PRIMARY KEY, number INTEGER NOT NULL, prompt TEXT NOT NULL, skipped TEXT, trace BLOB);
"""


class TraceStore(RunFile):
    """An open file of a run. Made by `writing` or `reading`."""

    what, made_by = "a run of traces", "engram.average_trace(..., out='{name}')"
    tables, mark = _TABLES, "facts"
    hashed = _HASHED

    def keys(self) -> set[str]:
        """The facts that are finished, skipped ones included."""
        return {key for (key,) in self._connection.execute("SELECT key FROM facts")}

    def add(self, rows: Iterable[tuple[str, int, str, str | None, CausalTrace | None]]) -> None:
        """Write (key, number in the list, prompt, reason why it was skipped, trace) rows, all of
        them or none.

        A fact that another process has finished in the meantime stays as it is.
        """
        with self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO facts VALUES (?, ?, ?, ?, ?)",
                [
                    (key, n, prompt, why, trace and trace.to_bytes())
                    for key, n, prompt, why, trace in rows
                ],
            )

    def traces(self, keys: Sequence[str] | None = None) -> list[CausalTrace]:
        """The traces of these facts, in this order; default: all, in the order of the list that
        they came from.
        """
        found = self._connection.execute(
            "SELECT key, trace FROM facts WHERE skipped IS NULL ORDER BY number, rowid"
        )
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
