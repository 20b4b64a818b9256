"""TODO editors.closed_form.value_search"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engram.editors.closed_form.mass_settings import MassConfig
from engram.editors.closed_form.shifted_rows import Site
from engram.editors.closed_form.value_store import ValueStore
from engram.editors.closed_form.values import Value, ValueConfig, optimise_values, value_batches
from engram.engine.replayable import Engine
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.progress import Progress
from engram.runs.workers import ByName, Here, ModelJob, Workers


@dataclass(frozen=True)
class ValuesJob(ModelJob):
    """What workers do: values of a batch of facts, see `distribute.Job`."""

    layer: int
    contexts: tuple[str, ...]
    config: ValueConfig
    site: Site
    engine: Engine

    def do(self, state: LanguageModel, unit: Sequence[Fact]) -> list[Value]:
        """In the order of the facts."""
        made = optimise_values(
            state,
            unit,
            self.layer,
            self.contexts,
            self.config,
            site=self.site,
            engine=self.engine,
            facts_per_batch=len(unit),
        )
        return [value for _, value in sorted(made, key=lambda each: each[0])]


def _found(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    config: MassConfig,
    engine: Engine,
    facts_per_batch: int,
    store: ValueStore,
    workers: Workers | None,
    progress: Progress,
) -> list[Value]:
    names = [store.name(fact, layer, contexts, config.site, config.value) for fact in facts]
    found = dict(enumerate(store.get(names)))
    missing = [i for i, value in found.items() if value is None]
    progress("value", len(facts) - len(missing), len(facts))
    asked = [facts[i] for i in missing]
    batches = value_batches(lm, asked, contexts, config.value, facts_per_batch)
    job = ValuesJob(
        lm if workers is None else ByName.of(lm),
        layer,
        tuple(contexts),
        config.value,
        config.site,
        engine,
    )
    done = len(facts) - len(missing)
    for number, values in (workers or Here()).run(
        job, [tuple(asked[i] for i in batch) for batch in batches]
    ):
        for i, value in zip(batches[number], values, strict=True):
            found[missing[i]] = value
            store.put(names[missing[i]], value)
            done += 1
            progress("value", done, len(facts))
    return [value for value in found.values() if value is not None]
