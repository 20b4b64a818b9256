"""Questions put to a model before an edit and after it, and what the model answers.

Plain texts and numbers: a receipt asks such questions about one edit, a benchmark about thousands.
Refuses to know models (see probe_rows), and how answers become scores.
Source: the kinds of prompts are those of Meng et al. 2022, arXiv:2202.05262, Sec. 3.4, and of the
benchmarks named below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engram.checks import check_fields
from engram.errors import FactError

ProbeKind = Literal[
    "rewrite",  # the edit's own prompt
    "paraphrase",  # the same fact in other words
    "neighbourhood",  # another subject, whose answer shall stay
    "attribute",  # another subject, of which the new object is true: CounterFact
    "neighbourhood+",  # a neighbour after a sentence that states the edit: CounterFact+
    "rephrase",  # flattened CounterFact; not the paraphrases of the paper
    "locality",  # flattened CounterFact; not the neighbours of the paper
    "multi-hop",  # MQuAKE, as the next
    "single-hop",
    "logical-generalisation",  # RippleEdits, as the rest
    "compositionality-1",
    "compositionality-2",
    "subject-aliasing",
    "preservation",
    "relation-specificity",
]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)


@dataclass(frozen=True)
class Probe:
    """One question, put to the model before an edit and after it.

    Args:
        kind: what it shows.
        prompt: full text, the answer next.
        wanted: the right answer after the edit: the new object, or a neighbour's own one.
        unwanted: the answer that `wanted` is compared with; None: no comparison.
        aliases: further texts that count as `wanted` when the model's own answer is searched.
        test: probes of one name form a test of RippleEdits, which is passed if `joined` of them
            are answered.
        condition: the probe only decides whether its test counts: it does if the unedited model
            answers all its conditions.
    Raises:
        FactError: a field of another type, an unknown kind, an empty text, or `wanted` equal to
            `unwanted`.
    """

    kind: ProbeKind
    prompt: str
    wanted: str
    unwanted: str | None = None
    aliases: tuple[str, ...] = ()
    test: str | None = None
    joined: Literal["any", "all"] = "any"
    condition: bool = False

    def __post_init__(self) -> None:
        check_fields(self, FactError)
        if not self.prompt.strip() or not self.wanted.strip():
            raise FactError(
                f"probe with prompt={self.prompt!r} and wanted={self.wanted!r}: "
                "expected words in both"
            )
        # An answer compared with itself ties in every model, and a tie counts as lost: a score of 0
        # that says nothing about the edit.
        if self.unwanted is not None and (
            not self.unwanted.strip() or self.unwanted.strip() == self.wanted.strip()
        ):
            raise FactError(
                f"unwanted={self.unwanted!r}: expected words other than those of "
                f"wanted={self.wanted!r}, or None"
            )

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts whose probability is measured."""
        return (self.wanted,) if self.unwanted is None else (self.wanted, self.unwanted)


@dataclass(frozen=True)
class Reading:
    """What the model answers to one probe.

    Attributes:
        wanted, unwanted: negative log-probability (nats) of the probe's answers, mean per token.
        correct: share of the tokens of `wanted` that are the most probable one, each after the
            right ones before it.
        answer: greedy continuation of the prompt, without the prompt; None: not generated.
        kl: KL(now || unedited) of the next token (nats), of neighbours after an edit.
    """

    wanted: float
    unwanted: float | None
    correct: float
    answer: str | None = None
    kl: float | None = None
