"""A layer card says what its numbers say: means, intervals, the layer to edit, and whether the
trace would have told.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from engram import LayerCard
from engram.bootstrap import Mean, spearman
from engram.cli import show
from engram.errors import EngramFileError, SettingError
from engram.layers.card import EditOutcome, Evidence, ranges
from tests.helpers.damage import check_equal_or_refused, damaged_texts, flipped
from tests.helpers.layer_samples import FACT, card

# --- what follows from the numbers ----------------------------------------------------------------


def test_a_row_is_a_mean_over_facts_with_the_interval_of_resampled_facts():
    draw = np.random.default_rng(0)
    scores = draw.uniform(0.2, 0.8, (200, 3))
    for row, column in zip(card(scores).rows, scores.T, strict=True):
        error = (
            1.96 * column.std() / np.sqrt(len(column))
        )  # what a bootstrap of many facts comes to
        assert row.score.mean == pytest.approx(column.mean())
        assert row.score.low == pytest.approx(column.mean() - error, abs=0.15 * error)
        assert row.score.high == pytest.approx(column.mean() + error, abs=0.15 * error)
        assert (row.efficacy, row.paraphrase, row.neighbourhood, row.trace) == (
            1.0,
            0.5,
            None,
            None,
        )


def test_layers_that_were_not_tried_have_effects_and_no_score():
    found = card([[0.5, 0.9]], [[0.3, 0.2, 0.1]], layers=[0, 2])
    assert [row.score is None for row in found.rows] == [False, True, False]
    assert [row.trace.mean for row in found.rows] == pytest.approx([0.3, 0.2, 0.1])
    assert found.layers_tested == [0, 2] and found.best == 2


def test_the_best_layer_has_the_highest_mean_and_of_equal_ones_is_the_first():
    assert card([[0.1, 0.9, 0.4], [0.9, 0.3, 0.6]]).best == 1
    assert card([[0.1, 0.5, 0.5]]).best == 1


def test_a_layer_is_as_good_where_its_difference_fact_by_fact_may_be_none():
    facts = [[0.5 + 0.02 * i, 0.4 + 0.02 * i, 0.49 + 0.02 * i + 0.1 * (-1) ** i] for i in range(20)]
    found = card(facts)
    assert found.best == 0
    assert found.tied_with_best == [0, 2], (
        "layer 1 is behind by little, but always; layer 2 by less on average, and not always"
    )
    assert (
        "layer 2 cannot be distinguished from it" in found.reason()
        and "20 facts, 3 of 3 layers" in found.reason()
    )
    assert "no ties" in card([[0.1, 0.9]] * 3).reason()


def test_several_layers_are_the_best_window_around_the_best_layer():
    draw = np.random.default_rng(1)
    for _ in range(20):
        scores = draw.random((4, 9))
        found, mean = card(scores), scores.mean(0)
        for count in range(1, 10):
            windows = [list(range(first, first + count)) for first in range(9 - count + 1)]
            around = [window for window in windows if found.best in window]
            assert found.layers(count) == max(around, key=lambda window: mean[window].mean())


def test_a_layer_between_tried_ones_counts_as_the_line_between_them():
    found = card([[0.2, 0.9, 0.8]], layers=[0, 3, 6], n_layers=8)
    assert found.layers(2) == [3, 4] and found.layers(4) == [3, 4, 5, 6]


def test_of_windows_that_are_equally_good_the_deepest_is_taken():
    assert card([[0.5, 0.5, 0.9, 0.5, 0.5]]).layers(3) == [2, 3, 4]


@pytest.mark.parametrize("count", [0, 4])
def test_more_layers_than_there_are(count):
    with pytest.raises(SettingError, match=f"count={count}: m has 3 layers; expected 1 to 3"):
        card([[0.1, 0.2, 0.3]]).layers(count)


def test_rank_correlation_is_that_of_counted_ranks():
    draw = np.random.default_rng(2)
    for _ in range(20):
        a, b = draw.integers(0, 5, 8), draw.integers(0, 5, 8)
        ranks = [np.array([(x < y).sum() + (x == y).sum() / 2 for y in x]) for x in (a, b)]
        assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_the_card_says_whether_the_trace_would_have_told():
    scores = [[0.1, 0.5, 0.9], [0.2, 0.6, 0.8]]
    assert card(scores, [[0.0, 0.1, 0.3]] * 2).trace_correlation == Mean(
        pytest.approx(1), pytest.approx(1), pytest.approx(1)
    )
    assert card(scores, [[0.3, 0.1, 0.0]] * 2).trace_correlation.mean == pytest.approx(-1)
    assert card(scores, [[0.0, 0.0, 0.0]] * 2).trace_correlation is None, (
        "a flat curve has no ranks"
    )
    assert card(scores).trace_correlation is None and card(scores).attribution_correlation is None
    assert card(scores, [[0.3, 0.1, 0.0], [0.0, 0.1, 0.2]]).own_trace_hits == (1, 2)
    told = list(card(scores, [[0.3, 0.1, 0.0], [0.0, 0.1, 0.2]]).advice())
    assert any("1 of 2 (by chance about 0.7)" in line for line in told)


def test_a_card_compares_the_same_facts_at_the_same_layers():
    one, two = (
        Evidence(FACT, edits={0: EditOutcome(0.5)}),
        Evidence(FACT, edits={1: EditOutcome(0.5)}),
    )
    made = card([[0.1]])
    with pytest.raises(SettingError, match="every fact has to be edited at the same ones"):
        replace(made, evidence=(one, two))
    with pytest.raises(SettingError, match="at least one fact that was edited"):
        replace(made, evidence=(Evidence(FACT, (0.1,)),))
    assert replace(made, evidence=(one, Evidence(FACT, (0.1,)))).edited == [one], (
        "a fact may be traced only"
    )


def test_layers_in_words():
    assert (
        ranges([3]) == "layer 3"
        and ranges([2, 1]) == "layers 1, 2"
        and ranges([0, 2, 3, 4]) == "layers 0, 2 to 4"
    )


# --- as a file ------------------------------------------------------------------------------------


def test_a_saved_card_is_the_card(tmp_path):
    made = card([[0.5, 0.9]], [[0.3, 0.2, 0.1]], layers=[0, 2])
    assert LayerCard.load(made.save(tmp_path / "card.json")) == made
    record = json.loads(made.to_json())
    assert record["best"] == 2 and record["rows"][2]["score"]["mean"] == 0.9, (
        "for readers without this library"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_a_card_of_a_large_model_is_small():
    draw = np.random.default_rng(0)
    large = card(draw.random((30, 48)).round(6), draw.random((30, 48)).round(6))
    assert len(large.to_json()) < 100_000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("{", "no JSON that can be read"),
        ("[]", "expected an object"),
        ('{"format_version": 2}', "format_version=2, this engram reads 1"),
        ('{"format_version": 1}', "model is missing"),
    ],
)
def test_a_file_that_is_no_card(text, told, tmp_path):
    path = tmp_path / "card.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EngramFileError, match=told) as error:
        LayerCard.load(path)
    assert "Make one with engram.layer_card" in str(error.value)


def test_any_value_of_a_card_may_be_wrong(tmp_path):
    made, path = card([[0.5, 0.9]], [[0.3, 0.2, 0.1]], layers=[0, 2]), tmp_path / "card.json"
    made.save(path)
    for how, text in damaged_texts(json.loads(path.read_text(encoding="utf8"))):
        path.write_text(text, encoding="utf8")
        check_equal_or_refused(lambda: LayerCard.load(path), made, path, how)
    data = (made.to_json() + "\n").encode()
    for changed in flipped(data, 300):
        path.write_bytes(changed)
        check_equal_or_refused(lambda: LayerCard.load(path), made, path, "flipped")


def test_a_card_of_an_older_engram_is_read_with_a_note(tmp_path, caplog):
    made, path = card([[0.5, 0.9]]), tmp_path / "card.json"
    path.write_text(json.dumps(made.to_dict()), encoding="utf8")
    assert LayerCard.load(path) == made
    assert "has no checksum" in caplog.text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"n_layers": 2}, r"edits at layers \[0, 2\] of 2"),
        ({"n_layers": 4}, r"a trace needs an effect for each of 4 layers"),
        ({"traces": {}}, r"traces.window=None, expected the number of layers"),
        ({"evidence": []}, r"at least one fact that was edited"),
        ({"seconds": -1}, r"seconds=-1, expected at least 0"),
    ],
)
def test_parts_of_a_card_fit_each_other(fields, told, tmp_path):
    made, path = card([[0.5, 0.9]], [[0.3, 0.2, 0.1]], layers=[0, 2]), tmp_path / "card.json"
    path.write_text(json.dumps(made.to_dict() | fields), encoding="utf8")
    with pytest.raises(EngramFileError, match=told):
        LayerCard.load(path)


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(EngramFileError, match="could not write"):
        card([[0.1]]).save(tmp_path / "no" / "card.json")


# --- as a picture and in a terminal ---------------------------------------------------------------


def test_the_picture_shows_the_means():
    made = card([[0.5, 0.9, 0.1], [0.7, 0.8, 0.2]], [[0.3, 0.2, 0.1]] * 2, model="org/a_$model")
    left, right = made.plot().axes
    assert [line.get_label() for line in left.lines[:1]] == ["traced"]
    assert list(left.lines[0].get_ydata()) == pytest.approx([0.3, 0.2, 0.1])
    curves = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert curves["score"] == pytest.approx([0.6, 0.85, 0.15]) and curves["efficacy"] == [1.0] * 3
    assert "neighbourhood" not in curves, "which was not measured"


@pytest.mark.parametrize("traces", [None, [[-0.1, -0.2]]])
def test_a_card_without_traces_or_effects_has_its_picture_and_table(traces, tmp_path):
    made = card([[0.5, 0.9]], traces, n_layers=2)
    made.plot().savefig(tmp_path / "card.png")
    show.show_layer_card(made)


def test_the_table_points_at_the_best_layer(capsys):
    show.show_layer_card(card([[0.5, 0.9, 0.1]] * 3, [[0.3, 0.2, 0.1]] * 3, model="a[b]"))
    told = capsys.readouterr().out
    assert "a[b], 3 layers; edits by rome of 3 facts" in told
    (row,) = (line for line in told.splitlines() if "→ 1" in line)
    assert "+0.200" in row and "0.900" in row and "100%" in row
    assert (
        "layer 1: edits there have the highest mean score" in told
        and "rank correlation over layers" in told
    )
