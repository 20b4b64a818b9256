"""What a model knew: one record per fact, and the shares that papers report of them.

Plain numbers, with nothing of the model left in them. Refuses to know how they were measured: see
knows.

Sources: P@k, MRR and averages over relations: Petroni et al. 2019 (LAMA), arXiv:1909.01066. Several
prompts per fact: Jiang et al. 2020 (LPAQA), arXiv:1911.12543. Consistency: Elazar et al. 2021
(ParaRel), arXiv:2102.01017.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, MinLen
from torch import Tensor

from engram.checks import checked_call
from engram.errors import SettingError
from engram.facts import Fact
from engram.files.atomic import atomic_file
from engram.files.checksums import stamped
from engram.files.forms import read_record

Aggregate = Literal["first", "best", "mean"]
Length = Literal["sum", "mean"]
Rank = Annotated[int, Ge(1)]
Among = Literal["vocabulary", "relation"] | Annotated[tuple[str, ...], MinLen(1)]

_FORMAT = 1
_NAN = float("nan")
_BATCH = 1 << 22  # fact counts of resamples held at once
_COUNTED_BY = {
    "first": "the first prompt of each fact counts",
    "best": "the best prompt of each fact counts, chosen by the answer (an oracle: it flatters)",
    "mean": "log-probabilities are averaged over each fact's prompts",
}


@dataclass(frozen=True)
class Reply:
    """The model's reply to one prompt.

    Attributes:
        answer: the model's top answer.
        rank: of the fact's object, from 1; `rank == 1` means that `answer` is the object.
        log_prob: of the whole object, in nats; the mean per token with `length="mean"`.
    """

    prompt: str
    answer: str
    rank: Rank
    log_prob: float

    @property
    def right(self) -> bool:
        return self.rank == 1


@dataclass(frozen=True)
class KnownRecord:
    """One fact: the reply to each of its prompts, and the one that counts (see `aggregate` of
    `knows`).
    """

    fact: Fact
    replies: Annotated[tuple[Reply, ...], MinLen(1)]
    answer: str
    rank: Rank
    log_prob: float

    @property
    def right(self) -> bool:
        return self.rank == 1

    @property
    def consistency(self) -> float | None:
        """Share of pairs of prompts with the same top answer; None with a single prompt.

        Source: Elazar et al. 2021, Sec. 3.
        """
        pairs = list(combinations((reply.answer for reply in self.replies), 2))
        return fmean(a == b for a, b in pairs) if pairs else None


@dataclass(frozen=True)
class Scores:
    """Means over facts. The last three are over the facts that have several prompts, and None
    without any.

    Attributes:
        p_at_1, p_at_k: share of facts whose object is the top answer; is among the k best.
        mrr: mean of 1 / rank.
        log_prob: mean log-probability of the object, nats.
        consistency: share of pairs of a fact's prompts that have the same top answer, right or
            wrong.
        accuracy: share of facts whose first prompt is answered correctly.
        both: share of facts of which every prompt is answered correctly: consistent and accurate.
    """

    p_at_1: float
    p_at_k: float
    mrr: float
    log_prob: float
    consistency: float | None
    accuracy: float | None
    both: float | None


@dataclass(frozen=True)
class Knowledge:
    """What `knows` measured.

    Attributes:
        records: one per fact, in the order in which the facts were given.
        candidates: what objects were ranked among: "vocabulary", "relation", or the candidates
            themselves.
        aggregate, length, k: as given to `knows`.
        model: the model's name.
    """

    records: Annotated[tuple[KnownRecord, ...], MinLen(1)]
    candidates: Among
    aggregate: Aggregate
    length: Length
    k: Rank
    model: str

    def known(self) -> list[Fact]:
        """Return the facts whose object is the model's top answer."""
        return [record.fact for record in self.records if record.right]

    def by_relation(self) -> dict[str | None, list[KnownRecord]]:
        """Return the records by their fact's relation, sorted by name; those of facts without one
        under None, last.
        """
        names = {record.fact.relation for record in self.records}
        # None cannot be compared with a text, so whether there is a name decides first.
        ordered = sorted(names, key=lambda name: (name is None, name or ""))
        return {
            name: [record for record in self.records if record.fact.relation == name]
            for name in ordered
        }

    @checked_call
    def scores(self, relation: str | None = None) -> Scores:
        """Return means over all facts (micro), or over those of one relation.

        Raises:
            SettingError: no fact has that relation.
        """
        rows = self.records if relation is None else self.by_relation().get(relation)
        if not rows:
            names = ", ".join(str(name) for name in self.by_relation())
            raise SettingError(f"relation={relation!r} is none of the facts'; they have {names}")
        return self._means(rows)

    def macro(self) -> Scores:
        """Return means over relations of each relation's mean, as LAMA reports them: a relation
        with few facts counts as much as any.
        """
        # nanmean twice: a relation whose facts have one prompt each has no consistency to count.
        means = [self._values(rows).nanmean(0) for rows in self.by_relation().values()]
        return _scores(torch.stack(means).nanmean(0))

    @checked_call
    def intervals(
        self, seed: int | torch.Generator = 0, *, samples: int = 1000, level: float = 0.95
    ) -> dict[Literal["micro", "macro"], tuple[Scores, Scores]]:
        """Return (low, high) of every mean by the percentile bootstrap over facts.

        Args:
            seed: or a generator on the CPU; the same one gives the same intervals.
            samples: resamples; each draws as many facts as there are, with replacement.
            level: share of the resampled means that are between low and high.
        Raises:
            SettingError: `samples` below 1, `level` outside (0, 1).
        """
        if samples < 1 or not 0 < level < 1:
            raise SettingError(
                f"samples={samples}, level={level}: need at least one sample and a level between "
                "0 and 1"
            )
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        values_nm = self._values(self.records)
        relations = list(self.by_relation())
        relation_n = torch.tensor(
            [relations.index(record.fact.relation) for record in self.records]
        )
        micro, macro = [], []
        n, done = len(self.records), 0
        # In pieces, so that memory stays bounded; the draws do not depend on the pieces' size.
        while done < samples:
            size = min(samples - done, max(1, _BATCH // n))
            draws_bn = torch.randint(n, (size, n), generator=generator)
            # How often each fact was drawn: means are then one matrix product, without copies of
            # the values.
            counts_bn = torch.zeros(size, n, dtype=torch.float64).scatter_add_(
                1, draws_bn, torch.ones(size, n).double()
            )
            micro.append(_weighted(counts_bn, values_nm))
            groups = [relation_n == i for i in range(len(relations))]
            # Facts are drawn and not relations: a relation's mean moves with the facts it got.
            macro.append(
                torch.stack([_weighted(counts_bn[:, g], values_nm[g]) for g in groups]).nanmean(0)
            )
            done += size
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        return {
            "micro": _quantiles(torch.cat(micro), tails),
            "macro": _quantiles(torch.cat(macro), tails),
        }

    # -- as text and as a file ---------------------------------------------------------------------

    @checked_call
    def table(
        self, *, seed: int | torch.Generator = 0, samples: int = 1000, level: float = 0.95
    ) -> str:
        """Return a row per relation, then all facts with the bootstrap's interval, then the mean of
        the relations.
        """
        return "\n".join(self._lines(seed, samples, level))

    def __str__(self) -> str:
        return self.table()

    def _lines(self, seed: int | torch.Generator, samples: int, level: float) -> Iterator[str]:
        relations = self.by_relation()
        facts, names = _many(len(self.records), "fact"), _many(len(relations), "relation")
        yield f"{self.model}: {facts} of {names}"
        yield f"ranks {self._among()}; {_COUNTED_BY[self.aggregate]}"
        yield ""
        wide = max(16, *(len(str(name or "no relation")) for name in relations))
        heads = ("P@1", f"P@{self.k}", "MRR", "log p", "consistent", "both")
        yield f"{'relation':<{wide}} {'facts':>6} {'prompts':>7}" + "".join(
            f" {head:>{_WIDTHS[i]}}" for i, head in enumerate(heads)
        )

        def row(name: str, rows: Sequence[KnownRecord], scores: Scores) -> str:
            prompts = sum(len(record.replies) for record in rows)
            return f"{name:<{wide}} {len(rows):>6} {prompts:>7}" + _cells(scores)

        if len(relations) > 1:
            for name, rows in relations.items():
                yield row(str(name or "no relation"), rows, self._means(rows))
            yield ""
        yield row("all facts", self.records, self.scores())
        intervals = self.intervals(seed, samples=samples, level=level)
        for end, scores in zip(("from", "to"), intervals["micro"], strict=True):
            yield f"{f'  {level:.0%} {end}':<{wide}} {'':>6} {'':>7}" + _cells(scores)
        if len(relations) > 1:
            yield f"{'mean of relations':<{wide + 15}}" + _cells(self.macro())

    def _among(self) -> str:
        if self.candidates == "vocabulary":
            return "among the whole vocabulary"
        if self.candidates == "relation":
            return "among the objects of each relation"
        return f"among {len(self.candidates)} candidates"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it, with the means."""
        return {
            "format": _FORMAT,
            "model": self.model,
            "candidates": self.candidates
            if isinstance(self.candidates, str)
            else list(self.candidates),
            "aggregate": self.aggregate,
            "length": self.length,
            "k": self.k,
            "micro": asdict(self.scores()),
            "macro": asdict(self.macro()),
            "relations": {
                str(name or ""): asdict(self._means(rows))
                for name, rows in self.by_relation().items()
            },
            "records": [asdict(record) for record in self.records],
        }

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        text = json.dumps(stamped(self.to_dict()), ensure_ascii=False) + "\n"
        with atomic_file(path) as fresh:
            fresh.write_text(text, encoding="utf8")

    @classmethod
    def load(cls, path: str | Path) -> Knowledge:
        """Load what `save` wrote.

        Raises:
            EngramFileError: no such file, not one of ours, or damaged.
        """
        # The means in the file are for its readers; here they would be a second truth.
        advice = "Measure again with 'engram knows'"
        knowledge: Knowledge = read_record(
            path, cls, "knowledge file", version=_FORMAT, version_field="format", advice=advice
        )
        return knowledge

    def _means(self, rows: Sequence[KnownRecord]) -> Scores:
        return _scores(self._values(rows).nanmean(0))

    def _values(self, rows: Sequence[KnownRecord]) -> Tensor:
        """Return [n, metrics] in the order of `Scores`; NaN where a fact has no such metric."""
        return torch.tensor([_fact_values(record, self.k) for record in rows], dtype=torch.float64)


_WIDTHS = (6, 6, 6, 7, 10, 6)


def _fact_values(record: KnownRecord, k: int) -> list[float]:
    # The last three together, over the same facts, so that they can be compared.
    several = record.consistency is not None
    return [
        float(record.right),
        float(record.rank <= k),
        1 / record.rank,
        record.log_prob,
        record.consistency if record.consistency is not None else _NAN,
        float(record.replies[0].right) if several else _NAN,
        float(all(reply.right for reply in record.replies)) if several else _NAN,
    ]


def _weighted(counts_bn: Tensor, values_nm: Tensor) -> Tensor:
    """Return [b, metrics]: the mean of the values that are not NaN, each fact as often as it was
    drawn; NaN where none was.
    """
    known_nm = ~values_nm.isnan()
    return counts_bn @ values_nm.nan_to_num() / (counts_bn @ known_nm.double())


def _quantiles(means_bm: Tensor, tails: Tensor) -> tuple[Scores, Scores]:
    low, high = means_bm.nanquantile(tails, dim=0)
    return _scores(low), _scores(high)


def _scores(means_m: Tensor) -> Scores:
    always, several = means_m[:4].tolist(), means_m[4:].tolist()
    return Scores(*always, *(None if math.isnan(value) else value for value in several))


def _cells(scores: Scores) -> str:
    # Accuracy has no column: with `both` and P@1 beside it, a row would grow beyond 80 characters.
    shares = [value for name, value in asdict(scores).items() if name != "accuracy"]
    texts = [
        "—" if value is None else f"{value:.2f}" if i == 3 else f"{value:.3f}"
        for i, value in enumerate(shares)
    ]
    return "".join(f" {text:>{_WIDTHS[i]}}" for i, text in enumerate(texts))


def _many(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"
