"""The command line: the library's verbs, without logic.

Heavy imports wait until a command runs.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

# These modules import typer and little else: a command's own imports are inside it. With torch and
# transformers here, `engram --help` and a misspelt option would take seconds.
from engram.cli import bench, data, demo, edit, harness, knows, layers, ledger, lens, stats, trace
from engram.cli.options import expand_groups

_TRACEBACK = "ENGRAM_TRACEBACK"  # set: mistakes of ours show their traceback

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
    """Run a command; report whatever stops it in one line, without a traceback.

    Exit codes: 0 done, 1 a check failed (verify), 2 the command could not be done, 130 Ctrl-C.
    """
    from engram.errors import EngramError

    try:
        app()
    except EngramError as error:
        _stop(str(error))
    except BrokenPipeError:  # `engram ... | head` has read enough
        sys.stdout = None  # else Python complains when it flushes it
        sys.exit(0)
    except KeyboardInterrupt:
        print("engram: stopped; nothing was left half done", file=sys.stderr)  # noqa: T201
        sys.exit(130)  # 128 + SIGINT, so that shell loops stop too
    except OSError as error:
        _stop(f"{error.filename or 'a file'}: {error.strerror or error}")
    except (MemoryError, RecursionError) as error:
        _stop(f"not enough memory: {error or 'the command needs more than is free'}")
    except Exception as error:
        if os.environ.get(_TRACEBACK):
            raise
        text = " ".join(str(error).split())
        _stop(
            f"a mistake in engram, {type(error).__name__}: {text}. Please report it with what "
            f"{_TRACEBACK}=1 in the environment shows"
        )


def _stop(message: str) -> NoReturn:
    """Print a message on stderr and leave with exit code 2, as typer does for wrong options."""
    print(f"engram: {message}", file=sys.stderr)  # noqa: T201  a command speaks
    sys.exit(2)
