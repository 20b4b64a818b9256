"""Where a command's work is done, by its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from engram.distribute import Workers

OnWorkers = Annotated[
    str | None, typer.Option("--workers", help="'ray': spread the work over processes with a model each.")
]
NumWorkers = Annotated[int, typer.Option(help="How many.", min=1)]
RayAddress = Annotated[
    str | None, typer.Option(help="Of a Ray cluster, such as 'auto'; default: one of this machine's own.")
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
    from engram.distribute import RayWorkers

    return RayWorkers(num_workers, address=ray_address)
