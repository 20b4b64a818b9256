"""How long work shows on stderr how far it is: bars on a terminal, lines in a log.

Before work that takes more than a few seconds, one line says what is done, how long it takes, and
where results are kept. Knows rich and `Work`; no verb words its own report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Lock, Thread
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from engram.progress import Work

LONG = 2.0  # seconds; shorter work is not announced
EVERY = 10.0  # seconds between two lines of a log


class Reports:
    """A progress callback (what, done, total), to which work is announced too.

    Args:
        console: of stderr; a quiet one shows nothing.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._shown: dict[str, _Shown] = {}  # by the name of the work, in the order it was begun
        self._written = clock()
        self._lock, self._ended = Lock(), Event()
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )

    def __enter__(self) -> Reports:
        self._bars.start()
        # A thread, because work may not report for minutes: a log then still tells its state.
        Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        with self._lock:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        with self._lock:
            shown = self._shown.get(what)
            if shown is None or (not shown.announced and done < shown.done):
                # the second case: a stage that runs again, as two receipts do
                shown = self._begin(Work(what, what, clock=self._clock), announced=False)
                shown.done = done
            if not shown.announced:
                shown.work.expect("units", max(0, total - shown.first), 0.0)
                if done > shown.done:
                    shown.work.did("units", done - shown.done)
            shown.done, shown.total = done, total
            self._refresh()

    def announce(self, work: Work) -> None:
        """Show work that is about to begin."""
        with self._lock:
            self._begin(work, announced=True)
            self._refresh()

    def tick(self) -> None:
        """Update the time left, and write a line where one is due."""
        with self._lock:
            self._refresh()
            running = [shown for shown in self._shown.values() if not shown.over]
            if self._clock() - self._written < EVERY:
                return
            self._written = self._clock()
            if running and not self._console.is_terminal:
                # the last one that reported is at work, the others wait for their turn
                begun = [shown for shown in running if shown.total] or running
                self._say(f"{begun[-1]}{self._in_all(running)}")

    def _begin(self, work: Work, *, announced: bool) -> _Shown:
        task = self._bars.add_task(work.what, total=1.0, counts="", left="")
        old = self._shown.pop(work.what, None)  # to the end: it is what runs now
        if old is not None:
            self._bars.remove_task(old.task)
        self._shown[work.what] = shown = _Shown(work, task, announced)
        return shown

    def _refresh(self) -> None:
        for shown in self._shown.values():
            if shown.announced and not shown.said:
                self._say_if_long(shown)
            self._bars.update(
                shown.task, completed=shown.share, counts=shown.counts, left=shown.time_left
            )

    def _say_if_long(self, shown: _Shown) -> None:
        """Announce work once it is known, or has turned out, to take long."""
        work = shown.work
        begun = self._clock() - work.began
        if not work.known and begun < LONG:
            return
        if work.known and begun + work.left() < LONG:
            return
        shown.said = True
        length = f"about {duration(work.left())}" if work.known else "the time is not known yet"
        self._say("; ".join(filter(None, (f"{work.about}: {length}", work.kept))))

    def _in_all(self, running: list[_Shown]) -> str:
        left = sum(shown.work.left() for shown in running)
        return f", {duration(left)} in all" if len(running) > 1 and left else ""

    def _say(self, line: str) -> None:
        self._console.print(Text(f"engram: {line}"))

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self.tick()


class _Shown:
    """Work, its bar, and what it reported last."""

    def __init__(self, work: Work, task: TaskID, announced: bool) -> None:
        self.work, self.task, self.announced = work, task, announced
        self.said = False
        self.done = self.total = 0
        self._first: int | None = None

    @property
    def first(self) -> int:
        """Units that were done before: they took no time."""
        if self._first is None:
            self._first = self.done
        return self._first

    @property
    def over(self) -> bool:
        return self.work.over or (self.total > 0 and self.done >= self.total)

    @property
    def share(self) -> float:
        return 1.0 if self.over else self.work.share() if self.work.known else 0.0

    @property
    def counts(self) -> str:
        counts = f"{self.done:,} of {self.total:,}" if self.total > 1 else ""
        return ", ".join(filter(None, (counts, self.work.state)))

    @property
    def time_left(self) -> str:
        if self.over or not self.work.known:
            return ""
        return f"about {duration(self.work.left())} left"

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"{self.work.what} {self.counts}".strip(), self.time_left)))


def duration(seconds: float) -> str:
    """Return a time as people say it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
