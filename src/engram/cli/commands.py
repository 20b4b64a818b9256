"""The table of commands, which typer shows and runs."""

from __future__ import annotations

from typing import Annotated

import typer

# These modules import typer and little else: a command's own imports are inside it. With torch and
# transformers here, `engram --help` and a misspelt option would take seconds.
from engram.cli import bench, data, demo, edit, harness, knows, layers, ledger, lens, stats, trace
from engram.cli.usage import Commands

app = Commands(
    name="engram",
    help="Find where a language model keeps a fact, rewrite it, and prove what else moved.",
    epilog="Exit codes: 0 done, 1 a check failed (verify, ledger conflicts, demo), 2 it could not "
    "be done, 130 stopped by Ctrl-C. Results are on standard output; notes, progress and errors "
    "are on standard error.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import engram

        typer.echo(f"engram {engram.__version__}")
        raise typer.Exit


@app.callback()
def _first_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None: ...


for title, commands in {
    "Start here": (demo.demo,),
    "Find a fact": (
        trace.trace,
        trace.average,
        knows.knows,
        layers.layers,
        lens.lens,
        lens.refinement,
        lens.memories,
    ),
    "Rewrite it": (
        edit.edit,
        edit.verify,
        edit.generate,
        edit.apply,
        edit.revert,
        edit.export,
        edit.push,
        stats.stats,
        stats.plan,
    ),
    "Measure many edits": (bench.bench, bench.report, harness.harness),
}.items():
    for command in commands:
        app.command(rich_help_panel=title)(command)  # named after its function
app.add_typer(data.app, name="data", rich_help_panel="Measure many edits")
app.add_typer(ledger.app, name="ledger", rich_help_panel="Keep edits over months")
