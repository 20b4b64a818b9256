"""TODO evaluate.verify"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from engram import pocket
from engram.edit.applied import can_write
from engram.edit.base import linear_module_of
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.errors import FactError
from engram.evaluate.held_out import held_out_text
from engram.evaluate.receipt import Answer, PromptKind, Receipt, Thresholds
from engram.facts import Fact
from engram.model.frames import BARE, Frame, name_of
from engram.model.language_model import LanguageModel
from engram.modules.weights import as_linear, quantisation
from engram.progress import Progress, no_progress

_CONTINUED = 3  # texts that are continued before and after


def verify(
    lm: LanguageModel,
    edit: Edit | PromptEdit,
    *,
    frame: Frame | None = None,
    thresholds: Thresholds | None = None,
    text: str | None = None,
    continuation_tokens: int = 16,
    progress: Progress = no_progress,
) -> Receipt:
    """Measure what an edit does: on its prompts, paraphrases and neighbours, on free text, on
    held-out text.

    Paraphrases and neighbours are those of the edit's facts; for a fact without, those that the
    bundled fact table has for its subject. `lm` is edited within the call only.

    Args:
        lm: the model as it was when the edit was made.
        frame: what prompts are asked through, before as after the edit, see
            `LanguageModel.asked_through`; such as `chat_frame(lm)` for a chat model, whose receipt
            in plain text may look different.
        text: held-out text for perplexity; default: half a page of plain prose.
        progress: called with (what is done, done, total).
    Raises:
        BaseMismatchError: `lm` is not what the edit was made on.
    """
    if frame is not None:
        with lm.asked_through(frame):
            return verify(
                lm,
                edit,
                thresholds=thresholds,
                text=text,
                continuation_tokens=continuation_tokens,
                progress=progress,
            )
    facts = [pocket.evidence_for(fact) for fact in edit.facts]
    asked = list(_prompts(lm, facts))
    opened = list(dict.fromkeys(_openings(facts)))[:_CONTINUED]
    text = held_out_text() if text is None else text

    through = name_of(lm.frame) if lm.kind == "causal" and lm.frame != BARE else None

    def measure(
        what: str, edited: bool
    ) -> tuple[list[tuple[float, float]], list[bool], list[str], float]:
        progress(what, 0, 2)
        probabilities, right = _score(lm, asked)
        progress(what, 1, 2)
        continued = [_continuation(lm, prompt, continuation_tokens) for prompt in opened]
        return probabilities, right, continued, perplexity(lm, edit, text, edited=edited)

    before = measure("before the edit", False)
    with edit.applied(lm):
        after = measure("after the edit", True)
    progress("after the edit", 2, 2)
    written = can_write(lm, edit.deltas)
    columns = zip(asked, before[0], after[0], before[1], after[1], strict=True)
    answers = tuple(
        Answer(*each, p0, p1, right0, right1) for each, p0, p1, right0, right1 in columns
    )
    return Receipt(
        answers=answers,
        continuations=tuple(zip(opened, before[2], after[2], strict=True)),
        perplexity=(before[3], after[3]),
        norm_ratio=norm_ratio(lm, edit) if edit.changes_weights else None,
        rho=min(_rhos(edit), default=None),
        rounding=_rounding(lm, edit),
        model=lm.name,
        dtype=str(lm.dtype).removeprefix("torch."),
        thresholds=thresholds or Thresholds(),
        laid="applied" if written else "attached",
        quantised=next(
            (
                packed
                for name in edit.deltas
                if (packed := quantisation(linear_module_of(lm, name)))
            ),
            None,
        ),
        frame=through,
    )


@torch.no_grad()
def norm_ratio(lm: LanguageModel, edit: Edit | PromptEdit) -> float:
    """Largest ||change|| / ||weight|| (Frobenius) of the weights that an edit changes; `lm` is
    unedited.
    """
    modules = {name: linear_module_of(lm, name) for name in edit.deltas}
    return max(
        edit.deltas[name].norm() / float(as_linear(module).double().norm())
        for name, module in modules.items()
    )


ReceiptPrompt = tuple[PromptKind, int, str, str, str]  # kind, fact, prompt, wanted, unwanted


def _prompts(lm: LanguageModel, facts: Sequence[Fact]) -> Iterator[ReceiptPrompt]:
    """Everything that is asked of the model, before as after."""
    for i, fact in enumerate(facts):
        true = true_answer(lm, fact)
        yield "rewrite", i, fact.prompt_text, fact.target, true
        for paraphrase in fact.paraphrases:
            yield "paraphrase", i, paraphrase, fact.target, true
        statement = f"{fact.prompt_text} {fact.target.strip()}."
        for prompt, answer in fact.neighbours:
            if answer.strip() == fact.target.strip():
                raise FactError(
                    f"neighbour {prompt!r} has the edit's target {answer!r} as its answer; it cannot show damage"
                )
            yield "neighbourhood", i, prompt, answer, fact.target
            yield "neighbourhood+", i, f"{statement} {prompt}", answer, fact.target


def true_answer(lm: LanguageModel, fact: Fact) -> str:
    """`target_true`, else the model's own answer, or its second where the first is the new object
    already.
    """
    if fact.target_true is not None:
        return fact.target_true
    answers = [token for token, _ in lm.next_tokens(fact.prompt_text, 2)]
    return next(
        (token for token in answers if token.strip() not in ("", fact.target.strip())), answers[-1]
    )


def _openings(facts: Sequence[Fact]) -> Iterator[str]:
    for fact in facts:
        yield fact.prompt_text
        yield from fact.paraphrases[:1]
        yield from (prompt for prompt, _ in fact.neighbours[:1])


def _score(
    lm: LanguageModel, asked: Sequence[ReceiptPrompt]
) -> tuple[list[tuple[float, float]], list[bool]]:
    pairs = [(prompt, answer) for _, _, prompt, *answers in asked for answer in answers]
    log_probs = lm.log_probs(pairs)
    wanted, unwanted = log_probs[::2], log_probs[1::2]
    probabilities = [
        (float(w.sum().exp()), float(u.sum().exp())) for w, u in zip(wanted, unwanted, strict=True)
    ]
    return probabilities, [bool(w.mean() > u.mean()) for w, u in zip(wanted, unwanted, strict=True)]


def _continuation(lm: LanguageModel, prompt: str, tokens: int) -> str:
    room = min(tokens, lm.max_tokens - lm.cloze(prompt).tokens)
    return lm.generate(prompt, room).removeprefix(prompt) if room > 0 else ""


def perplexity(lm: LanguageModel, edit: Edit | PromptEdit, text: str, *, edited: bool) -> float:
    """Of the bare text, whatever prompts are asked through; behind the words of an edit that is
    words.

    Args:
        lm: with the edit laid on it where `edited`, otherwise without.
    """
    if isinstance(edit, Edit):
        return lm.perplexity(text)
    half = lm.max_tokens // 2
    return lm.perplexity(text, after=edit.preamble(lm, text, half) if edited else "", tokens=half)


def _rounding(lm: LanguageModel, edit: Edit | PromptEdit) -> float | None:
    if not edit.changes_weights:
        return None
    return max(edit.rounding_cost(lm).values()) if can_write(lm, edit.deltas) else 0.0


def _rhos(edit: Edit | PromptEdit) -> Iterable[float]:
    """rho of every fact, also of a composed edit's parts."""
    for part in (
        edit.diagnostics,
        *(part["diagnostics"] for part in edit.settings.get("parts", ())),
    ):
        yield from (fact["rho"] for fact in part.get("facts", ()) if "rho" in fact)
