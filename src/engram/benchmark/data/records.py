"""One record type for every benchmark: the facts of one edit, and the probes that measure it.

Knows texts. Refuses to know files (see the other modules of this folder), models, and how answers
become scores (see metrics).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from engram.benchmark.data.tfidf import TfIdf
from engram.errors import FactError
from engram.evaluate.probes import Probe, ProbeKind
from engram.facts import Fact

Form = Literal["counterfact", "flat", "zsre", "mquake", "ripple"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Record:
    """One edit and what it is measured by.

    Args:
        id: unique in its data set, e.g. CounterFact's case_id as text.
        facts: what is rewritten, in one edit; with `target_true` where the benchmark has it. A
            record's only fact gets the paraphrases and neighbours of its probes.
        probes: the rewrite's own prompt among them.
        generation: prompts that are continued freely, one text for each; a prompt may occur several
            times.
        references: key of the texts in `Dataset.references` about entities for which the new object
            is true.
    Raises:
        FactError: no facts, or no probes.
    """

    id: str
    facts: tuple[Fact, ...]
    probes: tuple[Probe, ...]
    generation: tuple[str, ...] = ()
    references: str | None = None

    def __post_init__(self) -> None:
        for name in ("facts", "probes", "generation"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.facts or not self.probes:
            raise FactError(
                f"record {self.id!r} has {len(self.facts)} facts and {len(self.probes)} probes; "
                "it needs both"
            )
        if len(self.facts) == 1:  # of several facts, none is known to be the one of a probe
            object.__setattr__(self, "facts", (self._with_evidence(self.facts[0]),))

    def _with_evidence(self, fact: Fact) -> Fact:
        """Return the fact with the record's paraphrases and neighbours where it has none itself, so
        that a receipt has some.

        A neighbour whose own answer is the new object cannot show damage, and is left out.
        """
        probes = [probe for probe in self.probes if not probe.condition]
        return replace(
            fact,
            paraphrases=fact.paraphrases
            or tuple(probe.prompt for probe in probes if probe.kind == "paraphrase"),
            neighbours=fact.neighbours
            or tuple(
                (probe.prompt, probe.wanted)
                for probe in probes
                if probe.kind == "neighbourhood" and probe.wanted.strip() != fact.target.strip()
            ),
        )

    def of(self, kind: ProbeKind) -> list[int]:
        """Return the numbers of the probes of a kind, conditions left out."""
        return [
            i for i, probe in enumerate(self.probes) if probe.kind == kind and not probe.condition
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON holds it.

        Paraphrases and neighbours that the probes hold are not repeated in the fact.
        """
        # Each text once: CounterFact has 12 a record that would be written twice.
        facts = tuple(
            bare if fact == self._with_evidence(bare := without_evidence(fact)) else fact
            for fact in self.facts
        )
        return {**asdict(self), "facts": [asdict(fact) for fact in facts]}

    @classmethod
    def from_fact(cls, id: str, fact: Fact, **more: Any) -> Record:
        """Return a record with the probes of one fact: its prompt, its paraphrases, its neighbours.

        Args:
            fact: with `target_true`, without which answers are not compared.
            more: further fields of a record; further `probes` come after these.
        """
        # The order of the published file, which `write_dataset` relies on.
        probes = [Probe("rewrite", fact.prompt_text, fact.target, fact.target_true)]
        probes += [
            Probe("paraphrase", text, fact.target, fact.target_true) for text in fact.paraphrases
        ]
        probes += [
            Probe("neighbourhood", text, answer, fact.target) for text, answer in fact.neighbours
        ]
        return cls(id, (fact,), (*probes, *more.pop("probes", ())), **more)


def without_evidence(fact: Fact) -> Fact:
    """Return the fact without the paraphrases and neighbours that an edit of it is measured by."""
    return replace(fact, paraphrases=(), neighbours=())


@dataclass(frozen=True)
class Snippet:
    """A text about an entity, by name."""

    name: str
    text: str


@dataclass(frozen=True)
class References:
    """Texts that generated ones are compared with.

    Args:
        snippets: key (`Record.references`) -> texts about entities that have the attribute.
        tfidf: fitted on all of them, or as published.
    """

    snippets: Mapping[str, Sequence[Snippet]]
    tfidf: TfIdf


@dataclass(frozen=True)
class Dataset:
    """Records of one benchmark.

    Args:
        name: e.g. "counterfact".
        form: says which metrics are reported.
        skipped: malformed records that were left out at the caller's wish: place and fault of each.
    """

    name: str
    form: Form
    records: tuple[Record, ...]
    references: References | None = None
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "records", tuple(self.records))
        if not self.records:
            raise FactError(f"data set {self.name!r} has no records")

    @cached_property
    def digest(self) -> str:
        """sha256 of the records, see `digest_of`."""
        return digest_of(self.records)


def digest_of(records: Iterable[Record]) -> str:
    """Return the sha256 of records as JSON, in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.to_dict(), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()
