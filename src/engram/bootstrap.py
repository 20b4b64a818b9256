"""Means over facts with bootstrap intervals, and rank correlation.

Knows arrays of facts by anything. Refuses to know what the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram.checks import Count, Seed, check_fields

_AT_ONCE = 64  # resamples, so that weights of twenty thousand rows stay small
_LEAST_SPREAD = 1e-6  # below, there is nothing to correlate
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over facts and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How rows are drawn with replacement: the same rows for the same count and the same seed.

    Args:
        resamples: draws, each of as many rows as there are.
    Raises:
        SettingError: no resamples.
    """

    seed: Seed = 0
    resamples: Count = 1000

    def __post_init__(self) -> None:
        check_fields(self)

    def means(self, values_nl: Array) -> Array:
        """Return the means [resamples, l] of the rows of each draw.

        A draw of n rows is a vector of n weights, and all means are one product: for the three rows
        1, 4, 7 and the draw (2, 0, 2) the weights are 1/3, 0, 2/3 and the mean is 5. Gathering the
        rows of each draw instead needs n times the memory.

        Args:
            values_nl: NaN where a row has no value: it is left out of that column's means, which
                are NaN where no drawn row has one.
        """
        generator = np.random.default_rng(self.seed)
        n = len(values_nl)
        missing_nl = np.isnan(values_nl)
        filled_nl, present_nl = np.where(missing_nl, 0.0, values_nl), 1.0 - missing_nl
        # In blocks: a thousand resamples of 20,000 rows at once would be 160 MB of weights.
        parts = []
        for start in range(0, self.resamples, _AT_ONCE):
            drawn_rn = generator.integers(n, size=(min(_AT_ONCE, self.resamples - start), n))
            weights_rn = np.stack([np.bincount(draw, minlength=n) for draw in drawn_rn]) / n
            means_rl = weights_rn @ filled_nl
            if missing_nl.any():
                with np.errstate(invalid="ignore"):  # 0 / 0: no drawn row has a value, so NaN
                    means_rl = means_rl / (weights_rn @ present_nl)
            parts.append(means_rl)
        return np.concatenate(parts)


DEFAULT = Bootstrap()


def means(values_nl: Array) -> list[Mean]:
    """Return the mean of each column with its interval, a percentile bootstrap over rows.

    Example:
        >>> import numpy as np
        >>> means(np.array([[1.0], [1.0]]))
        [Mean(mean=1.0, low=1.0, high=1.0)]
    """
    low_l, high_l = np.percentile(DEFAULT.means(values_nl), (2.5, 97.5), axis=0)
    return [Mean(*map(float, row)) for row in zip(values_nl.mean(0), low_l, high_l, strict=True)]


def spearman(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float | None:
    """Return the rank correlation; None where one side does not vary.

    Example:
        >>> round(spearman([1, 2, 3], [10, 30, 20]), 3)
        0.5
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if min(np.ptp(a), np.ptp(b)) < _LEAST_SPREAD:
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Array) -> Array:
    """Return the ranks from 0; equal values share the mean of theirs.

    Example:
        >>> ranks([5.0, 7.0, 7.0]).tolist()
        [0.0, 1.5, 1.5]
    """
    # Equal values take the places before `cumsum`: counts 1, 2 give the mean ranks 0 and 1.5.
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]
