"""Picture of a layer card: effects of tracing by layer, and next to them how edits at each layer
went.

Knows curves, labels and titles. Refuses to know how they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram.plots.curves import Curve
from engram.plots.style import STYLE, add_heading, fitted, layer_ticks

_BEST = "#7261ab"


@dataclass(frozen=True)
class LayerChoice:
    """The layers that the picture points at: a line at `best`, a shade on each of `tied`."""

    n_layers: int
    best: int
    tied: Sequence[int]


def plot_layer_card(
    effects: Sequence[Curve],
    edits: Sequence[Curve],
    choice: LayerChoice,
    *,
    titles: tuple[str, str],
    model: str,
    heading: Sequence[str] = (),
) -> Figure:
    """Draw effects of tracing by layer on the left, scores of edits by layer on the right.

    Args:
        titles: of the two panels.
        model: name below both axes.
        heading: lines above both panels.
    """
    with rc_context({**STYLE, "font.size": 8, "axes.titlesize": 8.5}):
        figure = Figure(figsize=(7.5, 2.7), dpi=200, layout="constrained")
        # layers are shared, heights are not: an effect is a tenth of a score
        left, right = figure.subplots(1, 2, sharex=True)
        left.set_ylabel("indirect effect, probability")
        right.set_ylabel("score, share of prompts")
        for ax, curves, title in ((left, effects, titles[0]), (right, edits, titles[1])):
            for curve in curves:
                _draw(ax, curve)
            ax.set_title(fitted(title, 3.1, 8.5))
            if curves:
                ax.legend(frameon=False)
            for layer in choice.tied:
                ax.axvspan(layer - 0.5, layer + 0.5, color=_BEST, alpha=0.08, linewidth=0)
            ax.axvline(choice.best, color=_BEST, linewidth=0.8, linestyle=":")
            ax.set_xlim(-0.5, choice.n_layers - 0.5)
            ax.set_xticks(list(layer_ticks(choice.n_layers)))
            ax.set_xlabel(fitted(f"layer of {model}", 3.0, 8))
            ax.spines[["top", "right"]].set_visible(False)
        # after the curves: an earlier line would count as data when the axis is scaled
        left.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        right.set_ylim(-0.03, 1.03)
        add_heading(figure, heading)
    return figure


def _draw(ax: Axes, curve: Curve) -> None:
    """Draw a thick line with its band; a thin one with markers where there is no interval."""
    look: Any = {"color": curve.colour, "label": curve.label}
    if curve.low is None or curve.high is None:
        ax.plot(curve.layers, curve.mean, curve.style, markersize=3, linewidth=0.7, **look)
        return
    ax.plot(curve.layers, curve.mean, curve.style, linewidth=1.4, zorder=3, **look)
    ax.fill_between(curve.layers, curve.low, curve.high, color=curve.colour, alpha=0.2, linewidth=0)
