"""Everything that is slow, on one card in under ten minutes, at the shapes of GPT-2 XL and
Llama-3-8B.

    python benchmarks/gpu.py --device cuda                   both shapes, 8 minutes
    python benchmarks/gpu.py --device cuda --minutes 4
    python benchmarks/gpu.py --shape tiny --minutes 1        small models on the CPU: that it runs

Weights are random, in bfloat16; no checkpoint and no download is needed. A result is written after
every part, so that a run that is killed keeps what it has; a part that fails says why, and the next
one runs. Each part has its share of the minutes that are left: it runs once for warming up, with
its operations counted, then measures a small piece, and then as much of what was wanted as fits.
What did not fit is extrapolated, and the result says from how much ("measured" of "wanted").

The parts, for each shape:
    trace               three sites of one prompt of 12 tokens, 10 noise samples, windows of 10
    published trace     the published loop over the same cells: some of them, extrapolated to all
    values one by one   ROME's values, 21 contexts and the penalty's row, 20 steps, none stopped
    values, 64 at once  the same, 64 facts in a batch
    MEMIT's z           values of 1,000 facts at a block's output, 6 contexts, 64 in a batch
    second moments      of five layers, tokens of documents of 10 to 120 tokens
    records             ROME edits with CounterFact's 23 prompts scored before and after

"share of the matrix rate" is floating-point operations a second over those of a large bfloat16
product in the same run. Of our parts the operations are those that run, counted by torch's
FlopCounterMode (matrix products and attention). Of the published loop they are 2 x parameters x
tokens, the embedding not counted. Ours does less work for the same numbers, so compare seconds
across the two, and shares only with the card.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import evaluate
import mass
import second_moment
from common import (
    IDS,
    RESULTS,
    SAMPLES,
    SITES,
    SPAN,
    WINDOW,
    WORDS,
    arguments,
    make_tokenizer,
    matmul_rate,
    noise,
    peak_mib,
    save,
    timed,
    words,
)
from engram.model.language_model import LanguageModel
from engram.model.loading import _fuse_activations

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A model to build, and the layer at which it is edited."""

    family: str  # "gpt2" or "llama"
    layers: int
    width: int
    heads: int
    layer: int
    vocabulary: int = WORDS
    mlp_width: int = 0  # of llama
    kv_heads: int = 0  # of llama

    def model(self) -> torch.nn.Module:
        """Return the model with random weights, on the current device, of the current dtype."""
        if self.family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    n_layer=self.layers,
                    n_embd=self.width,
                    n_head=self.heads,
                    vocab_size=self.vocabulary,
                )
            )
        return LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=self.layers,
                hidden_size=self.width,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                intermediate_size=self.mlp_width,
                vocab_size=self.vocabulary,
                max_position_embeddings=8192,
                bos_token_id=0,
                eos_token_id=0,
            )
        )


@dataclass(frozen=True)
class Sizes:
    """How much of each part is wanted."""

    one_by_one: int = 16
    at_once: int = 64
    z_facts: int = 1000
    tokens: int = 1 << 17
    records: int = 200
    product: int = 8192  # rows and columns of the product that gives the card's rate


LARGE = {
    "gpt2-xl": Shape("gpt2", 48, 1600, 25, 17),
    "llama-3-8b": Shape("llama", 32, 4096, 32, 5, 128256, 14336, 8),
}
TINY = {
    "tiny-gpt2": Shape("gpt2", 6, 32, 4, 2, 8192),
    "tiny-llama": Shape("llama", 6, 32, 4, 2, 8192, 64, 2),
}
SETS: dict[str, tuple[dict[str, Shape], Sizes]] = {
    "large": (LARGE, Sizes()),
    "tiny": (TINY, Sizes(2, 4, 6, 512, 4, 256)),
}


@dataclass(frozen=True)
class Run:
    """One run of the script: where it runs, until when, and how fast the device multiplies."""

    device: str
    rate: float
    until: float  # seconds of time.monotonic

    def measure(
        self, work: Callable[[int], Any], wanted: int, least: int, seconds: float
    ) -> dict[str, Any]:
        """Return what `wanted` units of work take, measured on as many as fit into `seconds`.

        Args:
            work: does as many units as it is told.
            least: units of the warming up, and of the first measurement; divides the others.
        """
        began = time.monotonic()
        with FlopCounterMode(display=False) as counter:
            work(least)
        spent, _ = timed(lambda: work(least), self.device)
        left = seconds - (time.monotonic() - began)
        count = min(wanted, int(left / max(spent, 1e-9)) * least // least * least)
        if count > least:
            spent, _ = timed(lambda: work(count), self.device)
        count = max(count, least)
        operations = counter.get_total_flops() / least
        return {
            "wanted": wanted,
            "measured": count,
            "extrapolated": count < wanted,
            "seconds": spent / count * wanted,
            "units_a_second": count / spent,
            "operations": operations * wanted,
            "operations_by": "FlopCounterMode",
            "share_of_matrix_rate": operations * count / spent / self.rate,
            "peak_mib": peak_mib(self.device),
        }


def build(shape: Shape, name: str, device: str) -> LanguageModel:
    """Return a language model of that shape, its weights made where they stay."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            model = shape.model().eval()
    finally:
        torch.set_default_dtype(before)
    _fuse_activations(model)
    return LanguageModel(model, make_tokenizer(shape.vocabulary), name=name)


def ids_of(lm: LanguageModel) -> list[int]:
    """Return the traced prompt's tokens, of those that the model has."""
    return [number % len(lm.tokenizer) for number in IDS]


def traced(lm: LanguageModel, run: Run, seconds: float) -> dict[str, Any]:
    import engram

    ids = ids_of(lm)
    prompt, subject, last = words(*ids), words(*ids[slice(*SPAN)]), []

    def work(count: int) -> None:
        for _ in range(count):
            last[:] = [
                engram.trace(
                    lm,
                    prompt,
                    subject=subject,
                    noise=noise(lm.d_model),
                    window=WINDOW,
                    sites=list(SITES),
                )
            ]

    result = run.measure(work, 5, 1, seconds)
    result["seconds"] /= 5
    result["operations"] /= 5
    return {**result, "unit": "trace", "trace": last[0]}


def published_trace(
    lm: LanguageModel, run: Run, seconds: float, ours: dict[str, Any]
) -> dict[str, Any]:
    """Return what the published loop over all cells takes, from some of them."""
    from tests.helpers import naive

    parts, rows = lm.parts, SAMPLES + 1
    modules = {
        "residual": list(parts.blocks),
        "mlp": [parts.mlp(layer) for layer in range(lm.n_layers)],
        "attention": [parts.attention(layer) for layer in range(lm.n_layers)],
    }
    ids, trace = ids_of(lm), ours["trace"]
    tokens = len(ids)
    cells = [(s, t, n) for s in SITES for t in range(tokens) for n in range(lm.n_layers)]
    random.Random(0).shuffle(cells)
    gaps = []
    noises = noise(lm.d_model).to(run.device)
    answer = lm.target_ids(words(*ids), trace.answer)

    def work(cell: tuple[str, int, int]) -> None:
        site, token, layer = cell
        window = 1 if site == "residual" else WINDOW
        first, end = max(0, layer - window // 2), min(lm.n_layers, layer + (window + 1) // 2)
        with torch.device(run.device):
            logits = naive.run(
                lm.model,
                parts.embed,
                [*ids, *answer[:-1]],
                SPAN,
                noises,
                modules[site][first:end],
                token,
            )
        found = float(naive.probability(logits[1:], answer).mean())
        gaps.append(abs(found - float(trace.scores[site][token, layer])))

    work(cells[0])  # the first pass is slow
    gaps.clear()
    end, spent = time.monotonic() + seconds, 0.0
    for cell in cells:
        spent += timed(lambda cell=cell: work(cell), run.device)[0]  # type: ignore[misc]
        if time.monotonic() > end:
            break
    # The embedding is looked up; GPT-2's is the unembedding too, which is multiplied with.
    parameters = sum(p.numel() for p in lm.model.parameters())
    if not lm.model.config.tie_word_embeddings:
        parameters -= parts.embed.weight.numel()  # type: ignore[union-attr]
    operations = 2 * parameters * rows * tokens
    each = spent / len(gaps)
    return {
        "unit": "cell",
        "wanted": len(cells),
        "measured": len(gaps),
        "extrapolated": len(gaps) < len(cells),
        "seconds": each * len(cells),
        "units_a_second": 1 / each,
        "operations": operations * len(cells),
        "operations_by": "2 x parameters x tokens",
        "share_of_matrix_rate": operations / each / run.rate,
        "largest_difference": max(gaps),
        "published / ours": each * len(cells) / ours["seconds"],
        "peak_mib": peak_mib(run.device),
    }


def values(
    lm: LanguageModel, run: Run, seconds: float, layer: int, wanted: int, at_once: int, z: bool
) -> dict[str, Any]:
    """Return what values of facts take: ROME's, or MEMIT's z."""
    from engram.editors.closed_form.values import ValueConfig, ValueSearch, optimise_values

    contexts, facts = mass.requests(wanted, len(lm.tokenizer))
    if not z:
        contexts = ["{}", *(f"{words(*each, 13)} {{}}" for each in evaluate.contexts()[1:])]
    config = ValueConfig(steps=mass.STEPS, stop_loss=0.0, clamp=0.75 if z else 4.0)
    search = ValueSearch(layer, contexts, config, site="block" if z else "mlp")

    def work(count: int) -> None:
        for _ in optimise_values(lm, facts[:count], search, at_once):
            pass

    return {**run.measure(work, wanted, min(at_once, wanted), seconds), "unit": "value"}


def moments(lm: LanguageModel, run: Run, seconds: float, wanted: int) -> dict[str, Any]:
    from engram.editors.second_moments.corpora import Texts
    from engram.editors.second_moments.corpus_pass import MomentPass, Sums

    first = round(13 / 48 * lm.n_layers)  # where MEMIT edits GPT-2 XL
    layers = list(range(first, min(first + 5, lm.n_layers)))
    corpus = Texts(tuple(second_moment.documents(wanted)))
    work = lambda count: MomentPass(lm, Sums.zero(lm, layers), count).run(corpus)  # noqa: E731
    result = run.measure(work, wanted, max(wanted // 16, 1), seconds)
    return {**result, "unit": "token", "layers": layers}


def records(lm: LanguageModel, run: Run, seconds: float, layer: int, wanted: int) -> dict[str, Any]:
    from engram.benchmark.measure import Unit, measure
    from engram.benchmark.metrics.outcomes import MeasureConfig

    least = min(50, max(wanted // 4, 1))
    places = list(enumerate(evaluate.records_of(wanted)))
    settings = evaluate.settings_of(lm, layer, least)
    config = MeasureConfig(answer_tokens=0, drift_every=0)

    def work(count: int) -> None:
        for at in range(0, count, least):
            list(measure(lm, Unit(tuple(places[at : at + least]), "rome", settings), config))

    return {**run.measure(work, wanted, least, seconds), "unit": "record"}


def parts_of(
    lm: LanguageModel, run: Run, shape: Shape, sizes: Sizes
) -> Iterator[tuple[str, float, Callable[[float, dict[str, Any]], dict[str, Any]]]]:
    """Yield the parts: name, weight of its share of the time, and the work."""
    layer = shape.layer
    yield "trace", 1, lambda s, _: traced(lm, run, s)
    yield "published trace", 1, lambda s, done: published_trace(lm, run, s, done["trace"])
    yield (
        "values one by one",
        1,
        lambda s, _: values(lm, run, s, layer, sizes.one_by_one, 1, z=False),
    )
    yield (
        f"values, {sizes.at_once} at once",
        1,
        lambda s, _: values(lm, run, s, layer, sizes.at_once, sizes.at_once, z=False),
    )
    yield (
        "MEMIT's z",
        3,
        lambda s, _: values(lm, run, s, layer, sizes.z_facts, sizes.at_once, z=True),
    )
    yield "second moments", 1, lambda s, _: moments(lm, run, s, sizes.tokens)
    yield "records", 3, lambda s, _: records(lm, run, s, layer, sizes.records)


@contextmanager
def built(shape: Shape, name: str, device: str) -> Iterator[LanguageModel]:
    """Hold a model for the block, and free its memory afterwards."""
    lm = build(shape, name, device)
    try:
        yield lm
    finally:
        del lm
        if device != "cpu":
            torch.cuda.empty_cache()


def shown(name: str, result: dict[str, Any]) -> str:
    if "not_run" in result:
        return f"  {name}: not run: {result['not_run']}"
    cut = f" (from {result['measured']} of {result['wanted']})" if result["extrapolated"] else ""
    line = (
        f"  {name}: {result['seconds']:.2f} s{cut}, {result['units_a_second']:.4g} "
        f"{result['unit']}s a second, {result['share_of_matrix_rate']:.2%} of the matrix rate"
    )
    times = result.get("published / ours")
    return line if times is None else f"{line}, {times:.1f} x ours"


def main() -> None:
    given = arguments(
        __doc__ or "",
        "large",
        SETS,
        minutes={"type": float, "default": 8.0, "help": "time for everything"},
    )
    until = time.monotonic() + 60 * given.minutes
    shapes, sizes = SETS[given.shape]
    card = "cpu" if given.device == "cpu" else torch.cuda.get_device_name()
    name = f"gpu-{card.replace(' ', '-').lower()}" + "-tiny" * (given.shape == "tiny")
    given.out = given.out or RESULTS / f"{name}.json"
    rate = matmul_rate(given.device, DTYPE, sizes.product)
    run = Run(given.device, rate, until)
    print(f"{card}: {rate / 1e12:.4g} tera-operations a second in a large bfloat16 product")
    record: dict[str, Any] = {
        "card": card,
        "bfloat16_matmul_flops": rate,
        "minutes": given.minutes,
        "shapes": {},
    }
    for number, (model_name, shape) in enumerate(shapes.items()):
        ends = time.monotonic() + (until - time.monotonic()) / (len(shapes) - number)
        results: dict[str, Any] = {}
        with built(shape, model_name, given.device) as lm:
            count = sum(p.numel() for p in lm.model.parameters())
            record["shapes"][model_name] = {**asdict(shape), "parameters": count, "parts": results}
            print(f"{model_name}, {count / 1e6:.4g} million parameters", flush=True)
            work = list(parts_of(lm, run, shape, sizes))
            done: dict[str, Any] = {}
            for at, (part, weight, do) in enumerate(work):
                left = max(ends - time.monotonic(), 1.0)
                share = left * weight / sum(each[1] for each in work[at:])
                try:
                    done[part] = do(share, done)
                except Exception as error:  # the other parts are worth having
                    done[part] = {"not_run": f"{type(error).__name__}: {error}"[:300]}
                results[part] = {key: value for key, value in done[part].items() if key != "trace"}
                print(shown(part, results[part]), flush=True)
                save("gpu", given, record)
            del work, lm


if __name__ == "__main__":
    main()
