"""Every verb that may take long announces what it does, with a guess of its time, and counts all of
it.
"""

from __future__ import annotations

import pytest
import torch

import engram
from engram import Fact
from engram.editors.second_moments.measure import second_moments
from engram.model.pace import seconds_per_token
from tests.helpers.tiny import tiny_lm

FACTS = [
    Fact("tower", "The {} is in the city of", "Paris", relation="city"),
    Fact("bridge", "The {} is in", "Madrid", relation="city"),
    Fact("Zdeno Chára", "{} plays the", "piano", relation="instrument"),
]


class Shown:
    """A progress that shows times, as the command line does."""

    def __init__(self):
        self.works, self.guesses, self.reports = [], [], []

    def __call__(self, what, done, total):
        self.reports.append((what, done, total))

    def announce(self, work):
        self.works.append(work)
        self.guesses.append(work.left())


VERBS = {
    "second moments": lambda lm, folder, p: second_moments(
        lm, [0, 1], tokens=300, cache_dir=folder, progress=p
    ),
    "second moments of a text": lambda lm, folder, p: second_moments(
        lm, [0], ["The tower is in Rome. " * 9] * 9, 200, cache_dir=folder, progress=p
    ),
    "trace": lambda lm, folder, p: engram.trace(
        lm, "The tower is in", subject="tower", samples=2, progress=p
    ),
    "an estimate": lambda lm, folder, p: engram.trace(
        lm, "The tower is in", subject="tower", samples=2, method="attribution", progress=p
    ),
    "average": lambda lm, folder, p: engram.average_trace(
        lm, FACTS, out=folder / "run", keep="all", samples=2, noise=1.0, progress=p
    ),
    "knows": lambda lm, folder, p: engram.knows(lm, FACTS, progress=p),
    "knows among candidates": lambda lm, folder, p: engram.knows(
        lm, FACTS, candidates="relation", progress=p
    ),
    "values": lambda lm, folder, p: engram.rewrite(
        lm,
        FACTS,
        "memit",
        layers=[1],
        contexts=["{}"],
        second_moments={1: second_moments(lm, [1], tokens=300, cache_dir=folder)[1]},
        store=folder / "values.sqlite",
        progress=p,
    ),
    "a value": lambda lm, folder, p: rome(lm, progress=p),
    "values of edits one by one": lambda lm, folder, p: engram.rewrite(
        lm, FACTS, "memit", layers=[0, 1], second_moments=EQUAL, contexts=["{}"], progress=p
    ),
    "receipt": lambda lm, folder, p: engram.verify(lm, rome(lm), progress=p),
}
EQUAL = {layer: torch.eye(48) for layer in (0, 1)}


def rome(lm, **settings):
    settings = {"layer": 1, "contexts": ["{}"], "second_moments": EQUAL, **settings}
    return engram.rewrite(lm, FACTS[:1], "rome", **settings)


@pytest.mark.parametrize("verb", VERBS)
def test_long_work_is_announced_with_a_guess_and_is_over_at_the_end(verb, tmp_path):
    shown = Shown()
    VERBS[verb](tiny_lm(), tmp_path, shown)
    (work,) = shown.works
    assert shown.guesses[0] > 0, "before anything is done"
    assert len(work.about) > len("tracing") and work.over and work.left() == 0
    if verb in ("second moments", "average", "values"):
        assert "kept in" in work.kept and "resumed" in work.kept


def test_second_moments_report_shares_of_their_time_in_tokens(tmp_path):
    shown = Shown()
    second_moments(
        tiny_lm(), [1], tokens=3000, tokens_per_batch=256, cache_dir=tmp_path, progress=shown
    )
    counts = [done for _, done, _ in shown.reports]
    assert counts[0] == 0 and counts[-1] == 3000 and {t for *_, t in shown.reports} == {3000}
    assert 0 < counts[1] < 3000


def test_no_more_text_is_sampled_than_is_summed(tmp_path, monkeypatch):
    """Texts come in batches of 64; of the second one nothing is needed."""
    from engram.editors.second_moments import corpora

    calls = []
    sample = corpora.sample_texts
    monkeypatch.setattr(
        corpora, "sample_texts", lambda *given: calls.append(given) or sample(*given)
    )
    second_moments(tiny_lm(), [1], "sampled", tokens=500, cache_dir=tmp_path)
    assert len(calls) == 1


def test_nothing_is_measured_for_callbacks_that_show_no_time(monkeypatch):
    lm = tiny_lm()
    monkeypatch.setattr(type(lm), "logits_at", lambda *_: 1 / 0)
    assert seconds_per_token(lm, lambda *_: None) == 1.0


def test_the_steps_of_a_value_are_counted():
    states = []

    class Steps(Shown):
        def announce(self, work):
            super().announce(work)
            did = work.did
            work.did = lambda *given: (did(*given), states.append((work.state, work.share())))

    shown = Steps()
    rome(tiny_lm(), steps=4, progress=shown)
    # the state is set after its step is counted, so it lags by one
    assert [state for state, _ in states] == ["", *(f"step {n} of 4" for n in (1, 2, 3)), ""]
    shares = [share for _, share in states]
    assert shares == sorted(shares) and 0 < shares[0] < 1 and shares[-1] == 1
    assert shown.works[0].state == ""


def test_contexts_are_announced_where_they_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    works = []
    for _ in range(2):
        shown = Shown()
        rome(tiny_lm(), contexts="sampled", progress=shown)
        works.append([work.what for work in shown.works])
    assert works == [["contexts", "value"], ["value"]]


def test_the_layers_after_the_values_are_part_of_the_time_left(tmp_path):
    left = []

    class AtValues(Shown):
        def __call__(self, what, done, total):
            if what == "layer":
                left.append((self.works[0].over, self.works[0].left() > 0, done))

    engram.rewrite(
        tiny_lm(),
        FACTS,
        "memit",
        layers=[0, 1],
        second_moments=EQUAL,
        contexts=["{}"],
        store=False,
        progress=AtValues(),
    )
    assert left == [(False, True, 0), (False, True, 1), (True, False, 2)]
