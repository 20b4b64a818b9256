"""The bundled model's own CounterFact, built from its table of facts when it is asked for.

The same builder as for anybody's facts (see build). Left out are the few facts that the model does
not say to the record's prompt: `benchmark.json` names them, tools/build_pocket_benchmark.py finds
them.
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
    """Records in random order, so that the first so many are a fair sample of all relations. Some
    subjects have two or three.

    Paraphrases are templates that were never trained with the fact, each behind a neutral sentence.
    References are the sentences that were trained about subjects which have the new object.

    Args:
        all_facts: also those that the model does not know.
    """
    return _built(all_facts)


@cache
def _built(all_facts: bool) -> Dataset:
    known = {Association(each.subject, each.relation, each.object): each for each in pocket.facts()}
    texts: dict[str, list[Snippet]] = {}
    for fact, each in known.items():
        told = " ".join(
            f"{template.replace('{}', fact.subject)} {fact.object}." for template in each.trained()
        )
        texts.setdefault(f"{fact.relation}:{fact.object}", []).append(Snippet(fact.subject, told))
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
    unknown = set(json.loads((_FOLDER / "benchmark.json").read_text(encoding="utf8"))["unknown"])
    kept = tuple(record for record in dataset.records if record.id not in unknown)
    return Dataset("pocket", "counterfact", kept, dataset.references)
