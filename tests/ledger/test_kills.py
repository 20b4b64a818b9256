"""A ledger whose writer is killed, at any step or moment, is what it was before or what it was to
become; writers wait.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import engram
from engram.errors import EngramError, EngramFileError
from engram.files.locks import locked
from engram.ledger import Ledger
from tests.helpers.dying import DYING
from tests.helpers.edit_samples import random_edit, tiny

LM = tiny()

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the writers that are killed")

# The scripts below are one process that has everything imported; it forks a writer for every kill.
PREAMBLE = """
import os, pathlib, random, shutil, signal, sys, tempfile, time
import torch
from engram import Edit, compose
from engram.edit.folder_format import change_identity
from engram.ledger import Ledger
torch.set_num_threads(1)
folder, edits = pathlib.Path(sys.argv[1]), [Edit.load(name) for name in sys.argv[2:]]

def whole(book):
    \"\"\"Every edit in force loads, and their sum is that of the edits as they were made.\"\"\"
    made = {change_identity(edit.deltas): edit for edit in edits}
    left = [made[each.identity].without(*each.gone) for each in book.list()]
    assert not left or book.edit().deltas == compose(left).deltas
    return [(each.number, each.active) for each in book.list()]
"""

AT_EVERY_STEP = (
    PREAMBLE
    + DYING
    + """
let_die({tempfile: ["mkdtemp"], shutil: ["rmtree"],
         os: ["open", "fsync", "rename", "rmdir", "unlink", "truncate"],
         pathlib.Path: ["write_bytes", "write_text", "chmod", "open"]})
book = Ledger.open(folder)
does = {
    "add": lambda book: book.add(edits[1]),
    "replace": lambda book: book.add(edits[-1], replace=True),
    "remove": lambda book: book.remove("1.1"),
    "prune": lambda book: book.prune(),
}
for what, act in does.items():
    for step in range(1, 100):
        before = whole(Ledger.open(folder))
        pid = os.fork()
        if pid == 0:
            book, calls, killed_at = Ledger.open(folder), 0, step
            act(book)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        after = whole(Ledger.open(folder))
        print(what, "same" if after == before else "done", status, flush=True)
        if status == 0 or (after != before):
            break
    if status:  # its line was written: do what is left of it
        Ledger.open(folder).prune()
"""
)

AT_RANDOM = (
    PREAMBLE
    + """
def work(book, generator, writer):
    while True:  # every answer is given after the ledger has given its own
        there = book.list()
        present = {each.identity for each in there}
        free = [edit for edit in edits if change_identity(edit.deltas) not in present]
        if free and (len(there) < 3 or generator.random() < 0.5):
            entry = book.add(generator.choice(free), replace=True)
            os.write(writer, f"added {entry.number}\\n".encode())
        else:
            entry = generator.choice(there)
            name = generator.choice([str(entry.number), f"{entry.number}.{entry.active[0]}"])
            book.remove(name)
            os.write(writer, f"removed {name}\\n".encode())
        if generator.random() < 0.1:
            book.prune()
rounds = int(os.environ["ROUNDS"])
for number in range(rounds):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(Ledger.open(folder), random.Random(number), writer)
        finally:
            os._exit(3)
    os.close(writer)
    time.sleep(random.Random(-number).uniform(0.0, 0.12))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the writer failed before it was killed"
    with os.fdopen(reader) as answers:
        told = answers.read().splitlines()
    book = Ledger.open(folder)
    whole(book)
    entries = {entry.number: entry for entry in book.list(everything=True)}
    for line in told:
        what, name = line.split()
        entry, _, fact = name.partition(".")
        if what == "removed":
            removed = {int(fact)} if fact else set(range(9))
            assert not set(entries[int(entry)].active) & removed, line
        else:
            assert int(name) in entries, line
    happened = {"added": 0, "removed": 0, "pruned": 0}
    for event in book.history():
        happened[event.what] += 1
    print(len(told), happened["added"], happened["removed"], flush=True)
"""
)


def run(script: str, tmp_path: Path, rounds: int = 0) -> list[str]:
    edits = [
        random_edit(LM, (1,), rank=1 + (seed % 2), joint=False, seed=seed) for seed in range(6)
    ]
    edits.append(
        replace(random_edit(LM, seed=6), facts=edits[1].facts[:1])
    )  # says another thing about one of the others' facts
    folders = [str(edit.save(tmp_path / str(seed))) for seed, edit in enumerate(edits)]
    book = Ledger.create(tmp_path / "ledger", LM)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(engram.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "ROUNDS": str(rounds),
    }
    command = [sys.executable, "-W", "ignore", "-c", script, str(book.folder), *folders]
    output = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=250, check=False
    )
    assert output.returncode == 0, output.stderr
    return output.stdout.splitlines()


@pytest.mark.slow
def test_killed_at_any_step_a_change_has_happened_or_not(tmp_path):
    lines = run(AT_EVERY_STEP, tmp_path)
    for what in ("add", "replace", "remove"):
        steps = [line.split()[1] for line in lines if line.startswith(f"{what} ")]
        assert steps[:-1] == ["same"] * (len(steps) - 1) and steps[-1] == "done", steps
        assert len(steps) > (3 if what == "remove" else 8)
    assert {line.split()[1] for line in lines if line.startswith("prune ")} == {"same"}


@pytest.mark.slow
def test_killed_at_random_moments_nothing_that_was_acknowledged_is_lost(tmp_path):
    lines = run(AT_RANDOM, tmp_path, rounds=int(os.environ.get("ENGRAM_KILLS", "25")))
    told, added, removed = (int(number) for number in lines[-1].split())
    assert added > 1 and removed > 0, "the writers were killed before they did anything"


def test_a_line_without_its_end_has_not_happened_and_is_cut_off(tmp_path):
    book = Ledger.create(tmp_path / "ledger", LM)
    book.add(random_edit(LM, seed=1))
    path = book.folder / "history.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(book.list()) == 1 and len(Ledger.open(book.folder).list()) == 1
    book.add(random_edit(LM, seed=2))
    assert path.read_bytes().startswith(whole) and len(path.read_bytes().splitlines()) == 2
    assert Ledger.open(book.folder).list() == book.list()


def test_a_full_disk_leaves_it_as_it_was(tmp_path, monkeypatch):
    book = Ledger.create(tmp_path / "ledger", LM)
    book.add(random_edit(LM, seed=1))
    before = (book.folder / "history.jsonl").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            EngramFileError,
            match=r"could not write .*history.jsonl.*The ledger is as it was; free some space",
        ):
            book.remove(1)
        with pytest.raises(EngramFileError, match=r"could not write .*No space left on device"):
            book.add(random_edit(LM, seed=2))
    assert (book.folder / "history.jsonl").read_bytes() == before
    assert len(book.list()) == 1 and book.add(random_edit(LM, seed=2)).number == 2


BOTH = (
    PREAMBLE
    + """
for half in (edits[:3], edits[3:6]):
    if os.fork() == 0:
        for edit in half:
            Ledger.open(folder).add(edit)
            Ledger.open(folder).remove(edit.facts[0])
            if len(edit.facts) == 1:
                Ledger.open(folder).add(Edit(edit.facts, "again", {}, edit.deltas, edit.base))
        os._exit(0)
print(os.wait()[1], os.wait()[1], *(change_identity(edits[i].deltas) for i in range(6)))
"""
)


@pytest.mark.slow
def test_two_writers_wait_for_each_other(tmp_path):
    told = run(BOTH, tmp_path)[-1].split()
    assert told[:2] == ["0", "0"]
    book = Ledger.open(tmp_path / "ledger")
    entries = book.list(everything=True)
    assert [entry.number for entry in entries] == list(range(1, 10))
    assert [event.what for event in book.history()].count("removed") == 6
    assert {entry.identity for entry in book.list()} == set(told[2:])


def test_a_writer_that_has_waited_too_long_says_for_whom(tmp_path):
    folder = Ledger.create(tmp_path / "ledger", LM).folder
    with (
        locked(folder / "lock", 0, folder, "Wait."),
        pytest.raises(
            EngramError,
            match=rf"is being written by process {os.getpid()}\. .*Ledger.open\(folder, wait=...\)",
        ),
    ):
        Ledger.open(folder, wait=0).add(random_edit(LM))
    assert (
        Ledger.open(folder, wait=0).list() == ()
    )  # reading takes no lock, and the lock was let go of
    Ledger.open(folder, wait=0).add(random_edit(LM))
