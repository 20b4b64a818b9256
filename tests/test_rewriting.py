"""`rewrite` and `rewrite_each` call a method by its name, with numbers in place of "auto"."""

from __future__ import annotations

import pytest

import engram
from engram import Fact, rewriting
from engram.editors.closed_form.mass import memit
from engram.editors.closed_form.rome import rome
from engram.editors.methods import METHODS
from engram.errors import SettingError
from engram.rewriting import rewrite_each
from tests.helpers.tiny import TEXT, tiny_lm

FACTS = [
    Fact("tower of Rome", "The {} is in the city of", "Paris"),
    Fact("river", "The {} runs through", "Rome"),
]
SMALL = {"contexts": ("{}",), "corpus": TEXT.splitlines() * 3, "tokens": 200, "steps": 2}


@pytest.mark.parametrize("name", METHODS)
def test_every_function_of_the_table_is_an_editor(name):
    """Names in the table count as imports: a method may not lie above the editors."""
    method = METHODS[name]
    for function, load in (
        (method.function, method.load),
        (method.batch_function, method.load_batch),
    ):
        if function is None:
            assert load() is None
        else:
            assert str(function).startswith("engram.editors.") and callable(load())


@pytest.fixture
def chosen(monkeypatch):
    """Collect what is asked of the layer cards, which all say layers 2 and 3."""
    asked = []

    def choose(lm, count=1, **about):
        asked.append({"count": count, **about})
        return [2, 3][:count]

    monkeypatch.setattr(rewriting, "choose_layers", choose)
    return asked


@pytest.mark.parametrize(
    ("method", "name", "count", "layers"),
    [("rome", "layer", 1, 2), ("memit", "layers", 2, [2, 3]), ("emmet", "layers", 1, [2])],
)
def test_auto_asks_for_a_card_of_this_method_with_these_settings(
    method, name, count, layers, chosen
):
    edit = (
        engram.rewrite(
            tiny_lm(), FACTS, method, **{name: "auto"}, **SMALL, seed=3, facts_per_batch=2
        )
        if method != "rome"
        else engram.rewrite(tiny_lm(), FACTS, layer="auto", **SMALL, seed=3)
    )
    assert edit.settings[name] == layers
    assert chosen == [{"count": count, "facts": FACTS, "method": method, "seed": 3, **SMALL}]


def test_as_many_layers_are_chosen_as_the_caller_s_depth_has(chosen):
    edit = engram.rewrite(tiny_lm(), FACTS, "memit", layers="auto", depth=[0.5, 0.6], **SMALL)
    assert edit.settings["layers"] == [2] and chosen[0]["count"] == 1


def test_groups_of_facts_share_one_choice(chosen):
    edits = rewrite_each(tiny_lm(), [[fact] for fact in FACTS], "rome", layer="auto", **SMALL)
    assert [edit.settings["layer"] for edit in edits] == [2, 2]
    assert len(chosen) == 1 and chosen[0]["facts"] == FACTS


@pytest.mark.parametrize(("function", "name"), [(rome, "layer"), (memit, "layers")])
def test_a_method_by_itself_takes_numbers_and_names_who_takes_auto(function, name):
    with pytest.raises(SettingError, match=f"{name}='auto': .*engram.rewrite.*{name}='auto'"):
        function(tiny_lm(), FACTS, **{name: "auto"}, **SMALL)
