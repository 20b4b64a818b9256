"""Files of traces: every field is read by its form, tables fit each other, one digit is noticed."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import engram
from engram.errors import EngramFileError
from engram.locate.average import AverageTrace
from engram.locate.trace import CausalTrace
from engram.locate.trace_store import StoredRow, TraceStore
from tests.helpers.damage import check_equal_or_refused, damaged_texts, flipped
from tests.helpers.tiny import tiny_lm

KIND = "engram.trace"
PROMPT = {"prompt": "Rome is in the city of", "subject": "Rome"}


@pytest.fixture(scope="module")
def trace() -> CausalTrace:
    settings = {"sites": ["mlp", "neuron"], "neurons": [(0, 1), (1, 2)], "samples": 1}
    return engram.trace(tiny_lm("gpt2"), **PROMPT, **settings)


def entry_of(trace: CausalTrace) -> dict:
    data = trace.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"][KIND])


def rebuilt(trace: CausalTrace, entry: str, **tables: torch.Tensor) -> bytes:
    return save_tensors(load_tensors(trace.to_bytes()) | tables, {KIND: entry})


def test_any_value_may_be_wrong(trace, tmp_path):
    path = tmp_path / "trace"
    for how, text in damaged_texts(entry_of(trace)):
        path.write_bytes(rebuilt(trace, text))
        check_equal_or_refused(lambda: CausalTrace.load(path).to_dict(), trace.to_dict(), path, how)


def test_flipped_bits_are_noticed(trace, tmp_path):
    path = tmp_path / "trace"
    for changed in flipped(trace.to_bytes(), 300):
        path.write_bytes(changed)
        check_equal_or_refused(
            lambda: CausalTrace.load(path).to_dict(), trace.to_dict(), path, "flipped"
        )


def test_one_digit_of_a_table_is_noticed(trace):
    table = trace.scores["mlp"].clone()
    table[0, 0] += 1e-4
    data = rebuilt(trace, json.dumps(entry_of(trace)), mlp=table)
    with pytest.raises(EngramFileError, match=r"t is damaged: its tensors are not .*checksum"):
        CausalTrace.from_bytes(data, "t")


def test_a_trace_of_an_older_engram_is_read_with_a_note(trace, caplog):
    old = {k: v for k, v in entry_of(trace).items() if k not in ("tensors", "checksum")}
    again = CausalTrace.from_bytes(rebuilt(trace, json.dumps(old)), "an old trace")
    assert again.to_dict() == trace.to_dict()
    assert "an old trace has no checksum" in caplog.text


@pytest.mark.parametrize(
    ("fields", "tables", "message"),
    [
        ({"tokens": ["a"]}, {}, r"positions of 1 tokens"),
        ({"positions": [0]}, {}, r"1 positions of \d+ tokens"),
        ({"subject_range": [3, 3]}, {}, r"subject_range=\[3, 3\], expected a first token"),
        ({"subject_range": [0, 2**40]}, {}, r"subject_range\[1\]=\d+, expected at most"),
        ({"low_score": float("nan")}, {}, r"low_score=nan, expected a finite number"),
        ({"window": 0}, {}, r"window=0, expected at least 1"),
        ({"method": "guessed"}, {}, r"method='guessed', expected 'exact'"),
        ({"tables": ["mlp"]}, {}, r"its tables are"),
        ({"tables": ["mlp", "neuron", "more"]}, {}, r"its tables are"),
        ({}, {"mlp": torch.zeros(1, 2)}, r"table 'mlp' is \[1, 2\] .* a row of float32 for each"),
        ({}, {"mlp": torch.zeros(7, 2, dtype=torch.int64)}, r"table 'mlp' is"),
        ({}, {"neuron": torch.zeros(7, 5)}, r"table 'neuron' .* of 2 neurons|table 'neuron' is"),
        ({}, {"exact: mlp": torch.zeros(2, 2, dtype=torch.bool)}, r"'exact: mlp' is not of the"),
    ],
)
def test_fields_and_tables_fit_each_other(trace, fields, tables, message):
    old = {k: v for k, v in entry_of(trace).items() if k not in ("tensors", "checksum")}
    data = rebuilt(trace, json.dumps(old | fields), **tables)
    with pytest.raises(EngramFileError, match=rf"t is damaged: .*{message}"):
        CausalTrace.from_bytes(data, "t")


@pytest.mark.parametrize("name", ["direction", "effect", "metric", "neurons"])
def test_settings_that_pictures_read_have_their_types(trace, name):
    old = {k: v for k, v in entry_of(trace).items() if k not in ("tensors", "checksum")}
    old["settings"] = old["settings"] | {name: 3}
    with pytest.raises(EngramFileError, match=rf"t, settings, is damaged: {name}=3, expected"):
        CausalTrace.from_bytes(rebuilt(trace, json.dumps(old)), "t")


def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngramFileError, match="expected a regular file"):
        CausalTrace.load(tmp_path / "pipe")
    with pytest.raises(EngramFileError, match="expected a regular file"):
        AverageTrace.load(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trace = x'00'", "is not a saved causal trace"),
        ("trace = 'text'", "table facts, is damaged: trace='text', expected bytes"),
        ("number = -1", "number=-1, expected at least 0"),
        ("number = 'a'", "number='a', expected a whole number"),
        ("key = x'00'", "key=b'.x00', expected a text"),
        ("prompt = x'00'", "prompt=b'.x00', expected a text"),
        ("skipped = x'00', trace = NULL", "skipped=b'.x00', expected a text"),
    ],
)
def test_a_damaged_row_of_a_run_names_table_and_column(trace, tmp_path, change, message):
    path = tmp_path / "run"
    with TraceStore.writing(path, {}) as store:
        store.add([StoredRow("a", 0, "Rome is in", None, trace)])
    assert len(AverageTrace.load(path).traces) == 1
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(f"UPDATE facts SET {change}")
    with pytest.raises(EngramFileError, match=message) as error:
        AverageTrace.load(path)
    assert str(path) in str(error.value)
