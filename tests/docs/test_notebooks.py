"""Every notebook runs from top to bottom, holds what the run puts out, and names no folder of
anybody's machine.
"""

from __future__ import annotations

import pytest

nbformat = pytest.importorskip("nbformat")
run_notebooks = pytest.importorskip("run_notebooks")

from nbclient.exceptions import CellExecutionError  # noqa: E402

from tests.helpers.paths import ROOT  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook(*sources):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_holds_what_the_run_puts_out(path):
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    assert list(run_notebooks.complaints(stored, run_notebooks.executed(stored))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_small_enough_to_read_as_a_diff(path):
    assert path.stat().st_size < 1_500_000


def test_a_run_has_this_source_tree_and_keeps_outputs_but_nothing_of_the_machine():
    asked = notebook(
        "import engram, pathlib\nprint(engram.__name__)", "pathlib.Path(engram.__file__).parts[-3:]"
    )
    fresh = run_notebooks.executed(asked)
    assert fresh.cells[0].outputs[0].text == "engram\n"
    assert fresh.cells[1].outputs[0].data["text/plain"] == "('src', 'engram', '__init__.py')"
    assert [cell.execution_count for cell in fresh.cells] == [1, 2]
    assert dict(fresh.metadata.language_info) == {"name": "python"}
    assert asked.cells[0].outputs == []
    assert list(run_notebooks.complaints(fresh, fresh)) == []
    assert list(run_notebooks.complaints(asked, fresh)) == [
        "code cell 1 is stored with number None; run from top to bottom it has 1",
        "code cell 1 holds no output, a run gives ['stream stdout']",
        "code cell 2 is stored with number None; run from top to bottom it has 2",
        "code cell 2 holds no output, a run gives ['text/plain']",
    ]


def test_a_cell_that_fails_is_shown_with_its_error():
    with pytest.raises(CellExecutionError, match=r"1 / 0[\s\S]*ZeroDivisionError"):
        run_notebooks.executed(notebook("1 / 0"))


@pytest.mark.parametrize(
    "text",
    [
        "open('/home/ann/model')",
        "see /tmp/x.png",
        r"C:\models",
        "/x/lib/site-packages/y.py:3: Warning",
    ],
)
def test_a_folder_of_somebodys_machine_is_named(text):
    asked = notebook(text)
    assert any(
        "folder of a machine" in problem for problem in run_notebooks.complaints(asked, asked)
    )


@pytest.mark.parametrize(
    "text", ["https://host.org/home/ann", "notebooks/tmp/x", "a / home", "../var/x", "text/plain"]
)
def test_addresses_and_relative_paths_are_not(text):
    asked = notebook(text)
    assert list(run_notebooks.complaints(asked, asked)) == []
