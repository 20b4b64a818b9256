"""Two machines, as far as one can be two: network namespaces with an address each, joined to one
Ray by `ray start`.

Asked for by ENGRAM_NODES=1, since it needs an administrator's rights (Linux, `ip`) and a minute.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from engram import Run
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.run import bench
from engram.model.loading import load
from tests.helpers.paths import ROOT
from tests.helpers.two_nodes import HEAD, METHODS, OTHER

pytestmark = pytest.mark.skipif(
    "ENGRAM_NODES" not in os.environ or shutil.which("ip") is None,
    reason="asked for by ENGRAM_NODES=1, on Linux as root",
)


RUN = """
import sys
from engram.benchmark.run import bench
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.runs.workers import RayWorkers
from engram.model.loading import load
from tests.helpers.two_nodes import HEAD, METHODS, Where
workers = RayWorkers(3, address=f"{HEAD}:6379", threads=1)
if sys.argv[1] == "bench":
    data, given = pocket_benchmark(), dict(limit=12, records_per_batch=2, workers=workers)
    bench(load("pocket"), data, METHODS, sys.argv[2], **given)
for number, (square, where) in workers.run(Where(), range(24)):
    print(number, square, where, flush=True)
"""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def inside() -> Iterator[Any]:
    """Yield (a machine, a command) -> a process on it; the machines are na, with two cores, and
    nb, with one.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }

    ray = str(Path(sys.executable).with_name("ray"))
    with ExitStack() as held:

        def run(machine: str, *command: str) -> subprocess.Popen[str]:
            line = ["ip", "netns", "exec", machine, *command]
            process = subprocess.Popen(
                line, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            held.enter_context(process)
            held.callback(process.kill)
            return process

        for machine in ("na", "nb"):
            ip("netns", "add", machine)
            held.callback(gone, machine)
            ip("-n", machine, "link", "set", "lo", "up")
        ip("link", "add", "va", "netns", "na", "type", "veth", "peer", "name", "vb", "netns", "nb")
        for machine, wire, address in (("na", "va", HEAD), ("nb", "vb", OTHER)):
            ip("-n", machine, "addr", "add", f"{address}/24", "dev", wire)
            ip("-n", machine, "link", "set", wire, "up")
        common = ["--object-store-memory=200000000", "--disable-usage-stats"]
        first = [
            "--head",
            "--port=6379",
            "--num-cpus=2",
            "--include-dashboard=false",
            f"--node-ip-address={HEAD}",
        ]
        second = [f"--address={HEAD}:6379", "--num-cpus=1", f"--node-ip-address={OTHER}"]
        for machine, words in (("na", first), ("nb", second)):
            started = run(machine, ray, "start", *words, *common)
            assert started.wait(120) == 0, started.communicate()[0]
        yield run


def gone(machine: str) -> None:
    stop(machine)
    ip("netns", "del", machine)


def stop(machine: str) -> None:
    """Kill everything that runs on it."""
    for pid in ip("netns", "pids", machine).split():
        os.kill(int(pid), 9)


def test_records_are_the_same_on_two_machines_and_on_one(inside: Any, tmp_path: Path) -> None:
    process = inside("na", sys.executable, "-c", RUN, "bench", str(tmp_path / "there.sqlite"))
    told = [line.split() for line in process.communicate(timeout=280)[0].splitlines()]
    assert process.returncode == 0
    assert sorted((int(n), int(square)) for n, square, _ in told) == [(n, n * n) for n in range(24)]
    assert {where for *_, where in told} == {HEAD, OTHER}
    there = Run.open(tmp_path / "there.sqlite")
    here = bench(
        load("pocket"),
        pocket_benchmark(),
        METHODS,
        tmp_path / "here.sqlite",
        limit=12,
        records_per_batch=2,
    )
    assert here.unedited == there.unedited
    for label in METHODS:
        same = [{at: m.after for at, m in run.measured[label].items()} for run in (here, there)]
        assert same[0] == same[1] and len(same[0]) == 12


def test_a_machine_that_goes_away_costs_its_units_and_nothing_else(inside: Any) -> None:
    process = inside("na", sys.executable, "-c", RUN, "where")
    told = []
    for line in process.stdout:
        told.append(line.split())
        if told[-1][2] == OTHER and sum(where == OTHER for *_, where in told) == 2:
            stop("nb")
    assert process.wait(60) == 0
    assert sorted((int(n), int(square)) for n, square, _ in told) == [(n, n * n) for n in range(24)]
    assert sum(where == OTHER for *_, where in told) in (2, 3)
