"""Delta: the low-rank change of one weight, as a value with a little algebra.

Knows two factors and which facts their columns belong to. Refuses to know models, files, and how a
weight is stored: everything here is [out, in].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.errors import EngramError, NonFiniteError

Owners = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Delta:
    """The change `left @ right` of one weight, or `left` itself where a method is not low-rank.

    Args:
        left: [out, r], or the whole change [out, in] when `right` is None; float32 or float64, kept
            on the CPU.
        right: [r, in], of `left`'s dtype; None for a dense change.
        owners: for each of the r columns (a dense change counts as one) the facts it belongs to, as
            indices into `Edit.facts`; a column of several facts was solved for them jointly. An int
            means one fact. None: in an `Edit`, every column belongs to all facts.
    Raises:
        ValueError: factors that do not fit each other, or another dtype.
        NonFiniteError: NaN or infinity in a factor.
    Example:
        Two columns, the first of fact 0 and the second of fact 1; without fact 0 one column is
        left.

        >>> import torch
        >>> from engram.edit.delta import Delta
        >>> delta = Delta(torch.ones(3, 2), torch.ones(2, 4), owners=[0, 1])
        >>> delta.shape, delta.rank, delta.without({0}).owners
        ((3, 4), 2, ((1,),))
    """

    left: Tensor
    right: Tensor | None = None
    owners: Sequence[int | Sequence[int]] | None = None

    def __post_init__(self) -> None:
        for side, factor in self.factors().items():
            if (
                factor.ndim != 2
                or factor.dtype not in (torch.float32, torch.float64)
                or factor.dtype != self.left.dtype
            ):
                raise ValueError(
                    f"{side} factor of a delta is {factor.dtype} {list(factor.shape)}; expected a "
                    "matrix in float32 or float64, both factors alike (compute the change in "
                    "float32, it is rounded when it is merged)"
                )
            if not factor.isfinite().all():
                raise NonFiniteError(
                    f"{side} factor of a delta holds NaN or infinity; nothing was changed"
                )
            # On the CPU and contiguous: equal deltas have equal bytes, and files need them so.
            object.__setattr__(self, side, factor.detach().cpu().contiguous())
        if self.right is not None and self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"factors [out, r] = {list(self.left.shape)} and [r, in] = "
                f"{list(self.right.shape)} do not agree on the rank r"
            )
        if self.owners is not None:
            owners = tuple(
                (facts,) if isinstance(facts, int) else tuple(sorted(facts))
                for facts in self.owners
            )
            if len(owners) != self.columns:
                raise ValueError(
                    f"{len(owners)} owners for {self.columns} columns; expected one entry a column"
                )
            object.__setattr__(self, "owners", owners)

    def factors(self) -> dict[str, Tensor]:
        """Return the tensors of this change, by field name."""
        sides = {"left": self.left, "right": self.right}
        return {side: factor for side, factor in sides.items() if factor is not None}

    def __eq__(self, other: object) -> bool:
        """Bit for bit the same factors with the same owners."""
        if not isinstance(other, Delta):
            return NotImplemented
        return self.owners == other.owners and same_tensors(self.factors(), other.factors())

    @property
    def is_dense(self) -> bool:
        return self.right is None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def rank(self) -> int:
        """Number of columns; for a dense change the largest rank it can have."""
        return min(self.shape) if self.right is None else self.left.shape[1]

    @property
    def columns(self) -> int:
        """Parts that can have different owners: the rank, or 1 for a dense change."""
        return 1 if self.right is None else self.left.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the change as a matrix [out, in], computed in `dtype` (default: the factors')."""
        # The factors are cast and not their product: rounding comes once, at the end.
        left = self.left.to(dtype or self.left.dtype)
        return left if self.right is None else left @ self.right.to(left.dtype)

    def norm(self) -> float:
        """Return the Frobenius norm, in float64 and without forming the matrix:
        ||L R||^2 = sum((L^T L) * (R R^T)).
        """
        # float64: the product of two norms of small factors loses digits in float32
        left = self.left.double()
        if self.right is None:
            return float(left.norm())
        right = self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return factors [out, r] and [r, in]; of a dense change, one of them is the identity."""
        if self.right is not None:
            return self.left, self.right
        out, into = self.shape
        # The identity on the shorter side, so that the rank is the least that a dense change needs.
        identity = torch.eye(min(out, into), dtype=self.left.dtype)
        return (self.left, identity) if into <= out else (identity, self.left)

    def facts(self) -> set[int]:
        """Return the facts that own a column."""
        return {fact for owners in self._owners() for fact in owners}

    def owned_by(self, owners: Iterable[Iterable[int]]) -> Delta:
        """Return the same change with other owners, one entry per column."""
        return Delta(self.left, self.right, tuple(tuple(facts) for facts in owners))

    def renumbered(self, place: Mapping[int, int]) -> Delta:
        """Return the same change with fact i numbered `place[i]`."""
        return self.owned_by(tuple(place[fact] for fact in facts) for facts in self._owners())

    def without(self, gone: Collection[int]) -> Delta | None:
        """Return what is left when the columns of these facts go; None where nothing is left.

        Raises:
            EngramError: a column belongs to facts that go and to facts that stay.
        """
        columns = []
        for column, facts in enumerate(self._owners()):
            staying = [fact for fact in facts if fact not in gone]
            # A column that several facts share is one solution: no part of it is one fact's.
            if staying and len(staying) < len(facts):
                raise EngramError(
                    f"facts {', '.join(map(str, facts))} were solved jointly and share their "
                    f"columns: facts {', '.join(map(str, sorted(set(facts) - set(staying))))} "
                    "cannot be taken out alone. Take out all of them, or make the edit again "
                    "without the facts that shall go"
                )
            if staying:
                columns.append(column)
        # The same object, so that a weight without the facts that go stays bit for bit.
        if len(columns) == self.columns:
            return self
        if not columns or self.right is None:
            return None
        return Delta(
            self.left[:, columns],
            self.right[columns],
            [self._owners()[column] for column in columns],
        )

    def _owners(self) -> Owners:
        assert self.owners is not None, "an Edit gives every column its owners"
        return self.owners  # type: ignore[return-value]


def same_tensors(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Return whether two tables of tensors are equal bit for bit, names and dtypes included."""
    # The dtype by itself: `torch.equal` holds 1.0 in float32 and in float64 for equal.
    return tensors.keys() == others.keys() and all(
        tensors[name].dtype == others[name].dtype and torch.equal(tensors[name], others[name])
        for name in tensors
    )


def add(deltas: Sequence[Delta]) -> Delta:
    """Return the sum of changes of one weight. Ranks add; with a dense change among them the sum is
    dense and owned jointly.

    Raises:
        ValueError: the changes are of weights of different shapes.
    """
    if len(deltas) == 1:
        return deltas[0]
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise ValueError(f"changes of weights of different shapes do not add: {sorted(shapes)}")
    owners = [facts for delta in deltas for facts in delta._owners()]
    # A dense change counts as one column, so the columns of the others merge into it.
    if any(delta.is_dense for delta in deltas):
        dtype = max((delta.left.dtype for delta in deltas), key=lambda dtype: dtype.itemsize)
        return Delta(
            torch.stack([delta.dense(dtype) for delta in deltas]).sum(0),
            None,
            [sorted({*sum(owners, ())})],
        )
    # Side by side: [L1 L2] [R1; R2] = L1 R1 + L2 R2, and every column can be taken out again.
    factors = [delta.low_rank() for delta in deltas]
    return Delta(
        torch.cat([left for left, _ in factors], 1),
        torch.cat([right for _, right in factors], 0),
        owners,
    )
