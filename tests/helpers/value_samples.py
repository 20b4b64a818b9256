"""Facts of several lengths, sites and families for tests of values and keys; and both, slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engram import Fact
from tests.helpers.naive import changed

FACTS = [  # texts behind the subject, targets and subjects of different lengths; two of one subject
    Fact("tower of Rome", "The {} is in the city of", "Paris"),
    Fact("piano", "He plays the {} and", "guitar and sings"),
    Fact("river", "The {}", "Madrid"),
    Fact(
        "Zdeno Chára", "It is said that {} was born a long time ago in the small town of", "London"
    ),
    Fact("tower of Rome", "The {} is made of", "the river's mayor"),
]
SITES = ("mlp", "block", "attention+mlp")
VARIED = (
    "gpt2",
    "llama",
    "gpt_neox",
    "falcon-alibi",
    "gemma2-short-window",
    "bloom",
)  # learned, rotary, parallel, ALiBi, windows


def end_of(text: str, subject: str, lm: Any) -> int:
    end = text.index(subject) + len(subject)
    return next(i for i, (a, b) in enumerate(lm.encode(text).offsets) if a < end <= b)


def slowly(lm: Any, text: str, subject: str, layer: int, state_of: Any) -> tuple[Tensor, Tensor]:
    """Key of a layer and output of a module at the subject's last token, by one whole pass over the
    whole text.
    """
    seen: dict[str, Tensor] = {}

    def keep(out: Tensor) -> Tensor:
        seen["state"] = out.clone()  # some families add to it in place
        return out

    key_hook = lm.parts.mlp_out(layer).register_forward_pre_hook(
        lambda m, args: seen.update(key=args[0].clone())
    )
    try:
        with torch.no_grad(), changed({state_of: keep}):
            lm.model(torch.tensor([lm.encode(text).ids]))
    finally:
        key_hook.remove()
    at = end_of(text, subject, lm)
    return tuple(seen[name].reshape(-1, seen[name].shape[-1])[at] for name in ("key", "state"))
