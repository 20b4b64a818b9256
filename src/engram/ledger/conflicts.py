"""Which facts of two edits interfere: those about the same subject and relation, and those with
nearly the same key.

Knows facts, keys and deltas. Refuses to know models: the effect of an edit on another one's key
follows from its deltas, without a run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.facts import Fact

# of 1,431 measured pairs: two thirds of those above it spoil a fact, none of those below does; the
# angle between keys ranks pairs almost as well but has no such threshold (docs/ledger.md)
NEAR = 0.5


@dataclass(frozen=True)
class Conflict:
    """A fact of an edit that interferes with a fact of an entry.

    Attributes:
        kind: "same fact": about the same subject and relation; "near keys": the change of one
            reaches the other.
        fact: of the edit.
        other: of the entry with number `entry`, where its index is `index`.
        overlap: see `overlaps`; the larger of both directions, None where an edit has no keys.
    """

    kind: Literal["same fact", "near keys"]
    fact: Fact
    other: Fact
    entry: int
    index: int
    overlap: float | None

    def __str__(self) -> str:
        shown = "" if self.overlap is None else f" (overlap {self.overlap:.2f})"
        return (
            f"{self.fact.prompt_text!r} -> {self.fact.target!r}: {self.kind} as "
            f"{self.entry}.{self.index}, {self.other.prompt_text!r} -> {self.other.target!r}{shown}"
        )


def same_fact(fact: Fact, other: Fact) -> bool:
    """Return whether both are about one subject and one relation: by its name, or by the prompt."""
    named = fact.relation is not None and fact.relation == other.relation
    return fact.subject.strip() == other.subject.strip() and (
        named or fact.prompt.strip() == other.prompt.strip()
    )


def overlaps(acting: Edit, other: Edit) -> Tensor:
    """Return how strongly each fact's change acts on the keys of other facts, as a share of its
    effect on its own key.

    ||D_i k_j|| / ||D_i k_i||, D_i the columns that fact i owns, the largest over the weights that
    both edits change. For a rank-one change u v^T it is |v . k_j| / |v . k_i|: 1 where the change
    cannot distinguish the keys, near 0 where it leaves k_j alone. For example, with
    v = (1, 0), k_i = (2, 1), k_j = (1, 3): |1| / |2| = 0.5, whatever u is.

    Facts solved jointly share their columns, so the columns act on every key of the group. There
    k_j's overlap counts only for the fact whose key is nearest to it by angle.

    Args:
        acting, other: edits with keys; without keys, nothing overlaps.
    Returns:
        [facts of acting, facts of other] float64.
    """
    largest_nm = torch.zeros(len(acting.facts), len(other.facts), dtype=torch.float64)
    for name in acting.keys.keys() & other.keys.keys():
        keys_nf, others_mf = acting.keys[name].double(), other.keys[name].double()
        for facts, change in _by_columns(acting.deltas[name]):
            own_g = _effect(change, keys_nf[facts])
            share_gm = _effect(change, others_mf) / own_g.clamp(min=1e-300)[:, None]
            share_gm[own_g == 0] = 0.0  # a fact without a key at this weight
            angles_gm = _unit(keys_nf[facts]) @ _unit(others_mf).T
            nearest_gm = angles_gm.abs() >= angles_gm.abs().max(0).values
            # The largest and not the mean: one weight that is moved is enough to spoil a fact.
            largest_nm[facts] = torch.maximum(largest_nm[facts], share_gm * nearest_gm)
    return largest_nm


def conflicts(
    edit: Edit, entry: int, other: Edit, indices: Sequence[int], near: float = NEAR
) -> list[Conflict]:
    """Return the conflicts between the facts of `edit` and those of an entry.

    Args:
        other: what is in force of the entry.
        indices: index in the whole entry of each fact of `other`.
        near: overlap from which on keys count as near.
    """
    keyed = bool(edit.keys.keys() & other.keys.keys())
    # both ways: a long change reaches a short one's key more than the other way round
    overlap_nm = torch.maximum(overlaps(edit, other), overlaps(other, edit).T)
    rows = []
    for i, fact in enumerate(edit.facts):
        for j, older in enumerate(other.facts):
            overlap, same = float(overlap_nm[i, j]), same_fact(fact, older)
            if same or overlap >= near:
                kind: Literal["same fact", "near keys"] = "same fact" if same else "near keys"
                rows.append(
                    Conflict(kind, fact, older, entry, indices[j], overlap if keyed else None)
                )
    return rows


def _by_columns(delta: Delta) -> Iterator[tuple[list[int], Delta]]:
    """Yield the facts that own the same columns, with the change of these columns.

    With owners [0, (1, 2), (1, 2)]: fact 0 with column 0, then facts 1 and 2 with columns 1 and 2.
    """
    columns: dict[int, list[int]] = defaultdict(list)
    for column, owners in enumerate(delta.owners or ()):
        for fact in owners if not isinstance(owners, int) else (owners,):
            columns[fact].append(column)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for fact, owned in columns.items():
        groups[tuple(owned)].append(fact)
    for shared, facts in groups.items():
        at = list(shared)
        yield facts, delta if delta.right is None else Delta(delta.left[:, at], delta.right[at])


def _effect(change: Delta, keys_nf: Tensor) -> Tensor:
    """Return ||D k|| of each key, [n]."""
    # D k through the factors: D itself would be [d_model, d_ff]
    inputs_nr = keys_nf if change.right is None else keys_nf @ change.right.double().T
    return (inputs_nr @ change.left.double().T).norm(dim=1)


def _unit(keys_nf: Tensor) -> Tensor:
    return keys_nf / keys_nf.norm(dim=1, keepdim=True).clamp(min=1e-300)
