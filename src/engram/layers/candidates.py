"""Facts on which layers are compared: edits of what a model knows, with paraphrases and neighbours
to judge them by.

Knows the bundled table and what makes an edit out of a fact. Refuses to know layers.
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

_ASKED = 1000  # facts of the bundled table that a model is asked at most
_AT_ONCE = 100  # a model that knows none of so many is asked no further
_NEIGHBOURS = 10


def bundled_edits(lm: LanguageModel, count: int, seed: int = 0) -> list[Fact]:
    """At most `count` facts of the bundled table that a model knows, each with another object to be
    edited to.

    They come in random order; a thousand are asked at most, and no more once the model knows none
    of a hundred.
    """
    order = pocket.facts()
    random.Random(seed).shuffle(order)
    found: list[Fact] = []
    for at in range(0, min(_ASKED, len(order)), _AT_ONCE):
        some = order[at : at + _AT_ONCE]
        fresh = known(
            lm,
            [pocket.as_fact(each, pocket.counterfactual(each, seed), seed=seed) for each in some],
        )
        found += fresh
        if not fresh or len(found) >= count:
            break
    return found[:count]


def as_edits(facts: Sequence[Fact], seed: int = 0) -> list[Fact]:
    """Edits out of facts: one with `target_true` is one; one without says what is true and gets
    another object of its relation.

    Neighbours are given facts of the same relation and object, where a fact comes without; for
    subjects of the bundled table, the table's. A fact for which there is no other object is left
    out.
    """
    edits = []
    for fact in facts:
        if fact.target_true is None:
            alike = [
                other
                for other in facts
                if fact.relation is not None and other.relation == fact.relation
            ]
            objects = sorted({other.target for other in alike} - {fact.target})
            if not objects:
                continue
            around = [o for o in alike if o.target == fact.target and o.subject != fact.subject]
            neighbours = tuple((other.prompt_text, other.target) for other in around[:_NEIGHBOURS])
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
            "%d of %d facts are left out: no target_true, and no other object of their relation among the facts",
            len(facts) - len(edits),
            len(facts),
        )
    return edits


def known(lm: LanguageModel, edits: Sequence[Fact]) -> list[Fact]:
    """Those whose true object is the model's own answer to the edit's prompt."""
    asked = [Fact(edit.subject, edit.prompt, str(edit.target_true)) for edit in edits]
    records = knows(lm, asked, paraphrases=False).records if asked else ()
    return [edit for edit, record in zip(edits, records, strict=True) if record.right]
