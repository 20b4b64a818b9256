"""One ROME edit: value optimisation by replay against 20 full forward passes over all rows, with
logits everywhere.

    python benchmarks/rome.py                              GPT-2 small shape, layer 5, CPU
    python benchmarks/rome.py --shape xl --device cuda     GPT-2 XL shape, layer 17, on a GPU

21 contexts (10 of 4 sampled tokens and 10 of 9, as released) and the penalty's row; a subject of 3
tokens. What replay saves depends on where the subject is: "short" has 4 tokens before it and 1
after it ("The mother tongue of {} is"), "typical" 1 and 3, about CounterFact's mean, "long" 1 and
7. The slow variant is what the published code does with the same arithmetic, written out here. Each
runs in a process of its own.
"""

from __future__ import annotations

import json
import random
from typing import Any

import torch

from common import (
    SHAPES,
    arguments,
    make_lm,
    make_model,
    matmul_rate,
    peak_mib,
    published_value,
    run_all,
    save,
    timed,
    words,
)

LAYERS = {"small": 5, "xl": 17}  # as published; of other shapes the usual share of the depth
LENGTHS = {
    "short": (4, 1),
    "typical": (1, 3),
    "long": (1, 7),
}  # tokens before the subject and after it
STEPS = 20


def layer_of(shape: str) -> int:
    return LAYERS.get(shape, SHAPES[shape][0] // 3)


def request(
    length: str, shape: str
) -> tuple[list[list[int]], list[int], list[int], list[int], list[int]]:
    """Contexts, words before the subject, subject, words after it, target; numbers of words."""
    before, after = LENGTHS[length]
    draw = random.Random(after)
    top = min(50000, SHAPES[shape][3])
    sample = lambda count: [draw.randrange(1000, top) for _ in range(count)]  # noqa: E731
    contexts = [[], *(sample(4) for _ in range(10)), *(sample(9) for _ in range(10))]
    return contexts, sample(before), sample(3), sample(after), sample(1)


def ours(length: str, shape: str, device: str, repeats: int) -> dict[str, Any]:
    from engram import Fact
    from engram.editors.closed_form.rome import rank_one_update
    from engram.editors.closed_form.values import ValueConfig, ValueSearch, optimise_value
    from engram.editors.second_moments.measure import SecondMoment
    from engram.engine.replayable import replayable

    lm = make_lm(shape, device)
    replayable(lm)  # the model is probed once: not part of an edit
    model_mib = peak_mib(device)
    contexts, before, subject, after, target = request(length, shape)
    fact = Fact(words(*subject), f"{words(*before)} {{}} {words(*after)}", words(*target))
    templates = ["{}", *(f"{words(*context, 13)} {{}}" for context in contexts[1:])]
    layer = layer_of(shape)
    config = ValueConfig(stop_loss=0.0)
    seconds, value = timed(
        lambda: optimise_value(lm, fact, ValueSearch(layer, templates, config)), device, repeats
    )
    width = 4 * lm.d_model
    moment = SecondMoment.from_matrix(torch.eye(width))
    moment.solve(torch.ones(width))  # one factorisation a model and layer
    whole, _ = timed(
        lambda: rank_one_update(lm, fact, ValueSearch(layer, templates), moment), device
    )
    return {
        "seconds": seconds,
        "edit_seconds": whole,
        "model_mib": model_mib,
        "peak_mib": peak_mib(device),
        "losses": [loss[0] for loss in value.losses],
    }


def full(length: str, shape: str, device: str) -> dict[str, Any]:
    model = make_model(shape, device).requires_grad_(False)
    model_mib = peak_mib(device)
    contexts, before, subject, after, target = request(length, shape)
    prompts = [
        [*context, *([13] if context else []), *before, *subject, *after] for context in contexts
    ]
    rows = [*prompts, [*subject, 0, 0]]  # "<subject> is a": two words after the subject
    lookup = [len(row) - len(after) - 1 for row in prompts] + [len(subject) - 1]
    ends = [len(row) - 1 for row in prompts]
    mlp = model.transformer.h[layer_of(shape)].mlp

    def optimise() -> list[float]:
        return published_value(
            model, mlp, rows, lookup, ends, target[0], clamp=4, steps=STEPS, device=device
        )[1]

    seconds, losses = timed(optimise, device)
    return {
        "seconds": seconds,
        "model_mib": model_mib,
        "peak_mib": peak_mib(device),
        "losses": losses,
    }


def main() -> None:
    given = arguments(__doc__ or "")
    if given.variant:
        kind, _, length = given.variant.partition(" ")
        ours_or_full = kind == "replay"
        print(
            json.dumps(
                ours(length, given.shape, given.device, given.repeats)
                if ours_or_full
                else full(length, given.shape, given.device)
            )
        )
        return
    rate = matmul_rate(given.device)
    results = run_all(
        [f"{kind} {length}" for length in LENGTHS for kind in ("replay", "full")], given
    )
    ratios, gaps = {}, {}
    for length in LENGTHS:
        fast, slow = results[f"replay {length}"], results[f"full {length}"]
        ratios[f"{length} prompt: full / replay"] = slow["seconds"] / fast["seconds"]
        pairs = zip(fast.pop("losses"), slow.pop("losses"), strict=True)
        gaps[f"{length} prompt"] = max(abs(a - b) / abs(b) for a, b in pairs)
    for name, ratio in ratios.items():
        print(
            f"{name}: {ratio:.1f}, largest relative difference of a step's loss "
            f"{gaps[name.partition(':')[0]]:.1e}"
        )
    record = {
        "variants": results,
        "ratios": ratios,
        "largest_loss_differences": gaps,
        "float32_matmul_flops": rate,
    }
    save("rome", given, record)


if __name__ == "__main__":
    main()
