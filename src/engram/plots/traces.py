"""Heat maps of causal traces.

Source of the geometry: the figures of Meng et al. 2022, arXiv:2202.05262.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram.plots.style import STYLE, font, layer_ticks, plain

if TYPE_CHECKING:
    from engram.locate.causal_trace import CausalTrace

_LOOKS = {  # site -> colour map, what was restored
    "residual": ("Purples", "state"),
    "mlp": ("Greens", "MLP"),
    "attention": ("Reds", "attention"),
}


def plot_trace(trace: CausalTrace, site: str | None = None) -> Figure:
    """Heat maps of one trace as in the paper's Fig. 1: tokens down, layers across, probability of the answer as colour.

    Args:
        site: one of the trace's sites; default: all of them side by side.
    """
    sites = list(trace.scores) if site is None else [site]
    height = max(2.0, 0.13 * len(trace.tokens) + 0.8)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5 * len(sites), height), dpi=200, layout="constrained")
        for ax, each in zip(figure.subplots(1, len(sites), squeeze=False)[0], sites, strict=True):
            _draw(ax, trace, each)
    return figure


def _draw(ax: Axes, trace: CausalTrace, site: str) -> None:
    colours, restored = _LOOKS[site]
    scores = trace.scores[site]
    layers = scores.shape[1]
    highest = max(float(scores.max()), trace.low_score + 1e-6)
    mesh = ax.pcolormesh(scores.numpy(), cmap=colours, vmin=trace.low_score, vmax=highest)
    ax.invert_yaxis()
    ax.set_yticks(
        [i + 0.5 for i in range(len(trace.tokens))],
        [plain(label) for label in trace.labels()],
        fontproperties=font(trace.tokens),
    )
    ticks = layer_ticks(layers)
    ax.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    ax.set_title(f"Restoring {restored} after corrupted input")
    ax.set_xlabel(
        f"single restored layer of {PurePath(trace.model).name}"
        if site == "residual"
        else f"centre of {trace.window} restored {restored} layers"
    )
    bar = ax.figure.colorbar(mesh, ax=ax)
    bar.ax.set_title(f"p({plain(trace.answer.strip())})", y=-0.16, fontsize=7)
