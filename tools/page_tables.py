"""Tables in docs/ that programs write, between `<!-- made by PROGRAM -->` and `<!-- end -->`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
END = "<!-- end -->"


def folder(model: str) -> Path:
    """Return where the numbers of a model's page are."""
    return DOCS / "data" if model == "pocket" else DOCS / "data" / model


def begin(program: str) -> str:
    """Return the line above the table of a program such as "tools/families_table.py"."""
    return f"<!-- made by {program} -->"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in markdown."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def current_table(page: Path, program: str) -> str:
    """Return the table that the page has now."""
    return page.read_text("utf-8").split(begin(program))[1].split(END)[0].strip()


def put(page: Path, program: str, table: str) -> None:
    """Replace the table of a page."""
    before, rest = page.read_text("utf-8").split(begin(program))
    page.write_text(f"{before}{begin(program)}\n\n{table}\n\n{END}{rest.split(END, 1)[1]}", "utf-8")
