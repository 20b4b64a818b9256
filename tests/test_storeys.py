"""A module imports only what is below it: the contracts of pyproject, what they catch, and names in
tables, which import-linter does not see.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

import engram
from engram.editors.methods import METHODS
from tests.helpers.paths import ROOT

LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["tool"]["importlinter"]
STOREYS = next(c["layers"] for c in LINTER["contracts"] if c["type"] == "layers")
HEIGHT = {  # folder or module in the package's root -> its storey, 0 at the bottom
    name: height
    for height, row in enumerate(reversed(STOREYS))
    for name in row.replace("|", " ").split()
}
MODULES = {
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "src/engram").rglob("*.py")
}


def imported_by_name(text: str) -> Iterator[str]:
    """Modules that string constants name: "engram.facts", "engram.facts:Fact"."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = node.value.partition(":")[0]
            if re.fullmatch(r"engram(\.\w+)+", module) and module in MODULES:
                yield module


def may_import(importer: str, imported: str) -> bool:
    """Whether the storeys allow it; a folder may import its own modules."""
    above, below = importer.split(".")[1], imported.split(".")[1]
    return above == below or HEIGHT[above] > HEIGHT[below]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` on a folder that holds pyproject.toml and src/."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def house(tmp_path):
    """Return a copy of the package and its contracts."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(
        ROOT / "src/engram", tmp_path / "src/engram", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def test_the_house_keeps_its_contracts(house):
    assert (done := lint(house)).returncode == 0, done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "import engram.editors.methods\n",
        "def late():\n    from engram.editors.methods import METHODS\n    return METHODS\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import engram.editors\n",
    ],
    ids=["at the top", "in a function", "for types only"],
)
def test_an_import_upwards_is_refused(house, line):
    with (house / "src/engram/model/tokens.py").open("a", encoding="utf8") as file:
        file.write("\n\n" + line)
    done = lint(house)
    assert done.returncode == 1
    assert "engram.model is not allowed to import engram.editors" in done.stdout


def test_a_circle_within_a_folder_is_refused(house):
    with (house / "src/engram/files/locks.py").open("a", encoding="utf8") as file:
        file.write("\n\ndef late():\n    import engram.files.run_file\n")
    done = lint(house)
    assert done.returncode == 1
    assert re.search(r"circle.* BROKEN", done.stdout)


def test_every_file_in_the_root_has_a_storey():
    assert {name.split(".")[1] for name in MODULES if "." in name} - {"__main__"} == set(HEIGHT)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"engram"}))
def test_names_of_modules_in_tables_count_as_imports(name):
    for imported in imported_by_name(MODULES[name].read_text(encoding="utf8")):
        assert may_import(name, imported), f"{name} names {imported}, which is above it"


def test_names_in_tables_are_seen_and_judged():
    text = (ROOT / "src/engram/editors/methods.py").read_text(encoding="utf8")
    homes = {str(method.function).partition(":")[0] for method in METHODS.values()}
    assert homes <= set(imported_by_name(text))
    assert not may_import("engram.model.tokens", "engram.editors.methods")
    assert not may_import("engram.locate.trace", "engram.editors.methods"), "beside it"
    assert may_import("engram.editors.methods", "engram.editors.in_context")


def test_public_names_are_where_the_table_says():
    for name, home in engram._HOMES.items():
        module, _, attribute = home.partition(":")
        assert f"engram.{module}" in MODULES, name
        assert hasattr(sys.modules.get(f"engram.{module}") or engram, attribute or name), name


def test_only_the_command_line_imports_the_package_as_users_do():
    """`import engram` reaches every storey through the table of public names."""
    graph = grimp.build_graph("engram", cache_dir=None)
    importers = {name.split(".")[1] for name in graph.find_modules_that_directly_import("engram")}
    assert importers <= {"cli", "__main__"}
