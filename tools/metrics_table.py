"""The table of docs/how-to-read-the-numbers.md, made from engram.benchmark.metrics.table. Run it
after changing a metric:

python tools/metrics_table.py
"""

from __future__ import annotations

import re

from engram.benchmark.data.records import FORMS
from engram.benchmark.metrics.table import METRICS, Metric
from page_tables import DOCS, markdown, put

PAGE = DOCS / "how-to-read-the-numbers.md"
COLUMNS = ("Number", "What it is", "Better", "Unit", "Benchmarks", "Source")
ARROWS = {"up": "↑", "down": "↓", "neither": ""}
NAMES = {
    "counterfact": "CounterFact",
    "flat": "flattened",
    "zsre": "zsRE",
    "mquake": "MQuAKE",
    "ripple": "RippleEdits",
}


def row(metric: Metric) -> tuple[str, ...]:
    forms = (
        "all"
        if set(metric.forms) == set(FORMS)
        else ", ".join(NAMES[form] for form in metric.forms)
    )
    source = re.sub(r"(.+), arXiv:([\d.]+)", r"[\1](https://arxiv.org/abs/\2)", metric.source)
    return metric.title, metric.meaning, ARROWS[metric.better], metric.unit, forms, source


def table() -> str:
    """Return the table in markdown, in the order of a report."""
    return markdown(COLUMNS, map(row, METRICS.values()))


if __name__ == "__main__":
    put(PAGE, "tools/metrics_table.py", table())
