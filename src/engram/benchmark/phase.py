"""One phase of a measurement, before the edits or after them, for some records at once.

A phase is a state of the model: as it is, or with a different edit for every row of a batch. The
same code measures both, and both ways of editing (one_by_one, batched), so that their numbers can
only differ by rounding.

Knows records and what is measured of them. Refuses to know how edits are made and applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from engram.batching import batches
from engram.benchmark.data.records import Record, References
from engram.benchmark.essence import essence_ids, with_essence
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome
from engram.benchmark.written_texts import greedy, sampled, with_texts
from engram.benchmark.zsre_as_released import steps, with_text_mode
from engram.edit.prompt_edit import PromptEdit
from engram.evaluate.held_out import HeldOut, held_out_text, perplexity, pieces
from engram.evaluate.probe_rows import AnswerScores
from engram.evaluate.probes import Reading
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import RowContext, no_edits

_TOKENS = 4096  # of a forward in which only a few positions are read


@dataclass(frozen=True)
class Phase:
    """A state of the model in which records are measured.

    Args:
        records: what is measured.
        config: what is measured of each.
        references: texts that generated ones are compared with.
        around: given the number of each row's record, applies that record's edit to the row;
            `no_edits`: the model is measured as it is.
        words: the edit of words that is in force. Such an edit wraps prompts, so rows of tokens
            that are no prompts do not show it: no essence, no drift, and another perplexity.
    """

    lm: LanguageModel
    records: Sequence[Record]
    config: MeasureConfig
    references: References | None = None
    around: RowContext = no_edits
    words: PromptEdit | None = None

    def outcomes(
        self, scores: AnswerScores, drifts: Sequence[bool], base: HeldOut | None = None
    ) -> list[Outcome]:
        """Return the outcome of each record.

        Args:
            scores: what the probes' logits say in this phase, a group a record.
            drifts: for each record whether held-out text is read.
            base: held-out text as the unedited model reads it; None: no drift.
        Raises:
            NonFiniteError: the model computed NaN.
        """
        readings = scores.readings(greedy(self.lm, self.records, scores, self.config, self.around))
        texts = sampled(self.lm, self.records, self.config, self.around)
        outcomes = []
        for n, record in enumerate(self.records):
            outcome = Outcome(
                self._as_released(n, readings[n]) if self.config.reference else readings[n]
            )
            if drifts[n]:
                outcome = self._with_held_out(outcome, n, base)
            # Texts about the subject are read bare. With the words in front they would be another
            # prompt, and without them the reading would be the unedited one again.
            if self.words is None:
                outcome = self._with_essence(outcome, n)
            outcomes.append(with_texts(outcome, record, texts[n], self.references))
        return outcomes

    @cached_property
    def held_out(self) -> HeldOut:
        """Held-out text as the model reads it without the edits of rows."""
        return HeldOut.read(self.lm)

    def _with_held_out(self, outcome: Outcome, n: int, base: HeldOut | None) -> Outcome:
        if self.words is not None:
            text = held_out_text()
            return replace(outcome, perplexity=perplexity(self.lm, self.words, text, edited=True))
        # As it is: without any edit, or inside the block in which one_by_one has applied one. A
        # phase ends before that block does, so the cached reading never outlives its edit.
        if self.around is no_edits:
            held_out = self.held_out
        else:
            # Each record reads the page with its own edit, so nothing is shared here. That is why
            # only every tenth record does it.
            rows, reads = pieces(self.lm)
            held_out = HeldOut.of(self._logits([row[:-1] for row in rows], reads, n), rows)
        # Of the unedited model there is no drift, rather than 0, which would look like a
        # measurement.
        drift = None if base is None else held_out.kl(base)
        return replace(outcome, perplexity=held_out.perplexity, drift=drift)

    def _with_essence(self, outcome: Outcome, n: int) -> Outcome:
        ids = essence_ids(self.lm, self.records[n], self.config, self.references)
        if ids is None:
            return outcome
        return with_essence(outcome, ids, self._logits([ids[:-1]], [range(len(ids) - 1)], n)[0])

    def _as_released(self, n: int, readings: Sequence[Reading]) -> tuple[Reading, ...]:
        questions = steps(self.lm, self.records[n])
        logits = self._logits(
            [step.ids for step in questions], [[len(step.ids) - 1] for step in questions], n
        )
        return with_text_mode(readings, questions, [int(of_step.argmax()) for of_step in logits])

    def _logits(
        self, rows: Sequence[Sequence[int]], reads: Sequence[Sequence[int]], n: int
    ) -> list[Tensor]:
        """Return the logits [reads, v] of each row of tokens, with the edit of record `n`."""
        if self.around is no_edits:
            return self.lm.logits_at(rows, reads)
        logits: dict[int, Tensor] = {}
        numbers = batches(
            range(len(rows)),
            key=lambda i: len(rows[i]),
            length=lambda i: len(rows[i]),
            tokens=_TOKENS,
        )
        for batch in numbers:
            with self.around([n] * len(batch)):
                read = logits_of_rows(self.lm, [rows[i] for i in batch], [reads[i] for i in batch])
            logits |= dict(zip(batch, read, strict=True))
        return [logits[i] for i in range(len(rows))]


def logits_of_rows(
    lm: LanguageModel, rows: Sequence[Sequence[int]], reads: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return the logits [reads, v] of each row of tokens by one forward pass, in the rows' order.

    `LanguageModel.logits_at` sorts rows into batches of its own, and then a row's edit would meet
    another row.
    """
    # The union over the rows: the head computes some logits that no row reads, but one call serves
    # all rows, and [b, t, v] is not built where the model can limit its head.
    positions = sorted({position for read in reads for position in read})
    column = {position: at for at, position in enumerate(positions)}
    logits_brv = lm.cloze_logits(pad_right(rows).to(lm.device), positions)
    return [
        logits_brv[row, torch.tensor([column[p] for p in read], device=lm.device)]
        for row, read in enumerate(reads)
    ]
