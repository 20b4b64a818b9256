"""Where a command's work is done, by its options."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram.distribute import Workers


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
