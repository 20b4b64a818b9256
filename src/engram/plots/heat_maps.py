"""Heat maps of causal traces.

Source of the geometry: the figures of Meng et al. 2022, arXiv:2202.05262.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from torch import Tensor

from engram.plots.style import STYLE, font, layer_ticks, plain

if TYPE_CHECKING:
    from engram.locate.trace import CausalTrace

LOOKS = {  # site -> colour map, what is replaced
    "residual": ("Purples", "state"),
    "mlp": ("Greens", "MLP"),
    "attention": ("Reds", "attention"),
    "head": ("Oranges", "head"),
    "neuron": ("Blues", "neuron"),
}
ESTIMATES = {
    "attribution": " (estimate)",
    "screened": " (partly estimated)",
}  # method -> what a title says of it
_LINE = 52  # letters of a title above one panel


def look(table: str) -> tuple[str, str]:
    """Colour map and name of a table; a site of a family's own, or a severed one, is called by its
    own name.
    """
    site, _, severed = table.partition(", ")
    colours, name = LOOKS.get(site, ("Greys", site))
    return (
        colours,
        f"{name} ({LOOKS[severed.removesuffix(' severed')][1]} severed)" if severed else name,
    )


def plot_trace(trace: CausalTrace, site: str | None = None) -> Figure:
    """Heat maps of one trace as in the paper's Fig. 1: tokens down, layers across, probability of
    the answer as colour.

    Heads are shown at the token where one of them does most, layers down and heads across.

    Args:
        site: one of the trace's tables; default: all of them side by side.
    """
    sites = list(trace.scores) if site is None else [site]
    height = max(2.0, 0.13 * len(trace.tokens) + 0.8)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5 * len(sites), height), dpi=200, layout="constrained")
        for ax, each in zip(figure.subplots(1, len(sites), squeeze=False)[0], sites, strict=True):
            if trace.scores[each].dim() == 3:
                _draw_heads(ax, trace, each)
            else:
                _draw(ax, trace, each)
    return figure


def label_layers(ax: Axes, layers: int, where: str = "x") -> None:
    """Number the layers along an axis whose cells are one wide."""
    ticks = layer_ticks(layers)
    set_ticks = ax.set_xticks if where == "x" else ax.set_yticks
    set_ticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])


def layer_label(trace: CausalTrace, site: str) -> str:
    """What a layer of a site's table is."""
    done = "restored" if trace.settings.get("direction", "denoise") == "denoise" else "replaced"
    if trace.settings.get("effect") == "direct":
        done = "kept"
    if site.partition(",")[0] in ("mlp", "attention"):
        return f"centre of {trace.window} {done} {look(site)[1]} layers"
    return f"single {done} layer of {PurePath(trace.model).name}"


def name_bar(bar: Colorbar, label: str, beside: bool = False) -> None:
    """Say what a colour bar measures: underneath as in the paper, beside it where that is too long."""
    if len(label) <= 11 and not beside:
        bar.ax.set_title(label, y=0, pad=-15, va="top", fontsize=7)
    else:
        bar.set_label(label, fontsize=7)


def _mesh(ax: Axes, trace: CausalTrace, table: Tensor, site: str) -> None:
    colours = look(site)[0]
    insertion = trace.settings.get("direction") == "noise"
    if insertion:  # what is inserted lowers the score: the lowest is the darkest
        low, high, colours = (
            min(float(table.min()), trace.baseline - 1e-6),
            trace.baseline,
            f"{colours}_r",
        )
    else:
        low, high = trace.baseline, max(float(table.max()), trace.baseline + 1e-6)
    mesh = ax.pcolormesh(table.numpy(), cmap=colours, vmin=low, vmax=high)
    ax.invert_yaxis()
    name_bar(ax.figure.colorbar(mesh, ax=ax), score_label(trace), beside=site == "neuron")


def score_label(trace: CausalTrace) -> str:
    answer = plain(trace.answer.strip())
    metric = trace.settings.get("metric", "probability")
    if metric == "logit_difference":
        return f"logits, {answer} - {plain(str(trace.settings.get('foil')).strip())}"
    return f"p({answer})" if metric == "probability" else f"log p({answer})"


def in_lines(first: str, second: str) -> str:
    """A title on one line if it fits above a panel, else on two."""
    return f"{first} {second}" if len(first) + len(second) < _LINE else f"{first}\n{second}"


def _title(trace: CausalTrace, site: str, at: str = "") -> str:
    name, inserts = look(site)[1], trace.settings.get("direction") == "noise"
    run, other = (
        ("corrupted", "clean")
        if (trace.settings.get("effect") == "direct") == inserts
        else ("clean", "corrupted")
    )
    end = ESTIMATES.get(trace.method, "") + at
    if trace.settings.get("effect") == "direct":
        return in_lines(f"{run.capitalize()} input,", f"{name} kept {other}{end}")
    return in_lines(f"{'Corrupting' if inserts else 'Restoring'} {name}", f"after {run} input{end}")


def _draw(ax: Axes, trace: CausalTrace, site: str) -> None:
    table = trace.scores[site]
    _mesh(ax, trace, table, site)
    ax.set_yticks(
        [i + 0.5 for i in range(len(trace.tokens))],
        [plain(label) for label in trace.labels()],
        fontproperties=font(trace.tokens),
    )
    if site == "neuron":
        pairs = trace.settings["neurons"]
        ax.set_xticks(
            [i + 0.5 for i in range(len(pairs))],
            [f"{layer}.{n}" for layer, n in pairs],
            rotation=90,
        )
        ax.set_xlabel(f"layer.neuron of {PurePath(trace.model).name}")
    else:
        label_layers(ax, table.shape[1])
        ax.set_xlabel(layer_label(trace, site))
    ax.set_title(_title(trace, site))


def _draw_heads(ax: Axes, trace: CausalTrace, site: str) -> None:
    row = trace.best(site)[0]
    table = trace.scores[site][row]
    _mesh(ax, trace, table, site)
    label_layers(ax, table.shape[0], "y")
    heads = layer_ticks(table.shape[1])
    ax.set_xticks([h + 0.5 for h in heads], [str(h) for h in heads])
    ax.set_ylabel("layer")
    ax.set_xlabel(f"head of {PurePath(trace.model).name}")
    ax.set_title(_title(trace, site, f", at {plain(trace.labels()[row].strip())}"))
