"""Measure a model: what it knows, where a trace finds it, how editing goes. The numbers of
docs/pocket.md and docs/smollm2.md.

    python tools/measure_model.py recall --out recall.json
    python tools/measure_model.py trace --count 200 --out trace.json
    python tools/measure_model.py rome --count 200 --layers 0 1 2 3 4 5 6 7 --out rome.json
    python tools/measure_model.py control --count 30 --layers 1 --out control.json
    python tools/measure_model.py benchmark
    python tools/measure_model.py trace --run traces.sqlite --window 6 --samples 3 \\
        --model smollm2 --dtype bfloat16 --facts ../shared/data/counterfact.jsonl.gz

Prints a markdown table; `--out` keeps the numbers as JSON, with versions. Uses the library's public
surface, as anybody would; refuses to know how a model was trained, and which of its facts are known
(see known_facts). Deterministic in `--seed`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import engram
from engram.benchmark.data.counterfact import with_statement
from engram.benchmark.data.pocket_benchmark import pocket_benchmark
from engram.benchmark.data.records import Dataset, Record
from engram.benchmark.metrics.outcomes import MeasureConfig
from engram.benchmark.metrics.scores import scores
from engram.benchmark.metrics.summary import Row, summarise
from engram.benchmark.metrics.table import METRICS
from engram.benchmark.phase import Phase
from engram.edit.prompt_edit import PromptEdit
from engram.editors.presets import preset
from engram.editors.second_moments.measure import second_moments
from engram.evaluate.probe_rows import AnswerScores, ProbeRows
from engram.knowledge.knowledge import KnownRecord
from engram.locate.average import TOKEN_ROLES, AverageTrace, role_number
from engram.model.language_model import LanguageModel
from known_facts import FactSource, add_options, source
from page_tables import markdown

UNEDITED = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "AS", "EA", "PA", "NA")
SHOWN = ("ES", "PS", "NS", "S")
AT_ONCE = 128  # records
WINDOW = 3  # of pocket's 8 layers, about as wide as 10 of GPT-2 XL's 48 are in effect
CURVES = ("last subject", "last")  # roles whose effects are shown layer by layer


# -- what it knows ---------------------------------------------------------------------------------


def recall(lm: LanguageModel, facts: FactSource) -> dict[str, Any]:
    """Return what the model says where it is asked for facts; in all, and by relation.

    `among_objects`: the object is ranked among the relation's objects, not in the vocabulary.
    """
    asked, table = facts.asked()
    free = engram.knows(lm, asked, table=table, k=10)
    # objects of several tokens compare by the mean, else the shorter one wins
    among = (
        engram.knows(lm, asked, candidates="relation", table=table, length="mean")
        if facts.ranks_objects
        else None
    )

    def of(relation: str | None) -> dict[str, Any]:
        records, restricted = (
            [] if each is None else each.by_relation()[relation] if relation else each.records
            for each in (free, among)
        )
        pairs = ranks(records)
        about = {"facts": len(records), "pairs": len(pairs), **means(pairs)}
        return about | ({"among_objects": means(ranks(restricted))["recall"]} if restricted else {})

    low, high = free.intervals()["micro"]
    return {
        **of(None),
        "table": len(table),
        "recall interval": [low.p_at_1, high.p_at_1],
        "relations": {str(name): of(name) for name in free.by_relation()},
    }


def ranks(records: Sequence[KnownRecord]) -> list[int]:
    """Return the object's rank after every prompt."""
    return [reply.rank for record in records for reply in record.replies]


def means(found: Sequence[int]) -> dict[str, float]:
    """Return the shares of rank 1 and of the first ten, and the mean of 1 / rank."""
    return {
        "recall": fmean(rank == 1 for rank in found),
        "recall@10": fmean(rank <= 10 for rank in found),
        "mrr": fmean(1 / rank for rank in found),
    }


# -- where a trace finds it ------------------------------------------------------------------------


def average_trace(
    lm: LanguageModel, facts: FactSource, given: argparse.Namespace, **paths: Any
) -> AverageTrace:
    """Trace facts as they are before an edit, with noise that is scaled by all subjects."""
    known = [
        replace(fact, target=str(fact.target_true), target_true=None, paraphrases=(), neighbours=())
        for fact in islice(facts.facts(lm), given.count)
    ]
    return engram.average_trace(
        lm,
        known,
        out=given.run,
        samples=given.samples,
        noise="s3",
        noise_subjects=facts.subjects,
        **paths,
    )


def effects(average: AverageTrace) -> dict[str, Any]:
    """Return means and intervals of an average by site and role of the token."""
    sites = {}
    for site in average.sites:
        curves = average.effects(site)
        sites[site] = {
            role: {
                name: [round(value, 5) for value in table[role_number(role)].tolist()]
                for name, table in (
                    ("mean", curves.mean),
                    ("low", curves.low),
                    ("high", curves.high),
                )
            }
            for role in TOKEN_ROLES
            if curves.counts[role_number(role)]
        }
    total, low, high = average.total_effect()
    return {
        "facts": len(average.traces),
        "skipped": len(average.skipped),
        "clean": average.clean,
        "corrupted": average.corrupted,
        "total effect": [total, low, high],
        "window": average.traces[0].window,
        "effects": sites,
    }


def precision(facts: FactSource, given: argparse.Namespace) -> dict[str, Any]:
    """Return by how much effects in the other dtype differ from those in float32, over the same
    facts and draws of noise: cell by cell, and of the average by role.
    """
    full, other = (
        average_trace(engram.load(given.model, dtype=dtype), facts, given, window=given.window)
        for dtype in ("float32", given.dtype)
    )
    sites = {}
    for site in full.sites:
        cells = torch.cat(
            [
                (a.effects(site) - b.effects(site)).abs().flatten()
                for a, b in zip(full.traces, other.traces, strict=True)
            ]
        )
        roles = (full.effects(site).mean - other.effects(site).mean).nan_to_num().abs()
        sites[site] = {
            "mean": float(cells.mean()),
            "max": float(cells.max()),
            "average": float(roles.max()),
        }
    return {"facts": len(full.traces), "samples": given.samples, "sites": sites}


# -- how editing goes ------------------------------------------------------------------------------


@torch.no_grad()
def scored(
    lm: LanguageModel,
    facts: Iterable[engram.Fact],
    *,
    answer_tokens: int = 0,
    words: PromptEdit | None = None,
) -> list[Row]:
    """Return the benchmark's scores of each fact on the model as it is.

    Args:
        answer_tokens: length of greedy answers; 0: the scores of what is said (EG, ...) are left
            out, and so are neighbours after the edit's own sentence.
        words: the edit of words that is in force.
    """
    records = tuple(Record.from_fact(str(n), fact) for n, fact in enumerate(facts))
    if answer_tokens:
        records = with_statement(Dataset("facts", "counterfact", records)).records
    return scored_records(lm, records, MeasureConfig(answer_tokens=answer_tokens), words)


@torch.no_grad()
def scored_records(
    lm: LanguageModel,
    records: Sequence[Record],
    config: MeasureConfig,
    words: PromptEdit | None = None,
) -> list[Row]:
    """Return the benchmark's scores of each record on the model as it is."""
    rows: list[Row] = []
    for start in range(0, len(records), AT_ONCE):
        some = records[start : start + AT_ONCE]
        tally, _ = AnswerScores.read(lm, ProbeRows(lm, [record.probes for record in some]))
        found = Phase(lm, some, config, words=words).outcomes(tally, [False] * len(some))
        rows += [scores(record, each, each) for record, each in zip(some, found, strict=True)]
    return rows


def numbers(
    rows: Sequence[Row], names: Iterable[str] = SHOWN
) -> dict[str, tuple[float, float, float]]:
    """Return each number's mean over facts and its 95 % interval, as reports have them."""
    found = summarise(rows, "counterfact")
    return {
        name: tuple(
            round(METRICS[name].scale * x, 3)
            for x in (found[name].mean, found[name].low, found[name].high)
        )
        for name in names
        if name in found
    }


def at_last_token(fact: engram.Fact) -> engram.Fact:
    """Return the same edit made at the prompt's last token: its last word plays the subject."""
    head, _, word = fact.prompt_text.rpartition(" ")
    return replace(fact, subject=word, prompt=head.replace("{", "").replace("}", "") + " {}")


def usual_corpus(lm: LanguageModel) -> str:
    """Return what ROME measures C on where nothing else is said."""
    return str(preset("rome", lm.name).get("corpus", "wikipedia"))


def shared_settings(lm: LanguageModel, layers: Sequence[int], corpus: str) -> dict[str, Any]:
    """Return what many edits by ROME share: C of all layers, of one pass over text."""
    return {"second_moments": second_moments(lm, layers, corpus)}


def rome(lm: LanguageModel, facts: FactSource, given: argparse.Namespace) -> dict[str, Any]:
    """Score single edits at each layer: success on the edit's prompt, its paraphrases and its
    neighbours.
    """
    settings, corpus = dict(given.set), given.corpus or usual_corpus(lm)
    settings |= shared_settings(lm, given.layers, corpus)
    layers = []
    known = list(islice(facts.facts(lm), given.count))
    places = ("subject", "last") if given.what == "control" else (given.at,)
    for layer, at in product(given.layers, places):
        rows: list[Row] = []
        for fact in known:
            asked = fact if at == "subject" else at_last_token(fact)
            edit = engram.rewrite(lm, asked, method="rome", layer=layer, **settings)
            with edit.applied(lm):
                rows += scored(lm, [fact])
        layers.append({"layer": layer, "at": at, "facts": len(rows), **numbers(rows)})
    return {"layers": layers, "corpus": corpus, "settings": dict(given.set)}


def unedited(lm: LanguageModel) -> dict[str, Any]:
    """Return the bundled benchmark before any edit."""
    dataset = pocket_benchmark()
    rows = scored_records(lm, dataset.records, MeasureConfig(answer_tokens=0))
    return {"records": len(rows), "digest": dataset.digest, "numbers": numbers(rows, UNEDITED)}


# -- tables ----------------------------------------------------------------------------------------


def shown_recall(result: dict[str, Any]) -> str:
    columns = ["relation", "facts", "prompts", "P@1", "P@10", "MRR"]
    if ranked := "among_objects" in result:
        columns.append("P@1 among its objects")
    rows = []
    for name, r in [*result["relations"].items(), ("**all**", result)]:
        cells = [name, str(r["facts"]), str(r["pairs"])]
        cells += [f"{100 * r['recall']:.1f}", f"{100 * r['recall@10']:.1f}", f"{r['mrr']:.3f}"]
        rows.append([*cells, *([f"{100 * r['among_objects']:.1f}"] if ranked else [])])
    return markdown(columns, rows)


def shown_trace(result: dict[str, Any]) -> str:
    """Return where each site is strongest at each role, and the curves of the two famous tokens."""
    total, low, high = result["total effect"]
    # of severed paths only one token is traced: another role is that of subjects of one token
    roles = TOKEN_ROLES if "last" in result["effects"]["residual"] else CURVES[:1]
    lines = [
        f"Clean {result['clean']:.3f}, corrupted {result['corrupted']:.3f}, total effect "
        f"{total:.3f} ({low:.3f} to {high:.3f}); {result['facts']} facts.",
        "",
        markdown(
            ("strongest effect, at layer", *result["effects"]),
            [
                (f"{role} token", *(_peak(by_role[role]) for by_role in result["effects"].values()))
                for role in roles
                if all(role in by_role for by_role in result["effects"].values())
            ],
        ),
    ]
    columns = [
        (site, role)
        for role in CURVES
        for site in result["effects"]
        if role in result["effects"][site]
    ]
    layers = range(len(result["effects"][columns[0][0]][columns[0][1]]["mean"]))
    rows = [
        (str(layer), *(_at(result["effects"][site][role], layer) for site, role in columns))
        for layer in layers
    ]
    heads = [f"{site}, {role} token" for site, role in columns]
    return "\n".join([*lines, "", markdown(("layer", *heads), rows)])


def _at(curve: dict[str, list[float]], layer: int) -> str:
    half = (curve["high"][layer] - curve["low"][layer]) / 2
    return f"{curve['mean'][layer]:.3f} ± {half:.3f}".replace("-", "−")


def _peak(curve: dict[str, list[float]]) -> str:
    at = max(range(len(curve["mean"])), key=lambda layer: curve["mean"][layer])
    low, high = curve["low"][at], curve["high"][at]
    return f"{curve['mean'][at]:.3f} ({low:.3f} to {high:.3f}), {at}".replace("-", "−")


def shown_precision(result: dict[str, Any]) -> str:
    return markdown(
        ("site", "mean of cells", "largest cell", "largest of an average by role and layer"),
        [
            (site, *(f"{each[name]:.4f}" for name in ("mean", "max", "average")))
            for site, each in result["sites"].items()
        ],
    )


def shown_rome(result: dict[str, Any]) -> str:
    return markdown(
        ("layer", "edited at", "facts", "efficacy", "paraphrase", "neighbourhood", "score"),
        [
            (
                str(row["layer"]),
                f"{row['at']} token",
                str(row["facts"]),
                *(_with_half(row[name]) for name in SHOWN),
            )
            for row in result["layers"]
        ],
    )


def _with_half(estimate: Sequence[float]) -> str:
    mean, low, high = estimate
    return f"{mean:.1f} ({(high - low) / 2:.1f})"


def shown_unedited(result: dict[str, Any]) -> str:
    cells = [
        f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, low, high in result["numbers"].values()
    ]
    return f"{result['records']} records\n" + markdown(list(result["numbers"]), [cells])


SHOW = {
    "recall": shown_recall,
    "trace": shown_trace,
    "severed": shown_trace,
    "precision": shown_precision,
    "rome": shown_rome,
    "control": shown_rome,  # the same at the subject's last token and at the prompt's
    "benchmark": shown_unedited,
}


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def measured(given: argparse.Namespace) -> dict[str, Any]:
    facts = source(given)
    if given.what == "precision":
        return precision(facts, given)
    lm = engram.load(given.model, dtype=given.dtype)
    if given.what == "recall":
        return recall(lm, facts)
    if given.what == "benchmark":
        return unedited(lm)
    if given.what in ("rome", "control"):
        return rome(lm, facts, given)
    paths = {
        "trace": {"window": given.window},
        "severed": {
            "window": None,  # of single states
            "sites": ["residual"],
            "severed": ("mlp", "attention"),
            "positions": "subject_last",
        },
    }[given.what]
    average = average_trace(lm, facts, given, **paths)
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)
        drawn = (
            {"severed": average.plot_severed}
            if average.severed
            else {"average": average.plot, "lines": average.plot_lines}
        )
        for name, plot in drawn.items():
            plot().savefig(given.pictures / f"{name}.png")
    return {"samples": given.samples, **effects(average)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=SHOW)
    add_options(parser)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--at", choices=("subject", "last"), default="subject")
    parser.add_argument(
        "--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="settings of ROME"
    )
    parser.add_argument("--corpus", help="what C is measured on; default: as ROME does")
    parser.add_argument("--window", type=int, default=WINDOW, help="layers restored together")
    parser.add_argument("--samples", type=int, default=10, help="draws of noise a fact")
    parser.add_argument("--run", type=Path, help="file of the traces, which a killed run resumes")
    parser.add_argument("--pictures", type=Path, help="folder of the average's pictures")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began, cpu = time.monotonic(), time.process_time()
    result = measured(given)
    print(SHOW[given.what](result))
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    record = {
        "what": given.what,
        "model": given.model,
        "dtype": given.dtype,
        "seed": given.seed,
        "seconds": round(time.monotonic() - began, 1),
        "cpu seconds": round(time.process_time() - cpu, 1),
        "machine": machine,
        **result,
    }
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
