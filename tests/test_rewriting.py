"""`rewrite` and `rewrite_each` call a method by its name, with numbers in place of "auto"."""

from __future__ import annotations

from dataclasses import replace

import pytest

import engram
from engram import Fact, pocket, rewriting
from engram.editors.closed_form.mass import memit
from engram.editors.closed_form.rome import rome
from engram.editors.methods import METHODS
from engram.errors import FactError, SettingError
from engram.evaluate.answers import begins, says_objects
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
    [("rome", "layer", 1, 2), ("memit", "layers", 1, [2]), ("emmet", "layers", 1, [2])],
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
def test_a_method_by_itself_takes_numbers(function, name):
    with pytest.raises(SettingError, match=f"{name}='auto': expected a (whole number|list)"):
        function(tiny_lm(), FACTS, **{name: "auto"}, **SMALL)


# -- what the model says already -------------------------------------------------------------------

here = pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
LOUVRE = Fact("Louvre", "The {} is located in the city of", "Paris")


@pytest.fixture(scope="module")
def knowing():
    return engram.load("pocket")


@here
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["Paris", " Paris"])
def test_what_the_model_says_already_is_not_rewritten(knowing, method, target):
    with pytest.raises(
        FactError,
        match=r"^there is nothing to rewrite: the model says ' Paris' already after "
        "'The Louvre is located in the city of'; give another target$",
    ):
        engram.rewrite(knowing, replace(LOUVRE, target=target), method)


@here
def test_facts_of_a_list_that_the_model_says_already_are_named(knowing):
    rome = replace(LOUVRE, target="Rome")
    eiffel = Fact("Eiffel Tower", LOUVRE.prompt, "Paris")
    with pytest.raises(
        FactError,
        match=r"for 2 of 3 facts: the model says ' Paris' already after 'The Louvre is located in "
        r"the city of' \(facts\[1\]\), ' Paris' already after 'The Eiffel Tower is located in the "
        r"city of' \(facts\[2\]\); leave them out",
    ):
        engram.rewrite(knowing, [rome, LOUVRE, eiffel], "memit")
    with pytest.raises(FactError, match=r"\(facts\[4\]\) and 3 more; leave"):
        engram.rewrite(knowing, [LOUVRE] * 8, "memit")


@here
def test_what_is_said_already_is_measured_with_earlier_edits_in_force(knowing):
    rome = engram.rewrite(knowing, replace(LOUVRE, target="Rome"), "ft")
    back = engram.rewrite(knowing, LOUVRE, "ft", past=[rome])
    assert back.facts == (LOUVRE,), "with the edit in force the model says Rome"
    with pytest.raises(FactError, match="says ' Rome' already"):
        engram.rewrite(knowing, replace(LOUVRE, target="Rome"), "ft", past=[rome])


@here
def test_benchmarks_edit_what_the_model_says_already(knowing):
    (edit,) = rewrite_each(knowing, [[LOUVRE]], "ft")
    assert edit.facts == (LOUVRE,)


def test_an_object_is_said_where_greedy_decoding_writes_it_as_a_word():
    lm = tiny_lm()
    says, expected = [], []
    for prompt in TEXT.splitlines() + TEXT.split():
        answer = lm.next_tokens(prompt, 1)[0][0]
        if not answer.strip():
            continue
        text = lm.generate(prompt, 2).removeprefix(prompt)
        says += says_objects(lm, [(prompt, answer)])
        tokens = lm.token_strings(lm.cloze(prompt, answer).answer)
        expected.append(tokens == [answer] and begins(text, (answer,)))
    assert says == expected and says
    assert says_objects(lm, []) == []
