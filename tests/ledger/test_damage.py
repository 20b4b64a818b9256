"""A ledger that somebody else changed: what cannot have happened is an error that names file and
line, and nothing outside the folder is read, written or deleted.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from engram.errors import EngramError, EngramFileError
from engram.files.checksums import FIELD
from engram.ledger import Ledger
from tests.helpers.damage import check_equal_or_refused, damaged_texts, flipped
from tests.helpers.edit_samples import random_edit, tiny

LM = tiny()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a ledger of three entries: one has lost a fact, one was removed and pruned."""
    ledger = Ledger.create(tmp_path_factory.mktemp("made") / "ledger", LM)
    for seed in (1, 2, 3):
        ledger.add(random_edit(LM, rank=2, joint=False, seed=seed))
    ledger.remove("1.1")
    ledger.remove(2)
    ledger.prune()
    return ledger.folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "ledger"))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "history.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write(folder: Path, lines: list[Any], *, stamped: bool = False) -> None:
    if not stamped:  # as an older engram wrote it: only the contents can be checked
        lines = [{name: value for name, value in line.items() if name != FIELD} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "history.jsonl").write_text(text, encoding="utf-8")


def state(folder: Path) -> Any:
    ledger = Ledger.open(folder)
    canary = asdict(ledger.canary)
    return ledger.base, canary, ledger.history(), ledger.list(everything=True)


CANNOT_HAVE_HAPPENED = {
    "removed again": (lambda a: [*a, a[3]], r"line 7.*gone=1.1, which is not in force"),
    "removed what is not there": (
        lambda a: [*a, {**a[3], "gone": [[9, 0]]}],
        r"line 7.*gone=9.0, which is not in force",
    ),
    "no such fact": (
        lambda a: [*a, {**a[3], "gone": [[1, 7]]}],
        r"line 7.*gone=1.7, which is not in force",
    ),
    "twice at once": (
        lambda a: [*a, {**a[3], "gone": [[3, 0], [3, 0]]}],
        r"line 7.*gone=3.0, 3.0, expected each fact once",
    ),
    "nothing removed": (lambda a: [*a, {**a[3], "gone": []}], r"line 7.*gone=\[\], expected the"),
    "added twice": (lambda a: [a[0], *a], r"line 2.*entry=1, expected 2, the next number"),
    "numbers out of order": (lambda a: [a[1], a[0]], r"line 1.*entry=2, expected 1"),
    "a number was left out": (lambda a: [a[0], a[2]], r"line 2.*entry=3, expected 2"),
    "the same edit": (
        lambda a: [a[0], {**a[0], "entry": 2}],
        r"line 2.*identity=.* is that of an entry in force",
    ),
    "no facts": (lambda a: [{**a[0], "facts": []}], r"line 1.*facts, method.* are missing"),
    "an entry that was removed": (
        lambda a: [*a[:3], {**a[3], "entry": 4}],
        r"line 4.*entry=4: an entry comes with 'removed'",
    ),
    "pruned what is in force": (
        lambda a: [*a[:3], {**a[5], "pruned": [3]}],
        r"line 4.*pruned=3, expected an entry with no fact in force",
    ),
    "pruned what never was": (
        lambda a: [*a, {**a[5], "pruned": [8]}],
        r"line 7.*pruned=8, which is no entry before this line",
    ),
    "pruned again": (lambda a: [*a, a[5]], r"line 7.*pruned=2, expected .* with its files"),
    "pruned nothing": (lambda a: [*a, {**a[5], "pruned": []}], r"line 7.*pruned=\[\], expected"),
    "made on what never was": (
        lambda a: [a[0], {**a[1], "base_entries": [2]}],
        r"line 2.*base_entries=2, which is no entry before",
    ),
    "no time": (lambda a: [{**a[0], "when": "yesterday"}], r"line 1.*when='yesterday', expected a"),
    "a time of another type": (lambda a: [{**a[0], "when": 3}], r"line 1.*when=3, expected a text"),
    "an unknown event": (
        lambda a: [{**a[0], "what": "adopted"}],
        r"line 1.*what='adopted', expected 'added', 'rolled back', 'removed' or 'pruned'",
    ),
    "rolled back for nothing": (
        lambda a: [{**a[0], "what": "rolled back"}],
        r"line 1.*tripped=\[\], expected limits",
    ),
    "weights": (lambda a: [{**a[0], "weights": "all"}], r"line 1.*weights='all', expected a list"),
    "state": (lambda a: [{**a[0], "state": {"w": 1}}], r"line 1.*state.w=1, expected a text"),
    "canary": (
        lambda a: [{**a[0], "canary": {"norm_ratio": float("nan")}}],
        r"line 1.*canary.norm_ratio=nan, expected a finite number",
    ),
    "a fact": (
        lambda a: [{**a[0], "facts": [{**a[0]["facts"][0], "target": 3}]}],
        r"line 1.*facts\[0\].target=3, expected a text",
    ),
}


@pytest.mark.parametrize("how", CANNOT_HAVE_HAPPENED)
def test_a_history_that_cannot_have_happened(folder, how):
    change, message = CANNOT_HAVE_HAPPENED[how]
    write(folder, change(lines_of(folder)))
    with pytest.raises(EngramFileError, match=rf"history.jsonl, {message}") as error:
        Ledger.open(folder).list()
    assert "take the ledger from a backup" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: [a[0], a[2]],
        lambda a: [*a[:3], *a[4:]],  # a removed fact would be in force again
        lambda a: [a[0] | {"method": "rame"}, *a[1:]],
        lambda a: [*a[:3], a[3] | {"gone": [[1, 0]]}, *a[4:]],
        lambda a: [*a[:3], {k: v for k, v in a[3].items() if k != FIELD}, *a[4:]],
    ],
)
def test_a_line_that_was_changed_or_left_out_is_noticed(folder, change):
    write(folder, change(lines_of(folder)), stamped=True)
    with pytest.raises(EngramFileError, match=r"history.jsonl, line \d, is damaged"):
        Ledger.open(folder).list()


def test_a_history_of_an_older_engram_is_read_and_continued(folder, caplog):
    before = state(folder)
    write(folder, lines_of(folder))
    with caplog.at_level(logging.WARNING):
        assert state(folder) == before
    assert caplog.text.count("history.jsonl has no checksum") == 1
    Ledger.open(folder).remove(3)
    assert FIELD in lines_of(folder)[-1]
    assert Ledger.open(folder).list() == Ledger.open(folder).list()


@pytest.mark.parametrize("line", range(6))
@pytest.mark.parametrize("stamped", [True, False])
def test_any_value_of_a_line_may_be_wrong(folder, line, stamped):
    before, lines, refused = state(folder), lines_of(folder), 0
    record = lines[line] if stamped else {k: v for k, v in lines[line].items() if k != FIELD}
    texts = [json.dumps(other) for other in lines]
    if not stamped:
        write(folder, lines)
        texts = (folder / "history.jsonl").read_text().splitlines()
    for how, text in damaged_texts(record):
        changed = "\n".join([*texts[:line], text, *texts[line + 1 :]]) + "\n"
        (folder / "history.jsonl").write_text(changed, encoding="utf-8")
        expected = before if stamped else ANY  # without a checksum, another text is another event
        path = folder / "history.jsonl"
        refused += check_equal_or_refused(lambda: state(folder), expected, path, how)
    assert refused > 20


def test_any_value_of_the_header_may_be_wrong(folder):
    before, path = state(folder), folder / "ledger.json"
    for how, text in damaged_texts(json.loads(path.read_text(encoding="utf-8"))):
        path.write_text(text, encoding="utf-8")
        check_equal_or_refused(lambda: state(folder), before, path, how)


@pytest.mark.parametrize("name", ["ledger.json", "history.jsonl"])
def test_flipped_bits_are_noticed(folder, name):
    before, path = state(folder), folder / name
    data = path.read_bytes()
    for changed in flipped(data, 300):
        path.write_bytes(changed)
        if name == "history.jsonl" and data.startswith(changed[: changed.rfind(b"\n") + 1]):
            continue  # a line without its end has not happened
        check_equal_or_refused(lambda: state(folder), before, path, "flipped")


# -- links and pipes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ledger.json", "history.jsonl", "lock"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(folder, tmp_path, name, kind):
    victim, path = tmp_path / "victim", folder / name
    victim.write_bytes(path.read_bytes() if path.exists() else b"what somebody needs")
    before = victim.read_bytes()
    path.unlink(missing_ok=True)
    {
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(victim),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises(EngramError, match=path.name):
        Ledger.open(folder).remove(3)
    assert victim.read_bytes() == before


def test_folders_of_edits_stay_inside_the_ledger(folder, tmp_path):
    outside = Path(shutil.move(folder / "edits", tmp_path / "outside"))
    before = sorted(outside.rglob("*"))
    (folder / "edits").symlink_to(outside)
    for act in (Ledger.edit, Ledger.prune):
        with pytest.raises(EngramFileError, match="link that leaves"):
            act(Ledger.open(folder))
    (folder / "edits").unlink()
    (folder / "edits").mkdir()
    for path in outside.iterdir():
        (folder / "edits" / path.name).symlink_to(path)
    with pytest.raises(EngramFileError, match="link that leaves"):
        Ledger.open(folder).edit()
    (folder / "edits" / "0009").symlink_to(outside)
    with pytest.raises(EngramFileError, match="link that leaves"):
        Ledger.open(folder).prune()
    assert sorted(outside.rglob("*")) == before


def test_pruning_takes_links_and_files_away_and_not_what_they_lead_to(folder, tmp_path):
    outside = Path(shutil.copytree(folder / "edits", tmp_path / "outside"))
    before = sorted(outside.rglob("*"))
    (folder / "edits" / "0009").symlink_to(outside)
    (folder / "edits" / "note").write_text("note")
    Ledger.open(folder).prune()
    assert sorted(path.name for path in (folder / "edits").iterdir()) == ["0001", "0003"]
    assert sorted(outside.rglob("*")) == before


def test_facts_that_are_not_those_of_the_history_are_noticed(folder):
    path = folder / "edits" / "0001" / "edit.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record.pop(FIELD, None)
    record["facts"][0]["target"] = "City 99"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(EngramFileError, match="0001 is not the edit that was added"):
        Ledger.open(folder).edit()
