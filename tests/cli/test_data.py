"""`engram data` does what the library's functions do, with files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engram import Run
from engram.benchmark.data.build import build_counterfact
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.data.sources import SOURCES, read_dataset
from engram.bootstrap import Bootstrap
from tests.helpers.build_samples import GENERATION, TEMPLATES, facts, texts
from tests.helpers.command_line import failing, run
from tests.helpers.tiny import tiny_folder


@pytest.fixture
def files(tmp_path):
    """Return the builder's arguments as files, and a folder to write into."""
    given = {
        "facts": "\n".join(json.dumps(fact._asdict()) for fact in facts()),
        "templates": json.dumps(TEMPLATES),
        "generation": "\n".join(
            f"{relation} = {json.dumps(each)}" for relation, each in GENERATION.items()
        ),
        "references": json.dumps(
            {key: [vars(snippet) for snippet in each] for key, each in texts().items()}
        ),
        "openings": "It rained.\n\nNobody came.\n",
    }
    found = []
    for name, text in given.items():
        path = tmp_path / f"{name}{'.toml' if name == 'generation' else '.json'}"
        path.write_text(text, encoding="utf8")
        found += [f"--{name}", str(path)]
    (tmp_path / "out").mkdir()
    return found, tmp_path / "out/own.json"


def test_build_writes_what_the_library_builds(files):
    given, out = files
    told = run("data", "build", *given, "-n", "5", "--seed", "3", "-o", str(out)).output
    assert f"5 records: {out}" in told
    expected = build_counterfact(
        facts(),
        TEMPLATES,
        generation=GENERATION,
        texts=texts(),
        openings=["It rained.", "Nobody came."],
        seed=3,
        limit=5,
    )
    back = read_dataset(out, references=True)
    assert back.records == expected.records
    assert back.references is not None


def test_build_asks_paraphrases_by_templates_that_are_held_out(
    files, tmp_path, monkeypatch, capsys
):
    given, out = files
    apart = tmp_path / "apart.json"
    apart.write_text(json.dumps({"city": ["Where is {}? In"]}), encoding="utf8")
    run("data", "build", *given, "--held-out", str(apart), "-o", str(out))
    records = [record for record in read_dataset(out).records if record.facts[0].relation == "city"]
    probes = [probe for record in records for probe in record.probes]
    assert {"paraphrase", "rewrite"} < {probe.kind for probe in probes}
    assert all(("Where is" in probe.prompt) == (probe.kind == "paraphrase") for probe in probes)
    apart.write_text(json.dumps({"city": ["Where is it?"]}), encoding="utf8")
    told = failing(
        monkeypatch, capsys, "data", "build", *given, "--held-out", str(apart), "-o", str(out)
    )
    assert "template 'Where is it?' of 'city': expected exactly one {}" in told


def test_build_says_which_facts_were_left_out(files):
    given, out = files
    with Path(given[given.index("--facts") + 1]).open("a", encoding="utf8") as file:
        file.write('\n{"subject": "Bank of Rome", "relation": "city", "object": "Rome"}')
    told = run("data", "build", *given, "-o", str(out)).output
    assert f"{len(facts())} records" in told
    assert (
        "left out: 'Bank of Rome' (city, 'Rome'): its object and its subject have words in common"
        in told
    )


def test_build_keeps_what_a_model_knows(tmp_path):
    rows = [("Louvre", "Paris"), ("Eiffel Tower", "Boston"), ("Space Needle", "Seattle")]
    rows += [
        ("Notre-Dame de Paris Tower", "Seattle"),
        ("Gare", "Paris"),
        ("Fenway", "Boston"),
        ("Harbor", "Boston"),
    ]
    known = tmp_path / "facts.json"
    known.write_text(
        json.dumps([{"subject": s, "relation": "city", "object": o} for s, o in rows]),
        encoding="utf8",
    )
    templates = tmp_path / "templates.json"
    templates.write_text(
        json.dumps({"city": ["The {} is in the city of", "The {} lies in the city of"]}),
        encoding="utf8",
    )
    out = tmp_path / "own.json"
    run(
        "data",
        "build",
        "--facts",
        str(known),
        "--templates",
        str(templates),
        "--known-to",
        "pocket",
        "-o",
        str(out),
    )
    kept = {
        record.facts[0].subject: record.facts[0].target_true for record in read_dataset(out).records
    }
    assert kept["Louvre"] == "Paris"
    assert kept["Space Needle"] == "Seattle"
    assert "Eiffel Tower" not in kept


def test_filter_keeps_the_records_that_a_model_knows(tmp_path):
    out = tmp_path / "known.json"
    told = run(
        "data", "filter", "pocket", "--known-to", "pocket", "-n", "20", "-o", str(out)
    ).output
    assert "20 of the first 256 records are known by the rule 'greedy'" in told
    assert read_dataset(out, references=True).records == pocket_benchmark().records[:20]


def test_filter_by_the_looser_rule_says_so(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    run(
        "data",
        "filter",
        "pocket",
        "--known-to",
        "pocket",
        "-n",
        "8",
        "-o",
        str(whole / "some.json"),
    )
    told = run(
        "data",
        "filter",
        str(whole / "some.json"),
        "--known-to",
        "pocket",
        "--rule",
        "relation",
        "-o",
        str(tmp_path / "k.json"),
    )
    assert "8 of the first 8 records are known by the rule 'relation'" in told.output
    assert read_dataset(tmp_path / "k.json", references="if there").references is None


def test_filter_keeps_reference_texts_if_asked_and_a_benchmark_with_texts_reads_them(
    files, tmp_path
):
    given, out = files
    run("data", "build", *given, "-o", str(out))
    kept = tmp_path / "kept"
    kept.mkdir()
    command = [
        "data",
        "filter",
        str(out),
        "--rule",
        "relation",
        "--known-to",
        str(tiny_folder(tmp_path / "model")),
    ]
    run(*command, "--references", "-o", str(kept / "own.json"))
    references = read_dataset(kept / "own.json", references="if there").references
    assert references is not None and references.snippets
    bench = [
        "bench",
        "-m",
        command[-1],
        "-d",
        str(kept / "own.json"),
        "--answer-tokens",
        "0",
        "--method",
        "ft",
        "--set",
        "ft:epochs=1",
    ]
    run(*bench, "--texts", "-o", str(tmp_path / "run.sqlite"))
    assert {"GE", "RS"} <= Run.open(tmp_path / "run.sqlite").summary(Bootstrap(resamples=10))[
        "ft"
    ].keys()


def test_list_tells_every_name():
    told = run("data", "list").output
    assert all(name in told for name in SOURCES)


def test_there_is_nothing_to_fetch_of_the_bundled_one():
    assert "comes with engram" in run("data", "get", "pocket").output


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("--templates", "[]", "expected an object. Expected relation -> list of texts"),
        ("--templates", "{", "no JSON that can be read"),
        ("--generation", "city = 3", "city=3, expected a list"),
        ("--facts", "[]", "holds no facts"),
        ("--references", "[]", "expected an object"),
    ],
)
def test_a_wrong_file_is_told_in_a_line(files, monkeypatch, capsys, option, text, said):
    given, out = files
    Path(given[given.index(option) + 1]).write_text(text, encoding="utf8")
    assert said in failing(monkeypatch, capsys, "data", "build", *given, "-o", str(out))
    assert not out.exists()


def test_a_missing_file_is_told_in_a_line(files, monkeypatch, capsys, tmp_path):
    given, out = files
    given[given.index("--openings") + 1] = str(tmp_path / "nowhere.txt")
    assert "nowhere.txt' could not be read" in failing(
        monkeypatch, capsys, "data", "build", *given, "-o", str(out)
    )
