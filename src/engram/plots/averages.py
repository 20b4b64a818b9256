"""Pictures of average effects: heat maps by place, lines with bands, bars of severed paths.

Source of the geometry: the figures of Meng et al. 2022, arXiv:2202.05262, Fig. 2, 3 and Appendix B.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from engram.errors import SettingError
from engram.plots.heat_maps import ESTIMATES, in_lines, label_layers, layer_label, look, name_bar
from engram.plots.style import STYLE, layer_ticks

if TYPE_CHECKING:
    from engram.locate.average import AverageTrace, Interval

_LABELS = (
    "First subject token",
    "Middle subject tokens",
    "Last subject token",
    "First subsequent token",
    "Further tokens",
    "Last token",
)
_LINE_COLOURS = (0, 1, 2, 4, 5, 3)  # of tab10, in the order of the places
_SEVERED = (
    ("", "#7261ab", "as it is"),
    (", attention severed", "#f3201b", "attention severed"),
    (", mlp severed", "#20b020", "MLP severed"),
)


def plot_average(average: AverageTrace, sites: list[str] | None = None) -> Figure:
    """Average effects by place of the token (down) and layer (across); one colour scale: that of
    the first table.

    In the other direction, where effects are negative, their size is shown.
    """
    sites = _flat(average, sites)
    sign = -1 if average.direction == "noise" else 1
    tables = {site: (sign * average.effects(site).mean).clamp(min=0) for site in sites}
    top = max(float(tables[sites[0]].nan_to_num().max()), 1e-6)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5 * len(sites), 2.0), dpi=200, layout="constrained")
        for ax, (site, table) in zip(
            figure.subplots(1, len(sites), squeeze=False)[0], tables.items(), strict=True
        ):
            ax.set_facecolor("0.9")  # a place that no fact has is no effect of zero
            mesh = ax.pcolormesh(
                np.ma.masked_invalid(table.numpy()), cmap=look(site)[0], vmin=0, vmax=top
            )
            ax.invert_yaxis()
            ax.set_yticks([i + 0.5 for i in range(len(_LABELS))], _LABELS)
            label_layers(ax, table.shape[1])
            ax.set_title(
                in_lines(
                    f"{_title(average)} of {look(site)[1]}", f"over {len(average.traces)} prompts"
                )
            )
            ax.set_xlabel(layer_label(average.traces[0], site))
            name_bar(
                figure.colorbar(mesh, ax=ax),
                f"{'' if sign > 0 else '-'}A{_effect(average)[0].upper()}E",
            )
    return figure


def plot_lines(
    average: AverageTrace, interval: Interval = "bootstrap", sites: list[str] | None = None
) -> Figure:
    """A panel a site, a line a place, a 95 % band around each."""
    sites = _flat(average, sites)
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    style = {**STYLE, "font.size": 9, "axes.titlesize": 10}
    with rc_context(style):
        figure = Figure(figsize=(13 / 3 * len(sites), 3.5), dpi=200, layout="constrained")
        panels = figure.subplots(1, len(sites), sharey=True, squeeze=False)[0]
        for ax, site in zip(panels, sites, strict=True):
            curves = average.effects(site, interval)
            layers = range(curves.mean.shape[1])
            for i, label in enumerate(_LABELS):
                if not curves.counts[i]:
                    continue
                colour = colours[_LINE_COLOURS[i]]
                ax.plot(layers, curves.mean[i].numpy(), color=colour, label=label, linewidth=1.2)
                ax.fill_between(
                    layers,
                    curves.low[i].numpy(),
                    curves.high[i].numpy(),
                    color=colour,
                    alpha=0.3,
                    linewidth=0,
                )
            ax.set_title(f"{_title(average)} of {look(site)[1]}")
            ax.set_xlabel(layer_label(average.traces[0], site))
            ax.set_xticks(list(layer_ticks(len(layers))))
        panels[0].set_ylabel(_title(average))
        panels[len(panels) // 2].legend(frameon=False, fontsize=8)
    return figure


def plot_severed(average: AverageTrace, place: str = "last subject") -> Figure:
    """Bars a layer at one place: the effect of restoring a state as it is, with attention severed,
    with MLP severed.

    Raises:
        SettingError: no such place, or no severed tables among the traces.
    """
    from engram.locate.average import check_place

    at = check_place(place)
    if not average.severed:
        raise SettingError(
            "these traces have no severed tables; trace with sites=['residual'], severed=['mlp', 'attention']"
        )
    site = average.severed[0].partition(",")[0]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 2.5), dpi=200, layout="constrained")
        ax = figure.subplots()
        highest = 0.0
        shown = [
            (f"{site}{end}", colour, label)
            for end, colour, label in _SEVERED
            if f"{site}{end}" in average.sites
        ]
        for i, (table, colour, label) in enumerate(shown):
            curves = average.effects(table)
            mean, low, high = (x[at].numpy() * 100 for x in (curves.mean, curves.low, curves.high))
            error = np.stack([mean - low, high - mean]).clip(0) if len(average.traces) > 1 else None
            x = np.arange(len(mean)) + 0.3 * (i - (len(shown) - 1) / 2)
            ax.bar(x, mean, 0.3, color=colour, label=label, yerr=error, error_kw={"linewidth": 0.5})
            highest = max(highest, float(np.nan_to_num(high).max()))
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), max(2.5, 1.05 * highest))
        ax.set_xticks(list(layer_ticks(len(mean))))
        ax.set_xlabel(
            f"layer of {PurePath(average.traces[0].model).name} at which the state is restored, {place} token"
        )
        ax.set_ylabel(f"{'average ' * (len(average.traces) > 1)}indirect effect, %")
        ax.legend(frameon=False)
    return figure


def _flat(average: AverageTrace, sites: list[str] | None) -> list[str]:
    """Tables of layers; heads and neurons have no line a layer."""
    chosen = [site for site in (sites or average.layered) if site in average.layered]
    if not chosen:
        raise SettingError(
            f"none of {sites or average.sites} has one value a layer; see AverageTrace.effects for heads and neurons"
        )
    return chosen


def _title(average: AverageTrace) -> str:
    return f"Average {_effect(average)} effect{ESTIMATES.get(average.traces[0].method, '')}"


def _effect(average: AverageTrace) -> str:
    return str(average.traces[0].settings.get("effect", "indirect"))
