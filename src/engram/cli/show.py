"""What commands print: heat maps, averages, receipts, cards and benchmark tables in characters.

Knows rich and the library's values; computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from engram.cli import terminal

if TYPE_CHECKING:
    from torch import Tensor

    from engram.benchmark.results import Run
    from engram.evaluate.receipt import Receipt
    from engram.knowledge.knowledge import Knowledge
    from engram.layers.card import LayerCard
    from engram.locate.average import AverageTrace
    from engram.locate.trace import CausalTrace

# Characters besides colours: a log file and a reader who sees no colours get the map too.
_SHADES = " ·░▒▓█"
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_INK = {
    "residual": "medium_purple",
    "mlp": "green",
    "attention": "red",
}  # legible on dark and light


def heat_maps(trace: CausalTrace, *, shared_scale: bool = True) -> Columns:
    """Return the tables of a trace, side by side where the terminal is wide enough.

    Tokens run down and layers across; for heads, layers run down and heads across, at the token
    with the largest effect. Neurons have no map. All maps have one scale, unless each is to have
    its own.
    """
    names = [terminal.printable(label) for label in trace.labels()]
    sites = [site for site in trace.scores if site.partition(",")[0] != "neuron"]
    maps = []
    for site in sites:
        effects, look = trace.effects(site), site.partition(",")[0]
        peak = trace.scale(sites if shared_scale else [site])
        if look == "head":
            row = trace.best(site)[0]
            layers = [f"layer {layer}" for layer in range(effects.shape[1])]
            title = f"{site} at {names[row].strip()}"
            maps.append(_heat_map(title, effects[row], layers, trace.sign, peak))
        else:
            maps.append(_heat_map(site, effects, names, trace.sign, peak))
    return Columns(maps, padding=(0, 1))


def _heat_map(title: str, effects: Tensor, names: list[str], sign: int, peak: float) -> Text:
    """Return a heat map in characters, darkest for effects of `peak`, or of -`peak` if `sign` is
    -1.

    A column is two characters wide for up to 16 layers, otherwise one.
    """
    layers = effects.shape[1]
    wide = 2 if layers <= 16 else 1  # GPT-2 XL's 48 layers and a margin fit into 80 columns
    effects = (sign * effects).nan_to_num()
    # cells, not letters: Chinese and emoji take two
    margin = min(22, max(map(cell_len, names)))
    picture = Text()
    picture.append(f"{title}, strongest {sign * float(effects.max()):+.2g}\n", Style(bold=True))
    for name, row in zip(names, effects.tolist(), strict=True):
        while cell_len(name) > margin:
            name = f"…{name[2:]}"
        picture.append(" " * (margin - cell_len(name)) + f"{name} ")
        for effect in row:
            depth = min(1.0, max(0.0, effect / peak))
            picture.append(
                _SHADES[round(depth * (len(_SHADES) - 1))] * wide,
                _INK.get(title.partition(",")[0], "cyan"),
            )
        picture.append("\n")
    return picture.append(" " * (margin + 1) + _ticks(layers, wide) + "\n", Style(dim=True))


def _ticks(layers: int, wide: int) -> str:
    """Return the numbers below a map: as in "0    5    10", each where its column begins."""
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * wide > len(str(layers - 1)))
    numbers = "".join(str(layer).ljust(step * wide) for layer in range(0, layers, step))
    last = (layers - 1) // step * step
    # the last number may need more room than its columns have
    return numbers[: max(layers * wide, last * wide + len(str(last)))].rstrip()


def show_trace(trace: CausalTrace, *, shared_scale: bool = True) -> None:
    """Print the heat maps of a trace, and where the strongest effects are."""
    metric = trace.settings.get("metric", "probability").replace("_", " ")
    prompt, subject = terminal.printable(trace.prompt), terminal.printable(trace.subject)
    terminal.console.print(
        f"{escape(prompt).replace(escape(subject), f'[underline]{escape(subject)}[/]', 1)} →"
        f"[bold]{escape(terminal.printable(trace.answer))}[/]"
    )
    terminal.console.print(
        f"{metric} {trace.high_score:.3f}; with the subject corrupted {trace.low_score:.3f}"
    )
    if trace.caveat:
        terminal.console.print(f"[bold red]{escape(trace.caveat)}[/]")
    if trace.method != "exact":
        terminal.console.print(
            "[yellow]estimates[/], to first order" + (f"; {_exact(trace)}" if trace.exact else "")
        )
    terminal.console.print(heat_maps(trace, shared_scale=shared_scale))
    margin = max(map(len, trace.scores))
    for site in trace.scores:
        at = trace.best(site)
        effect = float(trace.effects(site)[at])
        terminal.console.print(
            f"  {site:<{margin}}  strongest at token {escape(repr(trace.tokens[at[0]]))}, "
            f"{_where(trace, site, at[1:])}: {effect:+.3f}"
        )


def _where(trace: CausalTrace, site: str, at: Sequence[int]) -> str:
    """Return the name of a column of a table, from its indices after the token axis."""
    if site.partition(",")[0] == "neuron":
        layer, neuron = trace.settings["neurons"][at[0]]
        return f"layer {layer}, neuron {neuron}"
    return f"layer {at[0]}" + (f", head {at[1]}" if len(at) > 1 else "")


def _exact(trace: CausalTrace) -> str:
    cells = sum(int(table.sum()) for table in trace.exact.values())
    return f"{cells} of {sum(table.numel() for table in trace.exact.values())} cells are exact"


def show_average(average: AverageTrace, *, shared_scale: bool = True) -> None:
    """Print average effects by role of the token, and the total effect with its interval."""
    from engram.locate.average import TOKEN_ROLES

    ate, low, high = average.total_effect()
    left_out = f", {len(average.skipped)} left out" if average.skipped else ""
    terminal.console.print(f"[bold]{len(average.traces)} facts[/]{left_out}")
    terminal.console.print(
        f"clean {average.clean:.3f}, corrupted {average.corrupted:.3f}: "
        f"total effect {ate:.3f} (95 %: {low:.3f} to {high:.3f})"
    )
    if average.caveat:
        terminal.console.print(f"[bold red]{escape(average.caveat)}[/]")
    if average.traces[0].method != "exact":
        terminal.console.print(
            "[yellow]estimates[/], to first order"
            + (", but for the best cells" if average.traces[0].exact else "")
        )
    sign = average.traces[0].sign
    maps = [
        _heat_map(
            site,
            average.effects(site).mean,
            list(TOKEN_ROLES),
            sign,
            average.scale(average.layered if shared_scale else [site]),
        )
        for site in average.layered
    ]
    if maps:
        terminal.console.print(Columns(maps, padding=(0, 1)))
    margin = max(map(len, [*average.sites, "strongest"]))
    terminal.console.print(
        f"  {'strongest':<{margin}}  {'at the last subject token':<25}  at the last token"
    )
    for site, about in average.summary()["sites"].items():
        peaks = [
            _peak(average, site, about[role]) if role in about else ""
            for role in ("last subject", "last")
        ]
        terminal.console.print(f"  {site:<{margin}}  {peaks[0]:<25}  {peaks[1]}".rstrip())


def _peak(average: AverageTrace, site: str, about: dict[str, Any]) -> str:
    return f"{about['effect']:+.3f} {_where(average.traces[0], site, about['at'])}"


def show_receipt(receipt: Receipt) -> None:
    """Print continuations before and after the edit, then the numbers of a receipt."""
    for prompt, before, after in receipt.continuations:
        terminal.console.print(f"[bold]{escape(_printable(prompt))}[/]")
        terminal.console.print(f"   before {escape(_one_line(before))}")
        terminal.console.print(f"   after  {escape(_one_line(after))}")
    terminal.console.print()
    *lines, verdict = str(receipt).splitlines()
    for line in lines:
        style = "green" if line.endswith("ok") else "red" if line.endswith("FAILED") else ""
        terminal.console.print(Text(_printable(line), style))
    colour = ("yellow" if receipt.cautions() else "green") if receipt.passed else "red"
    terminal.console.print(Text(verdict, colour))


def show_words(words: Mapping[str, str], *, err: bool = False) -> None:
    """Print what words mean, one line each.

    Args:
        err: on stderr, where stdout has to be JSON and nothing else.
    """
    from engram.evaluate.words import explained

    console = terminal.console
    if err:  # a note, which a quiet session does not print
        quiet = terminal.messages.quiet
        console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    console.print()
    for line in explained(words):
        console.print(Text(line, "dim"))


def show_knowledge(knowledge: Knowledge, seed: int) -> None:
    """Print the table by relation."""
    for i, line in enumerate(knowledge.table(seed=seed).splitlines()):
        style = (
            "bold"
            if i == 0 or line.startswith(("relation ", "all facts"))
            else "dim"
            if line.startswith("  ")
            else ""
        )
        terminal.console.print(Text(line, style))


def show_layer_card(card: LayerCard) -> None:
    """Print a row per layer: its trace and its edits; then the advice."""
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
    terminal.console.print(
        f"[bold]{escape(card.model)}[/], {card.n_layers} layers; "
        f"edits by {card.method} of {len(card.edited)} facts; "
        f"effects of {card.traces['window']} MLPs at the subject's last token"
    )
    terminal.console.print(table)
    for line in card.advice():
        terminal.console.print(f"  {escape(line)}")


def _bar(share: float, width: int) -> str:
    """Return a bar of characters, precise to an eighth of a character."""
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip().ljust(width)


def _one_line(text: str) -> str:
    return " ".join(_printable(text).split())


def _printable(text: str) -> str:
    """Return a text that a model or a file gave, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def show_runs(runs: list[Run], *, all_metrics: bool = False, explain: bool = False) -> None:
    """Print the table of runs: a row per method, the best score of each column in bold; under it
    what the columns mean.

    Args:
        explain: what all numbers of the benchmark mean.
    """
    from engram.benchmark import report as reports
    from engram.benchmark.metrics.table import METRICS

    scores = reports.table(runs, all_metrics=all_metrics)
    table = Table(
        title=escape(_printable(f"{runs[0].about['dataset']}, {runs[0].about['model']}")),
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("n", justify="right")
    for metric in scores.columns:
        table.add_column(METRICS[metric].title, justify="right")
    for method, (count, summary) in scores.rows.items():
        cells = []
        for metric in scores.columns:
            cell = reports.shown(summary.get(metric), metric, interval=False)
            cells.append(f"[bold]{cell}[/bold]" if scores.best.get(metric) == method else cell)
        table.add_row(escape(_printable(method)), str(count), *cells)
    # A table wider than the terminal is of more use than one that is cut.
    needed = 15 + max(map(len, scores.rows)) + 9 * len(scores.columns)
    Console(width=max(terminal.console.width, needed), highlight=False).print(table)
    if scores.note:
        terminal.console.print(Text(scores.note, "yellow"))
    show_words(reports.all_meanings(scores.form) if explain else reports.meanings(scores))


def show_differences(runs: list[Run]) -> None:
    """Print the differences of methods on the same records, with intervals."""
    from engram.benchmark import report as reports
    from engram.benchmark.metrics.table import METRICS

    headline = [name for name, metric in METRICS.items() if metric.headline]
    for (a, b), differences in reports.compare(runs).items():
        terminal.console.print(f"\n{_printable(a)} minus {_printable(b)}", markup=False)
        for metric in headline:
            if (difference := differences.get(metric)) is None:
                continue
            scale = METRICS[metric].scale
            low, high = difference.low * scale, difference.high * scale
            verdict = "  beyond chance" if reports.beyond_chance(difference) else ""
            terminal.console.print(
                f"  {METRICS[metric].title:<12}{difference.mean * scale:+9.2f}"
                f"   [{low:+.2f}, {high:+.2f}]   {difference.count} records{verdict}",
                markup=False,
            )
        if note := reports.no_verdicts([differences], headline):
            terminal.console.print(Text(f"  {note}", "yellow"))


def show_failures(runs: list[Run], limit: int) -> None:
    """Print prompts of each method that fail after its edits, and records without an edit."""
    for run in runs:
        for label in run.measured:
            terminal.console.print(f"\n{label}: prompts that fail after the edit", markup=False)
            for failure in run.failures(label, limit=limit):
                terminal.console.print(
                    f"  {failure.kind}: {failure.prompt!r}\n    wanted {failure.wanted!r}; "
                    f"before {failure.before!r}, now {failure.after!r}",
                    markup=False,
                )
            for id, error in list(run.errors(label).items())[:limit]:
                terminal.console.print(f"  {id}: no edit, {error}", markup=False)
