"""Means over facts with bootstrap intervals, and rank correlation.

Knows arrays of facts by anything. Refuses to know what the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
_LEAST_SPREAD = 1e-6  # below, there is nothing to correlate
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over facts and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def spearman(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float | None:
    """Rank correlation, equal values sharing the mean of their ranks; None where one side does not vary."""
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


def resampled(values_nl: Array) -> Array:
    """[resamples, l] means of as many rows, drawn with replacement; the same draws for the same number of rows."""
    drawn_rn = np.random.default_rng(0).integers(len(values_nl), size=(_RESAMPLES, len(values_nl)))
    weights_rn = np.stack([np.bincount(draw, minlength=len(values_nl)) for draw in drawn_rn]) / len(values_nl)
    return np.asarray(weights_rn @ values_nl)
