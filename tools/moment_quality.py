"""How good do edits get with how much text in C, and which: single ROME edits of the pocket model,
the same values for every C.

    python tools/moment_quality.py --out docs/data/moment_quality.json
    python tools/moment_quality.py --count 20 --wikipedia sentences.txt.gz

Texts: the bundled sentences, text that the model samples itself, and, where a file with a sentence
    a line is given, that. Each at
several multiples of d_ff tokens; longer measurements go on from shorter ones. The values and the
keys do not depend on C, so each fact is optimised once, and an edit at the preset's layer is then
the least change, in the metric of C, that sends the bare prompt's key and the contexts' mean key to
the value (`variant="two-key"`, the pocket model's preset).

Prints a markdown table of means over facts; "±" is the standard error of the paired difference to
the first row. Scores are the receipt's: the share of prompts on which the wanted object wins (all
neighbours were right before). The margin is how far it wins, as a difference of probabilities.
"leverage" is k^T C^-1 k of the edits' keys over what the longest measurement of that text gives.
Sampling noise in C inflates its inverse by m / (m - 1) for m x d_ff independent tokens, the last
column; ROME's edit does not change with C's scale, MEMIT's lambda would have to grow by that
factor.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

import engram
from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.editors.closed_form.rome import RomeConfig
from engram.editors.closed_form.values import ValueSearch, optimise_value
from engram.editors.contexts import sample_contexts
from engram.editors.presets import preset
from engram.editors.second_moments.corpora import Bundled, Corpus, SampledText, Texts
from engram.editors.second_moments.measure import SecondMoment, second_moments
from engram.model.language_model import LanguageModel
from engram.settings import read
from known_facts import PocketFacts

MULTIPLES = {"bundled": (2, 5, 10, 20, 400), "sampled": (20, 400), "wikipedia": (2, 20, 400)}
SCORES = ("efficacy", "paraphrase", "neighbourhood", "margin", "perplexity", "norm")


@dataclass(frozen=True)
class Planned:
    """A fact with what its edit is made of but for C: keys as columns [f, 2] (bare, mean of
    contexts), and the wanted change.
    """

    fact: engram.Fact
    keys_f2: Tensor
    delta_d: Tensor


def planned(lm: LanguageModel, layer: int, count: int, seed: int) -> Iterator[Planned]:
    settings = {
        name: value
        for name, value in preset("rome", lm.name).items()
        if name not in ("layer", "depth", "corpus")
    }
    config, contexts = read(RomeConfig, settings, "rome").value, sample_contexts(lm)
    for fact in islice(PocketFacts(seed).facts(lm), count):
        value = optimise_value(lm, fact, ValueSearch(layer, contexts, config))
        keys_f2 = torch.stack([value.keys_cf[0], value.keys_cf[1:].mean(0)], 1).double()
        yield Planned(fact, keys_f2, value.delta_d.double())


def edit_of(lm: LanguageModel, layer: int, plan: Planned, moment: SecondMoment) -> engram.Edit:
    """delta (C^-1 K (K^T C^-1 K)^-1 1)^T: of all changes that send both keys to the value, the one
    text notices least.
    """
    solved_f2 = moment.solve(plan.keys_f2)
    right_f = solved_f2 @ torch.linalg.solve(
        plan.keys_f2.T @ solved_f2, torch.ones(2, dtype=torch.float64)
    )
    weight = f"{lm.parts.mlp_out_name(layer)}.weight"
    delta = Delta(plan.delta_d[:, None], right_f[None])
    return engram.Edit(
        (plan.fact,), "rome", {"layer": layer}, {weight: delta}, describe_base(lm, [weight])
    )


def scores(lm: LanguageModel, edit: engram.Edit) -> dict[str, float]:
    """One edit's receipt in numbers; shares in percent, margin in probability, perplexity and norm
    as ratios.
    """
    receipt = engram.verify(lm, edit, continuation_tokens=0)
    shares = (receipt.share("rewrite"), receipt.share("paraphrase"), receipt.share("neighbourhood"))
    percent = (math.nan if share is None else 100 * share for share in shares)
    margin = fmean(
        a.after[0] - a.after[1] for kind in ("rewrite", "paraphrase") for a in receipt.of(kind)
    )
    drift = receipt.perplexity[1] / receipt.perplexity[0]
    return dict(zip(SCORES, (*percent, margin, drift, receipt.norm_ratio), strict=True))


def measured(
    lm: LanguageModel, layer: int, corpora: Mapping[str, Corpus]
) -> Iterator[tuple[str, int, SecondMoment]]:
    width = lm.parts.mlp_out(layer).weight.shape[0]
    for name, corpus in corpora.items():
        for multiple in MULTIPLES[name]:
            yield name, multiple, second_moments(lm, [layer], corpus, multiple * width)[layer]
    yield "none: C = 1", 0, SecondMoment.from_matrix(torch.eye(width))


def summary(
    rows: Sequence[Mapping[str, float]], first: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Mean of each score, and the standard error of its paired difference to the first row."""
    found: dict[str, Any] = {}
    for name in SCORES:
        pairs = [
            (row[name], base[name])
            for row, base in zip(rows, first, strict=True)
            if not math.isnan(row[name] + base[name])
        ]
        found[name] = fmean(row for row, _ in pairs)
        found[f"{name} error"] = stdev(row - base for row, base in pairs) / math.sqrt(len(pairs))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("text", "tokens / d_ff", "tokens", *SCORES, "leverage", "m / (m - 1)")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    digits = {"margin": 3, "perplexity": 4, "norm": 4}
    for row in rows:
        cells = [row["text"], row["multiple"] or "", row["tokens"] or ""]
        cells += [
            f"{row[s]:.{digits.get(s, 1)}f} ± {row[f'{s} error']:.{digits.get(s, 1)}f}"
            for s in SCORES
        ]
        cells += [
            f"{row['leverage']:.2f}" if row["multiple"] else "",
            f"{row['inflation']:.2f}" if row["multiple"] else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50, help="facts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wikipedia", type=Path, help="gzipped text, a sentence a line")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    lm = engram.load("pocket")
    layer = int(preset("rome", "pocket")["layer"])
    corpora: dict[str, Corpus] = {"bundled": Bundled(), "sampled": SampledText()}
    if given.wikipedia:
        with gzip.open(given.wikipedia, "rt", encoding="utf8") as lines:
            corpora["wikipedia"] = Texts(tuple(line.strip() for line in lines if line.strip()))
    moments = list(measured(lm, layer, corpora))
    longest = {name: moment for name, _, moment in moments}  # a text's last one
    plans = list(planned(lm, layer, given.count, given.seed))
    print(f"{len(plans)} values after {time.monotonic() - began:.0f} s", flush=True)
    keys_fn = torch.cat([plan.keys_f2 for plan in plans], 1)
    rows, first = [], []
    for name, multiple, moment in moments:
        each = [scores(lm, edit_of(lm, layer, plan, moment)) for plan in plans]
        first = first or each
        leverage = float(
            (keys_fn * moment.solve(keys_fn)).sum() / (keys_fn * longest[name].solve(keys_fn)).sum()
        )
        rows.append(
            {
                "text": name,
                "multiple": multiple,
                "tokens": moment.count,
                **summary(each, first),
                "leverage": leverage,
                "inflation": multiple / (multiple - 1) if multiple else None,
                "condition": moment.condition(),
            }
        )
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    record = {
        "facts": len(plans),
        "layer": layer,
        "seed": given.seed,
        "seconds": round(time.monotonic() - began),
        "machine": machine,
    }
    if given.out:
        given.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
