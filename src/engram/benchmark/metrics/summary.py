"""A run in numbers: means over records with intervals, harmonic means of these, and differences
between two runs.

Knows rows of scores by name. Refuses to know how scores are computed and how they are printed:
numbers are as in the rows, not yet scaled for a report.
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.4 and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engram.benchmark.data.records import FORMS, Form
from engram.benchmark.metrics.table import HARMONIC, METRICS, of_form
from engram.bootstrap import DEFAULT, Array, Bootstrap
from engram.checks import one_of
from engram.errors import SettingError

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over records, or a harmonic mean of such means.

    Attributes:
        low, high: 95 % interval of a percentile bootstrap over records.
        half_published: half width of the published interval, 1.96 standard deviations over the root
            of the count; None for harmonic means, which have no standard deviation.
        count: records that have the number.
        std: population standard deviation over records; None for harmonic means.
    """

    mean: float
    low: float
    high: float
    half_published: float | None
    count: int
    std: float | None


def summarise(
    rows: Sequence[Row], form: Form, *, bootstrap: Bootstrap = DEFAULT
) -> dict[str, Estimate]:
    """Return the numbers that a benchmark reports, in the order of a report.

    Numbers that no record has are left out.

    Args:
        rows: one for each record, see `scores`.
        bootstrap: draws the same records for every number.
    Raises:
        SettingError: no rows, or an unknown form.
    """
    names = _names(form, len(rows))
    return _estimates(_array(rows, names), None, names, form, bootstrap)


def paired(
    rows_a: Mapping[str, Row],
    rows_b: Mapping[str, Row],
    form: Form,
    *,
    bootstrap: Bootstrap = DEFAULT,
) -> dict[str, Estimate]:
    """Return the differences a - b on the same records.

    Intervals are of the difference: what is common to both runs does not widen them. Two methods
    that fail on the same hard records differ clearly, however wide their own intervals are.

    Args:
        rows_a, rows_b: id of a record -> its scores. Records that one of them lacks are left out,
            and of each number also those where one has no value; `count` says how many are
            compared. For a harmonic mean all its parts are needed.
    Raises:
        SettingError: no record in common, or an unknown form.
    """
    common = sorted(rows_a.keys() & rows_b.keys())
    names = _names(form, len(common))
    a_nm, b_nm = (_array([rows[key] for key in common], names) for rows in (rows_a, rows_b))
    return _estimates(a_nm, b_nm, names, form, bootstrap)


def harmonic(means: Sequence[float]) -> float:
    """Return the harmonic mean; 0 where one of the means is 0."""
    return float(_harmonic(np.asarray(means, dtype=float)[None])[0])


def _names(form: Form, count: int) -> list[str]:
    one_of("form", form, FORMS)
    _check(count)
    return [name for name in METRICS if form in METRICS[name].forms and name not in HARMONIC]


def _check(count: int) -> None:
    if not count:
        raise SettingError(
            "there are no records to take a mean of; for differences both runs need some with the "
            "same ids"
        )


def _array(rows: Sequence[Row], names: Sequence[str]) -> Array:
    """Return the values [rows, names], NaN for None."""
    values = [
        [np.nan if (value := row.get(name)) is None else value for name in names] for row in rows
    ]
    return np.array(values, dtype=float)


def _estimates(
    a_nm: Array, b_nm: Array | None, names: list[str], form: Form, bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Estimate the means of a, or of a - b over the records where both have a value."""
    values_nm = a_nm if b_nm is None else a_nm - b_nm
    # Of a - b record by record, where both have a value: NaN - x is NaN and drops out. All metrics
    # share their draws, so an interval of S is of the same resamples as those of ES, PS and NS.
    low_m, high_m = _interval(bootstrap.means(values_nm))
    estimates = {}
    for name in of_form(form):
        if name in HARMONIC:
            parts = [names.index(part) for part in HARMONIC[name][form]]
            sides = [side[:, parts] for side in (a_nm, b_nm) if side is not None]
            estimate = _of_harmonic(sides, bootstrap)
        else:
            m = names.index(name)
            column = values_nm[:, m]
            estimate = _estimate(column[~np.isnan(column)], float(low_m[m]), float(high_m[m]))
        if estimate.count:
            estimates[name] = estimate
    return estimates


def _estimate(values: Array, low: float, high: float) -> Estimate:
    if not len(values):
        return _NO_RECORDS
    # ddof 0, as released. Published tables divide by the nominal number of records (7,500 for
    # GPT-2), here it is the records that have the number.
    std = float(values.std())
    return Estimate(
        float(values.mean()), low, high, 1.96 * std / len(values) ** 0.5, len(values), std
    )


def _of_harmonic(sides: Sequence[Array], bootstrap: Bootstrap) -> Estimate:
    """Estimate the harmonic mean of one side's parts, or of the first side minus the second.

    The harmonic mean is taken of means over records, and again in every resample; a record has none
    of its own. Parts may be missing on different records, so each has its own mean.
    """
    if len(sides) == 2:  # a difference needs the same records in all parts of both
        whole = ~np.isnan(np.concatenate(sides, axis=1)).any(1)
        sides = [side[whole] for side in sides]
    count = int((~np.isnan(sides[0])).sum(0).min())
    if not count:
        return _NO_RECORDS
    # S = 3 / (1/ES + 1/PS + 1/NS) of means over the data set: ES 100, PS 96.4 and NS 75.4 give
    # 89.2, ROME's row in the paper. Records cannot have it: one with ES 0 would have S 0 whatever
    # else it does.
    means = [float(_harmonic(np.nanmean(side, axis=0)[None])[0]) for side in sides]
    # Both sides are drawn with one seed and one count, so draw k has the same records in both and
    # the difference is a paired one.
    draws = [_harmonic(bootstrap.means(side)) for side in sides]
    low, high = _interval((draws[0] - draws[1] if len(sides) == 2 else draws[0])[:, None])
    return Estimate(
        means[0] - means[1] if len(sides) == 2 else means[0],
        float(low[0]),
        float(high[0]),
        None,
        count,
        None,
    )


def _harmonic(means_rp: Array) -> Array:
    """Return [r] harmonic means of [r, parts]; NaN where a part is NaN."""
    with np.errstate(divide="ignore"):
        # 1 / 0 is infinite and the quotient 0: one failing part makes S 0, as it should.
        return np.asarray(means_rp.shape[1] / (1 / means_rp).sum(1))


def _interval(draws_rl: Array) -> tuple[Array, Array]:
    """Return the ends of the 95 % interval of each column, of the draws that have a value."""
    out = np.full((2, draws_rl.shape[1]), np.nan)
    has_value = ~np.isnan(draws_rl).all(0)
    # Metrics that most records lack (RippleEdits' tests) have draws without any value, left out.
    if has_value.any():
        out[:, has_value] = np.nanpercentile(draws_rl[:, has_value], (2.5, 97.5), axis=0)
    return out[0], out[1]


_NO_RECORDS = Estimate(float("nan"), float("nan"), float("nan"), None, 0, None)
