"""Written records are read back as they were; what the form cannot hold is an error and not a
loss.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from engram.benchmark.data.build import Association, build_counterfact
from engram.benchmark.data.counterfact import with_statement
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.data.records import Dataset, Record, Snippet
from engram.benchmark.data.sources import read_dataset
from engram.benchmark.data.write import write_dataset
from engram.errors import EngramFileError, FactError
from engram.evaluate.probes import Probe
from engram.facts import Fact
from tests.helpers.build_samples import TEMPLATES, built, texts

FACT = Fact("Etna", "{} is in", "Rome", "Oslo", relation="city")


def of(*records: Record) -> Dataset:
    return Dataset("some", "counterfact", records)


def same_references(one, other) -> bool:
    snippets = {key: tuple(each) for key, each in one.snippets.items()}
    return (
        snippets == {key: tuple(each) for key, each in other.snippets.items()}
        and one.tfidf.vocabulary == other.tfidf.vocabulary
        and np.array_equal(one.tfidf.idf, other.tfidf.idf)
    )


def test_built_records_and_their_texts_are_read_back_equal(tmp_path):
    dataset = built(
        texts={**texts(), "city:Lima": [Snippet("Llama", "About a town that no record asks for.")]}
    )
    path = write_dataset(dataset, tmp_path / "own.json")
    back = read_dataset(path, references=True)
    assert back.records == dataset.records
    assert back.digest == dataset.digest
    assert same_references(back.references, dataset.references)


def test_the_bundled_benchmark_is_read_back_equal(tmp_path):
    dataset = replace(pocket_benchmark(), records=pocket_benchmark().records[:300])
    back = read_dataset(write_dataset(dataset, tmp_path / "pocket.json"), references=True)
    assert back.records == dataset.records
    assert same_references(
        back.references, replace(dataset.references, snippets=back.references.snippets)
    )


def test_the_file_has_the_published_fields(tmp_path):
    path = write_dataset(built(texts=texts()), tmp_path / "own.json")
    for case in json.loads(path.read_text(encoding="utf8")):
        rewrite = case["requested_rewrite"]
        assert rewrite["prompt"].count("{}") == 1
        assert rewrite["target_new"]["str"] != rewrite["target_true"]["str"]
        assert rewrite["target_new"]["id"] == rewrite["target_new"]["str"]
        assert case.keys() == {
            "case_id",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "attribute_prompts",
            "generation_prompts",
        }
    for entry in json.loads((tmp_path / "attribute_snippets.json").read_text(encoding="utf8")):
        assert entry.keys() == {"relation_id", "target_id", "samples"}
        assert entry["relation_id"] in TEMPLATES


def test_numbered_cases_stay_numbers(tmp_path):
    records = [Record.from_fact(name, FACT) for name in ("12", "007", "a")]
    path = write_dataset(of(*records), tmp_path / "some.json")
    assert [case["case_id"] for case in json.loads(path.read_text())] == [12, "007", "a"]
    assert list(read_dataset(path).records) == records


def test_a_relation_with_a_colon_keeps_its_name_and_texts(tmp_path):
    facts = [Association(f"tower {n}", "wdt:P131", "Rome" if n % 2 else "Oslo") for n in range(6)]
    told = {f"wdt:P131:{city}": [Snippet("x", f"Of {city}.")] for city in ("Rome", "Oslo")}
    dataset = build_counterfact(facts, {"wdt:P131": ["{} is in", "{} stands in"]}, texts=told)
    back = read_dataset(write_dataset(dataset, tmp_path / "own.json"), references=True)
    assert back.records == dataset.records
    assert back.references.snippets == {key: tuple(each) for key, each in told.items()}


def test_what_a_fact_says_beside_its_probes_is_not_lost_but_in_them(tmp_path):
    fact = replace(FACT, paraphrases=("Where is Etna? In",), neighbours=(("Fram is in", "Oslo"),))
    (back,) = read_dataset(
        write_dataset(of(Record.from_fact("0", fact)), tmp_path / "some.json")
    ).records
    assert back == Record("0", (FACT,), Record.from_fact("0", fact).probes)


@pytest.mark.parametrize(
    "record",
    [
        Record.from_fact("0", replace(FACT, target_true=None)),
        Record("0", (FACT, replace(FACT, subject="Fram")), Record.from_fact("0", FACT).probes),
        Record.from_fact("0", replace(FACT, neighbours=(("The Thames is in", "London"),))),
        Record.from_fact(
            "0", FACT, probes=(Probe("paraphrase", "Etna: in", "Rome", "Oslo", aliases=("Roma",)),)
        ),
        Record(
            "0",
            (FACT,),
            (Probe("paraphrase", "Etna: in", "Rome", "Oslo"), *Record.from_fact("0", FACT).probes),
        ),
        Record("0", (FACT,), (Probe("paraphrase", "Etna: in", "Rome", "Oslo"),)),
        Record.from_fact("0", FACT, references="country:Rome"),
    ],
    ids=[
        "no true object",
        "two facts",
        "a neighbour with an object of its own",
        "aliases",
        "another order",
        "no rewrite",
        "texts of another relation",
    ],
)
def test_a_record_that_the_form_cannot_hold_is_an_error_and_writes_nothing(tmp_path, record):
    with pytest.raises(
        FactError, match="record '0' is not in CounterFact's form: expected one fact"
    ):
        write_dataset(of(record), tmp_path / "some.json")
    assert list(tmp_path.iterdir()) == []


def test_braces_and_letters_of_any_script_are_read_back_equal(tmp_path):
    record = Record.from_fact("0", replace(FACT, subject='a {} "b"\n東京 é'))
    assert read_dataset(write_dataset(of(record), tmp_path / "some.json")).records == (record,)


def test_records_of_another_benchmark_are_an_error(tmp_path):
    with pytest.raises(FactError, match="not in CounterFact's form"):
        write_dataset(with_statement(built()), tmp_path / "plus.json")


def test_a_second_data_set_does_not_take_the_first_ones_texts(tmp_path):
    path = write_dataset(built(texts=texts()), tmp_path / "one.json")
    with pytest.raises(
        FactError, match=r"holds the texts of another data set .* a folder of its own for two\.json"
    ):
        write_dataset(built(texts=texts(), seed=1), tmp_path / "two.json")
    assert read_dataset(path, references=True).records == built(texts=texts()).records
    write_dataset(built(texts=texts(), seed=1), path)
    assert read_dataset(path, references=True).records == built(texts=texts(), seed=1).records


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(EngramFileError, match=r"could not write .*choose a folder that exists"):
        write_dataset(built(), tmp_path / "nowhere" / "own.json")
