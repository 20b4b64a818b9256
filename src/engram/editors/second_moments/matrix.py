"""C of one block's keys as a value: solves, eigenvectors, its null space, and its file.

Knows a symmetric matrix, the number of its tokens and where they came from. Refuses to know models
and text: see measure.py.
Source: Meng et al. 2022, arXiv:2202.05262, Eq. 2; null space: Fang et al. 2024, arXiv:2410.02355,
    Sec. 3.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import TypedDict

from engram.errors import EngramError, EngramFileError, NonFiniteError, SettingError
from engram.files.names import open_regular
from engram.modules.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)

# an eigenvalue below this share of the largest is rounding of float32 products, not a measurement
NOISE = 1e-7
_RIDGES = (1e-9, 1e-7, 1e-5, 1e-3)  # tried in turn where C has no Cholesky factor
# d_ff from which an eigendecomposition is worth a file: it takes 0.3 s there, and eight times as
# long at each doubling
_KEPT_FROM = 1024
_KIND, _EIGEN = "engram.second_moment", "engram.eigen"
WHAT = "a saved second moment"


class _AboutForm(TypedDict):
    count: Annotated[int, Ge(0)]
    source: dict[str, Any]


class _EigenForm(TypedDict):
    of: str


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """C of one block's keys. Many edits may share one object, which keeps what it computes, so do
    not write into it.

    Attributes:
        matrix_ff: mean of k k^T, uncentred, symmetric; float64.
        count: tokens it was measured on, 0 where that is unknown.
        source: what it was measured on, for JSON; part of the recipe of every edit.
        file: its file in the cache, if any; a costly eigendecomposition is written beside it.
    """

    matrix_ff: Tensor
    count: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    _factors: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)
    _conditions: dict[tuple[float, int], float] = field(
        default_factory=dict, init=False, repr=False
    )
    _eigen: list[Tensor] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def from_matrix(
        cls, matrix: Tensor | np.ndarray, count: int = 0, source: Mapping[str, Any] | None = None
    ) -> SecondMoment:
        """Build from a matrix [f, f].

        Raises:
            EngramError: not square or not symmetric; NonFiniteError: not finite.
        """
        given = torch.as_tensor(matrix).detach().cpu().double()
        if given.dim() != 2 or given.shape[0] != given.shape[1]:
            raise EngramError(f"a second moment has shape [d_ff, d_ff], got {list(given.shape)}")
        if not given.isfinite().all():
            raise NonFiniteError("the second moment holds NaN or infinity")
        asymmetry = float((given - given.T).abs().max() / given.abs().max().clamp_min(1e-300))
        if asymmetry > 1e-4:  # rounding of float32 sums is far below this
            raise EngramError(
                "a second moment is symmetric; this matrix differs from its transpose by "
                f"{asymmetry:.1e}"
            )
        return cls((given + given.T) / 2, count, dict(source or {"given": _digest(given)}))

    @property
    def nbytes(self) -> int:
        """Memory of the matrix and of all that was computed from it so far."""
        tensors = (self.matrix_ff, *self._factors.values(), *self._eigen)
        return sum(tensor.nbytes for tensor in tensors)

    def solve(self, key_f: Tensor, ridge: float = 0.0) -> Tensor:
        """Return C^-1 key, float64 on the CPU, through one Cholesky factor that is kept.

        Args:
            key_f: [f] or [f, n].
            ridge: see `factor`.
        """
        columns = key_f.detach().cpu().double()
        solved = torch.cholesky_solve(columns.reshape(len(columns), -1), self.factor(ridge))
        return solved.reshape(columns.shape)

    def factor(self, ridge: float = 0.0) -> Tensor:
        """Return the lower Cholesky factor [f, f] of C + ridge x its mean eigenvalue, float64,
        computed once and kept.

        Where C has none (fewer tokens than d_ff, neurons that never fire), the smallest ridge of
        1e-9, 1e-7, 1e-5 and 1e-3 that works is used, with a warning.

        Raises:
            NonFiniteError: no factor even then.
        """
        if ridge not in self._factors:
            # relative to the mean eigenvalue, so that one ridge fits models of any scale
            mean_eigenvalue = float(self.matrix_ff.diagonal().mean())
            for tried in (ridge, *(r for r in _RIDGES if r > ridge)):
                shifted_ff = self.matrix_ff.clone()
                shifted_ff.diagonal().add_(tried * mean_eigenvalue)
                # cholesky_ex reports failure, where cholesky would raise
                factor_ff, failed = torch.linalg.cholesky_ex(shifted_ff)
                if not failed:
                    break
            else:
                raise NonFiniteError(
                    "the second moment is not positive semi-definite; measure it again"
                )
            if tried != ridge:
                log.warning(
                    "C of %d tokens is singular for d_ff = %d; a ridge of %g times its mean "
                    "eigenvalue is added",
                    self.count,
                    len(factor_ff),
                    tried,
                )
            self._factors[ridge] = factor_ff
        return self._factors[ridge]

    def condition(self, ridge: float = 0.0, steps: int = 40) -> float:
        """Return an estimate, from below, of the largest over the smallest eigenvalue; keep it.

        Power iteration with C and with C^-1 through the Cholesky factor, which is there already: an
        eigendecomposition only for this number would cost more than the edit.
        """
        if (ridge, steps) not in self._conditions:
            factor_ff = self.factor(ridge)
            start_f1 = torch.randn(
                len(factor_ff), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
            )
            large_f1 = small_f1 = start_f1 / start_f1.norm()
            for _ in range(steps):
                up_f1, down_f1 = (
                    factor_ff @ (factor_ff.T @ large_f1),
                    torch.cholesky_solve(small_f1, factor_ff),
                )
                large, small = up_f1.norm(), down_f1.norm()
                large_f1, small_f1 = up_f1 / large, down_f1 / small
            self._conditions[ridge, steps] = float(large * small)
        return self._conditions[ridge, steps]

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues [f], ascending, and eigenvectors [f, f], one a column; float64.

        They are computed once and kept.

        Eigenvalues below 1e-7 of the largest are rounding noise, negative as often as not. They are
        raised to that floor: C^-1 through the decomposition then stays positive and finite, and
        such a direction counts as one that text leaves empty.
        """
        if not self._eigen:
            self._eigen[:] = self._eigen_from_file() or self._eigen_computed()
        eigenvalues_f, eigenvectors_ff = self._eigen
        return eigenvalues_f, eigenvectors_ff

    def null_space(self, *, energy: float | None = None, threshold: float | None = None) -> Tensor:
        """Return U_0 [f, r]: orthonormal directions that text hardly fills.

        U_0 U_0^T is AlphaEdit's projector. The squared length of a token's key along them is on
        average the sum of their eigenvalues. For example, with eigenvalues 1, 2, 7, 90 (trace 100):
        energy=0.89 chooses 1, 2 and 7, which sum to 10 % of the trace; energy=0.98 chooses 1;
        threshold=5 chooses 1 and 2.

        Args:
            energy: share of the keys' mean squared length (the trace of C) that stays outside the
                null space, in (0, 1): the smallest eigenvalues are chosen while they sum to at most
                1 - energy of the trace. It means the same for every model.
            threshold: choose the eigenvalues strictly below this, in the units of C; the published
                value is 2e-2.
        Returns:
            Eigenvectors by ascending eigenvalue, float64; the rank r is its width, and can be 0.
        Raises:
            SettingError: both or neither are given, or one is out of its range.
        """
        if (energy is None) == (threshold is None):
            raise SettingError(
                f"energy={energy}, threshold={threshold}: give one of them, it says how the null "
                "space is chosen"
            )
        if energy is not None and not 0 < energy < 1:
            raise SettingError(
                f"energy={energy}: expected a share between 0 and 1 that stays outside the null "
                "space, e.g. 0.98"
            )
        if threshold is not None and threshold <= 0:
            raise SettingError(
                f"threshold={threshold}: eigenvalues of C are above 0, the published threshold is "
                "2e-2"
            )
        eigenvalues_f, eigenvectors_ff = self.eigen()
        # ascending, so the first r sums are the energies of all null spaces of rank 1 to r
        sums_f = eigenvalues_f.cumsum(0)
        chosen_f = (
            sums_f <= (1 - energy) * sums_f[-1]
            if energy is not None
            else eigenvalues_f < cast("float", threshold)
        )
        rank = int(chosen_f.sum())
        share = float(sums_f[rank - 1] / sums_f[-1]) if rank else 0.0
        log.info(
            "null space of rank %d of %d, with %.2e of the keys' mean squared length",
            rank,
            len(chosen_f),
            share,
        )
        if 0 < self.count < len(chosen_f):
            log.warning(
                "C of %d tokens has at most that rank, less than d_ff = %d: much of its null space "
                "is "
                "directions that were not measured; measure more tokens",
                self.count,
                len(chosen_f),
            )
        return eigenvectors_ff[:, :rank]

    def _eigen_computed(self) -> tuple[Tensor, Tensor]:
        eigenvalues_f, eigenvectors_ff = torch.linalg.eigh(self.matrix_ff)
        eigen = (
            eigenvalues_f.clamp_min(NOISE * float(eigenvalues_f[-1])),
            eigenvectors_ff.contiguous(),
        )
        if self.file is not None and len(eigenvalues_f) >= _KEPT_FROM:
            tensors = dict(zip(("eigenvalues", "eigenvectors"), eigen, strict=True))
            try:
                write_tensors(
                    self.file.with_suffix(".eigen"),
                    tensors,
                    _EIGEN,
                    {"of": _digest(self.matrix_ff)},
                )
            except EngramError as error:  # a full disk stops no edit
                log.warning(
                    "the eigendecomposition could not be written, the next process computes it "
                    "again: %s",
                    error,
                )
        return eigen

    def _eigen_from_file(self) -> tuple[Tensor, Tensor] | None:
        """Return the eigendecomposition in the file, if it is of this very matrix."""
        if self.file is None or not (path := self.file.with_suffix(".eigen")).exists():
            return None
        try:
            about: _EigenForm
            tensors, about = read_tensors(path, _EIGEN, _EigenForm, "an eigendecomposition")
        except EngramFileError as error:
            log.warning("%s; computing it again", error)
            return None
        # a file beside another C (measured again under the same name) is of no use
        if about["of"] != _digest(self.matrix_ff):
            return None
        eigen = tensors.get("eigenvalues"), tensors.get("eigenvectors")
        fits = [None if part is None else part.shape for part in eigen]
        if fits != [self.matrix_ff.shape[:1], self.matrix_ff.shape]:
            log.warning("%s is not of its second moment; computing it again", path)
            return None
        return cast("tuple[Tensor, Tensor]", eigen)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, whole or not at all."""
        write_tensors(
            path, {"matrix": self.matrix_ff}, _KIND, {"count": self.count, "source": self.source}
        )

    @classmethod
    def load(cls, path: str | Path) -> SecondMoment:
        """Read what `save` wrote.

        Raises:
            EngramFileError: not such a file.
        """
        about: _AboutForm
        tensors, about = read_tensors(path, _KIND, _AboutForm, WHAT)
        matrix_ff = tensors.get("matrix", torch.empty(0))
        square = matrix_ff.dim() == 2 and matrix_ff.shape[0] == matrix_ff.shape[1] > 0
        # a sum is finite where all terms are, and takes a tenth of the time of `isfinite`
        if not square or matrix_ff.dtype != torch.float64 or not matrix_ff.sum().isfinite():
            raise EngramFileError(
                f"{str(path)!r} is not {WHAT} (its matrix is {list(matrix_ff.shape)} "
                f"{matrix_ff.dtype}; expected a finite one of float64, [d_ff, d_ff])"
            )
        return cls(matrix_ff, about["count"], about["source"])


def load_npz(path: str | Path) -> SecondMoment:
    """Read a statistics file of the released code: an .npz with the sum `mom2.mom2` and the number
    of tokens `mom2.count`.

    Raises:
        EngramFileError: not such a file.
    """
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            total, count = arrays["mom2.mom2"].astype(np.float64), int(arrays["mom2.count"])
        if count < 1:
            raise ValueError(f"mom2.count={count}, expected at least 1")
        source = {"npz": Path(path).name, "tokens": count}
        return SecondMoment.from_matrix(total / count, count, source)
    except Exception as error:  # zip, zlib and numpy's header, which is parsed as Python: anything
        raise EngramFileError(
            f"{str(path)!r} is not a statistics file of the released code ({error}); expected "
            "mom2.mom2 and mom2.count"
        ) from error


def _digest(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.contiguous().numpy().data).hexdigest()
