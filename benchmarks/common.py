"""What the benchmarks share: a GPT-2 with random weights, variants run one by one in processes of
their own, results as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the naive loop lives with the tests

from engram.model.language_model import LanguageModel
from engram.model.loading import _fuse_activations

RESULTS = Path(__file__).parent / "results"
WORDS = 50257
SHAPES = {  # layers, width, heads, vocabulary
    "pocket": (8, 256, 8, 8192),
    "small": (12, 768, 12, WORDS),
    "xl": (48, 1600, 25, WORDS),
    "gptj": (28, 4096, 16, WORDS),  # GPT-J's sizes in GPT-2's blocks
}


# the traced prompt: 12 tokens, the subject at tokens 2 to 5
IDS = random.Random(0).sample(range(1000, 50000), 12)
SPAN = (2, 6)
SAMPLES, WINDOW = 10, 10
SITES = ("residual", "mlp", "attention")


def noise(width: int) -> torch.Tensor:
    """Return the noise on the subject's embeddings [samples, tokens, width]."""
    generator = torch.Generator().manual_seed(1)
    return 0.1 * torch.randn(
        SAMPLES, SPAN[1] - SPAN[0], width, generator=generator, dtype=torch.float64
    )


def make_model(shape: str, device: str, dtype: str = "float32") -> GPT2LMHeadModel:
    """GPT-2 of that shape, random, as transformers makes it."""
    layers, width, heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary)
    with torch.device(device):
        return GPT2LMHeadModel(config).to(getattr(torch, dtype)).eval()


def make_lm(shape: str, device: str, dtype: str = "float32") -> LanguageModel:
    """Return the same as `engram.load` would give it, with a tokenizer of one token a word: w0, w1,
    ...
    """
    model = make_model(shape, device, dtype)
    _fuse_activations(model)
    return LanguageModel(model, make_tokenizer(SHAPES[shape][3]), name=f"gpt2-{shape}-shape")


def make_tokenizer(vocabulary: int = WORDS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0")


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def timed(work: Callable[[], Any], device: str, repeats: int = 1) -> tuple[float, Any]:
    """Median seconds, and what the last run gave."""
    seconds = []
    for _ in range(repeats):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return median(seconds), result


def peak_mib(device: str) -> float:
    """Largest memory so far, MiB: of the process, or of the accelerator."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def matmul_rate(device: str, dtype: torch.dtype = torch.float32, size: int = 2048) -> float:
    """Floating-point operations a second that a large product reaches."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a  # the first product of a process is slow
    seconds, _ = timed(lambda: a @ a, device, repeats=7)
    return 2 * size**3 / seconds


def published_value(
    model: torch.nn.Module,
    module: torch.nn.Module,
    rows: Sequence[Sequence[int]],
    lookup: Sequence[int],
    ends: Sequence[int],
    target: int,
    *,
    clamp: float,
    steps: int,
    device: str,
) -> tuple[torch.Tensor, list[float]]:
    """One value as the released code finds it, and its losses: whole forward passes over all rows
    with every position's logits.

    Args:
        module: whose output is shifted by one delta at `lookup` of every row; the last row is the
            penalty's.
        ends: position of the other rows that predicts `target`.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device
    )
    at, number = torch.tensor(lookup, device=device), torch.arange(len(rows), device=device)
    last = torch.tensor(ends, device=device)
    delta = torch.zeros(model.config.hidden_size, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=0.5)
    start: list[torch.Tensor] = []
    original: list[torch.Tensor] = []
    losses = []

    def add(_: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        if not start:
            start.append(out[0, lookup[0]].detach().float())
        out = out.clone()
        out[number, at] += delta.to(out.dtype)
        return out

    hook = module.register_forward_hook(add)
    for step in range(steps):
        optimiser.zero_grad()
        log_p = model(ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        nll = -log_p[number[:-1], last, target].mean()
        here = log_p[-1, lookup[-1]]
        original = original or [here.detach()]
        kl = 0.0625 * (here.exp() * (here - original[0])).sum()
        loss = nll + kl + 0.5 * delta.norm() / start[0].norm() ** 2
        losses.append(loss.item())
        if step == steps - 1:
            break
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            limit = clamp * start[0].norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    hook.remove()
    return start[0] + delta.detach(), losses


def arguments(
    doc: str, shape: str = "small", shapes: Iterable[str] = SHAPES, **more: dict[str, Any]
) -> argparse.Namespace:
    """Return the options of every benchmark, with its usual shape; `more` adds --NAME with these
    arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(shapes), default=shape)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeats", type=int, default=3, help="of our own variants; the slow ones run once"
    )
    parser.add_argument(
        "--variant", help="run this one alone and print JSON; what the benchmark does to itself"
    )
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/NAME-SHAPE-DEVICE.json"
    )
    for name, about in more.items():
        parser.add_argument(f"--{name}", **about)
    given = parser.parse_args()
    given.more = [word for name in more for word in (f"--{name}", str(getattr(given, name)))]
    torch.set_num_threads(given.threads)
    return given


def run_all(variants: Sequence[str], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each variant in a process of its own, one after another: name -> what it printed."""
    results = {}
    for name in variants:
        command = [
            sys.executable,
            sys.argv[0],
            "--variant",
            name,
            "--shape",
            given.shape,
            "--device",
            given.device,
        ]
        command += ["--threads", str(given.threads), "--repeats", str(given.repeats), *given.more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
            results[name] = {"not_run": reason}
        else:
            results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name}: {results[name].get('not_run') or _shown(results[name])}", flush=True)
    return results


def _shown(result: dict[str, Any]) -> str:
    return (
        f"{result['seconds']:.2f} s, peak {result['peak_mib']:.0f} MiB (model alone "
        f"{result['model_mib']:.0f})"
    )


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Return what a record says about the machine, and the versions."""
    facts = {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{p: version(p) for p in ("engram", "torch", "transformers")},
    }
    if device != "cpu":
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def save(name: str, given: argparse.Namespace, record: dict[str, Any]) -> None:
    """Write the record with machine and versions."""
    RESULTS.mkdir(exist_ok=True)
    path = given.out or RESULTS / f"{name}-{given.shape}-{given.device}.json"
    path.write_text(
        json.dumps(
            {
                "benchmark": name,
                "shape": given.shape,
                "machine": machine(given.threads, given.device),
                **record,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"results: {path}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()
