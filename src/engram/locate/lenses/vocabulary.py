"""Reading states in the vocabulary: what lens, refinement and memories share.

Knows states, the last norm and the unembedding. Refuses to know what a reading is for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engram.engine.recording import base_model
from engram.errors import NonFiniteError, UnsupportedModelError
from engram.model.language_model import LanguageModel
from engram.modules.hooks import record

# logits held at once, over all layers: 64 MB in float32, some five times that at the peak
_LOGITS_AT_ONCE = 1 << 24


def require_causal(lm: LanguageModel, what: str) -> None:
    """Raise an error for models whose states do not predict the next token at each position."""
    kind = getattr(lm, "kind", "causal")
    if kind != "causal":
        raise UnsupportedModelError(
            f"{lm.name} is of kind {kind}: {what} reads states as predictions of the next token, "
            "which only a causal model makes at every position. Load a causal one."
        )


def require_finite(lm: LanguageModel, text: str, *tables: Tensor) -> None:
    """Raise an error where a reading of a text holds NaN or infinity.

    Raises:
        NonFiniteError: a table does.
    """
    if not all(table.isfinite().all() for table in tables):
        raise NonFiniteError(
            f"{lm.name} gives states that are not finite on {text[:60]!r}; try dtype=torch.float32"
        )


def residual_stream(lm: LanguageModel, ids: list[int]) -> Tensor:
    """Return the states of a text, [n_layers + 1, t, d]: what enters block 0, then what leaves each
    block.
    """
    # by hooks and not by `output_hidden_states`: its last entry has the last norm in it already
    names = [lm.parts.block_name(layer) for layer in range(lm.n_layers)]
    with record(lm.model, names[:1], names) as seen, torch.no_grad():
        base_model(lm)(torch.tensor([ids], device=lm.device), use_cache=False)
    # one text is one row; blocks may be on several devices, and the head is with the last one
    states = [seen[f"{names[0]}:input"][0], *(seen[name][0] for name in names)]
    return torch.stack([state.to(states[-1].device) for state in states])


def answers_at(
    lm: LanguageModel, text: str, ids: list[int], last_state_d: Tensor, target: str | None
) -> Tensor:
    """Return ids of the tokens to score at each position, [t] on the CPU: see `lens`."""
    if target is not None:
        return torch.tensor([lm.target_ids(text, target)[0]] * len(ids))
    return torch.tensor([*ids[1:], int(lm.parts.head(last_state_d).argmax())])


def chunks_of_positions(tokens: int, logits: int) -> Iterator[slice]:
    """Yield slices of positions whose logits fit the budget; `logits` is how many each has."""
    # a position alone may exceed the budget: then it is a slice of its own
    step = max(1, _LOGITS_AT_ONCE // logits)
    for at in range(0, tokens, step):
        yield slice(at, at + step)


def log_probs(lm: LanguageModel, states: Tensor, *, norm: bool = True) -> Tensor:
    """Return log-probabilities (nats) that the unembedding reads in states, [..., d] -> [..., v],
    float32 or better.
    """
    logits = lm.parts.head(states, norm=norm)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def score(log_tv: Tensor, answer_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return probability and rank (1 + number of more probable tokens) of one token at each
    position: [..., t, v] -> [..., t] twice.
    """
    ids_t1 = answer_ids.to(log_tv.device)[:, None].expand(*log_tv.shape[:-1], 1)
    answer_t1 = log_tv.gather(-1, ids_t1)
    # counted and not sorted: ties share the better rank, and no second table [.., v] is held
    return answer_t1[..., 0].exp(), 1 + (log_tv > answer_t1).sum(-1)


def settled(top_lt: Tensor) -> Tensor:
    """Return the first row of each column from which on all entries equal the last one, [t].

    Example: the column (5, 7, 7, 7) settles at row 1, (7, 5, 7, 7) at row 2.
    """
    # rows numbered from 1: the last one that differs is the first settled one, numbered from 0
    changes = top_lt != top_lt[-1]
    rows = torch.arange(1, len(top_lt) + 1, device=top_lt.device)[:, None]
    return (changes * rows).amax(0)
