"""Find the values of many facts: those of the store, and the others where the workers are.

Knows batches, workers and the store. Refuses to know how a value is optimised (see values) and what
becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engram.editors.closed_form.value_store import ValueStore
from engram.editors.closed_form.values import (
    OnStep,
    Value,
    ValueSearch,
    no_report,
    optimise_values,
    value_batches,
)
from engram.editors.execution import Execution
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.model.pace import seconds_per_token
from engram.progress import Progress, Work, announce
from engram.runs.workers import Here, ModelJob, model_for


@dataclass(frozen=True)
class ValuesJob(ModelJob):
    """What workers do: values of a batch of facts, see `workers.Job`."""

    search: ValueSearch
    on_step: OnStep = no_report  # where the work is done in this process

    def do(self, state: LanguageModel, unit: Sequence[Fact]) -> list[Value]:
        """Return the values in the order of the facts."""
        values = dict(optimise_values(state, unit, self.search, len(unit), self.on_step))
        return [values[i] for i in range(len(unit))]


class ValueWork:
    """The work of finding values and of what follows them, as the command line shows it.

    A step of a fact counts as many tokens as its rows have. A batch that ends early takes off the
    steps it did not need.

    Args:
        facts: those whose values are to be found.
        layers: how many are solved afterwards.
        kept: see `Work`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        search: ValueSearch,
        progress: Progress,
        layers: int,
        kept: str = "",
    ) -> None:
        rows, self._steps = len(search.contexts) + 1, search.config.steps
        self._lengths = [rows * (8 + len(fact.prompt_text) / 4) for fact in facts]
        self._numbers: Sequence[int] = ()
        self._counted = 0.0
        values = f"values of {len(facts):,} facts" if len(facts) > 1 else "the value of a fact"
        self._work = Work("value", f"finding {values}", kept)
        pace, width = seconds_per_token(lm, progress), lm.parts.mlp_width(search.layer)
        # there and back for the subject's end and what follows it: as much as half of a token
        self._work.expect("tokens", self._steps * sum(self._lengths), 0.5 * pace)
        # keys in all contexts; a factor of C
        self._work.expect("layers", layers, 0.3 * pace * sum(self._lengths) + 1e-10 * width**3)
        announce(progress, self._work)

    def begin(self, numbers: Sequence[int]) -> OnStep:
        """Return what the batch of these facts calls after each step."""
        self._numbers, self._counted = numbers, 0.0
        return self._step

    def _step(self, step: int, active: int) -> None:
        tokens = active * self._tokens(self._numbers) / len(self._numbers)
        self._counted += tokens
        self._work.did("tokens", tokens)
        self._work.state = f"step {step + 1} of {self._steps}"

    def finish(self, numbers: Sequence[int]) -> None:
        """Count a batch as done; without its steps if they were not reported, as by workers."""
        left = self._steps * self._tokens(numbers) - self._counted
        if self._counted:
            self._work.skip("tokens", left)
        else:
            self._work.did("tokens", left)
        self._counted, self._work.state = 0.0, ""

    def found(self) -> None:
        """Expect no more values."""
        self._work.finish("tokens")

    def solved(self) -> None:
        """Count a layer as done."""
        self._work.did("layers")

    def _tokens(self, numbers: Sequence[int]) -> float:
        return sum(self._lengths[number] for number in numbers)


def find_values(
    lm: LanguageModel,
    facts: Sequence[Fact],
    search: ValueSearch,
    how: Execution,
    facts_per_batch: int,
    store: str | Path | bool,
    layers: int,
) -> tuple[list[Value], ValueWork]:
    """Return every fact's value, in the order of the facts, and the work, of which the layers are
    left.

    A value is stored as soon as its batch is done, so that a killed run resumes. Batches are cut
    here, from the facts that the store lacks, and not by the workers: so the number of workers does
    not change a value.

    Args:
        facts_per_batch: facts whose values are optimised in one batch, which bounds memory.
        store: a file, True for the cache folder's, or False.
        layers: how many are solved with the values.
    """
    with ValueStore.of(store, lm) as file:
        names = [file.name(fact, search) for fact in facts]
        values = dict(enumerate(file.get(names)))
        missing = [i for i, value in values.items() if value is None]
        done = len(facts) - len(missing)
        how.progress("value", done, len(facts))
        kept = "kept in the cache; a stopped search is resumed" if store else ""
        work = ValueWork(lm, [facts[i] for i in missing], search, how.progress, layers, kept)
        batches = value_batches(lm, [facts[i] for i in missing], search, facts_per_batch)
        steps = {} if how.workers else {"on_step": work.begin(batches[0] if batches else ())}
        job = ValuesJob(model_for(how.workers, lm), search, **steps)
        units = [tuple(facts[missing[at]] for at in batch) for batch in batches]
        for number, computed in (how.workers or Here()).run(job, units):
            for at, value in zip(batches[number], computed, strict=True):
                values[missing[at]] = value
                # At once, not at the end: what is done when a run is killed is not done again.
                file.put(names[missing[at]], value)
                done += 1
                how.progress("value", done, len(facts))
            work.finish(batches[number])
            if not how.workers and number + 1 < len(batches):
                work.begin(batches[number + 1])
        work.found()
    return [value for value in values.values() if value is not None], work
