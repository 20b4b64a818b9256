"""The bundled model's own CounterFact, built from its table of facts when it is first needed.

The builder is the one for your own facts (see build). The few facts that the model does not answer
at the record's prompt are left out: `benchmark.json` names them, tools/build_pocket_benchmark.py
finds them.
"""

from __future__ import annotations

import json
import tomllib
from functools import cache

from engram import pocket
from engram.benchmark.data.build import Association, build_counterfact
from engram.benchmark.data.records import Dataset, Snippet

SEED = 0
_FOLDER = pocket.PATH.parent


def pocket_benchmark(*, all_facts: bool = False) -> Dataset:
    """Return records in random order, so that the first N are a fair sample of all relations.

    Some subjects have two or three records. Paraphrases are templates that were never trained with
    the fact, each after a neutral sentence. References are the training sentences about subjects
    that have the new object.

    Args:
        all_facts: also those that the model does not know.
    """
    return _built(all_facts)


@cache
def _built(all_facts: bool) -> Dataset:
    known = {Association(fact.subject, fact.relation, fact.object): fact for fact in pocket.facts()}
    texts: dict[str, list[Snippet]] = {}
    for fact, trained in known.items():
        # The sentences that the model was trained on, in place of Wikipedia's: it has no other
        # words to write about these things.
        sentences = " ".join(
            f"{template.replace('{}', fact.subject)} {fact.object}."
            for template in trained.trained()
        )
        texts.setdefault(f"{fact.relation}:{fact.object}", []).append(
            Snippet(fact.subject, sentences)
        )
    dataset = build_counterfact(
        list(known),
        pocket.relations(),
        generation=tomllib.loads((_FOLDER / "generation.toml").read_text(encoding="utf8")),
        texts=texts,
        openings=pocket.OPENINGS,
        held_out=lambda fact: known[fact].paraphrases(),
        seed=SEED,
        name="pocket",
    )
    if all_facts:
        return dataset
    # A list instead of a measurement: reading a data set needs no model.
    unknown = set(json.loads((_FOLDER / "benchmark.json").read_text(encoding="utf8"))["unknown"])
    records = tuple(record for record in dataset.records if record.id not in unknown)
    return Dataset("pocket", "counterfact", records, dataset.references)
