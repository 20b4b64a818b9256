"""Run `engram` commands in this process, and see what a user sees of a mistake."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from engram import cli

FACT = ["--subject", "tower of Rome", "--prompt", "The {} is in the city of", "--target", "Paris"]


def run(*args: str, ends: int = 0):
    result = CliRunner().invoke(cli.app, list(args), catch_exceptions=True)
    if ends == 0 and result.exception is not None:
        raise result.exception
    assert result.exit_code == ends, result.output
    return result


def failing(monkeypatch, capsys, *args: str) -> str:
    """Return what a user sees whose command is wrong."""
    monkeypatch.setattr(sys, "argv", ["engram", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told
