"""The bundled model's own benchmark is what the builder builds, and the model knows what is
asked.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

import engram
from engram import pocket
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.data.records import Dataset
from engram.benchmark.data.sources import SOURCES
from engram.benchmark.known_records import known_records
from engram.benchmark.metrics.generation import consistency
from engram.benchmark.metrics.outcomes import Outcome
from engram.benchmark.metrics.scores import scores
from engram.evaluate.probe_rows import AnswerScores, ProbeRows

SHIPPED = json.loads((pocket.PATH.parent / "benchmark.json").read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def dataset():
    return pocket_benchmark()


@pytest.fixture(scope="module")
def lm(pocket_lm):
    return pocket_lm


def known(record):
    (found,) = pocket.find(record.facts[0].subject, record.facts[0].relation)
    return found


def test_the_builder_rebuilds_it_exactly(dataset):
    assert dataset.digest == SHIPPED["digest"], (
        "if this was meant, run: python tools/build_pocket_benchmark.py"
    )
    assert len(dataset.records) == SHIPPED["records"]
    assert SOURCES["pocket"].about.startswith(f"{len(dataset.records):,} ")


def test_every_fact_of_the_table_is_in_it_or_named_as_unknown(dataset):
    table = {f"{each.relation}:{each.subject}:{each.object}" for each in pocket.facts()}
    assert {record.id for record in dataset.records} | set(SHIPPED["unknown"]) == table


def test_every_record_has_all_that_counterfact_asks(dataset):
    for record in dataset.records:
        assert len(record.of("rewrite")) == 1
        assert len(record.of("paraphrase")) == 2
        assert 1 <= len(record.of("neighbourhood")) <= 10
        assert 1 <= len(record.of("attribute")) <= 10
        assert len(record.generation) == 10
        assert dataset.references.snippets[record.references]


def test_prompts_were_trained_with_the_fact_and_paraphrases_were_not(dataset):
    for record in dataset.records[::7]:
        fact, each = record.facts[0], known(record)
        assert fact.prompt in each.trained()
        unseen = tuple(template.replace("{}", fact.subject) for template in each.paraphrases())
        assert all(record.probes[i].prompt.endswith(unseen) for i in record.of("paraphrase"))
        assert all(
            record.probes[i].prompt.startswith(pocket.OPENINGS) for i in record.of("paraphrase")
        )


def test_references_are_trained_sentences_with_the_new_object(dataset):
    for record in dataset.records[::97]:
        for snippet in dataset.references.snippets[record.references]:
            (each,) = pocket.find(snippet.name, record.facts[0].relation)
            assert each.object == record.facts[0].target
            assert snippet.text.startswith(
                each.trained()[0].replace("{}", each.subject) + f" {each.object}."
            )


def test_texts_like_the_references_are_nearer_to_them_than_texts_about_the_true_object(dataset):
    for record in dataset.records[::211]:
        fact = record.facts[0]
        told = [snippet.text for snippet in dataset.references.snippets[record.references]]
        near, far = (
            [
                f"{template.replace('{}', fact.subject)} {answer}."
                for template in pocket.relations()[fact.relation]
            ]
            for answer in (fact.target, fact.target_true)
        )
        assert consistency(near, told, dataset.references.tfidf) > consistency(
            far, told, dataset.references.tfidf
        )


def test_every_relation_has_generation_prompts_that_do_not_ask_for_the_object(dataset):
    asked = {template for templates in pocket.relations().values() for template in templates}
    for record in dataset.records:
        fact = record.facts[0]
        texts = set(record.generation)
        assert all(text.count(fact.subject) == 1 for text in texts), texts
        assert not texts & {template.replace("{}", fact.subject) for template in asked}


def test_the_first_records_are_a_fair_sample_of_the_relations(dataset):
    """Of 29 relations, each one's share of the first thousand is within five standard deviations of
    its share of all.
    """
    whole, first = (
        Counter(r.facts[0].relation for r in some)
        for some in (dataset.records, dataset.records[:1000])
    )
    for relation, count in whole.items():
        share = count / len(dataset.records)
        assert abs(first[relation] / 1000 - share) < 5 * (share * (1 - share) / 1000) ** 0.5


def test_the_model_says_the_true_object_and_not_the_new_one(dataset, lm):
    some = Dataset("some", "counterfact", dataset.records[:50])
    assert known_records(lm, some).records == some.records
    rows = ProbeRows(lm, [record.probes for record in some.records])
    scored, _ = AnswerScores.read(lm, rows)
    for record, readings in zip(some.records, scored.readings(), strict=True):
        found = scores(record, Outcome(readings), Outcome(readings))
        assert found["ES"] == 0
        assert found["NS"] > 0.5


def test_the_facts_named_as_unknown_are_not_said(lm):
    records = [
        record
        for record in pocket_benchmark(all_facts=True).records
        if record.id in SHIPPED["unknown"]
    ]
    with pytest.raises(
        engram.EngramError, match=f"true object of none of the {len(SHIPPED['unknown'])} records"
    ):
        known_records(lm, Dataset("unknown", "counterfact", tuple(records)))
