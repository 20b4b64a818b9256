"""Commands take groups of options as one value, and typer sees every option of a group."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from engram import cli
from engram.cli.options import ModelOptions, WorkerOptions, expand_groups, parse_settings
from engram.errors import SettingError


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--wide", "-w", help="Width in cm.")]
    height: Annotated[int, typer.Option(help="Height in cm.")] = 2


def draw(name: str, size: Size, *, times: int = 1) -> None:
    """Draw a thing."""
    typer.echo(f"{name} {size} {times}")


def test_a_group_becomes_one_option_per_field():
    parameters = signature(expand_groups(draw)).parameters
    assert list(parameters) == ["name", "width", "height", "times"]
    assert {p.kind for p in parameters.values()} == {Parameter.KEYWORD_ONLY}
    assert parameters["width"].default is Parameter.empty
    assert parameters["height"].default == 2


def test_the_command_gets_the_group_back():
    app = typer.Typer()
    app.command()(expand_groups(draw))
    result = CliRunner().invoke(app, ["box", "-w", "3", "--times", "4"])
    assert result.output == "box Size(width=3, height=2) 4\n"
    shown = CliRunner().invoke(app, ["--help"]).output
    for text in ("Draw a thing.", "--wide", "-w", "Width in cm.", "--height", "[default: 2]"):
        assert text in shown
    assert CliRunner().invoke(app, ["box"]).exit_code == 2, "--wide has no default"


def test_two_options_of_one_name_are_a_mistake_of_ours():
    def twice(size: Size, height: int) -> None:
        pass

    with pytest.raises(ValueError, match="duplicate parameter name: 'height'"):
        expand_groups(twice)


def commands(group, path=()):
    """Every command of the command line, with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_option_has_one_line_of_help():
    for path, command in commands(typer.main.get_command(cli.app)):
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            if text is None:
                continue
            assert text and "\n" not in text and len(text) <= 90, (path, parameter.name, text)


def test_no_option_is_without_help():
    silent = [
        (*path, parameter.name)
        for path, command in commands(typer.main.get_command(cli.app))
        for parameter in command.params
        if parameter.name != "help" and not getattr(parameter, "help", None)
    ]
    assert silent == []


def test_no_workers_are_the_default():
    assert WorkerOptions().open() is None
    assert ModelOptions() == ModelOptions(dtype=None, device_map=None)


def test_settings_are_json_or_text():
    assert parse_settings(["steps=3", "variant=p-rome", "layers=[1, 2]", "text=a=b"]) == {
        "steps": 3,
        "variant": "p-rome",
        "layers": [1, 2],
        "text": "a=b",
    }


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["steps"], "--set 'steps': expected NAME=VALUE"),
        (["=3"], "--set '=3': expected NAME=VALUE"),
        (["a b=3"], "--set 'a b=3': expected NAME=VALUE"),
        (["steps=3", "steps=4"], "--set 'steps=4': expected one value of steps"),
        (["seed=3"], "--set 'seed=3': seed has an option of its own"),
        (["steps=" + "[" * 100_000], r"--set 'steps=\[\[.*: expected a plain value"),
    ],
)
def test_pairs_that_are_no_settings_are_refused(pairs, message):
    with pytest.raises(SettingError, match=message):
        parse_settings(pairs, ["seed"])


def test_a_number_of_thousands_of_digits_is_a_text():
    assert parse_settings(["steps=" + "9" * 5000]) == {"steps": "9" * 5000}
