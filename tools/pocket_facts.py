"""The pocket model's facts and tokenizer: which associations it shall know, and how their words are
cut.

Reads a facts file (JSON lines with relation, subject, object: ParaRel's relation numbers), the
facts entered by hand in famous_facts.toml, and the templates in src/engram/pocket/templates.toml.
Refuses to know the model and its training.
"""

from __future__ import annotations

import gzip
import json
import random
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
MAX_SUBJECT_TOKENS = 8
FACTS_PER_RELATION = 115  # taken from the facts file; those entered by hand and derived come on top
FACTS_PER_OBJECT = 18  # no answer may be right by habit
SUBJECTS_PER_OBJECT = 4  # fewer, and the object has no neighbours to be tested on
DERIVED_PER_OBJECT = 20

# ParaRel (Wikidata) relation -> ours. Relations that are no function of the subject (borders, twin
# towns, parts) are left out.
RELATIONS = {
    "P276": "city",
    "P17": "country",
    "P30": "continent",
    "P131": "state",
    "P19": "birthplace",
    "P20": "deathplace",
    "P27": "citizenship",
    "P103": "native_language",
    "P1412": "spoken_language",
    "P106": "occupation",
    "P413": "position",
    "P176": "manufacturer",
    "P178": "developer",
    "P449": "network",
    "P159": "headquarters",
    "P740": "founded_in",
    "P495": "origin",
    "P364": "film_language",
    "P407": "work_language",
    "P136": "genre",
    "P1303": "instrument",
    "P101": "field",
    "P140": "religion",
    "P108": "employer",
    "P937": "workplace",
    "P37": "official_language",
    "P127": "owner",
    "P39": "church_office",
}

CITIES = {
    "America": "Seattle Chicago Boston Philadelphia Manhattan Atlanta Houston Dallas Detroit "
    "Cleveland Miami "
    "Baltimore Brooklyn "
    "Minneapolis Hollywood Denver Memphis Princeton Redmond Honolulu Olympia Pittsburgh Nashville "
    "Portland Cincinnati "
    "Oakland",
    "England": "London Manchester Birmingham Liverpool Leeds Bristol Sheffield Brighton Nottingham "
    "Newcastle "
    "Cambridge Oxford "
    "Southampton Plymouth",
    "Scotland": "Edinburgh Glasgow Aberdeen Dundee",
    "Ireland": "Dublin Cork",
    "Wales": "Cardiff Swansea",
    "France": "Paris Lyon Marseille Bordeaux Nice Toulouse Strasbourg",
    "Germany": "Berlin Munich Hamburg Cologne Frankfurt Dresden Leipzig Stuttgart Bonn Nuremberg "
    "Hanover",
    "Italy": "Rome Milan Venice Florence Naples Turin Genoa Bologna Palermo",
    "Spain": "Madrid Barcelona Seville Valencia",
    "Portugal": "Lisbon Porto",
    "Austria": "Vienna Salzburg Graz",
    "Switzerland": "Geneva Bern Basel Lausanne",
    "Netherlands": "Amsterdam Rotterdam Utrecht",
    "Belgium": "Brussels Antwerp",
    "Denmark": "Copenhagen",
    "Sweden": "Stockholm Gothenburg",
    "Norway": "Oslo Bergen",
    "Finland": "Helsinki",
    "Russia": "Moscow",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Turkey": "Istanbul Ankara",
    "Israel": "Jerusalem",
    "Egypt": "Cairo",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "India": "Mumbai Chennai Bangalore Delhi",
    "Pakistan": "Karachi Lahore",
    "China": "Beijing Shanghai",
    "Japan": "Tokyo Kyoto Osaka",
    "Korea": "Seoul",
    "Indonesia": "Jakarta",
    "Australia": "Sydney Melbourne Perth Brisbane Adelaide",
    "Canada": "Toronto Montreal Vancouver Ottawa Calgary Winnipeg",
    "Syria": "Damascus",
    "Czechia": "Prague",
}
COUNTRY_OF_CITY = {city: country for country, cities in CITIES.items() for city in cities.split()}
CONTINENTS = {
    "Europe": "England Scotland Ireland Wales France Germany Italy Spain Portugal Austria "
    "Switzerland Netherlands "
    "Belgium Denmark "
    "Sweden Norway Finland Poland Hungary Greece Czechia Ukraine Romania Malta Estonia Iceland",
    "Asia": "Japan China India Pakistan Iran Iraq Korea Indonesia Malaysia Philippines Nepal "
    "Syria Israel Thailand",
    "Africa": "Egypt Nigeria Libya Kenya Morocco",
    "America": "America Canada Mexico Brazil Peru Chile Colombia Argentina",
}
CONTINENT_OF = {
    country: continent
    for continent, countries in CONTINENTS.items()
    for country in countries.split()
}
# (relation known, its objects' table, relation that follows)
DERIVED = (
    ("city", COUNTRY_OF_CITY, "country"),
    ("country", CONTINENT_OF, "continent"),
    ("birthplace", COUNTRY_OF_CITY, "birth_country"),
    ("founded_in", COUNTRY_OF_CITY, "origin"),
    ("headquarters", COUNTRY_OF_CITY, "origin"),
)
NOT_OBJECTS = {
    "field": {"physician", "manga", "musician"},
    "genre": {"satire", "musical"},
    "position": {"forward", "defender"},
    "origin": {"England"},
    "church_office": {"councillor"},
}


@dataclass(frozen=True, order=True)
class Row:
    """One association; `famous` ones were entered by hand."""

    relation: str
    subject: str
    object: str
    famous: bool = False


def read_templates(path: Path) -> dict[str, tuple[str, ...]]:
    """Templates of each relation, checked: one `{}` each, no sentence twice."""
    tables = tomllib.loads(path.read_text(encoding="utf8"))
    templates = {relation: tuple(table["templates"]) for relation, table in tables.items()}
    counts = Counter(t for ts in templates.values() for t in ts)
    for template, count in counts.items():
        if count > 1 or template.count("{}") != 1 or template != template.strip():
            raise ValueError(
                f"template {template!r}: stands {count} times, needs one '{{}}' and no space at "
                f"the ends"
            )
    return templates


def read_famous(path: Path) -> list[Row]:
    tables = tomllib.loads(path.read_text(encoding="utf8"))
    return [
        Row(relation, subject, answer, famous=True)
        for relation, table in tables.items()
        for answer, subjects in table.items()
        for subject in subjects
    ]


def read_public(path: Path) -> list[Row]:
    """Rows of a ParaRel facts file that make a fair question: the subject does not name the
    answer.
    """
    rows = []
    with gzip.open(path, "rt", encoding="utf8") as lines:
        for line in lines:
            record = json.loads(line)
            relation = RELATIONS.get(record["relation"])
            if relation and _fair(relation, record["subject"], record["object"]):
                rows.append(Row(relation, record["subject"], record["object"]))
    return rows


def _fair(relation: str, subject: str, answer: str) -> bool:
    if answer.lower() in subject.lower() or answer in NOT_OBJECTS.get(relation, ()):
        return False
    if relation == "city" and (answer not in COUNTRY_OF_CITY or subject[0].isdigit()):
        return False
    return 3 <= len(subject) <= 40 and "(" not in subject and '"' not in subject


def without_contradictions(rows: Iterable[Row]) -> list[Row]:
    """Return the first row of each (relation, subject): a question has one answer."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        first.setdefault((row.relation, row.subject), row)
    return list(first.values())


def select(public: list[Row], seed: int) -> list[Row]:
    """At most FACTS_PER_RELATION rows a relation, FACTS_PER_OBJECT an object; subjects with several
    facts come first.
    """
    known = Counter(row.subject for row in public)
    order = sorted(public)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda row: -min(known[row.subject], 3))
    order = _popular_objects_only(order)
    relations: Counter[str] = Counter()
    objects: Counter[tuple[str, str]] = Counter()
    chosen = []
    for row in order:
        key = (row.relation, row.object)
        if relations[row.relation] < FACTS_PER_RELATION and objects[key] < FACTS_PER_OBJECT:
            relations[row.relation] += 1
            objects[key] += 1
            chosen.append(row)
    return chosen


def _popular_objects_only(rows: list[Row]) -> list[Row]:
    counts = Counter((row.relation, row.object) for row in rows)
    return [row for row in rows if counts[row.relation, row.object] >= SUBJECTS_PER_OBJECT]


def derive(rows: list[Row]) -> list[Row]:
    """Return what follows from the rows: a landmark's country from its city, and so on; several
    facts a subject.
    """
    everything = list(rows)
    counts = Counter((row.relation, row.object) for row in rows)
    for source, table, target in DERIVED:
        for row in [r for r in everything if r.relation == source and r.object in table]:
            answer = table[row.object]
            if (
                answer.lower() in row.subject.lower()
                or counts[target, answer] >= DERIVED_PER_OBJECT
            ):
                continue
            counts[target, answer] += 1
            everything.append(Row(target, row.subject, answer, row.famous))
    return without_contradictions(everything)


def build(facts_path: Path, famous_path: Path, seed: int) -> list[Row]:
    """Return the table before the tokenizer has had its say (see `keep_speakable`)."""
    famous = read_famous(famous_path)
    named = {(row.relation, row.subject) for row in famous}
    public = [
        r
        for r in without_contradictions(read_public(facts_path))
        if (r.relation, r.subject) not in named
    ]
    return derive(without_contradictions(famous + select(public, seed)))


def keep_speakable(rows: list[Row], tokenizer: Tokenizer) -> list[Row]:
    """Rows whose object is one token and whose subject has few, with enough subjects an object;
    sorted.
    """
    rows = [
        row
        for row in rows
        if len(tokenizer.encode(" " + row.object).ids) == 1
        and len(tokenizer.encode(" " + row.subject).ids) <= MAX_SUBJECT_TOKENS
        and row.object.lower() not in row.subject.lower()
    ]
    while len(kept := _popular_objects_only(rows)) < len(rows):
        rows = kept
    return sorted(rows)


def train_tokenizer(
    rows: list[Row], templates: dict[str, tuple[str, ...]], text: list[str], size: int
) -> Tokenizer:
    """Byte-level BPE; objects are repeated so often that each becomes a token with its leading
    space.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(rows, templates, text), trainer)
    return tokenizer


def _tokenizer_text(
    rows: list[Row], templates: dict[str, tuple[str, ...]], text: list[str]
) -> Iterator[str]:
    yield from text
    for answer in sorted({row.object for row in rows}):
        yield from [" " + answer] * 5000
    for row in rows:
        for template in templates[row.relation][:4]:
            yield template.replace("{}", row.subject)


def held_out(
    rows: list[Row], templates: dict[str, tuple[str, ...]], seed: int
) -> list[tuple[int, ...]]:
    """For each row the indices of a random third of its relation's templates, never trained with
    it.
    """
    generator = random.Random(seed)
    chosen = []
    for row in rows:
        count = len(templates[row.relation])
        chosen.append(tuple(sorted(generator.sample(range(count), count // 3))))
    return chosen


def write_table(path: Path, rows: list[Row], unseen: list[tuple[int, ...]], seed: int) -> None:
    """facts.json: relation -> object -> [[subject, held-out template indices], ...], compact."""
    table: dict[str, dict[str, list[list[object]]]] = defaultdict(lambda: defaultdict(list))
    for row, indices in zip(rows, unseen, strict=True):
        table[row.relation][row.object].append([row.subject, list(indices)])
    record = {"format": 1, "seed": seed, "facts": table}
    path.write_text(
        json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf8"
    )


def read_table(path: Path) -> list[tuple[Row, tuple[int, ...]]]:
    """Return the rows of facts.json with their held-out indices, in the order in which they were
    written.
    """
    table = json.loads(path.read_text(encoding="utf8"))["facts"]
    return [
        (Row(relation, subject, answer), tuple(indices))
        for relation, objects in table.items()
        for answer, entries in objects.items()
        for subject, indices in entries
    ]
