"""Leaving the block restores the model, bit for bit; within it the weights are the edited ones."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit, compose
from engram.errors import BaseMismatchError, NonFiniteError, UnsupportedModelError
from tests.helpers.edit_samples import FAMILIES, random_edit, same_bits, tiny, weight_name, weights

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("d_ff", [24, 16])  # 16: a square matrix, which fits both ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_edited_inside_and_restored_outside(
    family: str, dtype: torch.dtype, d_ff: int
) -> None:
    lm = tiny(family, dtype, d_ff=d_ff)
    edit = random_edit(lm, (0, 2), rank=2)
    before = weights(lm)
    with edit.applied(lm) as same:
        assert same is lm
        inside = weights(lm)
    assert same_bits(weights(lm), before)
    for name, old in before.items():
        if name not in edit.deltas:
            assert torch.equal(inside[name], old)
            continue
        delta = edit.deltas[name].left @ edit.deltas[name].right
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = (old.to(wide) + (delta.T if family == "gpt2" else delta).to(wide)).to(dtype)
        torch.testing.assert_close(inside[name], expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert not torch.equal(inside[name], old)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(DTYPES), st.sampled_from(FAMILIES), st.integers(0, 4), st.integers(0, 10**6))
def test_any_edit_is_undone(dtype: torch.dtype, family: str, rank: int, seed: int) -> None:
    lm = tiny(family, dtype)
    edit = random_edit(lm, (0, 1), rank=rank, seed=seed)
    before = weights(lm)
    with edit.applied(lm):
        assert not same_bits(weights(lm), before)
    assert same_bits(weights(lm), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_error_in_the_block_restores_too(error: type[BaseException]) -> None:
    lm = tiny()
    before = weights(lm)
    with pytest.raises(error), random_edit(lm).applied(lm):
        raise error
    assert same_bits(weights(lm), before)


def test_a_failure_at_the_second_weight_restores_the_first() -> None:
    lm = tiny()
    edit = random_edit(lm, (0, 1))
    second = list(edit.deltas)[1]
    with torch.no_grad():
        lm.model.get_parameter(second)[0, 0] += 1
    before = weights(lm)
    with pytest.raises(
        BaseMismatchError,
        match=f"{second} of 'tiny-gpt2': not the weight that the edit was made on",
    ):
        edit.applied(lm).__enter__()
    assert same_bits(weights(lm), before)
    with edit.applied(lm, force=True):
        assert not same_bits(weights(lm), before)
    assert same_bits(weights(lm), before)


def test_an_interrupt_while_a_weight_is_written_restores_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import engram.edit.applied

    lm = tiny()
    before, write, calls = weights(lm), engram.edit.applied._write, []

    def interrupted(weight: torch.Tensor, value: torch.Tensor) -> None:
        write(weight, value)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(engram.edit.applied, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_edit(lm, (0, 1)).applied(lm).__enter__()
    assert same_bits(weights(lm), before)
    assert not engram.edit.in_force.WRITTEN.get(lm.model.get_parameter(weight_name(lm, 0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_edits_of_one_base_nest_as_their_composition(dtype: torch.dtype) -> None:
    lm = tiny(dtype=dtype)
    a, b = random_edit(lm, (0, 1), seed=1), random_edit(lm, (1, 2), seed=2)
    with compose([a, b]).applied(lm):
        together = weights(lm)
    before = weights(lm)
    with a.applied(lm):
        after_a = weights(lm)
        with b.applied(lm):
            for name, value in weights(lm).items():
                torch.testing.assert_close(
                    value, together[name], rtol=torch.finfo(dtype).eps, atol=1e-12
                )
        assert same_bits(weights(lm), after_a)
    assert same_bits(weights(lm), before)


def test_an_edit_made_within_a_block_needs_that_block() -> None:
    lm = tiny(dtype=torch.float64)
    a = random_edit(lm, seed=1)
    name = weight_name(lm, 1)
    with a.applied(lm):
        b = random_edit(lm, seed=2)
        with b.applied(lm):
            both = lm.model.get_parameter(name).clone()
    expected = (
        lm.model.get_parameter(name)
        + (a.deltas[name].dense(torch.float64) + b.deltas[name].dense(torch.float64)).T
    )
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-12)
    with pytest.raises(BaseMismatchError, match="not the weight"), b.applied(lm):
        pass
    with pytest.raises(BaseMismatchError, match="different weights"):
        compose([a, b])


def test_blocks_left_out_of_order_still_restore() -> None:
    lm = tiny(dtype=torch.bfloat16)
    before = weights(lm)
    first, second = random_edit(lm, seed=1).applied(lm), random_edit(lm, seed=2).applied(lm)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert same_bits(weights(lm), before)


def test_the_same_edit_may_lie_twice() -> None:
    lm = tiny()
    before, edit = weights(lm), random_edit(lm)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(edit.applied(lm))
    assert same_bits(weights(lm), before)


def test_tied_weights_change_and_return_together() -> None:
    lm = tiny("llama")
    lm.model.config.tie_word_embeddings = True
    lm.model.lm_head.weight = lm.model.model.embed_tokens.weight
    name = "lm_head.weight"
    delta = Delta(0.1 * torch.ones(60, 1), torch.ones(1, 16))
    edit = Edit(random_edit(lm).facts, "m", {}, {name: delta}, describe_base(lm, [name]))
    before = weights(lm)
    with edit.applied(lm):
        assert torch.equal(lm.model.model.embed_tokens.weight, lm.model.lm_head.weight)
        assert not torch.equal(lm.model.lm_head.weight, before[name])
    assert same_bits(weights(lm), before)


def test_an_edit_of_a_half_precision_checkpoint_made_in_float32_fits_both() -> None:
    half, full = tiny(dtype=torch.float16), tiny(dtype=torch.float16)
    full.model.float()
    with random_edit(full).applied(half):
        pass
    fine = tiny()
    with (
        pytest.raises(BaseMismatchError, match="rounding alone may explain it"),
        random_edit(fine).applied(half),
    ):
        pass


def test_another_model_is_refused_by_name_and_by_shape() -> None:
    edit = random_edit(tiny())
    with (
        pytest.raises(
            BaseMismatchError, match=r"has no parameter 'transformer.h.1.mlp.c_proj.weight'"
        ),
        edit.applied(tiny("llama")),
    ):
        pass
    for force in (False, True):
        with (
            pytest.raises(BaseMismatchError, match=r"its shape is \[16, 16\]"),
            edit.applied(tiny(d_ff=16), force=force),
        ):
            pass


def test_what_cannot_be_edited_is_refused() -> None:
    lm = tiny()
    with pytest.raises(UnsupportedModelError, match="expected the weight matrix of a linear map"):
        describe_base(lm, ["transformer.h.0.mlp.c_proj.bias"])
    with pytest.raises(UnsupportedModelError, match="cannot tell how Embedding stores its weight"):
        describe_base(lm, ["transformer.wte.weight"])


def test_a_weight_that_overflows_is_never_written() -> None:
    lm = tiny(dtype=torch.float16)
    edit = random_edit(lm)
    (name,) = edit.deltas
    huge = replace(
        edit, deltas={name: Delta(1e9 * edit.deltas[name].left, edit.deltas[name].right)}
    )
    before = weights(lm)
    with pytest.raises(NonFiniteError, match="does not fit float16"), huge.applied(lm):
        pass
    assert same_bits(weights(lm), before)


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.float64, 0, 1e-12), (torch.float32, 0, 1e-5), (torch.bfloat16, 1e-3, 1)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_cost_is_what_rounding_lost(
    family: str, dtype: torch.dtype, least: float, most: float
) -> None:
    lm: Any = tiny(family, dtype)
    edit = random_edit(lm)
    (name,) = edit.deltas
    old = lm.model.get_parameter(name).detach().double().clone()
    with edit.applied(lm):
        change = lm.model.get_parameter(name).detach().double() - old
    wanted = edit.deltas[name].dense(torch.float64)
    lost = (change.T if family == "gpt2" else change) - wanted
    cost = edit.rounding_cost(lm)[name]
    assert cost == pytest.approx(float(lost.norm() / wanted.norm()), rel=1e-9, abs=1e-15)
    assert least <= cost <= most
