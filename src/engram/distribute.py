"""Where work is done: in this process, or by workers that hold a model each.

Knows jobs and units. Refuses to know what they compute: a job says how a worker gets ready and what it does with one unit.
Units are independent and deterministic, so that where they are done and in which order makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class Job(Protocol):
    """Work that can be sent to another process: a picklable object, best a dataclass of plain values."""

    def start(self) -> Any:
        """What a worker needs for every unit, such as a model; made once a worker."""

    def do(self, state: Any, unit: Any) -> Any:
        """The result of one unit."""


class Workers(Protocol):
    """Somewhere that jobs are done."""

    def run(self, job: Job, units: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(number of a unit, its result), as they are finished."""


class Here:
    """This process, one unit after another."""

    def run(self, job: Job, units: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        state = job.start()
        for number, unit in enumerate(units):
            yield number, job.do(state, unit)
