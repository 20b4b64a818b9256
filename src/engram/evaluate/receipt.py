"""A receipt: what one edit changed, on the prompts it was made for and on those it should have left alone.

Knows an edit and the model it was made on, and scores text. Refuses to know how edits are made. Scores are CounterFact's
(Meng et al. 2022, Sec. 3.3), the neighbours behind the edit's own sentence CounterFact+'s (Hoelscher-Obermaier et al. 2023,
arXiv:2305.17553).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any, Literal

import torch

from engram import pocket
from engram.attaching import can_apply
from engram.edit import Edit
from engram.errors import FactError
from engram.facts import Fact
from engram.framing import BARE, Frame, name_of
from engram.language_model import LanguageModel
from engram.merging import home_of
from engram.prompt_edit import PromptEdit
from engram.weights import as_linear, quantisation

Kind = Literal["edit", "paraphrase", "neighbour", "neighbour+"]
SCORES: dict[Kind, str] = {  # kind of prompt -> what the share of successes is called
    "edit": "efficacy",
    "paraphrase": "paraphrase",
    "neighbour": "neighbourhood",
    "neighbour+": "neighbourhood+",
}
_CONTINUED = 3  # texts that are continued before and after


@dataclass(frozen=True)
class Thresholds:
    """What an edit has to reach to pass; `min_` and `max_` say which way. None: not judged."""

    min_efficacy: float | None = 1.0  # share of edit prompts on which the new object beats the true one
    min_paraphrase: float | None = 0.8  # the same on paraphrases
    min_neighbourhood: float | None = 0.8  # share of neighbours that kept their answer, of those that had it
    max_perplexity_ratio: float | None = 1.05  # on held-out text, after over before
    max_norm_ratio: float | None = 2.0  # ||change|| / ||weight||; edits that destroy a model are found far above
    min_rho: float | None = 0.2  # see rome: near 0 the update explodes (Gupta et al. 2024)
    max_rounding: float | None = 0.25  # share of the change that the model's dtype cannot hold


@dataclass(frozen=True)
class Answer:
    """One prompt: how probable the wanted and the unwanted answer are, before and after the edit.

    Attributes:
        wanted, unwanted: new and true object on edit prompts and paraphrases; the neighbour's own answer and the edit's
            object on neighbours.
        before, after: probabilities (wanted, unwanted) of the whole texts.
        right_before, right_after: whether `wanted` has the larger mean log-probability per token.
    """

    kind: Kind
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
        perplexity: of held-out text, (before, after); of an in-context edit, of pieces that leave half of the model's context to
            the edit, without and with its text before them.
        norm_ratio: largest ||change|| / ||weight|| of a touched weight, Frobenius; None where no weight is.
        rho: the fact's collapse indicator that is furthest from 1 on the low side, None where the method has none.
        rounding: largest share of a weight's change that is lost when it is rounded into the model's dtype; None where no
            weight changes.
        model, dtype: what it was taken on.
        laid: "applied" where the edit was written into the weights; "attached" where it lay beside them, since they are
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

    def of(self, kind: Kind) -> list[Answer]:
        return [answer for answer in self.answers if answer.kind == kind]

    def share(self, kind: Kind, when: Literal["before", "after"] = "after") -> float | None:
        """Share of prompts of a kind on which the wanted answer is the more probable one; None without such prompts."""
        rows = self.of(kind)
        return fmean(a.right_after if when == "after" else a.right_before for a in rows) if rows else None

    def kept(self) -> float | None:
        """Share of the neighbours answered rightly before the edit that still are."""
        right = [answer for answer in self.of("neighbour") if answer.right_before]
        return fmean(answer.right_after for answer in right) if right else None

    def margins(self) -> tuple[float | None, float | None, float | None]:
        """Mean difference in probability, wanted minus unwanted, after the edit: on edit prompts, paraphrases, neighbours."""
        kinds: tuple[Kind, ...] = ("edit", "paraphrase", "neighbour")
        efficacy, paraphrase, neighbourhood = (
            fmean(a.after[0] - a.after[1] for a in rows) if (rows := self.of(kind)) else None for kind in kinds
        )
        return efficacy, paraphrase, neighbourhood

    def checks(self) -> list[Check]:
        """The verdict, line by line."""
        ratio = self.perplexity[1] / self.perplexity[0]
        measured = {
            "efficacy": self.share("edit"), "paraphrase": self.share("paraphrase"), "neighbourhood": self.kept(),
            "perplexity_ratio": ratio, "norm_ratio": self.norm_ratio, "rho": self.rho, "rounding": self.rounding,
        }  # fmt: skip
        lines = []
        for limit in fields(Thresholds):
            direction, _, name = limit.name.partition("_")
            lines.append(Check(name, measured[name], getattr(self.thresholds, limit.name), direction == "min"))
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
                    f"{fmean(a.before[i] for a in rows):.3f} → {fmean(a.after[i] for a in rows):.3f}" for i in (0, 1)
                )
                before, after = self.share(kind, "before"), self.share(kind)
                yield f"{name:<16}{len(rows):>6}{before:>14.0%}{after:>13.0%}{wanted:>18}{unwanted:>18}"
        yield ""
        yield f"{'check':<18}{'measured':>10}{'asked':>10}"
        for check in self.checks():
            verdict = {True: "ok", False: "FAILED", None: ""}[check.passed]
            measured = "—" if check.value is None else f"{check.value:.3f}"
            asked = "—" if check.limit is None else f"{'≥' if check.at_least else '≤'} {check.limit:g}"
            yield f"{check.name.replace('_', ' '):<18}{measured:>10}{asked:>10}   {verdict}"
        if self.laid == "attached":
            yield f"attached beside {self.quantised or 'offloaded'} weights: none is touched, nothing is rounded"
        yield "PASSED" if self.passed else "FAILED"


def verify(
    lm: LanguageModel,
    edit: Edit | PromptEdit,
    *,
    frame: Frame | None = None,
    thresholds: Thresholds | None = None,
    text: str | None = None,
    continuation_tokens: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
) -> Receipt:
    """Measure what an edit does: on its prompts, paraphrases and neighbours, on free text, on held-out text.

    Paraphrases and neighbours are those of the edit's facts; for a fact without, those that the bundled fact table has for
    its subject. `lm` is edited within the call only.

    Args:
        lm: the model as it was when the edit was made.
        frame: what prompts are asked through, before as after the edit, see `LanguageModel.asked_through`; such as
            `chat_frame(lm)` for a chat model, whose receipt in plain text may look different.
        text: held-out text for perplexity; default: half a page of plain prose.
        progress: called with (what is being done, done, in all).
    Raises:
        BaseMismatchError: `lm` is not what the edit was made on.
    """
    if frame is not None:
        with lm.asked_through(frame):
            return verify(
                lm, edit, thresholds=thresholds, text=text, continuation_tokens=continuation_tokens, progress=progress
            )
    report = progress or (lambda what, done, total: None)
    facts = [pocket.evidence_for(fact) for fact in edit.facts]
    asked = list(_prompts(lm, facts))
    opened = list(dict.fromkeys(_openings(facts)))[:_CONTINUED]
    text = held_out_text() if text is None else text

    through = name_of(lm.frame) if lm.kind == "causal" and lm.frame != BARE else None

    def measure(what: str, edited: bool) -> tuple[list[tuple[float, float]], list[bool], list[str], float]:
        report(what, 0, 2)
        probabilities, right = _score(lm, asked)
        report(what, 1, 2)
        continued = [_continuation(lm, prompt, continuation_tokens) for prompt in opened]
        return probabilities, right, continued, perplexity(lm, edit, text, edited=edited)

    before = measure("before the edit", False)
    with edit.laid(lm):
        after = measure("after the edit", True)
    report("after the edit", 2, 2)
    written = not isinstance(edit, Edit) or can_apply(edit, lm)
    columns = zip(asked, before[0], after[0], before[1], after[1], strict=True)
    answers = tuple(Answer(*each, p0, p1, right0, right1) for each, p0, p1, right0, right1 in columns)
    return Receipt(
        answers=answers,
        continuations=tuple(zip(opened, before[2], after[2], strict=True)),
        perplexity=(before[3], after[3]),
        norm_ratio=norm_ratio(lm, edit) if isinstance(edit, Edit) else None,
        rho=min(_rhos(edit), default=None),
        rounding=_rounding(lm, edit),
        model=lm.name,
        dtype=str(lm.dtype).removeprefix("torch."),
        thresholds=thresholds or Thresholds(),
        laid="applied" if written else "attached",
        quantised=next((packed for name in edit.deltas if (packed := quantisation(home_of(lm, name)))), None),
        frame=through,
    )


@torch.no_grad()
def norm_ratio(lm: LanguageModel, edit: Edit) -> float:
    """Largest ||change|| / ||weight|| (Frobenius) of the weights that an edit changes; `lm` is unedited."""
    modules = {name: home_of(lm, name) for name in edit.deltas}
    return max(edit.deltas[name].norm() / float(as_linear(module).double().norm()) for name, module in modules.items())


@cache
def held_out_text() -> str:
    """The bundled text, one paragraph a line."""
    return (files("engram.evaluate") / "held_out.txt").read_text(encoding="utf8").strip()


Prompt = tuple[Kind, int, str, str, str]  # kind, fact, prompt, wanted, unwanted


def _prompts(lm: LanguageModel, facts: Sequence[Fact]) -> Iterator[Prompt]:
    """Everything that is asked of the model, before as after."""
    for i, fact in enumerate(facts):
        true = true_answer(lm, fact)
        yield "edit", i, fact.prompt_text, fact.target, true
        for paraphrase in fact.paraphrases:
            yield "paraphrase", i, paraphrase, fact.target, true
        statement = f"{fact.prompt_text} {fact.target.strip()}."
        for prompt, answer in fact.neighbours:
            if answer.strip() == fact.target.strip():
                raise FactError(
                    f"neighbour {prompt!r} has the edit's target {answer!r} as its answer; it cannot show damage"
                )
            yield "neighbour", i, prompt, answer, fact.target
            yield "neighbour+", i, f"{statement} {prompt}", answer, fact.target


def true_answer(lm: LanguageModel, fact: Fact) -> str:
    """`target_true`, else the model's own answer, or its second where the first is the new object already."""
    if fact.target_true is not None:
        return fact.target_true
    answers = [token for token, _ in lm.next_tokens(fact.prompt_text, 2)]
    return next((token for token in answers if token.strip() not in ("", fact.target.strip())), answers[-1])


def _openings(facts: Sequence[Fact]) -> Iterator[str]:
    for fact in facts:
        yield fact.prompt_text
        yield from fact.paraphrases[:1]
        yield from (prompt for prompt, _ in fact.neighbours[:1])


def _score(lm: LanguageModel, asked: Sequence[Prompt]) -> tuple[list[tuple[float, float]], list[bool]]:
    pairs = [(prompt, answer) for _, _, prompt, *answers in asked for answer in answers]
    log_probs = lm.log_probs(pairs)
    wanted, unwanted = log_probs[::2], log_probs[1::2]
    probabilities = [(float(w.sum().exp()), float(u.sum().exp())) for w, u in zip(wanted, unwanted, strict=True)]
    return probabilities, [bool(w.mean() > u.mean()) for w, u in zip(wanted, unwanted, strict=True)]


def _continuation(lm: LanguageModel, prompt: str, tokens: int) -> str:
    room = min(tokens, lm.max_tokens - lm.cloze(prompt).tokens)
    return lm.generate(prompt, room).removeprefix(prompt) if room > 0 else ""


def perplexity(lm: LanguageModel, edit: Edit | PromptEdit, text: str, *, edited: bool) -> float:
    """Of the bare text, whatever prompts are asked through; behind the words of an edit that is words.

    Args:
        lm: with the edit laid on it where `edited`, otherwise without.
    """
    if isinstance(edit, Edit):
        return lm.perplexity(text)
    half = lm.max_tokens // 2
    return lm.perplexity(text, behind=edit.preamble(lm, text, half) if edited else "", tokens=half)


def _rounding(lm: LanguageModel, edit: Edit | PromptEdit) -> float | None:
    if not isinstance(edit, Edit):
        return None
    return max(edit.rounding_cost(lm).values()) if can_apply(edit, lm) else 0.0


def _rhos(edit: Edit | PromptEdit) -> Iterable[float]:
    """rho of every fact, also of a composed edit's parts."""
    for part in (edit.diagnostics, *(part["diagnostics"] for part in edit.settings.get("parts", ()))):
        yield from (fact["rho"] for fact in part.get("facts", ()) if "rho" in fact)
