"""Edit records and measure them, each by itself: in batches where the edits allow it, one by one
otherwise.

A unit is a few records by one method, with nothing kept between units. So units can be done
anywhere, in any order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from engram.benchmark.batched import can_batch, measure_batched
from engram.benchmark.data.records import Record, References, without_evidence
from engram.benchmark.metrics.outcomes import MeasureConfig, Measured, Outcome
from engram.benchmark.one_by_one import measure_one
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.errors import EngramError, NonFiniteError
from engram.evaluate.probes import Reading
from engram.model.language_model import LanguageModel
from engram.rewriting import rewrite_each

# Nats: a probability of 0 in float64. Not infinity, which JSON does not have. Both answers get it,
# so they tie, and a tie is lost whichever of them is wanted.
_NEVER = 1e4


@dataclass(frozen=True)
class Unit:
    """Records that one method edits, each by itself, and that are measured together.

    Args:
        records: (place in the data set, record); the place decides whether held-out text is read.
        settings: of the method, see `rewrite_each`.
        label: name under which a run keeps the results.
        unedited_texts: whether the unedited model generates texts as well; it need not where
            another method's unit has generated them.
    """

    records: tuple[tuple[int, Record], ...]
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    unedited_texts: bool = True


def measure(
    lm: LanguageModel,
    unit: Unit,
    config: MeasureConfig | None = None,
    references: References | None = None,
    *,
    batched: bool = True,
) -> Iterator[Measured]:
    """Yield each record of a unit, measured before its edit and after it.

    `lm` is unedited at every step. The editor gets the facts without their paraphrases and
    neighbours, since those are what the edit is measured by.

    Args:
        references: texts that generated ones are compared with.
        batched: whether edits that rows can carry are measured in one batch; the numbers are the
            same.
    """
    config = config or MeasureConfig()
    records = [record for _, record in unit.records]
    drifts = [bool(config.drift_every) and at % config.drift_every == 0 for at, _ in unit.records]
    began = time.perf_counter()
    # An editor that trained on the paraphrases would be measured by its own training set.
    facts = [[without_evidence(fact) for fact in record.facts] for record in records]
    edits = rewrite_each(lm, facts, unit.method, **unit.settings)
    # What one edit of a batch takes cannot be measured: each gets an equal share.
    seconds = (time.perf_counter() - began) / len(records)
    outcomes = _measure_batched(lm, unit, edits, config, drifts, references) if batched else {}
    unedited = config if unit.unedited_texts else replace(config, texts=False)
    for n, (edit, record) in enumerate(zip(edits, records, strict=True)):
        error = str(edit) if isinstance(edit, EngramError) else None
        if n in outcomes:
            before, after = outcomes[n]
        else:
            # Outside of the `try` below: if the unedited model computes NaN, no edit is to blame,
            # and the run ends with the error.
            before, base = measure_one(
                lm, record, None, unedited, drift=drifts[n], references=references
            )
            # An edit that could not be computed counts with the unedited model's scores. Leaving
            # the record out would favour methods that refuse hard records.
            after = before
            if not isinstance(edit, EngramError):
                try:
                    after, _ = measure_one(
                        lm, record, edit, config, drift=drifts[n], references=references, base=base
                    )
                except NonFiniteError as nan:
                    # This edit exists and ruins the model, so it must not count as "nothing
                    # changed".
                    after, error = all_failed(record), f"with the edit {nan}"
        size = 0 if isinstance(edit, EngramError) else size_of(edit)
        yield Measured(record.id, before, after, seconds, size, error)


def _measure_batched(
    lm: LanguageModel,
    unit: Unit,
    edits: Sequence[Edit | PromptEdit | EngramError],
    config: MeasureConfig,
    drifts: Sequence[bool],
    references: References | None,
) -> dict[int, tuple[Outcome, Outcome]]:
    """Return the outcomes, by number, of records whose edits rows can carry.

    Nothing is returned where one of the edits makes the model compute NaN: which one shows only
    when they are measured one by one.
    """
    batch = {n: e for n, e in enumerate(edits) if isinstance(e, Edit) and can_batch(lm, e)}
    if not batch:
        return {}
    with suppress(NonFiniteError):
        outcomes = measure_batched(
            lm,
            [unit.records[n][1] for n in batch],
            list(batch.values()),
            config,
            drifts=[drifts[n] for n in batch],
            references=references,
            unedited_texts=unit.unedited_texts,
        )
        return dict(zip(batch, outcomes, strict=True))
    return {}


def all_failed(record: Record) -> Outcome:
    """Return what counts for a model that computes NaN: every probe fails, neighbours included."""
    return Outcome(
        tuple(
            Reading(_NEVER, None if probe.unwanted is None else _NEVER, 0.0, "")
            for probe in record.probes
        )
    )


def size_of(edit: Edit | PromptEdit) -> int:
    """Return the bytes of an edit: of the factors of its changes, or of its words."""
    if not edit.changes_weights:
        return len(json.dumps(edit.contents().record))
    return sum(
        factor.nbytes for delta in edit.deltas.values() for factor in delta.factors().values()
    )
