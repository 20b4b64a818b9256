"""Select the sentences of the corpus "wikipedia", on which second moments are measured by default.

    python tools/select_wikipedia.py ../shared/data

No sentence mentions a subject of a CounterFact record or of a record's neighbourhood prompts, in
any case of letters. C spares the keys of its own text more than others, so with them benchmarks
would report neighbours as safe only because they had been in C.

Neighbourhood prompts come without their subjects; these are what is left when a prompt is taken
apart by the templates of its relation (the records' own prompts and paraphrases). Where none fits,
it is every subject of the facts file that occurs in the prompt, or else its longest run of
capitalised words.

Sentences without a full stop, very short and very long ones are left out too. The others keep
their order, joined to documents of about 100 words, as long as sampled ones, so that keys are those
of tokens with a context. The gzip file has no time and no name in it: the same data, the same
bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "src/engram/editors/second_moments/wikipedia.txt.gz"
WORDS = 100  # of a document
LENGTHS = range(40, 501)  # characters of a sentence


def lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf8") as file:
        return [line.strip() for line in file if line.strip()]


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def runs(text: str, longest: int) -> Iterator[tuple[str, ...]]:
    """Yield every run of up to `longest` words."""
    every = words(text)
    for first in range(len(every)):
        for last in range(first + 1, min(len(every), first + longest) + 1):
            yield every[first:last]


def record_subjects(records: Iterable[dict[str, Any]]) -> set[str]:
    return {record["requested_rewrite"]["subject"] for record in records}


def neighbour_subjects(records: list[dict[str, Any]], known: Iterable[str]) -> set[str]:
    """Return the subjects of all neighbourhood prompts."""
    templates: dict[str, set[str]] = defaultdict(set)
    for record in records:
        asked = record["requested_rewrite"]
        of_relation = templates[asked["relation_id"]]
        of_relation.add(asked["prompt"])
        for prompt in record["paraphrase_prompts"]:
            of_relation.add(prompt.replace(asked["subject"], "{}", 1))
    subjects: set[str] = set()
    names = {words(name): name for name in known}
    longest = max(map(len, names))
    for record in records:
        for prompt in record["neighborhood_prompts"]:
            candidates = [
                prompt[len(before) : len(prompt) - len(after)]
                for before, found, after in (
                    template.partition("{}")
                    for template in templates[record["requested_rewrite"]["relation_id"]]
                )
                if found and len(prompt) > len(before) + len(after)
                if prompt.startswith(before) and prompt.endswith(after)
            ]
            inside = [names[run] for run in runs(prompt, longest) if run in names]
            capitalised = re.findall(r"[A-Z]\S*(?: [A-Z]\S*)*", prompt)
            if candidates:
                subjects.add(min(candidates, key=len))
            else:
                subjects.update(inside or [max(capitalised, key=len)])
    return subjects


def documents(sentences: Iterable[str]) -> Iterator[str]:
    """Join sentences until a document has `WORDS` words; the last one may have fewer."""
    parts: list[str] = []
    for sentence in sentences:
        parts.append(sentence)
        if sum(len(part.split()) for part in parts) >= WORDS:
            yield " ".join(parts)
            parts = []
    if parts:
        yield " ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the three files")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    records = [json.loads(line) for line in lines(given.data / "counterfact.jsonl.gz")]
    facts = [json.loads(line)["subject"] for line in lines(given.data / "pararel_facts.jsonl.gz")]
    own = record_subjects(records)
    neighbours = neighbour_subjects(records, own | set(facts))
    avoided = {words(name) for name in own | neighbours} - {()}
    longest = max(map(len, avoided))
    every = list(dict.fromkeys(lines(given.data / "wikipedia_sentences.txt.gz")))
    chosen = [
        sentence
        for sentence in every
        if len(sentence) in LENGTHS
        and re.match(r"[A-Z\"].*[.\"]$", sentence)
        and not any(run in avoided for run in runs(sentence, longest))
    ]
    texts = list(documents(chosen))
    data = "\n".join(texts).encode()
    with given.out.open("wb") as file, gzip.GzipFile("", "wb", 9, file, 0) as packed:
        packed.write(data)
    print(
        f"{len(own):,} subjects of records, {len(neighbours):,} of neighbours; "
        f"{len(every):,} sentences, {len(chosen):,} chosen, "
        f"{len(texts):,} documents, {len(data):,} bytes, {given.out.stat().st_size:,} packed"
    )


if __name__ == "__main__":
    main()
