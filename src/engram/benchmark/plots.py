"""Pictures of benchmarks: scores by method, and scores against the edited layer, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engram.benchmark.metrics.table import METRICS
from engram.errors import SettingError
from engram.plots.style import STYLE, add_heading, fitted, plain
from engram.plots.words import shorten

if TYPE_CHECKING:
    from engram.benchmark.metrics.summary import Estimate
    from engram.benchmark.results import Run

SHOWN = (
    "EG",
    "PG",
    "NG",
    "ES",
    "PS",
    "NS",
    "Efficacy",
    "Paraphrase",
    "Specificity",
    "rewrite",
    "rephrase",
    "locality",
)
_TOP = 104  # percent: a bar of 100 and its whisker are not cut
_COLOURS = ("#6b5ca5", "#2a9d6f", "#d1495b", "#8f84bd", "#7cc2a2", "#e0929d")


def plot_scores(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> Figure:
    """Draw a group of bars for each method, a bar for each metric; whiskers are 95 % bootstrap
    intervals.

    Args:
        metrics: names in percent; default: the success rates that the benchmark has, those of
            generated answers first.
    Raises:
        SettingError: no runs, or none of these metrics.
    """
    from engram.benchmark.report import table

    scores = table(runs, all_metrics=metrics is not None)
    names = [name for name in (metrics or SHOWN) if name in scores.columns]
    if not names:
        raise SettingError(f"metrics={metrics}: the runs have {', '.join(scores.columns)}")
    rows = scores.rows
    with mpl.rc_context(STYLE):
        # room for the names of the methods, and below for a line for each metric
        width_inches = max(4.5, 0.45 * len(rows) * len(names) / 3 + 1.2)
        figure = Figure(
            figsize=(width_inches, 2.4 + 0.14 * len(names)), layout="constrained", dpi=200
        )
        axes = figure.subplots()
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            summaries = [
                (at, summary[name])
                for at, (_, summary) in enumerate(rows.values())
                if name in summary
            ]
            positions = [at + (i - (len(names) - 1) / 2) * width for at, _ in summaries]
            means, whiskers = _scaled([estimate for _, estimate in summaries], METRICS[name].scale)
            axes.bar(
                positions,
                means,
                width,
                color=_COLOURS[i % len(_COLOURS)],
                label=_meaning(name, width_inches),
            )
            axes.errorbar(
                positions, means, whiskers, fmt="none", ecolor="#222222", elinewidth=0.6, capsize=1
            )
        labels = [plain(shorten(name, 24)) for name in rows]
        # what a name has side by side before the next one begins, of about 0.05 inches a letter
        crowded = max(map(len, labels)) * 0.055 > (width_inches - 0.8) / len(rows)
        turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if crowded else {}
        axes.set_xticks(range(len(rows)), labels, **turned)
        axes.set_ylim(0, _TOP)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("percent of prompts")
        _finish(figure, axes, heading(runs))
    return figure


def plot_layers(runs: Sequence[Run], metrics: Sequence[str] = ("ES", "PS", "NS", "S")) -> Figure:
    """Draw scores against the edited layer, over methods whose settings name one.

    Raises:
        SettingError: fewer than two layers.
    """
    by_layer: dict[int, dict[str, Estimate]] = {}
    for run in runs:
        summaries = run.summary()
        for label, (_, settings) in run.methods.items():
            if isinstance(settings.get("layer"), int) and label in summaries:
                # One line, whatever the method: two runs of one layer overwrite each other, the
                # last one wins.
                by_layer[settings["layer"]] = summaries[label]
    if len(by_layer) < 2:
        raise SettingError(
            f"the runs have results at layers {sorted(by_layer)}; expected two or more, as by "
            "--method rome-1=rome --set rome-1:layer=1"
        )
    layers = sorted(by_layer)
    with mpl.rc_context(STYLE):
        width_inches = 4.5
        size = (width_inches, 2.4 + 0.14 * len(metrics))
        figure = Figure(figsize=size, layout="constrained", dpi=200)
        axes = figure.subplots()
        for i, name in enumerate(metrics):
            measured = [layer for layer in layers if name in by_layer[layer]]
            means, whiskers = _scaled(
                [by_layer[layer][name] for layer in measured], METRICS[name].scale
            )
            axes.errorbar(
                measured,
                means,
                whiskers,
                color=_COLOURS[i % len(_COLOURS)],
                marker="o",
                markersize=2.5,
                linewidth=1,
                capsize=1.5,
                label=_meaning(name, width_inches),
            )
        axes.set_xticks(layers[:: math.ceil(len(layers) / 20)])
        axes.set_xlabel("edited layer")
        axes.set_ylim(0, max(_TOP, axes.get_ylim()[1]))
        axes.set_ylabel("percent of prompts")
        _finish(figure, axes, heading(runs))
    return figure


def heading(runs: Sequence[Run]) -> tuple[str, str]:
    """Return two lines above a picture: the model; data set, number of records and what whiskers
    are.
    """
    models = dict.fromkeys(PurePath(str(run.about["model"])).name for run in runs)
    data = dict.fromkeys(str(run.about["dataset"]) for run in runs)
    counts = sorted({len(results) for run in runs for results in run.measured.values()})
    n = "–".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "0"
    return (
        ", ".join(models),
        f"{', '.join(data)}, n = {n} record{'s' * (n != '1')} each edited alone; whiskers: 95 % "
        "bootstrap interval",
    )


def _meaning(name: str, inches: float) -> str:
    """Return a metric's name and what it means, as long as a line of the picture."""
    metric = METRICS[name]
    return fitted(f"{metric.title}: {metric.meaning}", inches - 0.7)


def _finish(figure: Figure, axes: Axes, lines: Sequence[str]) -> None:
    """Add what all pictures of benchmarks have: a heading, and a legend that hides nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=1, loc="outside lower left")
    add_heading(figure, lines)


def _scaled(estimates: Sequence[Estimate], scale: float) -> tuple[list[float], list[list[float]]]:
    means = [estimate.mean * scale for estimate in estimates]
    # A percentile interval of a few records may end short of their mean, and matplotlib refuses
    # whiskers below 0.
    down = [max(0.0, (estimate.mean - estimate.low) * scale) for estimate in estimates]
    up = [max(0.0, (estimate.high - estimate.mean) * scale) for estimate in estimates]
    return means, [down, up]
