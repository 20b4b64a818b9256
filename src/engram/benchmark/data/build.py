"""Build a CounterFact of your own: from facts (subject, relation, object) and templates to records
with all their probes.

Knows facts and templates. Refuses to know models: known_records keeps what a model knows. Every
draw is seeded by its own fact, so that a record does not depend on how many are built, nor on the
others, except through what it can draw from.
Source: Meng et al. 2022, arXiv:2202.05262, Appendix D.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engram.benchmark.data.fields import Fields
from engram.benchmark.data.records import Dataset, Record, References, Snippet
from engram.benchmark.data.tfidf import TfIdf
from engram.checks import Count, Natural, Seed, check_fields, checked_call
from engram.errors import EngramFileError, FactError
from engram.evaluate.probes import Probe
from engram.facts import Fact
from engram.files.json_records import json_records
from engram.files.names import read_text


class Association(NamedTuple):
    """What is true: `object` is the `relation` of `subject`."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Sizes:
    """Largest number of prompts of a record, by kind; defaults as in the paper.

    Raises:
        SettingError: a negative number.
    """

    paraphrases: Natural = 2
    neighbours: Natural = 10
    attributes: Natural = 10
    generations: Natural = 10

    def __post_init__(self) -> None:
        check_fields(self)


@checked_call
def build_counterfact(
    facts: Sequence[Association],
    templates: Mapping[str, Sequence[str]],
    *,
    generation: Mapping[str, Sequence[str]] | None = None,
    texts: Mapping[str, Sequence[Snippet]] | None = None,
    openings: Sequence[str] = (),
    held_out: Callable[[Association], Sequence[str]] | None = None,
    sizes: Sizes | None = None,
    seed: Seed = 0,
    limit: Count | None = None,
    name: str = "built",
) -> Dataset:
    """Build counterfactual records, one for each fact, in an order that the seed fixes.

    The new object is drawn from the relation's objects, in proportion to the number of facts that
    have them; never one that is true of the subject, or that shares its words with such an object
    or with the subject. The prompt is one filled template; paraphrases are others, each after a
    sentence of `openings` if there are any; neighbours are other subjects with the true object and
    not the new one; attribute prompts are about subjects with the new object; generation prompts
    are drawn with repetition.

    Args:
        templates: relation -> texts with one `{}` for the subject, the object next.
        generation: relation -> texts with one `{}` that make a model write about the subject.
        texts: "relation:object" -> texts about entities that have it, for the consistency of
            generated text.
        held_out: fact -> templates that serve as paraphrases and never as prompts (such as those
            it was not trained with).
        limit: largest number of records.
    Returns:
        A data set; `skipped` says which facts were left out, and why.
    Raises:
        FactError: a template without exactly one {} or with a space at its end, a relation with
            fewer than two templates, a fact with an empty part, or no record at all.
        SettingError: a limit below 1.
    Example:
        >>> from engram.benchmark.data.build import Association
        >>> cities = {"Louvre": "Paris", "Bourse": "Paris", "Prado": "Madrid", "Retiro": "Madrid"}
        >>> facts = [Association(subject, "city", city) for subject, city in cities.items()]
        >>> templates = {"city": ["The {} is in", "To see the {}, go to"]}
        >>> dataset = engram.build_counterfact(facts, templates)
        >>> len(dataset.records), dataset.records[0].facts[0].relation
        (4, 'city')
    """
    sizes, table = sizes or Sizes(), _Table(facts, templates, generation or {})
    records: list[Record] = []
    skipped: list[str] = []
    # Sorted by a number of each fact's own rather than shuffled: a shuffle of other facts would put
    # this one elsewhere, and the first hundred records would not be the first of a thousand.
    for fact in sorted(table.facts, key=lambda fact: _random(seed, fact, "order").random()):
        if limit is not None and len(records) == limit:
            break
        record = _record(fact, table, openings, held_out, texts, sizes, seed)
        if isinstance(record, str):
            skipped.append(f"{fact.subject!r} ({fact.relation}, {fact.object!r}): {record}")
        else:
            records.append(record)
    if not records:
        raise FactError(
            f"no record could be built of {len(facts)} facts; the first reasons: {skipped[:3]}"
        )
    references = None
    if texts:
        used = {record.references for record in records}
        # Only texts that a record is compared with are stored, but the document frequencies are of
        # all of them, as published: otherwise RS would depend on how many records are built.
        snippets = {key: tuple(value) for key, value in texts.items() if key in used}
        references = References(
            snippets, TfIdf.fit(snippet.text for value in texts.values() for snippet in value)
        )
    return Dataset(name, "counterfact", tuple(records), references, tuple(skipped))


class _Table:
    """Facts by relation and object, and templates, checked."""

    def __init__(
        self,
        facts: Sequence[Association],
        templates: Mapping[str, Sequence[str]],
        generation: Mapping[str, Sequence[str]],
    ) -> None:
        # A fact that is given twice would be twice as likely as an object, and a record twice.
        self.facts = list(dict.fromkeys(facts))
        for fact in self.facts:
            if not all(part.strip() for part in fact):
                raise FactError(f"{fact}: expected words for each of subject, relation and object")
        self.templates, self.generation = templates, generation
        for kind in (templates, generation):
            for relation, of_relation in kind.items():
                _check(of_relation, relation)
        for relation in dict.fromkeys(fact.relation for fact in self.facts):
            if len(set(templates.get(relation, ()))) < 2:
                raise FactError(
                    f"relation {relation!r} has {len(set(templates.get(relation, ())))} different "
                    "templates; expected two or more, one for the prompt and others for its "
                    "paraphrases"
                )
        self.subjects: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.objects: dict[str, Counter[str]] = defaultdict(Counter)
        self.true: dict[tuple[str, str], set[str]] = defaultdict(set)
        for subject, relation, true in self.facts:
            self.subjects[relation, true].append(subject)
            self.objects[relation][true] += 1
            self.true[subject, relation].add(true)


def _record(
    fact: Association,
    table: _Table,
    openings: Sequence[str],
    held_out: Callable[[Association], Sequence[str]] | None,
    texts: Mapping[str, Sequence[Snippet]] | None,
    sizes: Sizes,
    seed: int,
) -> Record | str:
    """Return the record of a fact, or the reason why there is none."""
    subject, relation, true = fact
    # One generator draws everything below in this order. A new draw in the middle would change all
    # that follow, and with them the digest of the bundled benchmark.
    draw = _random(seed, fact, "record")
    also_true = table.true[subject, relation]
    # Sorted, since the order of the facts in their file must not decide. Objects that share words
    # with the subject ("Bank of England", England) or with a true object would be half right.
    choices = {
        other: count
        for other, count in sorted(table.objects[relation].items())
        if not any(_overlap(other, name) for name in (subject, *also_true))
    }
    if _overlap(true, subject):
        return "its object and its subject have words in common, so that one gives the other away"
    if not choices:
        return "its relation has no other object to choose"
    # In proportion to the facts that have them, as published (there: to their frequency in
    # ParaRel).
    (new,) = draw.choices(list(choices), list(choices.values()))
    apart = list(dict.fromkeys(held_out(fact))) if held_out else []
    _check(apart, relation)
    usual = [
        template for template in dict.fromkeys(table.templates[relation]) if template not in apart
    ]
    if not usual:
        return "all its templates are held out, and none is left for the prompt"
    prompt = draw.choice(usual)
    # Held-out templates replace the usual ones instead of joining them: a paraphrase that the model
    # was trained with is easier, and PS would be a mixture of two.
    others = apart or [template for template in usual if template != prompt]
    paraphrases = [
        _after(draw, openings, _fill(template, subject))
        for template in _sample(draw, others, sizes.paraphrases)
    ]
    # Without subjects of which the new object is true as well: for these NS would count a right
    # answer as damage.
    neighbours = [
        other
        for other in table.subjects[relation, true]
        if not _overlap(other, subject) and new not in table.true[other, relation]
    ]
    if sizes.neighbours and not neighbours:
        return "no other subject has its object, so there is no neighbour"
    # May be empty, as the new object's only subject can be this one; no headline score needs them.
    having_new = [other for other in table.subjects[relation, new] if other != subject]
    probes = [Probe("rewrite", _fill(prompt, subject), new, true)]
    probes += [Probe("paraphrase", text, new, true) for text in paraphrases]
    probes += [
        Probe("neighbourhood", _fill(draw.choice(usual), other), true, new)
        for other in _sample(draw, neighbours, sizes.neighbours)
    ]
    probes += [
        Probe("attribute", _fill(draw.choice(usual), other), new, true)
        for other in _sample(draw, having_new, sizes.attributes)
    ]
    beginnings = list(table.generation.get(relation, ()))
    count = sizes.generations if beginnings else 0
    # With repetition, as published: ten prompts of about three texts. Every text has its own seed,
    # so equal prompts are continued differently.
    generation = tuple(_fill(draw.choice(beginnings), subject) for _ in range(count))
    rewrite = Fact(subject, prompt, new, true, relation=relation)
    key = f"{relation}:{new}"
    references = key if texts and texts.get(key) else None
    name = f"{relation}:{subject}:{true}"
    return Record(name, (rewrite,), tuple(probes), generation, references)


def _fill(template: str, name: str) -> str:
    # Not str.format, which would take braces elsewhere in the text for fields.
    return template.replace("{}", name)


def _check(templates: Sequence[str], relation: str) -> None:
    for template in templates:
        if template.count("{}") != 1:
            raise FactError(
                f"template {template!r} of {relation!r}: expected exactly one {{}}, for the subject"
            )
        # " Paris" is one token of GPT-2, and after "is in " the model would have to continue by
        # "Paris", which is another one.
        if template != template.rstrip():
            raise FactError(
                f"template {template!r} of {relation!r} ends with a space, which would not be part "
                "of the object any more; take it away"
            )


def _random(seed: int, fact: Association, what: str) -> random.Random:
    # Of a text, which Python hashes the same in every process; hash() of a tuple is salted. The
    # separator keeps ("ab", "c") and ("a", "bc") apart.
    return random.Random("\0".join((str(seed), what, *fact)))


def _sample(draw: random.Random, things: Sequence[str], most: int) -> list[str]:
    return draw.sample(list(things), min(most, len(things)))


def _after(draw: random.Random, openings: Sequence[str], text: str) -> str:
    return f"{draw.choice(list(openings))} {text}" if openings else text


def _overlap(one: str, other: str) -> bool:
    """Tell whether one of the names is part of the other, word by word, whatever their capitals:
    "Paris" is part of "paris opera", not of "Parisian".
    """
    a, b = one.casefold().split(), other.casefold().split()
    short, long = sorted((a, b), key=len)
    return any(long[at : at + len(short)] == short for at in range(len(long) - len(short) + 1))


def read_associations(path: str | Path) -> list[Association]:
    """Read facts from a file: objects with subject, relation and object, as JSON lines or a JSON
    list, or a CSV with these columns.

    Raises:
        FactError: no such file, or a malformed record, reported with file, line and field.
    """
    path = Path(path)
    text = _read(path)
    given: Iterable[tuple[Any, str]] = json_records(text, str(path))
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        # line_num, not the number of the row: quoted fields may hold line breaks.
        given = ((row, f"{path}, line {rows.line_num}") for row in rows)
    associations = []
    for record, where in given:
        if isinstance(record, FactError):
            raise record
        fields = Fields(record, where)
        associations.append(
            Association(*(fields.text(name).strip() for name in Association._fields))
        )
    if not associations:
        raise FactError(
            f"{path} holds no facts; expected objects with {', '.join(Association._fields)}"
        )
    return associations


def read_snippets(path: str | Path) -> dict[str, list[Snippet]]:
    """Read a JSON object "relation:object" -> list of {name, text}.

    Raises:
        FactError: no such file, or something else in it.
    """
    try:
        content = json.loads(_read(Path(path)))
    except (ValueError, RecursionError) as error:
        raise FactError(f"{path} is no JSON: {error}") from error
    fields = Fields(content, str(path))
    if not isinstance(content, Mapping):
        raise fields.wrong("", 'an object "relation:object" -> list of {name, text}')
    return {
        key: [Snippet(entry.text("name"), entry.text("text")) for entry in fields.each(key)]
        for key in content
    }


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a text file that have words.

    Raises:
        FactError: no such file.
    """
    return [line.strip() for line in _read(Path(path)).splitlines() if line.strip()]


def _read(path: Path) -> str:
    try:
        # -sig: spreadsheets put a byte order mark in front, which would be part of the first field.
        return read_text(path, encoding="utf-8-sig")
    except (OSError, EngramFileError) as error:
        raise FactError(f"{str(path)!r} could not be read: {error}") from error
