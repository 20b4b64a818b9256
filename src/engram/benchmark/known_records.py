"""Which records are about facts that a model knows: only there does an edit change something.

Knows two rules for "knows". Refuses to know how objects are ranked (see knowledge) and how text is
generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from engram.benchmark.data.records import Dataset, Record
from engram.checks import one_of
from engram.errors import FactError, SettingError
from engram.evaluate.answers import begins
from engram.facts import Fact
from engram.knowledge.knows import knows
from engram.model.generation import Writing, normalised_text, write
from engram.model.language_model import LanguageModel
from engram.progress import Progress, no_progress

# Two more rules go by the same word: `Knowledge.known` ranks the object among its candidates (by
# default the vocabulary), and `average_trace(keep=)` compares the first token alone. They are about
# a fact; these two are about what the edit of a record is measured by.
Rule = Literal["greedy", "relation"]
_AT_ONCE = 256  # records between two looks at the limit


def known_records(
    lm: LanguageModel,
    dataset: Dataset,
    rule: Rule = "greedy",
    *,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> Dataset:
    """Return the records whose true object the model knows, in their order.

    Args:
        rule: "greedy": the greedy answer to the record's own prompt begins with the true object.
            "relation": the true object is the most probable one (mean per token) of all true
            objects of its relation in the data set, others of the same subject left out. The second
            rule is looser: the model's own answer may be no such object at all.
        limit: largest number of records.
        progress: called with (what is done, done, total).
    Raises:
        FactError: no record is known, or one has no true object, or, for "relation", no
            relation.
        SettingError: another rule, or a limit below 1.
    """
    one_of("rule", rule, ("greedy", "relation"))
    if limit is not None and limit < 1:
        raise SettingError(f"limit={limit}: expected 1 or more")
    # Of the whole data set: candidates of one block would depend on _AT_ONCE.
    table = [fact for record in dataset.records for fact in _true(record)]
    known: list[Record] = []
    for start in range(0, len(dataset.records), _AT_ONCE):
        block = dataset.records[start : start + _AT_ONCE]
        knows_it = _answers(lm, block) if rule == "greedy" else _ranks_first(lm, block, table)
        known += [record for record, right in zip(block, knows_it, strict=True) if right]
        progress("records", start + len(block), len(dataset.records))
        if limit is not None and len(known) >= limit:
            break
    if not known:
        raise FactError(
            f"{lm.name} says the true object of none of the {len(dataset.records)} records of "
            f"{dataset.name!r}"
        )
    return replace(dataset, records=tuple(known[:limit]))


def _answers(lm: LanguageModel, records: Sequence[Record]) -> list[bool]:
    """Tell for each record whether the greedy answers begin with its facts' true objects."""
    facts = [(n, fact) for n, record in enumerate(records) for fact in record.facts]
    writings = []
    for _, fact in facts:
        cloze = lm.cloze(fact.prompt_text, str(fact.target_true))
        # One token more than the object has: "Paris" and "Parisian" may begin with the same token,
        # and only the next one shows which of them it is.
        writings.append(Writing(tuple(cloze.ids[: cloze.tokens]), len(cloze.answer) + 1))
    known = [True] * len(records)
    for (n, fact), ids in zip(facts, write(lm, writings), strict=True):
        # A record of several facts (MQuAKE) is known if each of them is.
        known[n] &= begins(normalised_text(lm, ids), (str(fact.target_true),))
    return known


def _ranks_first(lm: LanguageModel, records: Sequence[Record], table: Sequence[Fact]) -> list[bool]:
    """Tell for each record whether its facts' true objects are the best ones of the relation."""
    owners = [n for n, record in enumerate(records) for _ in record.facts]
    facts = [fact for record in records for fact in _true(record)]
    # The mean over tokens is what CounterFact's ES compares; with the sum "New York City" would
    # lose to most cities of one token.
    judged = knows(lm, facts, candidates="relation", length="mean", paraphrases=False, table=table)
    known = [True] * len(records)
    for n, of_fact in zip(owners, judged.records, strict=True):
        known[n] &= of_fact.right
    return known


def _true(record: Record) -> list[Fact]:
    """Return a record's facts as they are before its edit."""
    missing = [fact for fact in record.facts if fact.target_true is None]
    if missing:
        raise FactError(
            f"record {record.id!r} ({missing[0].subject!r}) has no true object, which is what a "
            "model would have to know; filter records that have one"
        )
    return [
        Fact(fact.subject, fact.prompt, str(fact.target_true), relation=fact.relation)
        for fact in record.facts
    ]
