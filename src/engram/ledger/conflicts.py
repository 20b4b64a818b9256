"""Which facts of two edits get into each other's way: they say different things, or their keys are
nearly the same.

Knows facts, keys and deltas. Refuses to know models: what an edit does to another one's key is read
off its deltas.
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

# two thirds of the pairs above it spoil a fact, of those below none was found to; see
# docs/ledger.md
NEAR = 0.5


@dataclass(frozen=True)
class Conflict:
    """A fact of an edit that gets into the way of a fact of an entry.

    Attributes:
        kind: "same fact": about the same subject and relation; "near keys": the change of one
            reaches the other.
        fact: of the edit; other: of the entry, `index` its place there.
        entry: number of the entry.
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
            f"{self.fact.prompt_text!r} -> {self.fact.target!r}: {self.kind} as {self.entry}.{self.index}, "
            f"{self.other.prompt_text!r} -> {self.other.target!r}{shown}"
        )


def same_fact(fact: Fact, other: Fact) -> bool:
    """Whether both are about one subject and one relation: the same name of it, or the same prompt."""
    named = fact.relation is not None and fact.relation == other.relation
    return fact.subject.strip() == other.subject.strip() and (
        named or fact.prompt.strip() == other.prompt.strip()
    )


def overlaps(acting: Edit, asked: Edit) -> Tensor:
    """How strongly each fact's change acts on the keys of other facts, as a share of how it acts on
    its own.

    ||D_i k_j|| / ||D_i k_i||, D_i the columns that fact i owns, the largest over the weights that
    both edits change. For a rank-one change u v^T it is |v . k_j| / |v . k_i|: 1 where the keys
    cannot be told apart, near 0 where the change passes by. Facts solved jointly share their
    columns; there j's overlap is that with the fact whose key is nearest by angle.

    Args:
        acting, asked: edits with keys; without, nothing overlaps.
    Returns:
        [facts of acting, facts of asked] float64.
    """
    largest_nm = torch.zeros(len(acting.facts), len(asked.facts), dtype=torch.float64)
    for name in acting.keys.keys() & asked.keys.keys():
        keys_nf, others_mf = acting.keys[name].double(), asked.keys[name].double()
        for facts, change in _together(acting.deltas[name]):
            own_g = _effect(change, keys_nf[facts])
            share_gm = _effect(change, others_mf) / own_g.clamp(min=1e-300)[:, None]
            share_gm[own_g == 0] = 0.0  # a fact without a key at this weight
            angles_gm = _unit(keys_nf[facts]) @ _unit(others_mf).T
            nearest_gm = angles_gm.abs() >= angles_gm.abs().max(0).values
            largest_nm[facts] = torch.maximum(largest_nm[facts], share_gm * nearest_gm)
    return largest_nm


def conflicts(
    edit: Edit, entry: int, other: Edit, places: Sequence[int], near: float = NEAR
) -> list[Conflict]:
    """Conflicts between the facts of `edit` and those of an entry.

    Args:
        other: what is in force of the entry; places: where each of its facts stands in the whole
            entry.
        near: overlap from which on keys count as near.
    """
    keyed = bool(edit.keys.keys() & other.keys.keys())
    overlap_nm = torch.maximum(overlaps(edit, other), overlaps(other, edit).T)
    found = []
    for i, fact in enumerate(edit.facts):
        for j, older in enumerate(other.facts):
            overlap, same = float(overlap_nm[i, j]), same_fact(fact, older)
            if same or overlap >= near:
                kind: Literal["same fact", "near keys"] = "same fact" if same else "near keys"
                found.append(
                    Conflict(kind, fact, older, entry, places[j], overlap if keyed else None)
                )
    return found


def _together(delta: Delta) -> Iterator[tuple[list[int], Delta]]:
    """Facts that own the same columns, with the change of these columns."""
    columns: dict[int, list[int]] = defaultdict(list)
    for column, owners in enumerate(delta.owners or ()):
        for fact in owners if not isinstance(owners, int) else (owners,):
            columns[fact].append(column)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for fact, owned in columns.items():
        groups[tuple(owned)].append(fact)
    for owned_by_all, facts in groups.items():
        at = list(owned_by_all)
        yield facts, delta if delta.right is None else Delta(delta.left[:, at], delta.right[at])


def _effect(change: Delta, keys_nf: Tensor) -> Tensor:
    """||D k|| of each key: [n]."""
    left = change.left.double()
    moved_nd = (
        keys_nf @ left.T if change.right is None else (keys_nf @ change.right.double().T) @ left.T
    )
    return moved_nd.norm(dim=1)


def _unit(keys_nf: Tensor) -> Tensor:
    return keys_nf / keys_nf.norm(dim=1, keepdim=True).clamp(min=1e-300)
