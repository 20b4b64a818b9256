"""Code in the README and in docs/ runs, and prints what is said there."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import patch

import pytest

from engram import pocket
from engram.editors.methods import METHODS
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = (
    "locate",
    "editors",
    "ledger",
    "chat-and-context",
    "real-models",
    "evaluate",
)  # 10 s or more
BLOCK = re.compile(r"```python\n(?P<code>.*?)```(?:\s*```text\n(?P<output>.*?)```)?", re.DOTALL)


def without_decimals(text: str) -> str:
    """Words, counts and verdicts have to agree; decimals differ in their last digits between
    machines.
    """
    text = re.sub(r"\d+\.\d+", "#", text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
@patch.dict(METHODS)  # a page may add a method of its own
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (page.stem in SLOW))
        for page in PAGES
    ],
)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in BLOCK.finditer(page.read_text(encoding="utf8")):
        exec(compile(block["code"], str(page), "exec"), names)
        told = capsys.readouterr().out
        if block["output"] is not None:
            assert without_decimals(told) == without_decimals(block["output"])


def test_every_file_that_a_page_points_to_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf8")):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"
