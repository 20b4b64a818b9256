"""Layer cards written by hand, and facts with paraphrases and neighbours to measure one."""

from __future__ import annotations

from dataclasses import replace

from engram import Fact, LayerCard
from engram.layers.card import EditOutcome, Evidence

FACT = Fact("tower of Rome", "The {} is in the city of", "Paris", "London")


def card(
    scores, traces=None, *, layers=None, n_layers=None, identity="0" * 64, method="rome", model="m"
) -> LayerCard:
    """One row a fact, one column a layer; traces over all layers of the model."""
    layers = range(len(scores[0])) if layers is None else layers
    evidence = tuple(
        Evidence(
            replace(FACT, subject=f"tower {i}"),
            None if traces is None else tuple(traces[i]),
            None,
            {
                layer: EditOutcome(score, 1.0, 0.5, None)
                for layer, score in zip(layers, row, strict=True)
            },
        )
        for i, row in enumerate(scores)
    )
    n_layers = n_layers or max(layers) + 1
    return LayerCard(
        model,
        identity,
        n_layers,
        method,
        {"steps": 3},
        {"window": 1},
        evidence,
        1.5,
        {"engram": "0"},
    )


EDITS = [
    Fact(
        "tower of Rome", "The {} is in the city of", "Paris", "London", ("The tower of Rome is in",)
    ),
    Fact(
        "river",
        "The {} runs through",
        "Rome",
        "London",
        neighbours=(("The bridge is in", "Paris"),),
    ),
]
