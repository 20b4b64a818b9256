"""Keep the tables of finished runs in docs/data/runs, and make docs/results.md of them.

    python tools/results_page.py NAME RUN.sqlite [RUN.sqlite ...]    keep these runs as NAME.json
    python tools/results_page.py                                     make the page of what is kept

What is kept are the numbers of the table and how they came about, not the runs themselves, which
hold every answer.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engram import Run
from engram.benchmark import report
from engram.benchmark.metrics.summary import Estimate
from page_tables import DOCS, put

KEPT, PAGE = DOCS / "data/runs", DOCS / "results.md"
MADE_BY = "tools/results_page.py: {}"


def keep(name: str, paths: list[str]) -> None:
    """Return the table of these runs, and their cards, as JSON."""
    runs = [Run.open(path) for path in paths]
    made = report.table(runs, all_metrics=True)
    told = {
        "table": json.loads(report.as_json(made)),
        "best": made.best,
        "cards": [run.card() for run in runs],
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(
        json.dumps(_rounded(told), indent=1, ensure_ascii=False) + "\n", encoding="utf8"
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def shown(name: str) -> str:
    """Return the kept table in markdown, headline columns."""
    told = json.loads((KEPT / f"{name}.json").read_text(encoding="utf8"))
    rows = {
        row: (
            numbers["records"],
            {
                metric: Estimate(**each)
                for metric, each in numbers.items()
                if metric in report.METRICS
            },
        )
        for row, numbers in told["table"].items()
    }
    there = {metric for _, summary in rows.values() for metric in summary}
    extra = ("NG+", "NS+", "NKL", "seconds")
    columns = tuple(
        n for n, m in report.METRICS.items() if n in there and (m.headline or n in extra)
    )
    form = told["cards"][0]["form"]
    return report.markdown_table(report.ScoreTable(form, columns, rows, told["best"]))


def main() -> None:
    if len(sys.argv) > 2:
        keep(sys.argv[1], sys.argv[2:])
    for path in sorted(KEPT.glob("*.json")):
        put(PAGE, MADE_BY.format(path.stem), shown(path.stem))


if __name__ == "__main__":
    main()
