"""Where a command's work is done, by its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram.runs.workers import Workers
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


OnWorkers = Annotated[
    str | None,
    typer.Option("--workers", help="'ray': spread the work over processes with a model each."),
]


NumWorkers = Annotated[int, typer.Option(help="How many.", min=1)]


RayAddress = Annotated[
    str | None,
    typer.Option(help="Of a Ray cluster, such as 'auto'; default: one of this machine's own."),
]


def workers_of(workers: str | None, num_workers: int, ray_address: str | None) -> Workers | None:
    """None: in this process.

    Raises:
        SettingError: another kind of workers than 'ray'.
    """
    from engram.errors import SettingError

    if workers is None:
        return None
    if workers != "ray":
        raise SettingError(f"--workers {workers!r}: expected 'ray', or leave it out")
    from engram.runs.workers import RayWorkers

    return RayWorkers(num_workers, address=ray_address)


Model = Annotated[
    str,
    typer.Argument(
        help="'pocket', a folder, or a model of the Hugging Face hub.", show_default=False
    ),
]


EditFolder = Annotated[
    Path, typer.Argument(help="A folder that 'engram edit' wrote.", show_default=False)
]


Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write; must not exist.", show_default=False)
]


Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default: as the checkpoint stores it."),
]


DeviceMap = Annotated[
    str | None, typer.Option(help="Passed on to transformers, such as 'auto' or 'cuda:0'.")
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


Chat = Annotated[
    bool,
    typer.Option("--chat", help="Ask as a user of the chat model does: through its chat template."),
]


Seed = Annotated[int, typer.Option(help="Of every random draw.")]


def settings_of(pairs: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE pairs as settings: a value is read as JSON where it is some."""
    from engram.errors import SettingError

    settings = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingError(f"--set {pair!r}: expected NAME=VALUE, such as --set steps=30")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings
