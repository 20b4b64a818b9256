"""Importing is light and changes nothing."""

from __future__ import annotations

import subprocess
import sys

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
        "import logging, random; before = random.getstate(); import engram, engram.cli; engram.trace, engram.rewrite, engram.verify\n"
        "print(random.getstate() == before, logging.getLogger().handlers)"
    )
    assert run(code).split(maxsplit=1) == ["True", "[]\n"]


def test_every_public_name_is_there():
    for name in engram.__all__:
        assert getattr(engram, name) is not None
    assert set(engram.__all__) <= set(dir(engram))


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"no attribute 'edit_fact'; public names: .*rewrite"):
        engram.edit_fact  # noqa: B018
