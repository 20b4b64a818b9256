"""Causal tracing the slow way, as the published code does it: one whole forward pass of 1 + samples
rows a cell, logits at
all positions. What the sweep is held against, in tests and in benchmarks. Independent of engram's
hooks and engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def changed(modules: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the outputs of modules."""

    def hook(module, args, output, change):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handles = [
        m.register_forward_hook(lambda m, a, out, f=f: hook(m, a, out, f))
        for m, f in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(
    model: nn.Module,
    embed: nn.Module,
    ids: Sequence[int],
    span: tuple[int, int],
    noise_snd: Tensor,
    restored: Sequence[nn.Module],
    token: int,
) -> Tensor:
    """Logits [1 + samples, t, v]: row 0 is clean; in the others the subject is corrupted and
    `token` is put back in `restored`.
    """

    def corrupt(out: Tensor) -> Tensor:
        out = out.clone()
        out[1:, span[0] : span[1]] = (out[1:, span[0] : span[1]].double() + noise_snd).to(out.dtype)
        return out

    def restore(out: Tensor) -> Tensor:
        rows = out.view(1 + len(noise_snd), -1, out.shape[-1]).clone()
        rows[1:, token] = rows[0, token]
        return rows.view(out.shape)

    with changed({embed: corrupt, **dict.fromkeys(restored, restore)}):
        return model(torch.tensor([list(ids)] * (1 + len(noise_snd)))).logits


def probability(logits: Tensor, answer: Sequence[int]) -> Tensor:
    """[rows] probability of the answer, whose last tokens but one are the last tokens of the
    text.
    """
    end = logits[:, -len(answer) :].double().softmax(-1)
    return end[:, range(len(answer)), list(answer)].prod(-1)


def trace(
    model: nn.Module,
    embed: nn.Module,
    sites: Sequence[nn.Module],
    ids: Sequence[int],
    prompt_tokens: int,
    span: tuple[int, int],
    noise_snd: Tensor,
    answer: Sequence[int],
    window: int,
) -> Tensor:
    """[prompt tokens, layers] mean probability of `answer` with `window` layers of a site restored
    around each layer.
    """
    table = torch.zeros(prompt_tokens, len(sites))
    for token in range(prompt_tokens):
        for layer in range(len(sites)):
            around = sites[max(0, layer - window // 2) : min(len(sites), layer + (window + 1) // 2)]
            logits = run(model, embed, ids, span, noise_snd, around, token)
            table[token, layer] = probability(logits[1:], answer).mean()
    return table


# -- causal mediation in general: one forward pass a cell and a sample, nothing shared -------------


@torch.no_grad()
def states(
    model: nn.Module, ids: Sequence[int], modules: Sequence[nn.Module], inputs: bool, embed: dict
) -> list[Tensor]:
    """[t, c] outputs (or inputs) of modules in one run; `embed` holds a hook for the embedding, or
    nothing.
    """
    seen: dict[nn.Module, Tensor] = {}
    handles = []
    for module in modules:
        if inputs:
            hook = module.register_forward_pre_hook(lambda m, a: seen.__setitem__(m, a[0].clone()))
        else:
            hook = module.register_forward_hook(
                lambda m, a, out: seen.__setitem__(
                    m, (out[0] if isinstance(out, tuple) else out).clone()
                )
            )
        handles.append(hook)
    try:
        with changed(embed):
            model(torch.tensor([list(ids)]))
    finally:
        for handle in handles:
            handle.remove()
    return [seen[module].reshape(len(ids), -1) for module in modules]


@torch.no_grad()
def patched(
    model: nn.Module,
    ids: Sequence[int],
    embed: dict,
    modules: Sequence[nn.Module],
    values: Sequence[Tensor],
    token: int,
    part: slice,
    inputs: bool,
    frozen: Sequence[tuple[nn.Module, Tensor]] = (),
) -> Tensor:
    """Logits [t, v] of a run in which `token` of each module's output (or input) is the value's,
    and frozen outputs are too.
    """

    def put(tensor: Tensor, value: Tensor, cut: slice = slice(None)) -> Tensor:
        flat = tensor.clone().reshape(len(ids), -1)
        flat[token, cut] = value[token, cut]
        return flat.view(tensor.shape)

    outputs = {m: (lambda out, v=v: put(out, v)) for m, v in frozen}
    handles = []
    for module, value in zip(modules, values, strict=True):
        if inputs:
            hook = module.register_forward_pre_hook(
                lambda m, a, v=value: (put(a[0], v, part), *a[1:])
            )
            handles.append(hook)
        else:
            outputs[module] = lambda out, v=value: put(out, v, part)
    try:
        with changed({**embed, **outputs}):
            return model(torch.tensor([list(ids)])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def naive_log_probs(lm, prompt, target):
    """One forward a pair over prompt + target, all logits, no padding."""
    head, tail = lm.encode(prompt).ids, lm.target_ids(prompt, target)
    logits = lm.model(torch.tensor([head + tail])).logits[0].float()
    return logits.log_softmax(-1)[len(head) - 1 : -1].gather(-1, torch.tensor(tail)[:, None])[:, 0]
