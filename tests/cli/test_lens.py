"""The commands lens, refinement and memories say what the library found."""

from __future__ import annotations

import json

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

import engram
from engram import cli
from engram.cli.lens import _grid, _visible
from engram.errors import EngramError
from tests.helpers.tiny import EXPERTS, tiny_folder

TEXT = "The tower of Rome is in the city of"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("models")))


def run(*args: str):
    result = CliRunner().invoke(cli.app, list(args))
    if result.exception is not None:
        raise result.exception
    return result


def test_lens_shows_a_grid_and_a_table_and_writes_a_picture(model, tmp_path):
    told = run("lens", model, TEXT, "-o", str(tmp_path / "lens.png"), "--shade", "rank").output
    found = engram.lens(engram.load(model), TEXT)
    assert str(found) in told and "picture: " in told
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    assert run("lens", model, TEXT, "--no-norm").output.endswith(
        str(engram.lens(engram.load(model), TEXT, norm=False)) + "\n"
    )


@pytest.mark.parametrize("width", [20, 80, 400])
def test_the_grid_fits_the_terminal_and_holds_every_state(model, width):
    found = engram.lens(engram.load(model), TEXT)
    lines = _grid(found, width).plain.splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= width
    top = [line for line in lines if line.startswith("  3 ")]
    shown = [word for line in top for word in line[4:].split()]
    assert len(shown) == len(found.tokens)
    assert [line.split()[0] for line in lines if line[:3].strip()] == [
        "3",
        "2",
        "1",
        "0",
        "in",
    ] * len(top), "layers up"


def test_tokens_without_a_picture_stay_on_their_line():
    assert [_visible(token) for token in (" Rome", "\n", " ", "", "a\tb", "中")] == [
        "Rome",
        "⏎",
        "␣",
        "␣",
        "a⇥b",
        "中",
    ]


def test_json_and_nothing_else(model):
    lm = engram.load(model)
    told = json.loads(run("lens", model, TEXT, "--target", "Paris", "-k", "2", "--json").stdout)
    assert (
        told["rank"] == engram.lens(lm, TEXT, target="Paris").rank.tolist()
        and len(told["top"][0][0]) == 2
    )
    told = json.loads(run("refinement", model, TEXT, "--json").stdout)
    assert told["shares"] == engram.refinement(lm, TEXT).shares()
    told = json.loads(
        run("memories", model, TEXT, "--layer", "2", "-n", "3", "-k", "4", "--json").stdout
    )
    assert [each["value"]["neuron"] for each in told["neurons"]] == [
        each.value.neuron for each in engram.memories(lm, TEXT, 2, neurons=3).neurons
    ]


def test_refinement_and_memories_speak_of_the_position_asked_for(model, tmp_path):
    lm = engram.load(model)
    told = run("refinement", model, TEXT, "-p", "2", "-o", str(tmp_path / "r.svg")).output
    assert engram.refinement(lm, TEXT).describe(2) in told and (tmp_path / "r.svg").exists()
    told = run("memories", model, TEXT, "-l", "1", "-p", "-3", "-o", str(tmp_path / "m.png")).output
    assert str(engram.memories(lm, TEXT, 1, -3, k=8)) in told and (tmp_path / "m.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lens", "-k", "999999"], "k=999999: the number of tokens"),
        (["lens", "--target", " "], "target=' ' is empty"),
        (["refinement", "-p", "99"], "position=99: the text has"),
        (["memories", "-l", "9"], "layer=9 does not exist"),
        (["memories", "-l", "1", "-p", "-99"], "position=-99: the text has"),
    ],
)
def test_mistakes_are_errors_that_say_what_to_do(model, args, message):
    with pytest.raises(EngramError, match=message):
        run(args[0], model, TEXT, *args[1:])


def test_experts_have_lenses_and_no_memories(tmp_path):
    folder = str(tiny_folder(tmp_path, EXPERTS[0]))
    assert "logit lens" in run("lens", folder, TEXT).output
    assert "changed by" in run("refinement", folder, TEXT).output
    with pytest.raises(EngramError, match="mixture of experts"):
        run("memories", folder, TEXT, "-l", "1")
