"""zsRE's token accuracy as released, for comparison with published numbers only:
`MeasureConfig(reference=True)`.

The released code decodes each prefix of the answer, appends that text to the question and tokenises
the whole again. This can change tokens (a part of a letter is decoded to a replacement mark), so
the numbers can differ from those that are read token by token. With the tokens " San|a|'a":

    step 0   reads  Where is it? In            expects " San"
    step 1   reads  Where is it? In San        expects "a"
    step 2   reads  Where is it? In Sana       expects "'a"

Knows texts and tokens. Refuses to know where the predicted tokens come from.
Source: Meng et al. 2022, arXiv:2202.05262, released code.
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
        probe: number of the probe in the record.
        ids: what the model reads.
        token: what is expected after the last of `ids`.
    """

    probe: int
    ids: tuple[int, ...]
    token: int


def steps(lm: LanguageModel, record: Record) -> list[Step]:
    """Return what is read of a record: a row for each token of each answer without a rival, as
    zsRE's are.

    Prompts are wrapped in the model's frame. The first token of the decoded text is expected, with
    special tokens left out: the released code would take the start token that some tokenizers add.

    Raises:
        UnsupportedModelError: a model that is not causal.
    """
    if lm.kind != "causal":
        raise UnsupportedModelError(
            f"{lm.name} is of kind {lm.kind!r}: zsRE as released (reference=True) reads the next "
            "token, which only causal models are trained for; leave reference out"
        )
    return [
        Step(p, tuple(lm.cloze(text).ids), token)
        for p, probe in enumerate(record.probes)
        # zsRE has one answer a probe; CounterFact's pairs are compared by probability instead.
        if probe.kind in KINDS and probe.unwanted is None
        for text, token in in_text(lm, probe.prompt, probe.wanted)
    ]


def in_text(lm: LanguageModel, prompt: str, answer: str) -> list[tuple[str, int]]:
    """Return (text that is read, token that is expected) for each token of " " + answer.

    Tokens that decode to nothing are left out.
    """
    ids = _tokens(lm, f" {answer.strip()}")
    pieces = [(_text(lm, ids[:i]), _tokens(lm, _text(lm, ids[i : i + 1]))) for i in range(len(ids))]
    # A decoded piece may become several tokens ("\ufffd" does); the released code expects the
    # first.
    return [(prompt + prefix, expected[0]) for prefix, expected in pieces if expected]


def with_text_mode(
    readings: Iterable[Reading], questions: Sequence[Step], predicted: Sequence[int]
) -> tuple[Reading, ...]:
    """Return the readings with the share of tokens that are predicted as expected.

    Args:
        predicted: the most probable token after each step.
    """
    hits: dict[int, list[bool]] = {}
    for step, token in zip(questions, predicted, strict=True):
        # The mean over tokens, as released; the paper writes of whole answers (EA here).
        hits.setdefault(step.probe, []).append(step.token == token)
    return tuple(
        replace(reading, correct=fmean(hits[p])) if p in hits else reading
        for p, reading in enumerate(readings)
    )


def _tokens(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(lm: LanguageModel, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(ids)))
