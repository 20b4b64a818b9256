"""Receipts written by hand."""

from __future__ import annotations

from engram.evaluate.receipt import Answer, Receipt


def made(right: dict[str, list[tuple[bool, bool]]], **numbers) -> Receipt:
    answers = tuple(
        Answer(kind, 0, "p", "new", "old", (0.2, 0.8), (0.7, 0.1), before, after)
        for kind, rows in right.items()
        for before, after in rows
    )
    given = {"perplexity": (10.0, 10.1), "norm_ratio": 0.1, "rho": 1.0, "rounding": 0.0, **numbers}
    return Receipt(answers, (), model="m", dtype="float32", **given)


GOOD = {
    "rewrite": [(False, True)],
    "paraphrase": [(False, True)] * 4 + [(False, False)],
    "neighbourhood": [(True, True)] * 5,
}
