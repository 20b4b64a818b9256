"""Edit records and measure them, each by itself: batched where the method allows it, one by one otherwise.

The unit of work of a run: a few records by one method, with nothing kept between units. So units can be done anywhere, in any order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engram.edit import Edit
from engram.editors import rewrite
from engram.errors import EngramError
from engram.evaluate.bench.outcomes import Asked, Measured
from engram.evaluate.bench.singly import measure_one
from engram.evaluate.data.records import Record, References
from engram.language_model import LanguageModel
from engram.prompt_edit import PromptEdit


def measure(
    lm: LanguageModel,
    records: Sequence[tuple[int, Record]],
    method: str,
    settings: Mapping[str, Any] | None = None,
    asked: Asked | None = None,
    references: References | None = None,
) -> Iterator[Measured]:
    """Each record edited by itself and measured before and after; `lm` is as before at every step.

    Args:
        records: (place in the data set, record); the place says whether held-out text is read.
        settings: of the method, see `rewrite`.
        references: for the consistency of texts.
    """
    asked = asked or Asked()
    for place, record in records:
        drift = bool(asked.drift_every) and place % asked.drift_every == 0
        before, base = measure_one(lm, record, None, asked, drift=drift, references=references)
        began = time.perf_counter()
        try:
            edit = rewrite(lm, record.facts, method, **(settings or {}))
        except EngramError as error:
            yield Measured(record.id, before, before, time.perf_counter() - began, error=str(error))
            continue
        seconds = time.perf_counter() - began
        after, _ = measure_one(lm, record, edit, asked, drift=drift, references=references, base=base)
        yield Measured(record.id, before, after, seconds, size_of(edit))


def size_of(edit: Edit | PromptEdit) -> int:
    """Bytes of what an edit consists of: the factors of its changes, or its words."""
    if isinstance(edit, PromptEdit):
        return len(json.dumps(edit.to_dict()))
    return sum(each.nbytes for delta in edit.deltas.values() for each in delta.factors().values())
