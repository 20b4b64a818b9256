"""Measure the pocket model: what it knows, where a trace finds it, how editing goes. Makes the
tables of docs/pocket.md.

    python tools/measure_pocket.py recall --out recall.json
    python tools/measure_pocket.py trace --count 200 --out trace.json
    python tools/measure_pocket.py rome --count 200 --layers 0 1 2 3 4 5 6 7 --out rome.json
    python tools/measure_pocket.py rome --count 60 --layers 1 --at last --out control.json
    python tools/measure_pocket.py benchmark

Prints a markdown table; `--out` keeps the numbers as JSON, with versions. Uses the library's public
surface only, as anybody would; refuses to know how the model was trained. Deterministic in
`--seed`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import engram
from engram import pocket
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.metrics.outcomes import Outcome
from engram.benchmark.metrics.scores import scores
from engram.benchmark.metrics.summary import summarise
from engram.benchmark.metrics.table import METRICS
from engram.editors.contexts import sample_contexts
from engram.editors.second_moments.measure import second_moments
from engram.evaluate.probe_rows import AnswerScores, ProbeRows
from engram.locate.average import TOKEN_ROLES
from engram.model.language_model import LanguageModel

UNEDITED = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "AS", "EA", "PA", "NA")
AT_ONCE = 128  # records
WINDOW = 3  # of 8 layers, about as wide as 10 of GPT-2 XL's 48 are in effect


def sample(
    lm: LanguageModel, count: int, seed: int
) -> Iterator[tuple[pocket.KnownFact, engram.Fact]]:
    """`count` facts in random order, as counterfactual edits, that the model answers rightly at the
    edit's prompt.
    """
    order = pocket.facts()
    random.Random(seed).shuffle(order)
    found = 0
    for known in order:
        fact = pocket.as_fact(known, pocket.counterfactual(known, seed), seed=seed)
        if engram.knows(lm, engram.Fact(known.subject, fact.prompt, known.object)).known():
            yield known, fact
            found += 1
        if found == count:
            return


def recall(lm: LanguageModel) -> dict[str, Any]:
    """Held-out (fact, template) pairs whose most probable next token is the object; in all, and by
    relation.

    `among_objects`: the object is the most probable of the relation's objects.
    """
    facts = [
        engram.Fact(
            known.subject,
            known.paraphrases()[0],
            known.object,
            paraphrases=tuple(
                template.replace("{}", known.subject) for template in known.paraphrases()
            ),
            relation=known.relation,
        )
        for known in pocket.facts()
        if known.held_out
    ]
    table = engram.read_facts("pocket")
    free, among = (
        engram.knows(lm, facts, candidates=each, table=table).by_relation()
        for each in ("vocabulary", "relation")
    )
    hits = {
        relation: [
            (reply.right, of_objects.right)
            for record, restricted in zip(records, among[relation], strict=True)
            for reply, of_objects in zip(record.replies, restricted.replies, strict=True)
        ]
        for relation, records in free.items()
    }
    relations = {
        relation: {
            "pairs": len(h),
            "recall": fmean(a for a, _ in h),
            "among_objects": fmean(b for _, b in h),
        }
        for relation, h in hits.items()
    }
    everything = [h for hs in hits.values() for h in hs]
    return {
        "facts": len(pocket.facts()),
        "pairs": len(everything),
        "recall": fmean(a for a, _ in everything),
        "among_objects": fmean(b for _, b in everything),
        "relations": relations,
    }


def average_trace(lm: LanguageModel, count: int, seed: int) -> dict[str, Any]:
    """Indirect effects by layer, averaged over facts, for each site and place of a token:
    `engram.average_trace` as it comes,
    but for noise that is scaled by the whole table's subjects."""
    facts = [
        replace(fact, target=known.object, target_true=None)
        for known, fact in sample(lm, count, seed)
    ]
    subjects = sorted({known.subject for known in pocket.facts()})
    average = engram.average_trace(
        lm, facts, keep="all", window=WINDOW, samples=10, noise="s3", noise_subjects=subjects
    )
    return {
        "facts": len(average.traces),
        "clean": average.clean,
        "corrupted": average.corrupted,
        "window": WINDOW,
        "effects": {
            site: dict(zip(TOKEN_ROLES, average.effects(site).mean.tolist(), strict=True))
            for site in average.sites
        },
    }


def success(lm: LanguageModel, texts: Sequence[str], better: str, worse: str) -> float:
    """Share of texts after which `better` is more probable than `worse`, in percent."""
    probabilities = lm.probabilities(
        [(text, answer) for text in texts for answer in (better, worse)]
    )
    return 100 * fmean(a > b for a, b in zip(probabilities[::2], probabilities[1::2], strict=True))


def successes(lm: LanguageModel, fact: engram.Fact) -> dict[str, float]:
    """Return what one edited fact scores on the model as it is, in percent; without a score that
    there are no texts for.
    """
    new, true = fact.target, str(fact.target_true)
    asked = {
        "efficacy": ([fact.prompt_text], new, true),
        "paraphrase": (fact.paraphrases, new, true),
        "neighbourhood": ([text for text, _ in fact.neighbours], true, new),
    }
    return {name: success(lm, *about) for name, about in asked.items() if about[0]}


def averaged(scored: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each score over facts, and the harmonic mean of these three as `score` (S
    in the paper).
    """
    means = {
        name: fmean(s[name] for s in scored if name in s)
        for name in ("efficacy", "paraphrase", "neighbourhood")
    }
    return {**means, "score": 3 / sum(1 / max(value, 1e-9) for value in means.values())}


def at_last_token(fact: engram.Fact) -> engram.Fact:
    """Return the same edit made at the prompt's last token: its last word plays the subject."""
    head, _, word = fact.prompt_text.rpartition(" ")
    return replace(fact, subject=word, prompt=head.replace("{", "").replace("}", "") + " {}")


def edit_scores(
    lm: LanguageModel, count: int, seed: int, layer: int, at: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Efficacy, paraphrase and neighbourhood success (percent) of single edits at one layer, over
    `count` facts.
    """
    scored = []
    for _, fact in sample(lm, count, seed):
        asked = fact if at == "subject" else at_last_token(fact)
        edit = engram.rewrite(lm, asked, method="rome", layer=layer, **settings)
        with edit.applied(lm):
            scored.append(successes(lm, fact))
    return {"layer": layer, "at": at, "facts": len(scored), **averaged(scored)}


def unedited(lm: LanguageModel) -> dict[str, Any]:
    """Return the bundled benchmark before any edit: each number's mean over records and its 95 %
    interval, as reports have them.
    """
    dataset, rows = pocket_benchmark(), []
    with torch.no_grad():
        for start in range(0, len(dataset.records), AT_ONCE):
            some = dataset.records[start : start + AT_ONCE]
            tally, _ = AnswerScores.read(lm, ProbeRows(lm, [record.probes for record in some]))
            for record, readings in zip(some, tally.readings(), strict=True):
                rows.append(scores(record, Outcome(readings), Outcome(readings)))
    found = summarise(rows, dataset.form)
    scaled = {
        name: [
            METRICS[name].scale * x for x in (found[name].mean, found[name].low, found[name].high)
        ]
        for name in UNEDITED
    }
    return {"records": len(rows), "digest": dataset.digest, "numbers": scaled}


def shown_recall(result: dict[str, Any]) -> str:
    lines = ["| relation | pairs | recall | among the relation's objects |", "|---|---|---|---|"]
    for name, r in [*result["relations"].items(), ("**all**", result)]:
        lines.append(
            f"| {name} | {r['pairs']} | {100 * r['recall']:.1f} | {100 * r['among_objects']:.1f} |"
        )
    return "\n".join(lines)


def shown_trace(result: dict[str, Any]) -> str:
    layers = len(result["effects"]["residual"]["last"])
    lines = [
        f"Clean {result['clean']:.3f}, corrupted {result['corrupted']:.3f}, {result['facts']} "
        f"facts.",
        "",
    ]
    lines += [
        "| indirect effect at layer | " + " | ".join(map(str, range(layers))) + " |",
        "|---" * (layers + 1) + "|",
    ]
    for site, places in result["effects"].items():
        for place, values in places.items():
            lines.append(
                f"| {site}, {place} token | " + " | ".join(f"{v:.3f}" for v in values) + " |"
            )
    return "\n".join(lines)


def shown_rome(result: dict[str, Any]) -> str:
    lines = [
        "| layer | edited at | facts | efficacy | paraphrase | neighbourhood | score |",
        "|---" * 7 + "|",
    ]
    for r in result["layers"]:
        numbers = " | ".join(
            f"{r[name]:.1f}" for name in ("efficacy", "paraphrase", "neighbourhood", "score")
        )
        lines.append(f"| {r['layer']} | {r['at']} token | {r['facts']} | {numbers} |")
    return "\n".join(lines)


def shown_unedited(result: dict[str, Any]) -> str:
    cells = [
        f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, low, high in result["numbers"].values()
    ]
    names = result["numbers"]
    return "\n".join(
        [
            f"{result['records']} records",
            *(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(cells), cells)),
        ]
    )


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("recall", "trace", "rome", "benchmark"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--at", choices=("subject", "last"), default="subject")
    parser.add_argument(
        "--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="settings of ROME"
    )
    parser.add_argument(
        "--corpus", choices=("bundled", "sampled"), default="bundled", help="what C is measured on"
    )
    parser.add_argument("--model", default="pocket", help="another folder with a pocket model")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = engram.load(given.model, dtype=torch.float32)
    began = time.monotonic()
    if given.what == "recall":
        result = recall(lm)
        print(shown_recall(result))
    elif given.what == "trace":
        result = average_trace(lm, given.count, given.seed)
        print(shown_trace(result))
    elif given.what == "benchmark":
        result = unedited(lm)
        print(shown_unedited(result))
    else:
        settings = dict(given.set)
        moments = second_moments(
            lm, given.layers, None if given.corpus == "sampled" else given.corpus
        )
        settings |= {"second_moments": moments, "contexts": sample_contexts(lm)}
        rows = [
            edit_scores(lm, given.count, given.seed, layer, given.at, settings)
            for layer in given.layers
        ]
        result = {"layers": rows, "corpus": given.corpus, "settings": dict(given.set)}
        print(shown_rome(result))
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    record = {
        "what": given.what,
        "seed": given.seed,
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine,
        **result,
    }
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
