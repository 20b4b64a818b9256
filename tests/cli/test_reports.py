"""Long work says on stderr what it is, how long it takes and how far it is."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from engram.cli import terminal
from engram.cli.reports import EVERY, Reports, duration
from engram.progress import Work


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    """Return reports that write into a log, which `lines` returns; no thread runs."""
    file = io.StringIO()
    console = Console(file=file, soft_wrap=True, highlight=False)
    reports = Reports(console, clock=clock)
    reports.lines = lambda: file.getvalue().splitlines()
    return reports


def moments(clock, seconds):
    work = Work("moments", "measuring moments", "kept in cache/; resumed", clock=clock)
    work.expect("tokens", 100, seconds / 100)
    return work


def test_long_work_is_announced_before_it_begins(log, clock):
    log.announce(moments(clock, 720))
    assert log.lines() == ["engram: measuring moments: about 12 min; kept in cache/; resumed"]


def test_short_work_is_not(log, clock):
    work = moments(clock, 1.5)
    log.announce(work)
    clock.now = 1.5
    work.did("tokens", 100)
    log("moments", 100, 100)
    log.tick()
    assert log.lines() == []


def test_work_that_turns_out_to_take_long_is_announced_then(log, clock):
    work = moments(clock, 1)
    log.announce(work)
    assert log.lines() == []
    clock.now = 2
    work.did("tokens", 2)
    log("moments", 2, 100)
    assert log.lines() == ["engram: measuring moments: about 2 min; kept in cache/; resumed"]


def test_where_nothing_is_known_it_says_so_after_a_while(log, clock):
    work = Work("facts", "tracing 10 facts", "kept in run", clock=clock)
    work.expect("facts", 10, 0.0)
    log.announce(work)
    log.tick()
    assert log.lines() == []
    clock.now = 6
    log.tick()
    assert log.lines() == ["engram: tracing 10 facts: the time is not known yet; kept in run"]


def test_a_log_gets_a_line_every_ten_seconds_without_any_report(log, clock):
    work = moments(clock, 200)
    log.announce(work)
    log("moments", 0, 20_480)
    for second in range(1, 41):
        clock.now = second
        if second == 20:
            work.did("tokens", 10)
            log("moments", 2048, 20_480)
        log.tick()
    assert log.lines()[1:] == [
        "engram: moments 0 of 20,480, about 3 min left",
        "engram: moments 2,048 of 20,480, about 3 min left",
        "engram: moments 2,048 of 20,480, about 3 min left",
        "engram: moments 2,048 of 20,480, about 3 min left",
    ]


def test_counts_alone_are_enough(log, clock):
    """A verb that announces nothing; it was done in part before."""
    log("records", 40, 100)
    for done in range(41, 61):
        clock.now += 1
        log("records", done, 100)
        log.tick()
    assert log.lines() == [
        "engram: records 50 of 100, about 50 s left",
        "engram: records 60 of 100, about 40 s left",
    ]


def test_a_stage_that_runs_again_begins_again(log, clock):
    for _ in range(2):
        log("before the edit", 0, 2)
        clock.now += 1
        log("before the edit", 1, 2)
        log.tick()
        clock.now += 1
        log("before the edit", 2, 2)
    assert log.lines() == []


def test_works_that_wait_count_in_all(log, clock):
    log.announce(Work("conditions", clock=clock))
    log._shown["conditions"].work.expect("layers", 10, 6.0)
    log.announce(moments(clock, 100))
    log("moments", 0, 100)
    clock.now = EVERY
    log.tick()
    assert log.lines()[-1] == "engram: moments 0 of 100, about 2 min left, 2 min in all"


def test_quiet_says_nothing(clock):
    file = io.StringIO()
    reports = Reports(Console(file=file, quiet=True), clock=clock)
    reports.announce(moments(clock, 720))
    clock.now = 100
    reports("moments", 1, 2)
    reports.tick()
    assert file.getvalue() == ""


def test_brackets_are_no_markup(log, clock):
    work = Work("moments", "tracing [red]x[/red] of a[1]", clock=clock)
    work.expect("tokens", 100, 1.0)
    log.announce(work)
    log("[/] [b]", 1, 3)
    assert log.lines()[0].startswith("engram: tracing [red]x[/red] of a[1]: about")


def test_a_terminal_gets_a_bar_and_no_lines(clock):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with Reports(console, clock=clock) as reports:
        work = moments(clock, 200)
        reports.announce(work)
        clock.now = 100
        work.did("tokens", 50)
        reports("moments", 50, 100)
        reports.tick()
        reports._bars.refresh()
    shown = file.getvalue()
    assert "measuring moments: about 3 min" in shown and "50 of 100" in shown
    assert "about 2 min left" in shown and "engram: moments 50" not in shown


def test_progress_goes_to_stderr_and_results_alone_to_stdout(capsys, monkeypatch):
    monkeypatch.setattr("engram.cli.reports.EVERY", 0.1)
    with terminal.progress() as progress:
        progress("facts", 0, 10)
        time.sleep(0.2)
        progress("facts", 5, 10)
        time.sleep(1.2)
    out, err = capsys.readouterr()
    assert out == "" and "engram: facts 5 of 10" in err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (40, "40 s"), (100, "2 min"), (720, "12 min"), (12_000, "3 h 20 min")],
)
def test_times_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
