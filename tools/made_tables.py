"""Tables of docs/ that programs make: between `<!-- made by WHAT -->` and `<!-- end -->` of a
page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
END = "<!-- end -->"


def begin(what: str) -> str:
    """Return the line above what `what` makes, such as "tools/families_table.py"."""
    return f"<!-- made by {what} -->"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(each) + " |" for each in (columns, ["---"] * len(columns), *rows)
    )


def made(page: Path, what: str) -> str:
    """Return what stands there now."""
    return page.read_text("utf-8").split(begin(what))[1].split(END)[0].strip()


def put(page: Path, what: str, table: str) -> None:
    """Write a table in the place of the last one."""
    before, rest = page.read_text("utf-8").split(begin(what))
    page.write_text(f"{before}{begin(what)}\n\n{table}\n\n{END}{rest.split(END, 1)[1]}", "utf-8")
