"""The tool behind the tables of all methods: what it edits, what it counts, and that it goes on
where it was killed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import wraps
from statistics import fmean

import pytest
import torch

import engram
import methods_table
from engram import Fact, pocket
from engram.editors.methods import METHODS
from known_facts import PocketFacts
from measure_model import numbers, scored

needs_pocket = pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")


@pytest.fixture(scope="module")
def lm(pocket_lm):
    return pocket_lm


def row(method="ft", setting="mass:10", **numbers):
    scores = {
        "facts": 10,
        "efficacy": 100.0,
        "paraphrase": 50.0,
        "neighbourhood": 80.0,
        "score": 70.6,
    } | numbers
    costs = (
        {}
        if method == methods_table.UNEDITED
        else dict.fromkeys(("perplexity", "seconds", "cpu_seconds", "mb"), 1.25)
    )
    return methods_table.Row(method, setting, of="digest", **scores, **costs)


@needs_pocket
def test_facts_are_of_different_subjects_and_a_shorter_list_begins_a_longer_one(lm):
    long = methods_table.facts_of(lm, PocketFacts(), 12)
    assert len({fact.subject for fact in long}) == 12
    assert methods_table.facts_of(lm, PocketFacts(), 5) == long[:5]


def test_neighbours_that_the_same_edit_rewrites_are_not_asked():
    facts = [
        Fact(
            "ABBA",
            "{} is from",
            "Japan",
            neighbours=(("Roxette is from", "Sweden"), ("Europe came from", "Sweden")),
        ),
        Fact("Roxette", "{} is from", "Italy", neighbours=(("ABBA is from", "Sweden"),)),
    ]
    first, second = methods_table.without_each_other(facts)
    assert first.neighbours == (("Europe came from", "Sweden"),)
    assert second == replace(facts[1], neighbours=())


@needs_pocket
def test_scores_are_shares_of_prompts_on_which_the_wanted_object_wins(lm):
    fact = methods_table.facts_of(lm, PocketFacts(), 1)[0]
    (found,) = scored(lm, [fact])

    def wins(prompt, better, worse):
        logits_v = lm.model(torch.tensor([lm.encode(prompt).ids])).logits[0, -1]
        first, second = (lm.target_ids(prompt, answer) for answer in (better, worse))
        assert len(first) == len(second) == 1
        return float(logits_v[first[0]] > logits_v[second[0]])

    assert found["ES"] == wins(fact.prompt_text, fact.target, fact.target_true) == 0
    kept = [wins(prompt, answer, fact.target) for prompt, answer in fact.neighbours]
    assert found["NS"] == fmean(kept)
    assert scored(lm, [replace(fact, neighbours=())])[0]["NS"] is None


def test_means_are_over_the_facts_that_have_a_score_and_s_is_harmonic():
    found = numbers([{"ES": 1.0, "PS": 0.5, "NS": 1.0}, {"ES": 1.0, "PS": 0.0}])
    means = {name: mean for name, (mean, _, _) in found.items()}
    assert means == pytest.approx(
        {"ES": 100, "PS": 25, "NS": 100, "S": 3 / (0.01 + 0.04 + 0.01)}, abs=1e-3
    )


@needs_pocket
def test_greedy_answers_are_scored_where_they_are_wanted(lm):
    fact = methods_table.facts_of(lm, PocketFacts(), 1)[0]
    true = replace(fact, target=fact.target_true, target_true=fact.target, neighbours=())
    assert scored(lm, [true], answer_tokens=5)[0]["EG"] == 1  # it is known
    assert scored(lm, [fact], answer_tokens=5)[0]["EG"] == 0
    assert scored(lm, [fact])[0]["EG"] is None


@pytest.mark.slow
@needs_pocket
def test_a_killed_run_goes_on_and_other_settings_are_measured_again(
    lm, tmp_path, monkeypatch, capsys
):
    data = tmp_path / "rows.jsonl"
    asked = [
        "--only",
        "unedited",
        "ultraedit",
        "in-context",
        "--settings",
        "single:2",
        "mass:3",
        "sequential:4",
    ]
    monkeypatch.setattr(methods_table, "BATCH", 2)
    monkeypatch.setattr(engram, "load", lambda *_, **__: lm)

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["methods_table.py", "--data", str(data), *asked, *more])
        methods_table.main()
        return [tuple(line.split("|")[:2]) for line in capsys.readouterr().out.splitlines()]

    assert len(run()) == 9
    lines = data.read_text().splitlines(keepends=True)
    assert run() == []
    data.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed in the middle of a line
    assert run() == [("sequential:4 ", " `in-context` ")]
    monkeypatch.setattr(methods_table, "preset", lambda method, _: {"rate": 2})
    assert run() == [
        (f"{setting} ", " `ultraedit` ") for setting in ("single:2", "mass:3", "sequential:4")
    ]
    found = methods_table.rows(data)
    assert found["ultraedit", "sequential"].facts == 4
    assert found["unedited", "mass:3"].efficacy == 0
    assert found["in-context", "single"].mb < 0.01 < found["ultraedit", "mass:3"].mb


@needs_pocket
def test_ultraedits_sequence_keeps_its_statistics(lm, monkeypatch):
    monkeypatch.setattr(methods_table, "BATCH", 2)
    given = []

    original = METHODS["ultraedit"].load()

    @wraps(original)  # its signature says which settings there are
    def spy(lm, facts, *, statistics=None, **rest):
        given.append((id(statistics), statistics.count))
        return original(lm, facts, statistics=statistics, **rest)

    monkeypatch.setitem(METHODS, "ultraedit", replace(METHODS["ultraedit"], function=spy))
    methods_table.sequential(lm, "ultraedit", methods_table.facts_of(lm, PocketFacts(), 4))
    assert len({which for which, _ in given}) == 1
    assert [count for _, count in given] == sorted({count for _, count in given})


def test_a_slow_method_gets_fewer_facts_and_no_edit_of_more(monkeypatch):
    monkeypatch.setattr(methods_table, "LIMITS", {"rome": 100})
    asked = [
        methods_table.affordable("rome", each)
        for each in ("single:200", "mass:100", "mass:500", "sequential:200")
    ]
    assert asked == ["single:100", "mass:100", None, "sequential:100"]
    assert methods_table.affordable("ft", "mass:500") == "mass:500"


def test_the_latest_row_of_a_kind_is_shown_and_methods_come_in_their_order(tmp_path):
    data = tmp_path / "rows.jsonl"
    for each in (
        row("lora", "single:200", facts=200),
        row("ft", "single:200", facts=200),
        row("unedited", "single:200", facts=200, efficacy=0.0),
        row("lora", "single:50", facts=50),
        row("ft", "mass:10"),
    ):
        methods_table.keep(each, data)
    assert methods_table.tables(methods_table.rows(data)).splitlines() == [
        "**Single edits**",
        "",
        "| method | facts | efficacy | paraphrase | neighbourhood | S | perplexity | seconds | "
        "CPU | MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        "| unedited | 200 | 0.0 | 50.0 | 80.0 | 70.6 | | | | |",
        "| `ft` | 200 | 100.0 | 50.0 | 80.0 | 70.6 | ×1.250 | 1.25 | 1.25 | 1.25 |",
        "| `lora` | 50 | 100.0 | 50.0 | 80.0 | 70.6 | ×1.250 | 1.25 | 1.25 | 1.25 |",
        "",
        "**10 facts in one edit**",
        "",
        "| method | facts | efficacy | paraphrase | neighbourhood | S | perplexity | seconds | "
        "CPU | MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        "| `ft` | 10 | 100.0 | 50.0 | 80.0 | 70.6 | ×1.250 | 1.25 | 1.25 | 1.25 |",
    ]
