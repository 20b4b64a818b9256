"""Which records are about facts that a model knows: only there does an edit change something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from engram.benchmark.data.records import Dataset, Record
from engram.benchmark.metrics.scores import begins
from engram.checks import one_of
from engram.errors import FactError, SettingError
from engram.facts import Fact
from engram.knowledge.knows import knows
from engram.model.language_model import LanguageModel
from engram.progress import Progress, no_progress

Rule = Literal["greedy", "relation"]
_AT_ONCE = 256


def known_records(
    lm: LanguageModel,
    dataset: Dataset,
    rule: Rule = "greedy",
    *,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> Dataset:
    """The records whose true object the model says, in their order.

    Args:
        rule: "greedy": what the model says to the record's own prompt, word by word the most
            probable, begins with the true object. "relation": the true object is the most probable
            (a token's mean) of all true objects that the data set has in the relation, others of
            the same subject left out. Looser: the model may say something else altogether.
        limit: stop at so many.
        progress: called with (what is done, done, total).
    Raises:
        FactError: none of the records, one without a true object, or for "relation" one without a
            relation.
        SettingError: another rule, or a limit below 1.
    """
    one_of("rule", rule, ("greedy", "relation"))
    if limit is not None and limit < 1:
        raise SettingError(f"limit={limit}: expected 1 or more")
    table = [fact for record in dataset.records for fact in _true(record)]
    kept: list[Record] = []
    for start in range(0, len(dataset.records), _AT_ONCE):
        some = dataset.records[start : start + _AT_ONCE]
        found = _said(lm, some) if rule == "greedy" else _likeliest(lm, some, table)
        kept += [record for record, known in zip(some, found, strict=True) if known]
        progress("records", start + len(some), len(dataset.records))
        if limit is not None and len(kept) >= limit:
            break
    if not kept:
        raise FactError(
            f"{lm.name} says the true object of none of the {len(dataset.records)} records of {dataset.name!r}"
        )
    return replace(dataset, records=tuple(kept[:limit]))


def _said(lm: LanguageModel, records: Sequence[Record]) -> list[bool]:
    from engram.model.generation import Writing, normalised_text, write

    asked = [(n, fact) for n, record in enumerate(records) for fact in record.facts]
    writings = []
    for _, fact in asked:
        cloze = lm.cloze(fact.prompt_text, str(fact.target_true))
        writings.append(Writing(tuple(cloze.ids[: cloze.tokens]), len(cloze.answer) + 1))
    known = [True] * len(records)
    for (n, fact), ids in zip(asked, write(lm, writings), strict=True):
        known[n] &= begins(normalised_text(lm, ids), (str(fact.target_true),))
    return known


def _likeliest(lm: LanguageModel, records: Sequence[Record], table: Sequence[Fact]) -> list[bool]:
    asked = [(n, fact) for n, record in enumerate(records) for fact in _true(record)]
    facts = [fact for _, fact in asked]
    found = knows(lm, facts, candidates="relation", length="mean", paraphrases=False, table=table)
    known = [True] * len(records)
    for (n, _), judged in zip(asked, found.records, strict=True):
        known[n] &= judged.right
    return known


def _true(record: Record) -> list[Fact]:
    """A record's facts as they are before its edit."""
    missing = [fact for fact in record.facts if fact.target_true is None]
    if missing:
        raise FactError(
            f"record {record.id!r} ({missing[0].subject!r}) has no true object, so nobody can say whether the model knows it"
        )
    return [
        Fact(fact.subject, fact.prompt, str(fact.target_true), relation=fact.relation)
        for fact in record.facts
    ]
