"""One record's scores, from what was measured before its edit and after it.

Knows numbers and texts. Refuses to know models, and which of the scores a benchmark reports: see
table. A score is None where the record lacks its prompts, or they were not measured. Sources are in
the table.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from math import exp
from statistics import fmean

from engram.benchmark.data.records import Record
from engram.benchmark.metrics.outcomes import Measured, Outcome
from engram.evaluate.probes import Probe, ProbeKind, Reading

_Score = Callable[
    [Probe, Reading, Reading], float | None
]  # (probe, before, after) -> of one prompt

RIPPLES: tuple[ProbeKind, ...] = (
    "logical-generalisation",
    "compositionality-1",
    "compositionality-2",
    "subject-aliasing",
    "preservation",
    "relation-specificity",
)


def scores(record: Record, before: Outcome, after: Outcome) -> dict[str, float | None]:
    """What the edit did to one record: name -> value, of everything that a record can have.

    A score over several prompts is their mean. Of the unedited model: `scores(record, before,
    before)`.

    Args:
        before, after: of this record, a reading for each of its probes.
    Returns:
        Shares and probabilities between 0 and 1, GE in bits, KL in nats; see `table.METRICS` for
        names and for how they are reported.
    """
    found: dict[str, float | None] = {
        name: fmean(values) if values else None
        for name, values in of_prompts(record, before, after).items()
    }
    found |= {
        "multi-hop": _multi_hop(record, after),
        "instance-wise": _instance_wise(record, after),
    }
    found |= {kind: _ripple(record, kind, before, after) for kind in RIPPLES}
    found |= {"GE": after.fluency, "RS": after.consistency}
    found |= {"essence": after.essence, "essence-published": after.essence_published}
    told = before.perplexity is not None and after.perplexity is not None
    return found | {
        "perplexity": after.perplexity / before.perplexity if told else None,  # type: ignore[operator]
        "drift": after.drift,
    }


def of_measured(record: Record, measured: Measured) -> dict[str, float | None]:
    """The scores, and what the edit cost."""
    costs = {
        "failed": float(measured.error is not None),
        "seconds": measured.seconds,
        "size": float(measured.size),
    }
    return scores(record, measured.before, measured.after) | costs


def of_prompts(record: Record, before: Outcome, after: Outcome) -> dict[str, list[float]]:
    """The values behind each score that is a mean over a record's prompts, one a prompt."""
    return {
        name: _values(record, kind, score, before, after)
        for name, (kind, score) in _PROMPTS.items()
    }


def _values(
    record: Record, kind: ProbeKind, score: _Score, before: Outcome, after: Outcome
) -> list[float]:
    values = (
        score(record.probes[i], before.readings[i], after.readings[i]) for i in record.of(kind)
    )
    return [value for value in values if value is not None]


# -- one prompt ------------------------------------------------------------------------------------


def _won(probe: Probe, before: Reading, after: Reading) -> float | None:
    """Strictly: a tie is lost, whichever of the two is wanted."""
    return None if after.unwanted is None else float(after.wanted < after.unwanted)


def _margin(probe: Probe, before: Reading, after: Reading) -> float | None:
    return None if after.unwanted is None else exp(-after.wanted) - exp(-after.unwanted)


def _share(probe: Probe, before: Reading, after: Reading) -> float | None:
    return after.correct


def _whole(probe: Probe, before: Reading, after: Reading) -> float | None:
    return float(after.correct >= 1)


def _said(probe: Probe, before: Reading, after: Reading) -> float | None:
    return (
        None
        if after.answer is None
        else float(begins(after.answer, (probe.wanted, *probe.aliases)))
    )


def _held(probe: Probe, before: Reading, after: Reading) -> float | None:
    return (
        None
        if after.answer is None
        else float(contains(after.answer, (probe.wanted, *probe.aliases)))
    )


def _kept(probe: Probe, before: Reading, after: Reading) -> float | None:
    return (
        None
        if after.answer is None or before.answer is None
        else float(after.answer == before.answer)
    )


def _kl(probe: Probe, before: Reading, after: Reading) -> float | None:
    return after.kl


_PROMPTS: dict[str, tuple[ProbeKind, _Score]] = {
    "EG": ("rewrite", _said),
    "PG": ("paraphrase", _said),
    "NG": ("neighbourhood", _said),
    "NG+": ("neighbourhood+", _said),
    "kept": ("neighbourhood", _kept),
    "ES": ("rewrite", _won),
    "EM": ("rewrite", _margin),
    "EA": ("rewrite", _whole),
    "PS": ("paraphrase", _won),
    "PM": ("paraphrase", _margin),
    "PA": ("paraphrase", _whole),
    "NS": ("neighbourhood", _won),
    "NM": ("neighbourhood", _margin),
    "NA": ("neighbourhood", _whole),
    "AS": ("attribute", _won),
    "AM": ("attribute", _margin),
    "NS+": ("neighbourhood+", _won),
    "NM+": ("neighbourhood+", _margin),
    "NKL": ("neighbourhood", _kl),
    "NKL+": ("neighbourhood+", _kl),
    "Efficacy": ("rewrite", _share),
    "Paraphrase": ("paraphrase", _share),
    "Specificity": ("neighbourhood", _share),
    "rewrite-said": ("rewrite", _said),
    "rephrase-said": ("rephrase", _said),
    "locality-said": ("locality", _said),
    "locality-kept": ("locality", _kept),
    "rewrite": ("rewrite", _share),
    "rephrase": ("rephrase", _share),
    "locality": ("locality", _share),
    "locality-KL": ("locality", _kl),
    "edit-wise": ("rewrite", _held),
}


# -- several prompts together ----------------------------------------------------------------------


def _answered(record: Record, places: Iterable[int], outcome: Outcome) -> list[bool | None]:
    """Whether what is said to each of these probes holds its answer; None where nothing was asked
    for.
    """
    found = (_held(record.probes[i], outcome.readings[i], outcome.readings[i]) for i in places)
    return [None if each is None else bool(each) for each in found]


def _multi_hop(record: Record, after: Outcome) -> float | None:
    answered = _answered(record, record.of("multi-hop"), after)
    return float(any(answered)) if answered and None not in answered else None


def _instance_wise(record: Record, after: Outcome) -> float | None:
    answered = _answered(record, record.of("single-hop"), after)
    return float(all(answered)) if answered and None not in answered else None


def _ripple(record: Record, kind: ProbeKind, before: Outcome, after: Outcome) -> float | None:
    """Share of a kind's tests that are passed, of those whose every condition the unedited model
    answers.
    """
    passed = []
    for places in _tests(record, kind):
        conditions = [i for i in places if record.probes[i].condition]
        asked = [i for i in places if not record.probes[i].condition]
        answered = _answered(record, asked, after)
        if not answered or None in answered or not all(_answered(record, conditions, before)):
            continue
        passed.append(
            float(all(answered) if record.probes[asked[0]].joined == "all" else any(answered))
        )
    return fmean(passed) if passed else None


def _tests(record: Record, kind: ProbeKind) -> list[list[int]]:
    """Places of the probes of each test; one without a name is a test of its own."""

    def test(place: int) -> tuple[str, int]:
        name = record.probes[place].test
        return ("", place) if name is None else (name, -1)

    places = [i for i, probe in enumerate(record.probes) if probe.kind == kind]
    return [list(group) for _, group in groupby(sorted(places, key=test), key=test)]


# -- what is said ----------------------------------------------------------------------------------


def begins(said: str, answers: Sequence[str]) -> bool:
    """Whether a text begins with one of the answers, as words: "Paris, of course" does with
    "Paris", "Parisian" does not.

    Space in front is left out, capitals matter (a name in other letters is seldom the name), and
    characters that Unicode holds to be compatible are the same, however they are composed. An
    article in front of the answer is not the answer.
    """
    text = _folded(said).lstrip()
    return any(_pattern(answer).match(text) for answer in answers)


def contains(said: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands anywhere in a text, as words; see `begins`."""
    text = _folded(said)
    return any(_pattern(answer).search(text) for answer in answers)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


@lru_cache(4096)
def _pattern(answer: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(_folded(answer).strip())}(?![\w\u0300-\u036f])")
