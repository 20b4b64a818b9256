"""The page about receipts lists every word as the library explains it."""

from __future__ import annotations

import pytest
from tools.words_table import MADE_BY, PAGE, TABLES, table

from engram.evaluate import words
from page_tables import current_table


@pytest.mark.parametrize("name", TABLES)
def test_the_page_holds_the_words_of_today(name):
    now = current_table(PAGE, MADE_BY.format(name))
    assert now == table(TABLES[name]), "run: python tools/words_table.py"


def test_the_page_is_the_one_that_a_receipt_names():
    assert PAGE.as_posix().endswith(words.PAGE)
