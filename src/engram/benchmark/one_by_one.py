"""One edit at a time: apply it to the model, measure everything, take it off.

It works for every method, edits of words included. It is slower than batched.py and gives the same
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engram.benchmark.data.records import Record, References
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome
from engram.benchmark.phase import Phase
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.evaluate.held_out import HeldOut
from engram.evaluate.probe_rows import AnswerScores, ProbeRef, ProbeRows
from engram.model.language_model import LanguageModel


@dataclass(frozen=True)
class Base:
    """What is needed of the unedited model to compare the edited one with it."""

    # [v] for each neighbour: of one record 20 times 50,000 numbers, 4 MB, dropped with the record.
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
    """Measure one record with one edit, or with none.

    Args:
        drift: whether held-out text is read.
        base: the second result of this function for the same record without an edit; without it
            nothing is compared with the unedited model.
    """
    # Weights come back bit for bit, so the next record edits the same model, in any order.
    with nullcontext() if edit is None else edit.applied(lm):
        words = edit if isinstance(edit, PromptEdit) else None
        phase = Phase(lm, [record], config, references, words=words)
        # Within the block: an edit of words changes how a prompt is tokenised, and thus its rows.
        rows = ProbeRows(lm, [record.probes])
        scores, compared = AnswerScores.read(lm, rows, None if base is None else base.compared)
        (outcome,) = phase.outcomes(scores, [drift], None if base is None else base.held_out)
        return outcome, Base(compared, phase.held_out if drift and words is None else None)
