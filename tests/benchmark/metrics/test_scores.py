"""A record's scores, from readings made by hand: what wins, what counts as said, and which tests of
a ripple count.
"""

from __future__ import annotations

from math import exp

import pytest

from engram import Fact
from engram.benchmark.data.records import FORMS, Record
from engram.benchmark.metrics.outcomes import Measured, Outcome
from engram.benchmark.metrics.scores import of_measured, of_prompts, scores
from engram.benchmark.metrics.table import HARMONIC, METRICS, of_form
from engram.evaluate.answers import begins, contains
from engram.evaluate.probes import KINDS, Probe, Reading

FACT = Fact("Louvre", "The {} is in", "Rome", "Paris")


def record(*probes):
    return Record("0", (FACT,), probes)


def probe(kind, wanted="Rome", unwanted="Paris", **more):
    return Probe(kind, "The Louvre is in", wanted, unwanted, **more)


def of(probes, readings, before=None):
    """Scores of readings, each given as (wanted, unwanted), with the same before where nothing else
    is said.
    """
    after = Outcome(tuple(readings))
    return scores(record(*probes), Outcome(tuple(before or readings)), after)


def reading(wanted=1.0, unwanted=2.0, correct=1.0, answer=None, kl=None):
    return Reading(wanted, unwanted, correct, answer, kl)


# -- CounterFact -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "success", "margin"),
    [
        ("rewrite", "ES", "EM"),
        ("paraphrase", "PS", "PM"),
        ("neighbourhood", "NS", "NM"),
        ("neighbourhood+", "NS+", "NM+"),
        ("attribute", "AS", "AM"),
    ],
)
def test_success_is_a_strict_inequality_and_the_margin_one_of_probabilities(kind, success, margin):
    found = of([probe(kind)] * 3, [reading(1.0, 2.0), reading(2.0, 1.0), reading(1.5, 1.5)])
    assert found[success] == pytest.approx(1 / 3), "a tie fails"
    assert found[margin] == pytest.approx(0.0, abs=1e-15)
    assert of([probe(kind)], [reading(1.0, 2.0)])[margin] == pytest.approx(exp(-1) - exp(-2))


def test_a_tie_fails_on_both_sides():
    """Neither the edit nor the neighbour gets it: ES and NS of equal log-probabilities are
    both 0.
    """
    found = of([probe("rewrite"), probe("neighbourhood", "Paris", "Rome")], [reading(0.7, 0.7)] * 2)
    assert (found["ES"], found["NS"]) == (0.0, 0.0)


def test_what_has_no_prompts_or_nothing_to_compare_with_has_no_score():
    found = of([probe("rewrite", unwanted=None)], [reading(unwanted=None)])
    assert found["ES"] is None
    assert found["EM"] is None
    assert found["PS"] is None
    assert found["EA"] == 1.0


def test_whole_answers_need_every_token():
    found = of(
        [probe("rewrite")] * 3, [reading(correct=1.0), reading(correct=2 / 3), reading(correct=0.0)]
    )
    assert found["EA"] == pytest.approx(1 / 3)
    assert found["Efficacy"] == pytest.approx(5 / 9)


def test_kl_and_what_was_kept_are_means_over_neighbours():
    probes = [probe("neighbourhood", "Paris", "Rome")] * 2 + [
        probe("neighbourhood+", "Paris", "Rome")
    ]
    before = [reading(answer=" Paris, France"), reading(answer=" Paris"), reading(answer=" Paris")]
    after = [
        reading(answer=" Paris, France", kl=0.1),
        reading(answer=" Paris.", kl=0.3),
        reading(answer=" Rome", kl=2.0),
    ]
    found = of(probes, after, before)
    assert found["NKL"] == pytest.approx(0.2)
    assert found["NKL+"] == 2.0
    assert found["kept"] == 0.5, "to the letter"
    assert found["NG"] == 1.0
    assert found["NG+"] == 0.0
    assert of_prompts(record(*probes), Outcome(tuple(before)), Outcome(tuple(after)))["NKL"] == [
        0.1,
        0.3,
    ]


def test_text_scores_and_drift_are_the_outcomes():
    one = [probe("rewrite")]
    before = Outcome((reading(),), perplexity=20.0)
    after = Outcome(
        (reading(),),
        ("a text",),
        fluency=6.2,
        consistency=0.4,
        essence=9.0,
        essence_published=8.0,
        perplexity=25.0,
        drift=0.1,
    )
    found = scores(record(*one), before, after)
    names = ("GE", "RS", "essence", "essence-published", "perplexity", "drift")
    assert [found[name] for name in names] == [6.2, 0.4, 9.0, 8.0, 1.25, 0.1]
    assert scores(record(*one), Outcome((reading(),)), after)["perplexity"] is None


def test_a_record_that_could_not_be_edited_counts_with_the_scores_of_before():
    before = Outcome((reading(2.0, 1.0),))
    found = of_measured(
        record(probe("rewrite")), Measured("0", before, before, 0.5, error="no room")
    )
    assert (found["ES"], found["failed"], found["seconds"], found["size"]) == (0.0, 1.0, 0.5, 0.0)


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answer", "does"),
    [
        (" Paris, of course", "Paris", True),
        ("\n Paris", " Paris", True),
        (" Paris's river", "Paris", True),
        (" Parisian", "Paris", False),
        (" Paris2", "Paris", False),
        (" the city of Paris", "Paris", False),
        (" PARIS", "Paris", False),
        (" paris", "Paris", False),
        (" São Paulo", "Sao Paulo", False),
        (" Sa\u0303o Paulo is", "São Paulo", True),  # written texts are decomposed
        (" Pari\u0301s", "Pari", False),
        (" Iraq\u0301 is", "Iraq", False),  # which no single character composes
        (" U.S. troops", "U.S.", True),
        (" U.S.A. troops", "U.S.", False),
        ("", "Paris", False),
    ],
)
def test_a_text_begins_with_an_answer_as_words(said, answer, does):
    assert begins(said, [answer]) is does
    assert begins(said, ["Berlin", answer]) is does
    if does:
        assert contains(f"It is said: {said}", [answer])


def test_a_text_contains_an_answer_as_words():
    assert contains(" I think it is Paris.", ["Paris"])
    assert not contains(" I think it is Parisian.", ["Paris"])
    assert not contains(" neoParis", ["Paris"])


def test_an_alias_is_as_good_as_the_answer():
    asked = probe("rewrite", "Rome", aliases=("the Eternal City",))
    assert of([asked], [reading(answer=" the Eternal City")])["EG"] == 1.0
    assert of([asked], [reading(answer=" Eternal City")])["EG"] == 0.0
    assert of([asked], [reading(answer=None)])["EG"] is None


# -- the other benchmarks --------------------------------------------------------------------------


def test_multi_hop_counts_any_of_the_questions_and_the_chain_all_of_its_hops():
    hops = [probe("multi-hop", "Italy", None, aliases=("the Italian Republic",))] * 3
    singles = [probe("single-hop", "Rome", None), probe("single-hop", "Italy", None)]
    said = ["France.", "I'd say the Italian Republic", "Germany"]
    found = of(
        [*hops, *singles],
        [
            *(reading(answer=each) for each in said),
            reading(answer="Rome"),
            reading(answer="in Italy"),
        ],
    )
    assert found["multi-hop"] == 1.0
    assert found["instance-wise"] == 1.0
    found = of(
        [*hops, *singles],
        [reading(answer="France")] * 3 + [reading(answer="Rome"), reading(answer="France")],
    )
    assert found["multi-hop"] == 0.0
    assert found["instance-wise"] == 0.0
    assert of(hops, [reading(answer=None)] * 3)["multi-hop"] is None


def test_edit_wise_is_the_share_of_facts_that_are_said():
    found = of(
        [probe("rewrite", unwanted=None)] * 2,
        [reading(answer="in Rome"), reading(answer="in Paris")],
    )
    assert found["edit-wise"] == 0.5


def ripple(said_after, conditions_before=(), joined="any", test="t"):
    more = {"test": test, "joined": joined}
    probes = [probe("preservation", "Rome", None, **more) for _ in said_after]
    probes += [
        probe("preservation", "Italy", None, condition=True, **more) for _ in conditions_before
    ]
    after = [reading(answer=each) for each in said_after] + [
        reading(answer="whatever") for _ in conditions_before
    ]
    before = [reading(answer="whatever") for _ in said_after] + [
        reading(answer=each) for each in conditions_before
    ]
    return of(probes, after, before)["preservation"]


def test_a_ripple_test_is_passed_by_any_or_by_all_of_its_queries():
    assert ripple(["Rome", "Paris"], joined="any") == 1.0
    assert ripple(["Rome", "Paris"], joined="all") == 0.0
    assert ripple(["Rome", "Rome"], joined="all") == 1.0


def test_a_ripple_test_counts_only_where_the_unedited_model_meets_every_condition():
    assert ripple(["Rome"], ["Italy"]) == 1.0
    assert ripple(["Rome"], ["Italy", "France"]) is None
    assert ripple(["Paris"], ["Italy"]) == 0.0


def test_ripple_tests_are_told_apart_by_name_and_without_one_stand_alone():
    named = [probe("preservation", unwanted=None, test=name) for name in ("a", "b", "a")]
    readings = [reading(answer="Rome"), reading(answer="Paris"), reading(answer="Paris")]
    assert of(named, readings)["preservation"] == 0.5
    assert of([probe("preservation", unwanted=None)] * 3, readings)[
        "preservation"
    ] == pytest.approx(1 / 3)


# -- the table -------------------------------------------------------------------------------------


def test_every_metric_is_scored_or_made_of_means_and_every_score_is_in_the_table():
    measured = Outcome((reading(),))
    found = of_measured(record(probe("rewrite")), Measured("0", measured, measured, 0.5))
    assert found.keys() | HARMONIC.keys() == METRICS.keys()


def test_every_kind_of_prompt_has_a_score():
    for kind in KINDS:
        asked = probe(kind, "Rome", "Paris", test="t")
        found = of([asked], [reading(answer=" Rome", kl=0.1)])
        assert [name for name, value in found.items() if value is not None], kind


def test_the_flattened_form_never_reports_scores_of_counterfact():
    assert {"S", "ES", "PS", "NS", "EM", "PM", "NM", "GE", "RS"}.isdisjoint(of_form("flat"))
    assert {"rewrite", "rephrase", "locality"} <= of_form("flat").keys()


@pytest.mark.parametrize("form", FORMS)
def test_generation_comes_before_teacher_forcing(form):
    names = list(of_form(form))
    said = [i for i, name in enumerate(names) if "greedy answer" in METRICS[name].meaning]
    forced = [i for i, name in enumerate(names) if "teacher-forced" in METRICS[name].meaning]
    assert not said or not forced or min(said) < min(forced)


def test_parts_of_harmonic_means_are_reported_by_the_same_forms():
    for name, by_form in HARMONIC.items():
        assert set(by_form) == set(METRICS[name].forms)
        for form, parts in by_form.items():
            assert set(parts) <= of_form(form).keys()
