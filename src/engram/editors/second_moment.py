"""Second moments of keys: C = mean of k k^T over tokens of ordinary text, k the input of a block's MLP output matrix.

What lies along well-filled directions of C an edit leaves alone. Measured for several layers in one pass that stops at the
deepest, in pieces that a killed run takes up again, and kept under a name made of all that it depends on.
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.1 (Eq. 2) and Appendix E.4; file format of the released statistics.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engram.architectures import as_linear
from engram.cache import cache_folder, identity_of, sha256_of
from engram.editors.corpora import Corpus, as_corpus
from engram.errors import EditFileError, EngramError, NonFiniteError
from engram.hooks import record
from engram.language_model import LanguageModel, pad_right
from engram.merging import fingerprint
from engram.replay import body

log = logging.getLogger(__name__)

TOKENS_PER_KEY = 20  # tokens measured by default, as a multiple of d_ff
_DOCUMENTS = 64  # documents between two points at which a run can be taken up again
_RIDGES = (1e-9, 1e-7, 1e-5, 1e-3)  # tried in turn where C has no Cholesky factor


@dataclass(frozen=True)
class SecondMoment:
    """C of one block's keys.

    Attributes:
        matrix_ff: mean of k k^T, uncentred, symmetric; float64.
        count: tokens it was measured on, 0 where that is not known.
        source: what it was measured on, as JSON knows it; goes into the recipe of every edit.
    """

    matrix_ff: Tensor
    count: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_matrix(
        cls, matrix: Tensor | np.ndarray, count: int = 0, source: Mapping[str, Any] | None = None
    ) -> SecondMoment:
        """From a matrix [f, f].

        Raises:
            EngramError: not square or not symmetric; NonFiniteError: not finite.
        """
        given = torch.as_tensor(matrix).detach().cpu().double()
        if given.dim() != 2 or given.shape[0] != given.shape[1]:
            raise EngramError(f"a second moment has shape [d_ff, d_ff], got {list(given.shape)}")
        if not given.isfinite().all():
            raise NonFiniteError("the second moment holds NaN or infinity")
        asymmetry = float((given - given.T).abs().max() / given.abs().max().clamp_min(1e-300))
        if asymmetry > 1e-4:
            raise EngramError(f"a second moment is symmetric; this matrix differs from its transpose by {asymmetry:.1e}")
        digest = hashlib.sha256(given.numpy().tobytes()).hexdigest()
        return cls((given + given.T) / 2, count, dict(source or {"given": digest}))

    def solve(self, key_f: Tensor, ridge: float = 0.0) -> Tensor:
        """C^-1 key, float64 on the CPU, through one Cholesky factor that is kept.

        Args:
            key_f: [f] or [f, n].
            ridge: added to C first, times its mean eigenvalue. Where C has no factor (fewer tokens than d_ff, neurons that
                never fire) a small one is taken and a warning says so.
        """
        columns = key_f.detach().cpu().double()
        solved = torch.cholesky_solve(columns.reshape(len(columns), -1), self._factor(ridge))
        return solved.reshape(columns.shape)

    def condition(self, ridge: float = 0.0, steps: int = 40) -> float:
        """Estimate, from below, of the largest over the smallest eigenvalue: power iteration both ways."""
        factor_ff = self._factor(ridge)
        start_f1 = torch.randn(len(factor_ff), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        large_f1 = small_f1 = start_f1 / start_f1.norm()
        for _ in range(steps):
            up_f1, down_f1 = factor_ff @ (factor_ff.T @ large_f1), torch.cholesky_solve(small_f1, factor_ff)
            large, small = up_f1.norm(), down_f1.norm()
            large_f1, small_f1 = up_f1 / large, down_f1 / small
        return float(large * small)

    def _factor(self, ridge: float) -> Tensor:
        if ridge not in self._factors:
            scale = float(self.matrix_ff.diagonal().mean())
            for tried in (ridge, *(r for r in _RIDGES if r > ridge)):
                shifted = self.matrix_ff + tried * scale * torch.eye(len(self.matrix_ff), dtype=torch.float64)
                factor_ff, failed = torch.linalg.cholesky_ex(shifted)
                if not failed:
                    break
            else:
                raise NonFiniteError("the second moment is not positive semi-definite; measure it again")
            if tried != ridge:
                log.warning("C of %d tokens is singular for d_ff = %d; a ridge of %g times its mean eigenvalue is added",
                            self.count, len(factor_ff), tried)  # fmt: skip
            self._factors[ridge] = factor_ff
        return self._factors[ridge]

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, whole or not at all."""
        header = {"engram.second_moment": json.dumps({"count": self.count, "source": self.source})}
        _write(path, {"matrix": self.matrix_ff}, header)

    @classmethod
    def load(cls, path: str | Path) -> SecondMoment:
        """Read what `save` wrote.

        Raises:
            EditFileError: not such a file.
        """
        tensors, about = _read(path, "engram.second_moment")
        return cls(tensors["matrix"], about["count"], about["source"])


def load_npz(path: str | Path) -> SecondMoment:
    """Read a statistics file of the released code: an .npz with the sum `mom2.mom2` and the number of tokens `mom2.count`.

    Raises:
        EditFileError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            total, count = arrays["mom2.mom2"], int(arrays["mom2.count"])
    except (OSError, KeyError, ValueError) as error:
        raise EditFileError(
            f"{str(path)!r} is not a statistics file of the released code ({error}); it has mom2.mom2 and mom2.count"
        ) from error
    return SecondMoment.from_matrix(total.astype(np.float64) / count, count, {"npz": Path(path).name, "tokens": count})


def second_moments(
    lm: LanguageModel,
    layers: Sequence[int],
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    *,
    seed: int = 0,
    tokens_per_document: int = 1024,
    batch_tokens: int = 4096,
    cache_dir: str | Path | None = None,
    save_every: float = 20.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, SecondMoment]:
    """Measure C of several blocks in one pass over text, or read it where the same was measured before.

    Args:
        layers: blocks, from 0.
        corpus: a text file, texts, or one of `corpora`; default: text that the model samples itself.
        tokens: how many are measured; default 20 x d_ff. Every token of a document counts, as in the released code.
        seed: of sampled text.
        tokens_per_document: longer documents are cut, so that many are seen.
        batch_tokens: tokens in one forward pass, which bounds memory.
        cache_dir: where results are kept; default: $ENGRAM_CACHE, or ~/.cache/engram.
        save_every: seconds between two states that an interrupted run goes on from.
        progress: called with (tokens done, tokens in all).
    Raises:
        UnsupportedModelError: a block without a single MLP output matrix; EngramError: a corpus without text.
    """
    names = {layer: lm.parts.mlp_out_name(layer) for layer in sorted(set(layers))}
    width = {layer: _d_ff(lm, layer) for layer in names}
    tokens = tokens or TOKENS_PER_KEY * max(width.values())
    chosen = as_corpus(corpus, seed)
    source = {"corpus": chosen.digest(), "tokens": tokens, "tokens_per_document": tokens_per_document}
    folder = cache_folder("second_moments", cache_dir)
    prints = {name: fingerprint(tensor) for name, tensor in lm.model.state_dict().items()}
    paths = {layer: folder / f"{_name(lm, layer, prints, source)}.safetensors" for layer in names}
    found = {layer: SecondMoment.load(path) for layer, path in paths.items() if path.exists()}
    missing = [layer for layer in names if layer not in found]
    if missing:
        run = _Run(lm, {layer: names[layer] for layer in missing}, tokens, tokens_per_document, batch_tokens)
        partial = folder / f"{sha256_of(*(paths[layer].stem for layer in missing))}.partial"
        run.go(chosen, partial, save_every, progress or (lambda done, total: None))
        for layer in missing:
            found[layer] = SecondMoment(run.sums[layer] / run.count, run.count, source)
            found[layer].save(paths[layer])
        partial.unlink(missing_ok=True)
    return {layer: found[layer] for layer in layers}


class _Run:
    """Sums of k k^T on the way to `tokens` tokens."""

    def __init__(
        self, lm: LanguageModel, names: dict[int, str], tokens: int, tokens_per_document: int, batch_tokens: int
    ) -> None:
        self.lm, self.names, self.tokens, self.batch_tokens = lm, names, tokens, batch_tokens
        self.tokens_per_document = min(tokens_per_document, lm.max_tokens)
        self.sums = {layer: torch.zeros(_d_ff(lm, layer), _d_ff(lm, layer), dtype=torch.float64) for layer in names}
        self.count, self.documents = 0, 0

    def go(self, corpus: Corpus, partial: Path, save_every: float, progress: Callable[[int, int], None]) -> None:
        """Measure what is left, from the state in `partial` where there is one."""
        if partial.exists():
            self._take_up(partial)
        documents = corpus.documents(self.lm, self.documents)
        saved = time.monotonic()
        progress(self.count, self.tokens)
        while self.count < self.tokens and (batch := list(islice(documents, _DOCUMENTS))):
            rows, left = [], self.tokens - self.count
            for ids in map(self._encode, batch):
                rows.append(ids[:left])
                left -= len(rows[-1])
            for packed in _packed([row for row in rows if row], self.batch_tokens):
                self._add(packed)
            self.count, self.documents = self.tokens - left, self.documents + len(batch)
            if time.monotonic() - saved > save_every:
                self._put_down(partial)
                saved = time.monotonic()
            progress(self.count, self.tokens)
        if not self.count:
            raise EngramError("the corpus has no text to measure second moments on")
        if self.count < self.tokens:
            log.warning("the corpus ended after %d of %d tokens", self.count, self.tokens)

    def _encode(self, text: str) -> list[int]:
        return (
            list(self.lm.tokenizer(text, truncation=True, max_length=self.tokens_per_document)["input_ids"]) if text else []
        )

    @torch.no_grad()
    def _add(self, rows: list[list[int]]) -> None:
        ids_bt = pad_right(rows)
        real_bt = torch.arange(ids_bt.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        with record(self.lm.model, inputs=list(self.names.values()), stop=True) as seen:
            body(self.lm)(ids_bt.to(self.lm.device), use_cache=False)
        for layer, name in self.names.items():
            keys_nf = seen[name].view(*ids_bt.shape, -1)[real_bt.to(seen[name].device)]
            keys_nf = keys_nf.to(torch.promote_types(keys_nf.dtype, torch.float32))  # half-precision sums overflow
            self.sums[layer] += (keys_nf.T @ keys_nf).cpu()

    def _put_down(self, partial: Path) -> None:
        state = {str(layer): total for layer, total in self.sums.items()}
        _write(partial, state, {"engram.partial": json.dumps({"count": self.count, "documents": self.documents})})

    def _take_up(self, partial: Path) -> None:
        try:
            state, about = _read(partial, "engram.partial")
        except EditFileError as error:
            log.warning("%s; measuring from the start", error)
            return
        self.sums = {layer: state[str(layer)] for layer in self.names}
        self.count, self.documents = about["count"], about["documents"]
        log.info("going on after %d tokens", self.count)


def _packed(rows: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Rows of similar length in batches of at most `batch_tokens` tokens with their padding, and of at least one row."""
    batch: list[list[int]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _d_ff(lm: LanguageModel, layer: int) -> int:
    return int(as_linear(lm.parts.mlp_out(layer)).shape[1])


def _name(lm: LanguageModel, layer: int, prints: Mapping[str, str], source: Mapping[str, Any]) -> str:
    """Names everything that C of a layer depends on: weights up to the matrix itself, tokenizer, text, how much of it."""
    above = tuple(f"{lm.parts.block_name(above)}." for above in range(layer + 1, lm.n_layers))
    reached = {
        name: each for name, each in prints.items() if not name.startswith((*above, f"{lm.parts.mlp_out_name(layer)}."))
    }
    return identity_of(lm, reached, json.dumps([source, layer], sort_keys=True))


def _write(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    part = Path(f"{path}.{os.getpid()}.part")
    save_file(tensors, part, header)
    part.replace(path)


def _read(path: str | Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})[key])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise EditFileError(f"{str(path)!r} does not hold a second moment ({error}); delete it to measure again") from error
