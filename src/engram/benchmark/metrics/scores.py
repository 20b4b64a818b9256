"""One record's scores, from what was measured before its edit and after it.

Knows numbers and texts. Refuses to know models, and which of the scores a benchmark reports: see
table, which also names the sources. A score is None where the record lacks its prompts, or they
were not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from math import exp
from statistics import fmean

from engram.benchmark.data.records import Record
from engram.benchmark.metrics.outcomes import Measured, Outcome
from engram.evaluate.answers import begins, contains
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
    """Return what the edit did to one record: name -> value, of all scores that a record can have.

    A score over several prompts is their mean. The unedited model's scores are
    `scores(record, before, before)`.

    Args:
        before, after: of this record, a reading for each of its probes.
    Returns:
        Shares and probabilities between 0 and 1, GE in bits, KL in nats; see `table.METRICS` for
        names and for how they are reported.
    """
    values: dict[str, float | None] = {
        name: fmean(of_each) if of_each else None
        for name, of_each in of_prompts(record, before, after).items()
    }
    # These need several prompts at once, so that no mean over prompts gives them.
    values |= {
        "multi-hop": _multi_hop(record, after),
        "instance-wise": _instance_wise(record, after),
    }
    values |= {kind: _ripple(record, kind, before, after) for kind in RIPPLES}
    values |= {"GE": after.fluency, "RS": after.consistency}
    values |= {"essence": after.essence, "essence-published": after.essence_published}
    read = before.perplexity is not None and after.perplexity is not None
    return values | {
        "perplexity": after.perplexity / before.perplexity if read else None,  # type: ignore[operator]
        "drift": after.drift,
    }


def of_measured(record: Record, measured: Measured) -> dict[str, float | None]:
    """Return the scores, and what the edit cost."""
    costs = {
        "failed": float(measured.error is not None),
        "seconds": measured.seconds,
        "size": float(measured.size),
    }
    return scores(record, measured.before, measured.after) | costs


def of_prompts(record: Record, before: Outcome, after: Outcome) -> dict[str, list[float]]:
    """Return the values, one for each prompt, of the scores that are means over prompts."""
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
    """Compare strictly: a tie is lost, whichever of the two is wanted."""
    # Negative log-probabilities: the smaller is the likelier. A neighbour's probe wants the true
    # object, so this one line is ES, PS and NS.
    return None if after.unwanted is None else float(after.wanted < after.unwanted)


def _margin(probe: Probe, before: Reading, after: Reading) -> float | None:
    # exp(-NLL) of a mean over tokens is the geometric mean probability of a token, as released. The
    # paper writes P[o], which it is for objects of one token only.
    return None if after.unwanted is None else exp(-after.wanted) - exp(-after.unwanted)


def _share(probe: Probe, before: Reading, after: Reading) -> float | None:
    return after.correct


def _whole(probe: Probe, before: Reading, after: Reading) -> float | None:
    # All tokens, each after the right ones before it. zsRE's token shares (_share) are higher:
    # "Guinea" alone is half of "Guinea-Bissau".
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
        # To the letter, also beyond the answer: neighbours can keep their answer and change what
        # follows.
        else float(after.answer == before.answer)
    )


def _kl(probe: Probe, before: Reading, after: Reading) -> float | None:
    return after.kl


# Attribute prompts (AS, AM) are scored because the released code does; no headline number has them.
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
    """Tell for each of these probes whether the greedy answer contains the right one.

    None where no answer was generated.
    """
    contained = (_held(record.probes[i], outcome.readings[i], outcome.readings[i]) for i in places)
    return [None if value is None else bool(value) for value in contained]


def _multi_hop(record: Record, after: Outcome) -> float | None:
    answered = _answered(record, record.of("multi-hop"), after)
    return float(any(answered)) if answered and None not in answered else None


def _instance_wise(record: Record, after: Outcome) -> float | None:
    answered = _answered(record, record.of("single-hop"), after)
    return float(all(answered)) if answered and None not in answered else None


def _ripple(record: Record, kind: ProbeKind, before: Outcome, after: Outcome) -> float | None:
    """Return the share of a kind's tests that are passed.

    A test counts if the unedited model answers all its conditions: an edit of "Ann's mother" can
    move her grandmother only if the model knew the mother's mother.
    """
    passed = []
    for places in _tests(record, kind):
        conditions = [i for i in places if record.probes[i].condition]
        queries = [i for i in places if not record.probes[i].condition]
        answered = _answered(record, queries, after)
        if not answered or None in answered or not all(_answered(record, conditions, before)):
            continue
        # all([]) is True above: a test without conditions always counts.
        passed.append(
            float(all(answered) if record.probes[queries[0]].joined == "all" else any(answered))
        )
    return fmean(passed) if passed else None


def _tests(record: Record, kind: ProbeKind) -> list[list[int]]:
    """Return the numbers of each test's probes; a probe without a test's name is a test itself."""

    def test(place: int) -> tuple[str, int]:
        name = record.probes[place].test
        return ("", place) if name is None else (name, -1)

    places = [i for i, probe in enumerate(record.probes) if probe.kind == kind]
    # groupby needs equal neighbours. A probe without a test has its own place in the key, so that
    # two of them never form one group.
    return [list(group) for _, group in groupby(sorted(places, key=test), key=test)]
