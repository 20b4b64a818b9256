"""Edit: the value that an editor returns: what changes in which weight, for which facts, and how it
was computed.

Knows facts, deltas and their recipe, and how edits add and subtract. How an edit is applied to a
model: applied.py; how it is stored: folder_format.py; how it changes a checkpoint on disk:
checkpoint.py; how it becomes an adapter: lora_export.py, gguf_export.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from engram.checks import check_fields, checked, checked_call
from engram.edit import applied as in_memory
from engram.edit import checkpoint, folder_format, gguf_export, lora_export
from engram.edit import keys as fact_keys
from engram.edit.changes import WeightChanges
from engram.edit.delta import Delta, add, same_tensors
from engram.edit.forms import BaseForm, ComposedForm, Unsigned
from engram.edit.prompt_edit import PromptEdit
from engram.edit.recipe import as_dict, check_changes_weights, library_versions, plain, staying
from engram.errors import BaseMismatchError, EngramError, EngramFileError, SettingError
from engram.facts import Fact

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel

log = logging.getLogger(__name__)
COMPOSED = "composed"  # method of an edit that `compose` made; its settings hold the parts' recipes
_RECORDED = ("method", "settings", "seed", "base", "versions", "diagnostics", "receipt")


@dataclass(frozen=True)
class Edit:
    """A change of a model's weights that makes it state other facts. It is a value: making one
    changes nothing.

    Args:
        facts: what the edit makes true, at least one.
        method: name of the editor.
        settings: its settings; like `diagnostics` and `receipt`, values that JSON can hold.
        deltas: parameter name (as in `model.state_dict()`) -> its change.
        base: what the edit was computed on, see `WeightChanges`.
        seed: of every random draw.
        versions: of the libraries that computed it.
        diagnostics: numbers that the editor reports.
        receipt: what `engram.verify` measured, once it has.
        keys: parameter name -> [facts, in], row i the input at which the change for fact i was
            solved (zeros: there is none); weights and methods without keys are left out.
    Raises:
        EngramError: no deltas, a delta that its base does not describe, keys that do not fit, or
            settings that JSON cannot hold.
    Example:
        >>> edit
        Edit(1 facts, 'rome', transformer.h.1.mlp.c_proj.weight (rank 1))
        >>> with edit.applied(lm):
        ...     lm.generate(fact.prompt_text, 1)
        'The Eiffel Tower is located in the city of Rome'
    """

    facts: tuple[Fact, ...]
    method: str
    settings: dict[str, Any]
    deltas: dict[str, Delta]
    base: dict[str, Any]
    seed: Unsigned | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] | None = None
    keys: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A frozen dataclass: fields are normalised once, here, so that equal edits compare equal.
        object.__setattr__(self, "facts", tuple(self.facts))
        if not self.facts or not self.deltas:
            raise EngramError(
                f"an edit needs facts and deltas; got {len(self.facts)} facts and "
                f"{len(self.deltas)} deltas"
            )
        for name in ("settings", "base", "versions", "diagnostics", "receipt"):
            object.__setattr__(self, name, plain(name, getattr(self, name)))
        check_fields(self, EngramError)
        checked("base", self.base, BaseForm, EngramError)
        WeightChanges(self.deltas, self.base)  # checks that they fit each other
        object.__setattr__(
            self, "deltas", {name: self._owned(name, delta) for name, delta in self.deltas.items()}
        )
        object.__setattr__(
            self, "keys", fact_keys.validated_keys(self.keys, self.deltas, len(self.facts))
        )

    def __eq__(self, other: object) -> bool:
        """Compare facts, recipe and base, and deltas and keys bit for bit."""
        if not isinstance(other, Edit):
            return NotImplemented
        # Keys apart: `==` of dicts of tensors has no single truth value.
        names = [field.name for field in fields(self) if field.name != "keys"]
        return all(getattr(self, name) == getattr(other, name) for name in names) and same_tensors(
            self.keys, other.keys
        )

    def _owned(self, name: str, delta: Delta) -> Delta:
        """Return `delta` with owners among the facts: without any, all facts own every column."""
        if delta.owners is None:
            return delta.owned_by([range(len(self.facts))] * delta.columns)
        outside = delta.facts() - set(range(len(self.facts)))
        if outside:
            raise EngramError(
                f"delta of {name!r} has columns of facts {sorted(outside)}; there are "
                f"{len(self.facts)} facts"
            )
        return delta

    def __repr__(self) -> str:
        ranks = ", ".join(f"{name} (rank {delta.rank})" for name, delta in self.deltas.items())
        return f"Edit({len(self.facts)} facts, {self.method!r}, {ranks})"

    @property
    def rank(self) -> int:
        """Largest rank of its deltas."""
        return max(delta.rank for delta in self.deltas.values())

    @property
    def changes_weights(self) -> bool:
        """Whether weights change: True; of a `PromptEdit` it is False."""
        return True

    @property
    def changes(self) -> WeightChanges:
        """The changes by themselves, without facts and recipe."""
        return WeightChanges(self.deltas, self.base)

    def with_receipt(self, receipt: Any) -> Edit:
        """Return the same edit with `receipt`: a dict, or an object that has `to_dict()`."""
        return replace(self, receipt=as_dict(receipt))

    def without(self, *facts: Fact | int) -> Edit:
        """Take these facts out exactly: their columns go, the others stay bit for bit.

        Facts that share their columns (solved jointly) can only go together. `compose([a, b])`
        without b's facts is a, with no receipt.

        Args:
            facts: each a fact of this edit, or its index.
        Raises:
            FactError: a fact that is not in the edit, or none would stay.
            EngramError: facts solved jointly with others that stay.
        """
        rest = staying(self.facts, facts)
        if len(rest) == len(self.facts):
            return self
        gone = set(range(len(self.facts))) - set(rest)
        place = {old: new for new, old in enumerate(rest)}
        remaining = {name: delta.without(gone) for name, delta in self.deltas.items()}
        # the facts that stay move up, so owners of columns get new numbers
        deltas = {
            name: delta.renumbered(place) for name, delta in remaining.items() if delta is not None
        }
        tensors = {name: self.base["tensors"][name] for name in deltas}
        smaller = replace(
            self,
            facts=tuple(self.facts[i] for i in rest),
            deltas=deltas,
            base={**self.base, "tensors": tensors},
            diagnostics={},  # they are about facts that are no longer all in the edit
            receipt=None,
            keys=fact_keys.rows(self.keys, rest, deltas),
        )
        if self.method != COMPOSED:
            return smaller
        # Parts that lost all their facts go, so that `compose([a, b])` without b's facts is a.
        return _with_parts(smaller, _thinned(self.settings["parts"], gone))

    def applied(
        self, lm: LanguageModel, *, how: in_memory.How = "auto", force: bool = False
    ) -> AbstractContextManager[LanguageModel]:
        """Edit `lm` for the length of the block; afterwards it is as before, bit for bit.

        Args:
            how: "weights" writes into the weights, "beside" leaves them alone (so they may be
                quantised or offloaded), "auto" chooses. See `edit.applied.applied`.
            force: apply also to weights on which the edit was not computed.
        """
        return in_memory.applied(self.changes, lm, how=how, force=force)

    def rounding_cost(self, lm: LanguageModel) -> dict[str, float]:
        """Return what rounding into the model's dtype loses, as a share of each delta. See
        `edit.applied.rounding_cost`.
        """
        return in_memory.rounding_cost(self.changes, lm)

    def save(self, folder: str | Path) -> Path:
        """Write the edit as a folder, whole or not at all. See `folder_format.save`."""
        return folder_format.save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Edit:
        """Read what `save` wrote.

        Raises:
            EngramFileError: missing, damaged, of another format version, or an in-context edit,
                which has no weights.
        """
        edit = load_edit(folder)  # of either kind, so that the error can name the kind
        if not isinstance(edit, Edit):
            raise EngramFileError(
                f"{folder} holds an in-context edit ({edit!r}): a text in front of prompts, which "
                "changes no weights. Read it with PromptEdit.load, or either kind with "
                "engram.edit.edit.load_edit; `engram generate --edit` takes either"
            )
        return edit

    def contents(self) -> folder_format.Contents:
        """Return what the edit's folder holds."""
        record = {"facts": [fact.to_dict() for fact in self.facts]}
        record |= {name: getattr(self, name) for name in _RECORDED}
        return folder_format.Contents(record, self.deltas, self.keys)

    @classmethod
    def from_contents(cls, contents: folder_format.Contents) -> Edit:
        """Build an edit from what its folder holds."""
        record = contents.record
        if record["method"] == COMPOSED:
            _check_parts(record["settings"], len(record["facts"]))
        return cls(
            facts=tuple(map(Fact.from_dict, record["facts"])),
            deltas=contents.deltas,
            keys=contents.keys,
            **{name: record[name] for name in _RECORDED},
        )

    def to_peft(self, folder: str | Path) -> Path:
        """Write the edit as a LoRA adapter. See `lora_export.to_peft`."""
        return lora_export.to_peft(self.changes, folder)

    def to_gguf(self, path: str | Path, *, base: str | Path | None = None) -> Path:
        """Write the edit as a LoRA adapter of llama.cpp. See `gguf_export.to_gguf`."""
        return gguf_export.to_gguf(self.changes, path, base=base)

    def to_checkpoint(
        self,
        source: LanguageModel | str | Path,
        folder: str | Path,
        *,
        force: bool = False,
        dtype: str | None = None,
    ) -> Path:
        """Write an edited checkpoint: of a model in memory with its tokenizer, or of one on disk.

        See `checkpoint.apply_to_checkpoint`. A model in memory is written in its own dtype.
        """
        if isinstance(source, str | Path):
            return checkpoint.apply_to_checkpoint(self, source, folder, force=force, dtype=dtype)
        if dtype is not None:
            raise SettingError(
                f"dtype={dtype!r}: a model in memory is written in its own dtype; load it in "
                "that one, or give the checkpoint's folder or name"
            )
        return checkpoint.save_edited(self.changes, source, folder, force=force)


def load_edit(folder: str | Path) -> Edit | PromptEdit:
    """Read an edit of either kind from its folder.

    Raises:
        EngramFileError: missing, damaged, or of another format version.
    """
    contents = folder_format.read(folder)
    with folder_format.damage_of(folder):
        return (Edit if contents.deltas else PromptEdit).from_contents(contents)


@checked_call
def compose(edits: Sequence[Edit | PromptEdit]) -> Edit:
    """Return one edit that does what all of them do: deltas add, facts are joined in order.

    The edits have to be computed on the same base, each as if it were alone. Receipts are not
    carried over: they are not about the composition. Keys are, at every weight where each part that
    changes it has them.

    Raises:
        EngramError: no edits, or an in-context edit, which has no weights to add.
        BaseMismatchError: they were computed on different weights.
    Example:
        >>> both = engram.compose([edit, edit])
        >>> len(both.facts)
        2
    """
    if not edits:
        raise EngramError("compose needs at least one edit, got an empty list")
    if len(edits) == 1:
        return cast("Edit", edits[0])
    for edit in edits:
        check_changes_weights(edit)
    edits = cast("Sequence[Edit]", edits)
    facts = tuple(fact for edit in edits for fact in edit.facts)
    terms: dict[str, list[Delta]] = {}
    # Compared weight by weight, so that edits of different layers compose, too.
    tensors: dict[str, Any] = {}
    parts: list[dict[str, Any]] = []
    first = 0
    for edit in edits:
        for name, delta in edit.deltas.items():
            weight = edit.base["tensors"][name]
            if (
                tensors.setdefault(name, weight) != weight
                or edit.base["model_type"] != edits[0].base["model_type"]
            ):
                raise BaseMismatchError(
                    f"edits of {name!r} were made on different weights "
                    f"({tensors[name]['sha256'][:12]} of {edits[0].base['model']!r} and "
                    f"{weight['sha256'][:12]} of {edit.base['model']!r}), so their sum means "
                    "nothing. Compose edits made on the same unedited model"
                )
            # facts are joined in order: those of this edit come after all earlier ones
            terms.setdefault(name, []).append(
                delta.renumbered({i: i + first for i in range(len(edit.facts))})
            )
        # A composition of compositions is flat: parts keep their own recipes, however nested.
        parts += edit.settings["parts"] if edit.method == COMPOSED else [_recipe(edit)]
        first += len(edit.facts)
    # Not an error: the sum is well defined, only its effect on such a prompt is not.
    _warn_of_conflicts(facts)
    deltas = {name: add(changes) for name, changes in terms.items()}
    base = {**edits[0].base, "tensors": tensors}
    keys = fact_keys.joined([(edit.keys, edit.deltas, len(edit.facts)) for edit in edits])
    return Edit(facts, COMPOSED, {"parts": parts}, deltas, base, keys=keys)


def _recipe(edit: Edit) -> dict[str, Any]:
    fields = {
        name: getattr(edit, name)
        for name in ("method", "settings", "seed", "versions", "diagnostics")
    }
    return {**fields, "facts": len(edit.facts), "model": edit.base["model"]}


def _thinned(parts: list[dict[str, Any]], gone: set[int]) -> list[dict[str, Any]]:
    """Return the parts with the number of facts they have left, without those that have none."""
    thinned, first = [], 0
    for part in parts:
        left = sum(i not in gone for i in range(first, first + part["facts"]))
        first += part["facts"]
        if left:  # diagnostics of a part that lost facts are about facts no longer there
            thinned.append(
                part if left == part["facts"] else {**part, "facts": left, "diagnostics": {}}
            )
    return thinned


def _with_parts(edit: Edit, parts: list[dict[str, Any]]) -> Edit:
    """Return a composed edit of these parts; a single part is no composition any more and takes its
    recipe back.
    """
    if len(parts) > 1:
        return replace(edit, settings={"parts": parts})
    recipe = {name: value for name, value in parts[0].items() if name not in ("facts", "model")}
    return replace(edit, base={**edit.base, "model": parts[0]["model"]}, **recipe)


def _check_parts(settings: Mapping[str, Any], facts: int) -> None:
    """Raise EngramFileError unless the settings of a composition hold recipes of all its facts."""
    parts = checked("settings", settings, ComposedForm, EngramFileError)["parts"]
    if (counted := sum(part["facts"] for part in parts)) != facts:
        raise EngramFileError(f"its parts have {counted} facts, the composition has {facts}")


def _warn_of_conflicts(facts: Sequence[Fact]) -> None:
    targets: dict[str, str] = {}
    for fact in facts:
        if targets.setdefault(fact.prompt_text, fact.target).strip() != fact.target.strip():
            log.warning(
                "%r is edited to %r and to %r in one composition; the changes add, neither may win",
                fact.prompt_text,
                targets[fact.prompt_text],
                fact.target,
            )
