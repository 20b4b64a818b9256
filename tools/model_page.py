"""Fill the page of a real model, such as docs/smollm2.md, from docs/data/MODEL.

    python tools/model_page.py smollm2               # the tables, of what was measured
    python tools/model_page.py smollm2 --pictures    # and one fact's trace, the layer card

Knows measure_model's results. Refuses to measure but for the pictures of one fact; those of
averages are drawn where these are made (measure_model.py trace --pictures docs).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import engram
from engram.layers.choice import find_card
from measure_model import SHOW
from page_tables import DOCS, folder, put

MADE_BY = "tools/model_page.py: {}"
RESULTS = {  # a file in docs/data/MODEL, and a place in the page -> whose table it is
    "recall": "recall",
    "trace": "trace",
    "severed": "severed",
    "precision": "precision",
    "control": "control",
}
FACT = {  # the trace of the page and of the README
    "prompt": "The Eiffel Tower is located in the city of",
    "subject": "Eiffel Tower",
}
RELATIONS = {  # Wikidata's names of CounterFact's relations
    "P17": "country",
    "P19": "place of birth",
    "P20": "place of death",
    "P27": "citizenship",
    "P30": "continent",
    "P36": "capital",
    "P37": "official language",
    "P39": "position held",
    "P101": "field of work",
    "P103": "native language",
    "P106": "occupation",
    "P108": "employer",
    "P127": "owned by",
    "P131": "located in",
    "P136": "genre",
    "P138": "named after",
    "P140": "religion",
    "P159": "headquarters",
    "P176": "manufacturer",
    "P178": "developer",
    "P190": "twinned with",
    "P264": "record label",
    "P276": "location",
    "P364": "language of a film",
    "P407": "language of a work",
    "P413": "position played",
    "P449": "broadcast by",
    "P463": "member of",
    "P495": "country of origin",
    "P641": "sport",
    "P740": "formed in",
    "P937": "work location",
    "P1303": "instrument",
    "P1412": "languages spoken",
}


def named(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result whose relations have names, in the order of what is known best."""
    if "relations" not in result:
        return result
    best_first = sorted(result["relations"].items(), key=lambda item: -item[1]["recall"])
    relations = {f"{RELATIONS.get(key, key)} ({key})": value for key, value in best_first}
    return result | {"relations": relations}


def fill(model: str) -> None:
    """Put the tables of all results that there are into the page."""
    for name, what in RESULTS.items():
        file = folder(model) / f"{name}.json"
        if file.exists():
            result = named(json.loads(file.read_text(encoding="utf8")))
            put(DOCS / f"{model}.md", MADE_BY.format(name), SHOW[what](result))


def draw(model: str) -> None:
    """Draw the trace of one fact, and the model's layer card."""
    lm = engram.load(model)
    engram.trace(lm, **FACT).plot().savefig(DOCS / "trace.png")
    if (card := find_card(lm)) is not None:
        card.plot().savefig(DOCS / "layers.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--pictures", action="store_true")
    given = parser.parse_args()
    fill(given.model)
    if given.pictures:
        draw(given.model)


if __name__ == "__main__":
    main()
