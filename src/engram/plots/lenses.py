"""Pictures of what states and memories say in the vocabulary: a lens, the refinement of a
prediction, firing neurons.

The lens' layout (tokens across, layers up, top token in each cell) is that of nostalgebraist's
logit lens, 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

from engram.checks import one_of, position_in
from engram.plots.style import STYLE, font, layer_ticks, plain

if TYPE_CHECKING:
    from engram.locate.lenses.lens import LogitLens
    from engram.locate.lenses.memories import Memories
    from engram.locate.lenses.refinement import Refinement

Shade = Literal["probability", "answer", "rank", "entropy", "kl"]

_SHADES: dict[
    Shade, tuple[str, str, Callable[[LogitLens], np.ndarray]]
] = {  # what is coloured -> colours, legend, numbers
    "probability": ("Purples", "p(top token)", lambda lens: lens.top_probabilities[..., 0].numpy()),
    "answer": ("Purples", "p(next token)", lambda lens: lens.probability.numpy()),
    "rank": ("Purples_r", "rank of next token", lambda lens: lens.rank.numpy()),
    "entropy": ("YlOrBr", "entropy (nats)", lambda lens: lens.entropy.numpy()),
    "kl": ("YlOrBr", "KL to output (nats)", lambda lens: lens.kl.numpy()),
}
_LEGEND: Any = {"handlelength": 1.2, "handletextpad": 0.5, "columnspacing": 1.2}
_ATTENTION, _MLP, _BOTH = (
    "#c44e52",
    "#55a868",
    "#8c6d46",
)  # red and green as in traces, and their mixture


# -- lens ------------------------------------------------------------------------------------------


def plot_lens(
    lens: LogitLens, shade: Shade = "probability", positions: Sequence[int] | None = None
) -> Figure:
    """Heat map of a lens: tokens across, layers up, each state's most probable token in its cell.

    Bold: the token is the one that comes next (written above its column). The line is where a
        column settles: above it the
    top token never changes again.

    Args:
        shade: what colours mean: "probability" of the top token; "answer" or "rank": probability or
            rank of the next token; "entropy" of the distribution; "kl": its distance from the
            model's output.
        positions: tokens to draw; default: all.
    Raises:
        SettingError: another shade, or a position that the text does not have.
    """
    one_of("shade", shade, _SHADES)
    colours, legend, numbers = _SHADES[shade]
    columns = [
        position_in(at, len(lens.tokens))
        for at in (range(len(lens.tokens)) if positions is None else positions)
    ]
    cells = [
        [plain(_short(lens.top(row, at)[0][0])) for at in columns] for row in range(len(lens.rank))
    ]
    labels = (
        [plain(_short(lens.tokens[at])) for at in columns],
        [plain(_short(lens.answers[at])) for at in columns],
    )
    longest = max(len(text) for row in (*cells, *labels) for text in row)
    width = min(0.95, max(0.42, 0.055 * longest + 0.08))
    with rc_context(STYLE):
        size = (width * len(columns) + 1.3, 0.22 * len(cells) + 1.0)
        figure = Figure(figsize=(max(3.2, size[0]), size[1]), dpi=200, layout="constrained")
        ax = figure.subplots()
        values = numbers(lens)[:, columns]
        mesh = ax.pcolormesh(values, cmap=colours, norm=_scale(shade, values))
        ink = mesh.to_rgba(values)[..., :3] @ np.array([0.299, 0.587, 0.114])
        for row, texts in enumerate(cells):
            for column, text in enumerate(texts):
                hit = int(lens.top_ids[row, columns[column], 0]) == int(
                    lens.answer_ids[columns[column]]
                )
                ax.text(
                    column + 0.5,
                    row + 0.5,
                    text,
                    ha="center",
                    va="center",
                    color="white" if ink[row, column] < 0.55 else "black",
                    fontproperties=font([text], _fitting(text, width), "bold" if hit else "normal"),
                )
        settled = [int(lens.settled[at]) for at in columns]
        ax.stairs(settled, range(len(columns) + 1), baseline=None, color="black", linewidth=0.9)
        _label(ax, lens, labels, width)
        figure.colorbar(mesh, ax=ax, pad=0.01, aspect=30, label=legend)
    return figure


def _label(ax: Axes, lens: LogitLens, labels: tuple[list[str], list[str]], width: float) -> None:
    rows = lens.labels()
    shown = [0, *(1 + layer for layer in layer_ticks(lens.n_layers))]
    ax.set_yticks([row + 0.5 for row in shown], [rows[row] for row in shown])
    ax.set_ylabel("layer")
    top = ax.secondary_xaxis("top")
    for axis, texts in ((ax, labels[0]), (top, labels[1])):
        axis.set_xticks([at + 0.5 for at in range(len(texts))], texts)
        axis.tick_params(length=0)
        for tick, text in zip(axis.get_xticklabels(), texts, strict=True):
            tick.set_fontproperties(font([text], _fitting(text, width)))
    top.set_xlabel("next token")
    kind = "last norm applied" if lens.norm else "raw states"
    ax.set_xlabel(
        f"logit lens of {plain(PurePath(lens.model).name)}, {kind}; above the line the top token stays"
    )


def _scale(shade: Shade, values: np.ndarray) -> Normalize:
    if shade == "rank":
        return LogNorm(1, max(2, float(values.max())))
    if (
        shade == "kl"
    ):  # the embedding's row is far from everything: the others keep their differences
        return PowerNorm(0.5, 0, max(1e-6, float(values.max())))
    return Normalize(0, 1 if shade in ("probability", "answer") else max(1e-6, float(values.max())))


def _short(token: str, most: int = 14) -> str:
    """A token as it stands in a cell: without its leading space, its end cut where it is long."""
    text = token.strip(" ") or "␣" * len(token)
    return text if len(text) <= most else text[: most - 1] + "…"


def _fitting(text: str, width: float) -> float:
    """Type size (points) at which a text fits into a cell of that many inches."""
    return max(3.0, min(6.5, 72 * (width - 0.05) / (0.62 * max(1, len(text)))))


# -- refinement ------------------------------------------------------------------------------------


def plot_refinement(found: Refinement, position: int = -1) -> Figure:
    """Probability and rank of the answer along the residual stream at one position, and who changed
    the top token, block by block.

    Args:
        position: token whose stream is drawn in the first two panels; the bars count all positions.
    """
    layers = len(found.rank["leaving"])
    answer = plain(found.answers[position].strip())
    with rc_context(STYLE):
        figure = Figure(
            figsize=(max(3.6, min(8.0, 0.18 * layers + 2.2)), 4.6), dpi=200, layout="constrained"
        )
        chance, rank, bars = figure.subplots(3, 1, sharex=True, height_ratios=[1.0, 1.0, 0.9])
        for ax, table in ((chance, found.probability), (rank, found.rank)):
            _stream(
                ax,
                *(table[point][:, position].numpy() for point in ("entering", "middle", "leaving")),
            )
        chance.set_ylim(-0.03, 1.03)
        chance.set_ylabel(f"p({answer})", fontproperties=font([answer]))
        title = plain(f"at token {found.tokens[position]!r}")
        chance.set_title(title, loc="left", fontproperties=font([title]))
        rank.set_yscale("log")
        rank.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        rank.set_ylim(max(10.0, rank.get_ylim()[1]), 0.8)
        rank.set_ylabel(f"rank of {answer}", fontproperties=font([answer]))
        _who(bars, found)
        ticks = layer_ticks(layers)
        bars.set_xticks(list(ticks), [str(tick) for tick in ticks])
        bars.set_xlabel(f"layer of {plain(PurePath(found.model).name)}")
        for ax in (chance, bars):  # above the axes, where no line or bar can be
            ax.legend(
                loc="lower right",
                bbox_to_anchor=(1.02, 0.98),
                ncols=3,
                frameon=False,
                borderpad=0,
                **_LEGEND,
            )
        for ax in (chance, rank, bars):
            ax.spines[["top", "right"]].set_visible(False)
    return figure


def _stream(ax: Axes, entering: np.ndarray, middle: np.ndarray, leaving: np.ndarray) -> None:
    """One line through all points; each half of a block is drawn in the colour of the part that
    makes the step.
    """
    ax.plot([-0.5], entering[:1], color="grey", marker="o", markersize=2)
    for layer in range(len(leaving)):
        steps = (
            ([layer - 0.5, layer], [entering[layer], middle[layer]], _ATTENTION, "attention"),
            ([layer, layer + 0.5], [middle[layer], leaving[layer]], _MLP, "MLP"),
        )
        for x, y, colour, part in steps:
            name = None if layer else f"step of {part}"
            ax.plot(
                x,
                y,
                color=colour,
                marker="o",
                markersize=2,
                markevery=[1],
                linewidth=1.4,
                label=name,
            )


def _who(ax: Axes, found: Refinement) -> None:
    attention, mlp = found.changed_by_attention, found.changed_by_mlp
    parts = (
        ("attention", attention & ~mlp, _ATTENTION),
        ("both", attention & mlp, _BOTH),
        ("MLP", mlp & ~attention, _MLP),
    )
    below = np.zeros(len(mlp))
    for name, table, colour in parts:
        share = table.double().mean(1).numpy()
        ax.bar(range(len(share)), share, bottom=below, width=0.7, color=colour, label=name)
        below = below + share
    ax.set_ylim(0, 1)
    ax.set_ylabel("top token changes")
    ax.set_title(f"at all {len(found.tokens)} positions", loc="left")


# -- memories --------------------------------------------------------------------------------------


def plot_memories(found: Memories, words: int = 7) -> Figure:
    """Firing neurons, strongest on top: bars of strength with the coefficient's sign, and the
    tokens each pushes towards.

    Args:
        words: tokens written beside each bar.
    """
    texts = [
        "   ".join(plain(_short(token)) for token, _ in each.pushes[:words])
        for each in found.neurons
    ]
    names = [str(each.value.neuron) for each in found.neurons]
    strengths = [
        each.strength if each.coefficient >= 0 else -each.strength for each in found.neurons
    ]
    with rc_context(STYLE):
        height = 0.19 * len(names) + 0.75
        beside = 0.053 * max(len(text) for text in texts) + 0.2
        figure = Figure(figsize=(2.6 + beside, height), dpi=200, layout="constrained")
        bars, ax = figure.subplots(1, 2, sharey=True, width_ratios=[2.6, beside])
        bars.barh(
            range(len(names)),
            strengths,
            height=0.7,
            color=[_MLP if s >= 0 else _ATTENTION for s in strengths],
        )
        bars.axvline(0, color="black", linewidth=0.5)
        bars.set_yticks(range(len(names)), names)
        bars.invert_yaxis()
        bars.set_ylabel(f"neuron of layer {found.layer}")
        bars.set_xlabel("coefficient × length of value vector")
        title = plain(f"at token {found.token!r}{found.note()}")
        bars.set_title(title, loc="left", fontproperties=font([title]))
        bars.spines[["top", "right"]].set_visible(False)
        ax.set_axis_off()
        ax.set_xlim(0, 1)
        ax.set_title("pushes towards", loc="left")
        for row, text in enumerate(texts):
            ax.text(0, row, text, va="center", fontproperties=font([text]))
    return figure
