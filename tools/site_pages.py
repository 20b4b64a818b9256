"""Pages of the site that are made, not written: the command line's reference. An mkdocs hook, named in mkdocs.yml."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from typing import Any

from mkdocs.structure.files import File, Files

CLI_PAGE = "reference/cli.md"


def on_files(files: Files, *, config: Any) -> Files:
    files.append(File.generated(config, CLI_PAGE, content=command_line()))
    return files


def command_line() -> str:
    """What `engram --help` and its commands' help say, as markdown."""
    command = [sys.executable, "-m", "typer", "engram.cli", "utils", "docs", "--name", "engram", "--title", "Command line"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}).stdout
    return as_page(shown)


def as_page(shown: str) -> str:
    """typer's markdown with letters instead of entities, places of arguments in capitals, and no words that repeat.

    The list of commands is cut short by typer and told in full further down; `--help` is everywhere.
    """
    text = html.unescape(shown)
    text = re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), text)
    text = re.sub(r"^\*\*Commands\*\*:\n\n(?:\* .*\n)+", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\* `(?:-h, )?--help`: .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"^\*\*Options\*\*:\n\s*(?=#|\Z)", "", text, flags=re.MULTILINE)
