"""A run, finished or not, as numbers: rows of scores, summaries, failures, and a card that says how
they were measured.

Knows what the file of a run holds. Refuses to know how tables are written (see report).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

from engram.benchmark.data.records import Form, Record, digest_of
from engram.benchmark.metrics.outcomes import Measured, Outcome
from engram.benchmark.metrics.scores import of_measured
from engram.benchmark.metrics.summary import Estimate, summarise
from engram.benchmark.store import RunStore
from engram.bootstrap import DEFAULT, Bootstrap
from engram.errors import EngramFileError, SettingError
from engram.evaluate.answers import begins
from engram.evaluate.probes import ProbeKind

UNEDITED = "unedited"


@dataclass(frozen=True)
class Failure:
    """A probe whose answer after an edit is not the wanted one."""

    record: str
    kind: ProbeKind
    prompt: str
    wanted: str
    before: str
    after: str


@dataclass(frozen=True)
class Run:
    """What a file of a run holds, read once.

    Attributes:
        about: model, its identity, data set, form, what was measured.
        sessions: time and machine of each part.
        methods: label -> (method, settings).
        records: by place; measured: label -> place -> result; the unedited model is not among them.
    """

    path: Path
    about: Mapping[str, Any]
    sessions: list[dict[str, Any]]
    methods: Mapping[str, tuple[str, dict[str, Any]]]
    records: Mapping[int, Record]
    unedited: Mapping[int, Outcome]
    measured: Mapping[str, Mapping[int, Measured]]

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read the file of a run, also one that is being written.

        Raises:
            EngramFileError: not such a file.
        """
        with RunStore.reading(path) as store:
            methods, records, unedited = store.methods(), store.records(), store.unedited()
            measured = {label: store.results(label) for label in methods}
            run = cls(
                Path(path), store.about(), store.sessions(), methods, records, unedited, measured
            )
        run._check_readings()
        return run

    def _check_readings(self) -> None:
        """Raise unless every outcome has its record, and a reading for each of its probes."""
        by_place = [("unedited", self.unedited)]
        for label, results in self.measured.items():
            by_place += [(label, {place: m.after for place, m in results.items()})]
        for name, outcomes in by_place:
            for place, outcome in outcomes.items():
                record, count = self.records.get(place), len(outcome.readings)
                if record is None or count != len(record.probes):
                    probes = "no record" if record is None else f"{len(record.probes)} probes"
                    raise EngramFileError(
                        f"{self.path} is damaged: {name!r} has {count} readings at place {place}, "
                        f"which has {probes}"
                    )

    @property
    def form(self) -> Form:
        return cast("Form", self.about["form"])

    @property
    def labels(self) -> list[str]:
        """The unedited model, then the methods that have results."""
        return [UNEDITED, *(label for label, results in self.measured.items() if results)]

    @cached_property
    def rows(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Label -> id of a record -> its scores."""
        edited = {
            label: {m.id: of_measured(self.records[at], m) for at, m in rows.items()}
            for label, rows in self.measured.items()
        }
        plain = {}
        for place, outcome in self.unedited.items():
            record = self.records[place]
            scores = of_measured(record, Measured(record.id, outcome, outcome, 0.0))
            # What only an edit has. A drift of 0 or 100 % kept would be true of no edit at all, and
            # such a row would be the best in every table.
            plain[record.id] = {
                **scores,
                "seconds": None,
                "size": None,
                "failed": None,
                "drift": None,
                "kept": None,
            }
        return {UNEDITED: plain, **{label: rows for label, rows in edited.items() if rows}}

    def summary(self, bootstrap: Bootstrap = DEFAULT) -> dict[str, dict[str, Estimate]]:
        """Return label -> metric -> its mean over the label's records; see `summarise`."""
        return {
            label: summarise(list(rows.values()), self.form, bootstrap=bootstrap)
            for label, rows in self.rows.items()
            if rows
        }

    def failures(self, label: str, kind: ProbeKind | None = None, limit: int = 10) -> list[Failure]:
        """Return probes whose greedy answer after the edit does not begin with the wanted one.

        Args:
            kind: of these probes only.
            limit: at most this many, in the order of the records.
        Raises:
            SettingError: a label that the run does not have.
        """
        if label not in self.measured:
            raise SettingError(f"label={label!r}: the run has {', '.join(self.measured)}")
        return list(islice(self._failed(label, kind), limit))

    def _failed(self, label: str, kind: ProbeKind | None) -> Iterator[Failure]:
        for place, measured in self.measured[label].items():
            probe_readings = zip(
                self.records[place].probes,
                measured.before.readings,
                measured.after.readings,
                strict=True,
            )
            for probe, was, now in probe_readings:
                # Conditions are answered before the edit; that one of them fails afterwards is no
                # failure.
                if kind not in (None, probe.kind) or now.answer is None or probe.condition:
                    continue
                if not begins(now.answer, (probe.wanted, *probe.aliases)):
                    yield Failure(
                        measured.id,
                        probe.kind,
                        probe.prompt,
                        probe.wanted,
                        was.answer or "",
                        now.answer,
                    )

    def errors(self, label: str) -> dict[str, str]:
        """Return id of a record -> why its edit could not be made."""
        return {m.id: m.error for m in self.measured[label].values() if m.error is not None}

    def card(self) -> dict[str, Any]:
        """Return how the numbers were measured, as JSON holds it."""
        return {
            **self.about,
            "records": len(self.records),
            "digest": digest_of(self.records.values()),
            "methods": {
                label: {
                    "method": method,
                    "settings": settings,
                    "records": len(self.measured[label]),
                    "errors": len(self.errors(label)),
                    "seconds": sum(m.seconds for m in self.measured[label].values()),
                }
                for label, (method, settings) in self.methods.items()
            },
            "sessions": self.sessions,
        }
