"""`engram ledger` says what the library's Ledger says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import engram
from engram.edit.edit import Edit
from engram.evaluate.canary import Canary
from engram.ledger import Ledger
from tests.helpers.command_line import failing, run
from tests.helpers.edit_samples import fact, random_edit
from tests.helpers.tiny import tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def edits(model, tmp_path_factory):
    lm, home = engram.load(model), tmp_path_factory.mktemp("edits")
    made = [random_edit(lm, rank=2, seed=seed, joint=False) for seed in (1, 2)]
    made.append(replace(random_edit(lm, seed=3), facts=(replace(fact(10), target="Oslo"),)))
    loud = random_edit(lm, seed=4)
    (name,) = loud.deltas
    delta = loud.deltas[name]
    made.append(
        replace(loud, deltas={name: engram.Delta(1000 * delta.left, delta.right, delta.owners)})
    )
    return [str(edit.save(home / str(i))) for i, edit in enumerate(made)]


@pytest.fixture
def book(model, tmp_path):
    folder = str(tmp_path / "book")
    told = run(
        "ledger", "create", folder, model, "--max-perplexity-ratio", "50", "--max-norm-ratio", "1.5"
    ).output
    assert f"ledger: {folder}, for {model}" in told
    assert Ledger.open(folder).canary == Canary(50, 1.5)
    return folder


def test_a_life_of_a_ledger(book, edits, model, tmp_path, monkeypatch, capsys):
    told = run("ledger", "add", book, *edits[:2]).output
    assert "added 1 (perplexity ratio" in told and "added 2 (perplexity ratio" in told
    assert (
        "'The Tower 10 stands in' -> 'Oslo': same fact as 1.0"
        in run("ledger", "conflicts", book, edits[2], ends=1).output
    )
    assert run("ledger", "conflicts", book, edits[3]).output == ""
    assert (
        "added 3; in the place of 1.0"
        in run("ledger", "add", book, edits[2], "--replace", "--no-canary").output
    )
    error = failing(monkeypatch, capsys, "ledger", "add", book, edits[3])
    assert "engram: entry 4 was rolled back" in error and "norm_ratio is" in error

    assert run("ledger", "remove", book, "2.1").output.rstrip().endswith("removed 2.1")
    listed = run("ledger", "list", book).output
    assert (
        "1: random, 1 of 2 facts\n  (1.0 'The Tower 10 stands in' -> 'City 10')\n  1.1 'The Tower "
        "11" in listed
    )
    assert "rolled back" not in listed
    everything = json.loads(run("ledger", "list", book, "--all", "--json").output)
    assert [entry["status"] for entry in everything] == [
        "1 of 2 facts",
        "1 of 2 facts",
        "active",
        "rolled back",
    ]
    assert "norm ratio with everything in force then: " in run("ledger", "show", book, "1").output
    run("ledger", "show", book, "2", "-o", str(tmp_path / "copy"))
    assert Edit.load(tmp_path / "copy") == Edit.load(edits[1])

    lines = run("ledger", "history", book).output.splitlines()
    assert [line.split()[1] for line in lines] == ["added", "added", "added", "rolled", "removed"]
    assert [event["what"] for event in json.loads(run("ledger", "history", book, "--json").output)][
        -1
    ] == "removed"
    assert "files of 1 entries deleted: 4" in run("ledger", "prune", book).output

    assert (
        "edited checkpoint: " in run("ledger", "apply", book, "-o", str(tmp_path / "edited")).output
    )
    assert "adapter: " in run("ledger", "export", book, "--peft", str(tmp_path / "adapter")).output
    lm, edited = engram.load(model), engram.load(tmp_path / "edited")
    (name,) = Edit.load(edits[0]).deltas
    with Ledger.open(book).applied(lm):
        assert lm.model.get_parameter(name).equal(edited.model.get_parameter(name))


def test_mistakes_are_told_in_a_line(tmp_path, monkeypatch, capsys):
    assert "is no ledger: it has no ledger.json" in failing(
        monkeypatch, capsys, "ledger", "list", str(tmp_path)
    )


def test_an_empty_ledger_says_so(book):
    assert run("ledger", "list", book).output == "nothing is in force\n"


def test_the_command_lines_page_tells_of_it():
    from site_pages import command_line

    page = command_line()
    assert (
        "engram ledger add [OPTIONS] LEDGER EDITS..." in page
        and "engram ledger remove [OPTIONS] LEDGER NAMES..." in page
    )
