"""Files that are written whole or not at all; for folders see tests/edit/test_files.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import engram
from engram.errors import EngramFileError
from engram.files.atomic import atomic_file


def test_the_file_is_replaced_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_file(path) as fresh:
        fresh.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def broken() -> None:
        with atomic_file(path) as fresh:
            fresh.write_text("half")
            raise error

    with pytest.raises(error):
        broken()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(EngramFileError, match=r"could not write .*No space.*unchanged; free some"),
        atomic_file(tmp_path / "a.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(EngramFileError, match=r"could not write .*choose a folder that exists"),
        atomic_file(tmp_path / "missing" / "a.txt"),
    ):
        raise AssertionError("the block does not begin")


def test_what_a_killed_writer_left_is_removed_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".a.txt.new-xyz"
    left.write_text("half")
    for stale, expected in ((3600.0, True), (-1.0, False)):
        monkeypatch.setattr("engram.files.atomic._STALE_S", stale)
        with atomic_file(tmp_path / "a.txt") as fresh:
            fresh.write_text("new")
        assert left.exists() == expected


SAVES = """
import sys
from engram.locate.trace import CausalTrace
traces = [CausalTrace.load(path) for path in sys.argv[1:3]]
print("ready", flush=True)
while True:
    for trace in traces:
        trace.save(sys.argv[3])
"""


def test_a_killed_save_of_a_trace_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    lm = engram.load("pocket")
    prompt = "The Space Needle is located in the city of"
    paths = [tmp_path / name for name in ("0", "1", "trace")]
    for seed, path in enumerate(paths[:2]):
        settings = {"samples": 1, "seed": seed, "sites": ["residual"], "positions": "last"}
        engram.trace(lm, prompt, subject="Space Needle", **settings).save(path)
    paths[2].write_bytes(paths[0].read_bytes())
    command = [sys.executable, "-c", SAVES, *map(str, paths)]
    for attempt in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(0.03 + 0.0137 * attempt)
            process.send_signal(signal.SIGKILL)
        assert paths[2].read_bytes() in [path.read_bytes() for path in paths[:2]]
