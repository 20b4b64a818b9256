"""Causal tracing of one prompt: the sweep against the loop over cells as the published code runs
it.

    python benchmarks/trace.py                              GPT-2 small shape, CPU, 2 threads
    python benchmarks/trace.py --shape xl --device cuda     GPT-2 XL shape on a GPU

12 tokens, subject at tokens 2 to 5, 10 noise samples, windows of 10. The loop is one forward pass
of 11 rows a cell with logits at all positions (tests/helpers/naive.py). Each variant runs in a
process of its own, so that peak memory is its own. The PyPI package causal-tracer takes part where
it is installed (pip install --no-deps causal-tracer; it needs an older transformers).
"""

from __future__ import annotations

import json
from typing import Any

import torch

from common import (
    IDS,
    SAMPLES,
    SITES,
    SPAN,
    WINDOW,
    arguments,
    make_lm,
    make_model,
    make_tokenizer,
    matmul_rate,
    noise,
    peak_mib,
    run_all,
    save,
    timed,
    words,
)

LOOPS = {"residual": "loop residual", "mlp": "loop mlp", "attention": "loop attention"}


def ours(sites: list[str], shape: str, device: str, repeats: int) -> dict[str, Any]:
    import engram

    lm = make_lm(shape, device)
    model_mib = peak_mib(device)
    prompt, subject = words(*IDS), words(*IDS[SPAN[0] : SPAN[1]])
    given: dict[str, Any] = {
        "subject": subject,
        "noise": noise(lm.d_model),
        "window": WINDOW,
        "sites": sites,
    }
    engram.trace(
        lm, words(1, 2, 3), subject="w2", samples=1, sites=["residual"]
    )  # the model is probed once: not part of a trace
    seconds, trace = timed(lambda: engram.trace(lm, prompt, **given), device, repeats)
    tables = {site: trace.scores[site].tolist() for site in sites}
    return {
        "seconds": seconds,
        "model_mib": model_mib,
        "peak_mib": peak_mib(device),
        "tables": tables,
    }


def loop(site: str, shape: str, device: str) -> dict[str, Any]:
    from tests.helpers import naive

    model = make_model(shape, device)
    model_mib = peak_mib(device)
    blocks = model.transformer.h
    modules = {
        "residual": list(blocks),
        "mlp": [b.mlp for b in blocks],
        "attention": [b.attn for b in blocks],
    }[site]
    with torch.device(device):
        clean = model(torch.tensor([IDS])).logits[0, -1]
        answer = [int(clean.argmax())]
        work = lambda: naive.trace(  # noqa: E731
            model,
            model.transformer.wte,
            modules,
            IDS,
            len(IDS),
            SPAN,
            noise(model.config.n_embd).to(device),
            answer,
            1 if site == "residual" else WINDOW,
        )
        seconds, table = timed(work, device)
    return {
        "seconds": seconds,
        "model_mib": model_mib,
        "peak_mib": peak_mib(device),
        "tables": {site: table.tolist()},
    }


def peer(shape: str, device: str) -> dict[str, Any]:
    from causal_tracer import CausalTracer

    model = make_model(shape, device)
    model_mib = peak_mib(device)
    tracer = CausalTracer(model, make_tokenizer(), noise=0.1, device=device)
    prompt, subject = words(*IDS), words(*IDS[SPAN[0] : SPAN[1]])
    seconds, _ = timed(
        lambda: tracer.calculate_hidden_flow(
            prompt, subject=subject, kind="hidden", samples=SAMPLES
        ),
        device,
    )
    return {"seconds": seconds, "model_mib": model_mib, "peak_mib": peak_mib(device), "tables": {}}


def main() -> None:
    given = arguments(__doc__ or "")
    if given.variant:
        kind, _, site = given.variant.partition(" ")
        if kind == "sweep":
            result = ours(
                list(SITES) if site == "three" else [site], given.shape, given.device, given.repeats
            )
        else:
            result = (
                loop(site, given.shape, given.device)
                if kind == "loop"
                else peer(given.shape, given.device)
            )
        print(json.dumps(result))
        return
    rate = matmul_rate(given.device)
    names = [
        *(f"sweep {site}" for site in SITES),
        "sweep three",
        *LOOPS.values(),
        "causal-tracer residual",
    ]
    results = run_all(names, given)
    gaps = {}
    for site, name in LOOPS.items():
        slow = torch.tensor(results[name].pop("tables")[site])
        for fast in (f"sweep {site}", "sweep three"):
            gap = float((torch.tensor(results[fast]["tables"][site]) - slow).abs().max())
            gaps[f"{fast}, {site}"] = gap
    for result in results.values():
        result.pop("tables", None)
    seconds = {name: result["seconds"] for name, result in results.items() if "seconds" in result}
    ratios = {
        f"{site}: loop / sweep": seconds[f"loop {site}"] / seconds[f"sweep {site}"]
        for site in SITES
    }
    ratios["three sites: loops / one sweep"] = (
        sum(seconds[name] for name in LOOPS.values()) / seconds["sweep three"]
    )
    if "causal-tracer residual" in seconds:
        ratios["residual: causal-tracer / sweep"] = (
            seconds["causal-tracer residual"] / seconds["sweep residual"]
        )
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.1f}")
    print(f"largest difference of a probability: {max(gaps.values()):.1e}")
    record = {
        "variants": results,
        "ratios": ratios,
        "largest_differences": gaps,
        "float32_matmul_flops": rate,
    }
    save("trace", given, record)


if __name__ == "__main__":
    main()
