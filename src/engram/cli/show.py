"""TODO cli.show"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.style import Style
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from engram.evaluate.receipt import Receipt
    from engram.knowledge.knowledge import Knowledge
    from engram.layers.card import LayerCard
    from engram.locate.average import AverageTrace
    from engram.locate.trace import CausalTrace
from engram.cli.terminal import _line, _safe, console

_SHADES = " ·░▒▓█"


_EIGHTHS = " ▏▎▍▌▋▊▉█"


_INK = {
    "residual": "medium_purple",
    "mlp": "green",
    "attention": "red",
}  # legible on dark and on light


def heat_maps(trace: CausalTrace) -> Columns:
    """The tables of a trace, side by side where the terminal is wide enough: tokens down and layers
    across; of heads, layers
    down and heads across, at the token where one of them does most. Neurons have none."""
    names = [label.replace("\n", "⏎") for label in trace.labels()]
    sign = -1 if trace.settings.get("direction") == "noise" else 1
    maps = []
    for site in trace.scores:
        effects, look = trace.effects(site), site.partition(",")[0]
        if look == "head":
            row = trace.best(site)[0]
            layers = [f"layer {layer}" for layer in range(effects.shape[1])]
            maps.append(_heat_map(f"{site} at {names[row].strip()}", effects[row], layers, sign))
        elif look != "neuron":
            maps.append(_heat_map(site, effects, names, sign))
    return Columns(maps, padding=(0, 1))


def _heat_map(title: str, effects: Tensor, names: list[str], sign: int) -> Text:
    """One character or two a column, darker for a larger effect (`sign` 1) or a more negative one,
    with a terminal's colours.
    """
    layers = effects.shape[1]
    wide = 2 if layers <= 16 else 1
    effects = (sign * effects).nan_to_num()
    peak = max(float(effects.max()), 1e-9)
    margin = min(22, max(map(len, names)))
    picture = Text()
    picture.append(f"{title}, strongest {sign * float(effects.max()):+.2g}\n", Style(bold=True))
    for name, row in zip(names, effects.tolist(), strict=True):
        picture.append(f"{name[-margin:]:>{margin}} ")
        for effect in row:
            depth = min(1.0, max(0.0, effect / peak))
            picture.append(
                _SHADES[round(depth * (len(_SHADES) - 1))] * wide,
                _INK.get(title.partition(",")[0], "cyan"),
            )
        picture.append("\n")
    last = str(layers - 1)
    return picture.append(
        " " * (margin + 1) + "0" + last.rjust(layers * wide - 1) + "\n", Style(dim=True)
    )


def show_trace(trace: CausalTrace) -> None:
    """Heat maps, and where the strongest effects are."""
    metric = trace.settings.get("metric", "probability").replace("_", " ")
    console.print(f"{_safe(trace.prompt)} →[bold]{_safe(trace.answer.replace(chr(10), '⏎'))}[/]")
    console.print(
        f"{metric} {trace.high_score:.3f}; with the subject corrupted {trace.low_score:.3f}"
    )
    if trace.method != "exact":
        console.print(
            "[yellow]estimates[/], to first order" + (f"; {_exact(trace)}" if trace.exact else "")
        )
    console.print(heat_maps(trace))
    margin = max(map(len, trace.scores))
    for site in trace.scores:
        at = trace.best(site)
        effect = float(trace.effects(site)[at])
        console.print(
            f"  {site:<{margin}}  strongest at token {_safe(repr(trace.tokens[at[0]]))}, {_place(trace, site, at[1:])}: {effect:+.3f}"
        )


def _place(trace: CausalTrace, site: str, at: Sequence[int]) -> str:
    """A column of a table, by its indices behind the token axis."""
    if site.partition(",")[0] == "neuron":
        layer, neuron = trace.settings["neurons"][at[0]]
        return f"layer {layer}, neuron {neuron}"
    return f"layer {at[0]}" + (f", head {at[1]}" if len(at) > 1 else "")


def _exact(trace: CausalTrace) -> str:
    cells = sum(int(table.sum()) for table in trace.exact.values())
    return f"{cells} of {sum(table.numel() for table in trace.exact.values())} cells are exact"


def show_average(average: AverageTrace) -> None:
    """Average effects by place of the token, and the total effect with its interval."""
    from engram.locate.average import TOKEN_ROLES

    ate, low, high = average.total_effect()
    left_out = f", {len(average.skipped)} left out" if average.skipped else ""
    console.print(f"[bold]{len(average.traces)} facts[/]{left_out}")
    console.print(
        f"clean {average.clean:.3f}, corrupted {average.corrupted:.3f}: total effect {ate:.3f} (95 %: {low:.3f} to {high:.3f})"
    )
    if average.traces[0].method != "exact":
        console.print(
            "[yellow]estimates[/], to first order"
            + (", but for the best cells" if average.traces[0].exact else "")
        )
    sign = -1 if average.direction == "noise" else 1
    maps = [
        _heat_map(site, average.effects(site).mean, list(TOKEN_ROLES), sign)
        for site in average.layered
    ]
    if maps:
        console.print(Columns(maps, padding=(0, 1)))
    margin = max(map(len, [*average.sites, "strongest"]))
    console.print(
        f"  {'strongest':<{margin}}  {'at the last subject token':<25}  at the last token"
    )
    for site, about in average.summary()["sites"].items():
        peaks = [
            _peak(average, site, about[place]) if place in about else ""
            for place in ("last subject", "last")
        ]
        console.print(f"  {site:<{margin}}  {peaks[0]:<25}  {peaks[1]}".rstrip())


def _peak(average: AverageTrace, site: str, about: dict[str, Any]) -> str:
    return f"{about['effect']:+.3f} {_place(average.traces[0], site, about['at'])}"


def show_receipt(receipt: Receipt) -> None:
    """Continuations before and after, then the numbers, with what the model was asked through."""
    for prompt, before, after in receipt.continuations:
        console.print(f"[bold]{_safe(prompt)}[/]")
        console.print(f"   before {_safe(_line(before))}")
        console.print(f"   after  {_safe(_line(after))}")
    console.print()
    for line in str(receipt).splitlines():
        style = (
            "green"
            if line.endswith("ok") or line == "PASSED"
            else "red"
            if line.endswith("FAILED")
            else ""
        )
        console.print(Text(line, style))


def show_knowledge(found: Knowledge, seed: int) -> None:
    """The table by relation."""
    for i, line in enumerate(found.table(seed=seed).splitlines()):
        style = (
            "bold"
            if i == 0 or line.startswith(("relation ", "all facts"))
            else "dim"
            if line.startswith("  ")
            else ""
        )
        console.print(Text(line, style))


def show_layer_card(card: LayerCard) -> None:
    """A row a layer: what tracing says, and how edits went; then the advice, and whether the trace
    would have given it.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")  # 80 columns
    for title in (
        "layer",
        "traced",
        "",
        "estim.",
        "efficacy",
        "paraphr.",
        "neighb.",
        "score",
        "",
        "95 %",
    ):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    highest = max((row.trace.mean for row in card.rows if row.trace), default=0.0)
    for row in card.rows:
        style = (
            "bold green"
            if row.layer == card.best
            else "green"
            if row.layer in card.tied_with_best
            else ""
        )
        table.add_row(
            ("→ " if row.layer == card.best else "") + str(row.layer),
            f"{row.trace.mean:+.3f}" if row.trace else "",
            Text(
                _bar(row.trace.mean / highest, 6) if row.trace and highest > 0 else "", _INK["mlp"]
            ),
            f"{row.attribution.mean:+.3f}" if row.attribution else "",
            *(
                "" if share is None else f"{share:.0%}"
                for share in (row.efficacy, row.paraphrase, row.neighbourhood)
            ),
            f"{row.score.mean:.3f}" if row.score else "",
            Text(_bar(row.score.mean, 8) if row.score else "", _INK["residual"]),
            f"{row.score.low:.2f}–{row.score.high:.2f}" if row.score else "",
            style=style,
        )
    console.print(
        f"[bold]{_safe(card.model)}[/], {card.n_layers} layers; edits by {card.method} of {len(card.edited)} facts; "
        f"effects of {card.traces['window']} MLPs at the subject's last token"
    )
    console.print(table)
    for line in card.advice():
        console.print(f"  {_safe(line)}")


def _bar(share: float, width: int) -> str:
    """A bar of characters, to an eighth of one."""
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip().ljust(width)
