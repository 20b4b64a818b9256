"""Facts on which layers are compared: edits of what a model knows, with the paraphrases and
neighbours that judge them.

Knows the bundled table and how a fact becomes an edit. Refuses to know layers.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace

from engram import pocket
from engram.facts import Fact
from engram.knowledge.knows import knows
from engram.model.language_model import LanguageModel

log = logging.getLogger(__name__)

_LIMIT = 1000  # facts of the bundled table that are tried on a model
_FACTS_PER_BATCH = 100  # a model that knows none of a batch is tried on no further ones
_NEIGHBOURS = 10


def bundled_edits(lm: LanguageModel, limit: int, seed: int = 0) -> list[Fact]:
    """Return at most `limit` facts of the bundled table that a model knows, each as an edit to
    another object.

    They come in random order. At most a thousand are tried, in batches of a hundred; the search
    ends at a batch of which the model knows none, since an untrained or foreign-language model
    would otherwise take minutes to give nothing.
    """
    rows = pocket.facts()
    random.Random(seed).shuffle(rows)
    edits: list[Fact] = []
    for start in range(0, min(_LIMIT, len(rows)), _FACTS_PER_BATCH):
        batch = [
            pocket.as_fact(row, pocket.counterfactual(row, seed), seed=seed)
            for row in rows[start : start + _FACTS_PER_BATCH]
        ]
        known_edits = known(lm, batch)
        edits += known_edits
        if not known_edits or len(edits) >= limit:
            break
    return edits[:limit]


def as_edits(facts: Sequence[Fact], seed: int = 0) -> list[Fact]:
    """Return edits made of facts.

    A fact with `target_true` is an edit already. One without states what is true, and is edited to
    another object of its relation:

        Louvre    in  Paris  ->  Rome      neighbour: Sorbonne in Paris
        Sorbonne  in  Paris  ->  Rome      neighbour: Louvre in Paris
        Colosseum in  Rome   ->  Paris     no neighbour

    Neighbours are given facts of the same relation and object, where a fact has none of its own;
    for subjects of the bundled table, the table's. A fact without another object is left out.
    """
    edits = []
    for fact in facts:
        if fact.target_true is None:
            same_relation = [
                other
                for other in facts
                if fact.relation is not None and other.relation == fact.relation
            ]
            objects = sorted({other.target for other in same_relation} - {fact.target})
            if not objects:
                continue
            neighbours = tuple(
                (other.prompt_text, other.target)
                for other in same_relation
                if other.target == fact.target and other.subject != fact.subject
            )[:_NEIGHBOURS]
            # the seed is a text of its own for each fact, so that adding facts changes no other's
            target = random.Random(f"{fact.subject}|{fact.relation}|{seed}").choice(objects)
            fact = replace(
                fact,
                target=target,
                target_true=fact.target,
                neighbours=fact.neighbours or neighbours,
            )
        edits.append(pocket.evidence_for(fact))
    if len(edits) < len(facts):
        log.warning(
            "%d of %d facts are left out: no target_true, and no other object of their relation "
            "among the facts",
            len(facts) - len(edits),
            len(facts),
        )
    return edits


def known(lm: LanguageModel, edits: Sequence[Fact]) -> list[Fact]:
    """Return the edits whose true object is the model's own answer to the prompt."""
    facts = [Fact(edit.subject, edit.prompt, str(edit.target_true)) for edit in edits]
    records = knows(lm, facts, paraphrases=False).records if facts else ()
    return [edit for edit, record in zip(edits, records, strict=True) if record.right]
