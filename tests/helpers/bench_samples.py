"""A small benchmark that tiny models can be put through, and what a file of a run holds."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from engram import Fact
from engram.benchmark.data.records import Dataset, Record, References, Snippet
from engram.benchmark.data.tfidf import TfIdf
from engram.benchmark.metrics.outcomes import MeasureConfig
from engram.evaluate.probes import Probe

SUBJECTS = (
    "tower",
    "bridge",
    "river",
    "city",
    "piano",
    "guitar",
    "mother tongue",
    "Zdeno Chára",
    "capital",
    "mayor",
)
CITIES = ("Paris", "Rome", "Madrid", "London")
ASKED = MeasureConfig(answer_tokens=1, texts=True, text_tokens=10, drift_every=5)
METHODS: dict[str, dict[str, Any]] = {
    "ultraedit": {"learning_rate": 0.1},
    "ft": {"epochs": 3, "learning_rate": 0.05},
}

SNIPPETS = {
    f"P1:{city}": (Snippet(f"{city}'s mayor", f"The mayor of {city} plays the piano in {city}."),)
    for city in CITIES
}
REFERENCES = References(
    SNIPPETS, TfIdf.fit(each.text for some in SNIPPETS.values() for each in some)
)


def dataset(
    count: int = 10, name: str = "cities", prompt: str = "The {} is in the city of"
) -> Dataset:
    """Return records of several lengths, with everything that CounterFact has."""
    return Dataset(name, "counterfact", tuple(_record(n, prompt) for n in range(count)), REFERENCES)


def _record(n: int, prompt: str) -> Record:
    subject, other = SUBJECTS[n % len(SUBJECTS)], SUBJECTS[(n + 3) % len(SUBJECTS)]
    new, true = CITIES[n % 4], CITIES[(n + 1 + n // 4 % 3) % 4]
    fact = Fact(
        subject, prompt, new, true, relation="P1", paraphrases=(f"She sings in the {subject} of",)
    )
    more = [
        Probe("neighbourhood", f"The {other} is in the city of", true, new),
        Probe("neighbourhood", f"It's said that the {other} is in", true, new),
        Probe("attribute", f"The {other} of", new, true),
    ]
    return Record.from_fact(
        str(n),
        fact,
        probes=more,
        generation=(f"The {subject}", f"He sings: the {subject}"),
        references=f"P1:{new}",
    )


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of a run's file but those that tell when and how fast it was done."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)
    try:
        return {
            table: connection.execute(f"SELECT {columns} FROM {table} ORDER BY {order}").fetchall()
            for table, columns, order in (
                ("about", "name, value", "name"),
                ("records", "place, id, record", "place"),
                ("methods", "label, method, settings", "rowid"),
                ("unedited", "place, outcome", "place"),
                ("results", "label, place, outcome, size, error", "label, place"),
            )
        }
    finally:
        connection.close()
