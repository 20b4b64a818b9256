"""Tracing many facts: in batches and one by one, against the loop over cells; and the estimate by
attribution.

    python benchmarks/average.py                                    pocket's shape, 32 facts
    python benchmarks/average.py --shape small --facts 8 --loops 1 --repeats 1        GPT-2 small
    python benchmarks/average.py --shape xl --device cuda                        GPT-2 XL, a GPU

Prompts of 8 to 14 random words, subjects of 2 to 4 of them from the second on, 10 noise samples,
residual, MLP and attention with windows of a third of the layers (10 at most). The loop
(tests/helpers/naive.py: a forward pass of 11 rows a cell, logits at all positions) runs on
`--loops` of the facts and is extrapolated by time a fact. Each variant runs in its own process.
"""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import (
    SHAPES,
    arguments,
    make_lm,
    make_model,
    matmul_rate,
    peak_mib,
    run_all,
    save,
    timed,
    words,
)
from engram.locate.settings import SubjectCorruption, TraceConfig, default_window
from engram.locate.trace_input import TracePrompt
from engram.locate.tracing import trace_prompts

SAMPLES, NOISE = 10, 0.1
SITES = ("residual", "mlp", "attention")
BATCHES = (1, 8, 32)


def ids_of(number: int, vocabulary: int) -> tuple[list[int], tuple[int, int]]:
    """Token ids of a random prompt and its subject's span."""
    stream = random.Random(number)
    return stream.sample(range(100, vocabulary), stream.randint(8, 14)), (
        1,
        1 + stream.randint(2, 4),
    )


def prompts(facts: int, vocabulary: int) -> list[TracePrompt]:
    found = []
    for number in range(facts):
        ids, (first, end) = ids_of(number, vocabulary)
        found.append(TracePrompt(words(*ids), words(*ids[first:end])))
    return found


def ours(kind: str, shape: str, device: str, facts: int, loops: int) -> dict[str, Any]:
    """`kind`: "alone" (one engram.trace a fact), "batch N", "attribution N", "corrected N"."""
    lm = make_lm(shape, device)
    model_mib = peak_mib(device)
    kind, _, size = kind.partition(" ")
    config = TraceConfig.of(
        noise=NOISE,
        samples=SAMPLES,
        method="attribution" if kind in ("attribution", "corrected") else "exact",
        correction="query-key" if kind == "corrected" else "none",
    )
    asked = prompts(facts, SHAPES[shape][3])
    list(trace_prompts(lm, asked[:1], config))  # the model is probed once: not part of a trace

    def work() -> list[Any]:
        if kind == "alone":
            return [trace for prompt in asked for trace in trace_prompts(lm, [prompt], config)]
        return list(trace_prompts(lm, asked, config, facts_per_batch=int(size)))

    seconds, traces = timed(work, device)
    by_prompt = {trace.prompt: trace for trace in traces}
    tables = [
        {site: by_prompt[p.text].scores[site].tolist() for site in SITES} for p in asked[:loops]
    ]
    peak = peak_mib(device)
    with FlopCounterMode(display=False) as counter:
        list(trace_prompts(lm, asked[:loops], config))
    return {
        "seconds": seconds / facts,
        "model_mib": model_mib,
        "peak_mib": peak,
        "tables": tables,
        "flops": counter.get_total_flops() / loops,
    }


def loop(shape: str, device: str, loops: int) -> dict[str, Any]:
    from tests.helpers import naive

    from engram.locate.corruption import Corruptor

    lm = make_lm(shape, device)
    model = make_model(shape, device)
    model_mib = peak_mib(device)
    blocks = model.transformer.h
    modules = {
        "residual": list(blocks),
        "mlp": [b.mlp for b in blocks],
        "attention": [b.attn for b in blocks],
    }
    window = default_window(lm.n_layers)
    corruptor = Corruptor(lm, SubjectCorruption(noise=NOISE, samples=SAMPLES))
    asked = [ids_of(number, SHAPES[shape][3]) for number in range(loops)]

    def work() -> list[dict[str, Any]]:
        tables = []
        for ids, span in asked:
            noise = corruptor(span[1] - span[0]).to(device)
            answer = [int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            tables.append(
                {
                    site: naive.trace(
                        model,
                        model.transformer.wte,
                        modules[site],
                        ids,
                        len(ids),
                        span,
                        noise,
                        answer,
                        1 if site == "residual" else window,
                    ).tolist()
                    for site in SITES
                }
            )
        return tables

    with torch.device(device), torch.no_grad():
        seconds, tables = timed(work, device)
    return {
        "seconds": seconds / loops,
        "model_mib": model_mib,
        "peak_mib": peak_mib(device),
        "tables": tables,
    }


def largest_gap(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> float:
    pairs = [(a[site], b[site]) for a, b in zip(one, two, strict=True) for site in SITES]
    return max(float((torch.tensor(a) - torch.tensor(b)).abs().max()) for a, b in pairs)


def main() -> None:
    given = arguments(
        __doc__ or "",
        "pocket",
        facts={"type": int, "default": 32},
        loops={"type": int, "default": 2, "help": "facts that the loop runs on"},
    )
    if given.variant:
        arguments_of = (given.shape, given.device)
        if given.variant == "loop":
            print(json.dumps(loop(*arguments_of, given.loops)))
        else:
            print(json.dumps(ours(given.variant, *arguments_of, given.facts, given.loops)))
        return
    rate = matmul_rate(given.device)
    sizes = [size for size in BATCHES if size <= given.facts]
    exact = ["alone", *(f"batch {size}" for size in sizes)]
    estimates = list(
        dict.fromkeys(["attribution 1", f"attribution {sizes[-1]}", f"corrected {sizes[-1]}"])
    )
    results = run_all([*exact, *estimates, "loop"], given)
    gaps = {name: largest_gap(results[name]["tables"], results["loop"]["tables"]) for name in exact}
    for result in results.values():
        result.pop("tables")
    seconds = {name: result["seconds"] for name, result in results.items()}
    ratios = {f"loop / {name}": seconds["loop"] / seconds[name] for name in (*exact, *estimates)}
    ratios |= {f"alone / {name}": seconds["alone"] / seconds[name] for name in exact[1:]}
    for name, result in results.items():
        if "flops" in result:
            result["share_of_matmul_rate"] = result["flops"] / result["seconds"] / rate
        print(f"{name}: {60 / result['seconds']:.1f} facts a minute")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.1f}")
    print(f"largest difference of a probability from the loop: {max(gaps.values()):.1e}")
    record = {
        "facts": given.facts,
        "loops": given.loops,
        "variants": results,
        "ratios": ratios,
        "largest_differences": gaps,
    }
    save("average", given, {**record, "float32_matmul_flops": rate})


if __name__ == "__main__":
    main()
