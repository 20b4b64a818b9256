"""WeightChanges: what an edit does to the weights of a model, without the facts that it is for.

Knows the change of each weight, and a description of the weights on which these changes were
computed. Refuses to know facts, methods, files and models. Whatever applies, exports or stores
changes needs this value only; `edit.Edit` adds facts and a recipe to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engram.edit.delta import Delta
from engram.errors import EngramError


@dataclass(frozen=True)
class WeightChanges:
    """Changes of weights by parameter name, and the weights on which they were computed.

    Args:
        deltas: parameter name (as in `model.state_dict()`) -> its change.
        base: what `base.describe_base` says about the model: {"model", "model_type", "tensors":
            {parameter name: {"sha256", "dtype", "shape", "transposed"[, "quantised"]}}}.
    Raises:
        EngramError: the base does not describe a changed weight, or describes another shape.
    """

    deltas: Mapping[str, Delta]
    base: Mapping[str, Any]

    def __post_init__(self) -> None:
        # Here and not where it is applied: an edit that does not fit its base is never saved.
        described = self.base.get("tensors", {})
        for name, delta in self.deltas.items():
            if name not in described:
                raise EngramError(
                    f"base does not describe {name!r}, which the edit changes; use "
                    "engram.edit.base.describe_base(lm, names)"
                )
            shape = described[name]["shape"]
            # a Conv1D stores [in, out]; deltas are always [out, in]
            expected = tuple(reversed(shape) if described[name]["transposed"] else shape)
            if delta.shape != expected:
                raise EngramError(
                    f"delta of {name!r} is [out, in] = {list(delta.shape)}, its weight is "
                    f"{list(expected)}"
                )

    def __repr__(self) -> str:
        ranks = ", ".join(f"{name} (rank {delta.rank})" for name, delta in self.deltas.items())
        return f"WeightChanges({ranks})"

    def made_on(self, name: str) -> Mapping[str, Any]:
        """Return the description of the weight on which the change of `name` was computed."""
        record: Mapping[str, Any] = self.base["tensors"][name]
        return record
