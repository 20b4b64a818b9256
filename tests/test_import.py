"""Importing is light and changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engram


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("module", ["engram", "engram.cli"])
def test_importing_loads_nothing_heavy(module):
    heavy = ("torch", "transformers", "matplotlib", "numpy", "peft", "datasets")
    assert (
        run(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])").strip()
        == "[]"
    )


def test_importing_sets_no_seed_and_no_logging():
    code = (
        "import logging, random; before = random.getstate()\n"
        "import engram, engram.cli; engram.trace, engram.rewrite, engram.verify\n"
        "print(random.getstate() == before, logging.getLogger().handlers)"
    )
    assert run(code).split(maxsplit=1) == ["True", "[]\n"]


def test_every_public_name_is_there():
    for name in engram.__all__:
        assert getattr(engram, name) is not None
    assert set(engram.__all__) <= set(dir(engram))


def test_type_checkers_see_the_public_names_where_they_are():
    source = Path(engram.__file__).read_text(encoding="utf8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    seen = {
        alias.asname: node.module.removeprefix("engram.")
        for node in imports
        for alias in node.names
        if alias.asname
    }
    assert seen == engram._HOMES


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"no attribute 'edit_fact'; public names: .*rewrite"):
        engram.edit_fact  # noqa: B018
