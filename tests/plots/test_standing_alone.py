"""Every picture says what it shows; nothing in it is cut or covers something else, whatever the
words.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import engram
from engram.cli import show
from engram.locate.average import AverageTrace
from engram.locate.captions import marked
from engram.locate.trace import CausalTrace
from engram.plots.curves import Curve
from engram.plots.layer_cards import LayerChoice, plot_layer_card
from engram.plots.style import plain
from tests.helpers.tiny import tiny_lm

WORDS = {
    "plain": ["The", " Space", " Needle", " is", " in"],
    "mathematics": ["$x_{1}$", " $", " \\frac", " _^", " 5$"],
    "breaks": ["a\n", "\tb", "\r", "\x00", "\x1b[31m"],
    "scripts": ["東京タワー", "🙂🙂", " Москва", "שלום", " é"],
    "long": ["x" * 200, " y" * 90, "z", "w" * 70, "v"],
    "markup": ["[red]", "[/]", "{}", "%s", "&lt;"],
}
MODELS = ["gpt2", "org/a_$very$_long_name-of-a-model-70B-instruct-v0.3-with-parts-of-no-end"]


def made(tokens, model="gpt2", layers=12, low=0.1, high=0.9, top=0.8, **fields):
    generator = torch.Generator().manual_seed(0)
    shape = (len(tokens), layers)
    shares = {"residual": 1.0, "mlp": 0.5, "attention": 0.2}
    about = {
        "prompt": "".join(tokens),
        "subject": "".join(tokens[1:3]).strip(" "),
        "answer": tokens[-1],
        "tokens": list(tokens),
        "positions": list(range(len(tokens))),
        "subject_range": (1, 3),
        "corrupted": [1, 2],
        "scores": {
            s: low + top * k * torch.rand(shape, generator=generator) for s, k in shares.items()
        },
        "low_score": low,
        "high_score": high,
        "window": 5,
        "samples": 10,
        "model": model,
        "last": len(tokens) - 1,
    }
    return CausalTrace(**about | fields)


def texts(figure):
    """Return (text, its box) of everything that is written around the axes."""
    FigureCanvasAgg(figure).draw()
    written = [figure._suptitle, figure._supxlabel]
    for ax in figure.axes:
        written += [ax.title, ax._left_title, ax._right_title, ax.xaxis.label, ax.yaxis.label]
        # matplotlib makes ticks beyond the axes too, and draws none of them
        written += [tick.label1 for axis in (ax.xaxis, ax.yaxis) for tick in axis._update_ticks()]
    return [
        (text.get_text(), text.get_window_extent())
        for text in written
        if text is not None and text.get_text() and text.get_visible()
    ]


def check(figure):
    """Check that all texts are inside the picture and that none covers another."""
    boxes = texts(figure)
    width, height = figure.bbox.size
    for text, box in boxes:
        assert box.x0 >= -2 and box.x1 <= width + 2, f"{text!r} is cut at a side"
        assert box.y0 >= -2 and box.y1 <= height + 2, f"{text!r} is cut above or below"
    for i, (text, box) in enumerate(boxes):
        for other, there in boxes[:i]:
            overlap = box.padded(-1).overlaps(there.padded(-1)) if box.width > 3 else False
            assert not overlap, f"{text!r} covers {other!r}"
    return "\n".join(text for text, _ in boxes)


def severed(trace):
    table = trace.scores["residual"]
    ends = {"": 1.0, ", mlp severed": 0.8, ", attention severed": 0.9}
    return replace(trace, scores={f"residual{end}": table * k for end, k in ends.items()})


DRAW = {
    "all sites": lambda trace: trace.plot(),
    "one site": lambda trace: trace.plot("mlp"),
    "own scales": lambda trace: trace.plot(shared_scale=False),
    "severed": lambda trace: severed(trace).plot_severed(),
    "severed maps": lambda trace: severed(trace).plot(),
    "average": lambda trace: AverageTrace([trace, trace]).plot(),
    "lines": lambda trace: AverageTrace([trace, trace]).plot_lines(),
    "average severed": lambda trace: AverageTrace([severed(trace)] * 2).plot_severed(),
}


@pytest.mark.slow  # 48 pictures
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("picture", DRAW)
def test_nothing_is_cut_or_covered_whatever_the_words(picture, words):
    check(DRAW[picture](made(WORDS[words], MODELS[len(words) % 2])))


@pytest.mark.parametrize("picture", DRAW)
def test_a_picture_names_prompt_subject_answer_and_model(picture):
    written = check(DRAW[picture](made(WORDS["plain"])))
    assert "The [Space Needle] is in → in" in written
    assert "gpt2" in written and "0.900" in written and "0.100" in written


@pytest.mark.parametrize("tokens", [300, 3000])
def test_long_prompts_are_drawn(tokens):
    figure = made([f" t{i}" for i in range(tokens)], layers=3).plot("mlp")
    written = check(figure)
    assert "[t1 t2]" in written and max(figure.get_size_inches()) * figure.dpi < 2**16


@pytest.mark.parametrize("tokens", [3, 400])
def test_a_lens_has_a_heading_and_its_cells_do_not_overlap(tokens):
    read = engram.lens(tiny_lm(), "The tower of Rome")
    times = -(-tokens // len(read.tokens))
    tables = ("top_ids", "top_probabilities", "probability", "rank", "entropy", "kl")
    wide = replace(
        read,
        text=" ".join(["word"] * tokens),
        tokens=(read.tokens * times)[:tokens],
        answers=(read.answers * times)[:tokens],
        answer_ids=read.answer_ids.repeat(times)[:tokens],
        settled=read.settled.repeat(times)[:tokens],
        **{name: torch.cat([getattr(read, name)] * times, 1)[:, :tokens] for name in tables},
    )
    figure = wide.plot()
    assert max(figure.get_size_inches()) * figure.dpi < 2**16
    ax = figure.axes[0]
    FigureCanvasAgg(figure).draw()
    left, right = (ax.transData.transform((x, 0))[0] for x in (0, 1))
    assert max(text.get_window_extent().width for text in ax.texts) <= 1.02 * (right - left)
    assert figure._suptitle.get_text().startswith("word")


def test_lenses_name_text_answer_and_model():
    lm = tiny_lm()
    name = plain(lm.name.rpartition("/")[2])
    for value in (
        engram.lens(lm, "The tower of Rome"),
        engram.refinement(lm, "The tower of Rome"),
        engram.memories(lm, "The tower of Rome", 1),
    ):
        heading = value.plot()._suptitle.get_text()
        assert heading.startswith("The tower of Rome") and name in heading


def test_a_layer_card_has_a_heading():
    curve = Curve(range(30), np.linspace(0, 1, 30), None, None, "score", "#000000")
    choice = LayerChoice(30, 3, [3, 4])
    titles = ("Effect of restoring 10 MLPs at the subject's last token " * 2, "Edits " * 30)
    figure = plot_layer_card(
        [curve], [curve], choice, titles=titles, model="m_$" * 30, heading=("Which layer",)
    )
    assert "Which layer" in check(figure)


# -- where there is no effect ----------------------------------------------------------------------

NOTHING = {
    "unknown": ({"low": 0.0004, "high": 0.0004}, "the model does not know this fact (p 0.000)"),
    "not by the subject": ({"low": 0.5, "high": 0.503}, "p is 0.503, and 0.500 with the subject"),
    "better without": ({"low": 0.6, "high": 0.5}, "p is 0.500, and 0.600 with the subject"),
}


@pytest.mark.parametrize("case", NOTHING)
def test_where_there_is_no_effect_colours_stay_pale_and_a_warning_says_so(case, capsys):
    scores, warning = NOTHING[case]
    trace = made(WORDS["plain"], top=0.002, **scores)
    figure = trace.plot()
    assert f"no effect: {warning}" in check(figure)
    for ax in figure.axes[:3]:
        mesh = ax.collections[0]
        low, high = mesh.get_clim()
        assert high - low >= 0.05 and mesh.get_array().max() <= low + 0.1 * (high - low)
    show.show_trace(trace)
    printed = capsys.readouterr().out
    assert f"no effect: {warning}" in printed and not set("▒▓█") & set(printed)
    average = AverageTrace([trace] * 3)
    show.show_average(average)
    assert "no effect: " in check(average.plot()) and "no effect: " in capsys.readouterr().out


def test_where_there_is_an_effect_nothing_is_said(capsys):
    trace = made(WORDS["plain"])
    show.show_trace(trace)
    assert trace.caveat == "" and "no effect" not in check(trace.plot()) + capsys.readouterr().out


@pytest.mark.parametrize("metric", ["log_probability", "logit_difference"])
def test_other_metrics_have_thresholds_of_their_own(metric):
    settings = {"metric": metric, "foil": " Rome"}
    trace = made(WORDS["plain"], low=-9.0, high=-8.95, top=0.05, settings=settings)
    assert trace.caveat.startswith("no effect: the score is -8.950")
    low, high = trace.plot().axes[0].collections[0].get_clim()
    assert high - low == pytest.approx(0.5)
    assert replace(trace, high_score=-1.0).caveat == ""


# -- in the terminal -------------------------------------------------------------------------------


def lines_of(trace, **settings):
    return show.heat_maps(trace, **settings).renderables[-1].plain.splitlines()


@pytest.mark.parametrize(
    ("layers", "ticks"),
    [
        (1, "0"),
        (8, "0 1 2 3 4 5 6 7"),
        (12, "0   2   4   6   8   10"),
        (30, "0    5    10   15   20   25"),
        (48, "0    5    10   15   20   25   30   35   40   45"),
        (120, "0    5    10   15   20"),
    ],
)
def test_layers_are_numbered_below_a_map(layers, ticks):
    *_, below = lines_of(made(WORDS["plain"], layers=layers))
    assert below.strip().startswith(ticks)
    margin = len(below) - len(below.lstrip())
    wide = 2 if layers <= 16 else 1
    for number in below.split():
        at = below.index(f" {number}", margin - 1) + 1
        assert (at - margin) == int(number) * wide, "each below its column"


def test_maps_in_the_terminal_share_a_scale_too():
    trace = made(WORDS["plain"])
    assert "█" not in "".join(lines_of(trace)), "attention is a fifth of the strongest"
    assert "█" in "".join(lines_of(trace, shared_scale=False))


@pytest.mark.parametrize("words", WORDS)
def test_maps_in_the_terminal_have_one_line_a_token(words, capsys):
    trace = made(WORDS[words])
    lines = lines_of(trace)
    assert len(lines) == 1 + len(trace.tokens) + 1
    show.show_trace(trace)
    assert not set("\t\r\x00\x1b") & set(capsys.readouterr().out)


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("letters", [40, 60, 120])
def test_a_long_prompt_is_shortened_around_its_subject(letters):
    prompt = f"{'before ' * 40}the Space Needle {'after ' * 40}in"
    line = marked(prompt, "Space Needle", " Seattle", letters)
    assert len(line) <= letters + 4 and "[Space Needle]" in line and line.endswith("in → Seattle")


def test_the_last_mention_is_marked_where_that_is_corrupted():
    assert marked("a b a", "a", "c", 60, last=True) == "a b [a] → c"
    assert marked("a b a", "a", "c", 60) == "[a] b a → c"
    assert all(a != b for a, b in pairwise(marked("x" * 500, "x", "y", n) for n in (20, 30, 40)))
    assert not math.isnan(len(marked("", "s", "", 20)))
