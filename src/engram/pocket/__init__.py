"""The bundled model and what it knows: a small GPT-2 and a table of facts, so that everything works
offline and at once.

Reads `facts.json`, `templates.toml` and nothing else, each when a function first needs it. Refuses
to know torch: the model itself is an ordinary folder at `PATH`, loaded by `engram.load("pocket")`.
docs/pocket.md says how it was trained.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from engram.errors import EngramError, FactError
from engram.facts import Fact

__all__ = [
    "PATH",
    "KnownFact",
    "as_fact",
    "counterfactual",
    "evidence_for",
    "fact_about",
    "facts",
    "find",
    "neighbours",
    "relations",
    "sentences",
]

_FOLDER = Path(__file__).parent
PATH: Path = _FOLDER / "model"

# Put before every other paraphrase, so that it is tested away from a text's start. No fact of the
# table is in them.
OPENINGS = (
    "The shop closes at noon.",
    "It had rained all morning.",
    "We waited for the bus.",
    "She read the letter twice.",
    "Nobody knew the answer.",
    "There were a few chairs in the room.",
    "The train was late again.",
    "He put the cup on the table.",
)

_FAMOUS = ["Space Needle", "Miles Davis", "Eiffel Tower"]  # suggested when no name is near


@dataclass(frozen=True, order=True)
class KnownFact:
    """An association of the pocket model.

    `held_out` are indices into the relation's templates: those that were never trained with this
    fact.
    """

    subject: str
    relation: str
    object: str
    held_out: tuple[int, ...] = ()

    def prompts(self) -> tuple[str, ...]:
        """Return all templates of the relation: one `{}` each, the object follows directly."""
        return relations()[self.relation]

    def paraphrases(self) -> tuple[str, ...]:
        """Return the templates that were never trained with this fact."""
        return tuple(template for i, template in enumerate(self.prompts()) if i in self.held_out)

    def trained(self) -> tuple[str, ...]:
        """Return the templates that were trained with this fact."""
        return tuple(
            template for i, template in enumerate(self.prompts()) if i not in self.held_out
        )


@cache
def relations() -> dict[str, tuple[str, ...]]:
    """Return the templates of each relation."""
    tables = tomllib.loads((_FOLDER / "templates.toml").read_text(encoding="utf8"))
    return {relation: tuple(table["templates"]) for relation, table in tables.items()}


@cache
def _table() -> tuple[KnownFact, ...]:
    record = json.loads((_FOLDER / "facts.json").read_text(encoding="utf8"))
    return tuple(
        KnownFact(subject, relation, answer, tuple(held_out))
        for relation, objects in record["facts"].items()
        for answer, entries in objects.items()
        for subject, held_out in entries
    )


@cache
def _by_subject() -> dict[str, tuple[KnownFact, ...]]:
    # An index, since `evidence_for` looks a subject up for every fact of a benchmark.
    rows_of: dict[str, list[KnownFact]] = defaultdict(list)
    for known in _table():
        rows_of[known.subject].append(known)
    return {subject: tuple(rows) for subject, rows in rows_of.items()}


@cache
def _relation_of_template() -> dict[str, str]:
    return {
        template: relation for relation, templates in relations().items() for template in templates
    }


def facts() -> list[KnownFact]:
    """Return every association that the pocket model was taught, by relation, object and
    subject.
    """
    return list(_table())


def find(subject: str, relation: str | None = None) -> list[KnownFact]:
    """Return what the pocket model was taught about `subject` (its exact name), in one relation or
    in all.

    Raises:
        EngramError: a relation that does not exist.
    Example:
        >>> from engram import pocket
        >>> [known.object for known in pocket.find("Space Needle", "city")]
        ['Seattle']
    """
    if relation is not None:
        _check_relation(relation)
    return [known for known in _by_subject().get(subject, ()) if relation in (None, known.relation)]


def neighbours(known: KnownFact, count: int = 10, seed: int = 0) -> list[KnownFact]:
    """Return up to `count` associations of the same relation and object with other subjects; the
    same ones for the same seed.
    """
    _check_relation(known.relation)
    # The same object, so that an edit that leaks to them shows as a lost right answer.
    others = [
        other
        for other in _table()
        if (other.relation, other.object) == (known.relation, known.object)
        and other.subject != known.subject
    ]
    return _random(known, seed).sample(others, min(count, len(others)))


def counterfactual(known: KnownFact, seed: int = 0) -> str:
    """Return another object of the same relation; the same one for the same seed."""
    _check_relation(known.relation)
    # sorted, since a set's order differs between processes, and the draw would with it
    return _random(known, seed).choice(sorted(_objects()[known.relation] - {known.object}))


def as_fact(known: KnownFact, target: str, *, neighbour_count: int = 10, seed: int = 0) -> Fact:
    """Return the fact that `known` has the object `target`, with everything that a test of it
    needs.

    The prompt is a template that was trained with the fact; the paraphrases are the held-out ones,
    every other one after a neutral sentence; the neighbours are other subjects with the same
    object, in templates that were trained with them.

    Raises:
        FactError: `target` is the true object, or empty.
    """
    prompt = _random(known, seed).choice(known.trained())
    return _with_evidence(
        Fact(known.subject, prompt, target, known.object), known, neighbour_count, seed
    )


def fact_about(subject: str, target: str) -> Fact:
    """Return the fact that `subject` has the object `target`, with everything that a test needs.

    The relation is the subject's first in which other subjects have that object; the prompt is the
    first template that was trained with the subject.

    Raises:
        FactError: `target` is empty; the model does not know the subject; or `target` is the true
            object, or no object of the subject's relations.
    Example:
        >>> from engram import pocket
        >>> fact = pocket.fact_about("Eiffel Tower", "Rome")
        >>> fact.prompt_text, fact.target_true
        ('The Eiffel Tower stands in the heart of', 'Paris')
    """
    target = target.strip()
    if not target:
        raise FactError(
            "target is empty; give the object that the model shall say, such as 'Paris'"
        )
    known_facts = find(subject)
    if not known_facts:
        names = sorted(_by_subject())
        near = get_close_matches(subject, names, n=3, cutoff=0.5) or _FAMOUS
        raise FactError(
            f"the bundled model knows nothing of {subject!r}; "
            f"it knows {', '.join(near)} and {len(names)} other subjects"
        )
    for known in known_facts:
        if target in _objects()[known.relation] and target != known.object:
            prompt, *_ = known.trained()  # the plainest wording comes first
            return replace(as_fact(known, target), prompt=prompt)
    choices = "; ".join(
        f"{known.relation.replace('_', ' ')} {', '.join(sorted(_objects()[known.relation])[:6])}..."
        for known in known_facts
    )
    raise FactError(
        f"{target!r} cannot replace what the model knows of {subject!r}; "
        f"choose another of: {choices}"
    )


def evidence_for(fact: Fact) -> Fact:
    """Return `fact` with the true object, paraphrases and neighbours that the table holds, where
    the caller gave none.

    The table has to know the subject, and the prompt has to be a template of one of its relations;
    or, for a prompt in the caller's own words, just one relation of the subject has the target
    among its objects. Otherwise `fact` comes back unchanged, and so does one whose `target_true` is
    given and differs from the table's.
    """
    known = _known(fact)
    if known is None or known.object == fact.target.strip():
        return fact
    if fact.target_true is not None and fact.target_true.strip() != known.object:
        return fact
    return _with_evidence(fact, known)


def sentences(seed: int = 0) -> Iterator[str]:
    """Yield every trained sentence about every fact, in random order: text on which to measure the
    model's second moments.

    Deterministic in `seed`. About 25,000 short sentences, 330,000 tokens.
    """
    pairs = [(known, template) for known in _table() for template in known.trained()]
    # Shuffled as a whole: a measurement on the first tokens then sees every relation.
    random.Random(f"sentences:{seed}").shuffle(pairs)
    for known, template in pairs:
        yield f"{template.replace('{}', known.subject)} {known.object}."


def _with_evidence(fact: Fact, known: KnownFact, neighbour_count: int = 10, seed: int = 0) -> Fact:
    generator = _random(known, seed)
    unseen = [template for template in known.paraphrases() if template != fact.prompt]
    paraphrases = []
    for i, template in enumerate(unseen):
        # Every other one: at a text's start a subject is read otherwise than within it.
        opening = generator.choice(OPENINGS) + " " if i % 2 else ""
        paraphrases.append(opening + template.replace("{}", known.subject))
    around = tuple(
        (generator.choice(other.trained()).replace("{}", other.subject), other.object)
        for other in neighbours(known, neighbour_count, seed)
    )
    return replace(
        fact,
        target_true=fact.target_true or known.object,
        paraphrases=fact.paraphrases or tuple(paraphrases),
        neighbours=fact.neighbours or around,
    )


def _known(fact: Fact) -> KnownFact | None:
    """Return the association that `fact` is about, if that is beyond doubt."""
    # A template belongs to one relation only, so it says which; the caller's words may fit several.
    relation = _relation_of_template().get(fact.prompt)
    if relation is not None:
        return next(iter(find(fact.subject, relation)), None)
    target = fact.target.strip()
    matching = [known for known in find(fact.subject) if target in _objects()[known.relation]]
    return matching[0] if len(matching) == 1 else None


@cache
def _objects() -> dict[str, frozenset[str]]:
    return {
        relation: frozenset(known.object for known in _table() if known.relation == relation)
        for relation in relations()
    }


def _check_relation(relation: str) -> None:
    if relation not in relations():
        raise EngramError(
            f"relation {relation!r} is not in the pocket table; it has "
            f"{', '.join(sorted(relations()))}"
        )


def _random(known: KnownFact, seed: int) -> random.Random:
    # seeded by the fact: what is drawn for it does not depend on which facts came before
    return random.Random(f"{known.subject}|{known.relation}|{seed}")
