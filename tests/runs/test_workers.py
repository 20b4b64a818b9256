"""Work on Ray gives what work here gives, to the last bit, also where workers die."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import engram
from engram import pocket
from engram.benchmark import run as bench_run
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.run import RecordsJob, bench
from engram.editors.second_moments.measure import second_moments
from engram.errors import EngramError, FactError, MissingExtraError, SettingError
from engram.model.language_model import LanguageModel
from engram.runs.workers import ByName, Here, RayWorkers

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


@pytest.fixture(scope="module")
def workers() -> Iterator[RayWorkers]:
    """Two workers of a Ray of this module's own; it is stopped at the end."""
    import ray

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's own spelling
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200_000_000,
        logging_level="ERROR",
    )
    yield RayWorkers(2)
    ray.shutdown()


@pytest.fixture(scope="module")
def lm(pocket_lm: LanguageModel) -> LanguageModel:
    return pocket_lm


@dataclass(frozen=True)
class Squares:
    """Squares numbers; dies, once or always, or raises at a number."""

    marker: Path | None = None
    dies_at: int | None = None
    raises_at: int | None = None

    def start(self) -> int:
        return 2

    def do(self, state: int, unit: int) -> int:
        if unit == self.dies_at and (self.marker is None or not self.marker.exists()):
            if self.marker is not None:
                self.marker.touch()
            os.kill(os.getpid(), 9)
        if unit == self.raises_at:
            raise FactError(f"unit {unit} is no fact")
        return unit**state


@pytest.mark.slow
def test_every_unit_is_done_once_and_comes_back_with_its_number(workers: RayWorkers) -> None:
    assert sorted(workers.run(Squares(), range(20))) == list(Here().run(Squares(), range(20)))


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_but_its_own_unit(
    workers: RayWorkers, tmp_path: Path
) -> None:
    job = Squares(tmp_path / "died", dies_at=3)
    assert dict(workers.run(job, range(8))) == {n: n**2 for n in range(8)}
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_a_unit_that_kills_every_worker_is_given_up_with_advice(workers: RayWorkers) -> None:
    with pytest.raises(EngramError, match="unit 1 was given up: a worker died of it 3 times"):
        list(workers.run(Squares(dies_at=1), range(3)))


@pytest.mark.slow
def test_workers_that_have_no_place_are_not_waited_for(workers: RayWorkers) -> None:
    assert dict(RayWorkers(5).run(Squares(), range(9))) == {n: n**2 for n in range(9)}


@pytest.mark.slow
def test_what_a_job_raises_is_raised_here_as_what_it_was(workers: RayWorkers) -> None:
    with pytest.raises(FactError, match="unit 2 is no fact"):
        list(workers.run(Squares(raises_at=2), range(5)))


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'engram\[ray\]'"):
        RayWorkers(2)


def test_a_model_that_was_not_loaded_by_name_or_is_edited_cannot_be_sent(lm: LanguageModel) -> None:
    with pytest.raises(SettingError, match="was not loaded by"):
        ByName.of(LanguageModel(lm.model, lm.tokenizer))
    fact = pocket.as_fact(pocket.facts()[0], pocket.counterfactual(pocket.facts()[0]))
    edit = engram.rewrite(lm, fact, "rome", steps=1, contexts=["{}"])
    with edit.applied(lm), pytest.raises(SettingError, match="edits are in force on"):
        ByName.of(lm)


@dataclass(frozen=True)
class Dying(RecordsJob):
    """Kills its worker at the first unit that begins at a place."""

    marker: Path = Path()

    def do(self, state: LanguageModel, unit: Any) -> Any:
        if unit.records[0][0] == 4 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), 9)
        return super().do(state, unit)


@pytest.mark.slow
def test_benchmark_records_are_the_same_here_and_there_though_a_worker_is_killed(
    lm: LanguageModel, workers: RayWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"memit": {"steps": 2, "store": False, "contexts": ["{}"]}, "ultraedit": {}}
    here = bench(
        lm, pocket_benchmark(), methods, tmp_path / "here.sqlite", limit=8, records_per_batch=4
    )
    marker = tmp_path / "died"
    monkeypatch.setattr(bench_run, "RecordsJob", lambda *args: Dying(*args, marker=marker))
    there = bench(
        lm,
        pocket_benchmark(),
        methods,
        tmp_path / "there.sqlite",
        limit=8,
        records_per_batch=4,
        workers=workers,
    )
    assert marker.exists()
    assert here.unedited == there.unedited
    for label in methods:
        assert {at: m.after for at, m in here.measured[label].items()} == {
            at: m.after for at, m in there.measured[label].items()
        }


@pytest.mark.slow
def test_average_traces_are_the_same(lm: LanguageModel, workers: RayWorkers) -> None:
    facts = engram.read_facts("pocket")[:6]
    asked: dict[str, Any] = {
        "sites": ["residual"],
        "samples": 2,
        "positions": "subject_last",
        "facts_per_batch": 2,
    }
    here = engram.average_trace(lm, facts, **asked)
    there = engram.average_trace(lm, facts, **asked, workers=workers)
    assert [each.to_bytes() for each in here.traces] == [each.to_bytes() for each in there.traces]


@pytest.mark.slow
def test_second_moments_do_not_depend_on_the_number_of_workers(
    lm: LanguageModel, workers: RayWorkers, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "corpus": list(pocket.sentences())[:600],
        "tokens": 4000,
        "tokens_per_batch": 128,
    }
    by = {
        name: second_moments(lm, [1], **asked, cache_dir=tmp_path / name, workers=where)[
            1
        ].matrix_ff
        for name, where in (
            ("local", None),
            ("here", Here()),
            ("ray", workers),
            ("one", RayWorkers(1)),
        )
    }
    assert torch.equal(by["ray"], by["one"])
    assert torch.equal(by["ray"], by["here"])
    torch.testing.assert_close(by["ray"], by["local"], rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_values_of_a_mass_edit_are_the_same(lm: LanguageModel, workers: RayWorkers) -> None:
    facts = [
        pocket.as_fact(known, pocket.counterfactual(known)) for known in pocket.facts()[:2000:500]
    ]
    asked: dict[str, Any] = {"steps": 2, "store": False, "contexts": ["{}"], "facts_per_batch": 2}
    here = engram.rewrite(lm, facts, "memit", **asked)
    there = engram.rewrite(lm, facts, "memit", **asked, workers=workers)
    assert here.deltas == there.deltas
