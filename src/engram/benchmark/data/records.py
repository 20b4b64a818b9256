"""One record type for every benchmark: the facts of one edit, and everything that is asked before
and after it.

Knows texts. Refuses to know files (see the loaders beside), models, and how answers are turned into
scores (see metrics).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from engram.benchmark.data.tfidf import TfIdf
from engram.checks import one_of
from engram.errors import FactError
from engram.facts import Fact

ProbeKind = Literal[
    "rewrite",
    "paraphrase",
    "neighbourhood",
    "attribute",  # CounterFact, zsRE
    "neighbourhood+",  # CounterFact+: the edit stated in front of a neighbour
    "rephrase",
    # the flattened form of CounterFact: not the paraphrases and neighbours of the paper
    "locality",
    "multi-hop",
    "single-hop",  # MQuAKE
    "logical-generalisation",
    "compositionality-1",
    "compositionality-2",
    "subject-aliasing",
    "preservation",
    "relation-specificity",  # RippleEdits' six
]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)

Form = Literal["counterfact", "flat", "zsre", "mquake", "ripple"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Probe:
    """One question, asked before an edit as after it.

    Args:
        kind: what it shows.
        prompt: full text, the answer next.
        wanted: the answer that shall be said after the edit: the new object, or for a neighbour the
            true one.
        unwanted: the answer that it is compared with; None: it is not compared.
        aliases: further texts that count as `wanted` where it is looked for in what the model says.
        test: probes with the same name are one test of RippleEdits, passed if `joined` of them are.
        condition: asked only to find out whether the test counts: it does if the unedited model
            answers all its conditions.
    Raises:
        FactError: a kind that does not exist, an empty text, or `wanted` and `unwanted` alike.
    """

    kind: ProbeKind
    prompt: str
    wanted: str
    unwanted: str | None = None
    aliases: tuple[str, ...] = ()
    test: str | None = None
    joined: Literal["any", "all"] = "any"
    condition: bool = False

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS, error=FactError)
        if not self.prompt.strip() or not self.wanted.strip():
            raise FactError(
                f"probe with prompt={self.prompt!r} and wanted={self.wanted!r}: both have to be words"
            )
        if self.unwanted is not None and (
            not self.unwanted.strip() or self.unwanted.strip() == self.wanted.strip()
        ):
            raise FactError(
                f"unwanted={self.unwanted!r}: expected words other than those of wanted={self.wanted!r}, or None"
            )
        object.__setattr__(self, "aliases", tuple(self.aliases))

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts whose probability is measured."""
        return (self.wanted,) if self.unwanted is None else (self.wanted, self.unwanted)


@dataclass(frozen=True)
class Record:
    """One edit and what is asked about it.

    Args:
        id: unique in its data set, e.g. CounterFact's case_id as text.
        facts: what is rewritten, in one edit; with `target_true` where the benchmark has it.
        probes: the rewrite's own prompt among them.
        generation: prompts that are continued freely, one text each; the same one may stand there
            several times.
        references: key of the texts in `Dataset.references` that tell of entities for which the new
            object is true.
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
                f"record {self.id!r} has {len(self.facts)} facts and {len(self.probes)} probes; it needs both"
            )

    def of(self, kind: ProbeKind) -> list[int]:
        """Places among `probes` of those of a kind, conditions left out."""
        return [
            i for i, probe in enumerate(self.probes) if probe.kind == kind and not probe.condition
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Record:
        """What `to_dict` gave, also after JSON."""
        given = dict(record)
        facts = tuple(Fact.from_dict(each) for each in given.pop("facts"))
        probes = tuple(
            Probe(**{**each, "aliases": tuple(each["aliases"])}) for each in given.pop("probes")
        )
        return cls(facts=facts, probes=probes, **given)

    @classmethod
    def from_fact(cls, id: str, fact: Fact, **more: Any) -> Record:
        """The usual probes of one fact: its prompt, its paraphrases, its neighbours.

        Args:
            fact: with `target_true`, without which answers are not compared.
            more: further fields of a record; further `probes` come behind these.
        """
        probes = [Probe("rewrite", fact.prompt_text, fact.target, fact.target_true)]
        probes += [
            Probe("paraphrase", text, fact.target, fact.target_true) for text in fact.paraphrases
        ]
        probes += [
            Probe("neighbourhood", text, answer, fact.target) for text, answer in fact.neighbours
        ]
        return cls(id, (fact,), (*probes, *more.pop("probes", ())), **more)


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
        skipped: malformed records that were left out because the caller asked for that: where each
            stands and what is wrong.
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
    """sha256 of records as JSON, in their order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.to_dict(), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()
