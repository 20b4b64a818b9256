"""The time left is right where units of work do not cost alike."""

from __future__ import annotations

from itertools import accumulate

import pytest

from engram.progress import Work, announce, no_progress


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ratios(steps, parts):
    """Return predicted over actual seconds before each step, from the first fifth of the time on.

    Args:
        steps: (kind, units, seconds) of each step.
        parts: arguments of `expect`, by kind.
    """
    clock = Clock()
    work = Work("stats", clock=clock)
    for kind, about in parts.items():
        work.expect(kind, *about)
    seconds = sum(step[2] for step in steps)
    found = []
    over = accumulate((step[2] for step in steps), initial=0.0)
    for (kind, units, takes), begun in zip(steps, over, strict=False):
        for part in (0.0, 0.5):  # in the middle of a step, nothing was reported for a while
            clock.now = 100.0 + begun + part * takes
            if begun + part * takes >= 0.2 * seconds:
                found.append(work.left() / (seconds - begun - part * takes))
        clock.now = 100.0 + begun + takes
        work.did(kind, units)
    assert work.over and work.left() == 0 and work.share() == 1.0
    return found


def sampled(tokens=30_720, batch=6000, sampling=60.0, passes=0.002, files=1.0):
    """Return the steps of second moments: text is sampled in batches before it is summed."""
    steps, left = [], tokens
    while left > 0:
        texts = min(left, 3 * batch)
        steps += [("text", min(batch, texts - at), sampling) for at in range(0, texts, batch)]
        steps += [
            ("passes", min(4096, texts - at), passes * min(4096, texts - at))
            for at in range(0, texts, 4096)
        ]
        left -= texts
    return [*steps, *[("files", 1, files)] * 30]


@pytest.mark.parametrize(
    "costs",
    [{}, {"sampling": 600.0}, {"sampling": 5.0}, {"passes": 0.05}, {"tokens": 4000}],
    ids=["usual", "slow text", "fast text", "slow passes", "less than a batch"],
)
@pytest.mark.parametrize("wrong", [1.0, 0.1, 10.0], ids=["", "faster", "slower"])
def test_from_the_first_fifth_on_it_is_right_within_a_factor_of_two(costs, wrong):
    """Guesses are those of the measurement, right relative to each other, on a machine that is ten
    times as fast or as slow as they say.
    """
    steps = sampled(**costs)
    tokens = costs.get("tokens", 30_720)
    text = sum(s[2] for s in steps if s[0] == "text") / sum(s[1] for s in steps if s[0] == "text")
    parts = {
        "text": (tokens, wrong * text, 6000),
        "passes": (tokens, wrong * costs.get("passes", 0.002)),
        "files": (30, wrong * 1.0),
    }
    found = ratios(steps, parts)
    if wrong == 1.0 or costs != {"tokens": 4000}:  # of one step nothing is known until it ends
        assert all(0.5 <= ratio <= 2 for ratio in found), found


def test_counting_units_alone_is_wrong():
    """What was done before: the same work with one kind of units, those that are summed."""
    clock, steps = Clock(), sampled()
    work = Work("stats", clock=clock)
    work.expect("tokens", 30_720, 1.0)
    for kind, units, seconds in steps[:4]:  # three batches of text, one of tokens
        clock.now += seconds
        if kind == "passes":
            work.did("tokens", units)
    assert work.left() > 2 * sum(step[2] for step in steps[4:])


def test_units_that_come_in_lots_are_paid_for_with_the_first():
    clock = Clock()
    work = Work("stats", clock=clock)
    work.expect("text", 10_000, 1.0, lot=6000)
    clock.now += 60
    work.did("text", 100)
    assert work.left() == pytest.approx(60), "of the second lot; the others of the first are there"
    work.did("text", 5900)
    assert work.left() == pytest.approx(60)


def test_what_was_done_before_costs_nothing():
    clock = Clock()
    work = Work("stats", clock=clock)
    work.expect("tokens", 500, 1.0)
    clock.now += 10
    work.did("tokens", 250)
    assert work.left() == pytest.approx(10)
    assert work.units(1000, 1500) == 1250, "half of what is left, in units of the whole"


def test_guesses_are_corrected_by_what_was_measured():
    clock = Clock()
    work = Work("stats", clock=clock)
    work.expect("text", 10, 2.0)
    work.expect("passes", 10, 1.0)
    assert work.known and work.left() == 30
    clock.now += 8
    work.did("text", 1)
    assert work.left() == pytest.approx(9 * 8 + 10 * 4)


def test_without_a_guess_nothing_is_said():
    work = Work("stats", clock=Clock())
    work.expect("units", 10, 0.0)
    assert not work.known and not work.over


def test_work_is_announced_to_those_who_show_it():
    class Shows:
        works: list[Work] = []  # noqa: RUF012  of one test

        def __call__(self, what, done, total):
            pass

        def announce(self, work):
            self.works.append(work)

    work, shows = Work("stats"), Shows()
    announce(shows, work)
    announce(no_progress, work)
    announce(lambda *_: None, work)
    assert shows.works == [work]
