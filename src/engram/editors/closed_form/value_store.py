"""A store of values: each under a digest of everything that it depends on, in one file from which
a killed run resumes.

Knows digests and SQLite. Refuses to know how values are found. (The released code keys its cache by
layer, clamp and case number, and returns stale values when anything else changes.)
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from engram.editors.closed_form.values import Value, ValueSearch
from engram.errors import EngramError
from engram.facts import Fact
from engram.files.cache_folder import cache_folder, sha256_of
from engram.model.language_model import LanguageModel
from engram.runs.identity import identity


class ValueStore:
    """A file of values; use it as a context manager.

    Args:
        path: of the file; None keeps nothing.
        lm: the model, with the weights that values are found on.
    Raises:
        EngramError: the file cannot be read or written, here or later.
    """

    def __init__(self, path: Path | None, lm: LanguageModel) -> None:
        self._lm, self._path, self._file = lm, path, None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite, since several processes write one file: a lock is waited for, a killed writer
            # leaves no half value, and nothing is rewritten as the file grows.
            self._file = sqlite3.connect(path, timeout=60)
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS found "
                "(name TEXT PRIMARY KEY, losses TEXT, tensors BLOB) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    @classmethod
    def of(cls, given: str | Path | bool, lm: LanguageModel) -> ValueStore:
        """Open a file, the cache folder's (True), or none (False)."""
        if isinstance(given, bool):
            return cls(cache_folder("values") / "values.sqlite" if given else None, lm)
        return cls(Path(given), lm)

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
        rows = [
            self._run("SELECT losses, tensors FROM found WHERE name = ?", name) for name in names
        ]
        try:
            return [None if row is None else _value(*row) for row in rows]
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise self._unusable(error) from error

    def put(self, name: str, value: Value) -> None:
        """Keep a value; when this returns it is on disk."""
        losses = json.dumps([value.losses, value.delta_norms])
        tensors = safetensors.torch.save(
            {"start": value.start_d.cpu(), "delta": value.delta_d.cpu().contiguous()}
        )
        self._run("INSERT OR REPLACE INTO found VALUES (?, ?, ?)", name, losses, tensors)

    def _run(self, statement: str, *values: str | bytes) -> Any:
        """Return the first row of a statement's result; None without a row or without a file."""
        if self._file is None:
            return None
        try:
            with self._file:
                return self._file.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> EngramError:
        return EngramError(
            f"values cannot be kept in {self._path}: {error}; give store= another file, or False. "
            "A damaged one can be deleted"
        )


def _value(losses: str, tensors: bytes) -> Value:
    states: dict[str, torch.Tensor] = safetensors.torch.load(tensors)
    terms, norms = json.loads(losses)
    nothing = states["start"].new_zeros(0, 0)
    return Value(
        states["start"], states["delta"], nothing, nothing, [tuple(step) for step in terms], norms
    )
