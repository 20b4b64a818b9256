"""Commands that are stopped: one line on what is kept, an exit code, and whole files."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import engram
from engram import cli
from tests.helpers.command_line import failing
from tests.helpers.tiny import tiny_folder

COMMAND = [sys.executable, "-c", "from engram.cli import main; main()"]
PROMPT = "The tower of Rome is in the city of"
SUBJECT = ["-s", "tower of Rome"]
FACT = ["-s", "tower of Rome", "-p", "The {} is in the city of", "-t", "Paris"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("models")))


def heed_signals() -> None:
    """Undo that whoever runs the tests in the background has us ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*args: str, **settings) -> subprocess.Popen:
    settings.setdefault("preexec_fn", heed_signals)
    return subprocess.Popen(
        [*COMMAND, *args],
        stdout=settings.pop("stdout", subprocess.PIPE),
        stderr=settings.pop("stderr", subprocess.PIPE),
        text=True,
        start_new_session=True,
        **settings,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Return the exit code and stderr of a command that ends by itself."""
    try:
        err = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    return process.returncode, err


def stopped(process: subprocess.Popen, when, number: int = signal.SIGINT) -> tuple[int, str]:
    """Send a signal to a command and its workers once `when` holds; see `ended`."""
    try:
        until = time.monotonic() + 200
        while not when():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, number)
        return ended(process)
    finally:
        process.kill()


# A command that waits where the code it is given says, as a long one would.
WAITS = """
import sys, time
sys.argv = ["engram", *sys.argv[1:]]
def wait(*_, **__):
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)
{patch}
from engram.cli import main
main()
"""
LOAD = "import engram; engram.load = wait"
IMPORT = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            wait()
sys.meta_path.insert(0, Finder())
"""
SWALLOWED = """
import engram
def wrapped(*_, **__):
    try:
        wait()
    except BaseException as error:
        raise ValueError("an error of another library") from None
engram.load = wrapped
"""
CLEANUP = """
import engram
def slow(*_, **__):
    try:
        wait()
    finally:
        print("cleaning", file=sys.stderr, flush=True)
        time.sleep(60)
engram.load = slow
"""


def waiting(patch: str, *args: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(patch=patch), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    assert process.stderr is not None and process.stderr.readline() == "waiting\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("patch", [LOAD, IMPORT, SWALLOWED])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_command_in_one_line(
    patch: str, number: int, code: int, tmp_path: Path
) -> None:
    args = ["trace", "pocket", "The tower", "-s", "tower", "-o", str(tmp_path / "a.png")]
    process = waiting(patch, *args)
    process.send_signal(number)
    assert ended(process) == (code, "engram: stopped; nothing was written\n")
    assert not list(tmp_path.iterdir()), "no lock, no temporary file"


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    process = waiting(CLEANUP, "knows", "pocket", "-o", str(tmp_path / "a.json"))
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "cleaning\n"
    process.send_signal(signal.SIGINT)  # one press of the key may arrive twice
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, err = ended(process)
    assert code == 130 and err == "engram: stopped at once; what was being written is gone\n"


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `nohup` and a script's & do

    process = start("plan", "pocket", preexec_fn=ignore)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert ended(process) == (0, "")


def rows(path: Path, table: str) -> int:
    import sqlite3

    try:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as connection:
            return connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    except sqlite3.Error:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["--workers", "ray"]])
def test_a_run_that_is_stopped_says_how_much_is_kept(workers: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run.sqlite"
    small = ["-n", "400", "--records-per-batch", "2"]  # the first records are kept soon
    options = ["bench", "--method", "ft", *small, "-o", str(run), *workers]
    code, err = stopped(start(*options), lambda: rows(run, "results") > 0)
    assert code == 130
    match = re.fullmatch(
        r"engram: stopped; (\d+) of 400 records of ft are kept in .*run.sqlite; run the same "
        r"command again to resume\n",
        err[err.index("engram: stopped") :],
    )
    assert match and int(match[1]) == rows(run, "results") > 0
    assert "Traceback" not in err


@pytest.mark.slow
def test_an_average_that_is_stopped_says_how_much_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["average", "pocket", "--facts", "pocket", "-o", str(run)]
    code, err = stopped(start(*options), lambda: rows(run / "traces.sqlite", "facts") > 0)
    kept = rows(run / "traces.sqlite", "facts")
    assert code == 130 and kept > 0 and "Traceback" not in err
    assert f"engram: stopped; {kept} facts are kept in {run / 'traces.sqlite'}; run the" in err


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["trace", "MODEL", PROMPT, *SUBJECT, "--samples", "1", "-o", "a.png"], "probability"),
        (["trace", "MODEL", PROMPT, *SUBJECT, "--samples", "1", "--save", "a"], "probability"),
        (["lens", "MODEL", PROMPT, "-o", "a.png"], "layer"),
        (["knows", "MODEL", "--limit", "2", "-o", "a.json"], "all facts"),
        (
            ["edit", "MODEL", *FACT, "--method", "ft", "--set", "epochs=1", "-o", "a"],
            "FAILED; the model",
        ),
    ],
)
def test_a_disk_that_becomes_full_costs_the_file_and_not_the_result(
    args: list[str],
    shown: str,
    model: str,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = engram.load

    def fill(*given, **settings):
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return load(*given, **settings)

    monkeypatch.setattr(engram, "load", fill)
    monkeypatch.setattr(sys, "argv", ["engram", *(model if a == "MODEL" else a for a in args)])
    monkeypatch.chdir(disk)
    (disk / "kept").write_text("kept")
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and shown in out, err
    line = err.splitlines()[-1]
    assert re.search(r"\. (The result is printed|What was measured so far is kept)", line), line
    assert line.startswith("engram: could not write ") and "No space left on device" in line
    assert {path.name for path in disk.iterdir()} - {"a"} == {"ballast", "kept"}
    assert not (disk / "a").exists() or not any((disk / "a").iterdir())


def test_a_read_only_folder_is_an_error_before_the_work(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for args in (
        ["knows", "nix", "-o", f"{disk}/a.json"],
        ["edit", "nix", *FACT, "-o", f"{disk}/a"],
    ):
        assert "Read-only file system" in failing(monkeypatch, capsys, *args)


def test_a_full_stdout_is_an_error() -> None:
    with Path("/dev/full").open("w") as file:
        code, err = ended(start("plan", "pocket", stdout=file))
    assert (code, err) == (2, "engram: stdout: No space left on device\n")


def test_a_closed_stdout_is_an_error() -> None:
    process = start("plan", "pocket", stdout=None, preexec_fn=lambda: os.close(1))
    code, err = ended(process)
    assert code == 2 and err.startswith("engram: stdout is closed, and results are printed there")


def test_a_pipe_that_is_closed_is_no_error() -> None:
    reading, writing = os.pipe()
    process = start("--help", stdout=writing)
    os.close(writing)
    os.close(reading)
    assert ended(process) == (0, "")


def test_letters_that_stdout_lacks_are_written_all_the_same() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    code, err = ended(start("data", "list", env=environment))
    assert (code, err) == (0, "")


SAVES = """
import sys
from pathlib import Path
from matplotlib.figure import Figure
from engram.cli import outputs
text, picture = map(Path, sys.argv[1:])
print("ready", flush=True)
for number in range(10**9):
    outputs.write_text(f"{number % 10}" * 100_000, text)
    outputs.draw(lambda: Figure(figsize=(1 + number % 3, 1)), picture)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_files_and_the_next_one_sweeps(tmp_path: Path) -> None:
    from PIL import Image

    from engram.cli import outputs

    text, picture = tmp_path / "a.txt", tmp_path / "a.png"
    for attempt in range(4):
        command = [sys.executable, "-c", SAVES, str(text), str(picture)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(1 + 0.137 * attempt)
            process.kill()
        assert not text.exists() or re.fullmatch(r"(\d)\1{99999}\n", text.read_text())
        if picture.exists():
            Image.open(picture).load()
    outputs.write_text("new", text)
    outputs.draw(Figure, picture)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.txt"]
