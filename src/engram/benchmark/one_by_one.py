"""One edit at a time: lay it on the model, ask everything, take it off. Works for every method,
edits of words included.

The slow path beside together.py; the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engram.benchmark.data.records import Record, References
from engram.benchmark.essence import essence_ids, with_essence
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome, Reading
from engram.benchmark.probe_rows import AnswerScores, ProbeRef, ProbeRows
from engram.benchmark.written_texts import greedy, sampled, with_texts
from engram.benchmark.zsre_as_released import steps, with_text_mode
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.evaluate.held_out import HeldOut, held_out_text
from engram.evaluate.verify import perplexity
from engram.model.language_model import LanguageModel


@dataclass(frozen=True)
class Base:
    """What is kept of the unedited model while the edited one is compared with it."""

    compared: Mapping[ProbeRef, Tensor] = field(default_factory=dict)
    held_out: HeldOut | None = None


@torch.no_grad()
def measure_one(
    lm: LanguageModel,
    record: Record,
    edit: Edit | PromptEdit | None,
    config: MeasureConfig,
    *,
    drift: bool = False,
    references: References | None = None,
    base: Base | None = None,
) -> tuple[Outcome, Base]:
    """One record with one edit, or with none.

    Args:
        drift: whether held-out text is read.
        base: what came back of the same record unedited; without it nothing is compared with the
            unedited model.
    """
    with nullcontext() if edit is None else edit.applied(lm):
        questions = ProbeRows(lm, [record])
        tally, compared = asked_now(lm, questions, None if base is None else base.compared)
        (readings,) = tally.readings(greedy(lm, questions, config))
        if config.reference:
            readings = _in_text(lm, record, readings)
        essence = None if isinstance(edit, PromptEdit) else _essence(lm, record, config, references)
        texts = sampled(lm, [record], config)[0]
        held = HeldOut.read(lm) if drift and not isinstance(edit, PromptEdit) else None
        ppl = None if held is None else held.perplexity
        if drift and isinstance(edit, PromptEdit):
            ppl = perplexity(lm, edit, held_out_text(), edited=True)
    drifted = (
        None if held is None or base is None or base.held_out is None else held.kl(base.held_out)
    )
    outcome = with_texts(
        Outcome(readings, perplexity=ppl, drift=drifted), record, texts, references
    )
    return outcome if essence is None else with_essence(outcome, *essence), Base(compared, held)


def _essence(
    lm: LanguageModel, record: Record, config: MeasureConfig, references: References | None
) -> tuple[list[int], Tensor] | None:
    ids = essence_ids(lm, record, config, references)
    return None if ids is None else (ids, lm.logits_at([ids[:-1]], [range(len(ids) - 1)])[0])


def _in_text(lm: LanguageModel, record: Record, readings: Sequence[Reading]) -> tuple[Reading, ...]:
    asked = steps(lm, record)
    logits = lm.logits_at([step.ids for step in asked], [[len(step.ids) - 1] for step in asked])
    return with_text_mode(readings, asked, [int(each.argmax()) for each in logits])


def asked_now(
    lm: LanguageModel, questions: ProbeRows, base: Mapping[ProbeRef, Tensor] | None = None
) -> tuple[AnswerScores, dict[ProbeRef, Tensor]]:
    """All questions put to the model as it is now."""
    tally = questions.tally()
    compared: dict[ProbeRef, Tensor] = {}
    for batch in questions.batches():
        rows = [questions.rows[i] for i in batch]
        logits_pv = torch.cat(lm.logits_at([row.ids for row in rows], [row.read for row in rows]))
        compared |= tally.add(batch, logits_pv, base)
    return tally, compared
