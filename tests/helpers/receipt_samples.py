"""Receipts written by hand."""

from __future__ import annotations

from dataclasses import replace

from engram.evaluate.receipt import Answer, Receipt


def made(
    right: dict[str, list[tuple[bool, bool]]],
    says: dict[str, list[tuple[bool, bool]]] | None = None,
    **numbers,
) -> Receipt:
    """Return a receipt.

    Args:
        right: kind -> (right before, right after) of each prompt.
        says: kind -> whether the model says the wanted answer, (before, after), of each prompt;
            None: not measured.
    """
    answers = tuple(
        Answer(kind, 0, "p", "new", "old", (0.2, 0.8), (0.7, 0.1), before, after)
        for kind, rows in right.items()
        for before, after in rows
    )
    if says is not None:
        of_kind = {kind: iter(rows) for kind, rows in says.items()}
        pairs = [next(of_kind[answer.kind]) for answer in answers]
        answers = tuple(
            replace(
                answer,
                said=tuple("new" if yes else "the" for yes in pair),
                says_before=pair[0],
                says_after=pair[1],
            )
            for answer, pair in zip(answers, pairs, strict=True)
        )
    given = {"perplexity": (10.0, 10.1), "norm_ratio": 0.1, "rho": 1.0, "rounding": 0.0, **numbers}
    return Receipt(answers, (), model="m", dtype="float32", **given)


GOOD = {
    "rewrite": [(False, True)],
    "paraphrase": [(False, True)] * 4 + [(False, False)],
    "neighbourhood": [(True, True)] * 5,
}
