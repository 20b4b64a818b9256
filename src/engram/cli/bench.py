"""`engram bench` and `engram report`: many edits, each measured by itself, and their table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram.checks import briefly
from engram.cli import outputs
from engram.cli.options import AsJson, Explain, ModelOptions, Seed, WorkerOptions, parse_settings

if TYPE_CHECKING:
    from engram.benchmark.data.records import Dataset
    from engram.benchmark.results import Run


@dataclass(frozen=True)
class MethodsOptions:
    """Which methods are measured."""

    method: Annotated[
        list[str] | None,
        typer.Option(help="Method; repeat. LABEL=METHOD names it LABEL. [default: rome]"),
    ] = None
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="LABEL:NAME=VALUE, any setting of a method; repeat."),
    ] = None

    def methods(self) -> dict[str, dict[str, Any]]:
        """Return label -> settings, the method among them.

        Raises:
            SettingError: a setting of a label that no method has.
        """
        from engram.errors import SettingError

        methods: dict[str, dict[str, Any]] = {}
        for text in self.method or ["rome"]:
            # "memit" is its own label; "strong=memit" lets one method run twice.
            label, _, name = text.partition("=")
            methods[label] = {"method": name or label}
        settings: dict[str, list[str]] = {label: [] for label in methods}
        for pair in self.setting or []:
            label, colon, rest = pair.partition(":")
            if not colon or label not in methods:
                raise SettingError(
                    f"--set {briefly(pair)}: expected LABEL:NAME=VALUE with one of "
                    f"{', '.join(methods)} as label"
                )
            settings[label].append(rest)
        for label, pairs in settings.items():
            methods[label] |= parse_settings(pairs, ("method",))
        return methods


@dataclass(frozen=True)
class RecordsOptions:
    """Which records are edited."""

    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="Name from 'engram data list', or a file.")
    ] = "pocket"
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", "-n", help="Number of records, from the first; default: all.", min=1
        ),
    ] = None
    counterfactual_plus: Annotated[
        bool,
        typer.Option(
            "--counterfactual-plus",
            help="CounterFact+: also ask neighbours after a sentence that states the edit.",
        ),
    ] = False

    def read(self, texts: bool) -> Dataset:
        """Return the records, with reference texts if the model is to write `texts`."""
        from engram.benchmark.data.counterfact import with_statement
        from engram.benchmark.data.sources import read_dataset
        from engram.cli import terminal

        with terminal.progress() as progress:
            dataset = read_dataset(
                self.dataset,
                limit=self.limit,
                # Large, and of use for generated text only: read where present, not required.
                references="if there" if texts else False,
                progress=progress,
            )
        return with_statement(dataset) if self.counterfactual_plus else dataset


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured after every edit."""

    texts: Annotated[
        bool,
        typer.Option("--texts", help="Generate texts, and measure their fluency and consistency."),
    ] = False
    answer_tokens: Annotated[
        int, typer.Option(help="Tokens of each greedy answer; 0 disables answers.", min=0)
    ] = 5
    drift_every: Annotated[
        int,
        typer.Option(help="Measure held-out perplexity on every Nth record; 0 disables it.", min=0),
    ] = 10
    records_per_batch: Annotated[
        int, typer.Option(help="Records edited and measured together.", min=1)
    ] = 32
    seed: Seed = 0


@dataclass(frozen=True)
class RunOutput:
    """Where a run is written, and how it is shown."""

    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Run file; an existing run is resumed.", show_default=False
        ),
    ]
    as_json: AsJson = False


def bench(
    output: RunOutput,
    *,
    model: Annotated[
        str, typer.Option("--model", "-m", help="'pocket', 'smollm2', a folder, ...")
    ] = "pocket",
    methods_options: MethodsOptions,
    records: RecordsOptions,
    measures: MeasureOptions,
    workers: WorkerOptions,
    model_options: ModelOptions,
) -> None:
    """Edit every record of a benchmark by itself, by each method, and measure before and after.

    A run that was stopped is resumed.

    Example: engram bench --method rome --method memit --limit 50 -o run.sqlite
    """
    from engram.cli import show, terminal
    from engram.editors.methods import check_method

    out = output.out
    file = outputs.Output("run", out, "a run", parents=True)
    with outputs.tried(file, reads=[records.dataset], cached=lambda: _kept(out)):
        from engram.benchmark.metrics.outcomes import MeasureConfig
        from engram.benchmark.run import bench as run_benchmark
        from engram.benchmark.store import RunStore

        RunStore.check(out)
        # Records and settings before the model: their mistakes are reported without its loading
        # time.
        methods = methods_options.methods()
        for label, settings in methods.items():
            own = {name: settings[name] for name in settings if name != "method"}
            check_method(settings.get("method", label), own, model)
        dataset = records.read(measures.texts)
        config = MeasureConfig(
            answer_tokens=measures.answer_tokens,
            texts=measures.texts,
            drift_every=measures.drift_every,
            seed=measures.seed,
        )
        lm = model_options.load(model)
        with terminal.progress() as progress:
            run = run_benchmark(
                lm,
                dataset,
                methods,
                out,
                limit=records.limit,
                config=config,
                records_per_batch=measures.records_per_batch,
                workers=workers.open(),
                progress=progress,
            )
    if output.as_json:
        terminal.print_json({"run": out} | _document([run]))
        return
    show.show_runs([run])
    typer.echo(f"run: {out}    (see engram report --help for other tables of it)")


def _kept(out: Path) -> str:
    """Return how much of a run that was stopped is in its file."""
    from engram.benchmark.store import RunStore

    if not out.exists():
        return ""
    with RunStore.reading(out) as store:
        done = {label: len(store.done(label)) for label in store.methods()}
        total = len(store.records())
    counts = ", ".join(f"{count} of {total} records of {label}" for label, count in done.items())
    return f"{counts or 'no records'} are kept in {out}; {outputs.RESUME}"


class Format(StrEnum):
    terminal = "terminal"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"
    json = "json"
    parquet = "parquet"
    card = "card"
    cases = "cases"


_KINDS = {
    Format.terminal: "markdown",
    Format.markdown: "markdown",
    Format.latex: "LaTeX",
    Format.csv: "CSV",
    Format.json: "JSON",
    Format.parquet: "parquet",
    Format.card: "JSON",
    Format.cases: "JSON",
}


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures are drawn."""

    plot: Annotated[Path | None, typer.Option(help="Picture of the scores.")] = None
    plot_layers: Annotated[
        Path | None,
        typer.Option(help="Picture of the scores by layer, of runs with --set LABEL:layer=N."),
    ] = None

    def names(self) -> tuple[outputs.Output, outputs.Output]:
        """Return their names."""
        return outputs.picture(self.plot), outputs.picture(self.plot_layers)

    def writers(self, runs: list[Run]) -> outputs.Writers:
        """Return what draws them."""
        from engram.benchmark import plots

        draws = (plots.plot_scores, plots.plot_layers)
        return {
            output: partial(outputs.draw, partial(draw, runs), dpi=200)
            for output, draw in zip(self.names(), draws, strict=True)
            if output.path is not None
        }


@dataclass(frozen=True)
class TableOptions:
    """What of the runs is shown."""

    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            help="Format of the table; card: how it was run; cases: as the released code writes.",
        ),
    ] = Format.terminal
    all_metrics: Annotated[
        bool, typer.Option("--all", help="Show all metrics, not only the headline ones.")
    ] = False
    compare: Annotated[
        bool, typer.Option("--compare", help="Show differences of methods on the same records.")
    ] = False
    failures: Annotated[
        int, typer.Option(help="Show N prompts of each method that fail after its edits.", min=0)
    ] = 0


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Files that 'engram bench' wrote.", show_default=False)
    ],
    *,
    shown: TableOptions,
    pictures: PictureOptions,
    explain: Explain = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write to; default: the terminal.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the paper's table of one or several runs, with intervals.

    Example: engram report run.sqlite --all --compare --plot scores.png
    """
    from engram.cli import show, terminal
    from engram.errors import SettingError

    format, all_metrics, compare = shown.format, shown.all_metrics, shown.compare
    failures = shown.failures
    if as_json and (out is not None or format is not Format.terminal):
        raise SettingError("--json prints the table: leave out --format and --out")
    # Parquet is binary and cannot go to the terminal; the terminal's table cannot go to a file
    # (it has colours): there, markdown takes its place.
    if format is Format.parquet and out is None:
        raise SettingError("--format parquet writes a file: give -o FILE.parquet")

    def show_result() -> None:
        if explain and (as_json or format is not Format.terminal or out is not None):
            show.show_words(reports.all_meanings(opened[0].form), err=True)
        if as_json:
            terminal.print_json(_document(opened, all_metrics, compare, failures))
            return
        if out is None and format is Format.terminal:
            show.show_runs(opened, all_metrics=all_metrics, explain=explain)
        elif out is None:
            typer.echo(_formatted(opened, format, all_metrics, compare))
        # JSON has them inside: a text after it would be no JSON.
        if compare and format is not Format.json:
            show.show_differences(opened)
        if failures:
            show.show_failures(opened, failures)

    def write(path: Path) -> None:
        if format is Format.parquet:
            reports.write_parquet(opened, path)
        else:
            outputs.write_text(_formatted(opened, format, all_metrics, compare), path)

    table = outputs.Output("written", out, _KINDS[format])
    with outputs.tried(table, *pictures.names(), reads=runs) as written:
        from engram.benchmark import report as reports
        from engram.benchmark.results import Run

        opened = [Run.open(path) for path in runs]
        writers: outputs.Writers = {table: write, **pictures.writers(opened)}
        written.finish(show_result, writers, as_json=as_json)


def _document(
    runs: list[Run], all_metrics: bool = False, compare: bool = False, failures: int = 0
) -> dict[str, Any]:
    """Return the tables of runs for `--json`."""
    from dataclasses import asdict

    from engram.benchmark import report as reports

    scores = reports.table(runs, all_metrics=all_metrics)
    document: dict[str, Any] = {"table": json.loads(reports.as_json(scores))}
    if compare:
        document["differences"] = [
            {"minuend": a, "subtrahend": b, "note": reports.no_verdicts([of_pair], scores.columns)}
            | {
                metric: asdict(difference) | {"beyond_chance": reports.beyond_chance(difference)}
                for metric, difference in of_pair.items()
            }
            for (a, b), of_pair in reports.compare(runs).items()
        ]
    if failures:
        document["failures"] = [
            {"run": run.path, "method": label} | asdict(failure)
            for run in runs
            for label in run.measured
            for failure in run.failures(label, limit=failures)
        ]
    return document


def _formatted(runs: list[Run], format: Format, all_metrics: bool, compare: bool) -> str:
    from engram.benchmark import report as reports

    if format is Format.card:
        return json.dumps([run.card() for run in runs], indent=1, ensure_ascii=False)
    if format is Format.cases:
        cases = {
            # Two runs may have methods of one name.
            f"{run.path.name}:{label}": reports.published_cases(run, label)
            for run in runs
            for label in run.measured
        }
        return json.dumps(cases, ensure_ascii=False)
    if format is Format.json and compare:
        return json.dumps(_document(runs, all_metrics, compare), indent=1, ensure_ascii=False)
    writers = {
        "markdown": reports.markdown,
        "latex": reports.latex,
        "csv": reports.as_csv,
        "json": reports.as_json,
    }
    # Format.terminal with -o: see `report`.
    return writers.get(format.value, reports.markdown)(reports.table(runs, all_metrics=all_metrics))
