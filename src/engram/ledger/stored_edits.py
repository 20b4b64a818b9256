"""The files of a ledger's edits: a folder for each entry, `edits/0001` for entry 1.

Knows where they are and that they never change. Refuses to know which of them are in force.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from engram.edit.edit import Edit
from engram.edit.folder_format import change_identity
from engram.errors import EngramError, EngramFileError
from engram.facts import Fact
from engram.files.names import inside
from engram.ledger.history import Entry, FactRef

FOLDER = "edits"


def without_evidence(fact: Fact) -> Fact:
    """Return what the history records of a fact; paraphrases and neighbours are in the edit."""
    return Fact(fact.subject, fact.prompt, fact.target, fact.target_true, relation=fact.relation)


class StoredEdits:
    """Edits by the numbers of their entries.

    Args:
        ledger: its folder, which has a folder of edits, with one folder an entry.
        base: the ledger's base, as `edit.base.describe_base` describes it.
    """

    def __init__(self, ledger: Path, base: dict[str, Any]) -> None:
        self._ledger, self._base = ledger, base
        self._loaded: dict[int, Edit] = {}  # files never change, so each is read once

    def save(self, number: int, edit: Edit) -> None:
        """Write the edit of a new entry."""
        edit.save(self._path(number))

    def load(self, entry: Entry) -> Edit:
        """Return an entry's edit as it was added, with facts that were taken out since.

        Raises:
            EngramError: its files were pruned. EngramFileError: its files are damaged.
        """
        if entry.pruned:
            raise EngramError(
                f"entry {entry.number} was {entry.status} and its files were pruned; "
                "the history still names its facts"
            )
        if entry.number not in self._loaded:
            edit = Edit.load(self._path(entry.number))
            # a folder that was swapped or restored from elsewhere would be applied unnoticed
            if (
                change_identity(edit.deltas) != entry.identity
                or tuple(map(without_evidence, edit.facts)) != entry.facts
                or not set(edit.deltas) <= set(self._base["tensors"])
            ):
                raise EngramFileError(
                    f"{self._path(entry.number)} is not the edit that was added; "
                    "take it from a backup"
                )
            self._loaded[entry.number] = edit
        return self._loaded[entry.number]

    def in_force(self, entry: Entry, without: Collection[FactRef] = ()) -> Edit:
        """Return what is left of an entry's edit, as an edit of the base.

        Args:
            without: facts to leave out beside those that were taken out.
        """
        left_out = entry.gone | {fact for number, fact in without if number == entry.number}
        return self.on_base(self.load(entry).without(*left_out))

    def on_base(self, edit: Edit) -> Edit:
        """Return the same deltas as an edit of the base.

        An edit made on top of others names the weights it was computed on. Its deltas are added to
        the base all the same, so here it has to name the base's.
        """
        tensors = {name: self._base["tensors"][name] for name in edit.deltas}
        return replace(edit, base={**self._base, "tensors": tensors})

    def delete_except(self, numbers: Collection[int]) -> None:
        """Delete all other folders, those that a killed `add` or `prune` left included."""
        keep = {self._path(number).name for number in numbers}
        # By what is kept and not by what goes: folders without an event are in no list.
        for path in inside(self._ledger, FOLDER).iterdir():
            if path.name in keep:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:  # of somebody else; what a link leads to is not ours
                path.unlink()
        self._loaded = {number: e for number, e in self._loaded.items() if number in numbers}

    def _path(self, number: int) -> Path:
        return inside(self._ledger, f"{FOLDER}/{number:04d}")
