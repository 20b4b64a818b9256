"""One pass over text that sums k k^T for several blocks at once, k being the input of a block's MLP
output matrix.

The forward pass stops at the deepest block asked for. k k^T costs 2 d_ff^2 operations a token and
block, more than the block
itself, and is symmetric: half of it is computed. Products are float32 over one batch (float64 for a
    float64 model), sums are
float64, so that rounding does not grow with the number of tokens. A pass can go on from wherever in
the corpus an earlier one stopped. Knows documents, batches and sums. Refuses to know files: see
second_moment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from engram.batching import batches
from engram.editors.second_moments.corpora import Corpus
from engram.engine.recording import base_model
from engram.errors import EngramError, NonFiniteError
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import StopForward, substitute
from engram.progress import Progress, no_progress
from engram.runs.workers import ByName, ModelJob, Workers

log = logging.getLogger(__name__)

_BATCHES_AT_ONCE = 4  # read together and sorted by length, so that few tokens are padding
_CHARACTERS_PER_TOKEN = 4
_STRIPS = 16  # of C; 17/32 of the whole product is computed
_NARROWEST = 128  # rows of a strip; narrower products are slower than what they save


@dataclass
class Sums:
    """k k^T summed over the first tokens of a corpus.

    Attributes:
        totals: block -> [f, f] float64, of which only `add_outer`'s strips count; `mean` makes C of
            it.
        count: tokens summed; documents: how many of the corpus are in them whole; offset: tokens of
            the next one that are.
    """

    totals: dict[int, Tensor]
    count: int = 0
    documents: int = 0
    offset: int = 0

    @classmethod
    def nothing(cls, lm: LanguageModel, layers: Sequence[int]) -> Sums:
        return cls(
            {layer: _zeros(lm.parts.mlp_width(layer), lm.parts.mlp_out(layer)) for layer in layers}
        )

    def mean(self, layer: int) -> Tensor:
        """C of a block, symmetric to the last bit, on the CPU; uses up the block's total.

        Raises:
            NonFiniteError: the model's keys were not finite.
        """
        mean_ff = self.totals.pop(layer).cpu().div_(self.count)
        if not mirror_(mean_ff).isfinite().all():
            raise NonFiniteError(
                f"keys of layer {layer} are not finite; nothing was kept. Try dtype=torch.float32"
            )
        return mean_ff


@dataclass
class MomentPass:
    """Reads a corpus on to `tokens` tokens.

    Args:
        sums: where to begin; they are added to.
        tokens_per_document: longer documents are cut.
        tokens_per_batch: tokens in one forward pass.
    """

    lm: LanguageModel
    sums: Sums
    tokens: int
    tokens_per_document: int = 1024
    tokens_per_batch: int = 4096
    _modules: dict[int, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self._modules = {layer: self.lm.parts.mlp_out(layer) for layer in sorted(self.sums.totals)}

    def go(
        self,
        corpus: Corpus,
        progress: Progress = no_progress,
        pause: Callable[[Sums], None] = lambda sums: None,
    ) -> Sums:
        """Measure what is left.

        Args:
            progress: called with (what is done, done, total) after each batch.
            pause: called with the sums wherever they are those of a beginning of the corpus, every
                few batches.
        Raises:
            EngramError: a corpus without text.
        """
        progress("second moments", self.sums.count, self.tokens)
        for batches in self.read(corpus):
            for batch in batches:
                self.add(batch)
                progress("second moments", self.sums.count, self.tokens)
            pause(self.sums)
        if not self.sums.count:
            raise EngramError("the corpus has no text to measure second moments on")
        if self.sums.count < self.tokens:
            log.warning("the corpus ended after %d of %d tokens", self.sums.count, self.tokens)
        return self.sums

    def spread(self, corpus: Corpus, workers: Workers, progress: Progress) -> Sums:
        """The same by workers: partial sums of a few batches each, added up in their order, so that
        their number does not matter.

        Raises:
            EngramError: a corpus without text.
        """
        units, counts = [], []
        for batches in self.read(corpus):
            units.append(batches)
            counts.append(sum(len(ids) - start for batch in batches for ids, start in batch))
            self.sums.count += counts[-1]
        if not self.sums.count:
            raise EngramError("the corpus has no text to measure second moments on")
        job = MomentJob(ByName.of(self.lm), tuple(sorted(self.sums.totals)))
        early: dict[int, dict[int, Tensor]] = {}
        done, added = 0, 0
        for number, totals in workers.run(job, units):
            early[number] = totals
            done += counts[number]
            progress("second moments", done, self.tokens)
            while added in early:
                for layer, total_ff in early.pop(added).items():
                    self.sums.totals[layer] += total_ff.to(self.sums.totals[layer].device)
                added += 1
        return self.sums

    def read(self, corpus: Corpus) -> Iterator[list[Batch]]:
        """Batches of what is still to be counted, a few at a time, each to be added before the next
        ones are read.
        """
        documents = corpus.documents(self.lm, self.sums.documents)
        while self.sums.count < self.tokens:
            texts = list(
                _some(documents, _BATCHES_AT_ONCE * _CHARACTERS_PER_TOKEN * self.tokens_per_batch)
            )
            if not texts:
                return
            yield list(_packed(self._rows(texts), self.tokens_per_batch))

    def _rows(self, texts: Sequence[str]) -> list[Row]:
        rows: list[Row] = []
        sums, left = self.sums, self.tokens - self.sums.count
        for ids in self._encode(texts):
            start, end = sums.offset, min(len(ids), sums.offset + left)
            if end > start:
                rows.append((ids[:end], start))
            left -= end - start
            if end < len(ids):  # enough: this one is counted in part
                sums.offset = end
                break
            sums.documents, sums.offset = sums.documents + 1, 0
        return rows

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Every token as the tokenizer makes them by default, as in the released code; an empty
        text has none.
        """
        limit = min(self.tokens_per_document, self.lm.max_tokens)
        full = [text for text in texts if text]
        encoded = iter(
            self.lm.tokenizer(full, truncation=True, max_length=limit)["input_ids"] if full else ()
        )
        return [list(next(encoded)) if text else [] for text in texts]

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run the model over a batch and add what the blocks' keys give."""
        ids_bt = pad_right([ids for ids, _ in batch])
        at_t = torch.arange(ids_bt.shape[1])
        starts_b1, ends_b1 = (
            torch.tensor(each)[:, None]
            for each in zip(*((s, len(ids)) for ids, s in batch), strict=True)
        )
        counted_bt = (at_t >= starts_b1) & (at_t < ends_b1)
        counted_n = None if counted_bt.all() else counted_bt.flatten().nonzero()[:, 0]
        deepest = max(self._modules)

        def take(layer: int, keys: Tensor) -> Tensor:
            keys_nf = keys.reshape(-1, keys.shape[-1])
            if counted_n is not None:
                keys_nf = keys_nf[counted_n.to(keys.device)]
            add_outer(self.sums.totals[layer], keys_nf)
            if layer == deepest:
                raise StopForward
            return keys

        takers = {module: partial(take, layer) for layer, module in self._modules.items()}
        with suppress(StopForward), substitute({}, takers):
            base_model(self.lm)(ids_bt.to(self.lm.device), use_cache=False)
        self.sums.count += sum(len(ids) - start for ids, start in batch)


@dataclass(frozen=True)
class MomentJob(ModelJob):
    """What workers do: sums over a few batches, see `distribute.Job`."""

    layers: tuple[int, ...]

    def do(self, state: LanguageModel, unit: list[Batch]) -> dict[int, Tensor]:
        run = MomentPass(state, Sums.nothing(state, self.layers), 0)
        for batch in unit:
            run.add(batch)
        return {layer: total_ff.cpu() for layer, total_ff in run.sums.totals.items()}


Row = tuple[list[int], int]  # token ids, and the first of them that counts
Batch = list[Row]


def add_outer(total_ff: Tensor, keys_nf: Tensor) -> None:
    """Add K^T K to `total_ff` in place, in strips of rows that each begin at the diagonal; what is
    left of them stays as it is.

    Args:
        keys_nf: (n, f) floating point. Half precision is widened first, its sums would overflow;
            float32 products over one batch of some thousand tokens are off by about 1e-7 of
            sqrt(C_ii C_jj), and adding them up in float64 keeps it there.
    """
    keys_nf = keys_nf.to(torch.promote_types(keys_nf.dtype, torch.float32))
    for start, end in _strips(len(total_ff)):
        strip_sf = keys_nf[:, start:end].T @ keys_nf[:, start:]
        total_ff[start:end, start:] += strip_sf.to(total_ff.device)


def mirror_(total_ff: Tensor) -> Tensor:
    """Fill in, in place, what `add_outer` leaves out."""
    for start, end in _strips(len(total_ff)):
        corner = total_ff[start:end, start:end]
        corner.copy_((corner + corner.T) / 2)  # its two halves were rounded apart
        total_ff[end:, start:end] = total_ff[start:end, end:].T
    return total_ff


def _strips(size: int) -> Iterator[tuple[int, int]]:
    width = max(_NARROWEST, -(-size // _STRIPS))
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _zeros(size: int, mlp_out: nn.Module) -> Tensor:
    """[f, f] float64: beside the layer while that takes no more than half of what is free there,
    otherwise on the CPU.
    """
    device = next(mlp_out.parameters()).device
    fits = device.type == "cuda" and 16 * size**2 < torch.cuda.mem_get_info(device)[0]
    return torch.zeros(size, size, dtype=torch.float64, device=device if fits else "cpu")


def _some(documents: Iterator[str], characters: int) -> Iterator[str]:
    """The next documents, until there are that many characters."""
    while characters > 0 and (text := next(documents, None)) is not None:
        yield text
        characters -= len(text) + 1  # empty ones end too


def _packed(rows: list[Row], tokens_per_batch: int) -> Iterator[Batch]:
    """Rows of similar length in batches of at most `tokens_per_batch` tokens with their padding,
    and of at least one row.

    A batch that has enough for large products ends where rows get a tenth shorter: a fifth of all
    computed tokens was padding.
    """

    def fits(batch: Batch, row: Row) -> bool:
        longest = len(batch[0][0])
        return len(row[0]) >= 0.9 * longest or 4 * len(batch) * longest < tokens_per_batch

    return batches(
        rows,
        fits,
        key=lambda row: -len(row[0]),
        length=lambda row: len(row[0]),
        tokens=tokens_per_batch,
    )
