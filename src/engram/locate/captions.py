"""What pictures of traces say: names of sites, titles, and what an axis or a colour bar measures.

Knows the settings of a trace. Refuses to know how anything is drawn.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from engram.plots.heat_maps import HeatMap, in_lines
from engram.plots.style import plain

if TYPE_CHECKING:
    from engram.locate.trace import CausalTrace

_SITES = {  # site -> colour map, what is replaced
    "residual": ("Purples", "state"),
    "mlp": ("Greens", "MLP"),
    "attention": ("Reds", "attention"),
    "head": ("Oranges", "head"),
    "neuron": ("Blues", "neuron"),
}
_ESTIMATES = {"attribution": " (estimate)", "screened": " (partly estimated)"}  # by method


def colours(table: str) -> str:
    """Return the colour map of a table; a site of a family's own is grey."""
    return _SITES.get(table.partition(", ")[0], ("Greys", ""))[0]


def replaced(table: str) -> str:
    """Return what a table replaces, in words; a site of a family's own goes by its own name."""
    site, _, severed = table.partition(", ")
    name = _SITES.get(site, ("", site))[1]
    return f"{name} ({_SITES[severed.removesuffix(' severed')][1]} severed)" if severed else name


def layer_label(trace: CausalTrace, site: str) -> str:
    """Return what a layer of a site's table is."""
    verb = "restored" if trace.settings.get("direction", "denoise") == "denoise" else "replaced"
    if _effect(trace) == "direct":
        verb = "kept"
    if site.partition(",")[0] in ("mlp", "attention"):
        return f"centre of {trace.window} {verb} {replaced(site)} layers"
    return f"single {verb} layer of {PurePath(trace.model).name}"


def average_title(trace: CausalTrace) -> str:
    """Return what averages over such traces are, such as "Average indirect effect"."""
    return f"Average {_effect(trace)} effect{_ESTIMATES.get(trace.method, '')}"


def average_bar(trace: CausalTrace) -> str:
    """Return the abbreviation of such an average: "AIE" or "ADE", negated in the other direction."""
    sign = "-" if trace.settings.get("direction") == "noise" else ""
    return f"{sign}A{_effect(trace)[0].upper()}E"


def heat_map(trace: CausalTrace, site: str) -> HeatMap:
    """Return one table of a trace as a panel, as in the paper's Fig. 1: tokens down, layers across.

    Heads are shown at the token where one of them has the largest effect, layers down and heads
    across.
    """
    values, model = trace.scores[site], PurePath(trace.model).name
    rows: list[str] | None = trace.labels()
    columns, at, x_label, y_label = None, "", layer_label(trace, site), ""
    if values.dim() == 3:
        row = trace.best(site)[0]
        at = f", at {plain(trace.labels()[row].strip())}"
        values, rows, x_label, y_label = values[row], None, f"head of {model}", "layer"
    elif site == "neuron":
        columns = [f"{layer}.{index}" for layer, index in trace.settings["neurons"]]
        x_label = f"layer.neuron of {model}"
    shades, low, high = colours(site), trace.baseline, trace.baseline
    if trace.settings.get("direction") == "noise":
        # what is inserted lowers the score: the lowest is the darkest
        shades, low = f"{shades}_r", min(float(values.min()), trace.baseline - 1e-6)
    else:
        high = max(float(values.max()), trace.baseline + 1e-6)
    return HeatMap(
        values.numpy(),
        shades,
        (low, high),
        _title(trace, site, at),
        _score_label(trace),
        x_label,
        y_label,
        rows,
        columns,
        bar_beside=site == "neuron",
    )


def _effect(trace: CausalTrace) -> str:
    return str(trace.settings.get("effect", "indirect"))


def _score_label(trace: CausalTrace) -> str:
    answer = plain(trace.answer.strip())
    metric = trace.settings.get("metric", "probability")
    if metric == "logit_difference":
        return f"logits, {answer} - {plain(str(trace.settings.get('foil')).strip())}"
    return f"p({answer})" if metric == "probability" else f"log p({answer})"


def _title(trace: CausalTrace, site: str, at: str) -> str:
    inserts, direct = trace.settings.get("direction") == "noise", _effect(trace) == "direct"
    run, other = ("corrupted", "clean") if direct == inserts else ("clean", "corrupted")
    name, end = replaced(site), _ESTIMATES.get(trace.method, "") + at
    if direct:
        return in_lines(f"{run.capitalize()} input,", f"{name} kept {other}{end}")
    return in_lines(f"{'Corrupting' if inserts else 'Restoring'} {name}", f"after {run} input{end}")
