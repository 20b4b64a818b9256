"""A run holds each record once by each method, and no other run's; it goes on, grows and gets
further methods; see test_bench_kills.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch

import engram
from engram.benchmark import measure as measuring
from engram.benchmark import run
from engram.benchmark.data.records import Dataset
from engram.benchmark.results import UNEDITED, Run
from engram.benchmark.run import bench
from engram.bootstrap import Bootstrap
from engram.errors import EngramError, EngramFileError, FactError, SettingError
from engram.runs.workers import ByName
from tests.helpers.bench_samples import ASKED, METHODS, contents, dataset
from tests.helpers.tiny import tiny_lm

DATA = dataset(7)
QUICK = {"ultraedit": METHODS["ultraedit"]}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def start(lm, path, methods=METHODS, data=DATA, **more):
    return bench(lm, data, methods, path, **{"config": ASKED, "records_per_batch": 3} | more)


@pytest.fixture(scope="module")
def whole(lm, tmp_path_factory):
    """Both methods on all records, in one go."""
    path = tmp_path_factory.mktemp("run") / "whole"
    start(lm, path)
    return path


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copy(whole, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def measured(monkeypatch):
    """(label, places, whether the unedited model wrote texts) of every unit that is done from now
    on.
    """
    seen: list[tuple[str, list[int], bool]] = []
    do = run.RecordsJob.do

    def noted(self, state, unit):
        seen.append((unit.label, [at for at, _ in unit.records], unit.unedited_texts))
        return do(self, state, unit)

    monkeypatch.setattr(run.RecordsJob, "do", noted)
    return seen


def alike(one: Run, two: Run) -> None:
    """Require the same numbers up to the rounding of batches of other sizes, and the same words."""
    assert list(one.methods) == list(two.methods)
    for label, there in two.rows.items():
        assert one.rows[label].keys() == there.keys()
        for id, expected in there.items():
            mine = {name: value for name, value in one.rows[label][id].items() if name != "seconds"}
            assert mine == pytest.approx({name: expected[name] for name in mine}, abs=1e-5)
    for label, results in two.measured.items():
        for at, each in results.items():
            assert one.measured[label][at].after.texts == each.after.texts
            assert [r.answer for r in one.measured[label][at].after.readings] == [
                r.answer for r in each.after.readings
            ]


# -- what a run holds ------------------------------------------------------------------------------


def test_every_record_once_by_every_method_before_and_after(whole, lm):
    found = Run.open(whole)
    assert list(found.records.values()) == list(DATA.records)
    assert found.labels == [UNEDITED, *METHODS]
    assert [
        label for label in found.measured if list(found.measured[label]) == list(range(7))
    ] == list(METHODS)
    for label in METHODS:
        for at, each in found.measured[label].items():
            assert each.before == found.unedited[at]
            assert len(each.after.readings) == len(DATA.records[at].probes)
            assert each.after != each.before
            assert len(each.after.texts) == len(each.before.texts) == 2
            assert each.seconds > 0
            assert each.size > 0
    assert {at for at, each in found.unedited.items() if each.perplexity} == {0, 5}, (
        "every fifth, as was asked for"
    )


def test_the_numbers_are_those_of_measuring_each_record_by_itself(whole, lm):
    found = Run.open(whole)
    for label, settings in METHODS.items():
        units = [list(enumerate(DATA.records))[first : first + 3] for first in (0, 3, 6)]
        each = [
            measuring.measure(
                lm,
                measuring.Unit(tuple(unit), label, settings),
                ASKED,
                DATA.references,
                batched=False,
            )
            for unit in units
        ]
        for at, alone in enumerate(chain.from_iterable(each)):
            mine = found.measured[label][at]
            assert mine.after.texts == alone.after.texts
            for one, other in zip(mine.after.readings, alone.after.readings, strict=True):
                assert (one.wanted, one.unwanted) == pytest.approx(
                    (other.wanted, other.unwanted), abs=1e-5
                )
                assert one.answer == other.answer


def test_the_model_is_as_it_was(lm, tmp_path):
    before = {name: each.clone() for name, each in lm.model.state_dict().items()}
    start(lm, tmp_path / "run", limit=2)
    assert all(torch.equal(each, before[name]) for name, each in lm.model.state_dict().items())


def test_the_order_in_which_units_come_back_makes_no_difference(lm, whole, tmp_path, monkeypatch):
    class Backwards:
        def run(self, job, units):
            for number in reversed(range(len(units))):
                yield number, job.do(lm, units[number])

    monkeypatch.setattr(ByName, "of", lambda lm: lm)
    start(lm, tmp_path / "run", workers=Backwards())
    assert contents(tmp_path / "run") == contents(whole)


def test_where_an_edit_cannot_be_made_the_record_counts_with_the_unedited_models_scores(
    lm, tmp_path, monkeypatch
):
    made = measuring.rewrite_each

    def fails(lm, groups, *args, **settings):
        edits = made(lm, groups, *args, **settings)
        broken = FactError("subject 'bridge' is nowhere")
        return [
            broken if facts[0].subject == "bridge" else edit
            for facts, edit in zip(groups, edits, strict=True)
        ]

    monkeypatch.setattr(measuring, "rewrite_each", fails)
    found = start(lm, tmp_path / "run", QUICK, limit=3)
    assert found.errors("ultraedit") == {"1": "subject 'bridge' is nowhere"}
    failed = found.measured["ultraedit"][1]
    assert failed.after == failed.before
    assert failed.size == 0
    rows = found.rows
    assert rows["ultraedit"]["1"]["failed"] == 1
    assert rows["ultraedit"]["1"]["ES"] == rows[UNEDITED]["1"]["ES"]
    assert found.summary(Bootstrap(resamples=10))["ultraedit"]["failed"].mean == pytest.approx(
        1 / 3
    )
    assert found.card()["methods"]["ultraedit"]["errors"] == 1


def test_a_card_says_how_the_numbers_came_about(whole):
    card = Run.open(whole).card()
    assert json.loads(json.dumps(card)) == card
    assert card["model"] == "tiny-gpt2"
    assert card["dataset"] == "cities"
    assert card["config"]["seed"] == 0
    assert card["digest"] == DATA.digest
    assert len(card["identity"]) == 64
    assert card["methods"]["ft"]["settings"] == METHODS["ft"]
    assert card["methods"]["ft"]["records"] == card["records"] == 7
    assert card["methods"]["ft"]["seconds"] > 0
    (session,) = card["sessions"]
    assert {
        "began",
        "device",
        "cores",
        "threads",
        "records_per_batch",
        "system",
        "python",
        "engram",
        "torch",
    } <= session.keys()


# -- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 3, 4])
def test_a_run_that_was_interrupted_does_what_is_missing(lm, whole, tmp_path, measured, calls):
    left = iter(range(calls - 1))

    def interrupt(label, done, total):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(lm, tmp_path / "run", progress=interrupt)
    assert len(measured) == calls
    found = start(lm, tmp_path / "run")
    places = [(label, at) for label, units, _ in measured for at in units]
    assert sorted(places) == sorted((label, at) for label in METHODS for at in range(7))
    assert contents(tmp_path / "run") == contents(whole)
    assert len(found.sessions) == 2


def test_a_finished_run_has_nothing_to_do(lm, copy, measured):
    before = contents(copy)
    found = start(lm, copy)
    assert measured == []
    assert contents(copy) == before
    alike(found, Run.open(copy))


def test_progress_counts_records_those_that_were_there_included(lm, tmp_path):
    calls: list[tuple[str, int, int]] = []
    start(lm, tmp_path / "run", QUICK, limit=3)
    start(lm, tmp_path / "run", METHODS, progress=lambda *told: calls.append(told))
    assert calls == [
        ("ultraedit", 6, 7),
        ("ultraedit", 7, 7),
        ("ft", 3, 7),
        ("ft", 6, 7),
        ("ft", 7, 7),
    ]


def test_a_run_grows(lm, whole, tmp_path, measured):
    start(lm, tmp_path / "run", limit=4)
    measured.clear()
    grown = start(lm, tmp_path / "run", limit=7)
    assert {at for label, places, _ in measured for at in places if label == "ft"} == {4, 5, 6}
    alike(grown, Run.open(whole))
    assert contents(tmp_path / "run")["records"] == contents(whole)["records"]


def test_edits_that_depend_on_each_other_are_made_anew_when_their_batch_grows(
    lm, whole, tmp_path, measured
):
    assert engram.editors.methods.METHODS["ultraedit"].depends_on_batch
    start(lm, tmp_path / "run", limit=5)
    measured.clear()
    grown = start(lm, tmp_path / "run", limit=7)
    assert [places for label, places, _ in measured if label == "ultraedit"] == [[3, 4, 5], [6]]
    alike(grown, Run.open(whole))


def test_edits_that_depend_on_each_other_keep_to_their_batches(lm, copy, measured):
    with pytest.raises(
        SettingError, match=r"results of 'ultraedit'.*_batch\": 3.*this call gives .*_batch\": 4"
    ):
        start(lm, copy, records_per_batch=4)
    start(lm, copy, {"ft": METHODS["ft"]}, records_per_batch=4)
    assert measured == []


def test_fewer_records_are_no_other_run(lm, copy, measured):
    before = contents(copy)
    assert len(start(lm, copy, limit=2).records) == 7
    assert measured == []
    assert contents(copy) == before


def test_a_method_that_is_added_leaves_the_others_and_the_unedited_texts_alone(
    lm, whole, tmp_path, measured
):
    start(lm, tmp_path / "run", QUICK)
    there = contents(tmp_path / "run")
    assert all(texts for *_, texts in measured)
    measured.clear()
    start(lm, tmp_path / "run", {"ft": METHODS["ft"]})
    assert {label for label, *_ in measured} == {"ft"}
    assert not any(texts for *_, texts in measured), "texts of the unedited model are there already"
    now = contents(tmp_path / "run")
    assert now["unedited"] == there["unedited"]
    assert set(there["results"]) <= set(now["results"])
    assert now == contents(whole)


def test_one_method_with_two_settings_under_two_labels(lm, copy):
    found = start(
        lm,
        copy,
        {"ft": METHODS["ft"], "ft, long": {"method": "ft", "epochs": 6, "learning_rate": 0.05}},
        limit=2,
    )
    assert found.methods["ft, long"] == ("ft", {"epochs": 6, "learning_rate": 0.05})
    assert found.measured["ft, long"][0].after != found.measured["ft"][0].after


def test_methods_are_given_as_names_or_by_label(lm, copy, monkeypatch):
    monkeypatch.setattr(run, "_units", lambda *_: [])
    for methods in (
        ["in-context"],
        {"words": "in-context"},
        {"words too": {"method": "in-context"}, "ike": {}},
    ):
        start(lm, copy, methods)
    added = list(Run.open(copy).methods.items())[2:]
    assert added == [
        (label, (method, {}))
        for label, method in [
            ("in-context", "in-context"),
            ("words", "in-context"),
            ("words too", "in-context"),
            ("ike", "ike"),
        ]
    ]


def test_a_mistake_in_a_setting_does_not_take_its_label(lm, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(SettingError, match="epoch"):
        start(lm, path, {"ft": {"epoch": 3}}, limit=2)
    assert start(lm, path, {"ft": METHODS["ft"]}, limit=2).methods["ft"] == ("ft", METHODS["ft"])


def test_a_callers_own_mistake_is_not_the_files(lm, tmp_path):
    def gone(label, done, total):
        raise BrokenPipeError("the terminal is gone")

    with pytest.raises(BrokenPipeError, match="the terminal is gone"):
        start(lm, tmp_path / "run", QUICK, progress=gone)


# -- what is refused -------------------------------------------------------------------------------


def other_record(data: Dataset) -> Dataset:
    changed = replace(data.records[2], generation=("The river",))
    return replace(data, records=(*data.records[:2], changed, *data.records[3:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm": tiny_lm(seed=1)}, r"begun with identity='\w+', it is '\w+'"),
        ({"lm": tiny_lm("llama")}, r"begun with model='tiny-gpt2', it is 'tiny-llama'"),
        (
            {"lm": tiny_lm(dtype=torch.float64)},
            "begun with (dtype='float32', it is 'float64'|identity)",
        ),
        ({"data": replace(DATA, name="towns")}, "begun with dataset='cities', it is 'towns'"),
        ({"data": replace(DATA, form="zsre")}, "begun with form='counterfact', it is 'zsre'"),
        (
            {"data": other_record(DATA)},
            "begun with another data set: its record 2 is not '2' as it is now",
        ),
        ({"config": replace(ASKED, seed=1)}, r"begun with config=.*'seed': 0.*it is .*'seed': 1"),
        ({"config": replace(ASKED, texts=False)}, "begun with config="),
        (
            {"methods": {"ft": {"epochs": 4}}},
            r"of 'ft' with method 'ft' and .*\"epochs\": 3.*this call gives .*\"epochs\": 4",
        ),
        (
            {"methods": {"ft": {"method": "ft-l"}}},
            "this call gives 'ft-l' with {}. Choose another label",
        ),
    ],
    ids=[
        "weights",
        "family",
        "dtype",
        "data",
        "form",
        "record",
        "seed",
        "texts",
        "settings",
        "method",
    ],
)
def test_a_file_of_another_run_is_not_gone_on_with(
    lm, copy, measured, change: dict[str, Any], message
):
    before = contents(copy)
    given = {"lm": lm, "data": DATA, "methods": METHODS, **change}
    with pytest.raises(SettingError, match=message) as told:
        start(given.pop("lm"), copy, **given)
    assert str(copy) in str(told.value)
    assert measured == []
    assert contents(copy) == before


def test_an_edited_model_is_another_model(lm, copy):
    edit = engram.rewrite(lm, DATA.records[0].facts, "ultraedit", **METHODS["ultraedit"])
    with edit.applied(lm), pytest.raises(SettingError, match="begun with identity="):
        start(lm, copy)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": []}, "methods is empty; name at least one"),
        ({"methods": ["roem"]}, r"method='roem': expected .* \(did you mean 'rome'\?\)"),
        ({"records_per_batch": 0}, "records_per_batch=0: expected at least 1"),
        ({"limit": 0}, "limit=0: expected at least 1"),
        ({"limit": -1}, "limit=-1: expected at least 1"),
        ({"methods": {"ft": {"epochs": {3}}}}, r"settings of 'ft'.*JSON"),
    ],
)
def test_what_cannot_be_asked_for_is_told_before_a_file_is_made(lm, tmp_path, given, message):
    with pytest.raises(EngramError, match=message):
        start(lm, tmp_path / "run", **given)
    assert not list(tmp_path.iterdir())


def test_a_second_writer_is_refused_and_the_first_goes_on(lm, whole, tmp_path):
    path, refused = tmp_path / "run", []

    def meanwhile(label, done, total):
        if not refused:
            with pytest.raises(
                EngramError,
                match=r"run is being written by process \d+.*Wait until it is done, or write to "
                r"another",
            ):
                start(lm, path)
            refused.append(label)

    start(lm, path, progress=meanwhile)
    assert refused
    assert contents(path) == contents(whole)


def test_a_run_can_be_read_while_it_is_written(lm, tmp_path):
    path, counts = tmp_path / "run", []
    start(lm, path, QUICK, progress=lambda *_: counts.append(len(Run.open(path).rows["ultraedit"])))
    assert counts == [3, 6, 7]


def test_a_run_that_was_only_begun_can_be_read(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_units", lambda *_: [])
    found = start(lm, tmp_path / "run")
    assert found.labels == [UNEDITED]
    assert found.summary() == {}


def test_a_file_of_something_else_is_left_alone(lm, tmp_path):
    (tmp_path / "text").write_text("not a database, and longer than the header of one: " * 20)
    for name, table in (("other", "songs (title)"), ("alike", "results (title)")):
        sqlite3.connect(tmp_path / name).execute(f"CREATE TABLE {table}").connection.close()
    for name, message in (
        ("text", "file is not a database"),
        ("other", "something else"),
        ("alike", "no such table"),
    ):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(EngramFileError, match=rf"{name}\b.*{message}.*another name"):
            start(lm, tmp_path / name)
        with pytest.raises(EngramFileError, match=rf"{name}\b.*{message}"):
            Run.open(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_a_place_that_cannot_be_written_to(lm, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "run", tmp_path / "folder", ""):
        with pytest.raises(
            EngramFileError,
            match=r"cannot be used for a run of a benchmark: .*a folder that you may write to",
        ):
            start(lm, path)
    with pytest.raises(
        EngramFileError, match="gone is no file of a run; make one with engram bench -o gone"
    ):
        Run.open(tmp_path / "gone")


def test_a_lock_that_cannot_be_taken_is_told_with_the_files_name(lm, tmp_path):
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(
        EngramFileError, match=r"run cannot be used for a run of a benchmark: .*Is a directory"
    ):
        start(lm, tmp_path / "run")


def test_a_folder_that_is_not_there_is_made(lm, tmp_path):
    assert start(lm, tmp_path / "new" / "folder" / "run", QUICK, limit=1).path.is_file()


def test_a_file_that_another_program_holds(lm, copy, monkeypatch):
    plain = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: plain(*a, **{**k, "timeout": 0.05}))
    holder = plain(copy, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(
        EngramFileError, match="cannot be used for a run of a benchmark: database is locked"
    ):
        start(lm, copy)
    with pytest.raises(EngramFileError, match="database is locked"):
        Run.open(copy)
    holder.close()


def test_a_file_of_another_version(lm, copy):
    connection = sqlite3.connect(copy)
    with connection:
        connection.execute("UPDATE about SET value = '9' WHERE name = 'format_version'")
    connection.close()
    with pytest.raises(SettingError, match="begun with format_version=9, it is 1 now"):
        start(lm, copy)
    with pytest.raises(EngramFileError, match="has format version 9, this engram reads 1"):
        Run.open(copy)


def test_a_damaged_row_is_told_with_the_files_name(copy):
    connection = sqlite3.connect(copy)
    with connection:
        connection.execute("UPDATE results SET outcome = x'00' WHERE place = 3")
    connection.close()
    with pytest.raises(EngramFileError, match="table results, 3, is damaged: it is cut short"):
        Run.open(copy)


def test_what_a_kill_left_half_written_is_rolled_back_before_reading(copy, tmp_path):
    """A transaction larger than SQLite's memory is in the file before it is finished."""
    shutil.copy(copy, tmp_path / "writing")
    connection = sqlite3.connect(tmp_path / "writing", isolation_level=None)
    connection.execute("PRAGMA cache_size=2")
    connection.execute("BEGIN IMMEDIATE")
    for i in range(50):
        connection.execute(
            "INSERT INTO results VALUES ('half', ?, ?, 0, 0, NULL)", (i, b"x" * 5000)
        )
    shutil.copy(tmp_path / "writing", tmp_path / "killed")
    shutil.copy(tmp_path / "writing-journal", tmp_path / "killed-journal")
    connection.close()
    assert (tmp_path / "killed").read_bytes() != copy.read_bytes()
    assert Run.open(tmp_path / "killed").rows == Run.open(copy).rows
    assert contents(tmp_path / "killed") == contents(copy)
