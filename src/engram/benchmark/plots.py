"""Pictures of benchmarks: scores by method, and scores against the edited layer, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from engram.benchmark.metrics.table import METRICS
from engram.errors import SettingError
from engram.plots.style import STYLE, plain

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
        figure = Figure(
            figsize=(max(3.2, 0.45 * len(rows) * len(names) / 3 + 1.2), 2.2), layout="constrained"
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
                label=plain(METRICS[name].title),
            )
            axes.errorbar(
                positions, means, whiskers, fmt="none", ecolor="#222222", elinewidth=0.6, capsize=1
            )
        turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(rows) > 5 else {}
        axes.set_xticks(range(len(rows)), [plain(name) for name in rows], **turned)
        axes.set_ylim(0, 100)
        axes.set_ylabel("percent of prompts")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
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
        figure = Figure(figsize=(3.4, 2.2), layout="constrained")
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
                label=plain(METRICS[name].title),
            )
        axes.set_xticks(layers)
        axes.set_xlabel("edited layer")
        axes.set_ylabel("percent of prompts")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def _scaled(estimates: Sequence[Estimate], scale: float) -> tuple[list[float], list[list[float]]]:
    means = [estimate.mean * scale for estimate in estimates]
    # A percentile interval of a few records may end short of their mean, and matplotlib refuses
    # whiskers below 0.
    down = [max(0.0, (estimate.mean - estimate.low) * scale) for estimate in estimates]
    up = [max(0.0, (estimate.high - estimate.mean) * scale) for estimate in estimates]
    return means, [down, up]
