"""An edit that lies beside the weights computes what the edited weights would, and touches none of
them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import engram
from engram.edit.applied import can_write
from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit, compose
from engram.edit.in_force import ATTACHED
from engram.errors import BaseMismatchError, EngramError, SettingError, UnsupportedModelError
from engram.facts import Fact
from engram.modules.weights import linear_shape
from tests.helpers.edit_samples import random_edit, same_bits, tiny, weight_name, weights
from tests.helpers.tiny import DENSE, tiny_lm

IDS = torch.arange(24).view(2, 12) * 7 % 60
FACT = Fact("tower of Rome", "The {} is in the city of", "Paris")


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(IDS, use_cache=False).logits


def edit_of(lm: Any, layers: tuple[int, ...] = (1, 2), rank: int = 2, seed: int = 0) -> Edit:
    """Rank `rank` in some layers (0: dense), a few hundredths of the weight's scale."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for layer in layers:
        out, into = linear_shape(lm.parts.mlp_out(layer))
        left = 0.03 * torch.randn(out, rank or into, generator=generator)
        right = torch.randn(rank, into, generator=generator) if rank else None
        deltas[f"{lm.parts.mlp_out_name(layer)}.weight"] = Delta(left, right)
    return Edit((FACT,), "random", {}, deltas, describe_base(lm, deltas))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", DENSE)
def test_attached_computes_what_applied_does_and_touches_no_weight(
    family: str, dtype: torch.dtype
) -> None:
    lm = tiny_lm(family, dtype)
    before, plain = weights(lm), logits(lm)
    edit = compose([edit_of(lm, (1,), rank=2), edit_of(lm, (2,), rank=0)])  # the second one dense
    with edit.applied(lm):
        expected = logits(lm)
    with edit.applied(lm, how="beside") as same:
        assert same is lm
        got = logits(lm)
        assert same_bits(weights(lm), before)
    assert torch.equal(logits(lm), plain)
    tolerance = (
        1e-5 if dtype == torch.float64 else 1e-4
    )  # the float32 factors are multiplied out in another order
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert (expected - plain).abs().max() > 100 * (got - expected).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_attached_is_closer_to_the_computed_change(dtype: torch.dtype) -> None:
    name, edit = None, None
    lost: dict[Any, float] = {"weights": 0.0, "beside": 0.0}
    for seed in range(5):
        lm = tiny(dtype=dtype, d_ff=64, seed=seed)
        edit = random_edit(lm, rank=2, seed=seed + 1)
        (name,) = edit.deltas
        edit = replace(
            edit, deltas={name: Delta(0.03 * edit.deltas[name].left, edit.deltas[name].right)}
        )
        module = lm.model.get_submodule(name.removesuffix(".weight"))
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        weight = module.weight.float() + edit.deltas[name].dense().T
        truth = x.float() @ weight + module.bias.float()
        for way in lost:
            with edit.applied(lm, how=way), torch.no_grad():
                lost[way] += float((module(x).float() - truth).norm())
    assert lost["beside"] < lost["weights"]


def test_attached_edits_add_up_in_any_nesting() -> None:
    lm = tiny_lm(dtype=torch.float64)
    a, b, c = (edit_of(lm, seed=seed) for seed in range(3))
    with compose([a, b, c]).applied(lm):
        expected = logits(lm)
    with a.applied(lm, how="beside"), b.applied(lm, how="weights"), c.applied(lm, how="beside"):
        torch.testing.assert_close(logits(lm), expected, rtol=1e-6, atol=1e-6)
    with compose([a, b, c]).applied(lm, how="beside"):
        torch.testing.assert_close(logits(lm), expected, rtol=1e-6, atol=1e-6)
    assert not any(ATTACHED.values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_block_takes_the_edit_off(error: type[BaseException]) -> None:
    lm = tiny_lm()
    plain, edit = logits(lm), edit_of(lm)
    with pytest.raises(error), edit.applied(lm, how="beside"):
        raise error
    assert torch.equal(logits(lm), plain)
    assert not any(ATTACHED.values())


def test_another_base_is_refused_unless_forced() -> None:
    lm, other = tiny_lm(), tiny_lm(seed=1)
    edit, plain = edit_of(lm), logits(other)
    with pytest.raises(
        BaseMismatchError,
        match=r"c_proj.weight of 'tiny-gpt2': not the weight that the edit was made on",
    ):
        edit.applied(other, how="beside").__enter__()
    assert torch.equal(logits(other), plain)
    with edit.applied(other, force=True, how="beside"):
        assert not torch.allclose(logits(other), plain)


def test_another_shape_is_refused_also_when_forced() -> None:
    edit = random_edit(tiny())
    for force in (False, True):
        with pytest.raises(
            BaseMismatchError,
            match=r"is \[out, in\] = \[16, 40\], the edit changes one of \[16, 24\]",
        ):
            edit.applied(tiny(d_ff=40), force=force, how="beside").__enter__()


def test_an_edit_made_beside_another_needs_that_one() -> None:
    lm = tiny_lm(dtype=torch.float64)
    first = edit_of(lm, seed=1)
    with first.applied(lm, how="beside"):
        second = edit_of(lm, seed=2)
        with second.applied(lm, how="beside"):
            both = logits(lm)
    with pytest.raises(BaseMismatchError, match="not the weight"):
        second.applied(lm, how="beside").__enter__()
    with pytest.raises(BaseMismatchError, match="not the weight"):
        second.applied(lm).__enter__()
    with first.applied(lm, how="beside"), second.applied(lm, how="beside"):
        torch.testing.assert_close(logits(lm), both)


def test_an_edit_made_within_an_applied_block_is_attached_there() -> None:
    lm = tiny_lm()
    first = edit_of(lm, seed=1)
    with first.applied(lm):
        second = edit_of(lm, seed=2)
        with second.applied(lm, how="beside"):
            pass
    with pytest.raises(BaseMismatchError, match="not the weight"):
        second.applied(lm, how="beside").__enter__()


def test_a_weight_of_two_modules_is_refused() -> None:
    lm = tiny("llama")
    lm.model.lm_head.weight = lm.model.model.embed_tokens.weight
    name = "lm_head.weight"
    delta = Delta(torch.ones(60, 1), torch.ones(1, 16))
    edit = Edit((FACT,), "m", {}, {name: delta}, describe_base(lm, [name]))
    with pytest.raises(
        UnsupportedModelError, match=r"lm_head.weight is also model.embed_tokens.weight"
    ):
        edit.applied(lm, how="beside").__enter__()


def test_an_unknown_way_is_refused() -> None:
    lm = tiny_lm()
    with pytest.raises(SettingError, match="how='weight': expected 'auto', 'weights' or 'beside'"):
        edit_of(lm).applied(lm, how="weight").__enter__()  # type: ignore[arg-type]


def test_an_edit_on_top_of_an_attached_one_is_attached_too() -> None:
    lm = tiny_lm(dtype=torch.float64)
    first, before = edit_of(lm, seed=1), weights(lm)
    with first.applied(lm, how="beside"):
        second = edit_of(lm, seed=2)
        with second.applied(lm):
            assert same_bits(weights(lm), before)


def test_by_itself_an_edit_is_written_where_it_can_be() -> None:
    lm = tiny_lm()
    edit, before = edit_of(lm), weights(lm)
    assert can_write(lm, edit.deltas)
    with edit.applied(lm):
        assert not same_bits(weights(lm), before)
    assert same_bits(weights(lm), before)


def test_a_weight_without_numbers_says_so() -> None:
    lm = tiny()
    edit, name = random_edit(lm), weight_name(lm, 1)
    lm.model.to("meta")
    with pytest.raises(
        UnsupportedModelError, match=r"offloaded .*edit.applied\(lm, how='beside'\).*edit.to_peft"
    ):
        edit.applied(lm, how="weights").__enter__()
    with pytest.raises(UnsupportedModelError, match="on the meta device and has no numbers"):
        describe_base(lm, [name])
    with pytest.raises(EngramError, match="has no numbers"):
        edit.applied(lm).__enter__()


@pytest.mark.parametrize("engine", ["replay", "whole"])
def test_an_edit_is_found_on_top_of_an_attached_one_as_on_an_applied_one(engine: str) -> None:
    lm = tiny_lm(dtype=torch.float64)
    settings: dict[str, Any] = {
        "layer": 1,
        "contexts": ["{}", "He sings. {}"],
        "corpus": ["The tower is in Rome."] * 40,
        "tokens": 200,
        "steps": 3,
        "engine": engine,
    }
    under = edit_of(lm, layers=(1,))
    found = []
    for way in ("weights", "beside"):
        with under.applied(lm, how=way):
            found.append(engram.rewrite(lm, FACT, **settings))
    (name,) = found[0].deltas
    torch.testing.assert_close(
        found[0].deltas[name].dense(), found[1].deltas[name].dense(), rtol=1e-4, atol=1e-6
    )
