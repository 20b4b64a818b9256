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
    """Bars a method, a group a metric; whiskers are 95 % bootstrap intervals.

    Args:
        metrics: names in percent; default: the success rates that the benchmark has, those of
            generated answers first.
    Raises:
        SettingError: no runs, or none of these metrics.
    """
    from engram.benchmark.report import table

    made = table(runs, all_metrics=metrics is not None)
    names = [name for name in (metrics or SHOWN) if name in made.columns]
    if not names:
        raise SettingError(f"metrics={metrics}: the runs have {', '.join(made.columns)}")
    rows = made.rows
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(max(3.2, 0.45 * len(rows) * len(names) / 3 + 1.2), 2.2), layout="constrained"
        )
        axes = figure.subplots()
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            found = [
                (at, summary[name])
                for at, (_, summary) in enumerate(rows.values())
                if name in summary
            ]
            places = [at + (i - (len(names) - 1) / 2) * width for at, _ in found]
            means, whiskers = _scaled([each for _, each in found], METRICS[name].scale)
            axes.bar(
                places,
                means,
                width,
                color=_COLOURS[i % len(_COLOURS)],
                label=plain(METRICS[name].title),
            )
            axes.errorbar(
                places, means, whiskers, fmt="none", ecolor="#222222", elinewidth=0.6, capsize=1
            )
        turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(rows) > 5 else {}
        axes.set_xticks(range(len(rows)), [plain(name) for name in rows], **turned)
        axes.set_ylim(0, 100)
        axes.set_ylabel("percent of prompts")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def plot_layers(runs: Sequence[Run], metrics: Sequence[str] = ("ES", "PS", "NS", "S")) -> Figure:
    """Scores against the layer that was edited, over methods whose settings name one.

    Raises:
        SettingError: fewer than two layers.
    """
    found: dict[int, dict[str, Estimate]] = {}
    for run in runs:
        summaries = run.summary()
        for label, (_, settings) in run.methods.items():
            if isinstance(settings.get("layer"), int) and label in summaries:
                found[settings["layer"]] = summaries[label]
    if len(found) < 2:
        raise SettingError(
            f"the runs have results at layers {sorted(found)}; expected two or more, as by "
            "--method rome-1=rome --set rome-1:layer=1"
        )
    layers = sorted(found)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.2), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(metrics):
            there = [layer for layer in layers if name in found[layer]]
            means, whiskers = _scaled([found[layer][name] for layer in there], METRICS[name].scale)
            axes.errorbar(
                there,
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
    means = [each.mean * scale for each in estimates]
    low = [max(0.0, (each.mean - each.low) * scale) for each in estimates]
    return means, [low, [max(0.0, (each.high - each.mean) * scale) for each in estimates]]
