"""`engram bench` and `engram report`: thousands of edits, each measured by itself, and what they
came to.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engram.cli.options import (
    DeviceMap,
    Dtype,
    NumWorkers,
    OnWorkers,
    RayAddress,
    Seed,
    settings_of,
)

if TYPE_CHECKING:
    from engram.benchmark.results import Run


def bench(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="File of the run; one that is there is gone on with."),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="'pocket', a folder, or a model of the hub.")
    ] = "pocket",
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method; repeat. LABEL=METHOD keeps it under another name."),
    ] = None,
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="A name ('engram data list' tells), or a file.")
    ] = "pocket",
    n: Annotated[
        int | None, typer.Option("-n", help="The first so many records; default: all.", min=1)
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="LABEL:NAME=VALUE, any setting of a method; repeat."),
    ] = None,
    texts: Annotated[
        bool,
        typer.Option("--texts", help="Let the model write texts, for fluency and consistency."),
    ] = False,
    plus: Annotated[
        bool,
        typer.Option(
            "--plus", help="CounterFact+: also neighbours behind the edit's own sentence."
        ),
    ] = False,
    said: Annotated[
        int, typer.Option(help="Tokens of each greedy answer; 0: ask for none.", min=0)
    ] = 5,
    drift_every: Annotated[
        int, typer.Option(help="Read held-out text with every how manieth edit; 0: never.", min=0)
    ] = 10,
    batch: Annotated[int, typer.Option(help="Records edited and measured at once.", min=1)] = 32,
    workers: OnWorkers = None,
    num_workers: NumWorkers = 2,
    ray_address: RayAddress = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Edit every record of a benchmark by itself, by each method, and measure it before and after.
    Goes on where it was stopped.
    """
    from engram.benchmark.data.counterfact import with_statement
    from engram.benchmark.data.sources import read_dataset
    from engram.benchmark.metrics.outcomes import MeasureConfig
    from engram.benchmark.run import bench as run
    from engram.cli import terminal
    from engram.cli.options import workers_of

    with terminal.progress() as progress:
        wanted: Literal[False, "if there"] = "if there" if texts else False
        data = read_dataset(dataset, limit=n, references=wanted, progress=progress)
    if plus:
        data = with_statement(data)
    asked = MeasureConfig(said=said, texts=texts, drift_every=drift_every, seed=seed)
    lm = terminal.load(model, dtype, device_map)
    somewhere = workers_of(workers, num_workers, ray_address)
    with terminal.progress() as progress:
        done = run(
            lm,
            data,
            _methods(method or ["rome"], setting),
            out,
            n=n,
            asked=asked,
            batch=batch,
            workers=somewhere,
            progress=progress,
        )
    _show([done], every=False)
    typer.echo(f"run: {out}    (engram report {out} --help tells what else it holds)")


def _methods(given: list[str], pairs: list[str] | None) -> dict[str, dict[str, Any]]:
    """Label -> settings, with the method among them."""
    from engram.errors import SettingError

    methods: dict[str, dict[str, Any]] = {}
    for each in given:
        label, _, name = each.partition("=")
        methods[label] = {"method": name or label}
    for pair in pairs or []:
        label, colon, rest = pair.partition(":")
        if not colon or label not in methods:
            raise SettingError(
                f"--set {pair!r}: expected LABEL:NAME=VALUE with one of {', '.join(methods)} as label"
            )
        methods[label] |= settings_of([rest])
    return methods


class Format(StrEnum):
    terminal = "terminal"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    json = "json"
    parquet = "parquet"
    card = "card"
    cases = "cases"


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Files that 'engram bench' wrote.", show_default=False)
    ],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            help="Of the table; card: how it came about; cases: as the released code writes.",
        ),
    ] = Format.terminal,
    every: Annotated[
        bool, typer.Option("--all", help="All metrics, not only the headline ones.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Differences between methods on the same records.")
    ] = False,
    failures: Annotated[
        int,
        typer.Option(help="Show so many prompts of each method that fail after its edits.", min=0),
    ] = 0,
    plot: Annotated[Path | None, typer.Option(help="Picture of the scores.")] = None,
    plot_layers: Annotated[
        Path | None,
        typer.Option(
            help="Picture of the scores by layer, of methods that were run with --set LABEL:layer=N."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write to; default: the terminal.")
    ] = None,
) -> None:
    """The paper's table of one or several runs, with intervals."""
    from engram.benchmark import report as reports
    from engram.benchmark.results import Run
    from engram.errors import SettingError

    opened = [Run.open(path) for path in runs]
    if format is Format.parquet:
        if out is None:
            raise SettingError("--format parquet writes a file: give -o FILE.parquet")
        reports.write_parquet(opened, out)
        typer.echo(f"written: {out}")
    elif format is Format.terminal and out is None:
        _show(opened, every=every)
    else:
        _write(_told(opened, format, every), out)
    if compare:
        _show_differences(opened)
    if failures:
        _show_failures(opened, failures)
    if plot is not None or plot_layers is not None:
        from engram.benchmark import plots as benchmarks

        for path, draw in ((plot, benchmarks.plot_scores), (plot_layers, benchmarks.plot_layers)):
            if path is not None:
                draw(opened).savefig(path, dpi=200)
                typer.echo(f"picture: {path}")


def _told(runs: list[Run], format: Format, every: bool) -> str:
    from engram.benchmark import report as reports

    if format is Format.card:
        return json.dumps([run.card() for run in runs], indent=1, ensure_ascii=False)
    if format is Format.cases:
        cases = {
            f"{run.path.name}:{label}": reports.published_cases(run, label)
            for run in runs
            for label in run.measured
        }
        return json.dumps(cases, ensure_ascii=False)
    writers = {
        "markdown": reports.markdown,
        "latex": reports.latex,
        "csv": reports.as_csv,
        "json": reports.as_json,
    }
    return writers.get(format.value, reports.markdown)(reports.table(runs, every=every))


def _write(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text)
    else:
        out.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf8")
        typer.echo(f"written: {out}")


def _show(runs: list[Run], *, every: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from engram.benchmark import report as reports
    from engram.benchmark.metrics.table import METRICS
    from engram.cli import terminal

    made = reports.table(runs, every=every)
    drawn = Table(
        title=escape(f"{runs[0].about['dataset']}, {runs[0].about['model']}"), title_justify="left"
    )
    drawn.add_column("", no_wrap=True)
    drawn.add_column("n", justify="right")
    for name in made.columns:
        drawn.add_column(METRICS[name].title, justify="right")
    for name, (count, summary) in made.rows.items():
        cells = [
            reports.shown(summary.get(metric), metric, interval=False) for metric in made.columns
        ]
        bold = [
            f"[bold]{cell}[/bold]" if made.best.get(m) == name else cell
            for m, cell in zip(made.columns, cells, strict=True)
        ]
        drawn.add_row(escape(name), str(count), *bold)
    needed = 15 + max(map(len, made.rows)) + 9 * len(made.columns)
    width = max(
        terminal.console.width, needed
    )  # a table that is too wide is of more use than one cut short
    Console(width=width, highlight=False).print(drawn)
    note = "EG PG NG and SG: what the model says by itself; the others compare probabilities of given answers."
    terminal.console.print(note, style="dim")


def _show_differences(runs: list[Run]) -> None:
    from engram.benchmark import report as reports
    from engram.benchmark.metrics.table import METRICS

    for (a, b), differences in reports.compare(runs).items():
        typer.echo(f"\n{a} minus {b}")
        for metric, each in differences.items():
            if METRICS[metric].headline:
                scale = METRICS[metric].scale
                verdict = "" if each.low <= 0 <= each.high else "  beyond chance"
                typer.echo(
                    f"  {METRICS[metric].title:<12}{each.mean * scale:+9.2f}   [{each.low * scale:+.2f}, {each.high * scale:+.2f}]"
                    f"   {each.count} records{verdict}"
                )


def _show_failures(runs: list[Run], count: int) -> None:
    for run in runs:
        for label in run.measured:
            typer.echo(f"\n{label}: prompts that fail after the edit")
            for each in run.failures(label, count=count):
                typer.echo(
                    f"  {each.kind}: {each.prompt!r}\n    wanted {each.wanted!r}; before {each.before!r}, now {each.after!r}"
                )
            for id, error in list(run.errors(label).items())[:count]:
                typer.echo(f"  {id}: no edit, {error}")
