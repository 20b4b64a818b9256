"""Summaries of a run in the form of the released code, to compare with recorded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from engram.benchmark.metrics.summary import harmonic

Row = Mapping[str, float | None]

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
    """Return a run of CounterFact as the released summaries of ROME and MEMIT hold it.

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
    numbers = np.array([value for value in values if value is not None])
    if not len(numbers):
        return None
    found = [float(numbers.mean()), float(numbers.std())]
    return found if scale is None else [float(np.around(each * scale, 2)) for each in found]
