"""Facts are read from every kind of file, and a mistake is told with its file, line and field."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engram import Fact, pocket, read_facts
from engram.errors import FactError
from tests.helpers.paths import SHARED

FACTS = [
    Fact("Space Needle", "The {} is in the city of", "Seattle", relation="city"),
    Fact(
        "Löwenbräu",
        "{} comes from",
        "Munich",
        "Rome",
        ("Where is Löwenbräu from? From",),
        (("Beer is from", "Bavaria"),),
    ),
]
KNOWN = {
    "known_id": 0,
    "subject": "Vinson Massif",
    "attribute": "Antarctica",
    "template": "{} is located in the continent",
    "prediction": " of Antarctica. It is the largest",
    "prompt": "Vinson Massif is located in the continent of",
    "relation_id": "P30",
}
OPTIONAL = SHARED / "data/known_1000.json"


@pytest.fixture
def write(tmp_path):
    def written(text: str, name: str = "facts.json") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf8")
        return path

    return written


def refused(path: Path, message: str) -> None:
    with pytest.raises(FactError, match=message):
        read_facts(path)


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_gives_back_what_was_written(write, indent):
    assert read_facts(write(json.dumps([fact.to_dict() for fact in FACTS], indent=indent))) == FACTS


def test_json_lines_give_back_what_was_written(write):
    lines = [json.dumps(fact.to_dict(), ensure_ascii=False) for fact in FACTS]
    assert read_facts(write("\n".join([lines[0], "", lines[1], ""]), "facts.jsonl")) == FACTS


def test_optional_fields_may_be_left_out(write):
    assert read_facts(write('{"subject": "a", "prompt": "{} is", "target": "b"}')) == [
        Fact("a", "{} is", "b")
    ]


def test_csv_has_a_header_quotes_and_empty_cells(write):
    text = (
        "subject,prompt,target,relation,paraphrases\r\n"
        "Space Needle,The {} is in the city of,Seattle,city,\r\n"
        '"Oslo, the city",{} is in,Norway,,"Oslo lies in | Oslo\nbelongs to"\r\n'
    )
    assert read_facts(write("\ufeff" + text, "facts.CSV")) == [
        FACTS[0],
        Fact(
            "Oslo, the city", "{} is in", "Norway", paraphrases=("Oslo lies in", "Oslo\nbelongs to")
        ),
    ]


def test_a_known_fact_is_its_template_and_what_the_model_said_before_the_object(write):
    wanted = Fact(
        "Vinson Massif", "{} is located in the continent of", "Antarctica", relation="P30"
    )
    assert read_facts(write(json.dumps([KNOWN]))) == [wanted]
    assert wanted.prompt_text == KNOWN["prompt"]


def test_pocket_is_the_bundled_table():
    facts, table = read_facts("pocket"), pocket.facts()
    assert len(facts) == len(table)
    for fact, known in zip(facts, table, strict=True):
        assert (fact.subject, fact.target, fact.relation) == (
            known.subject,
            known.object,
            known.relation,
        )
        assert fact.prompt == known.trained()[0]
        filled = {template.replace("{}", known.subject) for template in known.prompts()}
        assert {fact.prompt_text, *fact.paraphrases} == filled and len(fact.paraphrases) == len(
            filled
        ) - 1


@pytest.mark.skipif(not OPTIONAL.exists(), reason="the published known-facts file is not here")
def test_the_published_file():
    facts, records = read_facts(OPTIONAL), json.loads(OPTIONAL.read_text(encoding="utf8"))
    assert len(facts) == len(records) == 1209
    assert [fact.prompt_text for fact in facts] == [record["prompt"] for record in records]
    assert [fact.target for fact in facts] == [record["attribute"] for record in records]
    assert len({fact.relation for fact in facts}) == 33


# -- what is refused -------------------------------------------------------------------------------


def good(**changes: object) -> dict[str, object]:
    return {"subject": "a", "prompt": "{} is", "target": "b", **changes}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (5, "5 is no object; expected one with subject, prompt, target"),
        (
            {"subject": "a", "prompt": "{} is"},
            "field 'target' missing; expected 'target': the object as text",
        ),
        ({}, "field 'subject' and 'prompt' and 'target' missing"),
        (
            good(paraphrase=["x"]),
            r"field 'paraphrase' is not one of a fact \(did you mean 'paraphrases'\?\)",
        ),
        (good(target=7), "field 'target' is 7; expected the object as text"),
        (good(relation=7), "field 'relation' is 7; expected the relation's name as text, or null"),
        (good(paraphrases="x"), "field 'paraphrases' is \"x\"; expected a list of texts"),
        (good(paraphrases=[" "]), r"field 'paraphrases' is \[\" \"\]; expected a list of texts"),
        (
            good(neighbours=[["x"]]),
            r"field 'neighbours' is \[\[\"x\"\]\]; expected a list of \[text, answer\] pairs",
        ),
        (good(prompt="no place"), "prompt='no place' has 0 places for the subject"),
        (good(subject=""), "subject='' is empty"),
        (good(target_true="b"), "target='b' equals target_true"),
        (
            {**KNOWN, "template": 3},
            "field 'template' is 3; expected text, as in a known-facts file",
        ),
        (
            {**KNOWN, "prompt": "The Vinson"},
            "field 'prompt' is 'The Vinson'; expected it to begin with the filled template",
        ),
    ],
)
def test_a_wrong_record_is_told_with_its_place(write, record, message):
    lines = json.dumps(good()) + "\n\n" + json.dumps(record)
    refused(write(lines, "facts.jsonl"), r"facts\.jsonl, line 3: " + message)
    refused(
        write(f"[\n{json.dumps(good())},\n\n{json.dumps(record)}]"),
        r"facts\.json, line 4: " + message,
    )


def test_a_record_on_several_lines_is_found_at_its_first(write):
    refused(write(json.dumps([good(), good(target=7)], indent=1)), "line 7: field 'target'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"subject": }]', "line 1: no JSON list, Expecting value at column 14"),
        (
            '[\n{"subject": "a", "prompt": "{} is", "target": "b"}\n{}]',
            "line 3: no JSON list, expected ',' or ']' at column 1",
        ),
        ("[\n", "line 2: no JSON list, Expecting value"),
        ("[] more", "line 1: no JSON list, text after the list's end at column 4"),
        ("{'subject'}", "line 1: no JSON, .* expected one object a line"),
        ("", "holds no facts; expected one object with subject, prompt, target a fact"),
        ("[]", "holds no facts"),
    ],
)
def test_broken_json_is_told_with_its_place(write, text, message):
    refused(write(text), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,prompt\n", "line 1: field 'target' missing"),
        ("subject,prompt,target,objekt\n", "line 1: field 'objekt' is not one of a fact"),
        ("subject,prompt,target,target\n", "line 1: a column's name is in the header twice"),
        (
            "subject,prompt,target\na,{} is,b\nOslo, city,{} is in,Norway\n",
            "line 3: 4 cells, expected 3 as in the header",
        ),
        ('subject,prompt,target\n"a\nb",{} is,c\nx,{} is,\n', "line 4: target='' is empty"),
        ('subject,prompt,target\n"a,{} is,b\n', "no CSV, unexpected end of data"),
        ("subject,prompt,target\n", "holds no facts"),
    ],
)
def test_a_wrong_table_is_told_with_its_place(write, text, message):
    refused(write(text, "facts.csv"), message)


def test_a_file_that_cannot_be_read(tmp_path):
    refused(
        tmp_path / "none.json",
        r"no facts could be read from '.*none\.json'.*Expected 'pocket', or a file",
    )
    refused(tmp_path, "no facts could be read from")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "binary", "no facts could be read from")


def test_a_pipe_or_a_folder_is_no_file_of_facts(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(FactError, match="no facts could be read from"):
            read_facts(path)
