"""How a call of a method runs, and not what it computes.

Knows where rows are computed and who hears of it. Refuses to know methods.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from engram.checks import Seed, check_fields
from engram.engine.replayable import Engine
from engram.progress import Progress, no_progress
from engram.runs.workers import Workers


@dataclass(frozen=True)
class Execution:
    """What a method gets besides its settings.

    Args:
        engine: "replay", "whole" forward passes, or by itself.
        workers: where the model runs; None: in this process.
        seed: of everything that is drawn.
        progress: called with (what is done, done, total).
    """

    engine: Engine = "auto"
    workers: Workers | None = None
    seed: Seed = 0
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def pop(cls, settings: dict[str, Any]) -> Execution:
        """Pop these settings from those of a call; the others keep their defaults."""
        names = [f.name for f in fields(cls) if f.name in settings]
        return cls(**{name: settings.pop(name) for name in names})
