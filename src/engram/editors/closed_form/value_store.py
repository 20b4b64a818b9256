"""A store of values: each under a digest of everything that it depends on, in one file from which
a killed run resumes.

Knows digests and SQLite. Refuses to know how values are found. (The released code keys its cache by
layer, clamp and case number, and returns stale values when anything else changes.)
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from engram.editors.closed_form.values import Value, ValueSearch
from engram.errors import EngramError, EngramFileError
from engram.facts import Fact
from engram.files.cache_folder import cache_folder, sha256_of, written_if_possible
from engram.files.forms import parsed, parsed_row
from engram.files.names import check_regular
from engram.model.language_model import LanguageModel
from engram.modules.tensor_files import tensors_from_bytes, tensors_to_bytes
from engram.runs.identity import identity

log = logging.getLogger(__name__)

_KIND = "engram.value"
_Loss = tuple[float, float, float, float]


class _Row(NamedTuple):
    losses: str
    tensors: bytes


class _AboutForm(TypedDict, total=False):
    name: str  # of the row, so that rows are not exchanged
    losses: str  # their sha256


class ValueStore:
    """A file of values; use it as a context manager.

    A value that cannot be written is used all the same, with a warning.

    Args:
        path: of the file; None keeps nothing.
        lm: the model, with the weights that values are found on.
        cache: whether nobody named the file: then one that cannot be used is passed over, and a
            damaged value is found again, with a warning.
    Raises:
        EngramError: the file that was named cannot be used, here or later.
    """

    def __init__(self, path: Path | None, lm: LanguageModel, *, cache: bool = False) -> None:
        self._lm, self._path, self._cache = lm, path, cache
        self._file: sqlite3.Connection | None = None
        if path is None:
            return
        try:
            self._file = self._opened(path)
        except (OSError, sqlite3.Error, EngramFileError) as error:
            if not cache:
                raise self._unusable(error) from error
            with written_if_possible(path.parent):
                raise self._unusable(error) from error

    @classmethod
    def of(cls, given: str | Path | bool, lm: LanguageModel) -> ValueStore:
        """Open a file, the cache folder's (True), or none (False)."""
        if not isinstance(given, bool):
            return cls(Path(given), lm)
        return cls(cache_folder("values") / "values.sqlite" if given else None, lm, cache=True)

    def __enter__(self) -> ValueStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(sqlite3.Error):
                self._file.close()

    @cached_property
    def _model(self) -> str:
        return identity(self._lm)

    def name(self, fact: Fact, search: ValueSearch) -> str:
        """Return the digest that names a fact's value; "" where nothing is stored."""
        if self._file is None:
            return ""
        text = [fact.prompt, fact.subject, fact.target]
        # The engine is not part of it: both engines give the same value up to rounding.
        place = [search.layer, list(search.contexts), search.site, asdict(search.config)]
        about = [*text, *place]
        return sha256_of(self._model, json.dumps(about, sort_keys=True))

    def get(self, names: Sequence[str]) -> list[Value | None]:
        """Return the stored values, None for each that is missing."""
        return [self._get(name) for name in names]

    def put(self, name: str, value: Value) -> None:
        """Keep a value, if the file can be written; when this returns it is on disk."""
        if self._file is None or self._path is None:
            return
        losses = json.dumps([value.losses, value.delta_norms])
        tensors = {"start": value.start_d.cpu(), "delta": value.delta_d.cpu().contiguous()}
        about = {"name": name, "losses": sha256_of(losses)}
        row = (name, losses, tensors_to_bytes(tensors, _KIND, about))
        with written_if_possible(self._path), self._file:
            self._file.execute("INSERT OR REPLACE INTO found VALUES (?, ?, ?)", row)

    def _opened(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():  # of a folder SQLite itself says that it is none
            check_regular(path)
        # SQLite, since several processes write one file: a lock is waited for, a killed writer
        # leaves no half value, and nothing is rewritten as the file grows.
        file = sqlite3.connect(path, timeout=60)
        try:
            file.execute("PRAGMA trusted_schema = OFF")
            file.execute(
                "CREATE TABLE IF NOT EXISTS found "
                "(name TEXT PRIMARY KEY, losses TEXT, tensors BLOB) WITHOUT ROWID"
            )
            file.execute("SELECT losses, tensors FROM found LIMIT 1").fetchone()
        except BaseException:
            file.close()
            raise
        return file

    def _get(self, name: str) -> Value | None:
        if self._file is None:
            return None
        query = "SELECT losses, tensors FROM found WHERE name = ?"
        try:
            row = self._file.execute(query, (name,)).fetchone()
            return None if row is None else _value(name, row, str(self._path))
        except (sqlite3.Error, EngramFileError) as error:
            if not self._cache:
                raise self._unusable(error) from error
            log.warning("%s; the value is found again", error)
            return None

    def _unusable(self, error: Exception) -> EngramError:
        return EngramError(
            f"values cannot be kept in {self._path}: {error}; give store= another file, or False. "
            "A damaged one can be deleted"
        )


def _value(name: str, row: Sequence[Any], where: str) -> Value:
    """Return the value of a row.

    Raises:
        EngramFileError: damaged.
    """
    stored: _Row = parsed_row(_Row, row, where)
    losses, what = stored.losses, "a file of values"
    about: _AboutForm
    states, about = tensors_from_bytes(stored.tensors, _KIND, _AboutForm, where, what, older=True)
    if about and about != {"name": name, "losses": sha256_of(losses)}:
        raise EngramFileError(f"{where} is damaged: its losses or its name are of another value")
    terms: list[_Loss]
    norms: list[float]
    terms, norms = parsed(tuple[list[_Loss], list[float]], losses, where)
    start_d, delta_d = states.get("start"), states.get("delta")
    if start_d is None or delta_d is None or start_d.dim() != 1 or start_d.shape != delta_d.shape:
        raise EngramFileError(f"{where} is damaged: expected two states, 'start' and 'delta'")
    if not (start_d.isfinite().all() and delta_d.isfinite().all()):
        raise EngramFileError(f"{where} is damaged: it holds NaN or infinity")
    nothing = start_d.new_zeros(0, 0)
    return Value(start_d, delta_d, nothing, nothing, terms, norms)
