"""Every published form gives records that say what is edited and what is asked; what is malformed
is told with file, line and field.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram import Fact, Probe, Record, read_dataset, read_facts
from engram.benchmark.data.counterfact import with_statement
from engram.benchmark.data.records import Snippet
from engram.benchmark.data.write import write_dataset
from engram.benchmark.metrics.table import METRICS
from engram.errors import FactError, SettingError
from tests.helpers.data_samples import FACT, SAMPLES, ZSRE, sample, write
from tests.helpers.paths import SHARED

OPTIONAL = SHARED / "data"
optional = pytest.mark.skipif(
    not OPTIONAL.is_dir(), reason="the published data sets (shared/data) are not here"
)
FORMS = {
    "known": "counterfact",
    "facts": "counterfact",
}  # of the samples; the others are named after theirs


def only(path: Path, **how: Any) -> Record:
    (record,) = read_dataset(path, **how).records
    return record


@pytest.fixture
def one(tmp_path):
    """Return the record of a file with one of a form, with other values of some fields."""

    def read(form: str, **changes: Any) -> Record:
        return only(write(tmp_path / "one.json", [sample(form, **changes)]))

    return read


# -- what each form becomes ------------------------------------------------------------------------


def test_counterfact_asks_for_the_new_object_and_of_neighbours_for_the_true_one(one):
    new, true = "Peru", "Switzerland"
    assert one("counterfact") == Record(
        "7",
        (Fact("Matterhorn", "The {} lies in", new, true, relation="P17"),),
        (
            Probe("rewrite", "The Matterhorn lies in", new, true),
            Probe("paraphrase", "It rained. Matterhorn is a mountain of", new, true),
            Probe("paraphrase", "Where is the Matterhorn? It is in", new, true),
            Probe("neighbourhood", "The Eiger lies in", true, new),
            Probe("neighbourhood", "The Jungfrau is in", true, new),
            Probe("attribute", "Huascarán lies in", new, true),
        ),
        ("Matterhorn is known for", "Matterhorn is known for"),
        "P17:Q419",
    )


def test_a_rebuilt_counterfact_without_attribute_prompts_and_ids_is_read_too(one):
    bare = one(
        "counterfact",
        attribute_prompts=...,
        generation_prompts=...,
        case_id=...,
        **{
            "requested_rewrite.target_new": {"str": "Peru"},
            "requested_rewrite.target_true": {"str": "Switzerland"},
        },
    )
    assert (bare.id, bare.generation, bare.references) == ("0", (), None)
    assert [probe.kind for probe in bare.probes] == [
        "rewrite",
        *["paraphrase"] * 2,
        *["neighbourhood"] * 2,
    ]


def test_the_flattened_form_has_no_paraphrases_and_no_neighbours(one, tmp_path):
    record = one("flat")
    assert record.facts == (Fact("Matterhorn", "The {} lies in", "Peru", "Switzerland"),)
    assert record.probes == (
        Probe("rewrite", "The Matterhorn lies in", "Peru", "Switzerland"),
        Probe("rephrase", "Matterhorn is known for", "Peru", "Switzerland"),
        Probe("locality", "The Eiger lies in", "Switzerland", "Peru"),
    )
    form = read_dataset(tmp_path / "one.json").form
    assert form == "flat"
    reported = {metric.title for metric in METRICS.values() if form in metric.forms}
    assert reported and not reported & {"ES", "PS", "NS", "PM", "NM", "S"}


def test_the_flattened_form_may_lack_the_unrelated_prompt_and_its_answer_may_be_the_new_object(one):
    assert [
        probe.kind for probe in one("flat", locality_prompt=..., locality_ground_truth=...).probes
    ] == ["rewrite", "rephrase"]
    assert one("flat", locality_ground_truth=" Peru").probes[2] == Probe(
        "locality", "The Eiger lies in", " Peru"
    )


def test_zsre_edits_to_the_true_answer_and_asks_the_unrelated_question_literally(one):
    assert one("zsre") == Record(
        "0",
        (Fact("Emmy Noether", "What was the field of {}?", "mathematics"),),
        (
            Probe(
                "rewrite",
                "What was the field of Emmy Noether?",
                "mathematics",
                aliases=("algebra",),
            ),
            Probe(
                "paraphrase",
                "In which field did Emmy Noether work?",
                "mathematics",
                aliases=("algebra",),
            ),
            Probe("neighbourhood", "nq question: who wrote {0} and {x}?", "nobody"),
        ),
    )


def test_a_known_fact_is_a_rewrite_prompt_alone(one):
    assert one("known") == Record.from_fact(
        "0", Fact("Matterhorn", "The {} lies in", "Switzerland", relation="P17")
    )


@pytest.mark.parametrize("name", ["facts.json", "facts.jsonl", "facts.json.gz", "facts.jsonl.gz"])
def test_facts_have_their_paraphrases_and_neighbours_asked(tmp_path, name):
    record = only(write(tmp_path / name, [FACT]))
    assert record.facts == (Fact.from_dict(FACT),)
    assert [
        (probe.kind, probe.prompt, probe.wanted, probe.unwanted) for probe in record.probes
    ] == [
        ("rewrite", "The Matterhorn lies in", "Peru", "Switzerland"),
        ("paraphrase", "The Matterhorn is in", "Peru", "Switzerland"),
        ("neighbourhood", "The Eiger lies in", "Switzerland", "Peru"),
    ]


@pytest.mark.parametrize("name", ["facts.csv", "facts.CSV.gz"])
def test_a_table_of_facts_is_a_data_set_too(tmp_path, name):
    text = (
        b'subject,prompt,target,target_true,paraphrases\nOslo,"{}, a city, is in",Peru,Norway,a | '
        b"b\nRome,{} is in,Peru,,\n"
    )
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    (tmp_path / "plain.csv").write_bytes(text)
    records = read_dataset(tmp_path / name).records
    assert [record.facts[0] for record in records] == read_facts(tmp_path / "plain.csv")
    assert [record.id for record in records] == ["0", "1"]


def test_mquake_edits_several_facts_at_once_and_asks_over_several_hops(one):
    record = one("mquake")
    assert record.id == "3"
    assert record.facts == (
        Fact("Emma", "{} was written by", "Emmy Noether", "Jane Austen", relation="P50"),
        Fact("Emmy Noether", "{} worked in the field of", "law", "mathematics", relation="P101"),
    )
    questions = SAMPLES["mquake"]["questions"]
    assert record.probes == (
        Probe("rewrite", "Emma was written by", "Emmy Noether", "Jane Austen"),
        Probe("rewrite", "Emmy Noether worked in the field of", "law", "mathematics"),
        *(Probe("multi-hop", text, "law", "literature", ("jurisprudence",)) for text in questions),
        Probe("single-hop", "Emma was written by", "Emmy Noether", aliases=("Noether",)),
        Probe("single-hop", "What did Emmy Noether work on?", "law"),
    )


def test_mquake_questions_whose_answer_stays_are_not_compared(one):
    assert {
        probe.unwanted for probe in one("mquake", answer=" law").probes if probe.kind == "multi-hop"
    } == {None}


def test_ripple_edits_has_six_kinds_of_tests_with_conditions(one):
    record = one("ripple")
    assert record.facts == (Fact("Leo", "The name of the mother of {} is", "Ann", "Ida"),)
    sister, father = "The name of the sister of Leo is", "The father of Leo is"

    def asked(
        kind: str, name: str, *prompts: str, joined: str = "any", conditions: int = 1
    ) -> list[Probe]:
        how = {"wanted": "Eva", "aliases": ("Eve",), "test": f"{name} 0", "joined": joined}
        conditional = [Probe(kind, father, condition=True, **how)] * conditions
        return [*(Probe(kind, prompt, **how) for prompt in prompts), *conditional]

    assert list(record.probes) == [
        Probe("rewrite", "The name of the mother of Leo is", "Ann", "Ida"),
        *asked("logical-generalisation", "Logical_Generalization", sister, sister, joined="all"),
        *asked(
            "compositionality-1", "Compositionality_I", sister
        ),  # a query without an answer is left out
        *asked("compositionality-2", "Compositionality_II", sister),
        *asked("preservation", "Forgetfulness", sister, conditions=0),
        *asked("relation-specificity", "Relation_Specificity", sister),
    ]


def test_ripple_edits_of_new_facts_have_no_object_before(one):
    bare = {
        key: value for key, value in SAMPLES["ripple"]["edit"].items() if key != "original_fact"
    }
    assert one("ripple", edit=bare).facts[0].target_true is None


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SAMPLES)
def test_a_form_is_found_from_the_first_record_in_every_kind_of_file(tmp_path, form):
    names = ("a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz")
    read = [read_dataset(write(tmp_path / name, [SAMPLES[form]])) for name in names]
    assert {dataset.form for dataset in read} == {FORMS.get(form, form)}
    assert {dataset.name for dataset in read} == {"a"}
    assert len({dataset.digest for dataset in read}) == 1


def test_gzip_is_recognised_by_content_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps([ZSRE]).encode()))
    assert read_dataset(tmp_path / "a.json").form == "zsre"


def test_a_form_that_is_given_is_not_guessed(tmp_path):
    path = write(tmp_path / "a.json", [ZSRE])
    with pytest.raises(
        FactError, match=r"a\.json, line 2: field 'requested_rewrite' is null; expected an object"
    ):
        read_dataset(path, form="counterfact")
    with pytest.raises(
        SettingError,
        match="form='zsRE': expected 'counterfact', 'flat', 'zsre', 'mquake' or 'ripple'",
    ):
        read_dataset(path, form="zsRE")


def test_limit_is_the_first_records_and_what_is_behind_them_is_not_looked_at(tmp_path):
    path = write(tmp_path / "a.json", [sample("zsre", answers=[text]) for text in "abc"] + [5])
    assert [record.facts[0].target for record in read_dataset(path, limit=2).records] == ["a", "b"]
    with pytest.raises(SettingError, match="limit=0: expected at least 1"):
        read_dataset(path, limit=0)
    facts = write(tmp_path / "b.json", [sample("facts", target=text) for text in "ab"] + [5])
    assert len(read_dataset(facts, limit=2).records) == 2


def test_pocket_needs_no_file_and_has_its_reference_texts():
    dataset = read_dataset("pocket", limit=2)
    assert (
        len(dataset.records) == 2
        and dataset.form == "counterfact"
        and dataset.references is not None
    )


def test_what_is_written_is_read_back(tmp_path):
    dataset = read_dataset(
        write(tmp_path / "a.json", [sample("counterfact", case_id=str(each)) for each in range(3)])
    )
    again = read_dataset(write_dataset(dataset, tmp_path / "b.json"))
    assert again.records == dataset.records and again.digest == dataset.digest


def test_the_flattened_form_is_not_written_as_counterfact(tmp_path):
    dataset = read_dataset(write(tmp_path / "a.json", [SAMPLES["flat"]]))
    with pytest.raises(FactError, match="record '0' is not in CounterFact's form"):
        write_dataset(dataset, tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


# -- CounterFact+ ----------------------------------------------------------------------------------


def test_counterfact_plus_states_the_edit_in_front_of_every_neighbour(tmp_path):
    plain = read_dataset(write(tmp_path / "a.json", [SAMPLES["counterfact"]]))
    grown = with_statement(plain)
    assert (grown.name, grown.form) == ("a+", "counterfact")
    (before,), (after,) = plain.records, grown.records
    assert after.probes[: len(before.probes)] == before.probes
    assert after.probes[len(before.probes) :] == (
        Probe(
            "neighbourhood+",
            "The Matterhorn lies in Peru. The Eiger lies in",
            "Switzerland",
            "Peru",
        ),
        Probe(
            "neighbourhood+",
            "The Matterhorn lies in Peru. The Jungfrau is in",
            "Switzerland",
            "Peru",
        ),
    )
    assert (after.facts, after.generation, after.references) == (
        before.facts,
        before.generation,
        before.references,
    )


# -- texts that generated ones are compared with ---------------------------------------------------

SNIPPETS = [
    {
        "relation_id": "P17",
        "target_id": "Q419",
        "samples": [{"name": "Lima", "text": "Lima is a city of Peru", "x": 1}],
    },
    {
        "relation_id": "P17",
        "target_id": "Q1",
        "samples": [{"name": "Other", "text": "nobody asks for this"}],
    },
    {
        "relation_id": "P17",
        "target_id": "Q419",
        "samples": [{"text": "Cusco is in Peru"}, {"name": "Empty", "text": " "}],
    },
]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a.json", [SAMPLES["counterfact"]])
    (tmp_path / "attribute_snippets.json").write_text(json.dumps(SNIPPETS), encoding="utf8")
    return tmp_path


def test_reference_texts_of_repeated_entries_stand_behind_each_other(folder):
    references = read_dataset(folder / "a.json", references=True).references
    assert references is not None
    assert references.snippets == {
        "P17:Q419": (Snippet("Lima", "Lima is a city of Peru"), Snippet(" ", "Cusco is in Peru"))
    }


def test_reference_texts_are_read_only_if_asked_for(folder):
    (folder / "attribute_snippets.json").write_text("broken", encoding="utf8")
    assert read_dataset(folder / "a.json").references is None


def test_published_weights_are_used_and_where_there_are_none_they_are_fitted_on_all_texts(folder):
    fitted = read_dataset(folder / "a.json", references=True).references.tfidf
    assert fitted.idf[fitted.vocabulary["nobody"]] == pytest.approx(np.log(4 / 2) + 1)
    assert fitted.idf[fitted.vocabulary["peru"]] == pytest.approx(np.log(4 / 3) + 1)
    np.save(folder / "idf.npy", np.array([2.0, 3.0]))
    (folder / "tfidf_vocab.json").write_text('{"peru": 1, "lima": 0}', encoding="utf8")
    published = read_dataset(folder / "a.json", references=True).references.tfidf
    assert published.vocabulary == {"peru": 1, "lima": 0} and published.idf.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "attribute_snippets.json could not be read"),
        (
            "{}",
            "attribute_snippets.json is no JSON list; expected objects with relation_id, "
            "target_id and samples",
        ),
        ("[7]", "attribute_snippets.json, element 0: field 'relation_id' is 7; expected text"),
        (
            '[{"relation_id": "P", "target_id": "Q"}]',
            "element 0: field 'samples' is null; expected a list of objects",
        ),
        (
            '[{"relation_id": "P", "target_id": "Q", "samples": [3]}]',
            r"element 0: field 'samples\[0\]' is 3; expected an object",
        ),
    ],
)
def test_broken_reference_texts_are_told_with_their_place(folder, text, message):
    (folder / "attribute_snippets.json").write_text(text, encoding="utf8")
    with pytest.raises(FactError, match=message):
        read_dataset(folder / "a.json", references=True)


def test_reference_texts_that_are_not_there_are_named(folder):
    (folder / "attribute_snippets.json").unlink()
    with pytest.raises(
        FactError,
        match=r"attribute_snippets\.json could not be read.*expected the published JSON file",
    ):
        read_dataset(folder / "a.json", references=True)


@pytest.mark.parametrize(
    ("idf", "words", "message"),
    [
        (np.ones((2, 2)), '{"a": 0}', "tfidf_vocab.json does not fit"),
        (
            np.ones(2),
            '{"a": 2}',
            r"tfidf_vocab.json does not fit .*: expected word -> column of \(2,\) float64 weights",
        ),
        (np.ones(2), '{"a": -1}', "tfidf_vocab.json does not fit"),
        (np.ones(2), '["a"]', "tfidf_vocab.json does not fit"),
        (
            np.array([1.0, np.nan]),
            '{"a": 0}',
            r"tfidf_vocab.json does not fit .* float64 weights, each a number from 1 on",
        ),
        (np.array([0.0, 1.0]), '{"a": 0}', "tfidf_vocab.json does not fit"),
        (np.array(["x", "y"]), '{"a": 0}', "tfidf_vocab.json does not fit"),
        (np.array([1j]), '{"a": 0}', "tfidf_vocab.json does not fit"),
        (np.array([{}]), '{"a": 0}', "idf.npy is no numpy file"),
        (b"", '{"a": 0}', "idf.npy is no numpy file"),
        (b"PK\x03\x04 no zip", '{"a": 0}', "idf.npy is no numpy file"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': [[]]:1}", '{"a": 0}', "idf.npy is no numpy file"),
    ],
)
def test_broken_weights_are_named(folder, idf, words, message):
    if isinstance(idf, bytes):
        (folder / "idf.npy").write_bytes(idf)
    else:
        np.save(folder / "idf.npy", idf, allow_pickle=True)
    (folder / "tfidf_vocab.json").write_text(words, encoding="utf8")
    with pytest.raises(FactError, match=message):
        read_dataset(folder / "a.json", references=True)


# -- what is malformed -----------------------------------------------------------------------------


MALFORMED = [
    (
        "counterfact",
        {"requested_rewrite": ...},
        "field 'requested_rewrite' is null; expected an object",
    ),
    (
        "counterfact",
        {"requested_rewrite.subject": 5},
        "field 'requested_rewrite.subject' is 5; expected text with words in it",
    ),
    (
        "counterfact",
        {"requested_rewrite.subject": " "},
        "field 'requested_rewrite.subject' is \" \"; expected text with words",
    ),
    (
        "counterfact",
        {"requested_rewrite.subject": "\ud800"},
        r"field 'requested_rewrite.subject' is \"\\ud800\"; expected text",
    ),
    (
        "counterfact",
        {"requested_rewrite.prompt": "none"},
        "prompt='none' has 0 places for the subject",
    ),
    (
        "counterfact",
        {"requested_rewrite.target_new.str": ...},
        "field 'requested_rewrite.target_new.str' is null",
    ),
    (
        "counterfact",
        {"requested_rewrite.target_new": "Peru"},
        "field 'requested_rewrite.target_new' is \"Peru\"; expected an object",
    ),
    (
        "counterfact",
        {"requested_rewrite.target_new.str": "Switzerland "},
        "equals target_true: there is nothing to rewrite",
    ),
    (
        "counterfact",
        {"paraphrase_prompts": "text"},
        "field 'paraphrase_prompts' is \"text\"; expected a list of texts",
    ),
    (
        "counterfact",
        {"neighborhood_prompts": ["", "x"]},
        "field 'neighborhood_prompts' is .*; expected a list of texts",
    ),
    (
        "counterfact",
        {"generation_prompts": [1]},
        r"field 'generation_prompts' is \[1\]; expected a list of texts",
    ),
    (
        "counterfact",
        {"case_id": True},
        "field 'case_id' is true; expected a number or a text that names the record",
    ),
    (
        "flat",
        {"prompt": "It lies in"},
        "field 'prompt' is \"It lies in\"; expected a text in which the subject 'Matterhorn' "
        "occurs",
    ),
    ("flat", {"rephrase_prompt": ...}, "field 'rephrase_prompt' is null; expected text"),
    (
        "flat",
        {"locality_ground_truth": ...},
        "field 'locality_ground_truth' is null; expected text",
    ),
    (
        "zsre",
        {"src": "Emmy Noether or Emmy Noether?"},
        "expected a question in which the subject 'Emmy Noether' occurs exactly once",
    ),
    (
        "zsre",
        {"src": "What was the field?"},
        "field 'src' is \"What was the field[?]\"; expected a question in which the subject",
    ),
    ("zsre", {"src": ...}, "field 'src' is null; expected text"),
    ("zsre", {"answers": []}, r"field 'answers' is \[\]; expected at least one answer"),
    (
        "zsre",
        {"loc": "who"},
        "field 'loc' is \"who\"; expected an unrelated question that begins with 'nq question: '",
    ),
    ("zsre", {"loc_ans": None}, "field 'loc_ans' is null; expected text"),
    ("known", {"template": 3}, "field 'template' is 3; expected text, as in a known-facts file"),
    (
        "known",
        {"prompt": "Lies in"},
        "field 'prompt' is 'Lies in'; expected it to begin with the filled template",
    ),
    ("facts", {"target": 7}, "field 'target' is 7; expected the object as text"),
    ("facts", {"objekt": "x"}, "field 'objekt' is not one of a fact"),
    ("facts", {"target": "\ud800"}, r"field 'target' is \"\\ud800\"; expected the object as text"),
    (
        "facts",
        {"neighbours": [["The Eiger lies in", "Peru"]]},
        "unwanted='Peru': expected words other than those of wanted='Peru'",
    ),
    ("mquake", {"requested_rewrite": []}, "record '3' has 0 facts"),
    (
        "mquake",
        {"requested_rewrite": {"a": 1}},
        "field 'requested_rewrite' is .*; expected a list of objects",
    ),
    (
        "mquake",
        {"requested_rewrite.1.subject": None},
        r"field 'requested_rewrite\[1\].subject' is null; expected text",
    ),
    ("mquake", {"questions": [[]]}, r"field 'questions' is \[\[\]\]; expected a list of texts"),
    (
        "mquake",
        {"new_single_hops": [{"cloze": "x"}]},
        r"field 'new_single_hops\[0\].answer' is null; expected text",
    ),
    (
        "ripple",
        {"edit.prompt": "Leo has a mother."},
        "field 'edit.prompt' is .*; expected a sentence like 'The mother of Leo is Ann.'",
    ),
    ("ripple", {"Forgetfulness": {}}, r"field 'Forgetfulness' is \{\}; expected a list of objects"),
    (
        "ripple",
        {"Forgetfulness.0.test_condition": "XOR"},
        r"'Forgetfulness\[0\].test_condition' is \"XOR\"; expected 'OR' or 'AND'",
    ),
    (
        "ripple",
        {"Forgetfulness.0.test_queries": [{"prompt": "x"}]},
        r"'Forgetfulness\[0\].test_queries\[0\].answers' is null",
    ),
]


@pytest.mark.parametrize(("form", "changes", "message"), MALFORMED)
def test_a_malformed_record_is_told_with_its_place(tmp_path, form, changes, message):
    records = [sample(form), sample(form, **changes)]
    if "case_id" in records[1] and "case_id" not in changes and form != "mquake":
        records[1]["case_id"] = 8
    for name in ("a.json", "a.jsonl"):
        line = 3 if name == "a.json" else 2  # the list's bracket has a line to itself
        with pytest.raises(FactError, match=rf"{name}, line {line}: .*{message}") as raised:
            read_dataset(write(tmp_path / name, records))
        str(raised.value).encode()  # it can be printed


@pytest.mark.parametrize(("form", "changes", "message"), MALFORMED)
def test_a_malformed_record_is_left_out_if_asked_for_and_told(tmp_path, form, changes, message):
    path = write(tmp_path / "a.jsonl", [sample(form, **changes), sample(form)])
    dataset = read_dataset(path, skip_malformed=True)
    assert (
        len(dataset.records) == 1
        and dataset.records[0].facts == only(write(tmp_path / "b.json", [SAMPLES[form]])).facts
    )
    (told,) = dataset.skipped
    assert told.startswith(f"{path}, line 1: ")


def test_a_record_that_is_no_object_is_told(tmp_path):
    path = write(tmp_path / "a.json", [ZSRE, [1]])
    with pytest.raises(
        FactError, match=r"a\.json, line 3: \[1\] is no object; expected a record of form 'zsre'"
    ):
        read_dataset(path)
    with pytest.raises(
        FactError,
        match=r"b\.json, line 2: \[1\] is no object; expected one with subject, prompt, target",
    ):
        read_dataset(write(tmp_path / "b.json", [[1]]))


def test_ids_stand_once(tmp_path):
    path = write(tmp_path / "a.json", [SAMPLES["counterfact"]] * 2)
    message = "a.json, line 3: id '7' is that of an earlier record; expected another for each"
    with pytest.raises(FactError, match=message):
        read_dataset(path)
    dataset = read_dataset(path, skip_malformed=True)
    assert len(dataset.records) == 1 and dataset.skipped[0].endswith(message)


def test_lines_that_are_no_json_are_left_out_if_asked_for_but_a_broken_list_cannot_be(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(ZSRE)}\n{{broken\n\n{json.dumps(ZSRE)}\n", encoding="utf8")
    with pytest.raises(FactError, match=r"a\.jsonl, line 2: no JSON, .* at column 2"):
        read_dataset(path)
    dataset = read_dataset(path, skip_malformed=True)
    assert len(dataset.records) == 2 and len(dataset.skipped) == 1
    path.write_text(f"[{json.dumps(ZSRE)},\n{{broken]", encoding="utf8")
    with pytest.raises(FactError, match=r"a\.jsonl, line 2: no JSON list"):
        read_dataset(path, skip_malformed=True)


def test_a_row_with_too_many_cells_is_left_out_if_asked_for(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        "subject,prompt,target\na,{} is,b\nOslo, city,{} is,Norway\nc,{} is,d\n", encoding="utf8"
    )
    dataset = read_dataset(path, skip_malformed=True)
    assert [record.facts[0].subject for record in dataset.records] == ["a", "c"]
    (told,) = dataset.skipped
    assert "line 3: 4 cells, expected 3" in told


def test_nothing_but_malformed_records_is_an_error_that_tells_the_first(tmp_path):
    path = write(tmp_path / "a.json", [sample("zsre", answers=[])] * 3)
    with pytest.raises(
        FactError, match=r"holds no records; 3 are malformed, the first: .*line 2: field 'answers'"
    ):
        read_dataset(path, skip_malformed=True)
    path.write_text("[]", encoding="utf8")
    with pytest.raises(FactError, match=r"a\.json holds no records$"):
        read_dataset(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\x00",
        b"\x1f\x8b",
        gzip.compress(b"[]" * 99, mtime=0)[:-9],
        b"\x1f\x8b\x08\x00damaged bytes",
    ],
)
def test_a_file_that_cannot_be_read_says_so(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(FactError, match=r"no data set could be read from '.*a\.json'"):
        read_dataset(tmp_path / "a.json")


def test_a_name_that_is_none_is_told_with_those_that_are():
    with pytest.raises(
        FactError,
        match=r"from 'zsree' \(did you mean 'zsre'\?\): .* Expected a file, or one of pocket, "
        r"counterfact",
    ):
        read_dataset("zsree")


# -- the files themselves, where they are ----------------------------------------------------------


@optional
def test_the_rebuilt_counterfact():
    dataset = read_dataset(OPTIONAL / "counterfact.jsonl.gz")
    assert (dataset.name, dataset.form, len(dataset.records), dataset.skipped) == (
        "counterfact",
        "counterfact",
        20_000,
        (),
    )
    assert {len(record.of("rewrite")) for record in dataset.records} == {1}
    assert all(record.of("neighbourhood") for record in dataset.records)


@optional
def test_a_thousand_records_of_zsre():
    dataset = read_dataset(OPTIONAL / "zsre_1k.jsonl.gz")
    assert (dataset.form, len(dataset.records)) == ("zsre", 1000)
    assert {len(record.probes) for record in dataset.records} == {3}


@optional
def test_the_published_known_facts():
    records = read_dataset(OPTIONAL / "known_1000.json").records
    assert [record.facts[0] for record in records] == read_facts(OPTIONAL / "known_1000.json")
    assert len(records) == 1209
