"""Many differently edited models in one forward: every row carries the edit of its own record.

Everything below the lowest edited block is equal before and after an edit, so it is computed once:
the unedited model runs over a batch of rows, and the edited ones start from what entered that
block. Two records, edited in block 1 of 3 (E0, E1: their changes):

    row of record   0    0    1
    block 0         run once, no edits
    block 1, 2      run twice: no edits | E0   E0   E1
    head            logits before       | logits after

Knows rows, blocks and changes. Refuses to know how edits are made, and what logits say (see
probe_rows). The same numbers as one_by_one.py, which applies one edit after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engram.benchmark.data.records import Record, References
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome
from engram.benchmark.phase import Phase, logits_of_rows
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.engine.recording import record_run
from engram.engine.replayable import use_replay
from engram.engine.suffix import Suffix
from engram.evaluate.probe_rows import AnswerScores, ProbeRow, ProbeRows
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import RowContext, no_edits, per_row_edits
from engram.modules.weights import linear_shape

# Up to this rank every row has its own factors, r (o + i) numbers and as many multiplications a
# token. Larger changes are multiplied out per edit: at full rank the factors are twice as long as
# the weight.
_RANK = 32
# Of a change that is multiplied out, in float32: 32 records then need 2 GB at most. An edit with a
# larger change is applied one by one, which needs room for one.
_BYTES = 1 << 26


def can_batch(lm: LanguageModel, edit: Edit | PromptEdit) -> bool:
    """Tell whether rows can carry the edit.

    They can carry changes of linear maps inside the blocks of a causal model, of low rank or small.
    """
    # Rows are padded on the right without a mask. Only a causal model does not see the pads. An
    # edit of words changes the rows themselves, so that nothing is computed once for both.
    if not edit.changes_weights or lm.kind != "causal":
        return False
    small = all(
        _factored(delta) or 4 * delta.shape[0] * delta.shape[1] <= _BYTES
        for delta in edit.deltas.values()
    )
    return small and all(_block_of(lm, name) is not None for name in edit.deltas)


def _factored(delta: Delta) -> bool:
    return not delta.is_dense and delta.rank <= _RANK


def _block_of(lm: LanguageModel, weight: str) -> int | None:
    """Return the block that a weight belongs to."""
    return next(
        (n for n in range(lm.n_layers) if weight.startswith(f"{lm.parts.block_name(n)}.")), None
    )


@dataclass(frozen=True)
class RowEdits:
    """Edits as changes that rows carry.

    Attributes:
        first: lowest block that one of them changes.
        around: given the number of each row's edit, applies that edit's changes to the row.
    """

    first: int
    around: RowContext

    @classmethod
    def of(cls, lm: LanguageModel, edits: Sequence[Edit]) -> RowEdits:
        names = sorted({name for edit in edits for name in edit.deltas})
        changes: dict[nn.Module, tuple[Tensor, Tensor] | Tensor] = {}
        for name in names:
            module = lm.model.get_submodule(name.removesuffix(".weight"))
            deltas = [edit.deltas.get(name) for edit in edits]
            # The hook sits on a module, not on a weight: a matrix that is stored [in, out] (GPT-2)
            # and one that is stored [out, in] get their change [out, in] alike.
            changes[module] = _stacked(deltas, linear_shape(module), lm.device)
        blocks = [block for name in names if (block := _block_of(lm, name)) is not None]
        return cls(min(blocks), per_row_edits(changes))


def _stacked(
    deltas: Sequence[Delta | None], shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor] | Tensor:
    """Return the changes of one weight by all edits, as `per_row_edits` takes them.

    An edit that leaves the weight alone has zeros, smaller ranks are filled up with zeros.
    """
    given = [delta for delta in deltas if delta is not None]
    (out, into), dtype = shape, given[0].left.dtype
    if not all(map(_factored, given)):
        zero_oi = torch.zeros(out, into, dtype=dtype)
        return torch.stack(
            [zero_oi if delta is None else delta.dense(dtype) for delta in deltas]
        ).to(device)
    # Zeros in place of missing columns change no sum: a rank of 1 beside one of 5 costs 5.
    rank = max(delta.rank for delta in given)
    left_nor = torch.zeros(len(deltas), out, rank, dtype=dtype)
    right_nri = torch.zeros(len(deltas), rank, into, dtype=dtype)
    for n, delta in enumerate(deltas):
        if delta is not None:
            left_or, right_ri = delta.low_rank()
            left_nor[n, :, : delta.rank], right_nri[n, : delta.rank] = left_or, right_ri
    return left_nor.to(device), right_nri.to(device)


@torch.no_grad()
def measure_batched(
    lm: LanguageModel,
    records: Sequence[Record],
    edits: Sequence[Edit],
    config: MeasureConfig,
    *,
    drifts: Sequence[bool],
    references: References | None = None,
    unedited_texts: bool = True,
) -> list[tuple[Outcome, Outcome]]:
    """Measure each record before its edit and after it; see `measure_one`.

    Args:
        drifts: for each record whether held-out text is read.
        unedited_texts: whether the unedited model generates texts, too.
    """
    row_edits, probes = RowEdits.of(lm, edits), ProbeRows(lm, [record.probes for record in records])
    unedited = config if unedited_texts else replace(config, texts=False)
    before = Phase(lm, records, unedited, references)
    after = Phase(lm, records, config, references, row_edits.around)
    scores, scores_after = AnswerScores(probes), AnswerScores(probes)
    logits_of = _replayed if use_replay(lm, "auto") else _whole
    for batch in probes.batches():
        # A generator, so that the first logits [reads, v] are scored and dropped before the second
        # ones are computed: with 50,000 words a batch of them takes 128 MB.
        both = logits_of(lm, batch, row_edits)
        # Log-probabilities for the KL are kept from one phase to the other, a batch at a time; of a
        # whole unit they would be [records * 10, v].
        compared = scores.add(batch, next(both))
        scores_after.add(batch, next(both), compared)
    base = before.held_out if any(drifts) else None
    outcomes = before.outcomes(scores, drifts), after.outcomes(scores_after, drifts, base)
    return list(zip(*outcomes, strict=True))


def _replayed(lm: LanguageModel, batch: Sequence[ProbeRow], edits: RowEdits) -> Iterator[Tensor]:
    """Yield the logits [all reads, v] without the edits, then with them."""
    ids_bt, reads = pad_right([row.cloze.ids for row in batch]), [row.cloze.read for row in batch]
    recording = record_run(lm, ids_bt)
    row_p = torch.tensor([b for b, read in enumerate(reads) for _ in read], device=lm.device)
    read_p = torch.tensor([at for read in reads for at in read], device=lm.device)
    # hidden[-1] is [b, t, d] after the last block; the head runs at the positions that are read.
    yield _head(lm, recording.hidden[-1][row_p, read_p])
    # From position 0: an edit acts at every position, so no recorded keys and values may be used;
    # what is saved are the blocks below the edited one.
    suffix, last = Suffix(recording, 0, ids_bt.shape[1]), lm.n_layers - 1
    hidden_btd = recording.hidden[edits.first]
    # Shorter rows of reads repeat their last one, and the cut below drops it.
    columns_br = pad_right(reads)
    with edits.around([row.group for row in batch]):
        for layer in range(edits.first, last):
            hidden_btd = suffix.block(layer, hidden_btd)
        # of the last block only the positions that are read
        read_brd = suffix.at_columns(last, hidden_btd, columns_br)
    yield _head(lm, torch.cat([read_brd[b, : len(read)] for b, read in enumerate(reads)]))


def _whole(lm: LanguageModel, batch: Sequence[ProbeRow], edits: RowEdits) -> Iterator[Tensor]:
    """Yield the same by two whole forward passes, for models that cannot be replayed."""
    rows, reads = [row.cloze.ids for row in batch], [row.cloze.read for row in batch]
    for around in (no_edits, edits.around):
        with around([row.group for row in batch]):
            logits = logits_of_rows(lm, rows, reads)
        yield torch.cat(logits)


def _head(lm: LanguageModel, hidden_pd: Tensor) -> Tensor:
    return lm.parts.head(hidden_pd[None])[0]
