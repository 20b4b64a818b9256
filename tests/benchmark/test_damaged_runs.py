"""A run file that somebody else changed: every field is read by its type, and no database runs code
or leads to other files.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from engram import Fact
from engram.benchmark.data.records import Record
from engram.benchmark.metrics.outcomes import Measured, Outcome
from engram.benchmark.results import Run
from engram.benchmark.store import RunStore
from engram.errors import EngramFileError, SettingError
from engram.evaluate.probes import Reading
from tests.helpers.damage import check_equal_or_refused, damaged_texts, flipped

ABOUT = {
    "model": "m",
    "identity": "0" * 64,
    "dtype": "float32",
    "dataset": "d",
    "form": "counterfact",
    "config": {"answer_tokens": 5, "texts": False, "text_tokens": 100, "drift_every": 10}
    | {"seed": 0, "reference": False},
}
FACT = Fact(
    "Rome", "{} is in", "France", "Italy", ("Where is Rome? In",), (("Oslo is in", "Norway"),)
)


def outcome(wanted: float) -> Outcome:
    readings = tuple(Reading(wanted, 2.5, 0.5, "France", kl) for kl in (None, None, 0.25))
    return Outcome(readings, ("Rome is",), 5.5, 0.5, None, None, 30.5, 0.125)


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "run"
    with RunStore.writing(path, ABOUT) as store:
        store.add_records([Record.from_fact(str(i), FACT, generation=("Rome",)) for i in range(2)])
        store.add_method("rome", "rome", {"layer": 3})
        store.begin_session("2026-01-01T00:00:00+00:00", {"cores": 2})
        rows = [(i, Measured(str(i), outcome(0.5), outcome(0.25), 1.5, 100)) for i in range(2)]
        store.add("rome", rows, texts=True)
    return path


def contents(path: Path) -> Any:
    run = Run.open(path)
    own = (run.about, run.sessions, run.methods, run.records, run.unedited, run.measured)
    return own, run.rows, run.card(), [run.failures(label) for label in run.measured]


def change(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(statement, values)


def packed(text: str) -> bytes:
    return zlib.compress(text.encode())


COLUMNS = [
    ("about", "value"),
    ("sessions", "began"),
    ("sessions", "machine"),
    ("records", "id"),
    ("records", "record"),
    ("methods", "label"),
    ("methods", "method"),
    ("methods", "settings"),
    ("unedited", "outcome"),
    ("results", "outcome"),
    ("results", "seconds"),
    ("results", "size"),
    ("results", "error"),
]


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_value_of_another_type_names_its_table(path, table, column):
    change(path, f"UPDATE {table} SET {column} = ? WHERE rowid = 1", b"\xff\x00")
    with pytest.raises(EngramFileError, match=rf"run, table {table},.* is damaged: ") as error:
        contents(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("results", "seconds", -1.0),
        ("results", "seconds", float("inf")),
        ("results", "seconds", "long"),
        ("results", "size", -1),
        ("results", "size", 1.5),
        ("records", "id", "another"),
        ("sessions", "machine", "3"),
        ("methods", "settings", "[]"),
        ("methods", "settings", "[" * 100_000),
    ],
)
def test_a_value_out_of_its_range_names_its_table(path, table, column, value):
    change(path, f"UPDATE {table} SET {column} = ? WHERE rowid = 1", value)
    with pytest.raises(EngramFileError, match=rf"run, table {table},.* is damaged: "):
        contents(path)


PACKED = [("records", "record"), ("unedited", "outcome"), ("results", "outcome")]


@pytest.mark.parametrize(("table", "column"), PACKED)
def test_any_value_of_what_is_packed_may_be_wrong(path, table, column):
    with closing(sqlite3.connect(path)) as file:
        (data,) = file.execute(f"SELECT {column} FROM {table} WHERE place = 1").fetchone()
    refused = 0
    for how, text in damaged_texts(json.loads(zlib.decompress(data))):
        change(path, f"UPDATE {table} SET {column} = ? WHERE place = 1", packed(text))
        refused += check_equal_or_refused(lambda: contents(path), ANY, path, how)
    assert refused > 100


@pytest.mark.parametrize("name", ABOUT)
def test_any_value_of_the_settings_may_be_wrong(path, name):
    before = contents(path)
    for how, text in damaged_texts({name: ABOUT[name]}):
        value = json.loads(text).get(name) if text.startswith("{") and "[[" not in text else None
        change(path, "UPDATE about SET value = ? WHERE name = ?", json.dumps(value), name)
        check_equal_or_refused(lambda: contents(path), before, path, how)


def test_a_setting_that_was_changed_is_noticed(path):
    change(path, "UPDATE about SET value = '\"other\"' WHERE name = 'model'")
    with pytest.raises(EngramFileError, match=r"run, table about, is damaged: .*checksum"):
        Run.open(path)


def test_a_run_of_an_older_engram_is_read(path, caplog):
    before = contents(path)
    change(path, "DELETE FROM about WHERE name = 'checksum'")
    assert contents(path) == before
    assert "has no checksum" in caplog.text


def test_flipped_bits_never_give_another_exception(path):
    data = path.read_bytes()
    for changed in flipped(data, 400):
        path.write_bytes(changed)
        check_equal_or_refused(lambda: contents(path), ANY, path, "flipped")


def test_what_unpacks_to_more_than_a_row_can_hold_is_refused(path):
    change(path, "UPDATE results SET outcome = ?", zlib.compress(b" " * (1 << 26)))
    with pytest.raises(EngramFileError, match="0, is damaged: it is larger than any"):
        Run.open(path)


def test_readings_fit_the_probes_of_their_record(path):
    fewer = json.dumps(Outcome((Reading(1.0, 2.0, 0.5),)).to_dict())
    change(path, "UPDATE unedited SET outcome = ? WHERE place = 1", packed(fewer))
    with pytest.raises(EngramFileError, match=r"'unedited' has 1 readings at place 1.* 3 probes"):
        Run.open(path)
    change(path, "UPDATE unedited SET place = 7 WHERE place = 1")
    with pytest.raises(EngramFileError, match="at place 7, which has no record"):
        Run.open(path)


HOSTILE = {
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON results BEGIN DELETE FROM records; END",
    "a view": "CREATE VIEW songs AS SELECT * FROM results",
    "another table": "CREATE TABLE songs (title)",
    "an index": "CREATE INDEX i ON results (seconds)",
    "a column": "ALTER TABLE results ADD COLUMN more TEXT",
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_database_with_more_than_a_run_is_refused(path, how):
    change(path, HOSTILE[how])
    for use in (Run.open, lambda path: RunStore.writing(path, ABOUT).__enter__()):
        with pytest.raises(EngramFileError, match=r"run cannot be used .*(no run has|no such)"):
            use(path)


@pytest.mark.parametrize("table", ["about", "records", "methods", "unedited", "sessions"])
def test_a_view_in_a_tables_place_is_refused(path, table):
    change(path, f"ALTER TABLE {table} RENAME TO was")
    change(path, f"CREATE VIEW {table} AS SELECT * FROM was")
    with pytest.raises(EngramFileError, match=f"no such table as ours: {table}"):
        Run.open(path)
    change(path, f"DROP VIEW {table}")
    with pytest.raises(EngramFileError, match=f"no such table as ours: {table}"):
        Run.open(path)


@pytest.mark.parametrize("end", ["", "-journal", "-wal", ".lock"])
def test_pipes_and_links_are_refused_and_never_waited_for(path, tmp_path, end):
    victim, place = tmp_path / "victim", path.with_name(path.name + end)
    victim.write_text("what somebody needs")
    kinds = ["pipe"] if not end else ["pipe", "link"]
    for kind in kinds:
        place.unlink(missing_ok=True)
        os.mkfifo(place) if kind == "pipe" else place.symlink_to(victim)
        with pytest.raises(EngramFileError, match="regular file"), RunStore.writing(path, ABOUT):
            raise AssertionError("it was opened")
        if end != ".lock":
            with pytest.raises(EngramFileError, match="regular file"):
                Run.open(path)
    assert victim.read_text() == "what somebody needs"


def test_a_journal_that_names_another_file_deletes_nothing(path, tmp_path):
    """SQLite removes the file that the journal of several databases names, once it was used."""
    victim = tmp_path / "victim"
    victim.write_text("what somebody needs")
    name, mark = str(victim).encode(), bytes.fromhex("d9d505f920a163d7")
    size = path.stat().st_size // 4096
    head = mark + b"".join(n.to_bytes(4, "big") for n in (0, 0, size, 512, 4096))
    check = sum(int.from_bytes([b], "big", signed=True) for b in name) % (1 << 32)
    page = (1 + (1 << 30) // 4096).to_bytes(4, "big")
    end = page + name + len(name).to_bytes(4, "big") + check.to_bytes(4, "big") + mark
    path.with_name("run-journal").write_bytes(head.ljust(512, b"\0") + end)
    with pytest.raises(EngramFileError, match="run-journal is no journal of a run"):
        Run.open(path)
    assert victim.exists()


def test_another_run_is_still_told_from_damage(path):
    with (
        pytest.raises(SettingError, match="was begun with model='m', it is 'n' now"),
        RunStore.writing(path, {**ABOUT, "model": "n"}),
    ):
        raise AssertionError("it was opened")
