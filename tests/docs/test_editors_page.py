"""The page about editors says of each method what an edit by it shows, and holds the tables that
were measured.
"""

from __future__ import annotations

from inspect import signature

import pytest

import engram
import methods_table
from engram import PromptEdit
from engram.editors.closed_form.mass_settings import KEEPS_PAST_KEYS, MASS_METHODS
from engram.editors.methods import METHODS, method_named
from engram.errors import EngramError
from page_tables import current_table
from tests.helpers.tiny import TEXT, tiny_lm
from tests.helpers.training import FACTS

DATA, FILE, MADE_BY = methods_table.place("pocket")
PAGE = FILE.read_text(encoding="utf8")
COLUMNS = ("method", "summary", "changes", "moment", "earlier", "taken_out", "form", "source")
SOLVED = ("method", "lambda", "rho", "earlier", "projector", "layers", "share")


def lines_of(columns):
    """Return the page's table of N columns that has a method in each line: method -> its
    cells by column.
    """
    rows = [
        [cell.strip() for cell in line[1:-1].split("|")]
        for line in PAGE.splitlines()
        if line.startswith("| `")
    ]
    return {
        row[0].strip("`"): dict(zip(columns, row, strict=True))
        for row in rows
        if len(row) == len(columns)
    }


LINES = lines_of(COLUMNS)

CLOSED = {
    "contexts": ["{}", "He sings. {}"],
    "corpus": TEXT.splitlines() * 4,
    "tokens": 200,
    "steps": 2,
}
QUICK = {  # settings that make an edit of a tiny model in no time
    "rome": CLOSED,
    **{name: CLOSED | {"store": False} for name in MASS_METHODS},
    **{name: {"epochs": 2} for name in ("ft", "ft-l", "ft-w", "locft-bf")},
    "lora": {"epochs": 2, "layers": [1, 2], "rank": 4},
    "ultraedit": {"layers": [1, 2]},
    "ike": {"k": 0},
}
SEVERAL = {
    name: {"layers": [1, 2]} for name in ("memit", "memit-seq", "alphaedit", "pmet")
}  # of more than four blocks, the default


def test_every_method_has_its_line():
    assert list(LINES) == list(METHODS), "run: python tools/editors_table.py"


@pytest.mark.parametrize("name", METHODS)
def test_a_line_is_true_of_an_edit(name):
    line, takes = LINES[name], signature(method_named(name)).parameters
    edit = engram.rewrite(
        tiny_lm("gpt2"), FACTS, name, **QUICK.get(name, {}), **SEVERAL.get(name, {})
    )
    assert (line["summary"], line["source"]) == (METHODS[name].summary, METHODS[name].source)
    assert line["moment"] == ("yes" if "second_moments" in takes else "no")
    assert ("keys preserved" in line["earlier"]) == (name in KEEPS_PAST_KEYS)
    assert ("statistics=" in line["earlier"]) == ("statistics" in takes)
    assert (
        (line["earlier"] == "nested")
        == (line["changes"] == "nothing")
        == isinstance(edit, PromptEdit)
    )
    assert line["taken_out"] == ("yes" if can_lose_one(edit) else "no")
    assert line["form"].startswith(form(edit)), form(edit)
    if edit.deltas:
        assert line["changes"].startswith("one " if len(edit.deltas) == 1 else "several ")
        assert ("MLP output" in line["changes"]) == ("targets" not in edit.settings)


def can_lose_one(edit):
    try:
        return len(edit.without(0).facts) == len(edit.facts) - 1
    except EngramError:
        return False


def form(edit):
    """As the table words it."""
    if isinstance(edit, PromptEdit):
        return "a text"
    if any(delta.is_dense for delta in edit.deltas.values()):
        return "dense"
    if edit.rank == edit.settings.get("rank"):
        return "rank `rank`"
    lm = tiny_lm("gpt2")
    tokens = sum(len(lm.target_ids(fact.prompt_text, fact.target)) for fact in FACTS)
    return {len(FACTS): "rank 1 a fact", tokens: "rank 1 a token"}[edit.rank]


def test_the_solvers_table_has_a_row_for_each_method_of_the_solver():
    rows = lines_of(SOLVED)
    assert list(rows) == ["rome", *MASS_METHODS]
    for name, row in rows.items():
        assert bool(row["earlier"]) == (name in KEEPS_PAST_KEYS)
        assert ("several" in row["layers"]) == ("several" in LINES[name]["changes"])
        share = MASS_METHODS.get(name, {}).get("share", "all" if name == "rome" else "even")
        assert (
            row["share"]
            == {"all": "all", "even": "1 / those left", "root": "1 / √those left"}[share]
        )


def test_the_page_holds_the_tables_of_the_rows_that_were_measured():
    assert current_table(FILE, MADE_BY) == methods_table.tables(methods_table.rows(DATA)), (
        "run: python tools/methods_table.py --table"
    )


def test_the_rows_were_measured_with_the_presets_of_today():
    stale = [
        f"{row.method} {row.setting}"
        for row in methods_table.rows(DATA).values()
        if row.of != methods_table.digest(row.method, row.setting, 0)
    ]
    assert not stale, f"run: python tools/methods_table.py (it measures {', '.join(stale)} again)"
