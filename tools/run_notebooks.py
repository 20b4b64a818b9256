"""Run notebooks from top to bottom and store their outputs in them: `make notebooks`. The tests run
them too, and store nothing.

    python tools/run_notebooks.py notebooks/*.ipynb

Knows notebooks, not their content. Meaningless differences between machines (times, versions in the
metadata) are left out, so running a notebook again changes only what the code changes.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

WARNINGS = (
    "IProgress not found",  # tqdm, where ipywidgets are not installed
    "`is_gradient_checkpointing` is deprecated",  # peft asks transformers by an old name
)
ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 240  # seconds a cell
FOLDERS = re.compile(
    r"(?<![\w.~:/-])/(?:home|root|Users|tmp|var|opt|mnt|srv|private|workspace)/\w[^\s'\"]*|/\S*/site-packages/|\b[A-Z]:\\\w+"
)


def executed(notebook: Any) -> Any:
    """Return a copy of `notebook` that was run in a fresh kernel and a fresh folder, on the source
    tree beside this file, offline.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has the cell and the
        traceback.
    """
    fresh = nbformat.from_dict(notebook)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    quiet["PYTHONWARNINGS"] = ",".join(f"ignore:{message}" for message in WARNINGS)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            fresh,
            timeout=TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env={**os.environ, **quiet, "PYTHONPATH": paths})
    fresh.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return fresh


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def complaints(stored: Any, fresh: Any) -> Iterator[str]:
    """Return what is wrong with the stored outputs, compared with those of a fresh run."""
    if [cell.source for cell in stored.cells] != [cell.source for cell in fresh.cells]:
        yield "the cells are not those that were run"
    for i, (old, new) in enumerate(zip(code_cells(stored), code_cells(fresh), strict=True), 1):
        if old.source.strip() and old.execution_count != new.execution_count:
            yield (
                f"code cell {i} is stored with number {old.execution_count}; "
                f"run from top to bottom it has {new.execution_count}"
            )
        if kinds(old) != kinds(new):
            yield (
                f"code cell {i} holds {kinds(old) or 'no output'}, a run gives "
                f"{kinds(new) or 'none'}"
            )
    for text in texts(stored):
        for folder in FOLDERS.findall(text):
            yield f"the folder of a machine is named: {folder}"


def kinds(cell: Any) -> list[str]:
    """Return the outputs of a cell by type: 'stream stdout', 'image/png', 'text/plain'..."""
    return sorted(
        kind
        for output in merged(cell.outputs)
        for kind in (
            [f"stream {output.name}"]
            if output.output_type == "stream"
            else sorted(output.get("data", {"error": 0}))
        )
    )


def merged(outputs: Any) -> Iterator[Any]:
    """Join consecutive outputs of one stream: timing decides where it is cut."""
    last = None
    for output in outputs:
        name = output.name if output.output_type == "stream" else None
        if name is None or name != last:
            yield output
        last = name


def texts(notebook: Any) -> Iterator[str]:
    """Return everything in a notebook that people read: sources, metadata, outputs, no pictures."""
    yield str(notebook.metadata)
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield str(output.get("text", ""))
            yield from (
                str(value)
                for kind, value in output.get("data", {}).items()
                if not kind.startswith("image/")
            )
            yield from output.get("traceback", [])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", type=Path, nargs="+")
    for path in parser.parse_args().notebooks:
        fresh = executed(nbformat.read(path, as_version=4))
        for problem in complaints(fresh, fresh):
            raise SystemExit(f"{path}: {problem}")
        nbformat.write(fresh, path)
        print(f"{path}: {len(code_cells(fresh))} code cells run")


if __name__ == "__main__":
    main()
