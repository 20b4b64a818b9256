"""zsRE's token accuracy as released: the answer's tokens are decoded, put behind the question, and
tokenised again.

That can change tokens (a piece of a letter is decoded to a mark that stands for what cannot be
read), so the numbers can differ from those that token by token give. For comparison with published
numbers only: `MeasureConfig(reference=True)`.

Knows texts and tokens. Refuses to know where the predicted tokens come from. Source: Meng et al.
2022, arXiv:2202.05262, released code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from engram.benchmark.data.records import Record
from engram.errors import UnsupportedModelError
from engram.evaluate.probes import Reading
from engram.model.language_model import LanguageModel

KINDS = ("rewrite", "paraphrase", "neighbourhood")


class Step(NamedTuple):
    """One token of an answer.

    Args:
        probe: its place in the record; ids: what the model reads; token: what is expected behind
            its last.
    """

    probe: int
    ids: tuple[int, ...]
    token: int


def steps(lm: LanguageModel, record: Record) -> list[Step]:
    """What is read of a record: a row for each token of each answer that is compared with no other,
    as zsRE's are.

    The model is asked through its frame. The first token of what was decoded is expected, special
    ones left out: the released code would take the start token that some tokenizers put in front.

    Raises:
        UnsupportedModelError: a model that is not causal.
    """
    if lm.kind != "causal":
        raise UnsupportedModelError(
            f"{lm.name} is of kind {lm.kind!r}: zsRE as released (reference=True) asks what comes next, which only causal models are "
            "trained for; leave reference out"
        )
    return [
        Step(p, tuple(lm.cloze(text).ids), token)
        for p, probe in enumerate(record.probes)
        if probe.kind in KINDS and probe.unwanted is None
        for text, token in in_text(lm, probe.prompt, probe.wanted)
    ]


def in_text(lm: LanguageModel, prompt: str, answer: str) -> list[tuple[str, int]]:
    """(text that is read, token that is expected) for each token of " " + answer; tokens that
    decode to nothing are left out.
    """
    ids = _tokens(lm, f" {answer.strip()}")
    pieces = [(_text(lm, ids[:i]), _tokens(lm, _text(lm, ids[i : i + 1]))) for i in range(len(ids))]
    return [(prompt + said, expected[0]) for said, expected in pieces if expected]


def with_text_mode(
    readings: Iterable[Reading], asked: Sequence[Step], predicted: Sequence[int]
) -> tuple[Reading, ...]:
    """The readings with the shares of tokens that came out as expected.

    Args:
        predicted: the most probable token behind each step.
    """
    hits: dict[int, list[bool]] = {}
    for step, token in zip(asked, predicted, strict=True):
        hits.setdefault(step.probe, []).append(step.token == token)
    return tuple(
        replace(each, correct=fmean(hits[p])) if p in hits else each
        for p, each in enumerate(readings)
    )


def _tokens(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(lm: LanguageModel, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(ids)))
