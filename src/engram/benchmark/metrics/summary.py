"""A run in numbers: means over records with intervals, harmonic means of these, and differences
between two runs.

Knows rows of scores by name. Refuses to know how they were found and how they are printed; numbers
are as in the rows, not yet scaled for a report. Sources: Meng et al. 2022, arXiv:2202.05262, Sec.
3.4 and its released code; the bootstrap in two stages is that of Hoelscher-Obermaier et al. 2023,
arXiv:2305.17553.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engram.benchmark.data.records import FORMS, Form
from engram.benchmark.metrics.table import HARMONIC, METRICS, of_form
from engram.bootstrap import DEFAULT, Array, Bootstrap
from engram.checks import one_of
from engram.errors import SettingError

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over records, or what is made of such means.

    Attributes:
        low, high: 95 % percentile bootstrap over records.
        half_published: 1.96 standard deviations over the root of the count; None for harmonic
            means, which have none.
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
    """The numbers that a benchmark reports, in the order of a report; those that no record has are
    left out.

    Args:
        rows: one a record, see `scores`.
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
    """Differences a - b on the same records: intervals are of the difference, so that what is
    common to both does not widen them.

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


def hierarchical(values: Sequence[Sequence[float]], *, bootstrap: Bootstrap = DEFAULT) -> Estimate:
    """A mean over records of the means over their prompts, with the interval of CounterFact+: 99 %,
    records drawn, then prompts.

    Args:
        values: of one score, a list a record with a value a prompt, see `of_prompts`; records
            without prompts do not count.
    Raises:
        SettingError: no value.
    """
    there = [each for each in values if len(each)]
    _check(len(there))
    means = np.array([np.mean(each) for each in there])
    low, high = np.percentile(bootstrap.means_of_groups(there), (0.5, 99.5))
    return _estimate(means, float(low), float(high))


def harmonic(means: Sequence[float]) -> float:
    """Harmonic mean; 0 where one of them is."""
    return float(_harmonic(np.asarray(means, dtype=float)[None])[0])


# -- how -------------------------------------------------------------------------------------------


def _names(form: Form, count: int) -> list[str]:
    one_of("form", form, FORMS)
    _check(count)
    return [name for name in METRICS if form in METRICS[name].forms and name not in HARMONIC]


def _check(count: int) -> None:
    if not count:
        raise SettingError(
            "there are no records to take a mean of; for differences both runs need some with the same ids"
        )


def _array(rows: Sequence[Row], names: Sequence[str]) -> Array:
    """[rows, names], NaN for None."""
    values = [
        [np.nan if (value := row.get(name)) is None else value for name in names] for row in rows
    ]
    return np.array(values, dtype=float)


def _estimates(
    a_nm: Array, b_nm: Array | None, names: list[str], form: Form, bootstrap: Bootstrap
) -> dict[str, Estimate]:
    """Of a, or of a - b where both have a value."""
    values_nm = a_nm if b_nm is None else a_nm - b_nm
    low_m, high_m = _interval(bootstrap.means(values_nm))
    found = {}
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
            found[name] = estimate
    return found


def _estimate(values: Array, low: float, high: float) -> Estimate:
    if not len(values):
        return _NOTHING
    std = float(values.std())
    return Estimate(
        float(values.mean()), low, high, 1.96 * std / len(values) ** 0.5, len(values), std
    )


def _of_harmonic(sides: Sequence[Array], bootstrap: Bootstrap) -> Estimate:
    """Of one side's parts, or of the first minus the second."""
    if (
        len(sides) == 2
    ):  # a difference of two harmonic means needs the same records in all their parts
        whole = ~np.isnan(np.concatenate(sides, axis=1)).any(1)
        sides = [side[whole] for side in sides]
    count = int((~np.isnan(sides[0])).sum(0).min())
    if not count:
        return _NOTHING
    means = [float(_harmonic(np.nanmean(side, axis=0)[None])[0]) for side in sides]
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
    """[r] of [r, parts]; NaN where a part is."""
    with np.errstate(divide="ignore"):
        return np.asarray(means_rp.shape[1] / (1 / means_rp).sum(1))


def _interval(draws_rl: Array) -> tuple[Array, Array]:
    """95 %, of the draws that have a value."""
    out = np.full((2, draws_rl.shape[1]), np.nan)
    there = ~np.isnan(draws_rl).all(0)
    if there.any():
        out[:, there] = np.nanpercentile(draws_rl[:, there], (2.5, 97.5), axis=0)
    return out[0], out[1]


_NOTHING = Estimate(float("nan"), float("nan"), float("nan"), None, 0, None)

# -- as published ----------------------------------------------------------------------------------

PUBLISHED = {
    "rewrite_success": "ES",
    "rewrite_diff": "EM",
    "paraphrase_success": "PS",
    "paraphrase_diff": "PM",
    "neighborhood_success": "NS",
    "neighborhood_diff": "NM",
    "rewrite_acc": "EA",
    "paraphrase_acc": "PA",
    "neighborhood_acc": "NA",
    "ngram_entropy": "GE",
    "reference_score": "RS",
    "essence_score": "essence-published",
}


def published_summary(
    before: Sequence[Row], after: Sequence[Row], which: Literal["rome", "memit"] = "rome"
) -> dict[str, Any]:
    """A run of CounterFact as the released summaries of ROME and MEMIT hold it.

    Args:
        before, after: rows of the same records, of the unedited model and of the edited ones;
            `seconds` in those after.
    Returns:
        name -> [mean, population standard deviation] times 100 in two decimals, essence and time
        unscaled and unrounded; the scores, which have no deviation, with None.
    """
    out: dict[str, Any] = {"time": _published([row.get("seconds") for row in after])}
    for prefix, rows in (("pre", before), ("post", after)):
        for key, name in PUBLISHED.items():
            if which == "rome" and key.endswith("_acc"):
                continue
            scale = None if key == "essence_score" else 100
            if found := _published([row.get(name) for row in rows], scale):
                out[f"{prefix}_{key}"] = found
    for prefix, rows in (("pre", before), ("post", after)):
        columns = [
            [value for row in rows if (value := row.get(part)) is not None]
            for part in ("ES", "PS", "NS")
        ]
        if all(columns):
            out[f"{prefix}_score"] = [
                round(100 * harmonic([float(np.mean(each)) for each in columns]), 2),
                None,
            ]
    return out | {"num_cases": len(after)}


def _published(values: Sequence[float | None], scale: int | None = None) -> list[float] | None:
    there = np.array([value for value in values if value is not None])
    if not len(there):
        return None
    found = [float(there.mean()), float(there.std())]
    return found if scale is None else [float(np.around(each * scale, 2)) for each in found]
