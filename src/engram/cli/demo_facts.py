"""The facts that `engram demo` rewrites, by model: pocket's table, or `demo_facts.toml`.

Reads files of the package. Refuses to know torch: a misspelt subject is reported at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from engram.errors import FactError, SettingError
from engram.facts import Fact


def demo_fact(model: str, subject: str, target: str) -> Fact:
    """Return the fact that `subject` has the object `target`, with what a test of it needs.

    Raises:
        SettingError: a model that has no facts here.
        FactError: a subject that the model does not know, an empty target, or the true object.
    """
    from engram import pocket
    from engram.model.named_models import NAMED_MODELS, canonical_name

    name = canonical_name(model)
    if name == "pocket":
        return pocket.fact_about(subject, target)
    tables = tomllib.loads(Path(__file__).with_name("demo_facts.toml").read_text("utf8"))
    if name not in tables:
        known = [short for short, row in NAMED_MODELS.items() if row.canonical in tables]
        raise SettingError(
            f"--model {model}: the demo has no facts for it; expected pocket or "
            f"{', '.join(known)}. For any model: engram trace and engram edit"
        )
    target = target.strip()
    if not target:
        raise FactError(
            "target is empty; give the object that the model shall say, such as 'Paris'"
        )
    rows = {one: row for row in tables[name].values() for _, one in _subjects(row)}
    if subject not in rows:
        near = get_close_matches(subject, rows, n=3, cutoff=0.5) or list(rows)[:3]
        raise FactError(
            f"the demo knows no fact of {model} about {subject!r}; it knows {', '.join(near)} and "
            f"{len(rows)} subjects in all"
        )
    return _fact(rows[subject], subject, target)


def _fact(row: dict[str, Any], subject: str, target: str) -> Fact:
    true = next(answer for answer, one in _subjects(row) if one == subject)
    if target == true:
        raise FactError(f"{target!r} is what the model says of {subject!r}; give another object")
    prompt = row["prompt"]
    return Fact(
        subject,
        prompt,
        target,
        true,
        paraphrases=tuple(text.replace("{}", subject) for text in row["paraphrases"]),
        neighbours=tuple(
            (prompt.replace("{}", other), answer)
            for answer, other in _subjects(row)
            if other != subject and answer != target
        ),
    )


def _subjects(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (object, subject) pairs of a relation."""
    for answer, subjects in row["subjects"].items():
        for subject in subjects:
            yield answer, subject
