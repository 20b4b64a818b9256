"""Heat maps side by side: tables of numbers as colours, with the words around them.

Knows arrays, labels and titles. Refuses to know what was measured: a value words its own picture.
Source of the geometry: the figures of Meng et al. 2022, arXiv:2202.05262, Fig. 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram.plots.style import STYLE, font, layer_ticks, plain

_LINE = 52  # letters of a title above one panel
_UNDERNEATH = 11  # letters that fit below a colour bar; a longer label goes beside it


@dataclass(frozen=True)
class HeatMap:
    """One panel.

    Attributes:
        values: [rows, columns]; NaN is drawn grey.
        colours, limits: a matplotlib colour map and the values at its two ends.
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


def plot_heat_maps(panels: Sequence[HeatMap]) -> Figure:
    """Draw the panels side by side, the first row of each table on top.

    The figure is as high as the longest list of row names needs, and 2 inches at least.
    """
    # 0.13 inches are a line of 7 point type; 0.8 hold the title and the axis below
    height = max(2.0, 0.13 * max(len(panel.rows or ()) for panel in panels) + 0.8)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5 * len(panels), height), dpi=200, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, panel)
    return figure


def in_lines(first: str, second: str) -> str:
    """Return a title on one line if it fits above a panel, else on two."""
    return f"{first} {second}" if len(first) + len(second) < _LINE else f"{first}\n{second}"


def _draw(ax: Axes, panel: HeatMap) -> None:
    ax.set_facecolor("0.9")  # shows where values are masked: "not measured" is no effect of zero
    values, (low, high) = np.ma.masked_invalid(panel.values), panel.limits
    mesh = ax.pcolormesh(values, cmap=panel.colours, vmin=low, vmax=high)
    ax.invert_yaxis()  # pcolormesh puts row 0 at the bottom, a prompt is read from the top
    rows, columns = values.shape
    if panel.rows is None:
        ax.set_yticks(*_numbers(rows))
    else:
        names = [plain(name) for name in panel.rows]
        ax.set_yticks(_centres(range(rows)), names, fontproperties=font(panel.rows))
    if panel.columns is None:
        ax.set_xticks(*_numbers(columns))
    else:
        ax.set_xticks(_centres(range(columns)), panel.columns, rotation=90)
    ax.set_title(panel.title)
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel(panel.y_label)
    bar = ax.figure.colorbar(mesh, ax=ax)
    if len(panel.bar_label) <= _UNDERNEATH and not panel.bar_beside:  # as in the paper
        bar.ax.set_title(panel.bar_label, y=0, pad=-15, va="top", fontsize=7)
    else:
        bar.set_label(panel.bar_label, fontsize=7)


def _numbers(cells: int) -> tuple[list[float], list[str]]:
    """Ticks of numbered cells: where they are, and what they say."""
    ticks = layer_ticks(cells)
    return _centres(ticks), [str(tick) for tick in ticks]


def _centres(cells: range) -> list[float]:
    return [cell + 0.5 for cell in cells]
