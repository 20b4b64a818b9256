"""Run benchmarks: find which records are still to be edited, do that here or by workers, and keep
the results as they come.

Knows units of work and the file of a run. Refuses to know how a unit is computed (see measure) and
how numbers are shown (see report). A unit's records depend on the data set and the batch size
alone, so that a resumed run gives the numbers of an uninterrupted one.
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
from engram.benchmark.measure import Unit, measure
from engram.benchmark.metrics.outcomes import MeasureConfig, Measured
from engram.benchmark.results import Run
from engram.benchmark.store import RunStore
from engram.checks import Count, checked_call
from engram.editors.methods import METHODS, check_method
from engram.errors import SettingError
from engram.model.language_model import LanguageModel
from engram.model.loading import load
from engram.model.pace import seconds_per_token
from engram.progress import Progress, Work, announce, no_progress
from engram.runs.identity import identity
from engram.runs.workers import Here, ModelJob, Workers, model_for

_ONE_BY_ONE = 8  # records in a unit of a method that edits one by one: what a kill can cost

Methods = Sequence[str] | Mapping[str, str | Mapping[str, Any]]


@dataclass(frozen=True)
class RecordsJob(ModelJob):
    """What workers do: edit and measure the records of a unit; see `workers.Job`."""

    config: MeasureConfig
    references: References | None = None

    def do(self, state: LanguageModel, unit: Unit) -> list[Measured]:
        return list(measure(state, unit, self.config, self.references))


@dataclass(frozen=True)
class _Method:
    """A method as a run has it: the label of its results, its name, and its settings."""

    label: str
    name: str
    settings: dict[str, Any]

    @property
    def in_batches(self) -> bool:
        """Whether it edits several records at once, each by itself."""
        return METHODS[self.name].batch_function is not None

    @property
    def depends_on_batch(self) -> bool:
        """Whether a record's edit changes with the other records of its batch."""
        return METHODS[self.name].depends_on_batch


@checked_call
def bench(
    model: LanguageModel | str,
    dataset: Dataset,
    methods: Methods,
    out: str | Path,
    *,
    limit: Count | None = None,
    config: MeasureConfig | None = None,
    records_per_batch: Count = 32,
    workers: Workers | None = None,
    progress: Progress = no_progress,
) -> Run:
    """Edit each record of a data set by itself, by each method; keep the measurements in a file.

    After a kill at any moment, the same call resumes the run; it may also ask for more records and
    more methods.

    Args:
        model: a model, or the name of one (see `engram.load`).
        methods: names; or label -> name; or label -> settings, with the method's name under
            "method" where it is not the label, as in {"rome": {}, "rome-3": {"method": "rome",
            "layer": 3}}.
        out: file of the run.
        limit: number of records, from the first; default: all.
        config: what is measured of each record.
        records_per_batch: records that are edited and measured together, by methods that can
            (`Method.batch_function`).
        workers: where the work is done, such as `RayWorkers`; default: this process.
        progress: called with (label, records done, records in all).
    Raises:
        SettingError: settings that a method does not have, or an existing file of another run.
        EngramError: a method that does not exist; a file that another process is writing.
    Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.4: every record edits the unedited model.
    Example:
        >>> import tempfile, pathlib
        >>> dataset = engram.read_dataset("pocket", limit=2)
        >>> out = pathlib.Path(tempfile.mkdtemp()) / "run.sqlite"
        >>> run = engram.bench(lm, dataset, ["ft"], out)
        >>> sorted(run.rows)
        ['ft', 'unedited']
    """
    config = config or MeasureConfig()
    labelled = _labelled(methods, model if isinstance(model, str) else model.name)
    records = dataset.records[:limit]
    lm = load(model) if isinstance(model, str) else model
    # What may not change between two sessions: numbers of another model, dtype or config would end
    # up in one mean. The batch size is not among these, since it changes the edits of few methods
    # only (below), nor is the machine: that is noted, not compared.
    about = {
        "model": lm.name,
        "identity": identity(lm),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "dataset": dataset.name,
        "form": dataset.form,
        "config": asdict(config),
    }
    job = RecordsJob(model_for(workers, lm), config, dataset.references)
    with RunStore.writing(out, about) as store:
        store.add_records(records)
        for method in labelled:
            # An edit of UltraEdit standardises over its batch, so the size is one of its settings,
            # and a resumed run with another size is refused.
            batch = {"records_per_batch": records_per_batch} if method.depends_on_batch else {}
            store.add_method(method.label, method.name, method.settings | batch)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        store.begin_session(began, machine(lm, records_per_batch))
        for method in labelled:
            # Read again for each method: the one before it may have generated the rest.
            generated = store.has_unedited() if config.texts else set()
            done = store.done(method.label)
            units = _units(method, records, records_per_batch, done, generated)
            left = sum(len(unit.records) for unit in units)
            finished, work = len(records) - left, _work(method, lm, units, out, progress)
            for number, results in (workers or Here()).run(job, units):
                unit = units[number]
                measured = zip((at for at, _ in unit.records), results, strict=True)
                store.add(unit.label, measured, texts=unit.unedited_texts)
                finished += len(results)
                work.did("later" if number else "first", len(results))
                progress(unit.label, finished, len(records))
    # Read from the file: a resumed run returns the same object as an uninterrupted one.
    return Run.open(out)


def _work(
    method: _Method, lm: LanguageModel, units: Sequence[Unit], out: str | Path, progress: Progress
) -> Work:
    """Return the work of one method, announced.

    The first records are counted apart: what all of them share is measured with them.
    """
    counts = [len(unit.records) for unit in units] or [0]
    work = Work(
        method.label,
        f"editing and measuring {sum(counts):,} records by {method.label}",
        f"kept in {out}; a stopped run is resumed",
    )
    # about 20 steps of 20 contexts of 12 tokens, back and forth, and some hundred probes
    guess = 20_000 * seconds_per_token(lm, progress)
    work.expect("first", counts[0], guess)
    work.expect("later", sum(counts[1:]), guess)
    announce(progress, work)
    return work


def _units(
    method: _Method,
    records: Sequence[Record],
    records_per_batch: int,
    done: set[int],
    generated: set[int],
) -> list[Unit]:
    """Return the work that is left, cut by the batch size alone.

    With 8 records in batches of 4, of which records 0 to 4 are done, the batch (4, 5, 6, 7) is left
    with (5, 6, 7); a method whose edits depend on their batch gets all four again. A batch is split
    in two where the unedited model has generated the texts of some of its records: it does so once
    a record, whatever the number of methods.

    Args:
        done: places that have a result.
        generated: places whose texts by the unedited model exist.
    """
    # Cut from the first record on, never from the first that is left: in batches of 4, records 5 to
    # 7 stay together whether 4 or 5 of them were done before.
    size = records_per_batch if method.in_batches else min(records_per_batch, _ONE_BY_ONE)
    units = []
    for first in range(0, len(records), size):
        batch = range(first, min(first + size, len(records)))
        places = [place for place in batch if place not in done]
        generate = set(places) - generated
        # The whole batch or nothing: record 7 alone would get another edit than in (4, 5, 6, 7).
        # Results that exist are replaced, since with a larger limit the last batch has more
        # records. For the same reason a batch is not split by texts.
        if places and method.depends_on_batch:
            places, generate = list(batch), set(batch) if generate else set()
        # Texts take longest of all that is measured, and those of the unedited model serve every
        # method.
        for texts in (True, False):
            part = tuple((at, records[at]) for at in places if (at in generate) is texts)
            if part:
                units.append(Unit(part, method.name, method.settings, method.label, texts))
    return units


def _labelled(methods: Methods, model: str) -> list[_Method]:
    """Return the methods by their labels.

    Raises:
        SettingError: no methods, or settings that a method refuses or a file cannot hold.
        EngramError: a method that does not exist.
    """
    labelled = []
    for label in methods:
        given = methods[label] if isinstance(methods, Mapping) else label
        settings = {"method": given} if isinstance(given, str) else dict(given)
        name = settings.pop("method", label)
        # All labels are checked before the first record: a misspelt last method is reported now,
        # not after hours of work by the others.
        try:
            json.dumps(settings)
        except (TypeError, ValueError, RecursionError) as error:
            raise SettingError(
                f"settings of {label!r} are kept with the run, so they have to be values of JSON: "
                f"{error}"
            ) from error
        check_method(name, settings, model)
        labelled.append(_Method(label, name, settings))
    if not labelled:
        raise SettingError("methods is empty; name at least one, such as 'rome'")
    return labelled


def machine(lm: LanguageModel, records_per_batch: int) -> dict[str, Any]:
    """Return what a run is done on and by."""
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
