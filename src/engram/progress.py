"""How long work reports how far it is, and how long it will still take.

One callback for the whole library, which counts units; and `Work`, which knows what units cost.
Refuses to know where reports are shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Progress = Callable[[str, int, int], None]  # (what is done, units done, units in all)


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore a report: the default of every `progress`."""


@dataclass
class _Part:
    """Units of one kind: how many there are, how many are done, and the seconds they took."""

    units: float
    guess: float
    lot: float = 0.0
    done: float = 0.0
    spent: float = 0.0

    @property
    def left(self) -> float:
        return max(0.0, self._whole(self.units) - self.taken)

    @property
    def taken(self) -> float:
        """Units that the time spent was for: those of a lot are counted one by one after it."""
        return self._whole(self.done)

    def _whole(self, units: float) -> float:
        return math.ceil(units / self.lot) * self.lot if self.lot else units


class Work:
    """Long work: what it is, where its results are kept, and the time that is left.

    Units of one kind cost alike, units of several kinds do not: of second moments, text is sampled
    first (slow), then run (fast), and then files are written. So kinds are counted apart. The time
    left is the units left of each kind, times what a unit of that kind took until now; a kind that
    has not begun costs its guess, corrected by how wrong the guesses of the others were:

        kind       units  guess   done  took    still takes
        sampling   3      2 s     1     4 s     2 x 4 s
        passes     10     1 s     0     -       10 x 1 s x (4 / 2)

    Args:
        what: name of its reports, such as "second moments".
        about: what is measured, such as "second moments of 30 layers on 30,720 tokens".
        kept: where the results stay and whether a stopped run resumes; empty: nowhere.
    Attributes:
        state: what a unit that takes long is at, such as "step 7 of 20"; the owner of the work sets
            it.
    Example:
        >>> from engram.progress import Work
        >>> seconds = iter([0.0, 4.0, 4.0])
        >>> work = Work("moments", "moments of a text", clock=lambda: next(seconds))
        >>> work.expect("sampling", 3, 2.0)
        >>> work.expect("passes", 10, 1.0)
        >>> work.did("sampling")
        >>> work.left()
        28.0
    """

    def __init__(
        self,
        what: str,
        about: str = "",
        kept: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.about, self.kept, self.state = what, about or what, kept, ""
        self._clock = clock
        self._parts: dict[str, _Part] = {}
        self._marked = self.began = clock()

    def expect(self, kind: str, units: float, guess: float, lot: float = 0.0) -> None:
        """Say how many units of a kind there are in all, and how many seconds one costs by a guess.

        Guesses need only be right relative to each other once a unit of any kind is done.

        Args:
            lot: units that come together, whether all of them are wanted or not, such as the tokens
                of a batch of sampled texts.
        """
        part = self._parts.setdefault(kind, _Part(units, guess))
        part.units, part.guess, part.lot = units, guess, lot

    def amount(self, kind: str, units: float) -> None:
        """Say again how many units of a kind there are in all, now that more is known."""
        self._parts[kind].units = units

    def skip(self, kind: str, units: float) -> None:
        """Expect fewer units of a kind than was said, by as many."""
        self._parts[kind].units -= units

    def did(self, kind: str, units: float = 1.0) -> None:
        """Count units that are done; they took the time since anything was counted before."""
        now, part = self._clock(), self._parts.setdefault(kind, _Part(0.0, 0.0))
        part.done += units
        part.spent += now - self._marked
        self._marked = now

    def done(self, kind: str) -> float:
        """Return how many units of a kind are done."""
        return self._parts[kind].done if kind in self._parts else 0.0

    def finish(self, kind: str) -> None:
        """Expect no more units of a kind than are done."""
        part = self._parts.setdefault(kind, _Part(0.0, 0.0))
        part.units, part.lot = part.done, 0.0

    @property
    def known(self) -> bool:
        """Whether the time left can be said: a unit was measured, or there are guesses."""
        return any(part.done or part.guess * part.units for part in self._parts.values())

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self._parts) and not any(part.left for part in self._parts.values())

    def left(self) -> float:
        """Return the seconds that are left."""
        begun = [part for part in self._parts.values() if part.done]
        guessed = sum(part.taken * part.guess for part in begun)
        # how much slower units are than their guesses
        slower = sum(part.spent for part in begun) / guessed if guessed else 1.0
        seconds = sum(
            part.left * (part.spent / part.taken if part.done else part.guess * slower)
            for part in self._parts.values()
        )
        if not seconds:
            return 0.0
        # the unit at work has taken some of it; one that takes longer than all that was expected
        # takes longer still, by as much as it is late
        running = self._clock() - self._marked
        return seconds - running if running < seconds else max(0.1 * seconds, running - seconds)

    def units(self, first: int, total: int) -> int:
        """Return `share` as a number of units: those between `first`, done before, and `total`.

        A caller who extrapolates from it in a straight line gets the time left.
        """
        return total if self.over else first + int((total - first) * self.share())

    def share(self) -> float:
        """Return the share of the time that is over, from 0 to 1."""
        spent, left = self._clock() - self.began, self.left()
        return spent / (spent + left) if spent + left > 0 else 1.0


def announce(progress: Progress, work: Work) -> None:
    """Hand work to a progress that shows more than counts; any other callback ignores it."""
    if (show := getattr(progress, "announce", None)) is not None:
        show(work)


@contextmanager
def stage(progress: Progress, what: str, about: str = "") -> Iterator[None]:
    """Report what is done within the block, whose time and parts nobody knows beforehand."""
    announce(progress, Work(what, about))
    yield
    progress(what, 1, 1)


def shows_time(progress: Progress) -> bool:
    """Whether it shows the time left, so that it is of use to know what a unit of work costs."""
    return hasattr(progress, "announce")
