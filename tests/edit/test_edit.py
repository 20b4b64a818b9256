"""An edit is a value: its deltas, its owners, and how edits add and subtract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.edit.delta import Delta, add
from engram.edit.edit import Edit, compose
from engram.errors import BaseMismatchError, EngramError, FactError, NonFiniteError
from tests.helpers.edit_samples import fact, random_delta, random_edit, tiny, weight_name

EDIT = random_edit(tiny())
BASE = EDIT.base
((NAME, WEIGHT),) = BASE["tensors"].items()


@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_norm_is_that_of_the_matrix(out: int, into: int, rank: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(out * 100 + into * 10 + rank)
    delta = Delta(
        torch.randn(out, rank, generator=generator, dtype=dtype),
        torch.randn(rank, into, generator=generator, dtype=dtype),
    )
    assert delta.norm() == pytest.approx(float(delta.dense(torch.float64).norm()), rel=1e-6)
    assert (delta.shape, delta.rank, delta.dense().dtype) == ((out, into), rank, dtype)


def test_a_dense_change_has_the_same_interface() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    delta = Delta(matrix)
    assert delta.is_dense and delta.shape == (2, 3) and delta.rank == 2 and delta.columns == 1
    assert torch.equal(delta.dense(), matrix)
    assert delta.norm() == pytest.approx(float(matrix.norm()))
    left, right = delta.low_rank()
    assert torch.equal(left @ right, matrix)
    left, right = Delta(matrix.T).low_rank()
    assert torch.equal(left @ right, matrix.T)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not agree on the rank"):
        Delta(torch.ones(3, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected a matrix in float32 or float64"):
        Delta(torch.ones(3, 1, dtype=torch.float16), torch.ones(1, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="expected a matrix"):
        Delta(torch.ones(3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="one entry a column"):
        Delta(torch.ones(3, 2), torch.ones(2, 3), owners=(0,))
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        Delta(torch.full((3, 1), torch.nan), torch.ones(1, 3))


def test_ranks_add() -> None:
    one, two = (
        Delta(torch.rand(3, 1), torch.rand(1, 4), (0,)),
        Delta(torch.rand(3, 2), torch.rand(2, 4), (1, 2)),
    )
    both = add([one, two])
    assert both.rank == 3 and both.owners == ((0,), (1,), (2,))
    torch.testing.assert_close(both.dense(), one.dense() + two.dense())
    with pytest.raises(ValueError, match="different shapes"):
        add([one, Delta(torch.rand(4, 1), torch.rand(1, 4), (0,))])


def test_an_edit_says_what_does_not_fit_together() -> None:
    lm = tiny()
    edit = random_edit(lm)
    (name,) = edit.deltas
    with pytest.raises(EngramError, match="needs facts and deltas"):
        Edit((), "m", {}, edit.deltas, edit.base)
    with pytest.raises(EngramError, match="base does not describe"):
        Edit(edit.facts, "m", {}, {"other.weight": edit.deltas[name]}, edit.base)
    with pytest.raises(EngramError, match=r"is \[out, in\] = \[24, 16\], its weight is \[16, 24\]"):
        Edit(edit.facts, "m", {}, {name: Delta(torch.ones(24, 1), torch.ones(1, 16))}, edit.base)
    with pytest.raises(EngramError, match="settings of an edit has to be numbers, strings"):
        Edit(edit.facts, "m", {"moment": torch.ones(1)}, edit.deltas, edit.base)
    with pytest.raises(EngramError, match=r"columns of facts \[4\]"):
        Edit(edit.facts, "m", {}, {name: edit.deltas[name].owned_by([(4,)])}, edit.base)


def test_a_receipt_is_added_without_changing_the_edit() -> None:
    edit = random_edit(tiny())
    proven = edit.with_receipt({"passed": True})
    assert (
        edit.receipt is None and proven.receipt == {"passed": True} and proven.deltas == edit.deltas
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.sampled_from([(1,), (0, 1), (2,)]))
def test_taking_out_what_was_composed_gives_the_edit_back(
    rank_a: int, rank_b: int, joint: bool, layers: tuple[int, ...]
) -> None:
    lm = tiny()
    a = random_edit(lm, (1,), rank=rank_a, seed=1)
    b = random_edit(lm, layers, rank=rank_b, seed=2, joint=joint)
    both = compose([a, b])
    assert both.facts == a.facts + b.facts
    for name in both.deltas:
        parts = [edit.deltas[name].dense() for edit in (a, b) if name in edit.deltas]
        torch.testing.assert_close(both.deltas[name].dense(), sum(parts))
    assert both.without(*b.facts) == a
    assert both.without(*range(rank_a)) == b


def test_compositions_of_compositions_are_flat() -> None:
    lm = tiny()
    a, b, c = (random_edit(lm, seed=seed) for seed in (1, 2, 3))
    nested = compose([compose([a, b]), c])
    assert nested == compose([a, b, c])
    assert nested.without(fact(20)) == compose([a, c])


def test_a_fact_with_columns_of_its_own_leaves_alone() -> None:
    lm = tiny()
    edit = random_edit(lm, (0, 2), rank=3, joint=False)
    rest = edit.without(1)
    assert rest.facts == (edit.facts[0], edit.facts[2])
    for name, delta in edit.deltas.items():
        assert torch.equal(rest.deltas[name].left, delta.left[:, [0, 2]])
        assert torch.equal(rest.deltas[name].right, delta.right[[0, 2]])
        assert rest.deltas[name].owners == ((0,), (1,))


def test_facts_solved_jointly_leave_together_or_not_at_all() -> None:
    lm = tiny()
    both = compose([random_edit(lm, rank=2, seed=1), random_edit(lm, seed=2)])
    with pytest.raises(EngramError, match="facts 0, 1 were solved jointly"):
        both.without(0)
    assert both.without(0, 1).facts == (fact(20),)


def test_dense_changes_add_but_do_not_separate() -> None:
    lm = tiny()
    a, b = random_edit(lm, rank=0, seed=1), random_edit(lm, seed=2)
    both = compose([a, b])
    (name,) = both.deltas
    assert both.deltas[name].is_dense
    torch.testing.assert_close(
        both.deltas[name].dense(), a.deltas[name].dense() + b.deltas[name].dense()
    )
    with pytest.raises(EngramError, match="solved jointly"):
        both.without(0)


def test_without_says_which_facts_there_are() -> None:
    edit = compose([random_edit(tiny(), seed=1), random_edit(tiny(), seed=2)])
    with pytest.raises(FactError, match=r"is not a fact of this edit, which has 2 .*Tower 10"):
        edit.without(fact(99))
    with pytest.raises(FactError, match="is not a fact of this edit"):
        edit.without(7)
    with pytest.raises(FactError, match="all facts of the edit would go"):
        edit.without(0, 1)


def test_edits_of_different_weights_do_not_compose() -> None:
    a, b = random_edit(tiny(seed=0)), random_edit(tiny(seed=5), seed=2)
    with pytest.raises(BaseMismatchError, match="were made on different weights"):
        compose([a, b])
    with pytest.raises(EngramError, match="at least one edit"):
        compose([])


def test_a_contradiction_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny()
    a = random_edit(lm)
    (name,) = a.deltas
    other = fact(10)
    other = type(other)(other.subject, other.prompt, "Elsewhere")
    b = Edit((other,), "random", {}, {name: random_delta(lm, weight_name(lm, 1), 1, 7)}, a.base)
    compose([a, b])
    assert "neither may win" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": 3}, "method=3: expected a text"),
        ({"method": None}, "method=None: expected a text"),
        ({"seed": "1"}, "seed='1': expected a whole number"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"seed": True}, "seed=True: expected a whole number"),
        ({"seed": -1}, "seed=-1: expected at least 0"),
        ({"facts": ("a",)}, r"facts\[0\]='a': expected an instance of Fact"),
        ({"settings": [1]}, "settings=.*: expected an object"),
        ({"settings": {"a": {1}}}, "settings of an edit has to be numbers, strings"),
        ({"settings": {"a": "\ud800"}}, "settings of an edit has to be numbers, strings"),
        ({"diagnostics": None}, "diagnostics=None: expected an object"),
        ({"receipt": "passed"}, "receipt='passed': expected an object"),
        ({"versions": {"torch": 2}}, "versions.torch=2: expected a text"),
        ({"deltas": {NAME: 3}}, "deltas.*=3: expected an instance of Delta"),
        ({"keys": {NAME: 3}}, "keys.*=3: expected"),
        ({"base": {**BASE, "model": 3}}, "base.model=3: expected a text"),
        ({"base": {**BASE, "tensors": {NAME: {}}}}, f"base.tensors.{NAME}.sha256 is missing"),
        (
            {"base": {**BASE, "tensors": {NAME: {**WEIGHT, "dtype": "save"}}}},
            "dtype='save': expected 'float16'",
        ),
        (
            {"base": {**BASE, "tensors": {NAME: {**WEIGHT, "shape": [1.5, 2]}}}},
            r"shape\[0\]=1.5: expected a whole number",
        ),
        (
            {"base": {**BASE, "tensors": {NAME: {**WEIGHT, "transposed": 1}}}},
            "transposed=1: expected true or false",
        ),
    ],
)
def test_an_edit_of_the_wrong_types_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EngramError, match=message):
        replace(EDIT, **change)


def test_settings_nested_without_end_are_refused() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(EngramError, match="settings of an edit has to be numbers"):
        replace(EDIT, settings={"a": nested})
