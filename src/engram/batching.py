"""Batches: rows of about one length together, as many as a budget allows.

A padded batch costs its rows times its longest row, so rows are sorted by length, and a batch is
filled until the next row no longer fits. Knows nothing of what the rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def batches(
    items: Iterable[T],
    fits: Callable[[list[T], T], bool] | None = None,
    *,
    key: Callable[[T], Any] | None = None,
    length: Callable[[T], int] | None = None,
    tokens: int = 0,
    size: Callable[[T], int] | None = None,
    total: int = 0,
) -> Iterator[list[T]]:
    """Split `items` into consecutive batches, each as full as it may be.

    An item that is above a limit by itself is a batch of its own; none is dropped.

    Args:
        fits: whether an item may join a batch that has at least one; default: always.
        key: items are sorted by it first, equal ones in their order; default: not sorted.
        length, tokens: a batch's items, each padded to its longest one, have `tokens` at most.
        size, total: the sizes of a batch's items sum to `total` at most.
    Example:
        >>> from engram.batching import batches
        >>> list(batches([9, 2, 3, 8, 2], key=int, length=int, tokens=18))
        [[2, 2, 3], [8, 9]]
        >>> list(batches([9, 2, 3, 8, 2], size=int, total=12))
        [[9, 2], [3, 8], [2]]
    """
    batch: list[T] = []
    longest = held = 0  # running, since recomputing them for every item is quadratic
    for item in items if key is None else sorted(items, key=key):
        # Checked before the item joins: only an item that is too large alone exceeds a limit.
        own_length = length(item) if length else 0
        own_size = size(item) if size else 0
        if batch and (
            (len(batch) + 1) * max(longest, own_length) > tokens
            or held + own_size > total
            or (fits and not fits(batch, item))
        ):
            yield batch
            batch, longest, held = [], 0, 0
        batch.append(item)
        longest, held = max(longest, own_length), held + own_size
    if batch:
        yield batch
