"""Keys of facts: the inputs of an edited weight at which its change was solved, one row per fact.

Knows how such tables are checked, thinned and joined. Refuses to know how keys are computed
(editors/closed_form/subject_keys.py) and what they are for: later edits preserve them, a ledger
compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engram.edit.delta import Delta
from engram.errors import EngramError, NonFiniteError

Keys = dict[str, Tensor]  # parameter name -> [n, in]; zeros where a fact has no key at that weight


def validated_keys(keys: Mapping[str, Tensor], deltas: Mapping[str, Delta], facts: int) -> Keys:
    """Return `keys` on the CPU, once they fit the weights that `deltas` change.

    Raises:
        EngramError: keys of a weight that is not changed, or not one row per fact.
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
                f"keys of {name!r} are {key_nf.dtype} {list(key_nf.shape)}; expected one row a "
                f"fact, [facts, in] = {expected}, in float32 or float64"
            )
        if not key_nf.isfinite().all():
            raise NonFiniteError(f"keys of {name!r} hold NaN or infinity; nothing was changed")
    return {name: key_nf.detach().cpu().contiguous() for name, key_nf in keys.items()}


def rows(keys: Keys, facts: Sequence[int], deltas: Mapping[str, Delta]) -> Keys:
    """Return the keys of these facts, at the weights that are still changed."""
    return {name: key_nf[list(facts)] for name, key_nf in keys.items() if name in deltas}


def joined(parts: Sequence[tuple[Keys, Mapping[str, Delta], int]]) -> Keys:
    """Return the keys of all facts of several edits, at each weight for which all edits that change
    it have keys.

    The facts of an edit that does not change a weight have rows of zeros there. Two edits of two
    facts and one fact, "-" for a weight that an edit does not change:

        weight    edit 1      edit 2        joined
        mlp.3     keys        keys          three rows of keys
        mlp.4     keys        -             two rows of keys, one of zeros
        mlp.5     keys        no keys       left out: the second edit's keys are unknown

    Args:
        parts: keys, deltas and number of facts of each edit.
    """
    joint: Keys = {}
    # A weight with some facts' keys unknown is left out: zeros would say that they have none there,
    # and a later edit would take it that nothing has to be preserved.
    for name in dict.fromkeys(name for _, deltas, _ in parts for name in deltas):
        changing = [(keys, deltas) for keys, deltas, _ in parts if name in deltas]
        if all(name in keys for keys, _ in changing):
            width = changing[0][1][name].shape[1]
            tables = [keys.get(name, torch.zeros(facts, width)) for keys, _, facts in parts]
            joint[name] = torch.cat(tables)
    return joint
