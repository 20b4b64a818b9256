"""The reference of the command line, from its help texts: an mkdocs hook, named in mkdocs.yml."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CLI_PAGE = "reference/cli.md"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    return command_line() if page.file.src_uri == CLI_PAGE else markdown


def command_line() -> str:
    """Return what `engram --help` and its commands' help say, as markdown."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "engram.cli.commands",
        "utils",
        "docs",
        "--name",
        "engram",
        "--title",
        "Command line",
    ]
    source = {"PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src"), "COLUMNS": "200"}
    return as_page(
        subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | source
        ).stdout
    )


def as_page(shown: str) -> str:
    """Return typer's markdown with letters for entities and arguments in capitals.

    The list of commands is dropped: typer truncates it, and each command has a section. So is
    `--help`, which every command has.
    """
    text = html.unescape(shown)
    text = re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), text)
    text = re.sub(r"^(?:\$ engram|\* `\[).*$", _in_capitals, text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\* `(?:-h, )?--help`: .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^\*\*Options\*\*:\n\s*(?=#|\Z)", "", text, flags=re.MULTILINE)


def _in_capitals(line: re.Match[str]) -> str:
    """Write optional arguments in capitals: `[prompt]` becomes `[PROMPT]`."""
    return re.sub(r"\[[a-z_]+\]", lambda match: match[0].upper(), line[0])
