"""Keys of facts: the inputs of an edited weight at which its change was solved, a row a fact.

Knows how such tables are checked, thinned and joined. Refuses to know how keys are computed
(editors/values.py) and what is
done with them: later edits preserve them, a ledger compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engram.errors import EngramError, NonFiniteError

if TYPE_CHECKING:
    from engram.edit.delta import Delta
    from engram.edit.edit import Edit

Keys = dict[
    str, Tensor
]  # parameter name -> [n, in]; a row of zeros where a fact has no key at that weight


def validated_keys(keys: Mapping[str, Tensor], deltas: Mapping[str, Delta], facts: int) -> Keys:
    """`keys` on the CPU, once they fit the weights that `deltas` change.

    Raises:
        EngramError: keys of a weight that is not changed, or not one row a fact.
        NonFiniteError: NaN or infinity in a key.
    """
    for name, key_nf in keys.items():
        if name not in deltas:
            raise EngramError(
                f"keys of {name!r}, which the edit does not change; it changes {', '.join(deltas)}"
            )
        expected = [facts, deltas[name].shape[1]]
        if list(key_nf.shape) != expected or key_nf.dtype not in (torch.float32, torch.float64):
            raise EngramError(
                f"keys of {name!r} are {key_nf.dtype} {list(key_nf.shape)}; expected one row a fact, [facts, in] = {expected}, "
                "in float32 or float64"
            )
        if not key_nf.isfinite().all():
            raise NonFiniteError(f"keys of {name!r} hold NaN or infinity; nothing was changed")
    return {name: key_nf.detach().cpu().contiguous() for name, key_nf in keys.items()}


def rows(keys: Keys, kept: Sequence[int], deltas: Mapping[str, Delta]) -> Keys:
    """Keys of these facts, at the weights that are still changed."""
    return {name: key_nf[list(kept)] for name, key_nf in keys.items() if name in deltas}


def joined(edits: Sequence[Edit]) -> Keys:
    """Keys of all facts of several edits, at every weight where each edit that changes it has them.

    The facts of an edit that does not change a weight have rows of zeros there: they ask nothing of
        it.
    """
    names = dict.fromkeys(name for edit in edits for name in edit.deltas)
    return {
        name: torch.cat([edit.keys.get(name, _none(edit, into)) for edit in edits])
        for name in names
        if (into := _width(edits, name)) is not None
    }


def same(some: Keys, other: Keys) -> bool:
    """Bit for bit."""
    return some.keys() == other.keys() and all(
        some[name].dtype == other[name].dtype and torch.equal(some[name], other[name])
        for name in some
    )


def _width(edits: Sequence[Edit], name: str) -> int | None:
    """Length of a key at a weight; None where an edit changes it and has no keys."""
    touching = [edit for edit in edits if name in edit.deltas]
    return (
        touching[0].deltas[name].shape[1] if all(name in edit.keys for edit in touching) else None
    )


def _none(edit: Edit, into: int) -> Tensor:
    return torch.zeros(len(edit.facts), into)
