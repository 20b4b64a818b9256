"""The command line: the library's verbs, without logic.

Heavy imports wait until a command runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.cli.commands import app as app


def main() -> None:
    """Run a command; report whatever stops it in one line, without a traceback.

    Exit codes: see `engram.cli.ending`.
    """
    from engram.cli import ending

    def command() -> None:
        from engram.cli import app

        app()

    ending.run(command)


def __getattr__(name: str) -> Any:
    # Not at the top: typer takes 0.2 s, in which Ctrl-C would show a traceback.
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engram.cli.commands import app

    return app
