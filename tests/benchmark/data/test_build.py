"""Anybody's facts become a CounterFact: every draw is what Appendix D of the paper says, and no
trap of the facts goes unseen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from engram.benchmark.data.build import (
    Association,
    Sizes,
    build_counterfact,
    read_associations,
    read_lines,
    read_snippets,
)
from engram.benchmark.data.records import Record, Snippet
from engram.benchmark.data.tfidf import TfIdf
from engram.errors import FactError, SettingError
from tests.helpers.build_samples import CITIES, GENERATION, METALS, TEMPLATES, built, facts, texts


def prompts(record: Record, kind) -> list[str]:
    return [record.probes[i].prompt for i in record.of(kind)]


def subject_of(prompt: str, relation: str) -> str:
    """Of a filled template."""
    for template in TEMPLATES[relation]:
        head, tail = template.split("{}")
        if prompt.startswith(head) and prompt.endswith(tail):
            return prompt[len(head) : len(prompt) - len(tail)]
    raise AssertionError(f"{prompt!r} is no filled template of {relation}")


def true_objects(subject: str, relation: str, given: list[Association] | None = None) -> set[str]:
    return {
        fact.object
        for fact in given or facts()
        if (fact.subject, fact.relation) == (subject, relation)
    }


# -- what a record asks ----------------------------------------------------------------------------


def test_every_fact_becomes_a_record_with_its_own_subject_and_objects():
    dataset = built()
    edited = {
        (r.facts[0].subject, r.facts[0].relation, r.facts[0].target_true) for r in dataset.records
    }
    assert edited == set(map(tuple, facts()))
    assert dataset.form == "counterfact"
    assert dataset.skipped == ()


def test_the_new_object_is_one_of_the_relation_and_never_true():
    for record in built().records:
        fact = record.facts[0]
        assert fact.target in (CITIES if fact.relation == "city" else METALS)
        assert fact.target not in true_objects(fact.subject, fact.relation)


def test_the_new_object_is_drawn_by_how_many_facts_have_it():
    """For a fact with Oslo, Rome has six facts to three of Paris; four standard deviations: 1 seed
    in 15,000 would fail by chance.
    """
    drawn = Counter()
    for seed in range(2000):
        for fact in built(seed=seed, limit=1).records[0].facts:
            if fact.relation == "city" and fact.target_true == "Oslo":
                drawn[fact.target] += 1
    total = sum(drawn.values())
    assert set(drawn) == {"Rome", "Paris"}
    assert total > 100
    assert abs(drawn["Rome"] / total - 6 / 9) < 4 * (2 / 9 / total) ** 0.5


def test_the_rewrite_is_a_filled_template_and_paraphrases_are_others():
    for record in built().records:
        fact = record.facts[0]
        assert fact.prompt in TEMPLATES[fact.relation]
        assert prompts(record, "rewrite") == [fact.prompt_text]
        around = prompts(record, "paraphrase")
        assert len(set(around)) == 2
        assert fact.prompt_text not in around
        assert {subject_of(text, fact.relation) for text in around} == {fact.subject}
        asked = [record.probes[i] for kind in ("rewrite", "paraphrase") for i in record.of(kind)]
        assert {(probe.wanted, probe.unwanted) for probe in asked} == {
            (fact.target, fact.target_true)
        }


def test_openings_stand_in_front_of_paraphrases_and_nowhere_else():
    openings = ["It rained.", "Nobody came."]
    for record in built(openings=openings).records:
        for probe in record.probes:
            assert probe.prompt.startswith(tuple(openings)) == (probe.kind == "paraphrase")


def test_held_out_templates_are_the_paraphrases_and_never_the_prompt():
    apart = {"city": TEMPLATES["city"][:2], "metal": TEMPLATES["metal"][:1]}
    for record in built(held_out=lambda fact: apart[fact.relation]).records:
        fact = record.facts[0]
        wanted = [template.replace("{}", fact.subject) for template in apart[fact.relation]]
        assert sorted(prompts(record, "paraphrase")) == sorted(wanted)
        assert fact.prompt not in apart[fact.relation]


def test_neighbours_are_other_subjects_with_the_true_object_and_keep_it():
    for record in built().records:
        fact = record.facts[0]
        places = record.of("neighbourhood")
        names = [subject_of(record.probes[i].prompt, fact.relation) for i in places]
        others = {
            f.subject
            for f in facts()
            if (f.relation, f.object) == (fact.relation, fact.target_true)
        }
        assert sorted(names) == sorted(others - {fact.subject})
        assert all(
            (record.probes[i].wanted, record.probes[i].unwanted) == (fact.target_true, fact.target)
            for i in places
        )


def test_attribute_prompts_ask_about_subjects_with_the_new_object():
    for record in built().records:
        fact = record.facts[0]
        names = [subject_of(text, fact.relation) for text in prompts(record, "attribute")]
        assert names
        assert len(set(names)) == len(names)
        assert all(true_objects(name, fact.relation) == {fact.target} for name in names)


def test_generation_prompts_are_drawn_with_repetition_where_a_relation_has_some():
    for record in built().records:
        fact = record.facts[0]
        if fact.relation == "metal":
            assert record.generation == ()
        else:
            assert len(record.generation) == 10
            assert set(record.generation) <= {
                text.replace("{}", fact.subject) for text in GENERATION["city"]
            }


def test_sizes_bound_how_many_prompts_there_are():
    for record in built(
        sizes=Sizes(paraphrases=1, neighbours=1, attributes=0, generations=3)
    ).records:
        kinds = Counter(probe.kind for probe in record.probes)
        assert kinds == {"rewrite": 1, "paraphrase": 1, "neighbourhood": 1}
        assert len(record.generation) in (0, 3)


def test_references_tell_of_entities_with_the_new_object():
    dataset = built(texts=texts())
    assert dataset.references is not None
    for record in dataset.records:
        fact = record.facts[0]
        assert record.references == f"{fact.relation}:{fact.target}"
        told = dataset.references.snippets[record.references]
        assert {snippet.name for snippet in told} == {
            f.subject for f in facts() if f.object == fact.target
        }
    fitted = TfIdf.fit(snippet.text for each in texts().values() for snippet in each)
    assert dataset.references.tfidf.vocabulary == fitted.vocabulary
    assert (dataset.references.tfidf.idf == fitted.idf).all()


def test_an_object_without_texts_has_no_references():
    some = {"city:Rome": texts()["city:Rome"]}
    for record in built(texts=some).records:
        assert record.references == ("city:Rome" if record.facts[0].target == "Rome" else None)


# -- draws -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_records_and_another_one_others():
    assert built(seed=3).records == built(seed=3).records
    assert built(seed=3).digest != built(seed=4).digest


def test_a_record_does_not_depend_on_how_many_are_built():
    whole = built().records
    for limit in range(1, len(whole) + 1):
        assert built(limit=limit).records == whole[:limit]


def test_a_record_does_not_depend_on_facts_of_other_relations():
    alone = {
        record.id: record
        for record in built([fact for fact in facts() if fact.relation == "city"]).records
    }
    assert alone
    assert alone == {
        record.id: record for record in built().records if record.facts[0].relation == "city"
    }


def test_relations_are_mixed():
    orders = {
        tuple(record.facts[0].relation for record in built(seed=seed).records) for seed in range(5)
    }
    assert len(orders) > 1
    assert all(order != tuple(sorted(order)) for order in orders)


# -- traps -----------------------------------------------------------------------------------------


def test_a_fact_that_stands_there_twice_counts_once():
    assert built([*facts(), *facts()]).records == built().records


@pytest.mark.parametrize(
    ("subject", "true"),
    [("Bank of Rome", "Rome"), ("york", "New York"), ("Rome", "ROME")],
    ids=["object in subject", "subject in object", "but for capitals"],
)
def test_a_fact_whose_names_hold_each_other_is_left_out_and_reported(subject, true):
    trap = Association(subject, "city", true)
    dataset = built([*facts(), trap])
    assert trap not in {
        (r.facts[0].subject, r.facts[0].relation, r.facts[0].target_true) for r in dataset.records
    }
    assert dataset.skipped == (
        f"{subject!r} (city, {true!r}): its object and its subject have words in common, so that "
        f"one gives the other away",
    )


def test_a_part_of_a_word_is_no_word_in_common():
    dataset = built([*facts(), Association("Romeo's house", "city", "Oslo")])
    assert dataset.skipped == ()


def test_a_new_object_never_stands_in_the_subject_or_in_one_of_its_true_objects():
    traps = [
        Association("Rome of the north", "city", "Oslo"),
        Association("Seine", "city", "Greater Paris"),
    ]
    traps += [Association("Seine", "city", "Oslo"), Association("bridge", "city", "Greater Paris")]
    for seed in range(40):
        for record in built([*facts(), *traps], seed=seed).records:
            fact = record.facts[0]
            if fact.subject == "Rome of the north":
                assert fact.target != "Rome"
            if fact.subject == "Seine":
                assert fact.target == "Rome"


def test_of_several_true_objects_none_is_the_new_one_and_each_has_its_record():
    both = [Association("Line 1", "city", "Rome"), Association("Line 1", "city", "Paris")]
    for seed in range(20):
        found = [
            r.facts[0]
            for r in built([*facts(), *both], seed=seed).records
            if r.facts[0].subject == "Line 1"
        ]
        assert sorted((fact.target_true, fact.target) for fact in found) == [
            ("Paris", "Oslo"),
            ("Rome", "Oslo"),
        ]


def test_a_subject_of_which_the_new_object_is_true_as_well_is_no_neighbour():
    both = [Association("Line 1", "city", "Rome"), Association("Line 1", "city", "Paris")]
    seen = Counter()
    for record in built([*facts(), *both]).records:
        fact = record.facts[0]
        if fact.relation == "city" and fact.subject != "Line 1":
            names = [subject_of(text, "city") for text in prompts(record, "neighbourhood")]
            beside = "Line 1" in names
            seen[fact.target_true, fact.target, beside] += 1
            assert beside == (
                fact.target_true != "Oslo" and {fact.target_true, fact.target} != {"Rome", "Paris"}
            )
    assert any(not beside for true, _, beside in seen if true == "Rome")


def test_a_relation_with_a_single_object_is_left_out_and_reported():
    alone = [Association(f"cup {n}", "metal2", "tin") for n in range(3)]
    dataset = built([*facts(), *alone], {**TEMPLATES, "metal2": ["{} is of", "They made {} of"]})
    assert len(dataset.records) == len(facts())
    assert sorted(dataset.skipped) == [
        f"'cup {n}' (metal2, 'tin'): its relation has no other object to choose" for n in range(3)
    ]


def test_a_fact_without_neighbours_is_left_out_and_reported_unless_none_are_wanted():
    lonely = Association("Harbour", "city", "Hamburg")
    assert built([*facts(), lonely]).skipped == (
        "'Harbour' (city, 'Hamburg'): no other subject has its object, so there is no neighbour",
    )
    assert built([*facts(), lonely], sizes=Sizes(neighbours=0)).skipped == ()


def test_a_fact_all_of_whose_templates_are_held_out_is_left_out_and_reported():
    dataset = built(held_out=lambda fact: TEMPLATES["metal"] if fact.relation == "metal" else ())
    assert {record.facts[0].relation for record in dataset.records} == {"city"}
    assert all("none is left for the prompt" in reason for reason in dataset.skipped)
    assert len(dataset.skipped) == sum(METALS.values())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("no place", r"template 'no place' of 'city': expected exactly one \{\}"),
        ("{} and {} are in", "expected exactly one"),
        ("{} is in ", "ends with a space"),
    ],
)
@pytest.mark.parametrize("which", ["templates", "generation"])
def test_a_template_that_cannot_be_filled_is_an_error(which, template, said):
    wrong = {"city": [*TEMPLATES["city"], template]}
    with pytest.raises(FactError, match=said):
        build_counterfact(
            facts(), {**TEMPLATES, **(wrong if which == "templates" else {})}, generation=wrong
        )


@pytest.mark.parametrize(
    ("templates", "number"), [((), 0), (("{} is of",), 1), (("{} is of", "{} is of"), 1)]
)
def test_a_relation_needs_two_different_templates(templates, number):
    with pytest.raises(
        FactError, match=f"relation 'metal' has {number} different templates; expected two or more"
    ):
        built(templates={**TEMPLATES, "metal": list(templates)})


def test_no_record_at_all_is_an_error_that_gives_the_reasons():
    with pytest.raises(FactError, match=r"no record could be built of 1 facts; .*no other object"):
        built([Association("Eiffel", "city", "Paris")])


@pytest.mark.parametrize(
    "fact", [("", "city", "Rome"), ("tower", " ", "Rome"), ("tower", "city", "\n")]
)
def test_a_fact_with_an_empty_part_is_an_error(fact):
    with pytest.raises(FactError, match="expected words for each of subject, relation and object"):
        built([*facts(), Association(*fact)])


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_an_error(limit):
    with pytest.raises(SettingError, match=f"limit={limit}: expected at least 1"):
        built(limit=limit)


def test_a_negative_size_is_an_error():
    with pytest.raises(SettingError, match="neighbours=-1: expected at least 0"):
        replace(Sizes(), neighbours=-1)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "f.jsonl",
            '{"subject": " Etna ", "relation": "city", "object": "Rome"}\n{"subject": "é", '
            '"relation": "r", "object": "o"}\n',
        ),
        (
            "f.json",
            '[{"subject": "Etna", "relation": "city", "object": "Rome"},\n {"subject": "é", '
            '"relation": "r", "object": "o"}]',
        ),
        ("f.csv", "subject,relation,object\nEtna,city,Rome\né,r,o\n"),
    ],
)
def test_facts_are_read_from_json_lines_json_and_csv(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf8")
    assert read_associations(tmp_path / name) == [("Etna", "city", "Rome"), ("é", "r", "o")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "f.jsonl",
            '{"subject": "a", "relation": "r", "object": "o"}\n{"subject": 3, "relation": "r", '
            '"object": "o"}',
            r"f\.jsonl, line 2: field 'subject' is 3; expected text",
        ),
        (
            "f.csv",
            "subject,relation,object\na,b,c\nd,e\n",
            r"f\.csv, line 3: field 'object' is null",
        ),
        ("f.json", "[]", "holds no facts"),
        ("f.jsonl", "{", r"f\.jsonl, line 1: no JSON"),
    ],
)
def test_a_mistake_in_a_file_of_facts_is_told_with_line_and_field(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, encoding="utf8")
    with pytest.raises(FactError, match=said):
        read_associations(tmp_path / name)


def test_texts_are_read_by_relation_and_object(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"city:Rome": [{"name": "Etna", "text": "Etna smokes."}]}', encoding="utf8")
    assert read_snippets(path) == {"city:Rome": [Snippet("Etna", "Etna smokes.")]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected an object"),
        ("{", "is no JSON"),
        ('{"a:b": [{"name": "n"}]}', r"field 'a:b\[0\]\.text' is null"),
    ],
)
def test_a_mistake_in_a_file_of_texts_is_told(tmp_path, text, said):
    path = tmp_path / "t.json"
    path.write_text(text, encoding="utf8")
    with pytest.raises(FactError, match=said):
        read_snippets(path)


@pytest.mark.parametrize("read", [read_associations, read_snippets, read_lines])
def test_a_file_that_is_not_there_is_an_error(tmp_path, read):
    with pytest.raises(FactError, match=r"nowhere\.json' could not be read"):
        read(tmp_path / "nowhere.json")


def test_empty_lines_are_no_openings(tmp_path):
    (tmp_path / "o.txt").write_text("One.\n\n  Two. \n", encoding="utf8")
    assert read_lines(tmp_path / "o.txt") == ["One.", "Two."]
