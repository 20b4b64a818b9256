"""Ledger: the edits of one model over months, in a folder; each can be taken out again exactly.

    ledger.json     the base model and the canary's limits; never changes
    history.jsonl   a line an event; what is in force is read off it
    edits/0001/     edits as they were added; never change
    lock            held while something is written

Knows what is in force and in which order things are written. The model with the ledger on it is
always the base plus the sum of the deltas in force, rounded once, so taking one out leaves what had
been without it. Refuses to know how edits are made; how the model is judged is evaluate/canary.py.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

from engram.edit.applied import applied
from engram.edit.base import describe_base, editable
from engram.edit.edit import Edit, compose
from engram.edit.folder_format import change_identity
from engram.edit.in_force import edited
from engram.edit.recipe import check_changes_weights
from engram.errors import (
    BaseMismatchError,
    CanaryError,
    EngramError,
    EngramFileError,
    NonFiniteError,
)
from engram.evaluate.canary import Canary
from engram.facts import Fact
from engram.files.locks import locked
from engram.files.whole_folders import atomic_folder
from engram.ledger.conflicts import NEAR, Conflict, conflicts
from engram.ledger.history import Entry, Event, FactRef, History, entries_after, now, shown
from engram.ledger.origin import entries_changing, find_base_entries, unknown_origin
from engram.ledger.references import EntryRef, entry_named, fact_refs

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_WAIT = "Try again when it is done, or wait longer: Ledger.open(folder, wait=...)"
_ABOUT, _HISTORY, _EDITS, _LOCK = "ledger.json", "history.jsonl", "edits", "lock"


class Ledger:
    """The edits of one model, in a folder that outlives processes. Made by `Ledger.create`, found
    again by `Ledger.open`.

    Whatever is done is one line of the history: a process killed at any moment leaves the state
        before or after it. Several
    processes may use one ledger; writers wait for each other.

    Args:
        folder: that `Ledger.create` made.
        wait: seconds to wait for another writer.
    Attributes:
        base: what the edits are laid on, as `merging.describe_base` tells it.
        canary: limits that every `add` with a model has to keep.
    Raises:
        EditFileError: no ledger, a damaged one, or one of a newer engram.
    Example:
        >>> ledger = engram.Ledger.create("ledger", lm)
        >>> ledger.add(engram.rewrite(lm, fact), lm)
        >>> with ledger.applied(lm):
        ...     lm.generate("The Space Needle is in")
        >>> ledger.remove(1)
    """

    def __init__(self, folder: str | Path, *, wait: float = 60.0) -> None:
        self.folder, self.wait = Path(folder).absolute(), wait
        about = _read_about(self.folder)
        self.base: dict[str, Any] = about["base"]
        self.canary = Canary(**about["canary"])
        self._history = History(self.folder / _HISTORY)
        self._loaded: dict[int, Edit] = {}  # files of edits never change

    @classmethod
    def create(
        cls,
        folder: str | Path,
        lm: LanguageModel,
        *,
        canary: Canary | None = None,
        wait: float = 60.0,
    ) -> Ledger:
        """An empty ledger for a model. Reads every weight once, to know it again: about a second a
        gigabyte.

        Args:
            folder: must not exist, or be empty.
            lm: the unedited model.
            canary: limits for `add`; default: those of a receipt.
        Raises:
            EditFileError: something is at `folder` already, or it cannot be written.
            BaseMismatchError: edits lie on `lm` at the moment.
        """
        if (Path(folder) / _ABOUT).exists():
            raise EngramFileError(
                f"{folder} is a ledger already; Ledger.open({str(folder)!r}) goes on with it"
            )
        _check_bare(lm)
        base = describe_base(lm, editable(lm))
        about = {
            "format_version": FORMAT_VERSION,
            "created": now(),
            "base": base,
            "canary": asdict(canary or Canary()),
        }
        with atomic_folder(folder) as fresh:
            (fresh / _ABOUT).write_text(
                json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            (fresh / _HISTORY).touch()
            (fresh / _EDITS).mkdir()
        return cls(folder, wait=wait)

    @classmethod
    def open(cls, folder: str | Path, *, wait: float = 60.0) -> Ledger:
        """A ledger that `create` made; see the class."""
        return cls(folder, wait=wait)

    def __repr__(self) -> str:
        entries = self.list()
        facts = sum(len(entry.active) for entry in entries)
        return f"Ledger({str(self.folder)!r}, base {self.base['model']!r}, {len(entries)} entries, {facts} facts)"

    @property
    def dtype(self) -> str:
        """Of the base's weights, or most of them: what the model is to be loaded in."""
        return mode(weight["dtype"] for weight in self.base["tensors"].values())

    # -- what is in it -----------------------------------------------------------------------------

    def list(self, *, everything: bool = False) -> tuple[Entry, ...]:
        """Entries in force, in the order they came; with `everything` also those that were removed
        or rolled back.
        """
        return tuple(entry for entry in self._entries().values() if everything or entry.active)

    def history(self) -> tuple[Event, ...]:
        """Everything that has happened, the oldest first."""
        return self._history.events()

    def show(self, number: int) -> Edit:
        """The edit of an entry as it was added, with facts that have been taken out since.

        Raises:
            EngramError: no such entry, or its files were pruned.
            EditFileError: its files are damaged.
        """
        entry = self._entry(number)
        if entry.pruned:
            raise EngramError(
                f"entry {number} was {entry.status} and its files were pruned; the history still names its facts"
            )
        if number not in self._loaded:
            edit = Edit.load(self._home(number))
            if change_identity(edit) != entry.identity:
                raise EngramFileError(
                    f"{self._home(number)} is not the edit that was added; take it from a backup"
                )
            self._loaded[number] = edit
        return self._loaded[number]

    def conflicts(self, edit: Edit, *, near: float = NEAR) -> tuple[Conflict, ...]:
        """Facts in force that an edit gets into the way of: about the same subject and relation, or
        with nearly the same key.

        Keys are compared where both edits have them (`Edit.keys`).

        Args:
            near: overlap from which on keys count as near, see `conflicts.overlaps`.
        Raises:
            BaseMismatchError: an edit of another model.
        """
        check_changes_weights(edit)
        find_base_entries(edit, self.base, ())
        found: list[Conflict] = []
        for entry in self.list():
            found += conflicts(edit, entry.number, self._in_force(entry), entry.active, near)
        return tuple(found)

    # -- the model with all of it ------------------------------------------------------------------

    def edit(self, *, without: Sequence[EntryRef] = ()) -> Edit:
        """Everything in force as one edit of the base.

        Args:
            without: leave these out, as `remove` would.
        Raises:
            EngramError: nothing is in force: the model is the base.
        """
        edits = list(self._edits(self._places(without)))
        if not edits:
            raise EngramError(
                f"nothing is in force in {self.folder}: the model with it is its base, {self.base['model']!r}"
            )
        return compose(edits)

    def applied(
        self, lm: LanguageModel, *, without: Sequence[EntryRef] = ()
    ) -> AbstractContextManager[LanguageModel]:
        """Within the block `lm` has everything in force on it; afterwards it is as before, bit for
        bit.

        Args:
            lm: the unedited base.
            without: leave these out, as `remove` would.
        Raises:
            BaseMismatchError: `lm` is not the base, or edits lie on it already.
        """
        _check_bare(lm)
        edits = list(self._edits(self._places(without)))
        return applied(compose(edits), lm) if edits else nullcontext(lm)

    def materialise(
        self, folder: str | Path, source: LanguageModel | str | Path | None = None
    ) -> Path:
        """Write the model with everything in force as one checkpoint, from which
        `revert_checkpoint` gets the base back.

        Args:
            source: the base's checkpoint, or the model in memory; default: by its name.
        """
        return self.edit().to_checkpoint(source or str(self.base["model"]), folder)

    def to_peft(self, folder: str | Path) -> Path:
        """Write everything in force as one LoRA adapter for the base."""
        return self.edit().to_peft(folder)

    # -- changing it -------------------------------------------------------------------------------

    def add(
        self,
        edit: Edit,
        lm: LanguageModel | None = None,
        *,
        replace: bool = False,
        canary: Canary | None = None,
    ) -> Entry:
        """Put an edit in force, unless the model with it does not keep the canary's limits.

        The edit was made on the base, or on the base with entries on it (`with ledger.applied(lm):
        engram.rewrite(...)`); which ones is told by the weights' fingerprints and noted. Either way
        its deltas are added to the base's weights.

        Args:
            lm: the unedited base; the canary is measured on it with everything in force. Without,
                nothing is measured.
            replace: take out older facts about the same subject and relation in the same step.
            canary: other limits than the ledger's.
        Returns:
            Its entry; conflicts with others are logged (see `conflicts`).
        Raises:
            CanaryError: a limit was not kept. The ledger is as it was; the edit is kept in it as
                rolled back.
            BaseMismatchError: the edit was made on other weights, or `lm` is not the base.
            EngramError: the edit is in force already, or a fact to be replaced cannot be taken out
                exactly.
        """
        check_changes_weights(edit)
        if canary is not None and lm is None:
            raise EngramError("canary=... was given without a model to measure it on; pass lm, too")
        with self._writing():
            self._refuse_double(edit)
            below = self._base_entries(edit, lm)
            found = self.conflicts(edit)
            older = (
                tuple((each.entry, each.index) for each in found if each.kind == "same fact")
                if replace
                else ()
            )
            self._check_removable(older, below)
            self._warn(found, older, below)
            event = Event(
                "added",
                entry=max(self._entries(), default=0) + 1,
                facts=tuple(_brief(fact) for fact in edit.facts),
                method=edit.method,
                identity=change_identity(edit),
                weights=tuple(edit.deltas),
                base_entries=below,
                gone=tuple(sorted(set(older))),
                dependents=self._dependents(older),
            )
            if lm is not None:
                event = self._judged(event, edit, lm, canary or self.canary)
            assert event.entry is not None
            edit.save(self._home(event.entry))
            self._history.append(event)
        if event.tripped:
            raise CanaryError(
                f"entry {event.entry} was rolled back: with it, {'; '.join(event.tripped)}. The ledger is as it was before. Make "
                "the edit again with a smaller change, take out others, or pass canary=Canary(...) with other limits"
            )
        _warn_about_dependents(event)
        return self._entry(event.entry)

    def remove(self, *which: EntryRef) -> tuple[Entry, ...]:
        """Take entries or single facts out of force, all in one step. What stays is the base plus
        the sum of the others, exactly.

        Args:
            which: each the number of an entry; "3.1" for fact 1 of entry 3; or a fact.
        Returns:
            Entries in force that were made on top of what went (logged, too): their deltas stay as
            they are, but were computed with it in place, so their facts should be verified again.
        Raises:
            EngramError: nothing of that name is in force; or the fact was solved jointly with
                others and cannot go alone.
        """
        with self._writing():
            gone = self._places(which)
            if not gone:
                return ()
            self._check_removable(gone)
            event = Event("removed", gone=gone, dependents=self._dependents(gone))
            self._history.append(event)
        _warn_about_dependents(event)
        return tuple(self._entry(number) for number in event.dependents)

    def prune(self) -> tuple[int, ...]:
        """Delete the files of entries that have no fact in force; the history keeps their names.

        Returns:
            Numbers of the entries whose files went.
        """
        with self._writing():
            entries = self.list(everything=True)
            idle = tuple(entry.number for entry in entries if not entry.active and not entry.pruned)
            if idle:
                self._history.append(Event("pruned", pruned=idle))
            kept = {self._home(entry.number).name for entry in entries if entry.active}
            for path in (
                self.folder / _EDITS
            ).iterdir():  # also what a killed `add` or `prune` left
                if path.name not in kept:
                    shutil.rmtree(path)
        for number in idle:
            self._loaded.pop(number, None)
        return idle

    # -- how ---------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with locked(self.folder / _LOCK, self.wait, self.folder, _WAIT):
            yield

    def _home(self, number: int) -> Path:
        return self.folder / _EDITS / f"{number:04d}"

    def _entries(self) -> dict[int, Entry]:
        return entries_after(self._history.events())

    def _entry(self, number: int) -> Entry:
        return entry_named(number, self._entries())

    def _places(self, which: Sequence[EntryRef]) -> tuple[FactRef, ...]:
        return fact_refs(which, self._entries())

    def _in_force(self, entry: Entry, without: Collection[FactRef] = ()) -> Edit:
        """What is left of an entry's edit, as one of the base: the weights that it was made on may
        have had others on them.
        """
        edit = self.show(entry.number)
        gone = entry.gone | {fact for number, fact in without if number == entry.number}
        return self._of_the_base(edit.without(*gone))

    def _of_the_base(self, edit: Edit) -> Edit:
        tensors = {name: self.base["tensors"][name] for name in edit.deltas}
        return replace(edit, base={**self.base, "tensors": tensors})

    def _edits(self, without: Collection[FactRef] = ()) -> Iterator[Edit]:
        """Everything in force, an edit an entry."""
        for entry in self.list():
            if any((entry.number, fact) not in without for fact in entry.active):
                yield self._in_force(entry, without)

    def _refuse_double(self, edit: Edit) -> None:
        for entry in self.list():
            if entry.identity == change_identity(edit):
                raise EngramError(
                    f"the edit is in force already, as entry {entry.number} ({entry.status}); added twice it would count twice. Remove "
                    "that entry first"
                )

    def _check_removable(self, gone: Collection[FactRef], below: Collection[int] = ()) -> None:
        """Whether these facts can go exactly, and an edit made on top of the entries `below` does
        not stand on them.
        """
        for entry in self.list():
            going = [fact for number, fact in gone if number == entry.number]
            if going and entry.number in below:
                raise EngramError(
                    f"the edit was made on top of entry {entry.number}, which it is to replace: without it, it would say something "
                    f"else. Make it where that one is not: with ledger.applied(lm, without=['{entry.number}.{going[0]}']): "
                    "engram.rewrite(...); or add it without replace"
                )
            if going and len(going) < len(entry.active):
                self.show(entry.number).without(*entry.gone, *going)

    def _warn(
        self, found: Collection[Conflict], replaced: Collection[FactRef], below: Collection[int]
    ) -> None:
        """Of conflicts that stay (an edit made on top of an entry has taken it into account), and
        of ground that is gone.
        """
        for each in found:
            if (each.entry, each.index) not in replaced and each.entry not in below:
                log.warning("%s", each)
        if lost := sorted(set(below) - {entry.number for entry in self.list() if not entry.gone}):
            log.warning(
                "the edit was made on top of entries %s, of which some facts are no longer in force; verify it",
                ", ".join(map(str, lost)),
            )

    def _dependents(self, gone: Collection[FactRef]) -> tuple[int, ...]:
        """Entries that stay in force and were made on top of some of these."""
        numbers = {number for number, _ in gone}
        return tuple(
            entry.number
            for entry in self.list()
            if numbers & set(entry.base_entries)
            and any((entry.number, fact) not in gone for fact in entry.active)
        )

    def _base_entries(self, edit: Edit, lm: LanguageModel | None) -> tuple[int, ...]:
        """Entries that lay on the weights which an edit was made on: as noted, or those in force
        now.
        """
        known = find_base_entries(edit, self.base, self._history.events())
        if known is not None:
            return known
        if lm is not None:
            with self.applied(lm):
                as_it_is = describe_base(lm, edit.base["tensors"])["tensors"]
            if as_it_is == edit.base["tensors"]:
                return entries_changing(edit.deltas, self.list())
        raise BaseMismatchError(unknown_origin(edit, self.base, looked=lm is not None))

    def _judged(self, event: Event, edit: Edit, lm: LanguageModel, canary: Canary) -> Event:
        """The event with what the canary says about the model with everything on it."""
        _check_bare(lm)
        whole = compose([*self._edits(event.gone), self._of_the_base(edit)])
        before = canary.perplexity(lm)
        try:
            with applied(whole, lm):
                after = canary.perplexity(lm)
                tensors = describe_base(lm, whole.deltas)["tensors"]
        except NonFiniteError as error:
            return replace(event, what="rolled back", tripped=(str(error),))
        checks = canary.checks(lm, whole, before, after)
        measured = {check.name: check.value for check in checks if check.value is not None}
        event = replace(
            event, canary=measured, state={name: tensors[name]["sha256"] for name in tensors}
        )
        tripped = tuple(
            f"{c.name} is {c.value:.3f}, at most {c.limit:g} allowed"
            for c in checks
            if c.passed is False
        )
        return replace(event, what="rolled back", tripped=tripped, state={}) if tripped else event


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / _ABOUT
    try:
        about: Any = json.loads(path.read_text(encoding="utf-8"))
        version = about["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r}, this engram reads {FORMAT_VERSION}; pip install --upgrade engram"
            )
        return {"base": about["base"], "canary": about["canary"]}
    except FileNotFoundError as error:
        raise EngramFileError(
            f"{folder} is no ledger: it has no {_ABOUT}. Ledger.create(folder, lm) makes one"
        ) from error
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise EngramFileError(
            f"{path} cannot be read: {error}. Take the ledger from a backup"
        ) from error


def _check_bare(lm: LanguageModel) -> None:
    if laid := edited(lm):
        raise BaseMismatchError(
            f"edits lie on {lm.name!r} at the moment ({laid[0]}); leave their `with` block first: a ledger lays everything in force "
            "on the unedited model"
        )


def _brief(fact: Fact) -> Fact:
    """What the history tells of a fact; its evidence is in the edit."""
    return Fact(fact.subject, fact.prompt, fact.target, fact.target_true, relation=fact.relation)


def _warn_about_dependents(event: Event) -> None:
    if event.dependents:
        log.warning(
            "%s went, and entries %s were made on top of it: their deltas stay as they are, but were computed with it in "
            "place; verify them",
            shown(event.gone),
            ", ".join(map(str, event.dependents)),
        )
