"""Edit records and measure them, each by itself: batched where the method allows it, one by one
otherwise.

The unit of work of a run: a few records by one method, with nothing kept between units. So units
    can be done anywhere, in any order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from engram.benchmark.batched import can_batch, measure_together
from engram.benchmark.data.records import Record, References
from engram.benchmark.metrics.outcomes import MeasureConfig, Measured, Outcome, Reading
from engram.benchmark.one_by_one import measure_one
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.errors import EngramError, NonFiniteError
from engram.model.language_model import LanguageModel
from engram.rewriting import rewrite_each

_NEVER = 1e4  # nats: a probability of 0


def measure(
    lm: LanguageModel,
    records: Sequence[tuple[int, Record]],
    method: str,
    settings: Mapping[str, Any] | None = None,
    config: MeasureConfig | None = None,
    references: References | None = None,
    *,
    together: bool = True,
    unedited_texts: bool = True,
) -> Iterator[Measured]:
    """Each record edited by itself and measured before and after; `lm` is as before at every step.

    Args:
        records: (place in the data set, record); the place says whether held-out text is read.
        settings: of the method, see `rewrite_each`.
        references: for the consistency of texts.
        together: whether edits that rows can carry are measured in one batch; the numbers are the
            same.
        unedited_texts: whether the unedited model writes `MeasureConfig.texts` as well; it need not where
            another method's run has them.
    """
    config = config or MeasureConfig()
    drifts = [bool(config.drift_every) and place % config.drift_every == 0 for place, _ in records]
    began = time.perf_counter()
    edits = rewrite_each(lm, [record.facts for _, record in records], method, **(settings or {}))
    seconds = (time.perf_counter() - began) / len(records)
    carried = {
        n: edit
        for n, edit in enumerate(edits)
        if together and not isinstance(edit, EngramError) and can_batch(lm, edit)
    }
    both = {}
    with suppress(
        NonFiniteError
    ):  # one of the edits ruins the model; one by one it is found out which
        if carried:
            outcomes = measure_together(
                lm,
                [records[n][1] for n in carried],
                [edit for edit in carried.values() if isinstance(edit, Edit)],
                config,
                drifts=[drifts[n] for n in carried],
                references=references,
                unedited_texts=unedited_texts,
            )
            both = dict(zip(carried, outcomes, strict=True))
    plain = config if unedited_texts else replace(config, texts=False)
    for n, (edit, (_, record)) in enumerate(zip(edits, records, strict=True)):
        failed = str(edit) if isinstance(edit, EngramError) else None
        if n in both:
            before, after = both[n]
        else:
            before, base = measure_one(
                lm, record, None, plain, drift=drifts[n], references=references
            )
            after = before
            if not isinstance(edit, EngramError):
                try:
                    after, _ = measure_one(
                        lm, record, edit, config, drift=drifts[n], references=references, base=base
                    )
                except NonFiniteError as error:
                    after, failed = all_failed(record), f"with the edit {error}"
        yield Measured(
            record.id,
            before,
            after,
            seconds,
            0 if isinstance(edit, EngramError) else size_of(edit),
            failed,
        )


def all_failed(record: Record) -> Outcome:
    """What a model that computes NaN says: nothing that is right. Ties fail, for edits as for
    neighbours.
    """
    return Outcome(
        tuple(
            Reading(_NEVER, None if probe.unwanted is None else _NEVER, 0.0, "")
            for probe in record.probes
        )
    )


def size_of(edit: Edit | PromptEdit) -> int:
    """Bytes of what an edit consists of: the factors of its changes, or its words."""
    if not edit.changes_weights:
        return len(json.dumps(edit.contents().record))
    return sum(each.nbytes for delta in edit.deltas.values() for each in delta.factors().values())
