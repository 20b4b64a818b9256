"""`engram layers` shows the card, writes it and its picture, and `engram edit --layer auto` goes by
it.
"""

from __future__ import annotations

import json

import pytest

import engram
from engram.layers import choice as layer_choice
from tests.helpers.command_line import FACT, failing, run
from tests.helpers.layer_samples import EDITS
from tests.helpers.tiny import TEXT, tiny_folder


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    (folder / "facts.json").write_text(json.dumps([fact.to_dict() for fact in EDITS]))
    (folder / "text.txt").write_text((TEXT + "\n") * 3, encoding="utf8")
    counts = ["--keep", "all", "--edits", "2", "--traces", "2", "--estimates", "1"]
    how = [
        "--corpus",
        str(folder / "text.txt"),
        "--tokens",
        "200",
        "--set",
        "steps=2",
        "--set",
        'contexts=["{}"]',
    ]
    return [
        "layers",
        str(tiny_folder(folder)),
        "--facts",
        str(folder / "facts.json"),
        *counts,
        *how,
    ]


def test_the_card_is_shown_written_and_gone_by(args, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    told = run(
        *args, "-o", str(tmp_path / "card.json"), "--plot", str(tmp_path / "card.png")
    ).output
    card = engram.LayerCard.load(tmp_path / "card.json")
    for shown in (
        "4 layers; edits by rome of 2 facts",
        f"→ {card.best}",
        "several at once: 3 → layers",
        "card: ",
        "picture: ",
    ):
        assert shown in told
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(layer_choice, "measure", lambda *_: pytest.fail("measured again"))
    printed = run(*args, "--json").stdout
    assert json.loads(printed) == json.loads(card.to_json()), "and nothing else on standard output"
    edited = run("edit", args[1], *FACT, "--layer", "auto", "-o", str(tmp_path / "edit"))
    assert "efficacy" in edited.output
    assert engram.Edit.load(tmp_path / "edit").settings["layer"] == card.best


def test_a_model_that_knows_nothing_ends_with_a_line(args, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    told = failing(monkeypatch, capsys, *args[:4])
    assert "none of the 2 facts can be used to choose a layer" in told
