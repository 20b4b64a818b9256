"""The table of docs/how-to-read-the-numbers.md, made from engram.evaluate.metrics.table. Run it after changing a metric:

python tools/metrics_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from engram.evaluate.data.records import FORMS
from engram.evaluate.metrics.table import METRICS, Metric

PAGE = Path(__file__).parents[1] / "docs/how-to-read-the-numbers.md"
BEGIN, END = "<!-- made by tools/metrics_table.py -->", "<!-- end -->"
COLUMNS = ("Number", "What it is", "Better", "Unit", "Benchmarks", "Source")
ARROWS = {"up": "↑", "down": "↓", "neither": ""}
NAMES = {"counterfact": "CounterFact", "flat": "flattened", "zsre": "zsRE", "mquake": "MQuAKE", "ripple": "RippleEdits"}


def row(metric: Metric) -> tuple[str, ...]:
    forms = "all" if set(metric.forms) == set(FORMS) else ", ".join(NAMES[form] for form in metric.forms)
    source = re.sub(r"(.+), arXiv:([\d.]+)", r"[\1](https://arxiv.org/abs/\2)", metric.source)
    return metric.title, metric.meaning, ARROWS[metric.better], metric.unit, forms, source


def table() -> str:
    """The table in markdown, in the order of a report."""
    rows = [row(metric) for metric in METRICS.values()]
    return "\n".join("| " + " | ".join(each) + " |" for each in (COLUMNS, ["---"] * len(COLUMNS), *rows))


def main() -> None:
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
