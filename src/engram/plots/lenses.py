"""Pictures of what states and memories say in the vocabulary: a table of tokens, the steps of a
prediction through the blocks, firing neurons.

Knows arrays, labels and titles. Refuses to know how they were read off a model.
The table's layout (tokens across, layers up, top token in each cell) is that of nostalgebraist's
logit lens, 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

from engram.plots.style import STYLE, add_heading, fitted, font, layer_ticks, plain
from engram.plots.words import shorten

Scale = Literal["share", "linear", "rank", "root"]

_WIDEST = 250.0  # inches of a table, 50,000 dots; matplotlib draws no more than 65,536
_LEGEND: Any = {
    "frameon": False,
    "borderpad": 0,
    "handlelength": 1.2,
    "handletextpad": 0.5,
    "columnspacing": 1.2,
}
_PARTS = {  # red and green as in traces, and their mixture
    "attention": "#c44e52",
    "MLP": "#55a868",
    "both": "#8c6d46",
}


# -- tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenTable:
    """Tokens across, layers up, a token in each cell.

    Attributes:
        values: [rows, columns] what the colours show; row 0 is at the bottom.
        cells: [rows][columns] the token written in each cell; bold: [rows, columns] those in bold.
        line: [columns] the row above which each column has a line.
        rows: names of the rows; row 0 and `layer_ticks` of the others are written.
        below, above: a token for each column.
        x_label: below the columns; bar_label: beside the colour bar.
        heading: lines above everything.
        colours, scale: a matplotlib colour map and its scale: "share" from 0 to 1, "linear" from 0,
            "rank" in logarithms from 1; "root": square root, where small differences stay visible
            next to a large one.
    """

    values: np.ndarray
    cells: Sequence[Sequence[str]]
    bold: np.ndarray
    line: Sequence[int]
    rows: Sequence[str]
    below: Sequence[str]
    above: Sequence[str]
    x_label: str
    bar_label: str
    colours: str = "Purples"
    scale: Scale = "share"
    heading: Sequence[str] = ()


def plot_token_table(table: TokenTable) -> Figure:
    """Draw the table; the type shrinks until every token fits into its cell."""
    widest = _WIDEST / len(table.below)
    # of a very long text, as much of a token as can be read in its column
    letters = max(1, min(14, int((widest - 0.05) * 72 / (0.62 * 3))))
    cells = [[plain(_short(token, letters)) for token in row] for row in table.cells]
    below, above = (
        [plain(_short(token, letters)) for token in row] for row in (table.below, table.above)
    )
    longest = max(len(text) for row in (*cells, below, above) for text in row)
    width = min(0.95, max(0.42, 0.055 * longest + 0.08), widest)
    with rc_context(STYLE):
        size = (width * len(below) + 1.3, 0.22 * len(cells) + 1.0)
        figure = Figure(figsize=(max(3.2, size[0]), size[1]), dpi=200, layout="constrained")
        ax = figure.subplots()
        norm = _norm(table.scale, table.values)
        mesh = ax.pcolormesh(table.values, cmap=table.colours, norm=norm)
        # how bright a cell is to the eye decides whether its letters are white (ITU-R BT.601)
        ink = mesh.to_rgba(table.values)[..., :3] @ np.array([0.299, 0.587, 0.114])
        for (row, column), brightness in np.ndenumerate(ink):
            text = cells[row][column]
            ax.text(
                column + 0.5,
                row + 0.5,
                text,
                ha="center",
                va="center",
                color="white" if brightness < 0.55 else "black",
                fontproperties=font(
                    [text], _fitting(text, width), "bold" if table.bold[row, column] else "normal"
                ),
            )
        ax.stairs(table.line, range(len(below) + 1), baseline=None, color="black", linewidth=0.9)
        labelled = [0, *(1 + layer for layer in layer_ticks(len(cells) - 1))]
        ax.set_yticks([row + 0.5 for row in labelled], [table.rows[row] for row in labelled])
        ax.set_ylabel("layer")
        top = ax.secondary_xaxis("top")
        for axis, texts in ((ax, below), (top, above)):
            axis.set_xticks([at + 0.5 for at in range(len(texts))], texts)
            axis.tick_params(length=0)
            for tick, text in zip(axis.get_xticklabels(), texts, strict=True):
                tick.set_fontproperties(font([text], _fitting(text, width)))
        top.set_xlabel("next token")
        ax.set_xlabel(plain(table.x_label))
        figure.colorbar(mesh, ax=ax, pad=0.01, aspect=30, label=table.bar_label)
        add_heading(figure, table.heading)
    return figure


def _norm(scale: Scale, values: np.ndarray) -> Normalize:
    if scale == "rank":
        return LogNorm(1, max(2, float(values.max())))
    top = max(1e-6, float(values.max()))
    return (
        PowerNorm(0.5, 0, top) if scale == "root" else Normalize(0, 1 if scale == "share" else top)
    )


def _short(token: str, letters: int = 14) -> str:
    """Return a token as written in a cell: without its leading space, shortened."""
    # a token of spaces only would be an empty cell, which looks as if nothing was predicted
    text = token.strip(" ") or "␣" * len(token)
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def _fitting(text: str, width: float) -> float:
    """Return the type size (points) at which a text fits into a cell of `width` inches."""
    # a letter is about 0.62 of its size wide; below 3 points nothing can be read, so it overflows
    return max(3.0, min(6.5, 72 * (width - 0.05) / (0.62 * max(1, len(text)))))


# -- streams ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """A number at three points of every block, [n_layers] each: where the residual stream enters
    it, after attention, and where it leaves.
    """

    entering: np.ndarray
    middle: np.ndarray
    leaving: np.ndarray


@dataclass(frozen=True)
class StreamWords:
    """The answer and the other words around `plot_streams`."""

    answer: str
    title: str
    changes_title: str
    x_label: str
    heading: Sequence[str] = ()


def plot_streams(
    probability: Stream, rank: Stream, changes: Mapping[str, np.ndarray], words: StreamWords
) -> Figure:
    """Draw the answer's probability and rank along the residual stream, and stacked bars of who
    changed the top token, block by block.

    Args:
        changes: "attention", "both" and "MLP", each [n_layers], shares of the positions.
    """
    layers = len(rank.leaving)
    answer = plain(shorten(words.answer, 16))
    with rc_context(STYLE):
        figure = Figure(
            figsize=(max(3.6, min(8.0, 0.18 * layers + 2.2)), 4.6), dpi=200, layout="constrained"
        )
        chances, ranks, bars = figure.subplots(3, 1, sharex=True, height_ratios=[1.0, 1.0, 0.9])
        _draw_stream(chances, probability)
        _draw_stream(ranks, rank)
        chances.set_ylim(-0.03, 1.03)
        chances.set_ylabel(f"p({answer})", fontproperties=font([answer]))
        title = fitted(words.title, figure.get_figwidth() / 2)
        chances.set_title(title, loc="left", fontproperties=font([title]))
        ranks.set_yscale("log")
        ranks.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        # upside down, so that up is better in both panels; 0.8 keeps rank 1 off the frame
        ranks.set_ylim(max(10.0, ranks.get_ylim()[1]), 0.8)
        ranks.set_ylabel(f"rank of {answer}", fontproperties=font([answer]))
        _draw_changes(bars, changes)
        bars.set_title(words.changes_title, loc="left")
        ticks = layer_ticks(layers)
        bars.set_xticks(list(ticks), [str(tick) for tick in ticks])
        bars.set_xlabel(plain(words.x_label))
        for ax in (chances, bars):  # above the axes, where no line or bar can be
            ax.legend(loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=3, **_LEGEND)
        for ax in (chances, ranks, bars):
            ax.spines[["top", "right"]].set_visible(False)
        add_heading(figure, words.heading)
    return figure


def _draw_stream(ax: Axes, stream: Stream) -> None:
    """Draw one line through all points; each half of a block has the colour of the part that makes
    the step.
    """
    entering, middle, leaving = stream.entering, stream.middle, stream.leaving
    ax.plot([-0.5], entering[:1], color="grey", marker="o", markersize=2)
    for layer in range(len(leaving)):
        steps = (
            ([layer - 0.5, layer], [entering[layer], middle[layer]], "attention"),
            ([layer, layer + 0.5], [middle[layer], leaving[layer]], "MLP"),
        )
        for x, y, part in steps:
            look: Any = {"color": _PARTS[part], "label": None if layer else f"step of {part}"}
            ax.plot(x, y, marker="o", markersize=2, markevery=[1], linewidth=1.4, **look)


def _draw_changes(ax: Axes, changes: Mapping[str, np.ndarray]) -> None:
    below = np.zeros(len(changes["MLP"]))
    for part in ("attention", "both", "MLP"):
        share = changes[part]
        ax.bar(range(len(share)), share, bottom=below, width=0.7, color=_PARTS[part], label=part)
        below = below + share
    ax.set_ylim(0, 1)
    ax.set_ylabel("top token changes")


# -- memories --------------------------------------------------------------------------------------


def plot_memories(
    neurons: Mapping[int, float],
    tokens: Sequence[Sequence[str]],
    *,
    title: str,
    y_label: str,
    heading: Sequence[str] = (),
) -> Figure:
    """Draw bars of strength with their sign, the first neuron on top, and tokens beside each.

    Args:
        neurons: number -> strength, negative where the neuron's value vector is subtracted.
        tokens: those to write beside each bar.
        heading: lines above everything.
    """
    texts = ["   ".join(plain(_short(token)) for token in row) for row in tokens]
    names, strengths = [str(neuron) for neuron in neurons], list(neurons.values())
    with rc_context(STYLE):
        height = 0.19 * len(names) + 0.75
        beside = 0.053 * max(len(text) for text in texts) + 0.2
        figure = Figure(figsize=(2.6 + beside, height), dpi=200, layout="constrained")
        bars, ax = figure.subplots(1, 2, sharey=True, width_ratios=[2.6, beside])
        bars.barh(
            range(len(names)),
            strengths,
            height=0.7,
            color=[_PARTS["MLP" if s >= 0 else "attention"] for s in strengths],
        )
        bars.axvline(0, color="black", linewidth=0.5)
        bars.set_yticks(range(len(names)), names)
        bars.invert_yaxis()
        bars.set_ylabel(y_label)
        bars.set_xlabel("coefficient × length of value vector")
        title = plain(title)
        bars.set_title(title, loc="left", fontproperties=font([title]))
        bars.spines[["top", "right"]].set_visible(False)
        ax.set_axis_off()
        ax.set_xlim(0, 1)
        ax.set_title("pushes towards", loc="left")
        for row, text in enumerate(texts):
            ax.text(0, row, text, va="center", fontproperties=font([text]))
        add_heading(figure, heading)
    return figure
