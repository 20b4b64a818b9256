"""Second moments of several layers in one pass, against the bare forward pass that stops at the
deepest of them.

    python benchmarks/second_moment.py                     GPT-2 small shape, CPU, 2 threads
    python benchmarks/second_moment.py --shape pocket
    python benchmarks/second_moment.py --shape xl          GPT-2 XL shape; 6 GB of weights, minutes

Three sets of layers: one, at the preset's depth; five in a row, where MEMIT edits (13 to 17 of 48);
    all. Both sides run the same
batches of the same documents; ours also tokenises them, sums k k^T, and adds up in float64. Runs
alternate and their medians are compared, so that whatever else the machine does slows both; with
one thread on a busy machine, the ratio of processor time ("processor_ratio") is the one to read.

"bound" is the ratio if every multiply-add took equally long. A block's forward has 12 d^2 of them a
token (8 d^2 up to its keys; attention's scores, norms and activations are left out). k k^T has f^2
= 16 d^2, of which 17/32 to 9/16 are computed, C being
symmetric: not less than 8 d^2 a layer, two thirds of its block. So 80 % of the bare pass can be had
    where nearly three blocks are run
for each one that is measured (five layers of GPT-2 XL), and all layers of a model reach 60 %. A
ratio above its bound says that the forward's smaller products run slower than the large one of k
k^T.

"hashing_seconds" is what a call costs however few the tokens: hashing the weights that C depends
on. "algebra" is the processor time of one C's Cholesky factor, its condition number and its
eigendecomposition, and of writing and reading them.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common import SHAPES, arguments, make_lm, matmul_rate, peak_mib, run_all, save, timed, words

TOKENS = {"pocket": 16384, "small": 8192, "xl": 2048}
LENGTHS = (10, 120)  # tokens of a document


def layers_of(which: str, shape: str) -> list[int]:
    count = SHAPES[shape][0]
    one, first = (
        int(0.35 * count) + (shape == "xl"),
        round(13 / 48 * count),
    )  # the released layer of GPT-2 XL is 17
    return {"one": [one], "five": list(range(first, first + 5)), "all": list(range(count))}[which]


def documents(tokens: int) -> list[str]:
    draw, texts, left = random.Random(0), [], tokens
    while left > 0:
        texts.append(words(*(draw.randrange(8000) for _ in range(draw.randint(*LENGTHS)))))
        left -= len(texts[-1].split())
    return texts


def bound(layers: Sequence[int]) -> float:
    """Multiply-adds of the bare pass over those of both, in units of d^2."""
    forward = 12 * max(layers) + 8
    return forward / (forward + len(layers) * 16 * 17 / 32)


def compared(which: str, shape: str, device: str, repeats: int) -> dict[str, Any]:
    from engram.editors.second_moments.corpora import Texts
    from engram.editors.second_moments.corpus_pass import MomentPass, Sums
    from engram.editors.second_moments.measure import _names
    from engram.engine.recording import base_model
    from engram.model.tokens import pad_right
    from engram.modules.hooks import StopForward, substitute

    lm, layers, tokens = make_lm(shape, device), layers_of(which, shape), TOKENS[shape]
    corpus, model_mib = Texts(tuple(documents(tokens))), peak_mib(device)

    def new(count: int) -> MomentPass:
        return MomentPass(lm, Sums.zero(lm, layers), count)

    reader, batches = new(tokens), []
    for several in reader.read(corpus):
        batches += several
        reader.sums.count += sum(len(ids) for each in several for ids, _ in each)
    padded = [pad_right([ids for ids, _ in batch]).to(device) for batch in batches]

    def stop(_: torch.Tensor) -> torch.Tensor:
        raise StopForward

    @torch.no_grad()
    def bare(rows: Sequence[torch.Tensor]) -> None:
        for ids_bt in rows:
            try:
                with substitute({}, {lm.parts.mlp_out(max(layers)): stop}):
                    base_model(lm)(ids_bt, use_cache=False)
            except StopForward:
                continue

    bare(padded[:1])
    new(512).run(corpus)
    spent: dict[str, list[float]] = {
        "bare": [],
        "ours": [],
        "bare processor": [],
        "ours processor": [],
    }
    for _ in range(repeats):
        for name, work in {
            "bare": lambda: bare(padded),
            "ours": lambda: new(tokens).run(corpus),
        }.items():
            began = time.process_time()
            spent[name].append(timed(work, device)[0])
            spent[f"{name} processor"].append(time.process_time() - began)
    seconds = {name: median(each) for name, each in spent.items()}
    hashing, _ = timed(lambda: _names(lm, layers, {}), device, repeats)
    return {
        "seconds": seconds["ours"],
        "bare_seconds": seconds["bare"],
        "ratio": seconds["bare"] / seconds["ours"],
        "processor_ratio": seconds["bare processor"] / seconds["ours processor"],
        "bound": bound(layers),
        "layers": layers,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds["ours"],
        "padding": 1 - tokens / sum(each.numel() for each in padded),
        "hashing_seconds": hashing,
        "model_mib": model_mib,
        "peak_mib": peak_mib(device),
    }


def algebra(shape: str, device: str) -> dict[str, Any]:
    """Processor seconds for one C of that shape's d_ff."""
    from engram.editors.second_moments.matrix import SecondMoment

    size, model_mib = 4 * SHAPES[shape][1], peak_mib(device)
    keys_nf = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    steps: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.safetensors"
        moment = SecondMoment((keys_nf.T @ keys_nf / len(keys_nf)).double(), len(keys_nf), {}, file)
        again = SecondMoment(moment.matrix_ff, moment.count, {}, file)
        works = {
            "save": lambda: moment.save(file),
            "factor": moment.factor,
            "condition": moment.condition,
            "eigen": moment.eigen,
        }
        for name, work in {**works, "eigen read back": again.eigen}.items():
            began = time.process_time()
            work()
            steps[name] = time.process_time() - began
    total = sum(steps.values())
    return {
        "seconds": total,
        "d_ff": size,
        "steps": steps,
        "model_mib": model_mib,
        "peak_mib": peak_mib(device),
    }


def main() -> None:
    given = arguments(__doc__ or "")
    if given.variant:
        if given.variant == "algebra":
            print(json.dumps(algebra(given.shape, given.device)))
        else:
            print(json.dumps(compared(given.variant, given.shape, given.device, given.repeats)))
        return
    began = time.perf_counter()
    rate = matmul_rate(given.device)
    variants = (
        ["one", "five"] if given.shape == "xl" else ["one", "five", "all", "algebra"]
    )  # all of XL's take 16 GB
    results = run_all(variants, given)
    for name, each in results.items():
        if "ratio" in each:
            print(
                f"{name}: layers {each['layers']}, {each['tokens_per_second']:.0f} tokens/s, "
                f"{100 * each['ratio']:.0f} % of the bare "
                f"pass, {100 * each['processor_ratio']:.0f} % by processor time (bound "
                f"{100 * each['bound']:.0f} %)"
            )
        elif "steps" in each:
            print(
                f"one C of d_ff = {each['d_ff']}: "
                + ", ".join(f"{step} {s:.2f} s" for step, s in each["steps"].items())
            )
    save(
        "second_moment",
        given,
        {"variants": results, "float32_matmul_flops": rate, "took": time.perf_counter() - began},
    )


if __name__ == "__main__":
    main()
