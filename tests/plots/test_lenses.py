"""Pictures of lenses, refinements and memories show the numbers they are given, whatever the tokens
look like.
"""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

import engram
from engram.errors import SettingError
from engram.locate.lenses.memories import Memories, Memory, ValueVector
from engram.plots.style import plain
from tests.helpers.tiny import tiny_lm

TEXT = "The tower of Rome"
STRANGE = [
    "$5",
    " $",
    "\n",
    "\t",
    "Москва",
    " Ωδ",
    "中文",
    "🙂",
    "�",
    " ",
    "",
    "x" * 40,
    "\x00",
    "[/red]",
    r"\frac",
    "^",
    "_{",
]


@pytest.fixture(scope="module")
def read():
    return engram.lens(tiny_lm(), TEXT)


@pytest.fixture(scope="module")
def refined():
    return engram.refinement(tiny_lm(), TEXT)


def cells(ax):
    return [text for text in ax.texts if text.get_position()[0] % 1 == 0.5]


SHADES = {
    "probability": lambda lens: lens.top_probabilities[..., 0],
    "answer": lambda lens: lens.probability,
    "rank": lambda lens: lens.rank,
    "entropy": lambda lens: lens.entropy,
    "kl": lambda lens: lens.kl,
}


@pytest.mark.parametrize("shade", SHADES)
def test_colours_are_the_numbers_asked_for(read, shade):
    ax = read.plot(shade).axes[0]
    shown = ax.collections[0].get_array().reshape(read.rank.shape)
    assert np.array_equal(shown, SHADES[shade](read).numpy())
    assert not ax.yaxis_inverted(), "the embedding is at the bottom"


def test_every_cell_holds_its_top_token_bold_where_it_comes_next(read):
    ax = read.plot().axes[0]
    shown = {(int(y), int(x)): text for text in cells(ax) for x, y in [text.get_position()]}
    assert len(shown) == read.rank.numel()
    for (row, at), text in shown.items():
        token = read.top(row, at)[0][0]
        assert text.get_text() == plain(token.strip(" ") or "␣" * len(token))
        assert text.get_fontproperties().get_weight() == (
            "bold" if read.rank[row, at] == 1 else "normal"
        )


def test_tokens_stand_below_and_next_tokens_above(read):
    ax = read.plot(positions=[1, -1]).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        plain(read.tokens[at].strip(" ")) for at in (1, -1)
    ]
    above = ax.child_axes[0].get_xticklabels()
    assert [label.get_text() for label in above] == [
        plain(read.answers[at].strip(" ")) for at in (1, -1)
    ]
    assert len(cells(ax)) == 2 * len(read.rank)
    assert [label.get_text() for label in ax.get_yticklabels()] == read.labels()


def test_the_line_is_where_columns_settle(read):
    (line,) = read.plot().axes[0].patches
    assert line.get_data().values.tolist() == read.settled.tolist()


def test_strange_tokens_are_drawn_and_none_overlaps_its_cell(read, tmp_path):
    """Warnings are errors here: a letter without a picture, or an unfinished formula, would end the
    test.
    """
    names = dict.fromkeys(read.top_tokens, "")
    strange = {token: STRANGE[i % len(STRANGE)] for i, token in enumerate(names)}
    tokens = (STRANGE * 2)[: len(read.tokens)]
    figure = replace(
        read, top_tokens=strange, tokens=tokens, answers=tokens[::-1], model="a/$b$"
    ).plot()
    figure.savefig(tmp_path / "lens.png")
    figure.savefig(tmp_path / "lens.pdf")
    ax = figure.axes[0]
    left, right = (ax.transData.transform((x, 0))[0] for x in (0, 1))
    assert max(text.get_window_extent().width for text in cells(ax)) <= right - left


def test_what_no_font_has_is_escaped_and_dollars_are_literal():
    assert plain("a\nb\t$") == r"a\nb\t\$"
    assert plain("Москва Ω") == "Москва Ω"
    assert plain("\U0001f9a9\x07") == r"\U0001f9a9\x07", "a flamingo, and a bell"


def test_the_refinement_goes_through_every_point_in_order(refined):
    chance, rank, bars = refined.plot(position=2).axes
    for ax, table in ((chance, refined.probability), (rank, refined.rank)):
        drawn = [tuple(line.get_ydata()) for line in ax.lines if len(line.get_ydata()) == 2]
        entering, middle, leaving = (
            table[point][:, 2].tolist() for point in ("entering", "middle", "leaving")
        )
        wanted = [
            pair
            for steps in zip(entering, middle, leaving, strict=True)
            for pair in ((steps[0], steps[1]), (steps[1], steps[2]))
        ]
        assert np.allclose(drawn, wanted)
    assert rank.get_yscale() == "log" and rank.yaxis_inverted(), "the best rank is on top"
    either = (refined.changed_by_attention | refined.changed_by_mlp).double().mean(1)
    heights = np.array([patch.get_height() for patch in bars.patches]).reshape(3, -1)
    assert np.allclose(heights.sum(0), either), "attention, both and MLP are stacked"


def test_memories_are_bars_with_words_beside():
    def memory(neuron, coefficient):
        value = ValueVector(3, neuron, 2.0, True, ((" up", 2.0), ("$", 1.0)), ((" down", -3.0),))
        return Memory(coefficient, abs(coefficient) * 2, 0.1, value)

    found = Memories("a b", "some/model", 3, 1, " $b", True, (memory(9, 4.0), memory(5, -1.0)))
    bars, words = found.plot().axes
    assert [patch.get_width() for patch in bars.patches] == [8.0, -2.0]
    assert [label.get_text() for label in bars.get_yticklabels()] == [
        "9",
        "5",
    ] and bars.yaxis_inverted()
    assert [text.get_text() for text in words.texts] == [r"up   \$", "down"]
    assert bars.get_title("left") == r"at token ' \$b', before the norm of the MLP's output"


def test_pictures_are_written_and_no_global_setting_changes(read, refined, tmp_path):
    before = dict(matplotlib.rcParams)
    memories = engram.memories(tiny_lm(), TEXT, 1)
    for name, found in (("lens", read), ("refinement", refined), ("memories", memories)):
        for ending in ("png", "svg"):
            found.plot().savefig(tmp_path / f"{name}.{ending}")
    assert dict(matplotlib.rcParams) == before


def test_models_with_many_layers_number_every_fifth(read):
    rows = 49
    tables = {
        name: getattr(read, name)[:1].repeat(rows, *[1] * (getattr(read, name).dim() - 1))
        for name in ("top_ids", "top_probabilities", "probability", "rank", "entropy", "kl")
    }
    ax = replace(read, **tables).plot().axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "in",
        *map(str, range(0, 42, 5)),
    ]


def test_a_flat_table_is_drawn(read, refined):
    assert replace(read, kl=torch.zeros_like(read.kl)).plot("kl")
    ones = {point: torch.ones_like(table) for point, table in refined.rank.items()}
    assert replace(refined, rank=ones).plot()


def test_mistakes_are_explained(read, refined):
    with pytest.raises(SettingError, match="shade='loss': expected 'probability', 'answer'"):
        read.plot("loss")
    with pytest.raises(SettingError, match="position=99: the text has"):
        read.plot(positions=[99])
    with pytest.raises(SettingError, match="position=99: the text has"):
        refined.plot(99)
