"""Which edits are in force on a model at the moment: what was written into its weights, and what is
attached beside them.

Two registries, because an edit can be in force in two ways:

    WRITTEN   parameter -> the edits written into it, oldest first. Each entry holds the bits to
              write back and the `Stack` of changes that the weight now stands for. The key is the
              parameter, compared by identity, so tied weights are one entry.
    ATTACHED  module -> the changes added to its output, oldest first; its weight is untouched.

Both hold their keys weakly: they end with the model. They are global because edits on one model
nest across callers that do not know each other (a ledger, a benchmark, a user's `with` block), and
an edit made inside such a block has to record what it was made on. Refuses to know how edits are
applied (applied.py, attached.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from engram.edit.delta import Delta
from engram.edit.stack import Stack
from engram.modules.fingerprints import fingerprint


@dataclass(eq=False)  # by identity: the same edit may be in force twice
class WrittenEdit:
    """One edit's change of one parameter while it is in force."""

    saved: Tensor  # on the CPU: the bits to write back afterwards
    stack: Stack  # this change together with those below it


# A WeakKeyDictionary would compare tensors with ==, element by element, at every look-up.
WRITTEN: MutableMapping[Tensor, list[WrittenEdit]] = WeakTensorKeyDictionary()
ATTACHED: MutableMapping[nn.Module, list[Delta]] = WeakKeyDictionary()


def edited(model: nn.Module) -> list[str]:
    """Return the names of the weights into which an edit is written at the moment."""
    return [name for name, weight in model.named_parameters() if weight in WRITTEN]


def attached_to(model: nn.Module) -> list[str]:
    """Return a line "module sha256" for each factor attached beside a weight of `model`.

    Attached changes are part of what the model computes, and in none of its tensors.
    """
    return [
        f"{name} {print_}"
        for name, module in model.named_modules()
        for print_ in _attached_prints(module)
    ]


def fingerprint_in_force(sha256: str, module: nn.Module) -> str:
    """Return the fingerprint of a module's weight together with what is attached beside it.

    Args:
        sha256: of the weight alone; it is returned as it is where nothing is attached.
    """
    prints = _attached_prints(module)
    # Unchanged where nothing is attached, so an edit made on the bare weight fits it ever after.
    return hashlib.sha256(" ".join([sha256, *prints]).encode()).hexdigest() if prints else sha256


def _attached_prints(module: nn.Module) -> list[str]:
    # Order counts, too: sums of floats in another order may round to other numbers.
    deltas = ATTACHED.get(module, ())
    return [fingerprint(factor) for delta in deltas for factor in delta.factors().values()]
