"""The table of commands, which typer shows and runs."""

from __future__ import annotations

import typer

# These modules import typer and little else: a command's own imports are inside it. With torch and
# transformers here, `engram --help` and a misspelt option would take seconds.
from engram.cli import bench, data, demo, edit, harness, knows, layers, ledger, lens, stats, trace
from engram.cli.options import expand_groups

app = typer.Typer(
    name="engram",
    help="Find where a language model keeps a fact, rewrite it, and prove what else moved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo.demo,
    trace.trace,
    trace.average,
    knows.knows,
    layers.layers,
    lens.lens,
    lens.refinement,
    lens.memories,
    edit.edit,
    edit.verify,
    edit.apply,
    edit.revert,
    edit.generate,
    stats.stats,
    stats.plan,
    bench.bench,
    bench.report,
    harness.harness,
):
    # typer names a command after its function; `expand_groups` keeps name and docstring.
    app.command()(expand_groups(command))
app.add_typer(ledger.app, name="ledger")
app.add_typer(data.app, name="data")
