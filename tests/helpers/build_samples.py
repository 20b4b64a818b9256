"""Facts, templates and texts that a benchmark is built of."""

from __future__ import annotations

from engram.benchmark.data.build import Association, build_counterfact
from engram.benchmark.data.records import Dataset, Snippet

TEMPLATES = {
    "city": ["{} is in the city of", "You find {} in", "To see {}, go to", "{} stands in"],
    "metal": ["{} is made of", "The smith made {} of", "{} is a thing of"],
}
GENERATION = {"city": ["A day at {} is", "Around {} there are"]}
CITIES = {"Rome": 6, "Paris": 3, "Oslo": 2}
METALS = {"iron": 3, "gold": 3}


def facts() -> list[Association]:
    found = [
        Association(f"tower {c}{n}", "city", c) for c, count in CITIES.items() for n in range(count)
    ]
    found = [
        fact._replace(subject=fact.subject.replace(fact.object, fact.object[:2])) for fact in found
    ]
    return found + [
        Association(f"ring {m[:2]}{n}", "metal", m)
        for m, count in METALS.items()
        for n in range(count)
    ]


def texts() -> dict[str, list[Snippet]]:
    found: dict[str, list[Snippet]] = {}
    for subject, relation, true in facts():
        found.setdefault(f"{relation}:{true}", []).append(
            Snippet(subject, f"{subject} goes with {true}.")
        )
    return found


def built(given: list[Association] | None = None, templates=None, **more) -> Dataset:
    return build_counterfact(
        given or facts(), templates or TEMPLATES, generation=GENERATION, **more
    )
