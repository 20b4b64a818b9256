"""Ledger: the edits of one model over months, in a folder; each can be taken out again exactly.

    ledger.json     the base model and the canary's limits; never changes
    history.jsonl   one event a line; what is in force follows from it
    edits/0001/     edits as they were added; never change
    lock            held while something is written

Knows what is in force, and in which order things are written: an edit's files first, then its line
of the history, which makes it happen. A model with the ledger applied is the base plus the sum of
the deltas in force, rounded once; that is why taking one out leaves exactly what had been without
it. Refuses to know how edits are made (editors) and judged (evaluate/canary.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING

from engram.edit.base import describe_base, editable
from engram.edit.edit import Edit, compose
from engram.edit.folder_format import change_identity
from engram.edit.recipe import check_changes_weights
from engram.errors import BaseMismatchError, CanaryError, EngramError, EngramFileError
from engram.evaluate.canary import Canary
from engram.files.atomic import atomic_folder
from engram.files.locks import locked
from engram.files.names import inside
from engram.ledger import header
from engram.ledger.admission import (
    check_new,
    check_not_below,
    check_unedited,
    warn,
    warn_about_dependents,
    with_canary,
)
from engram.ledger.conflicts import NEAR, Conflict, conflicts
from engram.ledger.history import Entry, Event, FactRef, History, entries_after
from engram.ledger.origin import entries_changing, find_base_entries, unknown_origin
from engram.ledger.references import EntryRef, find_entry, resolve_refs
from engram.ledger.stored_edits import FOLDER, StoredEdits, without_evidence

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel

_HISTORY, _LOCK = "history.jsonl", "lock"


class Ledger:
    """The edits of one model, in a folder that outlives processes. `Ledger.create` makes it, and
    `Ledger.open` opens it again.

    Every change is one line of the history, so a process killed at any moment leaves the state
    before it or after it. Several processes may use one ledger; writers wait for each other.

    Args:
        folder: what `Ledger.create` wrote.
        wait: seconds to wait for another writer.
    Attributes:
        base: the unedited model, as `edit.base.describe_base` describes it.
        canary: limits that every `add` with a model has to keep.
    Raises:
        EngramFileError: no ledger, a damaged one, or one of a newer engram.
    Example:
        >>> ledger = engram.Ledger.create("pocket-ledger", lm)
        >>> entry = ledger.add(edit)
        >>> print(entry.number, entry.status, len(ledger.list()))
        1 active 1
        >>> with ledger.applied(lm):
        ...     answer = lm.generate(fact.prompt_text, 3)
        >>> ledger.remove(1), ledger.list()
        ((), ())
    """

    def __init__(self, folder: str | Path, *, wait: float = 60.0) -> None:
        self.folder, self.wait = Path(folder).absolute(), wait
        self.base, self.canary = header.read_header(self.folder)
        self._history = History(inside(self.folder, _HISTORY))
        self._stored = StoredEdits(self.folder, self.base)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        lm: LanguageModel,
        *,
        canary: Canary | None = None,
        wait: float = 60.0,
    ) -> Ledger:
        """Create an empty ledger for a model.

        Every weight is read once, so that the model can be recognised: about a second a gigabyte.

        Args:
            folder: must not exist, or be empty.
            lm: the unedited model.
            canary: limits for `add`; default: those of a receipt.
        Raises:
            EngramFileError: something is at `folder` already, or it cannot be written.
            BaseMismatchError: edits are applied to `lm` at the moment.
        """
        if (Path(folder) / header.NAME).exists():
            raise EngramFileError(
                f"{folder} is a ledger already; Ledger.open({str(folder)!r}) opens it"
            )
        check_unedited(lm)
        base = describe_base(lm, editable(lm))
        with atomic_folder(folder) as new:
            header.write_header(new, base, canary or Canary())
            (new / _HISTORY).touch()
            (new / FOLDER).mkdir()
        return cls(folder, wait=wait)

    @classmethod
    def open(cls, folder: str | Path, *, wait: float = 60.0) -> Ledger:
        """Open a ledger that `create` made; see the class."""
        return cls(folder, wait=wait)

    def __repr__(self) -> str:
        entries = self.list()
        facts = sum(len(entry.active) for entry in entries)
        return (
            f"Ledger({str(self.folder)!r}, base {self.base['model']!r}, {len(entries)} entries, "
            f"{facts} facts)"
        )

    @property
    def dtype(self) -> str:
        """The dtype of most of the base's weights, in which the model should be loaded."""
        return mode(weight["dtype"] for weight in self.base["tensors"].values())

    # -- what is in it -----------------------------------------------------------------------------

    def list(self, *, everything: bool = False) -> tuple[Entry, ...]:
        """Return the entries in force, in the order they came.

        Args:
            everything: include entries that were removed or rolled back.
        """
        return tuple(entry for entry in self._entries().values() if everything or entry.active)

    def history(self) -> tuple[Event, ...]:
        """Return everything that has happened, the oldest first."""
        return self._history.events()

    def show(self, number: int) -> Edit:
        """Return the edit of an entry as it was added, with facts that were taken out since.

        Raises:
            EngramError: no such entry, or its files were pruned.
            EngramFileError: its files are damaged.
        """
        return self._stored.load(self._entry(number))

    def conflicts(self, edit: Edit, *, near: float = NEAR) -> tuple[Conflict, ...]:
        """Return the facts in force that an edit would interfere with: those about the same subject
        and relation, and those with nearly the same key.

        Keys are compared where both edits have them (`Edit.keys`).

        Args:
            near: overlap from which on keys count as near, see `conflicts.overlaps`.
        Raises:
            BaseMismatchError: an edit of another model.
        """
        check_changes_weights(edit)
        find_base_entries(edit, self.base, ())  # raises for an edit of another model
        return tuple(
            conflict
            for entry in self.list()
            for conflict in conflicts(
                edit, entry.number, self._stored.in_force(entry), entry.active, near
            )
        )

    # -- the model with all of it ------------------------------------------------------------------

    def edit(self, *, without: Sequence[EntryRef] = ()) -> Edit:
        """Return everything in force as one edit of the base.

        Args:
            without: leave these out, as `remove` would.
        Raises:
            EngramError: nothing is in force: the model is the base.
        """
        edits = list(self._edits(self._resolve(without)))
        if not edits:
            raise EngramError(
                f"nothing is in force in {self.folder}: the model with it is its base, "
                f"{self.base['model']!r}"
            )
        return compose(edits)

    def applied(
        self, lm: LanguageModel, *, without: Sequence[EntryRef] = ()
    ) -> AbstractContextManager[LanguageModel]:
        """Apply everything in force to `lm` inside a `with` block; afterwards every bit is as
        before.

        Args:
            lm: the unedited base.
            without: leave these out, as `remove` would.
        Raises:
            BaseMismatchError: `lm` is not the base, or edits are applied to it already.
        """
        check_unedited(lm)
        edits = list(self._edits(self._resolve(without)))
        return compose(edits).applied(lm, how="weights") if edits else nullcontext(lm)

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

    def to_gguf(self, path: str | Path, *, base: str | Path | None = None) -> Path:
        """Write everything in force as one LoRA adapter of llama.cpp. See `Edit.to_gguf`."""
        return self.edit().to_gguf(path, base=base)

    # -- changing it -------------------------------------------------------------------------------

    def add(
        self,
        edit: Edit,
        lm: LanguageModel | None = None,
        *,
        replace: bool = False,
        canary: Canary | None = None,
    ) -> Entry:
        """Put an edit in force, unless the model with it exceeds a limit of the canary.

        The edit was made on the base, or on the base with entries applied (`with
        ledger.applied(lm): engram.rewrite(...)`). The fingerprints of its weights show which, and
        the event records it. Either way its deltas are added to the base's weights.

        Args:
            lm: the unedited base; the canary is measured on it with everything in force. Without
                it, nothing is measured.
            replace: take out older facts about the same subject and relation in the same step.
            canary: limits to use instead of the ledger's.
        Returns:
            Its entry; conflicts with others are logged (see `conflicts`).
        Raises:
            CanaryError: a limit was exceeded. What is in force is unchanged; the edit is recorded
                as rolled back.
            BaseMismatchError: the edit was made on other weights, or `lm` is not the base.
            EngramError: the edit is in force already, or a fact to be replaced cannot be taken out
                exactly.
        """
        check_changes_weights(edit)
        if canary is not None and lm is None:
            raise EngramError("canary=... was given without a model to measure it on; pass lm, too")
        with self._lock():
            check_new(edit, self.list())
            below = self._base_entries(edit, lm)
            clashes = self.conflicts(edit)
            same = {(clash.entry, clash.index) for clash in clashes if clash.kind == "same fact"}
            replaced = tuple(sorted(same)) if replace else ()
            check_not_below(replaced, below)
            self._check_removable(replaced)
            warn(clashes, replaced, below, self.list())
            # numbers are never used again, those of removed entries included
            number = max(self._entries(), default=0) + 1
            event = Event(
                "added",
                entry=number,
                facts=tuple(without_evidence(fact) for fact in edit.facts),
                method=edit.method,
                identity=change_identity(edit.deltas),
                weights=tuple(edit.deltas),
                base_entries=below,
                gone=replaced,
                dependents=self._dependents(replaced),
            )
            if lm is not None:
                check_unedited(lm)
                everything = compose([*self._edits(replaced), self._stored.on_base(edit)])
                event = with_canary(event, everything, lm, canary or self.canary)
            # files before the line: a kill in between leaves files that no event names, which
            # `prune` deletes; the other way round would leave an entry without files
            self._stored.save(number, edit)
            self._history.append(event)
        # outside the lock, and after the line: the history records what was refused and why
        if event.tripped:
            raise CanaryError(
                f"entry {event.entry} was rolled back: with it, {'; '.join(event.tripped)}. The "
                "ledger is as it was before. Make the edit again with a smaller change, take out "
                "others, or pass canary=Canary(...) with other limits"
            )
        warn_about_dependents(event)
        return self._entry(number)

    def remove(self, *refs: EntryRef) -> tuple[Entry, ...]:
        """Take entries or single facts out of force, all in one step. What stays is the base plus
        the sum of the others, exactly.

        Args:
            refs: each the number of an entry; "3.1" for fact 1 of entry 3; or a fact.
        Returns:
            Entries in force that were made on top of what went (logged, too). Their deltas stay as
            they are, but were computed with it in place, so their facts should be verified again.
        Raises:
            EngramError: nothing of that name is in force; or the fact was solved jointly with
                others and cannot go alone.
        """
        with self._lock():
            gone = self._resolve(refs)
            if not gone:
                return ()
            self._check_removable(gone)
            event = Event("removed", gone=gone, dependents=self._dependents(gone))
            self._history.append(event)
        warn_about_dependents(event)
        return tuple(self._entry(number) for number in event.dependents)

    def prune(self) -> tuple[int, ...]:
        """Delete the files of entries that have no fact in force; the history keeps their names.

        Returns:
            Numbers of the entries whose files were deleted.
        """
        with self._lock():
            entries = self.list(everything=True)
            idle = tuple(entry.number for entry in entries if not entry.active and not entry.pruned)
            if idle:
                self._history.append(Event("pruned", pruned=idle))
            # after the event: a kill in between leaves files that the next prune deletes
            self._stored.delete_except([entry.number for entry in entries if entry.active])
        return idle

    # -- how ---------------------------------------------------------------------------------------

    @contextmanager
    def _lock(self) -> Iterator[None]:
        advice = "Try again when it is done, or wait longer: Ledger.open(folder, wait=...)"
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / _LOCK, self.wait, self.folder, advice))
            except OSError as error:
                raise EngramFileError(
                    f"the ledger {self.folder} cannot be written: {error}. It is as it was"
                ) from error
            yield

    def _entries(self) -> dict[int, Entry]:
        return entries_after(self._history.events())

    def _entry(self, number: int) -> Entry:
        return find_entry(number, self._entries())

    def _resolve(self, refs: Sequence[EntryRef]) -> tuple[FactRef, ...]:
        return resolve_refs(refs, self._entries())

    def _edits(self, without: Collection[FactRef] = ()) -> Iterator[Edit]:
        """Yield what is in force, one edit of the base for each entry."""
        for entry in self.list():
            if any((entry.number, fact) not in without for fact in entry.active):
                yield self._stored.in_force(entry, without)

    def _check_removable(self, gone: Collection[FactRef]) -> None:
        """Raise EngramError unless these facts can be taken out exactly."""
        for entry in self.list():
            going = [fact for number, fact in gone if number == entry.number]
            # a whole entry can always go; a part only if each fact has columns of its own
            if going and len(going) < len(entry.active):
                self.show(entry.number).without(*entry.gone, *going)

    def _dependents(self, gone: Collection[FactRef]) -> tuple[int, ...]:
        """Return the entries that stay in force and were made on top of some of these."""
        numbers = {number for number, _ in gone}
        return tuple(
            entry.number
            for entry in self.list()
            if numbers & set(entry.base_entries)
            and any((entry.number, fact) not in gone for fact in entry.active)
        )

    def _base_entries(self, edit: Edit, lm: LanguageModel | None) -> tuple[int, ...]:
        """Return the entries that were applied to the weights an edit was made on.

        The states that earlier events recorded are searched first; then, where there is a model,
        the weights with everything in force now.
        """
        known = find_base_entries(edit, self.base, self._history.events())
        if known is not None:
            return known
        if lm is not None:
            with self.applied(lm):
                now = describe_base(lm, edit.base["tensors"])["tensors"]
            if now == edit.base["tensors"]:
                return entries_changing(edit.deltas, self.list())
        raise BaseMismatchError(unknown_origin(edit, self.base, compared_now=lm is not None))
