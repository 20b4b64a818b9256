"""Heat maps side by side: tables of numbers as colours, with the words around them.

Knows arrays, labels and titles. Refuses to know what was measured: a value words its own picture.
Source of the geometry: the figures of Meng et al. 2022, arXiv:2202.05262, Fig. 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram.plots.style import STYLE, add_heading, fitted, font, layer_ticks, plain, width_of

_HIGHEST = 60.0  # inches; 12,000 dots, which every viewer opens
_WIDTH = 3.5  # inches of a panel
_LINE = 52  # letters of a title above one panel
_UNDERNEATH = 11  # letters that fit below a colour bar; a longer label goes beside it


@dataclass(frozen=True)
class HeatMap:
    """One panel.

    Attributes:
        values: [rows, columns]; NaN is drawn grey.
        colours, limits: a matplotlib colour map and the values at its two ends; values beyond them
            get the colours at the ends, which the colour bar then shows as an arrow.
        bar_label: what the colours measure.
        rows, columns: names of the cells; None: they are layers or heads, numbered from 0.
        bar_beside: write `bar_label` beside the bar even where it would fit below.
    """

    values: np.ndarray
    colours: str
    limits: tuple[float, float]
    title: str
    bar_label: str
    x_label: str
    y_label: str = ""
    rows: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    bar_beside: bool = False


def plot_heat_maps(
    panels: Sequence[HeatMap], heading: Sequence[str] = (), warning: str = ""
) -> Figure:
    """Draw the panels side by side, the first row of each table on top.

    The figure is as high as the longest list of row names needs, and 2 inches at least.

    Args:
        heading: lines above all panels; warning: below them.
    """
    # 0.13 inches are a line of 7 point type; 0.8 hold the title and the axis below
    height = 0.13 * max(len(panel.rows or ()) for panel in panels) + 0.8
    height = min(max(2.0, height), _HIGHEST)
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH * len(panels), height), dpi=200, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, panel, height)
        add_heading(figure, heading, warning)
    return figure


def in_lines(first: str, second: str) -> str:
    """Return a title on one line if it fits above a panel, else on two."""
    return f"{first} {second}" if len(first) + len(second) < _LINE else f"{first}\n{second}"


def _draw(ax: Axes, panel: HeatMap, height: float) -> None:
    ax.set_facecolor("0.9")  # shows where values are masked: "not measured" is no effect of zero
    values, (low, high) = np.ma.masked_invalid(panel.values), panel.limits
    mesh = ax.pcolormesh(values, cmap=panel.colours, vmin=low, vmax=high)
    ax.invert_yaxis()  # pcolormesh puts row 0 at the bottom, a prompt is read from the top
    rows, columns = values.shape
    beside = 0.0  # inches that the names of rows take
    if panel.rows is None:
        ax.set_yticks(*_numbers(rows))
    else:
        # of a text that is longer than a picture can be, every second or third token is named
        named = range(0, rows, math.ceil(0.13 * rows / (height - 0.7)))
        names = [_name(panel.rows[row]) for row in named]
        beside = max(map(width_of, sorted(names, key=len)[-3:]))
        ax.set_yticks(_centres(named), names, fontproperties=font(names))
    if panel.columns is None:
        ax.set_xticks(*_numbers(columns))
    else:
        named = range(0, columns, math.ceil(columns / 25))
        ax.set_xticks(_centres(named), [panel.columns[at] for at in named], rotation=90)
    lines = [fitted(line, 3.1) for line in panel.title.split("\n")]
    ax.set_title("\n".join(lines), fontproperties=font(lines))
    x_label = fitted(panel.x_label, 2.4)
    ax.set_xlabel(x_label, fontproperties=font([x_label]))
    ax.set_ylabel(panel.y_label)
    # values a little beyond an end are seldom worth an arrow: effects scatter around none
    slack = 0.05 * (high - low)
    below, above = bool((values < low - slack).any()), bool((values > high + slack).any())
    extend = {(0, 1): "max", (1, 0): "min", (1, 1): "both"}.get((below, above), "neither")
    bar = ax.figure.colorbar(mesh, ax=ax, extend=extend)
    label = fitted(panel.bar_label, height - 0.7)
    # below the bar, as in the paper, where it does not reach the label of the axis
    reach = (_WIDTH - beside - 0.9) / 2 + 0.25
    fits = (width_of(x_label) + width_of(label)) / 2 < reach and len(label) <= _UNDERNEATH
    if fits and not panel.bar_beside:
        bar.ax.set_title(label, y=0, pad=-15, va="top", fontproperties=font([label]))
    else:
        bar.set_label(label, fontproperties=font([label]))


def _name(token: str) -> str:
    """Return the name of a row, short enough to leave room for the map."""
    name = plain(token)
    return name if len(name) <= 24 else fitted(token, 1.25)


def _numbers(cells: int) -> tuple[list[float], list[str]]:
    """Ticks of numbered cells: where they are, and what they say."""
    ticks = layer_ticks(cells)
    return _centres(ticks), [str(tick) for tick in ticks]


def _centres(cells: range) -> list[float]:
    return [cell + 0.5 for cell in cells]
