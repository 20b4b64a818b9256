"""No page, docstring, comment or message uses words that readers from elsewhere stumble over."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

INSTEAD = {  # what is avoided -> what to write
    r"behind": "after, past",
    r"told": "reported",
    r"laid": "applied",
    r"anew": "again",
    r"so many": "N",
    r"as far as": "up to, where",
    r"how manieth": "every Nth",
    r"(?:go|goes|gone|going|went) on with": "resume",
}
AVOIDED = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b", re.IGNORECASE)
ALLOWED = {"CHANGELOG.md": ("was `behind=`",)}  # file -> phrases in which such a word is right
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
)


def prose(path: Path) -> str:
    """Return the text of a page; of a Python file, its comments and strings."""
    text = path.read_text(encoding="utf8")
    if path.suffix != ".py":
        return text
    kinds = {
        tokenize.COMMENT,
        tokenize.STRING,
        getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING),
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in kinds)


@pytest.mark.parametrize("file", FILES)
def test_words_to_avoid(file):
    text = " ".join(re.sub(r"^\s*#:?", "", prose(ROOT / file), flags=re.MULTILINE).split())
    for phrase in ALLOWED.get(file, ()):
        assert phrase in text, f"{phrase!r} is no longer in {file}: remove it from ALLOWED"
        text = text.replace(phrase, "")
    lines = [text[max(0, m.start() - 40) : m.end() + 40] for m in AVOIDED.finditer(text)]
    assert not lines, "\n".join(lines)
