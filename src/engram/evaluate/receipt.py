"""A receipt: what one edit changed, on the prompts it was made for and on those it should leave
alone, judged by limits.

Knows numbers and texts. Refuses to know models: verify measures the numbers.
Scores are CounterFact's (Meng et al. 2022, arXiv:2202.05262, Sec. 3.3), and for neighbours after a
sentence that states the edit CounterFact+'s (Hoelscher-Obermaier et al. 2023, arXiv:2305.17553).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from engram.checks import NonNegative, Positive, Share, check_fields
from engram.evaluate.probes import ProbeKind
from engram.evaluate.words import PAGE
from engram.files.forms import Overflowing, parsed

SCORES: dict[ProbeKind, str] = {  # kind of prompt -> name of the share of successes
    "rewrite": "efficacy",
    "paraphrase": "paraphrase",
    "neighbourhood": "neighbourhood",
    "neighbourhood+": "neighbourhood+",
}

Probability = NonNegative  # above 1 by rounding at times
Probabilities = tuple[Probability, Probability]
Perplexity = Annotated[Overflowing, Gt(0)]
When = Literal["before", "after"]

# A sentence in front sways the unedited model too (NS+ 52.5 for GPT-2 XL, from 78.4), so the limit
# for "neighbourhood+" is relative to what is right there before the edit. With fewer than 3 right
# before, a single sentence would decide.
OVERRUN_LEAST = 3
_OVERRUNS = "overruns its neighbours when its own sentence stands in front"
_SHOWN = 3  # prompts on which the model says something else that are shown in full


@dataclass(frozen=True)
class Thresholds:
    """What an edit has to reach to pass; `min_` and `max_` say which way. None: not judged.

    Args:
        min_efficacy: share of rewrite prompts on which the new object beats the true one.
        min_paraphrase: the same on paraphrases.
        min_neighbourhood: share of neighbours that keep their answer, of those that had it.
        min_neighbourhood_plus: neighbours that are right with the edit's own sentence in front,
            after the edit over before it; not judged where fewer than `OVERRUN_LEAST` were.
        max_perplexity_ratio: of held-out text, after the edit over before it.
        max_norm_ratio: ||change|| / ||weight||; edits that destroy a model are far above it.
        min_rho: see rome: near 0 the update explodes (Gupta et al. 2024).
        max_rounding: share of the change that the model's dtype cannot hold.
    Raises:
        SettingError: a limit that is no number, such as NaN, against which nothing fails, or out of
            its range.
    """

    min_efficacy: Share | None = 1.0
    min_paraphrase: Share | None = 0.8
    min_neighbourhood: Share | None = 0.8
    min_neighbourhood_plus: Share | None = 0.5
    max_perplexity_ratio: Positive | None = 1.05
    max_norm_ratio: Positive | None = 2.0
    min_rho: float | None = 0.2
    max_rounding: NonNegative | None = 0.25

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Answer:
    """One prompt: how probable the wanted and the unwanted answer are, before and after the edit.

    Attributes:
        wanted, unwanted: new and true object on rewrite prompts and paraphrases; the neighbour's
            own answer and the edit's object on neighbours.
        before, after: probabilities (wanted, unwanted) of the whole texts.
        right_before, right_after: whether `wanted` has the larger mean log-probability per token.
        said: the beginning of what the model says by itself, (before, after): `wanted`, `unwanted`,
            or up to the first token that is in neither.
        says_before, says_after: whether greedy decoding writes `wanted`; these three are None in a
            receipt of an engram that did not measure them.
    """

    kind: ProbeKind
    fact: Annotated[int, Ge(0)]
    prompt: str
    wanted: str
    unwanted: str
    before: Probabilities
    after: Probabilities
    right_before: bool
    right_after: bool
    said: tuple[str, str] | None = None
    says_before: bool | None = None
    says_after: bool | None = None


@dataclass(frozen=True)
class Check:
    """One line of the verdict. `passed` is None where there is no value or no limit."""

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
    """What `verify` measured.

    Attributes:
        answers: one for each prompt.
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
        how: "weights": the edit was written into the weights; "beside": it was added beside
            them, since they are quantised or offloaded, and nothing is rounded.
        quantised: how the edited weights are packed; None where they are not.
        frame: what wrapped every prompt, before and after; None: bare prompts.
    """

    answers: tuple[Answer, ...]
    continuations: tuple[tuple[str, str, str], ...]
    perplexity: tuple[Perplexity, Perplexity]
    norm_ratio: Overflowing | None
    rho: float | None
    rounding: Overflowing | None
    model: str
    dtype: str
    thresholds: Thresholds = field(default_factory=Thresholds)
    how: Literal["weights", "beside"] = "weights"
    quantised: str | None = None
    frame: str | None = None

    def of(self, kind: ProbeKind) -> list[Answer]:
        return [answer for answer in self.answers if answer.kind == kind]

    def share(self, kind: ProbeKind, when: When = "after") -> float | None:
        """Return the share of a kind's prompts on which the wanted answer is the more probable one.

        None without such prompts.
        """
        rows = self.of(kind)
        return (
            fmean(a.right_after if when == "after" else a.right_before for a in rows)
            if rows
            else None
        )

    def kept(self) -> float | None:
        """Return the share of neighbours that keep their answer, of those that had it before."""
        # Of those that were right before: an edit cannot be blamed for what the model never knew.
        # NS of a benchmark counts all, so GPT-2 XL starts at 78.
        right = [answer for answer in self.of("neighbourhood") if answer.right_before]
        return fmean(answer.right_after for answer in right) if right else None

    def says(self, kind: ProbeKind, when: When = "after") -> tuple[int, int] | None:
        """Return (on how many of a kind's prompts greedy decoding writes the wanted answer, of how
        many).

        Of neighbours, those count that said their own answer before the edit. None without such
        prompts, or in a receipt of an engram that did not measure it.
        """
        rows = [a for a in self.of(kind) if a.says_after is not None]
        if not rows:
            return None
        if kind.startswith("neighbourhood"):
            rows = [a for a in rows if a.says_before]
        says = [a.says_after if when == "after" else a.says_before for a in rows]
        return sum(map(bool, says)), len(rows)

    def kept_after_statement(self) -> float | None:
        """Return how many neighbours are right with the edit's own sentence in front, after the
        edit over before it; None where fewer than `OVERRUN_LEAST` were right before.
        """
        # Net: those that became right make up for lost ones, so that noise of few prompts cancels.
        rows = self.of("neighbourhood+")
        before = sum(a.right_before for a in rows)
        return sum(a.right_after for a in rows) / before if before >= OVERRUN_LEAST else None

    def overruns(self) -> bool:
        """Return whether the edit spreads to its neighbours once its own sentence is in front."""
        return any(c.name == "neighbourhood+" and c.passed is False for c in self.checks())

    def unchecked(self) -> list[str]:
        """Return which evidence the facts do not bring, a text for each kind.

        Example: ["neighbours: none given, not checked", "paraphrases: none given for 2 of 5 facts"]
        """
        facts, texts = {a.fact for a in self.of("rewrite")}, []
        kinds: dict[str, ProbeKind] = {"paraphrases": "paraphrase", "neighbours": "neighbourhood"}
        for name, kind in kinds.items():
            without = facts - {a.fact for a in self.of(kind)}
            if without and without == facts:
                texts.append(f"{name}: none given, not checked")
            elif without:
                texts.append(f"{name}: none given for {len(without)} of {len(facts)} facts")
        return texts

    def cautions(self) -> list[str]:
        """Return what a reader should know besides the checks, such as that the model never says
        the new object by itself.
        """
        texts = []
        said = self.says("rewrite")
        # In a frame, such as a chat's, an answer may come in a sentence of its own.
        if said is not None and self.frame is None and 2 * said[0] < said[1]:
            texts.append(
                f"the model itself says the new object on {said[0]} of {said[1]} edit prompts"
            )
        if self.overruns():
            texts.append(_OVERRUNS)
        return texts

    @property
    def verdict(self) -> str:
        """PASSED or FAILED, the cautions, and what could not be checked."""
        texts = self.cautions()
        if not self.passed:
            return "; ".join(["FAILED", *texts])
        passed = f"PASSED, but {' and '.join(texts)}" if texts else "PASSED"
        return "; ".join([passed, *self.unchecked()])

    def margins(self) -> tuple[float | None, float | None, float | None]:
        """Return the mean probability of the wanted minus the unwanted answer after the edit.

        Three numbers: on rewrite prompts, paraphrases and neighbours.
        """
        kinds: tuple[ProbeKind, ...] = ("rewrite", "paraphrase", "neighbourhood")
        efficacy, paraphrase, neighbourhood = (
            fmean(a.after[0] - a.after[1] for a in rows) if (rows := self.of(kind)) else None
            for kind in kinds
        )
        return efficacy, paraphrase, neighbourhood

    def checks(self) -> list[Check]:
        """Return the verdict, line by line."""
        measured = {
            "efficacy": self.share("rewrite"),
            "paraphrase": self.share("paraphrase"),
            "neighbourhood": self.kept(),
            "neighbourhood+": self.kept_after_statement(),
            "perplexity_ratio": self.perplexity[1] / self.perplexity[0],
            "norm_ratio": self.norm_ratio,
            "rho": self.rho,
            "rounding": self.rounding,
        }
        lines = []
        for limit in fields(Thresholds):
            # The names carry direction and number, "max_norm_ratio": a new limit is one field.
            direction, _, name = limit.name.replace("_plus", "+").partition("_")
            lines.append(
                Check(
                    name, measured[name], getattr(self.thresholds, limit.name), direction == "min"
                )
            )
        return lines

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        # What is not measured does not fail: most editors have no rho, and a fact may have no
        # paraphrases.
        return all(check.passed is not False for check in self.checks())

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON holds it, with the verdict."""
        return {**asdict(self), "passed": self.passed, "verdict": self.verdict}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Receipt:
        """Return the receipt of which `to_dict` gave this record.

        Raises:
            EngramFileError: the record is damaged; one line that names the field and its value.
        """
        # Through JSON: it has no tuples, and a receipt that was read has to equal the one that was
        # written. Fields that are no part of it, such as the verdict, are computed again.
        receipt: Receipt = parsed(cls, json.dumps(record), "the receipt")
        return receipt

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.frame is not None:
            yield f"prompts are wrapped in {self.frame!r}"
            yield ""
        yield from self._of_prompts()
        if self.says("rewrite") is not None:
            yield from self._of_answers()
        yield ""
        yield f"{'check':<18}{'measured':>10}{'required':>10}"
        for check in self.checks():
            verdict = {True: "ok", False: "FAILED", None: self._reason(check)}[check.passed]
            measured = "—" if check.value is None else f"{check.value:.3f}"
            sign = "≥" if check.at_least else "≤"
            required = "—" if check.limit is None else f"{sign} {check.limit:g}"
            yield f"{check.name.replace('_', ' '):<18}{measured:>10}{required:>10}   {verdict}"
        if self.how == "beside":
            yield (
                f"attached beside {self.quantised or 'offloaded'} weights: "
                "none is touched, nothing is rounded"
            )
        yield f"what these words mean: engram verify --explain, or {PAGE}"
        yield self.verdict

    def _reason(self, check: Check) -> str:
        """Return why a check was not judged, where that says something about the edit's facts."""
        kind = next((kind for kind, name in SCORES.items() if name == check.name), None)
        if kind is None or check.limit is None:
            return ""
        if not self.of(kind):
            return "none given, not checked"
        least = OVERRUN_LEAST if kind == "neighbourhood+" else 1
        return f"fewer than {least} right before, not checked"

    def _of_prompts(self) -> Iterator[str]:
        """Yield the table of comparisons, a line for each kind of prompt."""
        yield (
            f"{'prompts':<16}{'count':>6}{'right before':>14}{'right after':>13}"
            f"{'p(wanted)':>18}{'p(unwanted)':>18}"
        )
        for kind, name in SCORES.items():
            rows = self.of(kind)
            if not rows:
                yield f"{name:<16}{0:>6}   not measured: the facts have no such prompts"
                continue
            wanted, unwanted = (
                f"{fmean(a.before[i] for a in rows):.3f} → {fmean(a.after[i] for a in rows):.3f}"
                for i in (0, 1)
            )
            before, after = self.share(kind, "before"), self.share(kind)
            yield f"{name:<16}{len(rows):>6}{before:>14.0%}{after:>13.0%}{wanted:>18}{unwanted:>18}"

    def _of_answers(self) -> Iterator[str]:
        """Yield what the model says by itself: counts, and the first prompts on which it says
        something else.
        """

        def counts(kinds: dict[ProbeKind, str]) -> list[str]:
            said = {text: self.says(kind) for kind, text in kinds.items()}
            return [f"{text}{on[0]} of {on[1]}" for text, on in said.items() if on and on[1]]

        new: dict[ProbeKind, str] = {"rewrite": "edit prompts ", "paraphrase": "paraphrases "}
        already = sum(bool(a.says_before) for kind in new for a in self.of(kind))
        yield ""
        yield (
            f"the model says the new object: {', '.join(counts(new))}"
            + f"; before the edit on {already} of them" * bool(already)
        )
        if self.says("neighbourhood") is not None:
            near = counts({"neighbourhood": "", "neighbourhood+": "with the edit in front "})
            yield (
                f"neighbours that said their own still do: {', '.join(near)}"
                if near
                else "no neighbour said its own object before"
            )
        missed = [
            a
            for a in self.answers
            if a.said is not None
            and not a.says_after
            and (a.says_before or a.kind in ("rewrite", "paraphrase"))
        ]
        for a in missed[:_SHOWN]:
            yield f"  {a.prompt!r} → {a.said[1]!r}, not {a.wanted.strip()!r}"  # type: ignore[index]
        if len(missed) > _SHOWN:
            yield f"  and {len(missed) - _SHOWN} more"
