"""Mass editing: values of many facts in batches against one by one, and the solve against one LU a
batch and layer.

    python benchmarks/mass.py                        the bundled model's shape, 64 facts, CPU
    python benchmarks/mass.py --shape small --facts 64
    python benchmarks/mass.py --shape gptj --facts 1000 --device cuda --dtype bfloat16

MEMIT's value at a third of the depth: 6 contexts of up to 10 tokens and the penalty's row, 20
steps, none stopped early; facts have subjects of 3 tokens with 1 to 5 before and after them.
"published" is what the released code does for one fact (whole forward passes over all rows with
logits everywhere, the same arithmetic), on a few facts and scaled up. "one by one" and "batched"
are ours with facts_per_batch = 1 and more. The solve: lambda C + K K^T of d_ff x d_ff by LU for
every layer and batch, against the kept Cholesky factor and a system as large as the batch; both in
float64, and the factor's own time beside. What second moments cost is in second_moment.py. Each
variant runs in a process of its own.
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
    matmul_rate,
    peak_mib,
    published_value,
    run_all,
    save,
    timed,
    words,
)

STEPS = 20
CONTEXTS = (0, 9, 9, 9, 9, 9)  # sampled tokens in front


def requests(count: int, vocabulary: int) -> tuple[list[str], list[Any]]:
    from engram import Fact

    draw = random.Random(0)
    top = min(50000, vocabulary)
    sample = lambda n: [draw.randrange(1000, top) for _ in range(n)]  # noqa: E731
    contexts = ["{}", *(f"{words(*sample(n), 13)} {{}}" for n in CONTEXTS[1:])]
    facts = []
    for _ in range(count):
        before, after = draw.randint(1, 5), draw.randint(1, 5)
        facts.append(
            Fact(
                words(*sample(3)),
                f"{words(*sample(before))} {{}} {words(*sample(after))}",
                words(*sample(1)),
            )
        )
    return contexts, facts


def ours(given: Any, at_once: int) -> dict[str, Any]:
    from engram.editors.closed_form.values import ValueConfig, ValueSearch, optimise_values
    from engram.engine.replayable import replayable

    lm = make_lm(given.shape, given.device, given.dtype)
    replayable(lm)  # the model is probed once: not part of an edit
    model_mib = peak_mib(given.device)
    contexts, facts = requests(given.facts, SHAPES[given.shape][3])
    config = ValueConfig(steps=STEPS, stop_loss=0.0, clamp=0.75)
    layer = lm.n_layers // 3
    work = lambda: dict(  # noqa: E731
        optimise_values(
            lm, facts, ValueSearch(layer, contexts, config, site="block"), facts_per_batch=at_once
        )
    )
    seconds, values = timed(work, given.device, given.repeats)
    losses = [[loss[0] for loss in values[i].losses] for i in range(min(given.loops, len(facts)))]
    return {
        "seconds": seconds,
        "facts": len(facts),
        "model_mib": model_mib,
        "peak_mib": peak_mib(given.device),
        "losses": losses,
    }


def published(given: Any) -> dict[str, Any]:
    """One fact after another: 20 whole forward passes over 7 rows, every position's logits, one
    delta in every row.
    """
    lm = make_lm(given.shape, given.device, given.dtype)
    model = lm.model.requires_grad_(False)
    contexts, facts = requests(given.facts, SHAPES[given.shape][3])
    model_mib = peak_mib(given.device)
    block, device = lm.parts.blocks[lm.n_layers // 3], given.device

    def optimise(fact: Any) -> list[float]:
        prompts = [lm.encode(context.replace("{}", fact.prompt_text)).ids for context in contexts]
        after = len(fact.prompt.partition("{}")[2].split())
        (target,), subject = (
            lm.target_ids(fact.prompt_text, fact.target),
            lm.encode(fact.subject).ids,
        )
        rows = [*prompts, [*subject, 0, 0]]  # "<subject> is a": two words after the subject
        lookup = [len(row) - after - 1 for row in prompts] + [len(subject) - 1]
        ends = [len(row) - 1 for row in prompts]
        return published_value(
            model, block, rows, lookup, ends, target, clamp=0.75, steps=STEPS, device=device
        )[1]

    some = facts[: given.loops]
    optimise(facts[-1])  # the first pass of a process is slow
    seconds, losses = timed(lambda: [optimise(fact) for fact in some], device)
    return {
        "seconds": seconds / len(some) * len(facts),
        "facts": len(facts),
        "measured_facts": len(some),
        "losses": losses,
        "model_mib": model_mib,
        "peak_mib": peak_mib(device),
    }


def solver(given: Any, method: str) -> dict[str, Any]:
    from engram.editors.closed_form.solver import Preservation, solve, solve_as_published
    from engram.editors.second_moments.measure import SecondMoment

    f = 4 * SHAPES[given.shape][1]
    generator = torch.Generator().manual_seed(0)
    text_nf = torch.randn(2 * f, f, generator=generator) * torch.logspace(0, -2, f)
    moment = SecondMoment.from_matrix(text_nf.T.double() @ text_nf.double() / len(text_nf))
    keys_fn = (
        torch.randn(f, given.facts, generator=generator) * torch.logspace(0, -2, f)[:, None]
    ).to(given.device)
    preservation = Preservation(moment, weight=float(f))
    before = peak_mib(given.device)
    once, _ = timed(lambda: moment.factor(), "cpu")  # paid once a model and layer
    run = solve_as_published if method == "lu" else solve
    seconds, solved_nf = timed(lambda: run(keys_fn, preservation), given.device, given.repeats)
    return {
        "seconds": seconds,
        "factor_seconds": once,
        "d_ff": f,
        "norm": float(solved_nf.norm()),
        "model_mib": before,
        "peak_mib": peak_mib(given.device),
    }


def main() -> None:
    given = arguments(
        __doc__ or "",
        "pocket",
        facts={"type": int, "default": 64},
        loops={"type": int, "default": 4, "help": "facts that the published loop is measured on"},
        dtype={"default": "float32", "help": "of the model"},
    )
    if given.variant:
        kind, _, number = given.variant.partition(" ")
        made = {
            "batched": lambda: ours(given, int(number)),
            "published": lambda: published(given),
            "solve": lambda: solver(given, number),
        }
        print(json.dumps(made[kind]()))
        return
    rate = matmul_rate(given.device)
    sizes = [1, *(n for n in (8, 32, 64) if n <= given.facts)]
    results = run_all(
        ["published", *(f"batched {n}" for n in sizes), "solve lu", "solve ours"], given
    )
    base, one = results["published"], results["batched 1"]
    ratios = {}
    for n in sizes:
        batch = results[f"batched {n}"]
        ratios[f"batches of {n}: published / ours"] = base["seconds"] / batch["seconds"]
        ratios[f"batches of {n}: one by one / batched"] = one["seconds"] / batch["seconds"]
        batch["largest_loss_difference"] = max(
            abs(a - b) / abs(b)
            for mine, theirs in zip(batch.pop("losses"), base["losses"], strict=False)
            for a, b in zip(mine, theirs, strict=True)
        )
    base.pop("losses")
    ratios["solve: LU / ours"] = results["solve lu"]["seconds"] / results["solve ours"]["seconds"]
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.1f}")
    save("mass", given, {"variants": results, "ratios": ratios, "float32_matmul_flops": rate})


if __name__ == "__main__":
    main()
