"""Examples in docstrings run and print what they say, and every public function has one.

Names that every example may use: `engram`, `lm` (the bundled model), `fact` and `edit`, a ROME edit
of it. The working folder is empty.
"""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module
from typing import Any

import pytest

import engram
from tests.helpers.paths import ROOT

SOURCES = ROOT / "src"
WITH_EXAMPLES = [  # modules
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((SOURCES / "engram").rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf8")
]
FUNCTIONS = [name for name in engram.__all__ if inspect.isfunction(getattr(engram, name))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def names(pocket_lm: Any) -> dict[str, Any]:
    lm = pocket_lm
    fact = engram.Fact("Eiffel Tower", "The {} is located in the city of", "Rome")
    return {"engram": engram, "lm": lm, "fact": fact, "edit": engram.rewrite(lm, fact)}


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_run(module, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for example in doctest.DocTestFinder().find(import_module(module), extraglobs=names):
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example(name):
    documentation = inspect.getdoc(getattr(engram, name)) or ""
    assert "Example:\n" in documentation
    assert ">>>" in documentation.partition("Example:\n")[2]
