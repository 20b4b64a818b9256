"""How a command line is read: help where a user looks for it, and one line about a wrong one.

Knows typer and no command of ours.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from engram.checks import alternatives, briefly, did_you_mean, problem
from engram.cli.ending import say
from engram.cli.options import expand_groups

# typer names no class for what is wrong with a command line; it is what `BadParameter` is one of.
_UsageError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors only: no notes, no bars.")
]


class Commands(typer.Typer):
    """Commands under one name, which share options and the look of their errors."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=_Group,
            add_completion=False,
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
            **settings,
        )

    def command(self, *args: Any, **settings: Any) -> Callable[[Any], Any]:
        """Return typer's decorator, for commands that take groups of options."""
        register = super().command(*args, **settings)
        return lambda command: register(_with_quiet(expand_groups(command)))


def _with_quiet(command: Callable[..., None]) -> Callable[..., None]:
    quiet_option = Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)

    @wraps(command)
    def call(*, quiet: bool, **values: Any) -> None:
        from engram.cli import terminal

        with terminal.session(quiet):
            command(**values)

    parameters = [*signature(command).parameters.values(), quiet_option]
    call.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {**command.__annotations__, "quiet": Quiet}
    return call


class _Group(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read arguments; none, and "help edit", ask for help."""
        if not args:
            args = ["--help"]
        elif args[0] == "help":
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run a command and exit; whatever it raises is the caller's.

        typer's own `main` would take Ctrl-C and a closed pipe for itself, and draw a box around a
        usage error.
        """
        try:
            with self.make_context("engram", list(sys.argv[1:] if args is None else args)) as ctx:
                self.invoke(ctx)
        except typer.Exit as ended:
            sys.exit(ended.exit_code)
        except _UsageError as error:
            path = error.ctx.command_path if error.ctx else "engram"
            say(f"{_worded(error).strip().rstrip('.?')}. Try '{path} --help'")
            sys.exit(2)
        sys.exit(0)


def _worded(error: Any) -> str:
    """Return what is wrong with a command line, in our words where it is an option's value."""
    invalid, parameter = error.__cause__, getattr(error, "param", None)
    if parameter is None or not hasattr(invalid, "errors"):  # typer parses values by pydantic
        return error.format_message()
    name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name
    first = invalid.errors()[0]
    if choices := re.fullmatch(r"Value error, .* is not one of ('.*')\.", first["msg"]):
        known = re.findall("'(.*?)'", choices[1])
        hint = did_you_mean(first["input"], known)
        return f"{name}={briefly(first['input'])}: expected {alternatives(known)}{hint}"
    return problem(invalid, first["input"], name, joint=": ")
