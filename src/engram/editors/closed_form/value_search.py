"""Find the values of many facts: those of the store, and the others where the workers are.

Knows batches, workers and the store. Refuses to know how a value is optimised (see values) and what
becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engram.editors.closed_form.value_store import ValueStore
from engram.editors.closed_form.values import Value, ValueSearch, optimise_values, value_batches
from engram.editors.execution import Execution
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.model.pace import seconds_per_token
from engram.progress import Work, announce
from engram.runs.workers import Here, ModelJob, model_for


@dataclass(frozen=True)
class ValuesJob(ModelJob):
    """What workers do: values of a batch of facts, see `workers.Job`."""

    search: ValueSearch

    def do(self, state: LanguageModel, unit: Sequence[Fact]) -> list[Value]:
        """Return the values in the order of the facts."""
        values = dict(optimise_values(state, unit, self.search, facts_per_batch=len(unit)))
        return [values[i] for i in range(len(unit))]


def find_values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    search: ValueSearch,
    how: Execution,
    facts_per_batch: int,
    store: str | Path | bool,
) -> list[Value]:
    """Return every fact's value, in the order of the facts.

    A value is stored as soon as its batch is done, so that a killed run resumes. Batches are cut
    here, from the facts that the store lacks, and not by the workers: so the number of workers does
    not change a value.

    Args:
        facts_per_batch: facts whose values are optimised in one batch, which bounds memory.
        store: a file, True for the cache folder's, or False.
    """
    with ValueStore.of(store, lm) as file:
        names = [file.name(fact, search) for fact in facts]
        values = dict(enumerate(file.get(names)))
        missing = [i for i, value in values.items() if value is None]
        done = len(facts) - len(missing)
        how.progress("value", done, len(facts))
        work = Work(
            "value",
            f"finding the values of {len(missing):,} facts",
            "kept in the cache; a stopped search is resumed" if store else "",
        )
        # Each context is run some 10 times, back and forth, until the object is certain; a token
        # of a large batch takes a third of one in the run that is timed.
        rows = 10 * (len(search.contexts) + 1)
        lengths = [rows * (8 + len(fact.prompt_text) / 4) for fact in facts]
        tokens = sum(lengths[i] for i in missing)
        work.expect("tokens", tokens, seconds_per_token(lm, how.progress))
        announce(how.progress, work)
        batches = value_batches(lm, [facts[i] for i in missing], search, facts_per_batch)
        job = ValuesJob(model_for(how.workers, lm), search)
        units = [tuple(facts[missing[at]] for at in batch) for batch in batches]
        for number, computed in (how.workers or Here()).run(job, units):
            for at, value in zip(batches[number], computed, strict=True):
                values[missing[at]] = value
                # At once, not at the end: what is done when a run is killed is not done again.
                file.put(names[missing[at]], value)
                done += 1
                work.did("tokens", lengths[missing[at]])
                how.progress("value", done, len(facts))
    return [value for value in values.values() if value is not None]
