"""How long work reports how far it is: one callback for the whole library."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what is done, units done, units in all)


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore a report: the default of every `progress`."""
