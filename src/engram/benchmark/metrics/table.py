"""The table of metrics: each number's name, its benchmarks, which way is better, and its source.

Reports, the documentation and the summary are made from it. Refuses to know how a number is
computed (see scores and summary).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engram.benchmark.data.records import Form

Better = Literal["up", "down", "neither"]

FACTS: tuple[Form, ...] = ("counterfact", "zsre")
COUNTERFACT: tuple[Form, ...] = ("counterfact",)
ZSRE: tuple[Form, ...] = ("zsre",)
FLAT: tuple[Form, ...] = ("flat",)
MQUAKE: tuple[Form, ...] = ("mquake",)
RIPPLE: tuple[Form, ...] = ("ripple",)
EVERY: tuple[Form, ...] = get_args(Form)

ROME = "Meng et al. 2022, arXiv:2202.05262"
MEMIT = "Meng et al. 2023, arXiv:2210.07229"
PLUS = "Hoelscher-Obermaier et al. 2023, arXiv:2305.17553"
HOPS = "Zhong et al. 2023, arXiv:2305.14795"
RIPPLES = "Cohen et al. 2024, arXiv:2307.12976"
OURS = "this library"


@dataclass(frozen=True)
class Metric:
    """One number of a report.

    Attributes:
        title: head of its column.
        forms: benchmarks that report it.
        meaning: one line.
        better: which way an editor wants it to go.
        unit: of `scale` times the value that `scores` gives.
        headline: whether a table that has to be short shows it.
    """

    title: str
    forms: tuple[Form, ...]
    meaning: str
    source: str
    better: Better = "up"
    unit: str = "%"
    scale: float = 100.0
    headline: bool = True

    @property
    def described(self) -> str:
        """What it is and its unit, in one line."""
        known = self.unit == "%" or self.unit in self.meaning
        return self.meaning if known else f"{self.meaning} ({self.unit})"


def _more(
    title: str,
    forms: tuple[Form, ...],
    meaning: str,
    source: str,
    better: Better = "up",
    unit: str = "%",
) -> Metric:
    return Metric(
        title,
        forms,
        meaning,
        source,
        better,
        unit,
        100.0 if unit in ("%", "bits × 100") else 1.0,
        headline=False,
    )


def _margin(title: str, meaning: str, source: str, *, headline: bool = True) -> Metric:
    return Metric(title, COUNTERFACT, meaning, source, unit="points", headline=headline)


def _nats(title: str, forms: tuple[Form, ...], meaning: str, source: str) -> Metric:
    return Metric(title, forms, meaning, source, "down", "nats", 1.0, headline=False)


def _ripple(title: str, meaning: str) -> Metric:
    return Metric(title, RIPPLE, f"tests passed, of those that count: {meaning}", RIPPLES)


# repeated in each family of scores, so that no reader misses it
_LAST = "answers are teacher-forced"

# The order is that of every report. What a number hides is in docs/how-to-read-the-numbers.md,
# whose list is made from this table.
METRICS: dict[str, Metric] = {
    # generation first: nothing is teacher-forced
    "SG": Metric("SG", FACTS, "harmonic mean of the means of EG, PG and NG", OURS),
    "EG": Metric(
        "EG",
        (*FACTS, "ripple"),
        "the greedy answer to the rewrite prompt begins with the new object",
        OURS,
    ),
    "PG": Metric("PG", FACTS, "EG on paraphrases", OURS),
    "NG": Metric("NG", FACTS, "the greedy answer to neighbours begins with their own object", OURS),
    "kept": _more(
        "kept",
        FACTS,
        "the greedy answer to neighbours is the unedited model's, to the letter",
        OURS,
    ),
    # CounterFact
    "S": Metric(
        "S",
        FACTS,
        "harmonic mean of the means of ES, PS, NS; for zsRE of Efficacy, Paraphrase, Specificity",
        ROME,
    ),
    "ES": Metric(
        "ES",
        COUNTERFACT,
        f"rewrite prompt: the new object is likelier than the true one; {_LAST}",
        ROME,
    ),
    "EM": _margin("EM", "margin of ES: geometric mean token probability, new minus true", ROME),
    "PS": Metric("PS", COUNTERFACT, "ES on paraphrases", ROME),
    "PM": _margin("PM", "EM on paraphrases", ROME),
    "NS": Metric(
        "NS", COUNTERFACT, "neighbours: their true object is likelier than the new one", ROME
    ),
    "NM": _margin("NM", "margin of NS: geometric mean token probability, true minus new", ROME),
    "GE": Metric(
        "GE",
        COUNTERFACT,
        "fluency: weighted entropy of bigrams and trigrams of generated text",
        ROME,
        unit="bits × 100",
    ),
    "RS": Metric(
        "RS",
        COUNTERFACT,
        "consistency: TF-IDF cosine of generated text with texts about the new object",
        ROME,
    ),
    # Neither way is better: to believe a true fact more strongly is no harm, and no aim.
    "AS": _more(
        "AS",
        COUNTERFACT,
        "ES on prompts about subjects for which the new object is true",
        ROME,
        "neither",
    ),
    "AM": Metric(
        "AM", COUNTERFACT, "EM on the prompts of AS", ROME, "neither", "points", headline=False
    ),
    "EA": _more(
        "EA",
        FACTS,
        "rewrite prompt: every token of the new object is the most probable one, the others given",
        MEMIT,
    ),
    "PA": _more("PA", FACTS, "EA on paraphrases", MEMIT),
    "NA": _more("NA", FACTS, "EA on neighbours, of their own object", MEMIT),
    "essence": _more(
        "essence", COUNTERFACT, "perplexity of texts about the subject", ROME, "down", "perplexity"
    ),
    "essence-published": _more(
        "essence (published)",
        COUNTERFACT,
        "essence, divided by one token too many as in the released code",
        ROME,
        "down",
        "perplexity",
    ),
    # CounterFact+
    "S4": _more("S4", COUNTERFACT, "harmonic mean of the means of ES, PS, NS and NS+", PLUS),
    "NS+": _more(
        "NS+", COUNTERFACT, "NS with the edit's own sentence in front of the prompt", PLUS
    ),
    "NM+": _margin(
        "NM+", "NM with the edit's own sentence in front of the prompt", PLUS, headline=False
    ),
    "NG+": _more(
        "NG+", COUNTERFACT, "NG with the edit's own sentence in front of the prompt", OURS
    ),
    # In nats. The released analysis divides by the size of the vocabulary (batch-mean of a vector):
    # times 50,257 for GPT-2.
    "NKL": _nats("NKL", FACTS, "KL(edited, unedited) of the next token at neighbours", PLUS),
    "NKL+": _nats(
        "NKL+", COUNTERFACT, "NKL with the edit's own sentence in front of the prompt", PLUS
    ),
    # zsRE
    "Efficacy": Metric(
        "Efficacy",
        ZSRE,
        f"share of the answer's tokens that are the most probable one; {_LAST}",
        ROME,
    ),
    "Paraphrase": Metric("Paraphrase", ZSRE, "Efficacy on the rephrased question", ROME),
    # Against the gold answer, as released. Other work compares with the unedited model: "kept".
    "Specificity": Metric(
        "Specificity", ZSRE, "Efficacy on an unrelated question, against its gold answer", ROME
    ),
    # the flattened form of CounterFact
    "rewrite-said": Metric(
        "rewrite, said",
        FLAT,
        "the greedy answer to the rewrite prompt begins with the new object",
        OURS,
    ),
    "rephrase-said": Metric("rephrase, said", FLAT, "rewrite, said on the rephrased prompt", OURS),
    "locality-said": Metric(
        "locality, said",
        FLAT,
        "the greedy answer to the unrelated prompt begins with its own object",
        OURS,
    ),
    "locality-kept": Metric(
        "locality, kept",
        FLAT,
        "the greedy answer to the unrelated prompt is the unedited model's, to the letter",
        OURS,
    ),
    "rewrite": Metric(
        "rewrite",
        FLAT,
        f"share of the answer's tokens that are the most probable one; {_LAST}",
        OURS,
    ),
    "rephrase": Metric(
        "rephrase",
        FLAT,
        "rewrite on the rephrased prompt, which is no paraphrase of CounterFact",
        OURS,
    ),
    "locality": Metric(
        "locality", FLAT, "rewrite on the one neighbour, against its gold answer", OURS
    ),
    "locality-KL": _nats(
        "locality KL", FLAT, "KL(edited, unedited) of the next token at the unrelated prompt", OURS
    ),
    # MQuAKE
    "multi-hop": Metric(
        "multi-hop",
        MQUAKE,
        "any of the multi-hop questions is answered with the new answer or an alias",
        HOPS,
    ),
    "edit-wise": Metric(
        "edit-wise", (*MQUAKE, *RIPPLE), "share of the edited facts that are said", HOPS
    ),
    "instance-wise": Metric(
        "instance-wise", MQUAKE, "every single hop of the chain is answered", HOPS
    ),
    # RippleEdits
    "logical-generalisation": _ripple(
        "LG", "what follows from the relation's logic, such as a brother's sister"
    ),
    "compositionality-1": _ripple("CI", "two hops, the edited one first"),
    "compositionality-2": _ripple("CII", "two hops, the edited one second"),
    "subject-aliasing": _ripple("SA", "another name of the subject"),
    "preservation": _ripple("PV", "other objects of a relation that has several stay"),
    "relation-specificity": _ripple("RSp", "other relations of the subject stay"),
    # every benchmark
    "perplexity": Metric(
        "ppl", EVERY, "perplexity of held-out text, edited over unedited", OURS, "down", "×", 1.0
    ),
    "drift": _nats(
        "drift", EVERY, "mean KL(edited, unedited) of the next token of held-out text", OURS
    ),
    "failed": _more(
        "failed",
        EVERY,
        "edits that could not be made; the record counts with the unedited model's scores",
        OURS,
        "down",
    ),
    "seconds": _more(
        "seconds", EVERY, "that the edit took, its share of a batch", OURS, "down", "s"
    ),
    "size": _more("size", EVERY, "bytes of the edit", OURS, "down", "bytes"),
}

# of the means over a data set, never of a record
HARMONIC: dict[str, dict[Form, tuple[str, ...]]] = {
    "SG": {"counterfact": ("EG", "PG", "NG"), "zsre": ("EG", "PG", "NG")},
    "S": {"counterfact": ("ES", "PS", "NS"), "zsre": ("Efficacy", "Paraphrase", "Specificity")},
    "S4": {"counterfact": ("ES", "PS", "NS", "NS+")},
}


def of_form(form: Form) -> dict[str, Metric]:
    """Return the metrics that a benchmark reports, in the order of a report."""
    return {name: metric for name, metric in METRICS.items() if form in metric.forms}
