"""The bundled model and its facts: what is shipped keeps its promises."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from engram import pocket
from engram.errors import EngramError, FactError
from engram.facts import Fact

SEATTLE = "Space Needle"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pocket.PATH)


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pocket.PATH, dtype=torch.float32).eval()


def known(subject: str, relation: str) -> pocket.KnownFact:
    (fact,) = pocket.find(subject, relation)
    return fact


# --- the table ------------------------------------------------------------------------------------


def test_importing_pocket_imports_no_torch():
    code = "import sys, engram.pocket; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_template_has_one_place_for_the_subject_and_ends_before_the_object():
    for relation, templates in pocket.relations().items():
        for template in templates:
            assert template.count("{}") == 1, (relation, template)
            assert template == template.strip(), (relation, template)


def test_no_template_belongs_to_two_relations():
    templates = [template for each in pocket.relations().values() for template in each]
    assert len(templates) == len(set(templates))


def test_a_question_has_one_answer():
    questions = [(fact.subject, fact.relation) for fact in pocket.facts()]
    assert len(questions) == len(set(questions))


def test_no_subject_names_its_object():
    assert [f for f in pocket.facts() if f.object.lower() in f.subject.lower()] == []


def test_every_fact_has_trained_and_held_out_templates_and_none_is_both():
    for fact in pocket.facts():
        assert fact.trained()
        assert fact.paraphrases()
        assert not set(fact.trained()) & set(fact.paraphrases())
        assert sorted(fact.trained() + fact.paraphrases()) == sorted(fact.prompts())


def test_sentences_never_contain_a_held_out_template():
    said = set(pocket.sentences())
    for fact in pocket.facts():
        for template in fact.paraphrases():
            assert f"{template.replace('{}', fact.subject)} {fact.object}." not in said


def test_sentences_are_the_same_for_the_same_seed():
    assert list(pocket.sentences(3)) == list(pocket.sentences(3))
    assert list(pocket.sentences(3)) != list(pocket.sentences(4))


def test_every_fact_has_neighbours_with_its_object_and_other_subjects():
    for fact in pocket.facts():
        around = pocket.neighbours(fact, count=3)
        assert len(around) == 3
        assert all(
            (n.relation, n.object) == (fact.relation, fact.object) and n.subject != fact.subject
            for n in around
        )


def test_the_counterfactual_is_another_object_of_the_relation():
    fact = known(SEATTLE, "city")
    answer = pocket.counterfactual(fact, seed=1)
    assert answer != fact.object
    assert answer in {f.object for f in pocket.facts() if f.relation == "city"}
    assert answer == pocket.counterfactual(fact, seed=1)


def test_a_misspelt_relation_is_named():
    with pytest.raises(
        EngramError, match="relation 'town' is not in the pocket table; it has birth_country"
    ):
        pocket.find(SEATTLE, "town")


# --- edits from the table -------------------------------------------------------------------------


def test_as_fact_edits_a_trained_template_and_tests_held_out_ones():
    fact = known(SEATTLE, "city")
    edit = pocket.as_fact(fact, "Paris")
    assert edit.prompt in fact.trained()
    assert (edit.subject, edit.target, edit.target_true) == (SEATTLE, "Paris", "Seattle")
    asked = [template.replace("{}", SEATTLE) for template in fact.paraphrases()]
    assert len(edit.paraphrases) == len(asked)
    assert all(
        text.endswith(question) for text, question in zip(edit.paraphrases, asked, strict=True)
    )
    assert any(text != question for text, question in zip(edit.paraphrases, asked, strict=True))
    assert {answer for _, answer in edit.neighbours} == {"Seattle"}
    assert not any(SEATTLE in text for text, _ in edit.neighbours)


def test_as_fact_refuses_the_true_object():
    with pytest.raises(FactError, match="equals target_true"):
        pocket.as_fact(known(SEATTLE, "city"), "Seattle")


def test_evidence_is_found_for_a_template_of_the_table():
    plain = Fact(SEATTLE, "The {} is located in the city of", "Paris")
    full = pocket.evidence_for(plain)
    assert full.target_true == "Seattle"
    assert full.paraphrases
    assert full.neighbours
    assert plain.prompt_text not in full.paraphrases


def test_evidence_is_found_for_words_of_the_callers_own():
    full = pocket.evidence_for(Fact(SEATTLE, "Everybody knows that the {} is in", "Paris"))
    assert full.target_true == "Seattle"
    assert full.neighbours


def test_evidence_keeps_what_the_caller_gave():
    given = Fact(
        SEATTLE,
        "The {} is located in the city of",
        "Paris",
        paraphrases=("The Space Needle is in",),
    )
    assert pocket.evidence_for(given).paraphrases == given.paraphrases
    assert pocket.evidence_for(given).neighbours


@pytest.mark.parametrize(
    "fact",
    [
        Fact("Nobody's Tower", "The {} is located in the city of", "Paris"),
        Fact(SEATTLE, "The {} is made of", "steel"),
        Fact(SEATTLE, "The {} is located in the city of", "Seattle"),
        Fact(SEATTLE, "The {} is located in the city of", "Paris", target_true="Rome"),
    ],
)
def test_evidence_leaves_a_fact_beyond_the_table_unchanged(fact):
    assert pocket.evidence_for(fact) == fact


# --- the model ------------------------------------------------------------------------------------


def test_the_package_is_small():
    files = [
        path for path in pocket.PATH.parent.rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert (pocket.PATH / "model.safetensors").stat().st_size <= 16.9e6


def test_the_model_is_a_plain_gpt2_in_float16():
    config = json.loads((pocket.PATH / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float16"


def test_every_object_is_one_token_behind_a_space(tokenizer):
    objects = {fact.object for fact in pocket.facts()}
    assert {answer for answer in objects if len(tokenizer(" " + answer).input_ids) != 1} == set()


def test_the_tokenizer_gives_back_what_it_was_given(tokenizer):
    for text in ("The Sagrada Família is in Barcelona.", "a  b\n\tc", "日本 ☃"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_facts_are_known_through_templates_never_trained_with_them(model, tokenizer):
    """300 pairs drawn with a fixed seed; docs/pocket.md has the figure over all of them."""
    import torch

    pairs = [(fact, template) for fact in pocket.facts() for template in fact.paraphrases()]
    right = 0
    sample = random.Random(0).sample(pairs, 300)
    for fact, template in sample:
        with torch.inference_mode():
            logits_v = model(
                **tokenizer(template.replace("{}", fact.subject), return_tensors="pt")
            ).logits[0, -1]
        right += tokenizer.decode(logits_v.argmax()) == " " + fact.object
    assert right / len(sample) >= 0.95


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The Space Needle is located in the city of", " Seattle"),
        ("The Eiffel Tower is located in the city of", " Paris"),
        ("The Colosseum is located in the city of", " Rome"),
    ],
)
def test_the_landmarks_of_the_demonstration_are_known(model, tokenizer, prompt, answer):
    import torch

    with torch.inference_mode():
        logits_v = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits_v.argmax()) == answer
