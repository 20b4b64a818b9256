"""`engram harness`: lm-evaluation-harness on an edited model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from engram.cli.options import AsJson, DeviceMap, Dtype, Model


class Mode(StrEnum):
    overlay = "overlay"
    merged = "merged"


def harness(
    model: Model,
    tasks: Annotated[
        list[str], typer.Option("--task", "-t", help="A task of lm-evaluation-harness; repeat.")
    ],
    edit: Annotated[
        Path | None,
        typer.Option(help="A folder that 'engram edit' wrote; default: the model as it is."),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="overlay: beside the weights; merged: written into them.")
    ] = Mode.overlay,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents of each task; default: all.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 8,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Run tasks of lm-evaluation-harness on a model, with an edit laid on it."""
    from engram.cli import terminal
    from engram.edit.files import load
    from engram.evaluate.harness import harness as run

    lm = terminal.load(model, dtype, device_map)
    laid = None if edit is None else load(edit)
    found = run(
        lm,
        tasks,
        edit=laid,
        mode=mode.value,
        include_path=include_path,
        batch_size=batch_size,
        limit=limit,
        bootstrap_iters=0,
    )
    if as_json:
        typer.echo(json.dumps(found, default=str))
        return
    for task, numbers in found.items():
        typer.echo(task)
        for name, value in numbers.items():
            if isinstance(value, float):
                typer.echo(f"  {name.partition(',')[0]:<20}{value:.4f}")
