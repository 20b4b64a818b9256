"""The tables of docs/receipts.md, made from engram.evaluate.words. Run it after changing a word:

python tools/words_table.py
"""

from __future__ import annotations

from collections.abc import Mapping

from engram.evaluate.words import RECEIPT_WORDS, REPORT_WORDS
from page_tables import DOCS, markdown, put

PAGE = DOCS / "receipts.md"
TABLES = {"receipts": RECEIPT_WORDS, "reports": REPORT_WORDS}
MADE_BY = "tools/words_table.py, {}"


def table(words: Mapping[str, str]) -> str:
    """Return words and their meanings as a table in markdown."""
    return markdown(("Word", "What it means"), words.items())


def main() -> None:
    """Write both tables."""
    for name, words in TABLES.items():
        put(PAGE, MADE_BY.format(name), table(words))


if __name__ == "__main__":
    main()
