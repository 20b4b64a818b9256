"""TODO progress"""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Where no progress is wanted."""
