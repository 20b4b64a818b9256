"""Run benchmarks: which edits of which records are still to be made, done here or by workers, and
kept as they come.

Knows units of work and the file of a run. Refuses to know how a unit is computed (see measuring)
and how numbers are shown (see report). A unit's records depend on the data set and the batch size
alone, so that a resumed run gives what one in one go gives.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engram.benchmark.data.records import Dataset, Record, References
from engram.benchmark.measure import measure
from engram.benchmark.metrics.outcomes import MeasureConfig, Measured
from engram.benchmark.results import Run
from engram.benchmark.store import RunStore
from engram.editors.methods import METHODS, method_named
from engram.errors import SettingError
from engram.model.language_model import LanguageModel
from engram.model.loading import load
from engram.progress import Progress, no_progress
from engram.runs.identity import identity
from engram.runs.workers import ByName, Here, ModelJob, Workers

_ONE_BY_ONE = 8  # records in a unit of a method that edits one by one: what a kill can cost

Methods = Sequence[str] | Mapping[str, str | Mapping[str, Any]]


@dataclass(frozen=True)
class Unit:
    """Records that are edited by one method and measured together.

    Args:
        records: (place, record).
        texts: whether the unedited model writes texts, too.
    """

    label: str
    method: str
    settings: dict[str, Any]
    records: tuple[tuple[int, Record], ...]
    texts: bool


@dataclass(frozen=True)
class RecordsJob(ModelJob):
    """What workers do: edit and measure the records of a unit, see `distribute.Job`."""

    config: MeasureConfig
    references: References | None = None

    def do(self, state: LanguageModel, unit: Unit) -> list[Measured]:
        found = measure(
            state,
            unit.records,
            unit.method,
            unit.settings,
            self.config,
            self.references,
            unedited_texts=unit.texts,
        )
        return list(found)


def bench(
    model: LanguageModel | str,
    dataset: Dataset,
    methods: Methods,
    out: str | Path,
    *,
    limit: int | None = None,
    config: MeasureConfig | None = None,
    records_per_batch: int = 32,
    workers: Workers | None = None,
    progress: Progress = no_progress,
) -> Run:
    """Edit each record of a data set by itself, by each method, and keep what was measured in a
    file.

    Killed at any moment, it goes on where it was when called again with the same arguments; more
    records and methods may be asked for.

    Args:
        model: a model, or the name of one (see `engram.load`).
        methods: names; or label -> name, or label -> settings of the method of that name, with
            "method" among them where the label
            is not its name: {"rome": {}, "rome-3": {"method": "rome", "layer": 3}}.
        out: file of the run.
        limit: the first records only; default: all.
        config: what is measured of each record.
        records_per_batch: records that are edited and measured together, by methods that can (`Method.batch_function`).
        workers: where the work is done, such as `distribute.RayWorkers`; default: this process.
        progress: called with (label, records done, records in all).
    Raises:
        SettingError: settings that a method does not have, or a file that was begun with something
            else.
        EngramError: a method that does not exist; a file that another process is writing.
    Source: the protocol of Meng et al. 2022, arXiv:2202.05262, Sec. 3.4: every record edits the
        unedited model.
    """
    config, wanted = config or MeasureConfig(), _labelled(methods)
    if records_per_batch < 1 or (limit is not None and limit < 1):
        raise SettingError(
            f"records_per_batch={records_per_batch}, limit={limit}: expected 1 or more of each"
        )
    records = dataset.records[:limit]
    lm = load(model) if isinstance(model, str) else model
    about = {
        "model": lm.name,
        "identity": identity(lm),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "dataset": dataset.name,
        "form": dataset.form,
        "config": asdict(config),
    }
    job = RecordsJob(lm if workers is None else ByName.of(lm), config, dataset.references)
    with RunStore.writing(out, about) as store:
        store.add_records(records)
        for label, (method, settings) in wanted.items():
            store.add_method(
                label,
                method,
                settings
                | (
                    {"records_per_batch": records_per_batch}
                    if METHODS[method].depends_on_batch
                    else {}
                ),
            )
        store.begin_session(
            datetime.now(UTC).isoformat(timespec="seconds"), machine(lm, records_per_batch)
        )
        for label, (method, settings) in wanted.items():
            _run(
                store,
                label,
                method,
                settings,
                records,
                config,
                records_per_batch,
                job,
                workers or Here(),
                progress,
            )
    return Run.open(out)


def _run(
    store: RunStore,
    label: str,
    method: str,
    settings: dict[str, Any],
    records: Sequence[Record],
    config: MeasureConfig,
    records_per_batch: int,
    job: RecordsJob,
    workers: Workers,
    progress: Progress,
) -> None:
    units = _units(
        label,
        method,
        settings,
        records,
        records_per_batch,
        store.done(label),
        store.has_unedited() if config.texts else set(),
    )
    finished = len(records) - sum(len(unit.records) for unit in units)
    for number, found in workers.run(job, units):
        unit = units[number]
        store.add(
            label, zip((place for place, _ in unit.records), found, strict=True), texts=unit.texts
        )
        finished += len(found)
        progress(label, finished, len(records))


def _units(
    label: str,
    method: str,
    settings: dict[str, Any],
    records: Sequence[Record],
    records_per_batch: int,
    done: set[int],
    written: set[int],
) -> list[Unit]:
    """What is still to be done, cut by the batch size alone.

    Args:
        done: places that have a result; written: those whose texts by the unedited model are there,
            which are written once.
    """
    way, units = METHODS[method], []
    size = (
        records_per_batch if way.batch_function is not None else min(records_per_batch, _ONE_BY_ONE)
    )
    for first in range(0, len(records), size):
        together = range(first, min(first + size, len(records)))
        places = [place for place in together if place not in done]
        write = set(places) - written
        if (
            places and way.depends_on_batch
        ):  # of a run that grew: with more facts beside them, the others' edits change too
            places, write = list(together), set(together) if write else set()
        for texts in (True, False):
            if some := tuple((at, records[at]) for at in places if (at in write) is texts):
                units.append(Unit(label, method, settings, some, texts))
    return units


def _labelled(methods: Methods) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> (method, settings).

    Raises:
        SettingError: no methods; EngramError: one that does not exist.
    """
    out: dict[str, tuple[str, dict[str, Any]]] = {}
    for label in methods:
        given = methods[label] if isinstance(methods, Mapping) else label
        settings = {"method": given} if isinstance(given, str) else dict(given)
        out[label] = (settings.pop("method", label), settings)
        method_named(out[label][0])
        try:
            json.dumps(out[label][1])
        except (TypeError, ValueError) as error:
            raise SettingError(
                f"settings of {label!r} have to be values that JSON knows, to be kept with the run: {error}"
            ) from error
    if not out:
        raise SettingError("methods is empty; name at least one, such as 'rome'")
    return out


def machine(lm: LanguageModel, records_per_batch: int) -> dict[str, Any]:
    """What a run is done on and by."""
    device = (
        torch.cuda.get_device_name(lm.device)
        if lm.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "records_per_batch": records_per_batch,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: version(package) for package in ("engram", "torch", "transformers")},
    }
