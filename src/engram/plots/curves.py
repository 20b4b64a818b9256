"""Curves over layers: lines with bands, and bars.

Knows arrays, labels and titles. Refuses to know what was measured: a value words its own picture.
Source of the geometry: the figures of Meng et al. 2022, arXiv:2202.05262, Fig. 3 and Appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from engram.plots.style import STYLE, add_heading, fitted, layer_ticks


@dataclass(frozen=True)
class Curve:
    """One value a layer.

    Attributes:
        layers: where the values are, increasing; mean: the values, of the same length.
        low, high: ends of their intervals; None: there is no interval.
        colour: as matplotlib knows it. style: of a line; a letter such as "o" marks points too.
    """

    layers: Sequence[int]
    mean: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    label: str
    colour: Any
    style: str = "-"


@dataclass(frozen=True)
class CurvePanel:
    """Curves that share their axes."""

    curves: Sequence[Curve]
    n_layers: int
    title: str
    x_label: str


def tab10(number: int) -> Any:
    """Return a colour of matplotlib's list of ten."""
    return colormaps["tab10"].colors[number]  # type: ignore[attr-defined]


def plot_curves(
    panels: Sequence[CurvePanel], y_label: str, heading: Sequence[str] = (), warning: str = ""
) -> Figure:
    """Draw panels side by side on one vertical axis: a line and a band for each curve.

    Args:
        heading: lines above all panels; warning: below them.
    """
    # `Figure` and not pyplot: no window, no global list of figures that is never emptied
    with rc_context({**STYLE, "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(13 / 3 * len(panels), 3.5), dpi=200, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            for curve in panel.curves:
                line: Any = {"color": curve.colour, "label": curve.label, "linewidth": 1.2}
                ax.plot(curve.layers, curve.mean, **line)
                band: Any = {"color": curve.colour, "alpha": 0.3, "linewidth": 0}
                ax.fill_between(curve.layers, curve.low, curve.high, **band)
            ax.set_title(fitted(panel.title, 3.8, 10))
            ax.set_xlabel(fitted(panel.x_label, 3.8, 9))
            ax.set_xticks(list(layer_ticks(panel.n_layers)))
        axes[0].set_ylabel(y_label)
        axes[len(axes) // 2].legend(frameon=False, fontsize=8)
        add_heading(figure, heading, warning)
    return figure


def plot_bars(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    heading: Sequence[str] = (),
    warning: str = "",
) -> Figure:
    """Draw a bar for each curve at every layer, side by side, with whiskers for intervals.

    Args:
        heading: lines above the axes; warning: below them.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 2.5), dpi=200, layout="constrained")
        ax = figure.subplots()
        highest = 0.0
        for i, curve in enumerate(curves):
            error, high = None, curve.mean
            if curve.low is not None and curve.high is not None:
                # a percentile interval of few facts need not contain the mean: no negative whiskers
                error = np.stack([curve.mean - curve.low, curve.high - curve.mean]).clip(0)
                high = curve.high
            x = np.asarray(curve.layers) + 0.3 * (i - (len(curves) - 1) / 2)
            look: Any = {"color": curve.colour, "label": curve.label}
            ax.bar(x, curve.mean, 0.3, yerr=error, error_kw={"linewidth": 0.5}, **look)
            highest = max(highest, float(np.nan_to_num(high).max()))
        # small effects stay small: 2.5 is the least upper end, as in the paper's figure
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), max(2.5, 1.05 * highest))
        ax.set_xticks(list(layer_ticks(len(curves[0].layers))))
        ax.set_xlabel(fitted(x_label, 6.2))
        ax.set_ylabel(y_label)
        ax.legend(frameon=False)
        add_heading(figure, heading, warning)
    return figure
