"""Means over records, their intervals, and differences of two runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.benchmark.metrics.summary import Estimate, harmonic, paired, summarise
from engram.bootstrap import Bootstrap
from engram.errors import SettingError
from tests.helpers.published import published_summary

shares = st.integers(0, 10).map(lambda tenths: tenths / 10)
rows = st.lists(
    st.fixed_dictionaries(
        {"ES": shares, "PS": shares, "NS": shares, "GE": st.none() | st.floats(0, 8)}
    ),
    min_size=1,
    max_size=25,
)


QUICK = Bootstrap(resamples=50)


def table(count=60, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {name: float(generator.integers(11)) / 10 for name in ("ES", "PS", "NS")}
        for _ in range(count)
    ]


def close(a: Estimate, b: Estimate) -> bool:
    return [a.mean, a.count, a.std] == pytest.approx([b.mean, b.count, b.std], abs=1e-12)


def test_s_of_published_means():
    assert round(harmonic([100, 96.4, 75.4]), 1) == 89.2
    assert harmonic([1, 0, 1]) == 0
    for name, means in {
        "GPT-J": (16.3, 18.6, 83.0),
        "FT": (100.0, 96.6, 10.3),
        "ROME": (99.9, 99.1, 78.9),
    }.items():
        assert round(harmonic(means), 1) == {"GPT-J": 23.6, "FT": 25.5, "ROME": 91.5}[name]


def test_s_is_of_the_means_of_the_data_set_not_a_mean_over_records():
    found = summarise(
        [{"ES": 1.0, "PS": 0.0, "NS": 1.0}, {"ES": 1.0, "PS": 1.0, "NS": 0.0}],
        "counterfact",
        bootstrap=QUICK,
    )
    assert found["S"].mean == pytest.approx(3 / (1 + 2 + 2)), "record by record it would be 0"
    assert found["S"].half_published is None


def test_s_of_four_terms_for_counterfact_plus_and_of_three_others_for_zsre():
    row = {
        "ES": 1.0,
        "PS": 1.0,
        "NS": 0.5,
        "NS+": 0.25,
        "Efficacy": 1.0,
        "Paraphrase": 0.5,
        "Specificity": 0.25,
    }
    found = summarise([row], "counterfact", bootstrap=QUICK)
    assert found["S4"].mean == pytest.approx(4 / 8)
    assert "Efficacy" not in found
    found = summarise([row], "zsre", bootstrap=QUICK)
    assert found["S"].mean == pytest.approx(3 / 7)
    assert "ES" not in found


def test_the_published_interval_is_a_normal_one_with_the_population_deviation():
    values = [0.0, 1.0, 1.0, 1.0]
    found = summarise([{"ES": value} for value in values], "counterfact", bootstrap=QUICK)["ES"]
    assert found.std == pytest.approx(np.std(values))
    assert found.half_published == pytest.approx(1.96 * np.std(values) / 2)


def test_the_bootstrap_of_many_records_is_about_the_normal_interval():
    """Percentiles of 1000 resamples of 2000 records; off by a tenth once in hundreds of seeds."""
    generator = np.random.default_rng(5)
    found = summarise(
        [{"ES": float(generator.random() < 0.7)} for _ in range(2000)], "counterfact"
    )["ES"]
    assert found.mean - found.low == pytest.approx(found.half_published, rel=0.15)
    assert found.high - found.mean == pytest.approx(found.half_published, rel=0.15)


def test_the_bootstrap_of_s_is_a_loop_over_resampled_records():
    given_rows = table()
    drawn = np.random.default_rng(3).integers(len(given_rows), size=(200, len(given_rows)))
    by_hand = [
        harmonic([np.mean([given_rows[i][name] for i in draw]) for name in ("ES", "PS", "NS")])
        for draw in drawn
    ]
    found = summarise(given_rows, "counterfact", bootstrap=Bootstrap(3, 200))["S"]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(by_hand, (2.5, 97.5))))


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    values = np.random.default_rng(0).random((37, 2))
    whole = Bootstrap(1, 100).means(values)
    monkeypatch.setattr("engram.bootstrap._AT_ONCE", 7)
    np.testing.assert_allclose(
        Bootstrap(1, 100).means(values), whole, rtol=1e-14
    )  # products of other sizes round differently


@settings(max_examples=40, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_means_do_not_depend_on_the_order_of_records(given_rows, random):
    shuffled = random.sample(given_rows, len(given_rows))
    one, other = (
        summarise(each, "counterfact", bootstrap=QUICK) for each in (given_rows, shuffled)
    )
    assert one.keys() == other.keys()
    assert all(one[name].mean == pytest.approx(other[name].mean, abs=1e-12) for name in one)
    assert all(one[name].count == other[name].count for name in one)


@settings(max_examples=40, deadline=None)
@given(rows)
def test_an_interval_lies_within_the_values_and_a_harmonic_mean_between_its_parts(given_rows):
    for name, found in summarise(given_rows, "counterfact", bootstrap=QUICK).items():
        assert found.low <= found.high
        if name != "S":
            values = [row[name] for row in given_rows if row[name] is not None]
            assert min(values) - 1e-12 <= found.low
            assert found.high <= max(values) + 1e-12
            assert found.count == len(values)
    parts = [np.mean([row[name] for row in given_rows]) for name in ("ES", "PS", "NS")]
    assert min(parts) - 1e-12 <= harmonic(parts) <= max(parts) + 1e-12


@settings(max_examples=20, deadline=None)
@given(rows, st.integers(0, 5))
def test_the_same_seed_gives_the_same_interval(given_rows, seed):
    assert summarise(given_rows, "counterfact", bootstrap=Bootstrap(seed, 50)) == summarise(
        given_rows, "counterfact", bootstrap=Bootstrap(seed, 50)
    )


def test_another_seed_gives_another_interval():
    one, other = (
        summarise(table(), "counterfact", bootstrap=Bootstrap(seed))["PS"] for seed in (0, 1)
    )
    assert one.mean == other.mean
    assert (one.low, one.high) != (other.low, other.high)


@settings(max_examples=30, deadline=None)
@given(rows)
def test_a_run_does_not_differ_from_itself(given_rows):
    keyed = {str(i): row for i, row in enumerate(given_rows)}
    for found in paired(keyed, keyed, "counterfact", bootstrap=QUICK).values():
        assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_a_difference_is_of_the_records_that_both_runs_have():
    a = {
        "1": {"ES": 1.0, "GE": 6.0},
        "2": {"ES": 1.0, "GE": None},
        "3": {"ES": 0.0, "GE": 1.0},
        "5": {"ES": 0.0},
    }
    b = {
        "3": {"ES": 0.0, "GE": 2.0},
        "1": {"ES": 0.0, "GE": 5.5},
        "2": {"ES": 1.0, "GE": 3.0},
        "4": {"ES": 0.0},
    }
    found = paired(a, b, "counterfact", bootstrap=QUICK)
    assert (found["ES"].mean, found["ES"].count) == (pytest.approx(1 / 3), 3)
    assert (found["GE"].mean, found["GE"].count) == (pytest.approx(-0.25), 2)


def test_a_difference_of_harmonic_means_needs_all_parts_in_both_runs():
    a = {str(i): row for i, row in enumerate(table(5))}
    b = {**a, "3": {"ES": 0.0, "PS": 0.0, "NS": None}}
    found = paired(a, b, "counterfact", bootstrap=QUICK)
    assert (found["S"].mean, found["S"].count) == (0.0, 4), "record 3 would lower S by ES and PS"
    assert found["ES"].count == 5


def test_what_both_runs_share_does_not_widen_the_interval_of_their_difference():
    """Records vary by a third, the runs differ by 0.1 on each of them: their intervals overlap, the
    difference is certain.
    """
    a = {str(i): row for i, row in enumerate(table())}
    b = {key: {name: value - 0.1 for name, value in row.items()} for key, row in a.items()}
    found = paired(a, b, "counterfact")["PS"]
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    alone = [summarise(list(each.values()), "counterfact")["PS"] for each in (a, b)]
    assert alone[0].low < alone[1].high


def test_a_difference_of_harmonic_means_is_a_loop_over_the_same_resampled_records():
    a, b = ({str(i): row for i, row in enumerate(table(seed=seed))} for seed in (0, 1))
    del b["7"]
    common = sorted(a.keys() & b.keys())
    drawn = np.random.default_rng(2).integers(len(common), size=(100, len(common)))

    def s(run, keys):
        return harmonic([np.mean([run[key][name] for key in keys]) for name in ("ES", "PS", "NS")])

    by_hand = [s(a, keys) - s(b, keys) for keys in ([common[i] for i in draw] for draw in drawn)]
    found = paired(a, b, "counterfact", bootstrap=Bootstrap(2, 100))["S"]
    assert found.mean == pytest.approx(s(a, common) - s(b, common))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(by_hand, (2.5, 97.5))))
    assert found.count == 59


def test_records_without_texts_have_no_place_in_the_published_summary():
    found = published_summary(
        [{"ES": 0.0}, {"ES": 1.0}], [{"ES": 1.0, "seconds": 2.0}, {"ES": 1.0, "seconds": 3.0}]
    )
    assert found == {
        "time": [2.5, 0.5],
        "pre_rewrite_success": [50.0, 50.0],
        "post_rewrite_success": [100.0, 0.0],
        "num_cases": 2,
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarise([], "counterfact"), "no records"),
        (lambda: summarise([{}], "counterfacts"), "form='counterfacts': expected 'counterfact'"),
        (lambda: Bootstrap(resamples=0), "resamples=0"),
        (lambda: paired({"1": {}}, {"2": {}}, "zsre"), "no records .* same ids"),
    ],
)
def test_what_cannot_be_summarised_says_why(call, message):
    with pytest.raises(SettingError, match=message):
        call()
