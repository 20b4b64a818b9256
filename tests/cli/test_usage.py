"""What the command line says of itself: results on stdout, all else on stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import engram
from engram import cli
from engram.cli import terminal
from engram.edit.edit import Edit
from tests.helpers.command_line import FACT, failing, run
from tests.helpers.edit_samples import random_edit
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TEXT, tiny_folder

PROMPT = "The tower of Rome is in the city of"


def commands(group, path=()):
    """Yield every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


def process(*args: str, **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engram", *args]
    return subprocess.run(command, check=False, **{"capture_output": True, "text": True} | settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def edit(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits") / "edit"
    return str(random_edit(engram.load(model), rank=2, joint=False).save(folder))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text((TEXT + "\n") * 40, encoding="utf8")
    return str(path)


def test_the_version_is_said_without_torch():
    told = run("--version").stdout
    assert told == f"engram {engram.__version__}\n"
    code = (
        "import sys; sys.argv = ['engram', '--version']\nfrom engram.cli import main\n"
        "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == told + "False\n"


def test_help_is_where_users_look_for_it():
    for asked in ([], ["help"], ["-h"]):
        assert run(*asked).stdout == run("--help").stdout
    for name in COMMANDS:
        shown = run(*name.split(), "--help").stdout
        group, _, command = name.rpartition(" ")
        assert run(*group.split(), "help", command).stdout == shown
    assert run("ledger").stdout == run("ledger", "--help").stdout


def test_help_says_the_exit_codes():
    shown = " ".join(run("--help").stdout.split())
    assert "0 done" in shown and "2 it could not be done" in shown and "130 stopped" in shown


def test_python_runs_the_package():
    assert process("--version").stdout == run("--version").stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_quiet(name):
    options = {option for one in COMMANDS[name].params for option in one.opts}
    assert {"--json", "--quiet", "-q"} <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_are_command_lines(name):
    texts = re.findall(r"Example: (engram .+)", COMMANDS[name].help)
    for text in texts:
        words = shlex.split(text)[1:]
        assert words[: len(name.split())] == name.split()
        COMMANDS[name].make_context(name, words[len(name.split()) :])


def test_most_verbs_have_an_example():
    silent = [name for name, command in COMMANDS.items() if "Example: engram" not in command.help]
    assert {name for name in silent if " " not in name} == set()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["edti"], "No such command 'edti'. Did you mean 'edit'. Try 'engram --help'"),
        (["ledger", "lst"], "No such command 'lst'. Did you mean 'list'. Try 'engram ledger -"),
        (["help", "nothing"], "No such command 'nothing'. Try 'engram --help'"),
        (["edit"], "Missing argument 'model'. Try 'engram edit --help'"),
        (["edit", "pocket", "--lyer", "3"], "No such option: --lyer (Possible options: "),
        (["stats", "pocket", "-l", "x"], "--layer='x': expected a whole number. Try 'engram stat"),
        (["stats", "pocket", "-l", "1.5"], "--layer='1.5': expected a whole number. Try"),
        (["stats", "pocket", "--tokens", "0"], "--tokens='0': expected at least 1. Try"),
        (["generate", "pocket", "a", "--temperature", "x"], "--temperature='x': expected a number"),
        (["report", "x", "-f", "foo"], "--format='foo': expected 'terminal', 'markdown', "),
        (["ledger", "show", "x", "x"], "number='x': expected a whole number"),
        (["edit", "po\x1b[31mcket\n", "x"], "Got unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_is_one_line(args, line, monkeypatch, capsys):
    told = failing(monkeypatch, capsys, *args)
    assert told.startswith(f"engram: {line}") and told.count("\n") == 1
    assert told.strip().isprintable() and re.search(r"Try 'engram[ \w]* --help'$", told.strip())


def test_a_huge_argument_does_not_fill_the_screen(monkeypatch, capsys):
    told = failing(monkeypatch, capsys, "edit", "a" * 100_000, "b" * 100_000)
    assert len(told) < 2100 and told.endswith("Try 'engram edit --help'\n")


# every command whose work is short; what its document holds is said by the page
DOCUMENTS = {
    "plan": ["MODEL"],
    "trace": ["MODEL", PROMPT, "-s", "tower", "--samples", "1"],
    "lens": ["MODEL", PROMPT],
    "refinement": ["MODEL", PROMPT],
    "memories": ["MODEL", PROMPT, "-l", "1"],
    "generate": ["MODEL", PROMPT, "-n", "2"],
    "edit": ["MODEL", *FACT, "--set", "steps=1", "--corpus", "CORPUS"],
    "apply": ["EDIT", "MODEL", "-o", "OUT"],
    "export": ["EDIT", "--peft", "OUT"],
    "knows": ["MODEL", "--limit", "1"],
    "average": ["MODEL", "--facts", "pocket", "--limit", "1", "--samples", "1", "--keep", "all"],
    "stats": ["MODEL", "-l", "0", "--tokens", "50", "--corpus", "CORPUS"],
    "bench": [
        "-m",
        "MODEL",
        "-n",
        "1",
        "--method",
        "ft",
        "--set",
        "ft:epochs=1",
        "-o",
        "OUT.sqlite",
    ],
    "ledger create": ["OUT", "MODEL"],
    "data filter": [
        "pocket",
        "--known-to",
        "MODEL",
        "--rule",
        "relation",
        "-n",
        "1",
        "-o",
        "OUT.json",
    ],
}


def documented() -> dict[str, set[str]]:
    """Return verb -> the keys that docs/command-line.md says its document has."""
    rows = {}
    page = (ROOT / "docs/command-line.md").read_text(encoding="utf8")
    table = page.partition("| verb | keys |")[2].partition("\n\n")[0]
    for names, keys in re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.MULTILINE):
        for name in re.findall("`([^`]+)`", names):
            rows[name] = set(re.findall("`([a-z_]+)`", keys.partition(";")[0]))
    return rows


def test_the_page_documents_every_verb():
    assert documented().keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_is_one_document_alone(name, model, edit, corpus, tmp_path):
    given = {"MODEL": model, "EDIT": edit, "CORPUS": corpus}
    given |= {word: str(tmp_path / word) for word in ("OUT", "OUT.json", "OUT.sqlite")}
    words = [*name.split(), *(given.get(word, word) for word in DOCUMENTS[name])]
    ended = run(*words, "--json", "--quiet")
    document = json.loads(ended.stdout, parse_constant=pytest.fail)
    first = document[0] if isinstance(document, list) else document
    assert documented()[name] and documented()[name] <= first.keys(), first.keys()
    assert ended.stderr == ""


def test_a_ledgers_documents(model, edit, tmp_path):
    book, copy = str(tmp_path / "book"), str(tmp_path / "copy")
    run("ledger", "create", book, model)

    def document(*args: str, ends: int = 0):
        return json.loads(run("ledger", *args, "--json", "-q", ends=ends).stdout)

    keys = documented()
    (added,) = document("add", book, edit, "--no-canary")
    assert added == document("history", book)[-1]
    assert added.keys() >= keys["ledger history"] - {"events"}
    assert document("list", book)[0].keys() >= keys["ledger list"]
    assert document("show", book, "1", "-o", copy).keys() >= keys["ledger list"] | {"receipt"}
    assert Edit.load(copy)
    clash = document("conflicts", book, edit, ends=1)[0]
    assert clash.keys() == keys["ledger conflicts"]
    assert document("apply", book, "-o", str(tmp_path / "applied")).keys() == {"checkpoint"}
    assert document("export", book, "--peft", str(tmp_path / "peft")).keys() == {"adapter"}
    assert document("remove", book, "1") == document("history", book)[-1]
    assert document("prune", book) == {"deleted": [1]}


def test_numbers_that_json_lacks_are_null(capsys):
    terminal.print_json({"a": [float("nan"), float("inf"), 1.5], "b": Path("x"), "c": {"é"}})
    assert capsys.readouterr().out == '{"a": [null, null, 1.5], "b": "x", "c": ["\\u00e9"]}\n'


def test_an_edit_that_will_not_be_kept_says_so_before_the_work(model, monkeypatch):
    def refuse(*_, **__):
        raise engram.EngramError("the work began")

    monkeypatch.setattr(engram, "load", refuse)
    with pytest.raises(engram.EngramError, match="the work began"):
        run("edit", model, *FACT)
    from typer.testing import CliRunner

    told = CliRunner().invoke(cli.app, ["edit", model, *FACT])
    assert told.stderr.startswith("engram: the edit will not be kept") and told.stdout == ""
    assert "-o FOLDER keeps it" in told.stderr
    quiet = CliRunner().invoke(cli.app, ["edit", model, *FACT, "-q"])
    assert quiet.stderr == ""


def test_quiet_silences_libraries_and_only_meanwhile(capsys, caplog):
    import logging
    import warnings

    log = logging.getLogger("engram.test")
    with terminal.session(quiet=True):
        warnings.warn("loud", stacklevel=1)
        log.warning("loud")
        terminal.note("loud")
    assert capsys.readouterr().err == "" and caplog.text == ""
    with pytest.warns(UserWarning, match="loud"):
        warnings.warn("loud", stacklevel=1)
    log.warning("loud again")
    terminal.note("loud again")
    assert "loud again" in capsys.readouterr().err and "loud again" in caplog.text


# a process takes seconds to import torch, whatever it does then
SEVERAL = """
import json, sys
from engram.cli import main
for args in json.loads(sys.argv[1]):
    sys.argv = ["engram", *args]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "0"},
        {"COLUMNS": "1"},
        {"COLUMNS": "-5"},
        {"NO_COLOR": "1", "TERM": "dumb"},
        {"FORCE_COLOR": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"HOME": None},
        {"HOME": "/nowhere"},
        {"ENGRAM_CACHE": ""},
        {"ENGRAM_CACHE": "/dev/null"},
        {"ENGRAM_CACHE": "re\nlative"},
    ],
    ids=str,
)
def test_strange_surroundings(environment, model, corpus, tmp_path):
    settings = {**os.environ, **{name: value or "" for name, value in environment.items()}}
    if None in environment.values():
        for name in environment:
            del settings[name]
    lists = [
        ["--help"],
        ["trace", model, PROMPT, "-s", "tower", "--samples", "1"],
        ["lens", model, PROMPT],
        ["edit", model, *FACT, "--set", "steps=1", "--corpus", corpus],
    ]
    ended = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(lists)],
        env=settings,
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in ended.stderr and ended.stdout
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_a_folder_that_is_gone(model, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    code = f"cd {here} && rmdir {here} && {sys.executable} -m engram generate {model} The -n 1"
    ended = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 or ended.stderr.startswith("engram: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_closed_streams(closed, model):
    code = f"{sys.executable} -m engram generate {model} 'The tower' -n 1 {closed}"
    ended = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout.startswith("The tower") and not ended.stderr


@pytest.mark.slow
def test_an_unknown_model_is_said_at_once_and_in_one_line(monkeypatch):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}  # there is no network here, either way
    ended = process("trace", "no/such-model", "The", "-s", "The", env=environment, timeout=60)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("engram: ") and "'no/such-model'" in ended.stderr
