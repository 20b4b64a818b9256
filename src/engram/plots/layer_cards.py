"""Picture of a layer card: what tracing says about each layer, and next to it how edits at each
layer went.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram.plots.style import STYLE, layer_ticks, plain

if TYPE_CHECKING:
    from engram.bootstrap import Mean
    from engram.layers.card import LayerCard

_TRACE, _SCORE = "#20a020", "#7261ab"
_SHARES = (
    ("efficacy", "#e8902a", "o"),
    ("paraphrase", "#3b7dd8", "s"),
    ("neighbourhood", "#8a8a8a", "^"),
)


def plot_layer_card(card: LayerCard) -> Figure:
    """Left: mean effects of tracing by layer. Right: mean score of edits by layer, with the shares
    it is made of.

    Bands are 95 % bootstrap intervals over facts. The best layer has a line, those that cannot be
    told from it are shaded.
    """
    with rc_context({**STYLE, "font.size": 8, "axes.titlesize": 8.5}):
        figure = Figure(figsize=(7.5, 2.7), dpi=200, layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True)
        _draw_effects(left, card)
        _draw_edits(right, card)
        for ax in (left, right):
            for layer in card.tied_with_best:
                ax.axvspan(layer - 0.5, layer + 0.5, color=_SCORE, alpha=0.08, linewidth=0)
            ax.axvline(card.best, color=_SCORE, linewidth=0.8, linestyle=":")
            ax.set_xlim(-0.5, card.n_layers - 0.5)
            ax.set_xticks(list(layer_ticks(card.n_layers)))
            ax.set_xlabel(f"layer of {plain(PurePath(card.model).name)}")
            ax.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_effects(ax: Axes, card: LayerCard) -> None:
    exact = {row.layer: row.trace for row in card.rows if row.trace is not None}
    estimated = {row.layer: row.attribution for row in card.rows if row.attribution is not None}
    if exact:
        _line(ax, exact, _TRACE, "traced")
    if estimated:
        _line(ax, estimated, _TRACE, "estimated", "--")
    ax.axhline(0, color="0.8", linewidth=0.6, zorder=0)
    ax.set_title(
        f"Effect of restoring {card.traces['window']} MLP{'s' * (card.traces['window'] > 1)} at the subject's last token"
    )
    ax.set_ylabel("indirect effect, probability")
    if exact or estimated:
        ax.legend(frameon=False)


def _draw_edits(ax: Axes, card: LayerCard) -> None:
    for name, colour, marker in _SHARES:
        shares = {
            row.layer: share for row in card.rows if (share := getattr(row, name)) is not None
        }
        if shares:
            ax.plot(
                list(shares),
                list(shares.values()),
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=0.7,
                label=name,
            )
    _line(ax, {row.layer: row.score for row in card.rows if row.score is not None}, _SCORE, "score")
    ax.set_ylim(-0.03, 1.03)
    ax.set_title(
        f"Edits by {plain(card.method)} at one layer, {len(card.edited)} fact{'s' * (len(card.edited) != 1)}"
    )
    ax.set_ylabel("score, share of prompts")
    ax.legend(frameon=False)


def _line(ax: Axes, means: dict[int, Mean], colour: str, label: str, style: str = "-") -> None:
    layers = list(means)
    ax.plot(
        layers,
        [each.mean for each in means.values()],
        style,
        color=colour,
        label=label,
        linewidth=1.4,
        zorder=3,
    )
    low, high = [each.low for each in means.values()], [each.high for each in means.values()]
    ax.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
