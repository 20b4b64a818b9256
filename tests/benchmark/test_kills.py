"""A run that is killed, at any moment or at any statement that changes its file, ends as one that
nobody disturbed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engram.benchmark.report import markdown, table
from engram.benchmark.results import Run
from engram.bootstrap import Bootstrap
from tests.helpers.bench_samples import contents
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the runs that are killed")

# The scripts below are one process that has everything imported; it forks a run for every kill.
PREAMBLE = """
import json, os, random, signal, sqlite3, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from engram.benchmark import run
from tests.helpers.bench_samples import ASKED, METHODS, contents, dataset
from tests.helpers.tiny import tiny_lm

RECORDS = int(sys.argv[3])
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
lm, data = tiny_lm(), dataset(RECORDS)

def done(path):
    run.bench(lm, data, METHODS, path, config=ASKED, records_per_batch=3)

def forked(path):
    pid = os.fork()
    if pid:
        return pid
    try:
        done(path)
        os._exit(0)
    finally:
        os._exit(3)  # what went wrong is on standard error

def ended(pid):
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return "killed" if killed else os.WEXITSTATUS(status)
"""

AT_RANDOM = (
    PREAMBLE
    + """
run.bench(lm, data, METHODS, folder / "warm", config=ASKED, limit=1)
began = time.perf_counter()
done(folder / "undisturbed")
usual = time.perf_counter() - began

def rows_in(path):
    try:
        return len(contents(path)["results"])
    except sqlite3.Error:  # there is no file yet, or no table
        return 0

draw, told, number = random.Random(kills), [], 0
while sum(how == "killed" for how, _, _ in told) < kills or told[-1][0] != 0:
    path = folder / str(number)
    pid = forked(path)
    if sum(how == "killed" for how, _, _ in told) < kills:
        while not told and not rows_in(path):  # the first kill is in the middle
            time.sleep(0.01)
        time.sleep(draw.uniform(0, usual / 3))
        os.kill(pid, signal.SIGKILL)
    how = ended(pid)
    assert how in ("killed", 0), how
    told.append((how, number, rows_in(path)))
    number += how == 0  # a run that got to its end: the next kills are of another one
print(json.dumps(told))
"""
)

AT_EVERY_STATEMENT = (
    PREAMBLE
    + """
# Nothing is measured anew: what is tried here is the file. It is the same in every run.
found = {}
measure = run.RecordsJob.do
def remembered(self, state, unit):
    key = (unit.label, unit.records[0][0], len(unit.records), unit.unedited_texts)
    if key not in found:
        found[key] = measure(self, state, unit)
    return found[key]
run.RecordsJob.do = remembered
done(folder / "undisturbed")

plain, seen, killed_at = sqlite3.connect, 0, 0
def counted(statement):
    global seen
    seen += 1
    if seen == killed_at:
        os.kill(os.getpid(), 9)
def connect(*args, **options):
    connection = plain(*args, **options)
    # what a process has written outlives it: only a machine's crash is what `synchronous` is for
    connection.execute("PRAGMA synchronous = OFF")
    connection.set_trace_callback(counted)
    return connection
sqlite3.connect = connect

told, at, whole = [], 0, contents(folder / "undisturbed")
while not told or told[-1][0] == "killed":
    at += 1
    path = folder / f"killed at {at}"
    seen, killed_at = 0, at
    how = ended(forked(path))
    killed_at = 0
    try:
        after = len(contents(path)["results"])
    except sqlite3.Error:
        after = 0  # killed before there were tables
    done(path)
    told.append((how, after, contents(path) == whole))
    path.unlink()
print(json.dumps(told))
"""
)


def run(script: str, folder: Path, kills: int, records: int) -> list[list[object]]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder), str(kills), str(records)]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def rows(run: Run) -> dict[str, dict[str, dict[str, float | None]]]:
    """Every score of every record but how long the edit took."""
    return {
        label: {id: {**scores, "seconds": None} for id, scores in found.items()}
        for label, found in run.rows.items()
    }


@pytest.mark.slow
def test_killed_at_random_moments_the_table_is_that_of_an_undisturbed_run(tmp_path):
    kills = int(os.environ.get("ENGRAM_KILLS", "3"))
    told = run(AT_RANDOM, tmp_path, kills, records=10)
    assert sum(how == "killed" for how, _, _ in told) >= kills
    assert any(how == "killed" and 0 < count < 20 for how, _, count in told), (
        "no kill was in the middle of a run"
    )
    undisturbed = Run.open(tmp_path / "undisturbed")
    for number in range(told[-1][1] + 1):
        counts = [count for _, file, count in told if file == number]
        assert counts == sorted(counts) and counts[-1] == 20, "what was in the file has been lost"
        assert contents(tmp_path / str(number)) == contents(tmp_path / "undisturbed")
        resumed = Run.open(tmp_path / str(number))
        assert rows(resumed) == rows(undisturbed)
        assert {at: m.after.texts for at, m in resumed.measured["ft"].items()} == {
            at: m.after.texts for at, m in undisturbed.measured["ft"].items()
        }
        assert markdown(table([resumed], bootstrap=Bootstrap(resamples=50))) == markdown(
            table([undisturbed], bootstrap=Bootstrap(resamples=50))
        )
        assert len(resumed.sessions) <= len(counts), "a session a start, of those that got so far"


@pytest.mark.slow
def test_killed_at_any_statement_the_file_goes_on_to_the_same_rows(tmp_path):
    told = run(AT_EVERY_STATEMENT, tmp_path, 0, records=5)
    assert len(told) > 40, "statements of a run"
    assert [how for how, *_ in told] == ["killed"] * (len(told) - 1) + [0]
    assert all(same for *_, same in told)
    assert {count for _, count, _ in told} == {0, 3, 5, 8, 10}, (
        "a unit's results are in the file all or none"
    )
