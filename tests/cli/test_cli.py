"""The command line says what it found, writes what it says, and explains mistakes in a line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import engram
from engram import cli, pocket
from engram.cli import show
from engram.edit.edit import Edit
from engram.evaluate.receipt import Receipt
from engram.evaluate.words import RECEIPT_WORDS
from engram.locate import average_run as experiment
from engram.locate.average import AverageTrace
from engram.locate.trace import CausalTrace
from tests.helpers.command_line import FACT, failing, run
from tests.helpers.data_samples import SAMPLES
from tests.helpers.tiny import TEXT, tiny_folder

PROMPT = "The tower of Rome is in the city of"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text((TEXT + "\n") * 40, encoding="utf8")
    return str(path)


@pytest.fixture(scope="module")
def edited(model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits") / "edit"
    result = run("edit", model, *FACT, "--layer", "1", "--corpus", corpus, "-o", str(folder))
    assert "efficacy" in result.output and f"edit: {folder}" in result.output
    return str(folder)


def test_help_names_every_verb():
    told = run("--help").output
    for verb in (
        "demo",
        "trace",
        "average",
        "edit",
        "apply",
        "revert",
        "export",
        "verify",
        "generate",
        "stats",
        "knows",
        "layers",
    ):
        assert re.search(rf"\b{verb}\b", told)
        assert run(verb, "--help").output


def test_trace_shows_heat_maps_and_writes_picture_and_numbers(model, tmp_path):
    told = run(
        "trace",
        model,
        PROMPT,
        "-s",
        "tower of Rome",
        "--samples",
        "2",
        "-o",
        str(tmp_path / "t.png"),
        "--save",
        str(tmp_path / "t.st"),
    )
    for shown in (
        "residual, strongest",
        "mlp, strongest",
        "attention, strongest",
        "strongest at token",
        "picture: ",
    ):
        assert shown in told.output
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    saved = CausalTrace.load(tmp_path / "t.st")
    wanted = engram.trace(engram.load(model), PROMPT, subject="tower of Rome", samples=2, window=1)
    assert torch.equal(saved.scores["mlp"], wanted.scores["mlp"])


def test_trace_prints_json_and_nothing_else(model):
    found = json.loads(
        run(
            "trace",
            model,
            PROMPT,
            "-s",
            "tower of Rome",
            "--target",
            "Paris",
            "--samples",
            "2",
            "--json",
        ).stdout
    )
    assert found["answer"] == " Paris"
    assert len(found["scores"]["residual"]) == len(found["tokens"])


FACTS = [
    engram.Fact("tower", "The {} is in the city of", "Paris"),
    engram.Fact("river", "The {} is in", "Rome"),
    engram.Fact("mother tongue", "Their {} is", "French"),
]


@pytest.fixture(scope="module")
def fact_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    path.write_text(json.dumps([fact.to_dict() for fact in FACTS]))
    return str(path)


def test_an_average_makes_a_folder_and_a_second_start_traces_nothing(
    model, fact_file, tmp_path, monkeypatch
):
    args = [
        "average",
        model,
        "--facts",
        fact_file,
        "--keep",
        "all",
        "--samples",
        "2",
        "-o",
        str(tmp_path / "run"),
    ]
    told = run(*args).output
    assert f"{tmp_path / 'run'}: traces.sqlite, summary.json, heatmaps.png, lines.png" in told
    for shown in (
        "3 facts\n",
        "total effect ",
        "residual, strongest ",
        "last subject ",
        "at the last token",
    ):
        assert shown in told
    wanted = engram.average_trace(engram.load(model), FACTS, keep="all", samples=2)
    saved = AverageTrace.load(tmp_path / "run" / "traces.sqlite")
    for one, two in zip(saved.traces, wanted.traces, strict=True):
        for site in wanted.sites:
            torch.testing.assert_close(one.scores[site], two.scores[site], atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == saved.summary()
    for picture in ("heatmaps.png", "lines.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")
        (tmp_path / "run" / picture).unlink()

    def refuse(*_):
        raise AssertionError("traced a second time")

    monkeypatch.setattr(experiment, "trace_batch", refuse)
    again = run(*args, "--json")
    assert json.loads(again.stdout) == saved.summary(), "and nothing else on standard output"
    assert (tmp_path / "run" / "heatmaps.png").exists()


def test_an_average_of_some_facts_by_chance(model, fact_file):
    args = [
        "average",
        model,
        "--facts",
        fact_file,
        "--keep",
        "all",
        "--samples",
        "1",
        "--limit",
        "2",
        "--noise",
        "1",
        "--json",
    ]
    one, same, other = (json.loads(run(*args, "--seed", seed).stdout) for seed in ("1", "1", "2"))
    assert one == same != other and one["facts"] == 2


def test_severed_paths_get_their_bars(model, fact_file, tmp_path):
    args = [
        "--keep",
        "all",
        "--samples",
        "1",
        "--site",
        "residual",
        "--severed",
        "mlp",
        "--severed",
        "attention",
    ]
    told = run("average", model, "--facts", fact_file, *args, "-o", str(tmp_path / "run")).output
    assert (
        "heatmaps.png, lines.png, severed.png" in told and "residual, attention severed  " in told
    )
    assert (tmp_path / "run" / "severed.png").read_bytes().startswith(b"\x89PNG")


def test_heads_alone_have_numbers_and_no_lines(model, fact_file, tmp_path):
    args = ["--keep", "all", "--samples", "1", "--site", "head", "-o", str(tmp_path / "run")]
    told = run("average", model, "--facts", fact_file, *args).output
    assert re.search(r"^  head {7}[+-]\d\.\d{3} layer \d, head \d", told, re.MULTILINE), told
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["summary.json", "traces.sqlite"]


@pytest.mark.parametrize(
    ("options", "settings", "shown"),
    [
        (
            ["--site", "head"],
            {"sites": ["head"]},
            [r"head at \S+, strongest", r"layer \d, head \d: [+-]"],
        ),
        (
            ["--site", "neuron", "--set", "neurons=[[1, 3]]"],
            {"sites": ["neuron"], "neurons": [(1, 3)]},
            ["layer 1, neuron 3: "],
        ),
        (["--method", "attribution"], {"method": "attribution"}, ["^estimates, to first order$"]),
        (
            ["--screen", "5"],
            {"screen": 5},
            [r"^estimates, to first order; \d+ of \d+ cells are exact$"],
        ),
        (
            ["--site", "residual", "--severed", "mlp"],
            {"sites": ["residual"], "severed": ["mlp"]},
            ["residual, mlp severed, strongest", "^  residual {15}strongest at token"],
        ),
        (["--noise", "0.1"], {"noise": 0.1}, []),
        (["--noise", "u0.5"], {"noise": "u0.5"}, []),
        (
            ["--corruption", "subject", "--other-subject", "river"],
            {"corruption": "subject", "other_subject": "river"},
            [],
        ),
        (
            ["--direction", "noise", "--metric", "logit_difference", "--foil", "city"],
            {"direction": "noise", "metric": "logit_difference", "foil": "city"},
            ["^logit difference -?", r"residual, strongest -"],
        ),
        (["--set", "positions=last", "--window", "2"], {"positions": "last", "window": 2}, []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_traces_options_are_its_settings(model, options, settings, shown):
    args = ["trace", model, "The tower is in the city of", "-s", "tower", "--samples", "2"]
    found = json.loads(run(*args, *options, "--json").stdout)
    wanted = engram.trace(
        engram.load(model), "The tower is in the city of", subject="tower", samples=2, **settings
    )
    assert found["scores"] == {site: table.tolist() for site, table in wanted.scores.items()}
    assert found["low_score"] == wanted.low_score and found["method"] == wanted.method
    told = run(*args, *options).output
    for pattern in shown:
        assert re.search(pattern, told, re.MULTILINE), told


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--site", "head"],
        ["--site", "residual", "--severed", "mlp"],
        ["--direction", "noise", "--screen", "5"],
    ],
)
def test_traces_can_be_read_in_80_columns(model, fact_file, options, monkeypatch):
    monkeypatch.setattr(
        "engram.cli.terminal.console", Console(highlight=False, soft_wrap=True, width=80)
    )
    given = ["--samples", "1", *options]
    for verb, *args in (
        ["trace", "The tower is in the city of", "-s", "tower"],
        ["average", "--facts", fact_file, "--keep", "all"],
    ):
        told = run(verb, model, *args, *given).output
        assert told and max(map(len, told.splitlines())) <= 80, told


def test_edit_keeps_an_edit_with_its_receipt(edited):
    edit = Edit.load(edited)
    assert edit.facts[0].target == "Paris" and edit.settings["layer"] == 1
    assert edit.receipt["answers"] and edit.settings["second_moment"]["corpus"].startswith("file ")


def test_settings_and_facts_come_from_options_and_files(model, corpus, tmp_path):
    facts = tmp_path / "facts.json"
    facts.write_text(
        json.dumps(
            [
                {"subject": "tower", "prompt": "The {} is in", "target": "Rome"},
                {
                    "subject": "bridge",
                    "prompt": "The {} is in",
                    "target": "Paris",
                    "neighbours": [["The river runs through", "London"]],
                },
            ]
        )
    )
    settings = ["--set", "steps=3", "--set", "variant=p-rome", "--layer", "1", "--corpus", corpus]
    run("edit", model, "--facts", str(facts), *settings, "-o", str(tmp_path / "e"))
    edit = Edit.load(tmp_path / "e")
    assert len(edit.facts) == 2 and edit.rank == 2
    assert (edit.settings["steps"], edit.settings["variant"]) == (3, "p-rome")


@pytest.mark.parametrize(
    ("form", "paraphrases", "neighbours", "unchecked"),
    [
        ("counterfact", 2, 2, []),
        ("zsre", 1, 1, []),
        ("facts", 1, 1, []),
        (
            "flat",  # its rephrased prompt is no paraphrase, see docs/datasets.md
            0,
            0,
            ["paraphrases: none given, not checked", "neighbours: none given, not checked"],
        ),
    ],
)
def test_facts_of_a_data_sets_file_bring_what_a_receipt_checks(
    model, tmp_path, form, paraphrases, neighbours, unchecked
):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([SAMPLES[form]]))
    args = ["--method", "ft", "--layer", "1", "--set", "epochs=1"]
    run("edit", model, "--facts", str(path), *args, "-o", str(tmp_path / "e"))
    edit = Edit.load(tmp_path / "e")
    (fact,) = edit.facts
    assert (len(fact.paraphrases), len(fact.neighbours)) == (paraphrases, neighbours)
    receipt = Receipt.from_dict(edit.receipt)
    assert len(receipt.of("paraphrase")) == paraphrases
    assert len(receipt.of("neighbourhood")) == neighbours
    assert receipt.unchecked() == unchecked


def test_apply_and_revert_give_every_byte_back(model, edited, tmp_path):
    run("apply", edited, model, "-o", str(tmp_path / "edited"))
    run("revert", str(tmp_path / "edited"), "-o", str(tmp_path / "back"))
    original = {p.name: p.read_bytes() for p in Path(model).iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == original
    changed = (tmp_path / "edited" / "model.safetensors").read_bytes()
    assert changed != original["model.safetensors"]


def test_apply_writes_a_wider_dtype(edited, model, tmp_path, monkeypatch, capsys):
    half = engram.load(model)
    half.model.half().save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    command = ["apply", edited, str(tmp_path / "half"), "--force", "--dtype"]
    run(*command, "float32", "-o", str(tmp_path / "edited"))
    assert engram.load(tmp_path / "edited").model.dtype == torch.float32
    run("revert", str(tmp_path / "edited"), "-o", str(tmp_path / "back"))
    original = {p.name: p.read_bytes() for p in (tmp_path / "half").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == original
    command += ["bfloat16", "-o", str(tmp_path / "o")]
    assert "which bfloat16 would round" in failing(monkeypatch, capsys, *command)


def test_export_writes_an_adapter_that_names_its_base(edited, model, tmp_path, monkeypatch, capsys):
    assert "adapter: " in run("export", edited, "--peft", str(tmp_path / "adapter")).output
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == Path(model).name
    assert "--peft" in failing(monkeypatch, capsys, "export", edited)


def test_export_writes_one_adapter_at_a_time(edited, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf", reason="needs the package gguf, see the extra of that name")
    file, folder = str(tmp_path / "edit.gguf"), str(tmp_path / "adapter")
    assert run("export", edited, "--gguf", file).output == f"adapter: {file}\n"
    for words, message in (
        ([], "give one of --peft FOLDER and --gguf FILE"),
        (["--gguf", file, "--peft", folder], "give one of --peft FOLDER and --gguf FILE"),
        (["--peft", folder, "--base", file], "--base is read for --gguf FILE"),
        (["--gguf", file, "--base", file], "is read by this command and would be lost"),
        (["--gguf", str(tmp_path / "b.gguf"), "--base", edited], "--base"),
    ):
        assert message in failing(monkeypatch, capsys, "export", edited, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["edit.gguf"]


def test_a_prompt_edit_cannot_be_exported_or_applied(model, tmp_path, monkeypatch, capsys):
    run("edit", model, *FACT, "--method", "in-context", "-o", str(tmp_path / "e"))
    for command in (
        ["export", str(tmp_path / "e"), "--peft", str(tmp_path / "adapter")],
        ["export", str(tmp_path / "e"), "--gguf", str(tmp_path / "edit.gguf")],
        ["apply", str(tmp_path / "e"), model, "-o", str(tmp_path / "edited")],
    ):
        assert "a text in front of prompts, which changes no weights" in failing(
            monkeypatch, capsys, *command
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


def test_generate_uses_edits_and_seeds(model, edited):
    plain, again = (run("generate", model, PROMPT, "-n", "5").output for _ in range(2))
    assert plain == again and plain.startswith(PROMPT)
    with Edit.load(edited).applied(lm := engram.load(model)):
        assert (
            run("generate", model, PROMPT, "-n", "5", "--edit", edited).output
            == lm.generate(PROMPT, 5) + "\n"
        )
    sampled = [
        run("generate", model, PROMPT, "-n", "8", "--temperature", "1.5", "--seed", seed).output
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_verify_ends_with_one_where_an_edit_fails(model, edited):
    record = Edit.load(edited).receipt
    told = run("verify", model, edited, "--json", ends=0 if record["passed"] else 1)
    assert json.loads(told.stdout)["answers"] == record["answers"]
    assert json.loads(told.stdout)["verdict"] == record["verdict"]


def test_verify_explains_its_words_on_request(model, edited):
    ends = 0 if Edit.load(edited).receipt["passed"] else 1
    plain = run("verify", model, edited, ends=ends).output
    told = run("verify", model, edited, "--explain", ends=ends).output
    in_json = run("verify", model, edited, "--explain", "--json", ends=ends)
    for word, meaning in RECEIPT_WORDS.items():
        line = re.compile(rf"^{re.escape(word)} +{re.escape(meaning)}$", re.MULTILINE)
        assert line.search(told) and line.search(in_json.stderr) and not line.search(plain)
    assert json.loads(in_json.stdout)["verdict"] in told
    assert "engram verify --explain" in plain and "the model says the new object" in plain


def test_what_a_file_holds_is_no_command_to_the_terminal(model, edited, tmp_path, capsys):
    receipt = Receipt.from_dict(Edit.load(edited).receipt)
    prompt, before, _ = receipt.continuations[0]
    hostile = replace(
        receipt,
        continuations=((f"\x1b[2J{prompt}", before, "\x1b]0;title\x07[red]"),),
        quantised="\x1b[8m",
        how="beside",
    )
    show.show_receipt(hostile)
    told = capsys.readouterr().out
    assert "\x1b[2J" not in told and "\x1b]" not in told and "\x1b[8m" not in told
    assert "[red]" in told


def test_stats_measures_layers_and_keeps_them(model, corpus, tmp_path):
    told = run(
        "stats",
        model,
        "-l",
        "0",
        "-l",
        "2",
        "--corpus",
        corpus,
        "--tokens",
        "300",
        "-o",
        str(tmp_path / "c"),
    ).output
    assert [line.split()[0] for line in told.splitlines()[1:]] == ["0", "2"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "layer0.safetensors",
        "layer2.safetensors",
    ]


def test_knows_shows_a_table_and_keeps_every_answer(model, tmp_path):
    facts = tmp_path / "facts.csv"
    facts.write_text(
        "subject,prompt,target,relation,paraphrases\ntower,The {} is in,Rome,city,See the tower "
        "in\n"
        "bridge,The {} is in,Paris,city,\nShe,{} plays the,piano,instrument,\n"
    )
    told = run(
        "knows",
        model,
        "--facts",
        str(facts),
        "--candidates",
        "relation",
        "-k",
        "2",
        "-o",
        str(tmp_path / "k.json"),
    )
    wanted = engram.knows(engram.load(model), engram.read_facts(facts), candidates="relation", k=2)
    assert (
        told.output.startswith(wanted.table()) and f"answers: {tmp_path / 'k.json'}" in told.output
    )
    assert engram.Knowledge.load(tmp_path / "k.json") == wanted

    options = ["--facts", str(facts), "--limit", "2", "--paraphrases", "none", "--json"]
    ones, same, others = (
        json.loads(run("knows", model, *options, "--seed", seed).stdout) for seed in ("1", "1", "4")
    )
    assert (
        ones == same
        and len(ones["records"]) == 2
        and all(len(record["replies"]) == 1 for record in ones["records"])
    )
    assert [record["fact"] for record in ones["records"]] != [
        record["fact"] for record in others["records"]
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trace", "MODEL", PROMPT, "-s", "Paris"], "subject 'Paris' is not in the prompt"),
        (["trace", "MODEL", PROMPT, "-s", "Rome", "--noise", "loud"], "noise='loud' is not a rule"),
        (["trace", "MODEL"], "Missing argument"),
        (["trace", "MODEL", PROMPT], "Missing option '--subject'"),
        (["trace", "MODEL", PROMPT, "-s", "Rome", "--facts", "pocket"], "No such option: --facts"),
        (["average", "MODEL"], "Missing option '--facts'"),
        (["average", "MODEL", "--facts", "pocket", "-s", "b"], "No such option: -s"),
        (
            ["average", "MODEL", "--facts", "/no/such/file"],
            "no facts could be read from '/no/such/file'",
        ),
        (["average", "MODEL", "--facts", "pocket", "--keep", "some"], "keep='some': expected"),
        (
            ["average", "MODEL", "--facts", "pocket", "--limit", "1", "-o", "/dev/null"],
            "/dev/null cannot be the folder of a run",
        ),
        (["trace", "MODEL", PROMPT, "-s", "Rome", "--method", "fast"], "method='fast': expected"),
        (["trace", "MODEL", PROMPT, "-s", "Rome", "--set", "windw=3"], "did you mean 'window'?"),
        (
            ["trace", "no/such/model", PROMPT, "-s", "Rome"],
            "no causal language model found as 'no/such/model'",
        ),
        (["edit", "MODEL", "-s", "Rome"], "--prompt, --target missing"),
        (["edit", "MODEL", "-s", "Rome", "-p", "{} is in", "-t", " "], "target=' ' is empty"),
        (
            ["edit", "MODEL", "-s", "Rome", "-p", "It is in", "-t", "Paris"],
            "0 places for the subject",
        ),
        (
            ["edit", "MODEL", *FACT, "--layer", "auto", "--method", "in-context"],
            "in-context has no setting 'layer'",
        ),
        (
            ["edit", "MODEL", *FACT, "--method", "lora", "--set", "layers=2"],
            "--set 'layers=2': layers has an option of its own",
        ),
        (["edit", "MODEL", *FACT, "--layer", "0,1"], "--layer '0,1': rome edits one layer"),
        (
            ["edit", "MODEL", *FACT, "--layer", "one"],
            "--layer 'one': expected a layer's number, from 0, several",
        ),
        (["edit", "MODEL", *FACT, "--set", "steps"], "expected NAME=VALUE"),
        (["edit", "MODEL", *FACT, "--set", "stps=3"], "did you mean 'steps'"),
        (["edit", "MODEL", *FACT, "--method", "rme"], "method='rme': expected"),
        (
            ["edit", "MODEL", "--facts", "/no/such/file"],
            "Expected 'pocket', or a file: a JSON list",
        ),
        (["verify", "MODEL", "/no/such/edit"], "/no/such/edit"),
        (["lens", "MODEL", "a \udcff"], "'a \\udcff' is no text that a model can read"),
        (
            ["generate", "MODEL", "a", "--temperature", "1e-320"],
            "temperature=1e-320: expected at least 0.0001",
        ),
        (["stats", "MODEL", "--corpus", "/no/such/text"], "cannot be read as a text file"),
        (["stats", "MODEL", "--corpus", "a", "--data-set", "b"], "give one of them"),
        (
            ["knows", "MODEL", "--facts", "/no/such/file"],
            "no facts could be read from '/no/such/file'",
        ),
        (["knows", "MODEL", "--candidates", "relations"], "did you mean 'relation'?"),
        (["knows", "MODEL", "--paraphrases", "bst"], "did you mean 'best'?"),
        (["demo", "-s", "Spaec Needle"], "knows nothing of 'Spaec Needle'; it knows Space Needle"),
        (["demo", "-t", " "], "target is empty; give the object"),
        (["demo", "-m", "smollm2", "-t", " "], "target is empty; give the object"),
        (["demo", "-m", "smollm2", "-s", "Big Ben"], "no fact of smollm2 about 'Big Ben'"),
        (["demo", "-m", "smollm2", "-t", "Paris"], "'Paris' is what the model says"),
        (["demo", "-m", "gpt2"], "no facts for it; expected pocket or smollm2"),
        (["demo", "-t", "trumpet"], "'trumpet' cannot replace what the model knows"),
    ],
)
def test_mistakes_end_with_a_line(model, args, message, monkeypatch, capsys):
    assert message in failing(
        monkeypatch, capsys, *(model if arg == "MODEL" else arg for arg in args)
    )


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and "stopped" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_the_demo_explains_its_words_on_request(tmp_path):
    told = run("demo", "-o", str(tmp_path / "demo"), "--explain").output
    assert all(meaning in told for meaning in RECEIPT_WORDS.values())


@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_what_the_model_says_already_is_no_edit(tmp_path, monkeypatch, capsys):
    out = tmp_path / "edit"
    fact = ["-s", "Louvre", "-p", "The {} is located in the city of", "-t", "Paris"]
    message = failing(monkeypatch, capsys, "edit", "pocket", *fact, "-o", str(out))
    assert "there is nothing to rewrite: the model says ' Paris' already after" in message
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.skipif(not pocket.PATH.exists(), reason="the bundled model is not here")
def test_the_demo_shows_everything(tmp_path):
    told = run("demo", "-o", str(tmp_path / "demo")).output
    assert "The Eiffel Tower" in told and "Paris" in told and "every bit is as it was" in told
    assert re.search(r"^PASSED$", told, re.MULTILINE), told
    assert (tmp_path / "demo/trace.png").exists()
    assert sum(p.stat().st_size for p in (tmp_path / "demo/edit").iterdir()) < 100_000
    Edit.load(tmp_path / "demo/edit")


def test_the_command_is_installed():
    command = [sys.executable, "-c", "from engram.cli import main; main()", "--help"]
    assert "Usage: " in subprocess.run(command, capture_output=True, text=True, check=True).stdout
