"""Many differently edited models in one forward: every row of a batch carries the low-rank change
of its own record.

What stands below the lowest edited block is the same before and after an edit, so it is computed
    once: the unedited model runs
over a batch of rows, and the edited ones start from what entered that block. Knows rows, blocks and
changes. Refuses to know how edits are made, and what logits say (see questions). The same numbers
as singly.py, which lays one edit after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from engram.benchmark.data.records import Record, References
from engram.benchmark.essence import essence_ids, with_essence
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome, Reading
from engram.benchmark.probe_rows import ProbeRows
from engram.benchmark.written_texts import greedy, sampled, with_texts
from engram.benchmark.zsre_as_released import steps, with_text_mode
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.engine.recording import record_run
from engram.engine.replayable import use_replay
from engram.engine.suffix import Suffix
from engram.evaluate.held_out import HeldOut, pieces
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import RowContext, no_edits, per_row_edits
from engram.modules.weights import linear_shape

_ROWS = 64  # of one forward, where each is read at its end only
_Run = Callable[
    [LanguageModel, Tensor, Sequence[Sequence[int]], Sequence[int], "RowEdits"], Iterator[Tensor]
]
_RANK = (
    32  # up to which every row has its own factors; a larger change is multiplied out, once an edit
)
_BYTES = 1 << 26  # of a change that is multiplied out; larger ones are laid on the weights


def can_batch(lm: LanguageModel, edit: Edit | PromptEdit) -> bool:
    """Whether rows can carry the edit: changes of linear maps inside the blocks of a causal model,
    of low rank or small.
    """
    if not edit.changes_weights or lm.kind != "causal":
        return False
    small = all(
        _factored(each) or 4 * each.shape[0] * each.shape[1] <= _BYTES
        for each in edit.deltas.values()
    )
    return small and all(_block_of(lm, name) is not None for name in edit.deltas)


def _factored(delta: Delta) -> bool:
    return not delta.is_dense and delta.rank <= _RANK


def _block_of(lm: LanguageModel, weight: str) -> int | None:
    """The block that a weight belongs to."""
    return next(
        (n for n in range(lm.n_layers) if weight.startswith(f"{lm.parts.block_name(n)}.")), None
    )


@dataclass(frozen=True)
class RowEdits:
    """Edits as changes that rows carry.

    Attributes:
        first: lowest block that one of them changes.
        around: given the number of each row's edit, lays the changes.
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
            changes[module] = _stacked(deltas, linear_shape(module), lm.device)
        blocks = [block for name in names if (block := _block_of(lm, name)) is not None]
        return cls(min(blocks), per_row_edits(changes))


def _stacked(
    deltas: Sequence[Delta | None], shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor] | Tensor:
    """The changes of one weight by all edits, zero where an edit has none, as `per_row_edits` takes
    them.
    """
    there = [delta for delta in deltas if delta is not None]
    (out, into), dtype = shape, there[0].left.dtype
    if not all(map(_factored, there)):
        zero_oi = torch.zeros(out, into, dtype=dtype)
        return torch.stack(
            [zero_oi if delta is None else delta.dense(dtype) for delta in deltas]
        ).to(device)
    rank = max(delta.rank for delta in there)
    left_nor, right_nri = (
        torch.zeros(len(deltas), out, rank, dtype=dtype),
        torch.zeros(len(deltas), rank, into, dtype=dtype),
    )
    for n, delta in enumerate(deltas):
        if delta is not None:
            left_or, right_ri = delta.low_rank()
            left_nor[n, :, : delta.rank], right_nri[n, : delta.rank] = left_or, right_ri
    return left_nor.to(device), right_nri.to(device)


@torch.no_grad()
def measure_together(
    lm: LanguageModel,
    records: Sequence[Record],
    edits: Sequence[Edit],
    config: MeasureConfig,
    *,
    drifts: Sequence[bool],
    references: References | None = None,
    unedited_texts: bool = True,
) -> list[tuple[Outcome, Outcome]]:
    """Each record before its edit and after it; see `measure_one`.

    Args:
        drifts: whether held-out text is read with each.
        unedited_texts: whether the unedited model writes and reads texts, too.
    """
    carried, questions = RowEdits.of(lm, edits), ProbeRows(lm, records)
    before, after = questions.tally(), questions.tally()
    run = _replayed if use_replay(lm, "auto") else _whole
    for batch in questions.batches():
        rows, owners = [questions.rows[i] for i in batch], [questions.owner[i] for i in batch]
        ids_bt = pad_right([row.ids for row in rows])
        both = run(lm, ids_bt, [row.read for row in rows], owners, carried)
        compared = before.add(batch, next(both))
        after.add(batch, next(both), compared)
    said = greedy(lm, questions, config)
    said_after = greedy(lm, questions, config, carried.around)
    texts = sampled(lm, records, config) if unedited_texts else [()] * len(records)
    texts_after = sampled(lm, records, config, carried.around)
    base = HeldOut.read(lm) if any(drifts) else None
    held = (
        _held_out(lm, [n for n, wanted in enumerate(drifts) if wanted], carried)
        if any(drifts)
        else {}
    )
    read_before, read_after = before.readings(said), after.readings(said_after)
    if config.reference:
        read_before, read_after = _in_text(lm, records, (read_before, read_after), carried, run)
    out = []
    for n, (record, was, now) in enumerate(zip(records, read_before, read_after, strict=True)):
        unedited, edited = Outcome(was), Outcome(now)
        if n in held and base is not None:
            unedited = Outcome(was, perplexity=base.perplexity)
            edited = Outcome(now, perplexity=held[n].perplexity, drift=held[n].kl(base))
        if (ids := essence_ids(lm, record, config, references)) is not None:
            if unedited_texts:
                unedited = with_essence(
                    unedited, ids, lm.logits_at([ids[:-1]], [range(len(ids) - 1)])[0]
                )
            edited = with_essence(edited, ids, _read_with(lm, carried, n, ids))
        out.append(
            (
                with_texts(unedited, record, texts[n], references),
                with_texts(edited, record, texts_after[n], references),
            )
        )
    return out


def _replayed(
    lm: LanguageModel,
    ids_bt: Tensor,
    reads: Sequence[Sequence[int]],
    owners: Sequence[int],
    carried: RowEdits,
) -> Iterator[Tensor]:
    """Logits [all reads, v] without the edits, then with them."""
    recording = record_run(lm, ids_bt)
    row_p, read_p = _flat(reads)
    yield _head(lm, recording.hidden[-1][row_p.to(lm.device), read_p.to(lm.device)])
    suffix, last = Suffix(recording, 0, ids_bt.shape[1]), lm.n_layers - 1
    hidden_btd = recording.hidden[carried.first]
    columns_br = pad_right(reads)
    with carried.around(owners):
        for layer in range(carried.first, last):
            hidden_btd = suffix.block(layer, hidden_btd)
        read_brd = suffix.at_columns(last, hidden_btd, columns_br)
    yield _head(lm, torch.cat([read_brd[b, : len(read)] for b, read in enumerate(reads)]))


def _whole(
    lm: LanguageModel,
    ids_bt: Tensor,
    reads: Sequence[Sequence[int]],
    owners: Sequence[int],
    carried: RowEdits,
) -> Iterator[Tensor]:
    """The same by two whole forward passes."""
    wanted = sorted({position for read in reads for position in read})
    column = {position: at for at, position in enumerate(wanted)}
    row_p, read_p = _flat([[column[position] for position in read] for read in reads])
    for around in (no_edits, carried.around):
        with around(owners):
            logits_brv = lm.cloze_logits(ids_bt.to(lm.device), wanted)
        yield logits_brv[row_p.to(lm.device), read_p.to(lm.device)]


def _in_text(
    lm: LanguageModel,
    records: Sequence[Record],
    both: Sequence[Sequence[tuple[Reading, ...]]],
    carried: RowEdits,
    run: _Run,
) -> list[list[tuple[Reading, ...]]]:
    """Readings before and after with zsRE's token accuracy as released; see text_mode."""
    asked = [steps(lm, record) for record in records]
    rows = [(n, step) for n, each in enumerate(asked) for step in each]
    best: tuple[list[int], list[int]] = ([], [])  # before, after
    for start in range(0, len(rows), _ROWS):
        owners, batch = zip(*rows[start : start + _ROWS], strict=True)
        reads = [[len(step.ids) - 1] for step in batch]
        for found, logits_bv in zip(
            best,
            run(lm, pad_right([step.ids for step in batch]), reads, owners, carried),
            strict=True,
        ):
            found += logits_bv.argmax(-1).tolist()
    starts = list(accumulate(map(len, asked), initial=0))
    return [
        [
            with_text_mode(readings, each, found[start : start + len(each)])
            for readings, each, start in zip(phase, asked, starts, strict=False)
        ]
        for phase, found in zip(both, best, strict=True)
    ]


def _flat(reads: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([b for b, read in enumerate(reads) for _ in read]), torch.tensor(
        [at for read in reads for at in read]
    )


def _head(lm: LanguageModel, hidden_pd: Tensor) -> Tensor:
    return lm.parts.head(hidden_pd[None])[0]


def _held_out(lm: LanguageModel, owners: Sequence[int], carried: RowEdits) -> dict[int, HeldOut]:
    """Held-out text read with each of some edits."""
    rows, _ = pieces(lm)
    return {
        owner: HeldOut.of([_read_with(lm, carried, owner, row) for row in rows], rows)
        for owner in owners
    }


def _read_with(lm: LanguageModel, carried: RowEdits, owner: int, ids: Sequence[int]) -> Tensor:
    """Logits [tokens - 1, v] behind all tokens of a text but the last, with one of the edits."""
    with carried.around([owner]):
        return lm.cloze_logits(torch.tensor([ids[:-1]], device=lm.device), range(len(ids) - 1))[0]
