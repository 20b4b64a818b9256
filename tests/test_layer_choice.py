"""`layer="auto"` tries the layers that a trace names and keeps the one with the best receipt."""

from __future__ import annotations

import pytest
import torch

import engram
from engram import Fact
from engram.errors import EngramError
from engram.layer_choice import choose_layer, receipt_score, try_layers
from tests.test_receipt import GOOD, made
from tests.tiny import tiny_lm

FACT = Fact("tower of Rome", "The {} is in the city of", "Paris", "London", paraphrases=("The tower of Rome is in",))


def test_the_best_receipt_wins(monkeypatch):
    lm = tiny_lm("gpt2", torch.float64)
    settings = {"contexts": ("{}",), "tokens": 300, "known": []}
    trials = try_layers(lm, FACT, **settings)
    assert len(trials) == 3 and lm.n_layers - 1 not in {trial.layer for trial in trials}, (
        "the last block has no effect to trace"
    )
    assert [trial.effect for trial in trials] == sorted((trial.effect for trial in trials), reverse=True)
    best = max(trials, key=lambda trial: trial.score)
    assert choose_layer(lm, FACT, **settings) == best.layer
    assert best.score == pytest.approx(
        receipt_score(engram.verify(lm, engram.rewrite(lm, FACT, layer=best.layer, contexts=("{}",), tokens=300)))
    )


def test_auto_is_a_setting_of_rome():
    lm = tiny_lm("gpt2", torch.float64)
    edit = engram.rewrite(lm, FACT, layer="auto", contexts=("{}",), tokens=300)
    assert edit.settings["layer"] in range(lm.n_layers - 1)


def test_receipts_are_compared_by_margins():
    better, worse = made(GOOD), made({**GOOD, "edit": [(False, True)] * 2 + [(True, False)]})
    assert 0 < receipt_score(worse) <= receipt_score(better) < 1
    with pytest.raises(EngramError, match="measured nothing"):
        receipt_score(made({}))
