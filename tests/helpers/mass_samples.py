"""Facts and settings of small mass edits."""

from __future__ import annotations

from typing import Any

import engram
from engram import Edit, Fact
from engram.editors.second_moments.matrix import SecondMoment
from tests.helpers.rewrite_samples import CONTEXTS, FACT, moment_of

FACTS = [
    FACT,
    Fact("piano", "He plays the {} and", "guitar and sings"),
    Fact("river", "The {} runs through", "Madrid"),
]


def moments(lm: Any) -> dict[int, SecondMoment]:
    return {layer: moment_of(lm, layer, seed=layer) for layer in range(lm.n_layers)}


def rewrite(lm: Any, facts: Any = FACTS, method: str = "memit", **settings: Any) -> Edit:
    given = {
        "contexts": CONTEXTS,
        "second_moments": moments(lm),
        "steps": 3,
        "store": False,
        "layers": [0, 1, 2],
    }
    return engram.rewrite(lm, facts, method=method, **{**given, **settings})
