"""Build a CounterFact of your own: from facts (subject, relation, object) and templates, records
with everything that is asked.

Knows facts and templates. Refuses to know files and models: who keeps only what a model knows,
passes over the others (see known).
Source: Meng et al. 2022, arXiv:2202.05262, Appendix D. Every draw is seeded by its own fact, so
    that a record does not depend on how
many are built, nor on the others but through what is drawn from.
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
from engram.errors import FactError, SettingError
from engram.evaluate.probes import Probe
from engram.facts import Fact
from engram.files.json_records import json_records


class Association(NamedTuple):
    """What is true: `subject` stands in `relation` to `object`."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Sizes:
    """How many prompts a record has at most, by kind; as in the paper.

    Raises:
        SettingError: a negative number.
    """

    paraphrases: int = 2
    neighbours: int = 10
    attributes: int = 10
    generations: int = 10

    def __post_init__(self) -> None:
        for kind, size in vars(self).items():
            if size < 0:
                raise SettingError(f"{kind}={size}: expected 0 or more")


def build_counterfact(
    facts: Sequence[Association],
    templates: Mapping[str, Sequence[str]],
    *,
    generation: Mapping[str, Sequence[str]] | None = None,
    texts: Mapping[str, Sequence[Snippet]] | None = None,
    openings: Sequence[str] = (),
    held_out: Callable[[Association], Sequence[str]] | None = None,
    sizes: Sizes | None = None,
    seed: int = 0,
    limit: int | None = None,
    name: str = "built",
) -> Dataset:
    """Counterfactual records, a fact each, in an order that the seed fixes.

    The new object is drawn from the relation's objects by how many facts have them; an object that
    is true of the subject as well, or that shares its words with one of these or with the subject,
    is not drawn. The prompt is one filled template; paraphrases are others, each behind a sentence
    of `openings` where there are any; neighbours are other subjects with the true object and not
    the new one; attribute prompts ask about subjects with the new object; generation prompts are
    drawn with repetition.

    Args:
        templates: relation -> texts with one `{}` for the subject, the object next.
        generation: relation -> texts with one `{}` that make a model tell of the subject.
        texts: "relation:object" -> texts about entities that have it: what generated text is
            compared with.
        held_out: of a fact, templates that serve as paraphrases and never as prompts (such as those
            it was not trained with).
        limit: so many records at most.
    Returns:
        A data set; `skipped` says which facts were left out, and why.
    Raises:
        FactError: a template without just one {} or with a space at its end, a relation with fewer
            than two templates, a fact with an empty part, or no record at all.
        SettingError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise SettingError(f"limit={limit}: expected 1 or more")
    sizes, table = sizes or Sizes(), _Table(facts, templates, generation or {})
    records: list[Record] = []
    skipped: list[str] = []
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
        told = {record.references for record in records}
        kept = {key: tuple(each) for key, each in texts.items() if key in told}
        references = References(
            kept, TfIdf.fit(snippet.text for each in texts.values() for snippet in each)
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
        self.facts = list(dict.fromkeys(facts))
        for fact in self.facts:
            if not all(part.strip() for part in fact):
                raise FactError(f"{fact}: expected words for each of subject, relation and object")
        self.templates, self.generation = templates, generation
        for kind in (templates, generation):
            for relation, each in kind.items():
                _check(each, relation)
        for relation in dict.fromkeys(fact.relation for fact in self.facts):
            if len(set(templates.get(relation, ()))) < 2:
                raise FactError(
                    f"relation {relation!r} has {len(set(templates.get(relation, ())))} different templates; expected two or more, one "
                    "for the prompt and others for its paraphrases"
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
    """The record of a fact, or why there is none."""
    subject, relation, true = fact
    draw = _random(seed, fact, "record")
    also_true = table.true[subject, relation]
    choices = {
        other: count
        for other, count in sorted(table.objects[relation].items())
        if not any(_overlap(other, each) for each in (subject, *also_true))
    }
    if _overlap(true, subject):
        return "its object and its subject have words in common, so that one gives the other away"
    if not choices:
        return "its relation has no other object to choose"
    (new,) = draw.choices(list(choices), list(choices.values()))
    apart = list(dict.fromkeys(held_out(fact))) if held_out else []
    _check(apart, relation)
    usual = [
        template for template in dict.fromkeys(table.templates[relation]) if template not in apart
    ]
    if not usual:
        return "all its templates are held out, and none is left for the prompt"
    prompt = draw.choice(usual)
    others = apart or [template for template in usual if template != prompt]
    fill = lambda template, name: template.replace("{}", name)  # noqa: E731
    asked = [
        _behind(draw, openings, fill(each, subject))
        for each in _some(draw, others, sizes.paraphrases)
    ]
    beside = [
        other
        for other in table.subjects[relation, true]
        if not _overlap(other, subject) and new not in table.true[other, relation]
    ]
    if sizes.neighbours and not beside:
        return "no other subject has its object, so there is no neighbour"
    having = [other for other in table.subjects[relation, new] if other != subject]
    probes = [Probe("rewrite", fill(prompt, subject), new, true)]
    probes += [Probe("paraphrase", text, new, true) for text in asked]
    probes += [
        Probe("neighbourhood", fill(draw.choice(usual), other), true, new)
        for other in _some(draw, beside, sizes.neighbours)
    ]
    probes += [
        Probe("attribute", fill(draw.choice(usual), other), new, true)
        for other in _some(draw, having, sizes.attributes)
    ]
    beginnings = list(table.generation.get(relation, ()))
    written = (
        [fill(draw.choice(beginnings), subject) for _ in range(sizes.generations)]
        if beginnings
        else []
    )
    key = f"{relation}:{new}"
    rewrite = Fact(subject, prompt, new, true, relation=relation)
    told = key if texts and texts.get(key) else None
    return Record(f"{relation}:{subject}:{true}", (rewrite,), tuple(probes), tuple(written), told)


def _check(templates: Sequence[str], relation: str) -> None:
    for template in templates:
        if template.count("{}") != 1:
            raise FactError(
                f"template {template!r} of {relation!r}: expected exactly one {{}}, where the subject stands"
            )
        if template != template.rstrip():
            raise FactError(
                f"template {template!r} of {relation!r} ends with a space, which would not be part of the object any more; take it away"
            )


def _random(seed: int, fact: Association, what: str) -> random.Random:
    return random.Random("\0".join((str(seed), what, *fact)))


def _some(draw: random.Random, things: Sequence[str], most: int) -> list[str]:
    return draw.sample(list(things), min(most, len(things)))


def _behind(draw: random.Random, openings: Sequence[str], text: str) -> str:
    return f"{draw.choice(list(openings))} {text}" if openings else text


def _overlap(one: str, other: str) -> bool:
    """Whether one of the names stands in the other, word by word, or is the other; capitals do not
    count.
    """
    a, b = one.casefold().split(), other.casefold().split()
    short, long = sorted((a, b), key=len)
    return any(long[at : at + len(short)] == short for at in range(len(long) - len(short) + 1))


def read_associations(path: str | Path) -> list[Association]:
    """Facts of a file: objects with subject, relation and object, as JSON lines or a JSON list, or
    a CSV with these columns.

    Raises:
        FactError: no such file, or a record that is none, told with file, line and field.
    """
    path = Path(path)
    text = _read(path)
    given: Iterable[tuple[Any, str]] = json_records(text, str(path))
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        given = ((row, f"{path}, line {rows.line_num}") for row in rows)
    found = []
    for record, where in given:
        if isinstance(record, FactError):
            raise record
        fields = Fields(record, where)
        found.append(Association(*(fields.text(name).strip() for name in Association._fields)))
    if not found:
        raise FactError(
            f"{path} holds no facts; expected objects with {', '.join(Association._fields)}"
        )
    return found


def read_snippets(path: str | Path) -> dict[str, list[Snippet]]:
    """A JSON object "relation:object" -> list of {name, text}.

    Raises:
        FactError: no such file, or something else in it.
    """
    try:
        told = json.loads(_read(Path(path)))
    except (ValueError, RecursionError) as error:
        raise FactError(f"{path} is no JSON: {error}") from error
    fields = Fields(told, str(path))
    if not isinstance(told, Mapping):
        raise fields.wrong("", 'an object "relation:object" -> list of {name, text}')
    return {
        key: [Snippet(each.text("name"), each.text("text")) for each in fields.each(key)]
        for key in told
    }


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that have words.

    Raises:
        FactError: no such file.
    """
    return [line.strip() for line in _read(Path(path)).splitlines() if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FactError(f"{str(path)!r} could not be read: {error}") from error
