"""Means over facts with bootstrap intervals, and rank correlation.

Knows arrays of facts by anything. Refuses to know what the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
_AT_ONCE = 64  # resamples, so that weights of twenty thousand rows stay small
_LEAST_SPREAD = 1e-6  # below, there is nothing to correlate
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over facts and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def spearman(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float | None:
    """Rank correlation, equal values sharing the mean of their ranks; None where one side does not
    vary.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if min(np.ptp(a), np.ptp(b)) < _LEAST_SPREAD:
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Array) -> Array:
    """Ranks from 0, equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]


def means(values_nl: Array) -> list[Mean]:
    """One a column; the interval is a percentile bootstrap over rows."""
    low_l, high_l = np.percentile(resampled(values_nl), (2.5, 97.5), axis=0)
    return [Mean(*map(float, each)) for each in zip(values_nl.mean(0), low_l, high_l, strict=True)]


def resampled(values_nl: Array, seed: int = 0, resamples: int = _RESAMPLES) -> Array:
    """[resamples, l] means of as many rows, drawn with replacement; the same draws for the same
    number of rows and the same seed.

    Args:
        values_nl: NaN where a row has no value: it is left out of that column's means, which are
            NaN where no row drawn has one.
    """
    generator = np.random.default_rng(seed)
    missing_nl = np.isnan(values_nl)
    given_nl, there_nl = np.where(missing_nl, 0.0, values_nl), 1.0 - missing_nl
    parts = []
    for start in range(0, resamples, _AT_ONCE):
        drawn_rn = generator.integers(
            len(values_nl), size=(min(_AT_ONCE, resamples - start), len(values_nl))
        )
        weights_rn = np.stack(
            [np.bincount(draw, minlength=len(values_nl)) for draw in drawn_rn]
        ) / len(values_nl)
        means_rl = weights_rn @ given_nl
        if missing_nl.any():
            with np.errstate(invalid="ignore"):
                means_rl = means_rl / (weights_rn @ there_nl)
        parts.append(means_rl)
    return np.concatenate(parts)


def resampled_twice(
    values: Sequence[Sequence[float]], seed: int = 0, resamples: int = _RESAMPLES
) -> Array:
    """[resamples] means over groups of the means in each, by a bootstrap in two stages: groups,
    then values of the pool of these.

    A value counts as one over the size of its group, so that draws lie around the mean of the
    groups' means.

    Args:
        values: of each group, at least one.
    """
    generator = np.random.default_rng(seed)
    values_p = np.concatenate([np.asarray(each, dtype=float) for each in values])
    sizes_n = np.array([len(each) for each in values])
    weights_p, ends_n = np.repeat(1 / sizes_n, sizes_n), sizes_n.cumsum()
    means = []
    for _ in range(resamples):
        groups = generator.integers(len(values), size=len(values))
        behind = (
            ends_n[groups] - sizes_n[groups].cumsum()
        )  # how much further a group's last value stands than in the pool
        pool = np.repeat(behind, sizes_n[groups]) + np.arange(sizes_n[groups].sum())
        drawn = pool[generator.integers(len(pool), size=len(pool))]
        means.append(np.average(values_p[drawn], weights=weights_p[drawn]))
    return np.array(means)
