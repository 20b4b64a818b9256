"""Facts that a model knows, as counterfactual edits with paraphrases and neighbours: what the
measurements of docs/ are about.

    python tools/known_facts.py smollm2 ../shared/data/counterfact.jsonl.gz
    python tools/known_facts.py smollm2 ../shared/data/counterfact.jsonl.gz --write known.json

The first keeps in docs/data/smollm2/known.json which records of a data set's split the model knows
(the greedy answer to the record's prompt begins with the true object), by their ids; the texts stay
where they are. The second writes these records to a file, in random order, for `engram bench`.
Pocket needs no such file: its facts are those of its own table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import engram
from engram import pocket
from engram.benchmark.data.records import Dataset, Record
from engram.benchmark.data.write import write_dataset
from engram.benchmark.known_records import known_records
from engram.model.language_model import LanguageModel
from page_tables import folder


@dataclass(frozen=True)
class PocketFacts:
    """The pocket model's own table."""

    seed: int = 0
    ranks_objects = True  # whether recall is measured among the objects of each relation, too

    @cached_property
    def subjects(self) -> list[str]:
        """The subjects of all facts, known or not."""
        return sorted({known.subject for known in pocket.facts()})

    def facts(self, lm: LanguageModel) -> Iterator[engram.Fact]:
        """Yield facts in random order that the model answers rightly at the edit's prompt."""
        order = pocket.facts()
        random.Random(self.seed).shuffle(order)
        for known in order:
            fact = pocket.as_fact(known, pocket.counterfactual(known, self.seed), seed=self.seed)
            if engram.knows(lm, engram.Fact(known.subject, fact.prompt, known.object)).known():
                yield fact

    def asked(self) -> tuple[list[engram.Fact], list[engram.Fact]]:
        """Return what is asked for recall, held-out templates, and the table of all facts."""
        facts = []
        for known in pocket.facts():
            if known.held_out:
                first, *_ = prompts = known.paraphrases()
                texts = tuple(prompt.replace("{}", known.subject) for prompt in prompts)
                facts.append(
                    engram.Fact(
                        known.subject,
                        first,
                        known.object,
                        paraphrases=texts,
                        relation=known.relation,
                    )
                )
        return facts, engram.read_facts("pocket")


@dataclass(frozen=True)
class DatasetFacts:
    """Records of a data set's file, of which `known` says which ones the model knows."""

    path: Path
    known: Path
    seed: int = 0
    per_relation: int = 100  # facts at most that are asked for recall
    ranks_objects = False  # a hundred objects of several tokens a prompt take hours

    @cached_property
    def dataset(self) -> Dataset:
        return engram.read_dataset(self.path)

    @cached_property
    def subjects(self) -> list[str]:
        """The subjects of all records, known or not."""
        return sorted({record.facts[0].subject for record in self.dataset.records})

    @cached_property
    def records(self) -> Dataset:
        """The known records in random order."""
        ids = json.loads(self.known.read_text(encoding="utf8"))["ids"]
        random.Random(self.seed).shuffle(ids)
        by_id = {record.id: record for record in self.dataset.records}
        return replace(self.dataset, records=tuple(by_id[each] for each in ids))

    def facts(self, lm: LanguageModel) -> Iterator[engram.Fact]:
        """Yield the facts of the known records in random order; `known` says which they are."""
        for record in self.records.records:
            yield record.facts[0]

    def asked(self) -> tuple[list[engram.Fact], list[engram.Fact]]:
        """Return what is asked for recall, some true facts of each relation, and all of them."""
        table = [true_fact(record.facts[0]) for record in self.dataset.records]
        by_relation = defaultdict(list)
        for fact in table:
            by_relation[fact.relation].append(fact)
        draw = random.Random(self.seed)
        facts = [
            fact
            for relation in sorted(map(str, by_relation))
            for fact in draw.sample(
                by_relation[relation], min(self.per_relation, len(by_relation[relation]))
            )
        ]
        return facts, table


FactSource = PocketFacts | DatasetFacts


def true_fact(fact: engram.Fact) -> engram.Fact:
    """Return an edit's fact as it is before the edit, by its own prompt alone."""
    return engram.Fact(fact.subject, fact.prompt, str(fact.target_true), relation=fact.relation)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `source` and of the model."""
    parser.add_argument("--model", default="pocket", help="as engram.load takes it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--facts", type=Path, help="a data set's file, for a model other than pocket"
    )
    parser.add_argument("--seed", type=int, default=0)


def source(given: argparse.Namespace) -> FactSource:
    """Return where the facts of a model come from: the bundled table, or a data set's file."""
    if given.facts is None:
        return PocketFacts(given.seed)
    return DatasetFacts(given.facts, folder(given.model) / "known.json", given.seed)


def of_split(path: Path, split: str, records: Sequence[Record]) -> list[Record]:
    """Return the records of a split, a field of the file that the library does not read."""
    with gzip.open(path, "rt", encoding="utf8") as file:
        splits = {str(row["case_id"]): row["split"] for row in map(json.loads, file)}
    return [record for record in records if splits[record.id] == split]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--split", default="edit")
    parser.add_argument("--write", type=Path, help="write the known records, in random order")
    given = parser.parse_args()
    place = folder(given.model) / "known.json"
    if given.write:
        found = DatasetFacts(given.dataset, place).records
        print(f"{len(found.records)} records: {write_dataset(found, given.write)}")
        return
    dataset = engram.read_dataset(given.dataset)
    asked = replace(dataset, records=tuple(of_split(given.dataset, given.split, dataset.records)))
    known = known_records(engram.load(given.model), asked)
    ids = sorted((record.id for record in known.records), key=int)
    about = {"dataset": given.dataset.name, "split": given.split, "rule": "greedy"}
    place.parent.mkdir(parents=True, exist_ok=True)
    record = {**about, "of": len(asked.records), "ids": ids}
    place.write_text(json.dumps(record) + "\n", encoding="utf8")
    print(f"{given.model} knows {len(ids)} of {len(asked.records)} records: {place}")


if __name__ == "__main__":
    main()
