"""Tiny random models and edits of them, for the tests of edits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.facts import Fact

FAMILIES = ("gpt2", "llama")
WEIGHTS = {
    "gpt2": "transformer.h.{}.mlp.c_proj.weight",
    "llama": "model.layers.{}.mlp.down_proj.weight",
}


def tiny(
    family: str = "gpt2", dtype: torch.dtype = torch.float32, *, d_ff: int = 24, seed: int = 0
) -> Any:
    """Return a model of 3 layers and width 16 with `.model` and `.name`, all that edits ask of a
    language model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "gpt2":
            model: Any = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=60, n_positions=32, n_embd=16, n_layer=3, n_head=2, n_inner=d_ff
                )
            )
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=60,
                    hidden_size=16,
                    intermediate_size=d_ff,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                )
            )
    return SimpleNamespace(model=model.to(dtype).eval(), name=f"tiny-{family}")


def weight_name(lm: Any, layer: int) -> str:
    return WEIGHTS[lm.model.config.model_type].format(layer)


def fact(number: int) -> Fact:
    return Fact(
        f"Tower {number}",
        "The {} stands in",
        f"City {number}",
        paraphrases=(f"Where is Tower {number}? In",),
    )


def random_delta(lm: Any, name: str, rank: int, seed: int, **options: Any) -> Delta:
    """Rank `rank`, each column about a tenth of the weight's scale; `rank=0` gives a dense
    change.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = lm.model.get_parameter(name).shape
    out, into = reversed(shape) if lm.model.config.model_type == "gpt2" else shape
    if rank == 0:
        return Delta(0.01 * torch.randn(out, into, generator=generator), **options)
    left, right = (
        torch.randn(out, rank, generator=generator),
        torch.randn(rank, into, generator=generator),
    )
    return Delta(0.01 * left, right, **options)


def edit_of_ranks(lm: Any, ranks: tuple[int, int]) -> Edit:
    """Return an edit of layers 1 and 2 whose changes have these ranks; 0: a dense change."""
    names = [weight_name(lm, layer) for layer in (1, 2)]
    deltas = {
        name: random_delta(lm, name, rank, seed)
        for seed, (name, rank) in enumerate(zip(names, ranks, strict=True))
    }
    return Edit(tuple(map(fact, range(3))), "m", {}, deltas, describe_base(lm, names))


def random_edit(
    lm: Any, layers: tuple[int, ...] = (1,), *, rank: int = 1, seed: int = 1, joint: bool = True
) -> Edit:
    """Return an edit of `rank` facts in some layers; with `joint=False` column i belongs to
    fact i.
    """
    names = [weight_name(lm, layer) for layer in layers]
    owners = None if joint else tuple(range(rank))
    deltas = {
        name: random_delta(lm, name, rank, seed * 100 + i, owners=owners)
        for i, name in enumerate(names)
    }
    facts = tuple(fact(10 * seed + i) for i in range(max(rank, 1)))
    return Edit(
        facts,
        "random",
        {"rank": rank},
        deltas,
        describe_base(lm, names),
        seed=seed,
        diagnostics={"rho": 0.5},
    )


def weights(lm: Any) -> dict[str, torch.Tensor]:
    """Return copies of all tensors of the model."""
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


def same_bits(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return some.keys() == other.keys() and all(
        some[name].dtype == other[name].dtype
        and torch.equal(
            some[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8)
        )
        for name in some
    )
