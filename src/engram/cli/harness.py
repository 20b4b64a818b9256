"""`engram harness`: lm-evaluation-harness on an edited model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from engram.cli.options import AsJson, Model, ModelOptions


class Mode(StrEnum):
    beside = "beside"
    weights = "weights"


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks run, and how much of them."""

    tasks: Annotated[
        list[str], typer.Option("--task", "-t", help="Task of lm-evaluation-harness; repeat.")
    ]
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own tasks.")] = None
    limit: Annotated[
        int | None, typer.Option(help="Documents of each task; default: all.", min=1)
    ] = None
    rows_per_batch: Annotated[int, typer.Option(help="Rows per forward pass.", min=1)] = 8


def harness(
    model: Model,
    task_options: TaskOptions,
    *,
    edit: Annotated[
        Path | None,
        typer.Option(help="Folder that 'engram edit' wrote; default: the model without edits."),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="beside: add the change to the module outputs; weights: write it into them."
        ),
    ] = Mode.beside,
    as_json: AsJson = False,
    model_options: ModelOptions,
) -> None:
    """Run tasks of lm-evaluation-harness on a model, with an edit applied.

    Example: engram harness pocket --task arc_easy --edit edit --limit 100
    """
    from engram.cli import terminal
    from engram.edit.edit import load_edit
    from engram.evaluate.harness import harness as run

    scores = run(
        model_options.load(model),
        task_options.tasks,
        edit=None if edit is None else load_edit(edit),
        mode=mode.value,
        include_path=task_options.include_path,
        rows_per_batch=task_options.rows_per_batch,
        limit=task_options.limit,
        bootstrap_iters=0,  # standard errors: not printed below, and slow
    )
    if as_json:
        terminal.print_json(scores)
        return
    for task, numbers in scores.items():
        typer.echo(task)
        for name, value in numbers.items():
            if isinstance(value, float):  # the others are texts, such as a task's alias
                typer.echo(f"  {name.partition(',')[0]:<20}{value:.4f}")
