"""Rows that begin alike: what they share is run once.

Two ways, for two needs. `shared_logits` continues prompts with the model's own cache: every model
that has one can do it, replayable or not, and nothing but logits comes out.
`record_shared_prefixes` goes through the blocks one by one and records what passes between them: it
needs a model that can be replayed.

Knows rows of tokens and the model's own cache. Refuses to know what the continuations are. A model
whose cache is not transformers' DynamicCache (state-space models, for one) computes whole rows
instead; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from engram.batching import batches
from engram.engine.recording import Recording, base_model, record_run
from engram.engine.suffix import Suffix, put, take
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import record
from engram.modules.parts import takes

# tokens whose keys and values are held at once; of GPT-2 XL in float32: 1.2 GB
_CACHED_TOKENS = 2048


Ids = tuple[int, ...]


def can_share(lm: LanguageModel) -> bool:
    """Return whether it is worth trying: the model reads from left to right and takes a cache."""
    return lm.kind == "causal" and takes(lm.model, "past_key_values")


@torch.no_grad()
def shared_logits(lm: LanguageModel, continued: Sequence[tuple[Ids, Ids]]) -> list[Tensor] | None:
    """Return the logits at a prompt's last token and at each token that continues it.

    Example: three rows of the prompt [1, 2, 3], which continue it with nothing, [5, 6] and [7].

        first call    1 2 3           one row; logits at 3 are first_bv
        its cache     repeated for the two rows that go on
        second call   5 6             logits at both positions
                      7 7             shorter rows are padded with their last token

    Args:
        continued: (prompt's tokens, further tokens); those of one prompt should be neighbours.
    Returns:
        Per row one tensor [1 + further tokens, v], float32 (float64 for a float64 model); None
        where the model's cache is of another kind.
    """
    out: list[Tensor] = []
    for batch in _batches(continued):
        heads = list(dict.fromkeys(head for head, _ in batch))
        ids_bt = torch.tensor(heads, device=lm.device)
        last = {"logits_to_keep": 1} if lm.keeps_logits else {}
        read = lm.model(ids_bt, use_cache=True, **last)
        cache = read.past_key_values
        # Other caches, such as a state-space model's, cannot be repeated row by row.
        if not isinstance(cache, DynamicCache):
            return None
        first_bv = read.logits[:, -1].to(torch.promote_types(read.logits.dtype, torch.float32))
        which = [heads.index(head) for head, _ in batch]
        further = [i for i, (_, tail) in enumerate(batch) if tail]
        after = {}
        if further:
            # In place: one copy of the prompt's keys per continuation, of the same prompt or not.
            cache.batch_select_indices(torch.tensor([which[i] for i in further], device=lm.device))
            tails_bt = pad_right([batch[i][1] for i in further]).to(lm.device)
            logits_btv = lm.model(tails_bt, past_key_values=cache, use_cache=True).logits.to(
                first_bv.dtype
            )
            after = dict(zip(further, logits_btv, strict=True))
        for i, (_, tail) in enumerate(batch):
            first = first_bv[which[i]][None]
            out.append(torch.cat([first, after[i][: len(tail)]]) if tail else first)
    return out


def _batches(continued: Sequence[tuple[Ids, Ids]]) -> Iterator[list[tuple[Ids, Ids]]]:
    """Split rows into neighbours with prompts of one length, as many as memory holds."""
    return batches(
        continued,
        lambda batch, row: len(row[0]) == len(batch[0][0]),
        length=lambda row: len(row[0]) + len(row[1]),
        tokens=_CACHED_TOKENS,
    )


def record_shared_prefixes(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    shared: Sequence[int],
    *,
    layer: int,
    length: int,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Recording:
    """Record a run of rows that share prefixes with the first ones; each prefix is run once.

    Six rows of three kinds, shared = [0, 3, 5]: rows 0 and 3 have nothing in common, rows 1 and 4
    their first 3 tokens, rows 2 and 5 their first 5. Rows 0, 1, 2 are run whole, and of all six
    only what follows the shared tokens.

    Args:
        rows: token ids; row b begins like row b % len(shared).
        shared: for each kind, how many tokens its rows have in common.
        layer: lowest block that is kept, see `Recording.select`.
        length: that rows are padded to, on the right; at least the longest shared part plus the
            longest rest.
        inputs, outputs: as in `record_run`; `seen` has zeros at the shared positions.
    """
    kind_b, firsts = torch.arange(len(rows)) % len(shared), rows[: len(shared)]
    rest = max(len(row) - shared[b % len(shared)] for b, row in enumerate(rows))
    suffix = Suffix(record_run(lm, pad_right(firsts, length)), shared, rest)
    positions_bq, entry = suffix.positions.queries_bq[kind_b], lm.parts.block_name(0)
    # The embedding of whole rows: positions are added there in some families.
    with torch.no_grad(), record(lm.model, inputs=[entry], stop=True) as entering:
        base_model(lm)(pad_right(rows, length).to(lm.device))
    with torch.no_grad(), record(lm.model, inputs, outputs) as seen:
        recording = suffix.run_recording(take(entering[entry], positions_bq), kind_b, layer)
    for name, part in seen.items():
        part_bqx = part.view(len(rows), rest, -1)
        recording.seen[name] = part_bqx.new_zeros(len(rows), length, part_bqx.shape[-1])
        put(recording.seen[name], positions_bq, part_bqx)
    return recording
