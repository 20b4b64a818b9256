"""The least-squares core of every closed-form method: the change of a matrix that sends keys to new
values and disturbs all others least.

    minimise ||Delta K - R||^2 + weight tr(Delta C Delta^T) + ||Delta K_past||^2 + ridge
    ||Delta||^2, with Delta = Delta P

Delta = R X^T, and X does not depend on R: column i of X says how far the change answers to key i.
So a mass edit is one column per fact. Knows matrices, float64, Cholesky; refuses to know where keys
and residuals come from (see subject_keys, values).

In coordinates in which A A^T = weight C + ridge I is the identity (y = A^-1 k), X = A^-T (I + Y
Y^T)^-1 Y: a system as wide as the keys are long (primal). By the push-through identity this equals
A^-T Y (I + Y^T Y)^-1, as wide as there are keys (dual). The smaller one is solved: 100 facts on
d_ff = 6,400 take a 100 x 100 system and two triangular solves with A, where the published order of
operations takes an LU of the 6,400 x 6,400 matrix. A depends on the model alone, so that the moment
keeps it for every later edit.

    n facts, f = d_ff       primal        dual
    n = 1, f = 6,400        6,400^2       1^2            dual
    n = 10,000, f = 6,400   6,400^2       10,000^2       primal

Float64 throughout: in float32 the condition of C, up to 1e6, leaves one or two digits. Source: Meng
et al. 2022, arXiv:2202.05262, Sec. 3.1, and arXiv:2210.07229, Sec. 4; Gupta et al. 2024,
arXiv:2403.14236 (equality); Fang et al. 2024, arXiv:2410.02355 (projector).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engram.editors.second_moments.measure import SecondMoment
from engram.errors import NonFiniteError

Route = Literal["auto", "primal", "dual"]


@dataclass(frozen=True)
class Preservation:
    """What a change shall leave as it is.

    Args:
        moment: C, mean of k k^T over ordinary text, [f, f].
        weight: of C, MEMIT's lambda (`mom2_update_weight`). Compare it with d_ff: that is the mean
            of k^T C^-1 k.
        ridge: of ||Delta||^2, absolute.
        past_fp: [f, p] keys of earlier edits.
        basis_fr: [f, r] orthonormal; the change acts on its span only (AlphaEdit's null space).
    """

    moment: SecondMoment
    weight: float = 0.0
    ridge: float = 0.0
    past_fp: Tensor | None = None
    basis_fr: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.weight > 0 or (self.basis_fr is not None and self.ridge > 0), (
            "nothing would hold the change"
        )


def solve(keys_fn: Tensor, preservation: Preservation, route: Route = "auto") -> Tensor:
    """Return X^T [n, f], float64: the change is residuals [d, n] @ X^T.

    Args:
        keys_fn: [f, n] one column per fact. Equal keys share their change equally.
        route: which of the two systems is solved; both give the same X.
    Raises:
        NonFiniteError: keys that are not finite.
    """
    keys_fn = _finite(keys_fn)
    n = keys_fn.shape[1]
    # A past key is a key whose residual is zero: it joins the system, and its column is dropped.
    keys_fm = keys_fn
    if preservation.past_fp is not None:
        keys_fm = torch.cat([keys_fn, preservation.past_fp.to(keys_fn)], 1)
    space = _Whitened(preservation, keys_fn.device)
    y_rm = space.down(keys_fm)
    if route == "auto":
        route = "dual" if y_rm.shape[1] <= y_rm.shape[0] else "primal"
    if route == "dual":
        gram_mm = y_rm.T @ y_rm
        gram_mm.diagonal().add_(1)
        x_nr = torch.cholesky_solve(y_rm.T, torch.linalg.cholesky(gram_mm))[:n]
    else:
        gram_rr = y_rm @ y_rm.T
        gram_rr.diagonal().add_(1)
        x_nr = torch.cholesky_solve(y_rm[:, :n], torch.linalg.cholesky(gram_rr)).T
    return space.up(x_nr)


def solve_exactly(keys_fn: Tensor, moment: SecondMoment) -> Tensor:
    """Return X^T [n, f], float64, of the change with Delta K = R that moves ordinary text least:
    (K^T C^-1 K)^-1 K^T C^-1.

    The limit of `solve` for weight -> 0. Keys that depend on each other, up to the rounding of
    their dtype, get the least-squares solution: to meet two computations of one key exactly, the
    change would have to amplify the rounding between them.
    """
    (solved_nf,) = solve_each([keys_fn], moment)
    return solved_nf


def solve_each(keys: Sequence[Tensor], moment: SecondMoment, ridge: float = 0.0) -> list[Tensor]:
    """Return `solve_exactly` of several changes, each by itself.

    C's factor is large, and a solve with one column reads all of it: so it is read once for all
    changes.

    Args:
        ridge: added to C, times its mean eigenvalue.
    """
    finite = [_finite(keys_fn) for keys_fn in keys]
    solved = moment.solve(torch.cat(finite, 1), ridge=ridge).to(finite[0].device)
    parts = solved.split([keys_fn.shape[1] for keys_fn in keys], 1)
    # met exactly, two float32 computations of one key gave a change 1e7 times too large
    rounding = 10 * torch.finfo(keys[0].dtype).eps
    return [
        _exactly(keys_fn, solved_fn, rounding)
        for keys_fn, solved_fn in zip(finite, parts, strict=True)
    ]


def _exactly(keys_fn: Tensor, solved_fn: Tensor, rounding: float) -> Tensor:
    # K^T C^-1 K, scaled to ones on the diagonal, so that `rounding` is a cosine's and does not
    # depend on how long a key is.
    gram_nn = keys_fn.T @ solved_fn
    size_n = gram_nn.diagonal().sqrt()
    size_n = torch.where(size_n > 0, size_n, 1.0)
    cosines_nn = gram_nn / size_n / size_n[:, None]
    relative = len(size_n) * torch.finfo(torch.float64).eps
    inverse_nn = torch.linalg.pinv(cosines_nn, atol=rounding, rtol=relative, hermitian=True)
    return inverse_nn / size_n[:, None] @ (solved_fn / size_n).T


def solve_as_published(keys_fn: Tensor, preservation: Preservation) -> Tensor:
    """Return X^T [n, f] by the released code's order of operations: one LU of the whole matrix.

    For parity and as a baseline of speed; MEMIT and MEMIT-seq only (weight and past keys, no ridge,
    no projector).
    """
    keys_fn = _finite(keys_fn)
    matrix_ff = (
        preservation.weight * preservation.moment.matrix_ff.to(keys_fn) + keys_fn @ keys_fn.T
    )
    if preservation.past_fp is not None:
        matrix_ff += preservation.past_fp.to(keys_fn) @ preservation.past_fp.to(keys_fn).T
    return torch.linalg.solve(matrix_ff, keys_fn).T


class _Whitened:
    """Coordinates in which weight C + ridge I is the identity; on the span of the basis, if any."""

    def __init__(self, preservation: Preservation, device: torch.device) -> None:
        moment, weight, ridge = preservation.moment, preservation.weight, preservation.ridge
        self.scale = 1.0
        self.factor: Tensor | None = None
        self.basis_fr = preservation.basis_fr
        if self.basis_fr is None:
            # The moment keeps the factor of C + (ridge / weight) I for the next edit; a factor of
            # weight C + ridge I would be another one for each weight.
            mean = float(moment.matrix_ff.diagonal().mean())
            self.factor = moment.factor(ridge / (weight * mean)).to(device)
            self.scale = weight**-0.5
            return
        self.basis_fr = self.basis_fr.to(device, torch.float64)
        if weight:
            held_rr = weight * self.basis_fr.T @ moment.matrix_ff.to(device) @ self.basis_fr
            held_rr.diagonal().add_(ridge)
            self.factor = torch.linalg.cholesky(held_rr)
        else:
            self.scale = ridge**-0.5

    def down(self, keys_fm: Tensor) -> Tensor:
        y_rm = keys_fm if self.basis_fr is None else self.basis_fr.T @ keys_fm
        if self.factor is not None:
            y_rm = torch.linalg.solve_triangular(self.factor, y_rm, upper=False)
        return self.scale * y_rm

    def up(self, x_nr: Tensor) -> Tensor:
        if self.factor is not None:
            x_nr = torch.linalg.solve_triangular(self.factor, x_nr, upper=False, left=False)
        return self.scale * (x_nr if self.basis_fr is None else x_nr @ self.basis_fr.T)


def _finite(keys_fn: Tensor) -> Tensor:
    """Return keys in float64, on a CUDA device where they are on one, else on the CPU.

    Other accelerators have no float64.
    """
    keys_fn = keys_fn.detach().to(keys_fn.device if keys_fn.is_cuda else "cpu", torch.float64)
    if not keys_fn.isfinite().all():
        raise NonFiniteError(
            "a key holds NaN or infinity; nothing was changed. Try dtype=torch.float32"
        )
    return keys_fn
