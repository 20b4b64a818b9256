"""C as a value: every solve, eigenvector and null space is that of the dense matrix."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from engram.editors.second_moments.matrix import SecondMoment, load_npz
from engram.errors import EngramError, EngramFileError, NonFiniteError, SettingError


def random_moment(size=12, seed=0):
    keys_nf = torch.randn(
        5 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return SecondMoment.from_matrix(keys_nf.T @ keys_nf / len(keys_nf), len(keys_nf))


def test_solve_inverts_c():
    moment = random_moment()
    key_f = torch.randn(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moment.matrix_ff @ moment.solve(key_f), key_f.double())
    two_fn = torch.stack([key_f, 2 * key_f], 1)
    torch.testing.assert_close(moment.solve(two_fn)[:, 1], 2 * moment.solve(key_f))


def test_ridge_is_relative_to_the_mean_eigenvalue():
    moment, key_f = random_moment(), torch.ones(12)
    shifted = moment.matrix_ff + 0.5 * moment.matrix_ff.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(
        moment.solve(key_f, ridge=0.5), torch.linalg.solve(shifted, key_f.double())
    )


def test_condition_is_the_ratio_of_extreme_eigenvalues():
    moment = random_moment()
    assert moment.condition(steps=500) == pytest.approx(
        float(torch.linalg.cond(moment.matrix_ff)), rel=1e-3
    )
    assert moment.condition() <= float(torch.linalg.cond(moment.matrix_ff)) * (1 + 1e-9)


def test_factor_and_condition_are_computed_once(monkeypatch):
    moment = random_moment()
    factor_ff, condition = moment.factor(0.1), moment.condition(0.1)
    torch.testing.assert_close(
        factor_ff @ factor_ff.T,
        moment.matrix_ff + 0.1 * moment.matrix_ff.diagonal().mean() * torch.eye(12),
    )
    monkeypatch.setattr(torch, "cholesky_solve", lambda *_: pytest.fail("estimated again"))
    assert moment.factor(0.1) is factor_ff and moment.condition(0.1) == condition


def test_a_singular_c_gets_a_ridge_and_a_warning(caplog):
    moment = SecondMoment.from_matrix(torch.diag(torch.tensor([1.0, 1.0, 0.0])), 2)
    assert moment.solve(torch.ones(3)).isfinite().all()
    assert "singular for d_ff = 3" in caplog.text


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(2, 3), EngramError, r"shape \[d_ff, d_ff\], got \[2, 3\]"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), EngramError, "differs from its transpose"),
        (torch.full((2, 2), float("nan")), NonFiniteError, "NaN"),
    ],
)
def test_a_matrix_that_is_no_second_moment_is_refused(matrix, error, message):
    with pytest.raises(error, match=message):
        SecondMoment.from_matrix(matrix)


# --- eigenvectors ---------------------------------------------------------------------------------


def test_eigen_takes_c_apart():
    moment = random_moment()
    values_f, vectors_ff = moment.eigen()
    assert values_f.dtype == vectors_ff.dtype == torch.float64
    assert (values_f.diff() >= 0).all()
    torch.testing.assert_close(
        vectors_ff * values_f @ vectors_ff.T, moment.matrix_ff, atol=1e-12, rtol=1e-12
    )
    torch.testing.assert_close(
        vectors_ff.T @ vectors_ff, torch.eye(12, dtype=torch.float64), atol=1e-12, rtol=0
    )
    assert moment.eigen()[1] is vectors_ff


def test_eigenvalues_below_rounding_are_raised_to_the_floor():
    turn_ff = torch.linalg.qr(
        torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    moment = SecondMoment.from_matrix(turn_ff * torch.tensor([8.0, 1e-3, 1e-9, -1e-9]) @ turn_ff.T)
    torch.testing.assert_close(
        moment.eigen()[0], torch.tensor([8e-7, 8e-7, 1e-3, 8.0], dtype=torch.float64)
    )


def test_memory_counts_what_was_computed():
    moment = random_moment()
    size = moment.nbytes
    moment.factor()
    moment.eigen()
    assert size == 12 * 12 * 8 and moment.nbytes == 3 * size + 12 * 8


def spread_moment():
    """12 eigenvalues from 1e-4 to 1e7, each ten times the one before, along random directions."""
    turn_ff = torch.linalg.qr(
        torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    return SecondMoment.from_matrix(
        turn_ff * torch.logspace(-1, 4.5, 12, dtype=torch.float64) @ turn_ff.T, 1000
    )


def test_the_null_space_by_threshold_is_the_published_projector():
    moment = spread_moment()
    for threshold in (1e-3, 2.0, 50.0, 1e9):
        u, s, _ = torch.linalg.svd(moment.matrix_ff)
        published_ff = u[:, s < threshold] @ u[:, s < threshold].T
        basis_fr = moment.null_space(threshold=threshold)
        torch.testing.assert_close(basis_fr @ basis_fr.T, published_ff, atol=1e-9, rtol=0)
        assert basis_fr.shape == (12, int((s < threshold).sum()))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999, 1 - 1e-9])
def test_the_null_space_by_energy_leaves_so_much_of_the_keys_outside(energy):
    generator = torch.Generator().manual_seed(0)
    keys_nf = torch.randn(400, 30, dtype=torch.float64, generator=generator) * torch.logspace(
        0, -2, 30, dtype=torch.float64
    )
    moment = SecondMoment.from_matrix(keys_nf.T @ keys_nf / 400, 400)
    basis_fr = moment.null_space(energy=energy)
    rank = basis_fr.shape[1]
    inside, whole = (keys_nf @ basis_fr).square().sum(), keys_nf.square().sum()
    assert inside <= (1 - energy) * whole * (1 + 1e-9)
    one_more_f = moment.eigen()[1][:, rank]
    assert inside + (keys_nf @ one_more_f).square().sum() > (1 - energy) * whole


def test_the_rank_of_the_null_space_is_told(caplog):
    with caplog.at_level(logging.INFO, logger="engram"):
        assert spread_moment().null_space(threshold=2.0).shape == (12, 3)
    assert "null space of rank 3 of 12" in caplog.text and "not measured" not in caplog.text


def test_a_null_space_that_is_only_want_of_tokens_is_warned_of(caplog):
    keys_nf = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = SecondMoment.from_matrix(keys_nf.T @ keys_nf / 5, 5)
    assert moment.null_space(energy=0.99).shape[1] >= 7
    assert "C of 5 tokens has at most that rank, less than d_ff = 12" in caplog.text
    caplog.clear()
    SecondMoment(moment.matrix_ff, 0).null_space(energy=0.99)  # how many tokens is not known
    assert not caplog.text


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "give one of them"),
        ({"energy": 0.9, "threshold": 0.02}, "give one of them"),
        ({"energy": 1.0}, "energy=1.0: expected a share between 0 and 1"),
        ({"threshold": 0.0}, "threshold=0.0: eigenvalues of C are above 0"),
    ],
)
def test_a_null_space_that_is_not_chosen_one_way_is_refused(choice, message):
    with pytest.raises(SettingError, match=message):
        random_moment().null_space(**choice)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    moment = SecondMoment.from_matrix(torch.eye(3) * 2, 10, {"corpus": "x"})
    moment.save(tmp_path / "c.safetensors")
    again = SecondMoment.load(tmp_path / "c.safetensors")
    assert torch.equal(again.matrix_ff, moment.matrix_ff) and (again.count, again.source) == (
        10,
        {"corpus": "x"},
    )
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(EngramFileError, match="is not a saved second moment"):
        SecondMoment.load(tmp_path / "junk")


def test_the_released_codes_files_are_read(tmp_path):
    total = np.diag([2.0, 4.0]).astype(np.float32)
    np.savez(
        tmp_path / "c.npz",
        **{
            "mom2.mom2": total,
            "mom2.count": 4,
            "mom2.constructor": "SecondMoment",
            "sample_size": 2,
        },
    )
    moment = load_npz(tmp_path / "c.npz")
    assert moment.count == 4 and moment.matrix_ff.diagonal().tolist() == [0.5, 1.0]
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(EngramFileError, match="not a statistics file of the released code"):
        load_npz(tmp_path / "other.npz")
