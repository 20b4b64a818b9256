"""The command line: the library's verbs, without logic.

Heavy imports wait until a command runs.
"""

from __future__ import annotations

import sys

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


def main() -> None:
    """Run a command; report a user's mistake in one line, without a traceback."""
    from engram.errors import EngramError

    try:
        app()
    except EngramError as error:
        print(f"engram: {error}", file=sys.stderr)  # noqa: T201  a command speaks
        sys.exit(2)  # as typer does for wrong options; 1 means that a check failed (verify)
    except KeyboardInterrupt:
        print("engram: stopped; nothing was left half done", file=sys.stderr)  # noqa: T201
        sys.exit(130)  # 128 + SIGINT, so that shell loops stop too
