"""The page about families says what the table of layouts says, and what is refused is refused in
the words it quotes.
"""

from __future__ import annotations

import re

import pytest
import torch
from tools.families_table import PAGE, row, table
from transformers import BertConfig, BertLMHeadModel

from engram.engine.replayable import replayable
from engram.errors import UnsupportedModelError
from engram.modules.layouts import LAYOUTS
from engram.modules.resolve import resolve
from tests.helpers.tiny import tiny_lm

TEXT = PAGE.read_text("utf-8")


def test_the_page_holds_the_table_of_today():
    assert table() in TEXT, "run: python tools/families_table.py"


def test_every_family_has_one_line():
    listed = re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE)
    assert sorted(listed) == sorted(LAYOUTS)


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_a_line_is_true_of_a_model(family):
    lm = tiny_lm(family)
    _, kind, engine, sites, heads, neurons, edited, _ = row(family, LAYOUTS[family])
    assert kind.split(",")[0] == lm.kind
    assert tuple(sites.split(", ")) == lm.parts.site_names()
    assert (engine == "replay") == replayable(lm)
    assert (heads == "yes") == can(lm.parts.head_width, 0)
    assert (neurons == "yes") == can(lm.parts.mlp_width, 0)
    assert (edited == "yes") == can(lm.parts.mlp_out_name, 0)
    assert len(lm.log_probs([("The tower is in", "Paris")])[0]) > 0


def can(call, *args) -> bool:
    try:
        call(*args)
    except UnsupportedModelError:
        return False
    return True


REFUSED = [
    *(
        lambda family=family: tiny_lm(family).parts.mlp_out_name(0)
        for family in ("mixtral", "mamba", "bert", "t5")
    ),
    lambda: tiny_lm("bert").generate("The tower is in"),
    *(
        lambda family=family: tiny_lm(family).perplexity("The tower is in")
        for family in ("bert", "t5")
    ),
    lambda: tiny_lm("t5").parts.head(torch.zeros(1, 32)),
    lambda: tiny_lm("mamba").parts.site_module_name("mlp", 0),
    lambda: resolve(
        BertLMHeadModel(BertConfig(num_hidden_layers=1, hidden_size=12, is_decoder=True))
    ),
]


def test_refusals_are_quoted_word_for_word():
    quotes = re.findall(r'\| "(.*)" \|$', TEXT, flags=re.MULTILINE)
    said = set()
    for refused in REFUSED:
        with pytest.raises(UnsupportedModelError) as error:
            refused()
        said |= {
            quote
            for quote in quotes
            if all(part.strip() in str(error.value) for part in quote.split("..."))
        }
    assert said == set(quotes) and len(quotes) > 5
