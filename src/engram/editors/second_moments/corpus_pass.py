"""One pass over text that sums k k^T for several blocks at once, k being the input of a block's MLP
output matrix.

The forward pass stops at the deepest of these blocks. k k^T costs 2 d_ff^2 operations for each
token and block (d_ff = 3072: 19 million), more than the block itself (about 14 million), and is
symmetric: so only half of it is computed (see `add_outer`). Products are float32 over one batch
(float64 for a float64 model), sums are float64, so that rounding does not grow with the number of
tokens.

A pass can resume wherever in the corpus an earlier one stopped. Knows documents, batches and sums.
Refuses to know files: see measure.py.
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
from engram.progress import Progress, Work, no_progress
from engram.runs.workers import ByName, ModelJob, Workers

log = logging.getLogger(__name__)

NAME = "second moments"  # of progress
_BATCHES_AT_ONCE = 4  # read together and sorted by length, so that few tokens are padding
_CHARACTERS_PER_TOKEN = 4
_STRIPS = 16  # of C; 17/32 of the whole product is computed
_NARROWEST = 128  # rows of a strip; narrower products are slower than what they save


@dataclass
class Sums:
    """Sums of k k^T over the first tokens of a corpus.

    Attributes:
        totals: block -> [f, f] float64, of which only the strips of `add_outer` are filled.
        count: number of tokens summed.
        documents: number of whole documents among them.
        offset: number of tokens of the next document among them.
    """

    totals: dict[int, Tensor]
    count: int = 0
    documents: int = 0
    offset: int = 0

    @classmethod
    def zero(cls, lm: LanguageModel, layers: Sequence[int]) -> Sums:
        """Return the sums over no token."""
        return cls(
            {layer: _zeros(lm.parts.mlp_width(layer), lm.parts.mlp_out(layer)) for layer in layers}
        )

    def mean(self, layer: int) -> Tensor:
        """Return C of a block, symmetric to the last bit, on the CPU; this consumes its total.

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
    """A pass over a corpus, from where `sums` end up to `tokens` tokens.

    Args:
        sums: sums over the corpus's first tokens; the pass adds to them.
        tokens: number of tokens in all.
        tokens_per_document: longer documents are cut.
        tokens_per_batch: tokens in one forward pass.
        work: counts the documents that were read ("text") and the tokens summed ("passes").
    """

    lm: LanguageModel
    sums: Sums
    tokens: int
    tokens_per_document: int = 1024
    tokens_per_batch: int = 4096
    work: Work = field(default_factory=lambda: Work(NAME))
    _modules: dict[int, nn.Module] = field(init=False)
    _tokens_read: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._modules = {layer: self.lm.parts.mlp_out(layer) for layer in sorted(self.sums.totals)}

    def run(
        self,
        corpus: Corpus,
        progress: Progress = no_progress,
        pause: Callable[[Sums], None] = lambda sums: None,
    ) -> Sums:
        """Sum over the tokens that are left, in this process.

        Args:
            progress: called with (what is done, done, total) after each batch, in tokens; done are
                as many as the share of the time that is over, since those of a batch are sampled
                before the first of them is summed.
            pause: called with the sums every few batches, when they are sums over the corpus's
                first tokens. (In between they are not: batches are sorted by length.)
        Raises:
            EngramError: a corpus without text.
        """
        first, work = self.sums.count, self.work
        progress(NAME, first, self.tokens)
        for group in self.read(corpus):
            for batch in group:
                self.add(batch)
                work.did("passes", _counted(batch))
                progress(NAME, work.units(first, self.tokens), self.tokens)
            pause(self.sums)
        work.finish("text")
        work.finish("passes")
        if not self.sums.count:
            raise EngramError("the corpus has no text to measure second moments on")
        return self.sums

    def run_on(self, workers: Workers, corpus: Corpus, progress: Progress) -> Sums:
        """Sum over the tokens that are left, on workers.

        Each unit of work is a few batches. Partial sums are added in the order of the units, so the
        number of workers changes no bit; one that comes early waits until its turn.

        Raises:
            EngramError: a corpus without text.
        """
        # units are read here, in order: a corpus is one sequence of documents
        units, counts = [], []
        for group in self.read(corpus):
            units.append(group)
            counts.append(sum(map(_counted, group)))
            self.sums.count += counts[-1]
        if not self.sums.count:
            raise EngramError("the corpus has no text to measure second moments on")
        job = MomentJob(ByName.of(self.lm), tuple(sorted(self.sums.totals)))
        # float64 sums depend on their order in the last bits, so early units wait
        early: dict[int, dict[int, Tensor]] = {}
        added = 0
        for number, totals in workers.run(job, units):
            early[number] = totals
            self.work.did("passes", counts[number])
            progress(NAME, self.work.units(0, self.tokens), self.tokens)
            while added in early:
                for layer, total_ff in early.pop(added).items():
                    self.sums.totals[layer] += total_ff.to(self.sums.totals[layer].device)
                added += 1
        return self.sums

    def read(self, corpus: Corpus) -> Iterator[list[Batch]]:
        """Yield batches of tokens that are not summed yet, a few at a time.

        The caller adds each group before it takes the next, since `count` moves with it.
        """
        documents = corpus.documents(self.lm, self.sums.documents)
        while self.sums.count < self.tokens:
            rows = self._rows(
                _some(documents, _BATCHES_AT_ONCE * _CHARACTERS_PER_TOKEN * self.tokens_per_batch)
            )
            if rows is None:
                return
            yield list(_packed(rows, self.tokens_per_batch))

    def _rows(self, texts: Iterator[str]) -> list[Row] | None:
        """Return texts as rows, or None where there are none, and move `documents` and `offset` on.

        No more texts are taken than count: the next one may take minutes to sample.

        With 10 tokens left and offset 3, two texts of 8 tokens give the rows (8 tokens, from 3) and
        (5 tokens, from 0): 5 + 5 tokens count. Tokens before the start are run again, since later
        ones attend to them.
        """
        rows: list[Row] | None = None
        sums, left = self.sums, self.tokens - self.sums.count
        for text in texts:
            rows, ids = rows or [], self._encode(text)
            start, end = sums.offset, min(len(ids), sums.offset + left)
            if end > start:
                rows.append((ids[:end], start))
            left -= end - start
            self.work.did("text")
            self._tokens_read += end - start
            if self._tokens_read:  # as many tokens in each document that is left
                documents = self.work.done("text")
                self.work.amount("text", documents * (1 + left / self._tokens_read))
            if end < len(ids):  # enough: this text counts in part
                sums.offset = end
                break
            sums.documents, sums.offset = sums.documents + 1, 0
            if not left:
                break
        return rows

    def _encode(self, text: str) -> list[int]:
        """Return token ids as the tokenizer gives them by default, as in the released code; an
        empty text has none, not even a special one.
        """
        if not text:
            return []
        limit = min(self.tokens_per_document, self.lm.max_tokens)
        return list(self.lm.tokenizer(text, truncation=True, max_length=limit)["input_ids"])

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Run the model over a batch and add the outer products of the blocks' keys."""
        ids_bt = pad_right([ids for ids, _ in batch])
        at_t = torch.arange(ids_bt.shape[1])
        starts_b1 = torch.tensor([start for _, start in batch])[:, None]
        ends_b1 = torch.tensor([len(ids) for ids, _ in batch])[:, None]
        counted_bt = (at_t >= starts_b1) & (at_t < ends_b1)
        # a mask is needed only where rows are padded or begin before what counts
        counted_n = None if counted_bt.all() else counted_bt.flatten().nonzero()[:, 0]
        deepest = max(self._modules)

        def take(layer: int, keys: Tensor) -> Tensor:
            keys_nf = keys.reshape(-1, keys.shape[-1])
            if counted_n is not None:
                keys_nf = keys_nf[counted_n.to(keys.device)]
            add_outer(self.sums.totals[layer], keys_nf)
            if layer == deepest:  # blocks above, and the head, are not needed
                raise StopForward
            return keys

        takers = {module: partial(take, layer) for layer, module in self._modules.items()}
        with suppress(StopForward), substitute({}, takers):
            base_model(self.lm)(ids_bt.to(self.lm.device), use_cache=False)
        self.sums.count += _counted(batch)


@dataclass(frozen=True)
class MomentJob(ModelJob):
    """Sums over a few batches, on a worker; see `workers.Job`."""

    layers: tuple[int, ...]

    def do(self, state: LanguageModel, unit: list[Batch]) -> dict[int, Tensor]:
        run = MomentPass(state, Sums.zero(state, self.layers), 0)
        for batch in unit:
            run.add(batch)
        # the caller adds units in order; workers send nothing but sums, so units can be repeated
        return {layer: total_ff.cpu() for layer, total_ff in run.sums.totals.items()}


Row = tuple[list[int], int]  # token ids, and the first of them that counts
Batch = list[Row]


def _counted(batch: Batch) -> int:
    """Return the number of tokens of a batch that count."""
    return sum(len(ids) - start for ids, start in batch)


def add_outer(total_ff: Tensor, keys_nf: Tensor) -> None:
    """Add the upper half of K^T K to `total_ff` in place, as strips that begin at the diagonal.

    K^T K is symmetric, so half of its entries would do. A triangle is no matrix product, but strips
    are. With f = 8 and strips of 2 rows, x is computed and . is left as it is:

        x x x x x x x x
        x x x x x x x x      f = 8 in 4 strips:   (8 + 6 + 4 + 2) / 32 = 20/32 of the product
        . . x x x x x x      f in 16 strips:      17/32
        . . x x x x x x      f in 32 strips:      33/64, but narrow products run slower
        . . . . x x x x      than what they save
        . . . . x x x x
        . . . . . . x x
        . . . . . . x x

    Args:
        keys_nf: (n, f) floating point. Half precision is widened first, since its sums would
            overflow. Float32 products over a batch of some thousand tokens are off by about 1e-7 of
            sqrt(C_ii C_jj), and adding them up in float64 keeps the error there.
    """
    keys_nf = keys_nf.to(torch.promote_types(keys_nf.dtype, torch.float32))
    for start, end in _strips(len(total_ff)):
        strip_sf = keys_nf[:, start:end].T @ keys_nf[:, start:]
        total_ff[start:end, start:] += strip_sf.to(total_ff.device)


def mirror_(total_ff: Tensor) -> Tensor:
    """Fill in, in place, what `add_outer` leaves out; return the same matrix."""
    for start, end in _strips(len(total_ff)):
        corner = total_ff[start:end, start:end]
        corner.copy_((corner + corner.T) / 2)  # its two halves were rounded differently
        total_ff[end:, start:end] = total_ff[start:end, end:].T
    return total_ff


def _strips(size: int) -> Iterator[tuple[int, int]]:
    width = max(_NARROWEST, -(-size // _STRIPS))
    for start in range(0, size, width):
        yield start, min(start + width, size)


def _zeros(size: int, mlp_out: nn.Module) -> Tensor:
    """Return [f, f] zeros, float64: on the layer's device while that takes no more than half of its
    free memory, otherwise on the CPU.
    """
    device = next(mlp_out.parameters()).device
    fits = device.type == "cuda" and 16 * size**2 < torch.cuda.mem_get_info(device)[0]
    return torch.zeros(size, size, dtype=torch.float64, device=device if fits else "cpu")


def _some(documents: Iterator[str], characters: int) -> Iterator[str]:
    """Yield the next documents, until they have that many characters."""
    while characters > 0 and (text := next(documents, None)) is not None:
        yield text
        characters -= len(text) + 1  # + 1, so that empty documents without end do end


def _packed(rows: list[Row], tokens_per_batch: int) -> Iterator[Batch]:
    """Yield rows of similar length in batches of at most `tokens_per_batch` tokens with their
    padding, and of at least one row.

    A batch of a quarter of the budget is large enough for fast products, and then ends where rows
    get a tenth shorter. When batches were always filled, a fifth of all computed tokens was
    padding.
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
