"""Outputs are tried before the work and written whole; nothing is lost when one cannot be."""

from __future__ import annotations

import os
import re
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from matplotlib.figure import Figure

import engram
from engram.cli import outputs
from engram.edit import folder_format, lora_export
from engram.errors import EngramFileError
from engram.files.atomic import reserved
from tests.helpers.command_line import failing

MODEL = "no-such-model"  # its error would come next
FACT = ["-s", "Eiffel Tower", "-p", "{} is in the city of", "-t", "Rome"]
TRACE = ["trace", MODEL, "The Eiffel Tower is in", "-s", "Eiffel Tower"]
# Every option that names an output, and the ending of a file; "/": a folder, "/*": one for files
OUTPUTS = {
    "trace -o": ([*TRACE, "-o"], ".png"),
    "trace --save": ([*TRACE, "--save"], ".safetensors"),
    "average -o": (["average", MODEL, "--facts", "pocket", "-o"], "/*"),
    "lens -o": (["lens", MODEL, "text", "-o"], ".pdf"),
    "refinement -o": (["refinement", MODEL, "text", "-o"], ".svg"),
    "memories -o": (["memories", MODEL, "text", "-l", "1", "-o"], ".png"),
    "knows -o": (["knows", MODEL, "-o"], ".json"),
    "layers -o": (["layers", MODEL, "-o"], ".json"),
    "layers --plot": (["layers", MODEL, "--plot"], ".png"),
    "edit -o": (["edit", MODEL, *FACT, "-o"], "/"),
    "apply -o": (["apply", "no-such-edit", MODEL, "-o"], "/"),
    "revert -o": (["revert", "no-such-checkpoint", "-o"], "/"),
    "export --peft": (["export", "no-such-edit", "--peft"], "/"),
    "export --gguf": (["export", "no-such-edit", "--gguf"], ".gguf"),
    "stats -o": (["stats", MODEL, "-o"], "/*"),
    "bench -o": (["bench", "-m", MODEL, "-o"], ".sqlite"),
    "report -o": (["report", "no-such-run", "-o"], ".md"),
    "report -f csv": (["report", "no-such-run", "-f", "csv", "-o"], ".csv"),
    "report -f parquet": (["report", "no-such-run", "-f", "parquet", "-o"], ".parquet"),
    "report --plot": (["report", "no-such-run", "--plot"], ".png"),
    "report --plot-layers": (["report", "no-such-run", "--plot-layers"], ".png"),
    "demo -o": (["demo", "-o"], "/*"),
    "data build": (["data", "build", "--facts", "f", "--templates", "t", "-o"], ".json"),
    "data filter": (["data", "filter", "pocket", "--known-to", MODEL, "-o"], ".json"),
    "ledger create": (["ledger", "create", "--", MODEL], "/"),
    "ledger show -o": (["ledger", "show", "no-such-ledger", "1", "-o"], "/"),
    "ledger apply": (["ledger", "apply", "no-such-ledger", "-o"], "/"),
    "ledger export": (["ledger", "export", "no-such-ledger", "--peft"], "/"),
    "ledger export --gguf": (["ledger", "export", "no-such-ledger", "--gguf"], ".gguf"),
}
NAMED = {"--out", "--save", "--plot", "--plot-layers", "--peft", "--gguf"}
FILES = [option for option, (_, kind) in OUTPUTS.items() if "/" not in kind]
FOLDERS = [option for option, (_, kind) in OUTPUTS.items() if kind == "/"]
# name of a fault -> (where it may be, what the error says)
FAULTS = {
    "under a file": (OUTPUTS, "Not a directory|File exists"),
    "a folder with files": (FILES + FOLDERS, "a folder, a pipe or a device|holds other files"),
    "a pipe": (OUTPUTS, "a pipe|is a file|File exists|Not a directory"),
    "a device": (OUTPUTS, "ends in ''|a device|is a file|File exists|Not a directory"),
    "a missing folder": (sorted({*FILES} - {"bench -o"}), "No such file or directory"),
    "the ending of something else": (FILES, "expected a name that ends in"),
    "another writer": (OUTPUTS, rf"is being written by process {os.getpid()}\. "),
    "no free space": (OUTPUTS, "needs 0 MB and 0 MB are free"),
    "a name too long": (FILES + FOLDERS, "[Nn]ame too long"),
}
CASES = [(option, fault) for fault, (options, _) in FAULTS.items() for option in options]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded before the outputs are tried")

    monkeypatch.setattr(engram, "load", load)


def first_file(option: str, path: Path) -> Path:
    """Return the first name that is written for an output."""
    names = {"average -o": "summary.json", "stats -o": "layers", "demo -o": "edit"}
    return path / names[option] if option in names else path


@contextmanager
def prepared(option: str, fault: str, folder: Path) -> Iterator[Path]:
    """Make a fault within the block, and yield the name that has it."""
    kind = OUTPUTS[option][1]
    path = folder / ("a" + kind.rstrip("/*"))
    if fault == "under a file":
        (folder / "file").write_text("file")
        path = folder / "file" / path.name
    elif fault == "a folder with files":
        path.mkdir()
        (path / "thesis.txt").write_text("thesis")
    elif fault == "a pipe":
        os.mkfifo(path)
    elif fault == "a device":
        path = Path("/dev/null")
    elif fault == "a missing folder":
        path = folder / "missing" / path.name
    elif fault == "the ending of something else":
        path = folder / ("a.png" if kind == ".csv" else "a.csv")
    elif fault == "a name too long":
        path = folder / ("a" * (250 - len(path.suffix)) + path.suffix)
    if fault != "another writer":
        yield path
        return
    first = first_file(option, path)
    first.parent.mkdir(exist_ok=True)
    begun, done = Event(), Event()

    def write() -> None:
        with reserved(first):
            begun.set()
            done.wait(60)

    with ThreadPoolExecutor(1) as other:
        writing = other.submit(write)
        assert begun.wait(60)
        try:
            yield path
        finally:
            done.set()
        writing.result()


@pytest.mark.parametrize(("option", "fault"), CASES)
def test_an_output_that_cannot_be_written_is_an_error_before_the_work(
    option: str,
    fault: str,
    no_model: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if fault == "no free space":
        usage = namedtuple("usage", "free")
        monkeypatch.setattr("engram.files.atomic.shutil.disk_usage", lambda _: usage(0))
    with prepared(option, fault, tmp_path) as path:
        before = sorted(tmp_path.rglob("*"))
        args = OUTPUTS[option][0]
        at = args.index("--") if "--" in args else len(args)  # an argument, and no option
        told = failing(monkeypatch, capsys, *args[:at], str(path), *args[at + 1 :])
        assert sorted(tmp_path.rglob("*")) == before
    assert re.search(FAULTS[fault][1], told), told
    assert told.startswith("engram: ") and told.count("\n") == 1, told


def test_every_output_of_the_command_line_is_in_these_tests() -> None:
    import typer

    from engram import cli

    def written(command, verb: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for name, sub in getattr(command, "commands", {}).items():
            yield from written(sub, (*verb, name))
        for parameter in command.params:
            if {"--out", "--save", "--plot", "--plot-layers", "--peft", "--gguf"} & {
                *parameter.opts
            }:
                yield verb

    tested = [args for args, _ in OUTPUTS.values()]
    for verb in written(typer.main.get_command(cli.app)):
        assert any(args[: len(verb)] == [*verb] for args in tested), verb


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*TRACE, "-o", "a.png", "--save", "./a.png"], "would both be written to a.png"),
        (["layers", MODEL, "-o", "a", "--plot", "b/../a.png"], "No such file|a.png"),
        (["report", "run", "-o", "run"], "run is read by this command and would be lost"),
        (["knows", MODEL, "--facts", "f.json", "-o", "./f.json"], "f.json is read by"),
        (["layers", MODEL, "--facts", "f.json", "-o", "link.json"], "link.json is read by"),
        (["bench", "-m", MODEL, "-d", "f.json", "-o", "f.json"], "is read by"),
        (["bench", "-m", MODEL, "-o", "t.json"], "which is for JSON"),
        (["bench", "-m", MODEL, "-o", "run"], "is no .*|file is not a database"),
        (["data", "filter", "f.json", "--known-to", MODEL, "-o", "f.json"], "is read by"),
        (
            ["data", "build", "--facts", "f.json", "--templates", "t.json", "-o", "t.json"],
            "t.json is read by",
        ),
        (["verify", MODEL, "e", "--store"], "e "),
    ],
)
def test_an_output_is_no_input_and_no_other_output(
    args: list[str],
    message: str,
    no_model: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "f.json", "t.json"):
        (tmp_path / name).write_text('["not", "ours"]')
    (tmp_path / "link.json").symlink_to("f.json")
    assert re.search(message, failing(monkeypatch, capsys, *args))
    for name in ("run", "f.json", "t.json", "link.json"):
        assert (tmp_path / name).read_text() == '["not", "ours"]'


def test_matplotlib_can_write_every_picture(tmp_path: Path) -> None:
    assert {ending[1:] for ending in outputs.PICTURES} <= {
        *Figure().canvas.get_supported_filetypes()
    }
    for ending in outputs.PICTURES:
        path = tmp_path / f"a{ending.upper()}"
        outputs.draw(Figure, path)
        assert path.stat().st_size
    assert len(list(tmp_path.iterdir())) == len(outputs.PICTURES)


def test_names_by_which_folders_are_known_are_those_of_the_library() -> None:
    assert outputs.edit_folder(Path("a")).replaces == folder_format.RECIPE
    assert outputs.adapter(Path("a")).replaces == lora_export._CONFIG


def test_a_result_that_cannot_be_written_is_shown_all_the_same(tmp_path: Path) -> None:
    one, two = outputs.picture(tmp_path / "a.png"), outputs.Output("card", tmp_path / "b")
    shown = []

    def full(path: Path) -> None:
        raise EngramFileError("disk full")

    def run() -> None:
        with outputs.tried(one, two) as written:
            writers: outputs.Writers = {one: full, two: lambda path: path.write_text("b")}
            written.finish(lambda: shown.append("result"), writers)

    with pytest.raises(EngramFileError, match="disk full") as error:
        run()
    assert error.value.__notes__ == ["The result is printed, and not lost"]
    assert shown == ["result"] and (tmp_path / "b").read_text() == "b", "as much as can be"


def test_nothing_is_said_to_be_kept_in_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    assert outputs.in_cache().startswith("what was measured so far is kept in ")
    monkeypatch.setenv("ENGRAM_CACHE", "/dev/null")
    assert outputs.in_cache() == "nothing was kept, since /dev/null cannot be written"
