"""The study of localisation and editing: its statistics, what a kill leaves behind, and that the
page says what the data says.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

import engram
import localisation_report as report
import localisation_study as study
from engram import pocket

DATA = report.DOCS / "data" / "localisation.jsonl"
PAGE = report.DOCS / "what-tracing-tells.md"


def array(*rows):
    return np.array(rows, dtype=float)


# -- statistics


def test_equal_values_share_the_mean_of_their_ranks():
    assert report.ranks(array(3, 1, 3, 2)).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_rank_correlation_sees_order_only():
    a = array(0.1, 0.5, 0.2, 0.9)
    assert report.spearman(a, np.exp(5 * a)) == pytest.approx(1)
    assert report.spearman(a, -(a**3)) == pytest.approx(-1)
    assert report.pearson(a, 2 * a + 1) == pytest.approx(1)


def test_what_does_not_vary_correlates_with_nothing():
    assert report.pearson(array(0, 0, 0), array(1, 2, 3)) is None
    assert report.spearman(array(1, 2, 3), array(1, 1, 1 + 1e-6)) is None


def test_quality_is_the_harmonic_mean_and_one_bad_margin_spoils_it():
    assert report.quality([array(1), array(1), array(1)])[0] == pytest.approx(1)
    assert report.quality([array(0), array(0.5), array(1)])[0] == pytest.approx(
        3 / (1 / 0.5 + 1 / 0.75 + 1)
    )
    assert report.quality([array(1), array(1), array(-1)])[0] < 1e-6


def test_explained_variance_is_that_of_least_squares_with_a_mean_for_each_layer():
    draw = np.random.default_rng(0)
    effect, noise = draw.random((40, 3)), 0.1 * draw.standard_normal((40, 3))
    score = array(0.0, 1.0, 3.0) + 0.5 * effect + noise
    found = report.explained(effect, score)

    def r2(*columns):
        design, y = np.stack([each.ravel() for each in columns], 1), score.ravel()
        left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        return 1 - (left @ left) / ((y - y.mean()) ** 2).sum()

    layers = [np.tile(row, (40, 1)) for row in np.eye(3)]
    wanted = {
        "effect": r2(np.ones_like(effect), effect),
        "layer": r2(*layers),
        "both": r2(*layers, effect),
    }
    assert found == pytest.approx(wanted | {"gain": wanted["both"] - wanted["layer"]})
    assert found["gain"] > 0.005


def test_gain_by_chance_is_what_effects_of_other_facts_reach_and_a_real_effect_is_above_it():
    draw = np.random.default_rng(2)
    effect = draw.random((60, 3))
    unrelated, related = draw.standard_normal((60, 3)), effect + 0.3 * draw.standard_normal((60, 3))
    # one more regressor on 180 pairs of which 3 means are fitted: 177 R2 is about chi-square with 1
    # degree of freedom
    assert report.gain_by_chance(effect, unrelated) == pytest.approx(3.84 / 177, rel=0.25)
    assert report.explained(effect, related)["gain"] > 5 * report.gain_by_chance(effect, related)


def test_choices_count_hits_against_the_layer_that_is_best_for_the_other_half():
    score = array([0.9, 0.1, 0.5], [0.2, 0.8, 0.5], [0.7, 0.1, 0.8], [0.1, 0.6, 0.5])
    effect = array([1, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0])
    found = report.choices(effect, score)
    assert found["hits_traced"] == pytest.approx(2 / 4)  # the first and the third
    # best on average: of facts 0 and 2 layer 0 (1.6 of 2), of facts 1 and 3 layer 1 (1.4 of 2)
    assert found["hits_fixed"] == 0
    assert found["score_fixed"] == pytest.approx((0.1 + 0.2 + 0.1 + 0.1) / 4)
    assert found["score_traced"] == pytest.approx((0.9 + 0.2 + 0.8 + 0.1) / 4)
    assert found["score_best"] == pytest.approx((0.9 + 0.8 + 0.8 + 0.6) / 4)
    assert found["lost"] == pytest.approx(found["score_fixed"] - found["score_traced"])
    assert found["hits_best"] == 1
    assert found["score_random"] == pytest.approx(score.mean())
    # the traces name layers 0, 0, 2, 0; best are 0, 1, 2, 1
    assert found["hits_chance"] == pytest.approx(3 / 4 * 1 / 4 + 1 / 4 * 1 / 4)


def test_interval_of_a_mean_is_about_two_standard_errors_wide():
    values = np.random.default_rng(1).standard_normal(400)
    low, high = report.interval(lambda v: float(v.mean()), values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(4 * values.std() / 20, rel=0.15)


# -- tables


def test_tables_go_between_their_marks_and_a_missing_mark_is_said():
    page = "text\n<!-- table: a -->\nold\n<!-- end -->\nmore"
    assert (
        report.put_tables(page, {"a": "| new |"})
        == "text\n<!-- table: a -->\n\n| new |\n\n<!-- end -->\nmore"
    )
    with pytest.raises(SystemExit, match=r"0 places '<!-- table: b -->'"):
        report.put_tables(page, {"b": ""})


def without_draws(result):
    """Return what does not depend on how often a bootstrap draws, to eight digits."""
    drawn = ("low", "high", "gain interval", "gain by chance", "lost interval")
    if isinstance(result, dict):
        return {k: without_draws(v) for k, v in result.items() if k not in drawn}
    if isinstance(result, list):
        return [without_draws(each) for each in result]
    return round(result, 8) if isinstance(result, float) else result


def test_the_page_shows_the_tables_of_the_summary_and_the_summary_is_that_of_the_measured_lines(
    monkeypatch,
):
    kept = json.loads(DATA.with_suffix(".json").read_text(encoding="utf8"))
    page = PAGE.read_text(encoding="utf8")
    assert report.put_tables(page, report.tables(kept)) == page
    assert f"{kept['facts']} facts" in page
    monkeypatch.setattr(report, "RESAMPLES", 2)
    assert without_draws(report.summary(report.read(DATA))) == without_draws(kept)


# -- measuring


def test_a_killed_run_loses_the_line_in_flight_only_and_other_settings_are_refused(tmp_path):
    path, settings = tmp_path / "deep" / "runs.jsonl", {"seed": 0}
    assert study.resumed(path, settings) == set()
    whole = json.dumps({"subject": "A", "prompt": "{} is"})
    with path.open("a", encoding="utf8") as file:
        file.write(whole + "\n" + whole[:9])
    assert study.resumed(path, settings) == {("A", "{} is")}
    assert path.read_text(encoding="utf8").endswith(whole + "\n")
    with pytest.raises(SystemExit, match=r"measured with \{'seed': 0\}, now \{'seed': 1\}"):
        study.resumed(path, {"seed": 1})


@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_effects_and_margins_are_those_of_the_public_calls(pocket_lm):
    lm = pocket_lm
    known = pocket.find("Eiffel Tower", "city")[0]
    fact = pocket.as_fact(known, "Rome")
    found = study.effects(lm, fact, window=3, samples=10)
    trace = engram.trace(
        lm,
        fact.prompt_text,
        subject=fact.subject,
        target="Paris",
        window=3,
        positions="subject_last",
    )
    np.testing.assert_allclose(found["mlp, 3 layers"], trace.effects("mlp")[0], atol=1e-6)
    np.testing.assert_allclose(found["residual"], trace.effects("residual")[0], atol=1e-6)

    margins = study.margins(study.answered(lm, fact))
    new, true = lm.probabilities([(fact.prompt_text, "Rome"), (fact.prompt_text, "Paris")])
    assert margins["efficacy"] == pytest.approx(new - true)
    assert margins["neighbourhood"] > 0.9 > -0.9 > margins["paraphrase"]  # nothing is edited yet
