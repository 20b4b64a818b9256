"""Where work is done: in this process, or by workers that hold a model each.

Knows jobs and units. Refuses to know what they compute: a job says how a worker gets ready and what
it does with one unit. Units are independent and deterministic, so that where they are done and in
which order makes no difference.
"""

from __future__ import annotations

import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from engram.checks import Count, NonNegative, check_fields
from engram.edit.in_force import attached_to, edited
from engram.errors import EngramError, MissingExtraError, SettingError

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel


class Job(Protocol):
    """Work that can be sent to another process: a picklable object, best a dataclass of plain
    values.
    """

    def start(self) -> Any:
        """Make what a worker needs for every unit, such as a model; called once per worker."""

    def do(self, state: Any, unit: Any) -> Any:
        """Return the result of one unit."""


@runtime_checkable  # so that an argument can be checked
class Workers(Protocol):
    """Somewhere that jobs are done."""

    def run(self, job: Job, units: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (number of a unit, its result) as units are finished."""


@dataclass(frozen=True)
class ByName:
    """A model as it travels: not its weights, but how it is loaded.

    Args:
        how: arguments of `engram.load`.
    """

    how: Mapping[str, Any]

    @classmethod
    def of(cls, lm: LanguageModel) -> ByName:
        """Return how this model was loaded.

        Raises:
            SettingError: it was not loaded by name, or edits are in force on it, which workers
                would not see.
        """
        if lm.loaded is None:
            raise SettingError(
                f"{lm.name} was not loaded by engram.load, so workers cannot load it; save it to a "
                "folder and load that, or work without workers"
            )
        if in_force := [*edited(lm.model), *attached_to(lm.model)]:
            raise SettingError(
                f"edits are in force on {lm.name} ({in_force[0]}), and workers load it as it is "
                "stored; write an edited checkpoint "
                "(edit.to_checkpoint) and load that, or work without workers"
            )
        return cls(lm.loaded)

    def load(self) -> LanguageModel:
        from engram.model.loading import load

        return load(**self.how)


def model_for(workers: Workers | None, lm: LanguageModel) -> LanguageModel | ByName:
    """Return what a job carries: `lm` itself in this process, how it is loaded for workers.

    Weights are not sent over the network: gigabytes would be pickled for every unit.

    Raises:
        SettingError: workers cannot load it, see `ByName.of`.
    """
    return lm if workers is None else ByName.of(lm)


@dataclass(frozen=True)
class ModelJob:
    """A job for which a worker needs the model and nothing else.

    Args:
        model: one in this process, or how it is loaded.
    """

    model: LanguageModel | ByName

    def start(self) -> LanguageModel:
        return self.model.load() if isinstance(self.model, ByName) else self.model


class Here:
    """Work in this process, one unit after another."""

    def run(self, job: Job, units: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        if units:
            state = job.start()
            for number, unit in enumerate(units):
                yield number, job.do(state, unit)


@dataclass(frozen=True)
class RayWorkers:
    """Processes of a Ray cluster: each holds the job's state, units stream through them, and
    results come back as they are finished.

    A worker that dies is replaced and its unit is done again; nothing else is lost. While some
    workers can work, none is waited for that the cluster has no room for. A Ray that is started for
    this is stopped afterwards, whatever happens; a running one is used and left alone.

    Args:
        num_workers: processes.
        address: of a running cluster, such as "auto" or "ray://head:10001"; None: one of this
            machine's own.
        threads: of PyTorch in each; default: as many as here, so that the numbers are the same.
        gpus: that each worker reserves.
        tries: how often a unit is tried before it is given up, if workers die of it.
    Raises:
        SettingError: fewer than one worker or try; MissingExtraError: Ray is not installed.
    """

    num_workers: Count = 2
    address: str | None = None
    threads: Count | None = None
    gpus: NonNegative = 0
    tries: Count = 3

    def __post_init__(self) -> None:
        check_fields(self)
        _ray()

    def run(self, job: Job, units: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `Workers.run`.

        Raises:
            EngramError: a worker died at every try of one unit. What a job raises is raised here,
                an EngramError with its type.
        """
        if not units:
            return
        with self._running() as ray:
            stored_job = ray.put(job)  # once in Ray's store, not once per worker in the messages
            threads = self.threads or torch.get_num_threads()
            worker = ray.remote(num_cpus=1, num_gpus=self.gpus, max_restarts=0)(_Worker)
            waiting, idle, deaths = deque(range(len(units))), deque[int](), Counter[int | None]()
            workers: dict[int, Any] = {}
            # what will be ready -> (worker, its unit; None while the worker gets a place)
            flying: dict[Any, tuple[int, int | None]] = {}

            def hire(at: int) -> None:
                # A cluster may have no place for a worker. It gets its first unit only when `there`
                # has answered, so that no unit waits for it.
                workers[at] = worker.remote(stored_job, threads)
                flying[workers[at].there.remote()] = at, None

            def give() -> None:
                while waiting and idle:
                    at, number = idle.popleft(), waiting.popleft()
                    flying[workers[at].do.remote(units[number])] = at, number

            for at in range(min(self.num_workers, len(units))):
                hire(at)
            left = len(units)
            while left:
                (ready, *_), _ = ray.wait(list(flying), num_returns=1)
                at, number = flying.pop(ready)
                try:
                    done, result = ray.get(ready)
                except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                    deaths[number] += 1
                    # None counts deaths before any unit, which each worker may have
                    limit = self.tries * (len(workers) if number is None else 1)
                    if deaths[number] == limit:
                        raise _given_up(number, deaths[number], error) from error
                    if number is not None:
                        waiting.appendleft(number)  # first, so that a deadly unit fails early
                    hire(at)
                    give()
                    continue
                if not done:
                    raise _raised(*result)
                idle.append(at)
                give()  # before the result is used, so that the worker does not wait for that
                if number is not None:
                    left -= 1
                    yield number, result

    @contextmanager
    def _running(self) -> Iterator[Any]:
        ray = _ray()
        if ray.is_initialized():
            yield ray
            return
        # Ray's default niceness lets workers starve beside anything else that runs.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # the behaviour that Ray announces for a coming version, without its warning
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        own: dict[str, Any] = {}
        if self.address is None:  # a cluster of one's own has the size that is needed
            own = {"num_cpus": self.num_workers, "include_dashboard": False}
        terminating = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=self.address or "local",
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=False,
                **own,
            )
        except (ConnectionError, ValueError) as error:
            raise SettingError(
                f"no Ray cluster at {self.address!r}: {error}; expected 'auto', HOST:PORT or "
                "ray://HOST:PORT, or no address, which starts one here"
            ) from error
        with suppress(ValueError):  # not the main thread, where Ray sets none
            signal.signal(signal.SIGTERM, terminating)  # Ray's own handler ends without a word
        try:
            yield ray
        finally:
            ray.shutdown()


class _Worker:
    """One worker, in a process of its own."""

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self.job, self.state, self.ready = job, None, False

    def there(self) -> tuple[bool, Any]:
        """Return once the worker has a place in the cluster."""
        return True, None

    def do(self, unit: Any) -> tuple[bool, Any]:
        """Return (True, the result), or (False, what was raised: module, name, message)."""
        # Errors travel as words: Ray would wrap them, and some cannot be pickled.
        try:
            if not self.ready:
                self.state, self.ready = self.job.start(), True
            return True, self.job.do(self.state, unit)
        except Exception as error:
            return False, (type(error).__module__, type(error).__qualname__, str(error))


def _given_up(unit: int | None, times: int, error: Exception) -> EngramError:
    what = "workers died before they were given a unit,"
    if unit is not None:
        what = f"unit {unit} was given up: a worker died of it"
    return EngramError(
        f"{what} {times} times, the last time with {error}. Out of memory is the usual cause: "
        "fewer workers or smaller batches need less"
    )


def _raised(module: str, name: str, message: str) -> Exception:
    """Return an error of a worker as it is raised here."""
    if module == EngramError.__module__:
        kind = getattr(import_module(module), name)
        # Without `__init__`: some of these errors build their message from other arguments.
        error: Exception = kind.__new__(kind)
        error.args = (message,)
        return error
    return RuntimeError(f"a worker raised {name}: {message}")


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
