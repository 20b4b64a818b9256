"""A receipt: what one edit changed, on the prompts it was made for and on those it should have left
alone.

Knows an edit and the model it was made on, and scores text. Refuses to know how edits are made.
Scores are CounterFact's (Meng et al. 2022, Sec. 3.3), the neighbours behind the edit's own sentence
CounterFact+'s (Hoelscher-Obermaier et al. 2023, arXiv:2305.17553).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any, Literal

PromptKind = Literal["rewrite", "paraphrase", "neighbourhood", "neighbourhood+"]


SCORES: dict[PromptKind, str] = {  # kind of prompt -> what the share of successes is called
    "rewrite": "efficacy",
    "paraphrase": "paraphrase",
    "neighbourhood": "neighbourhood",
    "neighbourhood+": "neighbourhood+",
}


@dataclass(frozen=True)
class Thresholds:
    """What an edit has to reach to pass; `min_` and `max_` say which way. None: not judged."""

    min_efficacy: float | None = (
        1.0  # share of edit prompts on which the new object beats the true one
    )
    min_paraphrase: float | None = 0.8  # the same on paraphrases
    min_neighbourhood: float | None = (
        0.8  # share of neighbours that kept their answer, of those that had it
    )
    max_perplexity_ratio: float | None = 1.05  # on held-out text, after over before
    max_norm_ratio: float | None = (
        2.0  # ||change|| / ||weight||; edits that destroy a model are found far above
    )
    min_rho: float | None = 0.2  # see rome: near 0 the update explodes (Gupta et al. 2024)
    max_rounding: float | None = 0.25  # share of the change that the model's dtype cannot hold


@dataclass(frozen=True)
class Answer:
    """One prompt: how probable the wanted and the unwanted answer are, before and after the edit.

    Attributes:
        wanted, unwanted: new and true object on edit prompts and paraphrases; the neighbour's own
            answer and the edit's object on neighbours.
        before, after: probabilities (wanted, unwanted) of the whole texts.
        right_before, right_after: whether `wanted` has the larger mean log-probability per token.
    """

    kind: PromptKind
    fact: int
    prompt: str
    wanted: str
    unwanted: str
    before: tuple[float, float]
    after: tuple[float, float]
    right_before: bool
    right_after: bool


@dataclass(frozen=True)
class Check:
    """One line of the verdict. `passed` is None where nothing was measured or nothing is asked."""

    name: str
    value: float | None
    limit: float | None
    at_least: bool

    @property
    def passed(self) -> bool | None:
        if self.value is None or self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Receipt:
    """What `verify` found.

    Attributes:
        answers: one a prompt.
        continuations: (prompt, greedy continuation before, after).
        perplexity: of held-out text, (before, after); of an in-context edit, of pieces that leave
            half of the model's context to the edit, without and with its text before them.
        norm_ratio: largest ||change|| / ||weight|| of a touched weight, Frobenius; None where no
            weight is.
        rho: the fact's collapse indicator that is furthest from 1 on the low side, None where the
            method has none.
        rounding: largest share of a weight's change that is lost when it is rounded into the
            model's dtype; None where no weight changes.
        model, dtype: what it was taken on.
        laid: "applied" where the edit was written into the weights; "attached" where it lay beside
            them, since they are
            quantised or offloaded: then nothing is rounded.
        quantised: how the edited weights are packed, None where they are not.
        frame: what the model was asked through, before as after; None: the bare prompts.
    """

    answers: tuple[Answer, ...]
    continuations: tuple[tuple[str, str, str], ...]
    perplexity: tuple[float, float]
    norm_ratio: float | None
    rho: float | None
    rounding: float | None
    model: str
    dtype: str
    thresholds: Thresholds = field(default_factory=Thresholds)
    laid: Literal["applied", "attached"] = "applied"
    quantised: str | None = None
    frame: str | None = None

    def of(self, kind: PromptKind) -> list[Answer]:
        return [answer for answer in self.answers if answer.kind == kind]

    def share(self, kind: PromptKind, when: Literal["before", "after"] = "after") -> float | None:
        """Share of prompts of a kind on which the wanted answer is the more probable one; None
        without such prompts.
        """
        rows = self.of(kind)
        return (
            fmean(a.right_after if when == "after" else a.right_before for a in rows)
            if rows
            else None
        )

    def kept(self) -> float | None:
        """Share of the neighbours answered rightly before the edit that still are."""
        right = [answer for answer in self.of("neighbourhood") if answer.right_before]
        return fmean(answer.right_after for answer in right) if right else None

    def margins(self) -> tuple[float | None, float | None, float | None]:
        """Mean difference in probability, wanted minus unwanted, after the edit: on edit prompts,
        paraphrases, neighbours.
        """
        kinds: tuple[PromptKind, ...] = ("rewrite", "paraphrase", "neighbourhood")
        efficacy, paraphrase, neighbourhood = (
            fmean(a.after[0] - a.after[1] for a in rows) if (rows := self.of(kind)) else None
            for kind in kinds
        )
        return efficacy, paraphrase, neighbourhood

    def checks(self) -> list[Check]:
        """The verdict, line by line."""
        ratio = self.perplexity[1] / self.perplexity[0]
        measured = {
            "efficacy": self.share("rewrite"),
            "paraphrase": self.share("paraphrase"),
            "neighbourhood": self.kept(),
            "perplexity_ratio": ratio,
            "norm_ratio": self.norm_ratio,
            "rho": self.rho,
            "rounding": self.rounding,
        }
        lines = []
        for limit in fields(Thresholds):
            direction, _, name = limit.name.partition("_")
            lines.append(
                Check(
                    name, measured[name], getattr(self.thresholds, limit.name), direction == "min"
                )
            )
        return lines

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.passed is not False for check in self.checks())

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, with the verdict."""
        return {**asdict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Receipt:
        """What `to_dict` gave."""
        given = {name: value for name, value in record.items() if name != "passed"}
        answers = tuple(
            Answer(**{**each, "before": tuple(each["before"]), "after": tuple(each["after"])})
            for each in given.pop("answers")
        )
        return cls(
            answers=answers,
            continuations=tuple(tuple(each) for each in given.pop("continuations")),
            perplexity=tuple(given.pop("perplexity")),
            thresholds=Thresholds(**given.pop("thresholds")),
            **given,
        )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.frame is not None:
            yield f"asked through {self.frame!r}"
            yield ""
        yield f"{'prompts':<16}{'count':>6}{'right before':>14}{'right after':>13}{'p(wanted)':>18}{'p(unwanted)':>18}"
        for kind, name in SCORES.items():
            if rows := self.of(kind):
                wanted, unwanted = (
                    f"{fmean(a.before[i] for a in rows):.3f} → {fmean(a.after[i] for a in rows):.3f}"
                    for i in (0, 1)
                )
                before, after = self.share(kind, "before"), self.share(kind)
                yield f"{name:<16}{len(rows):>6}{before:>14.0%}{after:>13.0%}{wanted:>18}{unwanted:>18}"
        yield ""
        yield f"{'check':<18}{'measured':>10}{'asked':>10}"
        for check in self.checks():
            verdict = {True: "ok", False: "FAILED", None: ""}[check.passed]
            measured = "—" if check.value is None else f"{check.value:.3f}"
            asked = (
                "—" if check.limit is None else f"{'≥' if check.at_least else '≤'} {check.limit:g}"
            )
            yield f"{check.name.replace('_', ' '):<18}{measured:>10}{asked:>10}   {verdict}"
        if self.laid == "attached":
            yield f"attached beside {self.quantised or 'offloaded'} weights: none is touched, nothing is rounded"
        yield "PASSED" if self.passed else "FAILED"
