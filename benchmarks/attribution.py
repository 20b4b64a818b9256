"""How good the estimate by attribution is, on the bundled model: rank correlation with the exact
tables, what a screen finds.

    python benchmarks/attribution.py         100 facts that the model knows, three sites

How fast it is: benchmarks/average.py. Cells are all tokens from the subject's first on x layers x
    sites: in front of the
subject all effects are zero. Spearman's rank correlation is taken a fact and averaged; "averages"
is that of the average tables (places x layers).
A screen of k cells finds an exact top-10 cell if it is among the k largest estimates.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import engram
from common import arguments, save
from engram.locate.average import AverageTrace
from engram.locate.trace import CausalTrace

METRICS = ("probability", "log_probability")
METHODS: dict[str, dict[str, Any]] = {
    "attribution": {"method": "attribution"},
    "attribution, query-key correction": {"method": "attribution", "correction": "query-key"},
}
SCREENS = (10, 20, 40)


def cells(trace: CausalTrace, site: str) -> Tensor:
    return trace.effects(site)[trace.subject_range[0] :].flatten().double()


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = [x.argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def found(exact: CausalTrace, estimate: CausalTrace, k: int) -> float:
    """Share of the ten largest exact effects of all sites among the k largest estimates."""
    one, two = (
        torch.cat([cells(trace, site) for site in exact.scores]).abs()
        for trace in (exact, estimate)
    )
    best = set(one.topk(10).indices.tolist())
    return len(best & set(two.topk(min(k, len(two))).indices.tolist())) / 10


def compare(exact: AverageTrace, estimate: AverageTrace) -> dict[str, Any]:
    pairs = list(zip(exact.traces, estimate.traces, strict=True))
    about: dict[str, Any] = {}
    for site in exact.sites:
        each = torch.tensor(
            [spearman(cells(a, site), cells(b, site)) for a, b in pairs], dtype=torch.float64
        )
        means = [average.effects(site).mean.flatten() for average in (exact, estimate)]
        there = ~means[0].isnan()
        size = torch.tensor(
            [
                float((cells(a, site) - cells(b, site)).norm() / cells(a, site).norm())
                for a, b in pairs
            ]
        )
        about[site] = {
            "spearman_mean": float(each.mean()),
            "spearman_median": float(each.median()),
            "relative_error_median": float(size.median()),
            "averages_spearman": spearman(means[0][there], means[1][there]),
        }
    all_sites = [
        [torch.cat([cells(t, site) for site in exact.sites]) for t in pair] for pair in pairs
    ]
    about["all sites"] = {"spearman_mean": sum(spearman(a, b) for a, b in all_sites) / len(pairs)}
    about["top 10 found by a screen of"] = {
        str(k): sum(found(a, b, k) for a, b in pairs) / len(pairs) for k in SCREENS
    }
    return about


def main() -> None:
    given = arguments(__doc__ or "", "pocket", facts={"type": int, "default": 100})
    lm = engram.load("pocket", device_map=None if given.device == "cpu" else given.device)
    table = random.Random(0).sample(engram.read_facts("pocket"), given.facts)
    record: dict[str, Any] = {"facts": given.facts}
    for metric in METRICS:
        exact = engram.average_trace(lm, table, metric=metric)
        print(f"{metric}: {len(exact.traces)} facts", flush=True)
        record[metric] = {}
        for name, settings in METHODS.items():
            about = compare(exact, engram.average_trace(lm, table, metric=metric, **settings))
            record[metric][name] = about
            print(f"  {name}")
            for site, numbers in about.items():
                print(
                    f"    {site}: "
                    + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items())
                )
    save("attribution", given, record)


if __name__ == "__main__":
    main()
