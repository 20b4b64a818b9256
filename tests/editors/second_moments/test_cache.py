"""The cache of second moments: damage is measured again, and one that cannot be written costs time
only.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engram.editors.second_moments import measure
from engram.editors.second_moments.matrix import SecondMoment, load_npz
from engram.editors.second_moments.measure import second_moments
from engram.errors import EngramFileError
from engram.files import cache_folder
from tests.helpers.damage import check_equal_or_refused, damaged_texts, flipped
from tests.helpers.tiny import TEXT, tiny_lm

DOCUMENTS = [line.strip() for line in TEXT.split(". ")] * 3
KIND = "engram.second_moment"


def measured(folder: Path, tokens: int = 100) -> torch.Tensor:
    """Return C as another process would get it."""
    measure._MEMORY = OrderedDict()
    moments = second_moments(tiny_lm("gpt2"), [1], DOCUMENTS, tokens, cache_dir=folder)
    return moments[1].matrix_ff


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "c.safetensors"
    SecondMoment.from_matrix(torch.eye(3) * 2, 10, {"corpus": "x", "tokens": 10}).save(path)
    return path


def contents(path: Path) -> tuple:
    moment = SecondMoment.load(path)
    return moment.matrix_ff.tolist(), moment.count, moment.source


def rewritten(path: Path, entry: str, tensors: dict | None = None) -> None:
    save_file(load_file(path) if tensors is None else tensors, path, {KIND: entry})


def entry_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KIND])


def test_any_value_of_the_header_may_be_wrong(saved):
    before, record = contents(saved), entry_of(saved)
    for how, text in damaged_texts(record):
        rewritten(saved, text)
        check_equal_or_refused(lambda: contents(saved), before, saved, how)


def test_flipped_bits_are_noticed(saved):
    before, data = contents(saved), saved.read_bytes()
    for changed in flipped(data, 300):
        saved.write_bytes(changed)
        check_equal_or_refused(lambda: contents(saved), before, saved, "flipped")


def test_one_digit_of_the_matrix_is_noticed(saved):
    entry, tensors = json.dumps(entry_of(saved)), load_file(saved)
    tensors["matrix"][1, 2] += 1e-9
    rewritten(saved, entry, tensors)
    with pytest.raises(EngramFileError, match=r"c.safetensors is damaged: .*checksum"):
        SecondMoment.load(saved)


def test_a_file_of_an_older_engram_is_read_with_a_note(saved, caplog):
    before = contents(saved)
    rewritten(saved, json.dumps({"count": 10, "source": {"corpus": "x", "tokens": 10}}))
    assert contents(saved) == before
    assert "has no checksum" in caplog.text


@pytest.mark.parametrize(
    "matrix",
    [
        torch.eye(3),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(3, dtype=torch.float64),
        torch.full((3, 3), float("nan"), dtype=torch.float64),
        torch.ones(0, 0, dtype=torch.float64),
    ],
)
def test_a_matrix_of_another_kind_is_refused(saved, matrix):
    rewritten(saved, json.dumps({"count": 1, "source": {}}), {"matrix": matrix})
    with pytest.raises(EngramFileError, match=r"c.safetensors' is not a saved second moment"):
        SecondMoment.load(saved)


@pytest.mark.parametrize("read", [SecondMoment.load, load_npz])
def test_a_pipe_is_never_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngramFileError, match=r"pipe.*regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "another width", "a folder", "a pipe"])
def test_a_damaged_entry_is_measured_again_with_a_warning(tmp_path, caplog, how):
    before = measured(tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    data = path.read_bytes()
    path.unlink()
    {
        "cut": lambda: path.write_bytes(data[:-100]),
        "flipped": lambda: path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
        "empty": path.touch,
        "another width": lambda: SecondMoment.from_matrix(torch.eye(3), 9).save(path),
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
    }[how]()
    assert torch.equal(measured(tmp_path), before)
    assert "measuring it again" in caplog.text
    if how not in ("a folder", "a pipe"):  # what is no file of ours is not replaced
        assert torch.equal(SecondMoment.load(path).matrix_ff, before)


@pytest.mark.parametrize("place", ["a device", "a file", "a file above", "read-only"])
def test_a_cache_that_cannot_be_written_is_said_once_and_nothing_is_lost(tmp_path, caplog, place):
    folder = {"a device": Path("/dev/null")}.get(place, tmp_path / "cache")
    if place == "a file":
        folder.write_text("mine")
    elif place == "a file above":
        folder.write_text("mine")
        folder = folder / "below"
    elif place == "read-only":
        folder.mkdir()
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
    cache_folder._reported.clear()
    expected = measured(tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(measured(folder), expected)
    assert caplog.text.count("cannot be written") == 1
    assert "What is computed is used, but not kept" in caplog.text


def test_a_full_disk_loses_nothing(tmp_path, caplog, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    expected = measured(tmp_path / "other")
    cache_folder._reported.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        moments = second_moments(
            tiny_lm("gpt2"), [1], DOCUMENTS, 100, cache_dir=tmp_path, save_every=0
        )
    assert torch.equal(moments[1].matrix_ff, expected)
    assert caplog.text.count("No space left on device") == 1
    assert not list((tmp_path / "second_moments").iterdir())


MEASURES = """
import sys, torch
from pathlib import Path
from collections import OrderedDict
torch.set_num_threads(1)
from engram.editors.second_moments import measure
from tests.helpers.tiny import TEXT, tiny_lm
lm, folder = tiny_lm("gpt2"), Path(sys.argv[1])
documents = [line.strip() for line in TEXT.split(". ")] * 3
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    measure._MEMORY = OrderedDict()
    for path in folder.rglob("*.safetensors"):
        path.unlink(missing_ok=True)
    measure.second_moments(lm, [1], documents, 100, cache_dir=folder, save_every=0)
"""


def start(folder: Path, times: int) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-c", MEASURES, str(folder), str(times)]
    paths = os.pathsep.join([str(Path(measure.__file__).parents[4] / "src"), str(Path.cwd())])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_file_or_none(tmp_path):
    expected = measured(tmp_path / "other")
    folder = tmp_path / "cache"
    for attempt in range(5):
        with start(folder, 10_000) as process:
            time.sleep(0.2 + 0.037 * attempt)
            process.send_signal(signal.SIGKILL)
        for path in folder.rglob("*.safetensors"):
            assert torch.equal(SecondMoment.load(path).matrix_ff, expected)
        assert torch.equal(measured(folder), expected)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    measured(folder)
    left = [path.name for path in folder.rglob(".*.safetensors.new-*")]
    assert not left, "what killed writers of this name left is swept when it is written again"


@pytest.mark.slow
def test_two_processes_that_measure_the_same_both_succeed(tmp_path):
    with start(tmp_path, 20) as one, start(tmp_path, 20) as two:
        assert (one.wait(120), two.wait(120)) == (0, 0)
    (path,) = tmp_path.rglob("*.safetensors")
    assert torch.equal(SecondMoment.load(path).matrix_ff, measured(tmp_path / "other"))
