"""The page about numbers lists every metric as the table of metrics has it."""

from __future__ import annotations

from tools.metrics_table import PAGE, row, table

from engram.benchmark.metrics.table import METRICS


def test_the_page_holds_the_table_of_today():
    assert table() in PAGE.read_text("utf-8"), "run: python tools/metrics_table.py"


def test_no_two_numbers_have_one_title():
    titles = [row(metric)[0] for metric in METRICS.values()]
    assert len(set(titles)) == len(titles)
