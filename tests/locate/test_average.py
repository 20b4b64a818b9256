"""Averages of traces made by hand: which rows are which role, what their means are, and how wide
the intervals.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import engram
from engram.errors import EngramError, SettingError
from engram.locate.average import TOKEN_ROLES, AverageTrace, role_number, role_rows
from engram.locate.trace import CausalTrace
from tests.helpers.tiny import tiny_lm

LAYERS = 5


def made(
    tokens=7,
    span=(1, 4),
    positions=None,
    seed=0,
    low=0.1,
    high=0.9,
    last=None,
    settings=None,
    shapes=None,
    **changes,
):
    """Return a trace of random scores."""
    positions = list(range(tokens)) if positions is None else positions
    generator = torch.Generator().manual_seed(seed)
    shapes = {"residual": (LAYERS,), "mlp": (LAYERS,)} if shapes is None else shapes
    scores = {
        site: torch.rand(len(positions), *shape, generator=generator)
        for site, shape in shapes.items()
    }
    about = {
        "prompt": f"prompt {seed}",
        "subject": "subject",
        "answer": " answer",
        "tokens": [f"t{i}" for i in positions],
        "positions": positions,
        "subject_range": span,
        "corrupted": list(range(*span)),
        "scores": scores,
        "low_score": low,
        "high_score": high,
        "window": 2,
        "samples": 3,
        "model": "hand",
        "last": tokens - 1 if last is None else last,
        "settings": settings or {},
    }
    return CausalTrace(**{**about, **changes})


def many(count=40, seed=0, **given):
    """Traces of prompts of all sorts: subjects of one to three tokens, none to three tokens behind
    them.
    """
    draw = np.random.RandomState(seed)
    found = []
    for i in range(count):
        start, length, after = draw.randint(0, 2), draw.randint(1, 4), draw.randint(0, 4)
        low, high = sorted(draw.rand(2))
        found.append(
            made(
                start + length + after,
                (start, start + length),
                seed=i,
                low=float(low),
                high=float(high),
                **given,
            )
        )
    return found


# -- roles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("about", "rows"),
    [
        pytest.param(
            {"tokens": 8, "span": (1, 4)},
            [[1], [2], [3], [4], [5, 6], [7]],
            id="every role, one token in front",
        ),
        pytest.param(
            {"tokens": 8, "span": (0, 4)}, [[0], [1, 2], [3], [4], [5, 6], [7]], id="subject first"
        ),
        pytest.param(
            {"tokens": 6, "span": (1, 2)},
            [[1], [], [1], [2], [3, 4], [5]],
            id="a subject of one token is both",
        ),
        pytest.param({"tokens": 6, "span": (1, 3)}, [[1], [], [2], [3], [4], [5]], id="no middle"),
        pytest.param(
            {"tokens": 5, "span": (1, 4)},
            [[1], [2], [3], [4], [], [4]],
            id="one token behind it is both",
        ),
        pytest.param(
            {"tokens": 6, "span": (1, 4)}, [[1], [2], [3], [4], [], [5]], id="nothing further"
        ),
        pytest.param(
            {"tokens": 4, "span": (1, 4)},
            [[1], [2], [3], [], [], [3]],
            id="the subject ends the prompt",
        ),
        pytest.param(
            {"tokens": 1, "span": (0, 1)}, [[0], [], [0], [], [], [0]], id="nothing but the subject"
        ),
        pytest.param(
            {"tokens": 9, "span": (2, 4), "last": 6},
            [[2], [], [3], [4], [5], [6]],
            id="text behind what is read",
        ),
        pytest.param(
            {"tokens": 6, "span": (3, 5), "last": 1},
            [[3], [], [4], [], [], [1]],
            id="read in front of the subject",
        ),
        pytest.param({"positions": [3]}, [[], [], [0], [], [], []], id="subject_last"),
        pytest.param({"positions": [6]}, [[], [], [], [], [], [0]], id="last"),
        pytest.param(
            {"positions": [5, 2, 0, 1]}, [[3], [1], [], [], [0], []], id="rows in another order"
        ),
    ],
)
def test_rows_of_each_place(about, rows):
    assert role_rows(made(**about)) == dict(zip(TOKEN_ROLES, rows, strict=True))


@pytest.mark.parametrize("tokenizer", ["byte-level", "byte-level with BOS"])
def test_a_token_in_front_of_the_text_is_in_no_place(tokenizer):
    lm = tiny_lm("llama", tokenizer=tokenizer)
    trace = engram.trace(
        lm, "Paris is in the city of", subject="Paris", sites=["residual"], noise=1.0, samples=1
    )
    first = int(tokenizer.endswith("BOS"))
    rows = role_rows(trace)
    assert trace.subject_range[0] == first and rows["first subject"] == [first]
    assert rows["last"] == [len(trace.tokens) - 1]
    covered = {row for role in rows.values() for row in role}
    assert covered == set(range(first, len(trace.tokens)))


# -- means -----------------------------------------------------------------------------------------


def test_each_fact_counts_once_at_a_role_however_many_rows_it_has_there():
    traces = many()
    curves = AverageTrace(traces).effects("mlp")
    for p, role in enumerate(TOKEN_ROLES):
        facts = []
        for trace in traces:
            rows = role_rows(trace)[role]
            if rows:
                facts.append(
                    sum(trace.scores["mlp"][row].double() - trace.low_score for row in rows)
                    / len(rows)
                )
        assert curves.counts[p] == len(facts)
        torch.testing.assert_close(curves.mean[p], sum(facts) / len(facts), atol=1e-12, rtol=0)


def test_the_reference_pools_rows_and_takes_the_baseline_off_afterwards():
    traces = many()
    curves = AverageTrace(traces).effects("residual", "reference")
    low = np.mean([trace.low_score for trace in traces])
    for p, role in enumerate(TOKEN_ROLES):
        pooled = np.array(
            [
                trace.scores["residual"][row].tolist()
                for trace in traces
                for row in role_rows(trace)[role]
            ],
            dtype=np.float64,
        )
        assert curves.counts[p] == len(pooled)
        half = 1.96 * pooled.std(axis=0, ddof=0) / math.sqrt(len(pooled))
        for found, wanted in ((curves.mean, 0), (curves.low, -half), (curves.high, half)):
            np.testing.assert_allclose(found[p].numpy(), pooled.mean(0) - low + wanted, atol=1e-12)


def test_the_two_ways_differ_only_where_facts_have_unequal_rows_or_lack_a_place():
    average = AverageTrace(many())
    ours, theirs = average.effects("residual"), average.effects("residual", "reference")
    for p, role in enumerate(TOKEN_ROLES):
        same = torch.allclose(ours.mean[p], theirs.mean[p], atol=1e-9)
        assert same == (role in ("first subject", "last subject", "last")), role


def test_in_the_other_direction_effects_are_differences_to_the_clean_run():
    trace = made(settings={"direction": "noise"})
    curves = AverageTrace([trace]).effects("mlp")
    torch.testing.assert_close(curves.mean[2], trace.scores["mlp"][3].double() - trace.high_score)
    assert AverageTrace([trace]).total_effect()[0] == pytest.approx(0.8)


def test_heads_are_averaged_with_their_axis():
    traces = many(12, shapes={"head": (LAYERS, 3)})
    for interval in ("bootstrap", "reference"):
        curves = AverageTrace(traces).effects("head", interval)
        assert curves.mean.shape == curves.low.shape == curves.high.shape == (6, LAYERS, 3)
        wanted = sum(
            t.scores["head"][t.subject_range[1] - 1].double() - t.low_score for t in traces
        ) / len(traces)
        torch.testing.assert_close(curves.mean[2], wanted, atol=1e-12, rtol=0)
        assert (curves.low[2] <= curves.mean[2]).all() and (curves.mean[2] <= curves.high[2]).all()


def test_neurons_are_no_layers_even_if_there_are_as_many():
    traces = many(
        5,
        shapes={
            "neuron": (LAYERS,),
            "residual": (LAYERS,),
            "head": (LAYERS, 2),
            "residual, mlp severed": (LAYERS,),
        },
    )
    average = AverageTrace(traces)
    assert average.layered == ["residual", "residual, mlp severed"] and average.severed == [
        "residual, mlp severed"
    ]
    assert average.effects("neuron").mean.shape == (6, LAYERS)


def test_one_fact_has_no_spread():
    curves = AverageTrace([made()]).effects("mlp")
    assert curves.counts == [1] * 6
    assert torch.equal(curves.low, curves.high)
    torch.testing.assert_close(curves.low, curves.mean)


# -- intervals -------------------------------------------------------------------------------------


def test_the_bootstrap_is_the_same_for_the_same_seed():
    traces = many()
    one, same, other = AverageTrace(traces), AverageTrace(traces), AverageTrace(traces, seed=1)
    for name in ("low", "high"):
        assert torch.equal(getattr(one.effects("mlp"), name), getattr(same.effects("mlp"), name))
        assert not torch.equal(
            getattr(one.effects("mlp"), name), getattr(other.effects("mlp"), name)
        )
    assert one.total_effect() == same.total_effect() != other.total_effect()


def test_the_bootstrap_is_a_loop_over_resampled_facts():
    traces = many(9)
    curves = AverageTrace(traces, seed=3).effects("residual", level=0.8, resamples=50)
    drawn = torch.randint(9, (50, 9), generator=torch.Generator().manual_seed(3))
    own = [
        torch.stack(
            [
                (t.scores["residual"][rows].double() - t.low_score).mean(0)
                if rows
                else torch.full((LAYERS,), torch.nan).double()
                for rows in role_rows(t).values()
            ]
        )
        for t in traces
    ]
    means = torch.stack(
        [torch.stack([own[i] for i in sample]).nanmean(0) for sample in drawn.tolist()]
    )
    torch.testing.assert_close(
        curves.low, means.nanquantile(0.1, 0), atol=1e-12, rtol=0, equal_nan=True
    )
    torch.testing.assert_close(
        curves.high, means.nanquantile(0.9, 0), atol=1e-12, rtol=0, equal_nan=True
    )


def test_intervals_hold_the_mean_and_grow_with_the_level():
    average = AverageTrace(many())
    narrow, wide = average.effects("mlp", level=0.5), average.effects("mlp", level=0.99)
    for curves in (narrow, wide):
        assert (curves.low <= curves.mean).all() and (curves.mean <= curves.high).all()
    assert (wide.low < narrow.low).all() and (narrow.high < wide.high).all()
    ate, low, high = average.total_effect()
    assert low < ate < high


def test_the_bootstrap_is_about_the_normal_interval_of_many_facts():
    """Width over 1.96 standard errors: within 12 % at each layer for 2,000 resamples of 300 facts
    (its own error is 2 to 3 %).
    """
    traces = [made(seed=i) for i in range(300)]
    curves = AverageTrace(traces).effects("mlp")
    effects = torch.stack([t.scores["mlp"][3].double() - t.low_score for t in traces])
    normal = 1.96 * effects.std(0) / math.sqrt(300)
    torch.testing.assert_close((curves.high - curves.low)[2] / 2, normal, rtol=0.12, atol=0)


def test_a_role_that_no_fact_has_is_nan_and_one_that_few_have_is_not():
    traces = [made(6, (1, 2), seed=i) for i in range(30)]
    average = AverageTrace(traces)
    for interval in ("bootstrap", "reference"):
        curves = average.effects("mlp", interval)
        assert curves.counts[1] == 0
        for table in (curves.mean, curves.low, curves.high):
            assert table[1].isnan().all() and table[[0, 2, 3, 4, 5]].isfinite().all()
    with_one = AverageTrace([*traces, made(8, (1, 4), seed=99)]).effects("mlp")
    assert with_one.counts == [31, 1, 31, 31, 31, 31]
    for table in (
        with_one.mean,
        with_one.low,
        with_one.high,
    ):  # a third of the resamples lack the only fact that has it
        torch.testing.assert_close(
            table[1], made(8, (1, 4), seed=99).scores["mlp"][2].double() - 0.1
        )


def test_many_resamples_of_many_heads_fit():
    """torch's quantile takes 2^24 numbers: here are a few more, in the old pieces of 4096
    columns.
    """
    traces = many(2, shapes={"head": (40, 18)})
    curves = AverageTrace(traces).effects("head", resamples=4200)
    assert (curves.low[2] <= curves.high[2]).all()


# -- totals ----------------------------------------------------------------------------------------


def test_the_total_effect_is_the_mean_of_clean_minus_corrupted():
    traces = many()
    average = AverageTrace(traces)
    totals = [t.high_score - t.low_score for t in traces]
    assert average.total_effect()[0] == pytest.approx(np.mean(totals))
    assert average.clean == pytest.approx(np.mean([t.high_score for t in traces]))
    assert average.corrupted == pytest.approx(np.mean([t.low_score for t in traces]))


def test_the_summary_is_what_the_paper_reports():
    traces = many(shapes={"residual": (LAYERS,), "head": (LAYERS, 3)})
    average = AverageTrace(traces, [("a prompt", "a reason")])
    told = average.summary()
    assert (told["facts"], told["skipped"]) == (40, 1)
    ate, low, high = average.total_effect()
    assert told["total_effect"] == {"mean": ate, "low": low, "high": high}
    assert told["clean"] - told["corrupted"] == pytest.approx(ate)
    for site in ("residual", "head"):
        about = told["sites"][site]
        assert about["mean_of_maxima"] == pytest.approx(
            np.mean([float(t.scores[site].max()) for t in traces])
        )
        for role in ("last subject", "last"):
            curve = average.effects(site).mean[TOKEN_ROLES.index(role)]
            assert (
                about[role]["effect"]
                == float(curve.max())
                == float(curve[tuple(about[role]["at"])])
            )
            own = [float(t.scores[site][role_rows(t)[role]].max()) for t in traces]
            assert about[role]["mean_of_maxima"] == pytest.approx(np.mean(own))


def test_in_the_other_direction_the_lowest_is_the_peak():
    traces = many(settings={"direction": "noise"})
    average = AverageTrace(traces)
    about = average.summary()["sites"]["mlp"]
    assert about["last"]["effect"] == float(average.effects("mlp").mean[5].min())
    assert about["mean_of_maxima"] == pytest.approx(
        np.mean([float(t.scores["mlp"].min()) for t in traces])
    )


def test_the_summary_leaves_out_a_role_that_was_not_traced():
    about = AverageTrace([made(positions=[3])]).summary()["sites"]["mlp"]
    assert set(about) == {"mean_of_maxima", "last subject"}


# -- mistakes --------------------------------------------------------------------------------------


def test_nothing_to_average_says_why():
    with pytest.raises(EngramError, match="no trace to average: no facts were given"):
        AverageTrace([])
    with pytest.raises(EngramError, match="no trace to average: unknown; without a partner"):
        AverageTrace([], [("a", "without a partner"), ("b", "unknown"), ("c", "unknown")])


@pytest.mark.parametrize(
    ("other", "different"),
    [
        ({"shapes": {"residual": (LAYERS,)}}, "sites"),
        ({"shapes": {"residual": (LAYERS + 1,), "mlp": (LAYERS + 1,)}}, "sites"),
        ({"window": 3}, "window"),
        ({"method": "attribution"}, "method"),
        ({"model": "other"}, "model"),
        ({"settings": {"metric": "log_probability", "direction": "noise"}}, "metric, direction"),
    ],
)
def test_traces_of_different_kinds_have_no_mean(other, different):
    settings = {"metric": "probability", "direction": "denoise"}
    with pytest.raises(
        EngramError, match=f"these traces differ in {different}; their mean would mean nothing"
    ):
        AverageTrace([made(settings=settings), made(**{"settings": settings, **other})])


def test_foils_and_partners_may_differ():
    one, two = (
        {"metric": "logit_difference", "foil": foil, "other_subject": foil} for foil in ("a", "b")
    )
    assert AverageTrace([made(settings=one), made(settings=two)])


def test_a_role_that_does_not_exist():
    assert role_number("last") == 5
    with pytest.raises(
        SettingError, match="role='first': expected 'first subject', 'middle subject'"
    ):
        role_number("first")
