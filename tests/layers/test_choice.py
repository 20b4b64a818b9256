"""Layers are chosen by edits of facts at each of them; what was measured is kept by what it depends
on, and gone on with.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import wraps

import pytest
import torch

import engram
from engram import Fact, LayerCard, pocket, rewriting
from engram.cli import show
from engram.editors.closed_form.rome import rome
from engram.editors.methods import METHODS, Method, method_named
from engram.errors import (
    EngramError,
    FactError,
    NonFiniteError,
    SettingError,
    UnsupportedModelError,
)
from engram.files.cache_folder import cache_folder
from engram.layers import choice as layer_choice
from engram.layers import evidence as layer_evidence
from engram.layers.candidates import as_edits, bundled_edits, known
from engram.layers.choice import SHIPPED, choose_layers, find_card, layer_card
from engram.layers.evidence import Budget, receipt_score
from engram.runs.identity import identity
from tests.helpers.layer_samples import EDITS, card
from tests.helpers.paths import ROOT
from tests.helpers.receipt_samples import GOOD, made
from tests.helpers.tiny import TEXT, tiny_lm

ROME = {"contexts": ("{}",), "corpus": TEXT.splitlines() * 3, "tokens": 200, "steps": 2}
QUICK = {**ROME, "keep": "all", "edits": 2, "traces": 2, "estimates": 1}


@pytest.fixture
def lm():
    return tiny_lm("gpt2", torch.float64)


@pytest.fixture
def measured(monkeypatch):
    """Count the edits that are made."""
    made = []

    def counted(method):
        function = method_named(method)

        @wraps(function)
        def edit(lm, facts, **settings):
            made.append((facts[0].subject, settings.get("layer")))
            return function(lm, facts, **settings)

        return edit

    monkeypatch.setattr(layer_evidence, "method_named", counted)
    return made


# --- what is measured -----------------------------------------------------------------------------


def test_the_numbers_are_those_of_traces_and_receipts_one_by_one(lm, tmp_path):
    found = layer_card(lm, EDITS, cache_dir=tmp_path, **QUICK)
    assert found.layers_tested == [0, 1, 2, 3] and [
        each.fact.target for each in found.evidence
    ] == ["Paris", "Rome"]
    for fact, evidence in zip(EDITS, found.evidence, strict=True):
        asked = {
            "subject": fact.subject,
            "target": fact.target_true,
            "sites": ["mlp"],
            "positions": "subject_last",
        }
        trace = engram.trace(lm, fact.prompt_text, window=1, **asked)
        assert evidence.trace == pytest.approx(trace.effects("mlp")[0].tolist(), abs=1e-5)
        for layer, outcome in evidence.edits.items():
            receipt = engram.verify(lm, engram.rewrite(lm, fact, layer=layer, **ROME))
            assert outcome.score == pytest.approx(receipt_score(receipt), abs=1e-5)
            shares = (receipt.share(kind) for kind in ("rewrite", "paraphrase", "neighbourhood"))
            assert (outcome.efficacy, outcome.paraphrase, outcome.neighbourhood) == tuple(shares)
    estimate = engram.trace(
        lm,
        EDITS[0].prompt_text,
        window=1,
        method="attribution",
        **{**asked, "subject": "tower of Rome"},
    )
    assert found.evidence[0].attribution == pytest.approx(
        estimate.effects("mlp")[0].tolist(), abs=1e-5
    )
    assert found.evidence[1].attribution is None


def test_second_moments_of_all_layers_come_from_one_pass(lm, tmp_path, monkeypatch):
    passes = []
    measure = layer_evidence.second_moments
    monkeypatch.setattr(
        layer_evidence,
        "second_moments",
        lambda lm, layers, *a, **k: passes.append(layers) or measure(lm, layers, *a, **k),
    )
    layer_card(lm, EDITS, cache_dir=tmp_path, **QUICK)
    assert passes == [[0, 1, 2, 3]]


def test_a_deep_model_is_tried_here_and_there_and_then_around_the_best():
    assert Budget().coarse(12) == list(range(12)) and Budget().coarse(48) == list(range(0, 48, 4))
    assert Budget().between([0, 4, 8], 4, 10) == [1, 2, 3, 5, 6, 7]
    assert Budget().between([0, 4, 8], 0, 10) == [1, 2, 3] and Budget().between(
        [0, 4, 8], 8, 10
    ) == [5, 6, 7, 9]
    assert Budget(refine=False).between([0, 4, 8], 4, 10) == []


def test_coarse_layers_come_first_and_those_next_to_the_best_follow(lm, tmp_path, measured):
    found = layer_card(lm, EDITS, layer_step=3, cache_dir=tmp_path, **QUICK)
    tried = [layer for _, layer in measured]
    assert (
        tried[:4] == [0, 3, 0, 3]
        and set(tried[4:]) == {1, 2}
        and found.layers_tested == [0, 1, 2, 3]
    )
    assert layer_card(
        lm, EDITS, layer_step=3, refine=False, cache_dir=tmp_path, **QUICK
    ).layers_tested == [0, 3]


def test_a_method_that_takes_a_list_of_layers_is_asked_one_by_one(lm, tmp_path, monkeypatch):
    def many(lm, facts, *, layers, seed=0, progress=None, **settings):
        (layer,) = layers
        return rome(lm, facts, layer=layer, seed=seed, **ROME)

    monkeypatch.setitem(METHODS, "many", Method(many, "several layers", "here"))
    asked = {name: value for name, value in QUICK.items() if name not in ROME}
    found = layer_card(lm, EDITS, method="many", cache_dir=tmp_path, **asked)
    assert found.method == "many"
    assert found.evidence == layer_card(lm, EDITS, cache_dir=tmp_path, **QUICK).evidence


def test_an_edit_that_cannot_be_computed_is_the_worst_and_stops_nothing(
    lm, tmp_path, monkeypatch, caplog
):
    def breaks(lm, facts, *, layer, seed=0, progress=None, **settings):
        if layer == 2:
            raise NonFiniteError("the update is not finite")
        return rome(lm, facts, layer=layer, seed=seed, **ROME)

    monkeypatch.setitem(METHODS, "breaks", Method(breaks, "breaks at layer 2", "here"))
    asked = {name: value for name, value in QUICK.items() if name not in ROME}
    found = layer_card(lm, EDITS, method="breaks", cache_dir=tmp_path, **asked)
    assert (
        found.rows[2].score.mean == 0
        and found.best != 2
        and "the update is not finite" in caplog.text
    )


def test_receipts_are_compared_by_margins():
    better, worse = made(GOOD), made({**GOOD, "rewrite": [(False, True)] * 2 + [(True, False)]})
    assert 0 < receipt_score(worse) <= receipt_score(better) < 1
    with pytest.raises(EngramError, match="measured nothing"):
        receipt_score(made({}))


# --- on which facts -------------------------------------------------------------------------------


def test_what_is_true_becomes_an_edit_to_another_object_of_the_relation():
    facts = [
        Fact("Lofvre", "The {} is in", "Paris", relation="city"),
        Fact("Sorbanne", "The {} is in", "Paris", relation="city"),
        Fact("Calosseum", "The {} is in", "Rome", relation="city"),
        Fact("Hanns", "The mother tongue of {} is", "German", relation="tongue"),
        Fact("Big Ben", "The {} is in", "Paris", "London"),
    ]
    lofvre, _, calosseum, given = as_edits(facts)
    assert (lofvre.target, lofvre.target_true) == ("Rome", "Paris")
    assert lofvre.neighbours == (("The Sorbanne is in", "Paris"),) and calosseum.neighbours == ()
    assert given.target == "Paris", (
        "an edit stays what it is; a fact without another object is left out"
    )


@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_edits_of_the_bundled_table_are_of_facts_that_the_model_knows(pocket_lm):
    lm = pocket_lm
    found = bundled_edits(lm, 5)
    assert len(found) == 5 and found == known(lm, found) and found == bundled_edits(lm, 7)[:5]
    assert all(each.target_true and each.paraphrases and each.neighbours for each in found)
    asked = [replace(each, target=each.target_true, target_true=None) for each in found]
    assert len(engram.knows(lm, asked, paraphrases=False).known()) == 5


def test_a_model_that_knows_nothing_of_the_table_is_not_asked_all_of_it(lm, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "engram.layers.candidates.known", lambda lm, edits: asked.append(len(edits)) or []
    )
    assert bundled_edits(lm, 5) == [] and asked == [100]


def test_facts_without_which_there_is_no_choice(lm, tmp_path):
    with pytest.raises(
        FactError,
        match=r"tiny-gpt2 knows none of the bundled facts.*engram layers MODEL --facts FILE",
    ):
        layer_card(lm, cache_dir=tmp_path)
    with pytest.raises(FactError, match=r"none of the 2 facts can be used.*keep='all'"):
        layer_card(lm, EDITS, cache_dir=tmp_path)
    with pytest.raises(FactError, match="none of the 0 facts"):
        layer_card(lm, [], cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"edits": 0}, "edits=0: expected at least 1"),
        ({"layer_step": 0}, "layer_step=0"),
        ({"keep": "some"}, "keep='some': expected 'known' or 'all'"),
        ({"layer": 1}, "layer is what a layer card is to find"),
        ({"method": "none"}, "method='none' has no setting layer or layers"),
        ({"method": "rmoe"}, "did you mean 'rome'"),
        ({"stps": 3}, "did you mean 'steps'"),
    ],
)
def test_settings_that_make_no_sense(settings, told, lm, tmp_path, monkeypatch):
    monkeypatch.setitem(
        METHODS, "none", Method(lambda lm, facts, *, seed, progress=None: None, "no layer", "here")
    )
    asked = {**QUICK, **settings}
    with pytest.raises(EngramError, match=told):
        layer_card(lm, EDITS, cache_dir=tmp_path, **asked)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("rome", {"stps": 3}, "rome has no setting 'stps'.*did you mean 'steps'"),
        ("memit", {"stor": False}, "memit has no setting 'stor'.*did you mean 'store'"),
    ],
)
def test_a_misspelt_setting_is_an_error_before_anything_is_measured(
    method, settings, message, lm, tmp_path, monkeypatch
):
    monkeypatch.setattr(layer_choice, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SettingError, match=message):
        layer_card(lm, EDITS, cache_dir=tmp_path, method=method, **{**QUICK, **settings})


@pytest.mark.parametrize("family", ["bert", "mixtral", "mamba"])
def test_a_family_that_cannot_be_edited_is_told_at_once(family, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_choice, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UnsupportedModelError, match="edit"):
        layer_card(tiny_lm(family), EDITS, cache_dir=tmp_path, **QUICK)


# --- what is kept ---------------------------------------------------------------------------------


def test_what_was_measured_is_read(lm, tmp_path, monkeypatch):
    first = layer_card(lm, EDITS, cache_dir=tmp_path, **QUICK)
    monkeypatch.setattr(layer_choice, "measure", lambda *_: pytest.fail("measured again"))
    assert layer_card(tiny_lm("gpt2", torch.float64), EDITS, cache_dir=tmp_path, **QUICK) == first
    assert not list(tmp_path.rglob("*.new-*"))


@pytest.mark.parametrize(
    "change",
    [
        "weights",
        "dtype",
        "tokenizer",
        "facts",
        "edits",
        "layer_step",
        "seed",
        "corpus",
        "tokens",
        "steps",
        "method",
    ],
)
def test_everything_that_changes_a_card_changes_its_name(change, lm, tmp_path, monkeypatch):
    measured = []

    def instead(lm, facts, plan, edits, notes, report):
        measured.append(edits)
        return card([[0.5, 0.6]]).evidence

    monkeypatch.setattr(layer_choice, "measure", instead)
    layer_card(lm, EDITS, cache_dir=tmp_path, **QUICK)
    facts, asked = EDITS, dict(QUICK)
    if change == "weights":
        lm.parts.mlp_out(3).weight.data[0, 0] += 1
    elif change == "dtype":
        lm = tiny_lm("gpt2")
    elif change == "tokenizer":
        lm = tiny_lm("gpt2", torch.float64, tokenizer="metaspace with BOS")
    elif change == "facts":
        facts = [EDITS[0], replace(EDITS[1], neighbours=())]
    elif change == "method":
        monkeypatch.setitem(METHODS, "other", Method(rome, "the same by another name", "here"))
        asked["method"] = "other"
    else:
        asked |= {
            "edits": {"edits": 1},
            "layer_step": {"layer_step": 2},
            "seed": {"seed": 1},
            "corpus": {"corpus": ["Rome is in"]},
            "tokens": {"tokens": 201},
            "steps": {"steps": 3},
        }[change]
    layer_card(lm, facts, cache_dir=tmp_path, **asked)
    assert len(measured) == 2 and len(list(tmp_path.rglob("*.json"))) == 2


def test_a_damaged_card_is_told_and_measured_again(lm, tmp_path, caplog):
    first = layer_card(lm, EDITS, cache_dir=tmp_path, **QUICK)
    (path,) = tmp_path.rglob("*.json")
    path.write_text(path.read_text()[:-100])
    again = layer_card(lm, EDITS, cache_dir=tmp_path, **QUICK)
    assert again.evidence == first.evidence and "is damaged" in caplog.text


@pytest.mark.slow
def test_a_killed_run_goes_on_after_its_last_edit(lm, tmp_path, measured):
    straight = layer_card(lm, EDITS, cache_dir=tmp_path / "straight", **QUICK)
    measured.clear()

    def stop(what, done, total):
        if (what, done) == ("editing", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer_card(lm, EDITS, cache_dir=tmp_path, progress=stop, **QUICK)
    (partial,) = (tmp_path / "layer_cards").glob("*.partial")
    assert len(measured) == 5
    resumed = layer_card(lm, EDITS, cache_dir=tmp_path, **QUICK)
    assert measured[5:] == [("river", 1), ("river", 2), ("river", 3)]
    assert resumed.evidence == straight.evidence and not partial.exists()


# --- who goes by it -------------------------------------------------------------------------------


def keep(lm, tmp_path, scores, name="card", **about):
    """Return a card of this model as if it had been measured."""
    who = identity(lm)
    card(scores, identity=who, **about).save(
        cache_folder("layer_cards", tmp_path) / f"{who[:16]}-{name}.json"
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    return tmp_path


def test_auto_goes_by_the_card_that_is_there(lm, cache, measured):
    keep(lm, cache, [[0.1, 0.2, 0.9, 0.3]])
    assert engram.rewrite(lm, EDITS[0], layer="auto", **ROME).settings["layer"] == 2
    assert choose_layers(lm) == [2] and choose_layers(lm, 3) == [1, 2, 3] and not measured


def test_the_card_of_most_facts_for_this_method_counts(lm, cache):
    keep(lm, cache, [[0.1, 0.9, 0.1, 0.1]], "a")
    keep(lm, cache, [[0.9, 0.1, 0.1, 0.1]] * 2, "b")
    keep(lm, cache, [[0.1, 0.1, 0.1, 0.9]] * 3, "c", method="other")
    assert (
        find_card(lm).best == 0
        and find_card(lm, "other").best == 3
        and find_card(lm, "third") is None
    )


def test_a_card_of_other_weights_is_not_gone_by(lm, cache):
    keep(lm, cache, [[0.1, 0.2, 0.9, 0.3]])
    lm.parts.mlp_out(3).weight.data[0, 0] += 1
    assert find_card(lm) is None
    with pytest.raises(FactError, match="knows none of the bundled facts"):
        choose_layers(lm)


def test_without_a_card_auto_makes_a_quick_one_of_the_facts_at_hand(lm, cache, measured):
    fact = replace(EDITS[0], target_true=None)  # what is true so far, the model says
    edit = engram.rewrite(lm, fact, layer="auto", **ROME)
    assert measured == [("tower of Rome", layer) for layer in range(4)]
    quick = find_card(lm)
    assert edit.settings["layer"] == quick.best and quick.settings["steps"] == 2
    engram.rewrite(lm, fact, layer="auto", **ROME)
    assert len(measured) == 4, "the second time it is there"


def test_a_quick_card_is_no_more_than_four_facts_at_eight_layers(cache, monkeypatch):
    asked = {}
    monkeypatch.setattr(layer_choice, "bundled_edits", lambda lm, count, seed: EDITS * 2)
    monkeypatch.setattr(
        layer_choice,
        "layer_card",
        lambda lm, facts, **given: asked.update(given, facts=facts) or card([[0.5] * 4]),
    )
    lm = tiny_lm("gpt2")
    monkeypatch.setattr(type(lm), "n_layers", 48)
    assert len(choose_layers(lm, 4, seed=3)) == 4
    plan = Budget(
        asked["edits"], asked["traces"], asked["estimates"], asked["layer_step"], asked["refine"]
    )
    assert (
        plan.edits == 4 and len(plan.coarse(48)) == 8 and plan.between(plan.coarse(48), 0, 48) == []
    )
    assert asked["seed"] == 3


def test_a_model_is_recognised_by_what_it_computes(lm):
    who = identity(lm)
    again = tiny_lm("gpt2", torch.float64)
    again.name = "another name"
    again.tokenizer(
        "The tower is in Rome", truncation=True, max_length=2
    )  # which the tokenizer remembers
    assert identity(again) == who
    again.model.config.layer_norm_epsilon = 1e-3
    assert identity(again) != who


def test_choosing_takes_what_a_card_takes():
    ours = set(inspect.signature(layer_card).parameters)
    assert {"corpus", "tokens", "seed", "progress"} <= ours, "what methods hand on to choose_layers"
    assert LayerCard is engram.LayerCard and engram.layer_card is layer_card
    with pytest.raises(SettingError, match="expected 1 to 2"):
        card([[0.1, 0.2]]).layers(3)


def test_a_quick_card_edits_by_the_caller_s_method_contexts_and_settings(lm, cache, monkeypatch):
    calls = []

    def other(lm, facts, *, layers, contexts=None, slack=0.0, seed=0, progress=None):
        calls.append({"layers": layers, "contexts": contexts, "slack": slack, "seed": seed})
        return rome(lm, facts, layer=layers[0], seed=seed, **ROME)

    monkeypatch.setitem(METHODS, "other", Method(other, "another method", "here"))
    contexts = ("Now: {}",)
    settings = {"layers": "auto", "contexts": contexts, "slack": 0.5, "seed": 3}
    monkeypatch.setattr(rewriting, "preset", lambda *_: {"layers": [0, 1]})
    engram.rewrite(lm, replace(EDITS[0], target_true=None), "other", **settings)
    *measured, last = calls
    expected = {"contexts": contexts, "slack": 0.5, "seed": 3}
    assert measured == [{"layers": [layer], **expected} for layer in range(4)]
    card = find_card(lm, "other")
    assert last == {"layers": card.layers(2), **expected} and find_card(lm) is None
    assert card.settings["contexts"] == list(contexts) and card.settings["slack"] == 0.5


# --- the bundled model ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_a_card_of_the_bundled_model_is_measured_on_facts_it_knows(tmp_path, pocket_lm):
    lm = pocket_lm
    found = layer_card(
        lm,
        edits=1,
        traces=1,
        estimates=2,
        layer_step=7,
        refine=False,
        cache_dir=tmp_path,
        contexts=("{}",),
        tokens=1000,
        steps=20,
    )
    assert found.layers_tested == [0, 7] and found.best == 0, (
        "the last layer's change at the subject reaches no answer"
    )
    assert found.rows[0].trace.mean > found.rows[7].trace.mean
    assert found.settings["variant"] == "two-key" and found.settings["corpus"].startswith("bundled")


@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_auto_on_the_bundled_model_goes_by_the_bundled_card(cache, monkeypatch, caplog):
    monkeypatch.setattr(layer_choice, "layer_card", lambda *_, **__: pytest.fail("measured"))
    caplog.clear()
    bundled = LayerCard.load(SHIPPED / "pocket.json")
    assert not caplog.text, "it has a checksum"
    lm = engram.load(str(pocket.PATH), dtype=torch.float32)  # under another name
    assert bundled.identity == identity(lm), "measure it again: see docs/layers.md for the command"
    assert find_card(lm) == bundled and len(bundled.edited) == 30
    assert choose_layers(lm) == [bundled.best] and bundled.best in choose_layers(lm, 3)


def test_the_page_shows_the_bundled_card(capsys):
    show.show_layer_card(LayerCard.load(SHIPPED / "pocket.json"))
    page = (ROOT / "docs" / "layers.md").read_text(encoding="utf8")
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert all(f"    {line}" in page.splitlines() for line in shown), "\n".join(shown)
