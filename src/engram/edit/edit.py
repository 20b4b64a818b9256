"""Edit: the value that an editor returns: what changes in which weight, for which facts, and how it
was made.

Knows facts, deltas and their recipe, and how edits add and subtract. How an edit is laid on a model
is merging.py, and beside its weights attaching.py; how it is kept edit_files.py, how it changes a
checkpoint on disk checkpoint.py, how it becomes an adapter peft_export.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engram.edit import keys as fact_keys
from engram.edit.delta import Delta, add
from engram.errors import BaseMismatchError, EngramError, EngramFileError, FactError
from engram.facts import Fact

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel
from engram.edit.recipe import check_changes_weights, fact_index, library_versions, plain

log = logging.getLogger(__name__)


COMPOSED = "composed"  # method of an edit that `compose` made; its settings hold the parts' recipes


@dataclass(frozen=True)
class Edit:
    """A change of a model's weights that makes it say other facts; a value, nothing is changed by
    making one.

    Args:
        facts: what the edit makes true, at least one.
        method: name of the editor.
        settings: its settings; like `diagnostics` and `receipt`, made of what JSON knows.
        deltas: parameter name (as in `model.state_dict()`) -> its change.
        base: what the edit was made on, from `merging.describe_base`: {"model", "model_type",
            "tensors": {parameter name: {"sha256", "dtype", "shape", "transposed"}}}, and
            "quantised" where it is.
        seed: of every random draw.
        versions: of the libraries that computed it.
        diagnostics: numbers that the editor reports.
        receipt: what `engram.verify` found, once it has.
        keys: parameter name -> [facts, in], row i the input at which fact i's change was solved
            (zeros: it has none there); for weights and methods that have keys, the others are left
            out.
    Raises:
        EngramError: no deltas, a delta that its base does not describe, keys that do not fit, or
            settings that JSON cannot hold.
    """

    facts: tuple[Fact, ...]
    method: str
    settings: dict[str, Any]
    deltas: dict[str, Delta]
    base: dict[str, Any]
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] | None = None
    keys: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", tuple(self.facts))
        if not self.facts or not self.deltas:
            raise EngramError(
                f"an edit needs facts and deltas; got {len(self.facts)} facts and {len(self.deltas)} deltas"
            )
        for name in ("settings", "base", "versions", "diagnostics", "receipt"):
            object.__setattr__(self, name, plain(name, getattr(self, name)))
        object.__setattr__(
            self,
            "deltas",
            {name: self._checked(name, delta) for name, delta in self.deltas.items()},
        )
        object.__setattr__(
            self, "keys", fact_keys.validated_keys(self.keys, self.deltas, len(self.facts))
        )

    def __eq__(self, other: object) -> bool:
        """The same facts, recipe and base, and bit for bit the same deltas and keys."""
        if not isinstance(other, Edit):
            return NotImplemented
        plain = [each.name for each in fields(self) if each.name != "keys"]
        return all(
            getattr(self, name) == getattr(other, name) for name in plain
        ) and fact_keys.same(self.keys, other.keys)

    def _checked(self, name: str, delta: Delta) -> Delta:
        """`delta` with owners, once it agrees with the weight that `base` describes."""
        weight = self.base.get("tensors", {}).get(name)
        if weight is None:
            raise EngramError(
                f"base does not describe {name!r}, which the edit changes; use merging.describe_base(lm, names)"
            )
        shape = tuple(reversed(weight["shape"])) if weight["transposed"] else tuple(weight["shape"])
        if delta.shape != shape:
            raise EngramError(
                f"delta of {name!r} is [out, in] = {list(delta.shape)}, its weight is {list(shape)}"
            )
        if delta.owners is None:
            return delta.owned_by([range(len(self.facts))] * delta.columns)
        outside = {fact for each in delta._owners() for fact in each} - set(range(len(self.facts)))
        if outside:
            raise EngramError(
                f"delta of {name!r} has columns of facts {sorted(outside)}; there are {len(self.facts)} facts"
            )
        return delta

    def __repr__(self) -> str:
        ranks = ", ".join(f"{name} (rank {delta.rank})" for name, delta in self.deltas.items())
        return f"Edit({len(self.facts)} facts, {self.method!r}, {ranks})"

    @property
    def rank(self) -> int:
        """Largest rank of its deltas."""
        return max(delta.rank for delta in self.deltas.values())

    def with_receipt(self, receipt: Any) -> Edit:
        """The same edit with `receipt`: a dict, or an object that has `to_dict()`."""
        return replace(self, receipt=receipt.to_dict() if hasattr(receipt, "to_dict") else receipt)

    def without(self, *facts: Fact | int) -> Edit:
        """The edit with these facts taken out exactly: their columns go, the others stay bit for
        bit.

        Facts that share their columns (solved jointly) can only go together. `compose([a, b])`
        without b's facts is a, with no receipt.

        Args:
            facts: each a fact of this edit, or its index.
        Raises:
            FactError: a fact that is not in the edit, or nothing would be left.
            EngramError: facts solved jointly with others that stay.
        """
        gone = {fact_index(self.facts, fact) for fact in facts}
        if not gone:
            return self
        kept = [i for i in range(len(self.facts)) if i not in gone]
        if not kept:
            raise FactError(
                "all facts of the edit would go; an edit without facts is the unedited model"
            )
        place = {old: new for new, old in enumerate(kept)}
        remaining = {name: delta.without(gone) for name, delta in self.deltas.items()}
        deltas = {
            name: delta.renumbered(place) for name, delta in remaining.items() if delta is not None
        }
        tensors = {name: self.base["tensors"][name] for name in deltas}
        rest = replace(
            self,
            facts=tuple(self.facts[i] for i in kept),
            deltas=deltas,
            base={**self.base, "tensors": tensors},
            diagnostics={},  # of facts that are no longer all there
            receipt=None,
            keys=fact_keys.rows(self.keys, kept, deltas),
        )
        return (
            _with_parts(rest, _thinned(self.settings["parts"], gone))
            if self.method == COMPOSED
            else rest
        )

    def applied(
        self, lm: LanguageModel, *, force: bool = False
    ) -> AbstractContextManager[LanguageModel]:
        """Within the block `lm` is edited; afterwards it is as before, bit for bit. See
        `merging.applied`.
        """
        from engram.edit.applied import applied

        return applied(self, lm, force=force)

    def attached(
        self, lm: LanguageModel, *, force: bool = False
    ) -> AbstractContextManager[LanguageModel]:
        """Within the block `lm` computes as if edited; no weight is touched, so it may be
        quantised. See `attaching.attached`.
        """
        from engram.edit.attached import attached

        return attached(self, lm, force=force)

    def laid(
        self, lm: LanguageModel, *, force: bool = False
    ) -> AbstractContextManager[LanguageModel]:
        """`applied` where the weights can be written into, `attached` where one is quantised or
        offloaded. See `attaching.laid`.
        """
        from engram.edit.attached import laid

        return laid(self, lm, force=force)

    def rounding_cost(self, lm: LanguageModel) -> dict[str, float]:
        """What rounding into the model's dtype loses, a share of each delta. See
        `merging.rounding_cost`.
        """
        from engram.edit.applied import rounding_cost

        return rounding_cost(self, lm)

    def save(self, folder: str | Path) -> Path:
        """Keep the edit as a folder, whole or not at all. See `edit_files.save`."""
        from engram.edit.folder_format import save

        return save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Edit:
        """Read what `save` wrote. See `edit_files.load`.

        Raises:
            EditFileError: missing, damaged, of another format version, or an in-context edit, which
                has no weights.
        """
        from engram.edit.files import load

        edit = load(folder)
        if not isinstance(edit, Edit):
            raise EngramFileError(
                f"{folder} holds an in-context edit ({edit!r}): a text in front of prompts, which changes no weights. Read it with "
                "PromptEdit.load, or either kind with edit_files.load"
            )
        return edit

    def to_peft(self, folder: str | Path) -> Path:
        """Write the edit as a LoRA adapter. See `peft_export.to_peft`."""
        from engram.edit.lora_export import to_peft

        return to_peft(self, folder)

    def to_checkpoint(
        self, source: LanguageModel | str | Path, folder: str | Path, *, force: bool = False
    ) -> Path:
        """Write an edited checkpoint. See `checkpoint.to_checkpoint`."""
        from engram.edit.checkpoint import to_checkpoint

        return to_checkpoint(self, source, folder, force=force)


def compose(edits: Sequence[Edit]) -> Edit:
    """One edit that does what all of them do: deltas add, facts are joined in order.

    The edits have to be made on the same base, each as if it were alone. The receipts are not
    carried over: they are not about the composition. Keys are, at every weight where each part that
        changes it has them.

    Raises:
        EngramError: no edits, or an in-context edit, which has no weights to add.
        BaseMismatchError: made on different weights.
    """
    if not edits:
        raise EngramError("compose needs at least one edit, got an empty list")
    if len(edits) == 1:
        return edits[0]
    for edit in edits:
        check_changes_weights(edit)
    facts = tuple(fact for edit in edits for fact in edit.facts)
    terms: dict[str, list[Delta]] = {}
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
                    f"edits of {name!r} were made on different weights ({tensors[name]['sha256'][:12]} of "
                    f"{edits[0].base['model']!r} and {weight['sha256'][:12]} of {edit.base['model']!r}), so "
                    "their sum means nothing. Compose edits made on the same unedited model"
                )
            terms.setdefault(name, []).append(
                delta.renumbered({i: i + first for i in range(len(edit.facts))})
            )
        parts += edit.settings["parts"] if edit.method == COMPOSED else [_recipe(edit)]
        first += len(edit.facts)
    _warn_of_conflicts(facts)
    deltas = {name: add(each) for name, each in terms.items()}
    base = {**edits[0].base, "tensors": tensors}
    return Edit(facts, COMPOSED, {"parts": parts}, deltas, base, keys=fact_keys.joined(edits))


def _recipe(edit: Edit) -> dict[str, Any]:
    fields = {
        name: getattr(edit, name)
        for name in ("method", "settings", "seed", "versions", "diagnostics")
    }
    return {**fields, "facts": len(edit.facts), "model": edit.base["model"]}


def _thinned(parts: list[dict[str, Any]], gone: set[int]) -> list[dict[str, Any]]:
    """The parts with their number of facts put right, and those that have none left out."""
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
    """A composed edit of these parts; a single part is no composition any more and takes its recipe
    back.
    """
    if len(parts) > 1:
        return replace(edit, settings={"parts": parts})
    recipe = {name: value for name, value in parts[0].items() if name not in ("facts", "model")}
    return replace(edit, base={**edit.base, "model": parts[0]["model"]}, **recipe)


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
