"""The core solver gives what a dense system gives, by either route, and the identities that tie the
methods together hold.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import engram
from engram import Fact
from engram.editors.closed_form.solver import Preservation, solve, solve_as_published, solve_exactly
from engram.editors.second_moments.measure import SecondMoment
from engram.errors import NonFiniteError
from tests.helpers.rewrite_samples import CONTEXTS, FACT, moment_of
from tests.helpers.tiny import tiny_lm

F, D = 24, 10  # length of a key, of a value
EXACT = 1e-10


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ordinary_keys(samples: int = 5 * F, seed: int = 1) -> Tensor:
    """Return [samples, f], some directions a hundred times longer than others."""
    return (
        drawn(samples, F, seed=seed)
        @ torch.diag(torch.logspace(-1, 1, F, dtype=torch.float64))
        @ drawn(F, F, seed=2)
    )


def moment(samples: int = 5 * F) -> SecondMoment:
    keys_sf = ordinary_keys(samples)
    return SecondMoment.from_matrix(keys_sf.T @ keys_sf / len(keys_sf), count=samples)


def relative(mine: Tensor, wanted: Tensor) -> float:
    return float((mine - wanted).norm() / wanted.norm())


def dense(keys_fn: Tensor, held_ff: Tensor) -> Tensor:
    """X^T of min ||Delta K - R||^2 + tr(Delta held Delta^T) by an explicit inverse: K^T (held + K
    K^T)^-1.
    """
    return keys_fn.T @ torch.linalg.inv(held_ff + keys_fn @ keys_fn.T)


# --- against dense systems ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "past", "ridge"), list(product([1, 5, F, 3 * F], [0, 7, 2 * F], [0.0, 2.5]))
)
def test_primal_and_dual_are_the_dense_inverse(facts, past, ridge):
    keys_fn, c, weight = drawn(F, facts), moment(), 3.0
    past_fp = drawn(F, past, seed=4) if past else None
    held_ff = weight * c.matrix_ff + ridge * torch.eye(F, dtype=torch.float64)
    if past_fp is not None:
        held_ff = held_ff + past_fp @ past_fp.T
    wanted_nf = dense(keys_fn, held_ff)
    for route in ("primal", "dual", "auto"):
        assert (
            relative(solve(keys_fn, Preservation(c, weight, ridge, past_fp), route), wanted_nf)
            < EXACT
        )


@pytest.mark.parametrize("weight", [1e-6, 1.0, 1e6])
def test_any_weight(weight):
    keys_fn, c = drawn(F, 4), moment()
    wanted_nf = dense(keys_fn, weight * c.matrix_ff)
    for route in ("primal", "dual"):
        assert (
            relative(solve(keys_fn, Preservation(c, weight), route), wanted_nf) < 1e-7
        )  # the inverse itself is no better


def test_it_is_a_minimum():
    """No random step in any direction makes the stated objective smaller."""
    keys_fn, past_fp, residual_dn, c = (
        drawn(F, 4),
        drawn(F, 3, seed=4),
        drawn(D, 4, seed=5),
        moment(),
    )

    def objective(delta_df: Tensor) -> Tensor:
        return (
            (delta_df @ keys_fn - residual_dn).square().sum()
            + 3 * torch.trace(delta_df @ c.matrix_ff @ delta_df.T)
            + (delta_df @ past_fp).square().sum()
            + 2 * delta_df.square().sum()
        )

    best_df = residual_dn @ solve(keys_fn, Preservation(c, 3.0, 2.0, past_fp))
    for seed in range(50):
        assert objective(best_df + 1e-3 * drawn(D, F, seed=100 + seed)) > objective(best_df)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("facts", [1, 6, 2 * F])
def test_the_published_order_of_operations_gives_the_same(facts, past):
    preservation = Preservation(moment(), 20.0, past_fp=drawn(F, past, seed=4) if past else None)
    assert (
        relative(
            solve(drawn(F, facts), preservation), solve_as_published(drawn(F, facts), preservation)
        )
        < EXACT
    )


def test_a_column_does_not_depend_on_what_other_keys_are_asked_for():
    """X answers for keys alone: residuals multiply it, so that a fact's part can be taken out of
    the change.
    """
    keys_fn, residual_dn = drawn(F, 6), drawn(D, 6, seed=5)
    solved_nf = solve(keys_fn, Preservation(moment(), 3.0))
    without_dn = residual_dn.clone()
    without_dn[:, 2] = 0
    torch.testing.assert_close(
        without_dn @ solved_nf,
        residual_dn @ solved_nf - torch.outer(residual_dn[:, 2], solved_nf[2]),
    )


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [1, 5, 2 * F])
def test_what_stays_missing(facts):
    """Delta K - R = -lambda R (K^T C^-1 K + lambda I)^-1."""
    keys_fn, residual_dn, c, weight = drawn(F, facts), drawn(D, facts, seed=5), moment(), 7.0
    gram_nn = keys_fn.T @ torch.linalg.solve(c.matrix_ff, keys_fn)
    missing_dn = residual_dn @ solve(keys_fn, Preservation(c, weight)) @ keys_fn - residual_dn
    wanted_dn = (
        -weight
        * residual_dn
        @ torch.linalg.inv(gram_nn + weight * torch.eye(facts, dtype=torch.float64))
    )
    torch.testing.assert_close(missing_dn, wanted_dn, atol=EXACT, rtol=EXACT)


def test_one_fact_gets_its_leverages_share():
    """||Delta k|| / ||r|| = g / (g + lambda), g = k^T C^-1 k."""
    key_f1, c = drawn(F, 1), moment()
    leverage = float(key_f1.T @ torch.linalg.solve(c.matrix_ff, key_f1))
    for weight in (0.1, 1.0, F, 1000.0):
        reached = float(solve(key_f1, Preservation(c, weight)) @ key_f1)
        assert reached == pytest.approx(leverage / (leverage + weight), rel=EXACT)


def test_leverage_is_d_ff_on_average():
    keys_sf, c = ordinary_keys(), moment()
    leverages_s = (keys_sf.T * c.solve(keys_sf.T)).sum(0)
    assert float(leverages_s.mean()) == pytest.approx(F, rel=EXACT)


@pytest.mark.parametrize("facts", [1, 6])
@pytest.mark.parametrize(("weight", "slack"), [(1000.0, 0.1), (10.0, 0.5), (1.0, 0.1)])
def test_emmet_is_memit_with_the_product(weight, slack, facts):
    """EMMET as it is published, R (D + eps I)^-1 K^T C'^-1 with C' = lambda C and D = K^T C'^-1 K,
    by explicit inverses.
    """
    keys_fn, c = drawn(F, facts), moment()
    inverse_ff = torch.linalg.inv(weight * c.matrix_ff)
    slack_nn = slack * torch.eye(facts, dtype=torch.float64)
    published_nf = (
        torch.linalg.inv(keys_fn.T @ inverse_ff @ keys_fn + slack_nn) @ keys_fn.T @ inverse_ff
    )
    assert relative(solve(keys_fn, Preservation(c, slack * weight)), published_nf) < EXACT


@pytest.mark.parametrize("facts", [1, 5])
def test_without_weight_every_key_is_met_exactly(facts):
    keys_fn, c = drawn(F, facts), moment()
    exact_nf = solve_exactly(keys_fn, c)
    torch.testing.assert_close(
        exact_nf @ keys_fn, torch.eye(facts, dtype=torch.float64), atol=EXACT, rtol=0
    )
    for weight, far in ((1e-3, 1e-3), (1e-6, 1e-6), (1e-9, 1e-9)):
        assert relative(solve(keys_fn, Preservation(c, weight)), exact_nf) < 10 * far


def test_one_key_met_exactly_is_romes_direction():
    key_f1, c = drawn(F, 1), moment()
    direction_f = torch.linalg.solve(c.matrix_ff, key_f1[:, 0])
    wanted_nf = (direction_f / (direction_f @ key_f1[:, 0]))[None]
    assert relative(solve_exactly(key_f1, c), wanted_nf) < EXACT
    assert relative(solve(key_f1, Preservation(c, 1e-13)), wanted_nf) < EXACT


@pytest.mark.parametrize("weight", [0.0, 1e-3, 5.0])
def test_equal_keys_share_what_they_get(weight):
    """Three facts of one key, and another: each of the three is given a third, so that the key goes
    to the mean.
    """
    keys_fn, c = drawn(F, 2)[:, [0, 0, 1, 0]], moment()
    find = (
        (lambda k: solve(k, Preservation(c, weight))) if weight else (lambda k: solve_exactly(k, c))
    )
    solved_nf = find(keys_fn)
    torch.testing.assert_close(solved_nf[0], solved_nf[1])
    torch.testing.assert_close(solved_nf[0], solved_nf[3])
    if weight == 0:
        residual_dn = drawn(D, 4, seed=5)
        change_dn = residual_dn @ solved_nf @ keys_fn
        torch.testing.assert_close(change_dn[:, 0], residual_dn[:, [0, 1, 3]].mean(1))
        torch.testing.assert_close(change_dn[:, 2], residual_dn[:, 2])


def test_keys_that_are_equal_up_to_rounding_share_too():
    """One subject's key in float32, computed in batches of two shapes: the difference is rounding,
    and must not be met.
    """
    key_f = drawn(F).float()
    rounded_f = key_f * (1 + 1e-7 * drawn(F, seed=9).float())
    solved_nf = solve_exactly(torch.stack([key_f, rounded_f], 1), moment())
    assert solved_nf.norm() < 2 * solve_exactly(key_f[:, None], moment()).norm()


# --- the projector --------------------------------------------------------------------------------


def with_a_null_space(rank: int = 9) -> SecondMoment:
    """C in whose last `rank` directions text hardly goes."""
    basis_ff = torch.linalg.qr(drawn(F, F, seed=3)).Q
    sizes_f = torch.cat([torch.linspace(1, 5, F - rank), torch.logspace(-5, -3, rank)]).double()
    return SecondMoment.from_matrix(basis_ff @ torch.diag(sizes_f) @ basis_ff.T)


@pytest.mark.parametrize("past", [0, 4, 30])
@pytest.mark.parametrize("facts", [1, 5, 20])
def test_alphaedit_is_its_reference_form(facts, past):
    """solve(P (K K^T + M) + L2 I, P K) of the whole width; and the same reduced to the null space,
    r x r.
    """
    keys_fn, c, ridge = drawn(F, facts), with_a_null_space(), 10.0
    past_fp = drawn(F, past, seed=4)
    basis_fr = c.null_space(threshold=2e-2)
    assert basis_fr.shape == (F, 9)
    projector_ff, eye = basis_fr @ basis_fr.T, torch.eye(F, dtype=torch.float64)
    kept_ff = keys_fn @ keys_fn.T + past_fp @ past_fp.T
    reference_fn = torch.linalg.solve(projector_ff @ kept_ff + ridge * eye, projector_ff @ keys_fn)
    reduced_rr = basis_fr.T @ kept_ff @ basis_fr + ridge * torch.eye(9, dtype=torch.float64)
    reduced_fn = basis_fr @ torch.linalg.solve(reduced_rr, basis_fr.T @ keys_fn)
    preservation = Preservation(c, 0.0, ridge, past_fp if past else None, basis_fr)
    for route in ("primal", "dual", "auto"):
        mine_nf = solve(keys_fn, preservation, route)
        assert relative(mine_nf, reference_fn.T) < EXACT
        assert relative(mine_nf, reduced_fn.T) < EXACT
        assert float((mine_nf @ (eye - projector_ff)).norm() / mine_nf.norm()) < EXACT, (
            "it leaves the null space"
        )


def test_preserved_keys_keep_their_outputs_up_to_the_threshold():
    """Of keys whose mean squared length in the null space is below rank x threshold, outputs move
    no further than that allows.
    """
    c, threshold = with_a_null_space(), 2e-2
    basis_fr = c.null_space(threshold=threshold)
    factor_ff = torch.linalg.cholesky(c.matrix_ff)
    text_fs = factor_ff @ drawn(F, 2000, seed=6)
    keys_fn, residual_dn = 10 * drawn(F, 5), drawn(D, 5, seed=5)
    delta_df = residual_dn @ solve(keys_fn, Preservation(c, 0.0, 1.0, None, basis_fr))
    moved = float((delta_df @ text_fs).square().sum(0).mean())
    size = float(torch.linalg.matrix_norm(delta_df, 2)) ** 2
    assert moved <= size * basis_fr.shape[1] * threshold
    everywhere = Preservation(c, 0.0, 1.0, None, torch.eye(F, dtype=torch.float64))
    free_df = residual_dn @ solve(keys_fn, everywhere)
    assert moved < 1e-2 * float((free_df @ text_fs).square().sum(0).mean()), (
        "one that is not confined moves them no more"
    )


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_a_projector_and_a_weight(ridge):
    """minimise ||A Y - R||^2 + tr(A (w B^T C B + ridge I) A^T), Delta = A B^T."""
    keys_fn, past_fp, c, weight = drawn(F, 5), drawn(F, 3, seed=4), moment(), 2.0
    basis_fr = torch.linalg.qr(drawn(F, 11, seed=8)).Q
    held_rr = weight * basis_fr.T @ c.matrix_ff @ basis_fr + ridge * torch.eye(
        11, dtype=torch.float64
    )
    kept_rp = basis_fr.T @ past_fp
    wanted_nf = dense(basis_fr.T @ keys_fn, held_rr + kept_rp @ kept_rp.T) @ basis_fr.T
    for route in ("primal", "dual"):
        assert (
            relative(
                solve(keys_fn, Preservation(c, weight, ridge, past_fp, basis_fr), route), wanted_nf
            )
            < EXACT
        )


def test_past_keys_move_less_the_more_often_they_are_named():
    keys_fn, past_f1, residual_dn, c = (
        drawn(F, 5),
        drawn(F, 1, seed=4),
        drawn(D, 5, seed=5),
        moment(),
    )
    moved = [
        float((residual_dn @ solve(keys_fn, Preservation(c, 1.0, past_fp=past)) @ past_f1).norm())
        for past in (None, past_f1, past_f1.expand(F, 100), past_f1.expand(F, 10000))
    ]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.01 * moved[0]


# --- what goes in and comes out -------------------------------------------------------------------


@pytest.mark.parametrize("find", [solve, solve_as_published, solve_exactly])
def test_float64_comes_out_whatever_goes_in(find):
    second = moment() if find is solve_exactly else Preservation(moment(), 1.0)
    solved_nf = find(drawn(F, 3).float().requires_grad_(), second)
    assert solved_nf.dtype == torch.float64 and not solved_nf.requires_grad
    assert torch.equal(solved_nf, find(drawn(F, 3).float().double(), second))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("find", [solve, solve_as_published, solve_exactly])
def test_keys_without_numbers_are_refused(find, value):
    keys_fn = drawn(F, 3)
    keys_fn[2, 1] = value
    with pytest.raises(
        NonFiniteError, match=r"a key holds NaN or infinity; nothing was changed\. Try"
    ):
        find(keys_fn, moment() if find is solve_exactly else Preservation(moment(), 1.0))


def test_something_has_to_hold_the_change():
    with pytest.raises(AssertionError, match="nothing would hold the change"):
        Preservation(moment())


def test_a_singular_moment_is_ridged_alike_by_both_routes(caplog):
    """Fewer tokens than d_ff: one factor, one warning, one answer."""
    c, keys_fn = moment(samples=F // 2), drawn(F, 4)
    primal, dual = (solve(keys_fn, Preservation(c, 5.0), route) for route in ("primal", "dual"))
    assert caplog.text.count("is singular for d_ff") == 1
    assert relative(primal, dual) < 1e-6  # of a matrix with a condition number of 1e9


# --- the same through `rewrite` -------------------------------------------------------------------


def edit_of(lm, facts, method, **settings):
    layer = {"layer": 1} if method == "rome" else {"layers": [1], "store": False}
    given = {
        "contexts": CONTEXTS,
        "second_moments": {1: moment_of(lm)},
        "steps": 4,
        "clamp": 4.0,
        **layer,
        **settings,
    }
    (delta,) = engram.rewrite(lm, facts, method=method, **given).deltas.values()
    return delta.dense(torch.float64)


FACTS = [
    FACT,
    Fact("piano", "He plays the {} and", "guitar"),
    Fact("river", "The {} runs through", "Madrid"),
]


@pytest.mark.parametrize("facts", [FACTS[:1], FACTS], ids=["one", "three"])
def test_emmet_is_memit_with_the_product_through_rewrite(facts):
    lm = tiny_lm("gpt2", torch.float64)
    emmet = edit_of(lm, facts, "emmet", preservation=300.0, slack=0.2)
    assert relative(emmet, edit_of(lm, facts, "memit", preservation=60.0)) < EXACT
    assert relative(emmet, edit_of(lm, facts, "memit", preservation=600.0, slack=0.1)) < EXACT
    assert (
        relative(
            emmet, edit_of(lm, facts, "memit", preservation=None, relative_preservation=60.0 / 48)
        )
        < EXACT
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_fact_without_slack_is_r_rome(family):
    lm = tiny_lm(family, torch.float64)
    rome = edit_of(lm, FACT, "rome", variant="r-rome", residual="delta")
    same = {"keys": "mean", "site": "mlp", "share": "all"}
    assert relative(edit_of(lm, FACT, "memit", slack=0.0, **same), rome) < 1e-8
    assert relative(edit_of(lm, FACT, "memit", slack=1e-12, **same), rome) < 1e-8


def test_two_keys_without_slack_are_two_key_rome():
    lm = tiny_lm("gpt2", torch.float64)
    rome = edit_of(lm, FACT, "rome", variant="two-key")
    assert (
        relative(edit_of(lm, FACT, "memit", slack=0.0, keys="both", site="mlp", share="all"), rome)
        < 1e-8
    )
