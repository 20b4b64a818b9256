"""Lenses: what the model would say if it stopped after this layer.

The residual stream, after the embedding and after every block, is read by the model's own unembedding. Knows states and
the vocabulary. Refuses to know causes: what a lens can read there need not be what later layers use; see causal_trace.

Source: nostalgebraist, "interpreting GPT: the logit lens", LessWrong 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.errors import NonFiniteError, SettingError, UnsupportedModelError
from engram.hooks import record
from engram.language_model import LanguageModel
from engram.replay import body

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram.plots.lenses import Shade

_LOGITS_AT_ONCE = 1 << 24  # over all layers and a chunk of positions: 64 MB in float32, some five times that at the peak


@dataclass(frozen=True)
class LogitLens:
    """What every state of one text says about the next token.

    Tables have a row for every point of the residual stream: row 0 is the embedding, row l + 1 what leaves block l (see
    `labels`). Columns are the text's tokens. Tensors are on the CPU, float32 (float64 for a float64 model).

    Attributes:
        norm: whether the model's last norm was applied before the unembedding.
        tokens: the text's t tokens.
        answers: the token scored at each position: the text's next one, behind its end the model's own choice; or the target.
        answer_ids: [t] their ids.
        top_ids: [rows, t, k] the most probable tokens, best first.
        top_tokens: id -> text, of every id in `top_ids`.
        top_probabilities: [rows, t, k].
        probability: [rows, t] of the answer.
        rank: [rows, t] of the answer, 1 for the most probable token.
        entropy: [rows, t] of the distribution, in nats.
        kl: [rows, t] KL(the model's output distribution || this one), in nats.
        settled: [t] first row from which the most probable token never changes again.
    """

    text: str
    model: str
    norm: bool
    tokens: list[str]
    answers: list[str]
    answer_ids: Tensor
    top_ids: Tensor
    top_tokens: dict[int, str]
    top_probabilities: Tensor
    probability: Tensor
    rank: Tensor
    entropy: Tensor
    kl: Tensor
    settled: Tensor

    @property
    def n_layers(self) -> int:
        return len(self.rank) - 1

    def labels(self) -> list[str]:
        """A name for each row: "in" for the embedding, then the number of the block that was left."""
        return ["in", *map(str, range(self.n_layers))]

    def top(self, row: int, position: int = -1) -> list[tuple[str, float]]:
        """The k most probable tokens of one state with their probabilities."""
        position = checked(position, len(self.tokens))
        ids, probabilities = self.top_ids[row, position].tolist(), self.top_probabilities[row, position].tolist()
        return [(self.top_tokens[i], p) for i, p in zip(ids, probabilities, strict=True)]

    def table(self, position: int = -1) -> str:
        """One position in words, the embedding first: its best token, and how the answer stands."""
        lines = [f"{'layer':>5}  {'top token':<16} {'p':>6}   {'p(answer)':>9} {'rank':>6} {'entropy':>8} {'KL':>7}"]
        for row, label in enumerate(self.labels()):
            token, p = self.top(row, position)[0]
            numbers = [float(table[row, position]) for table in (self.probability, self.entropy, self.kl)]
            lines.append(
                f"{label:>5}  {token!r:<16.16} {p:>6.3f}   {numbers[0]:>9.3f} {int(self.rank[row, position]):>6} "
                f"{numbers[1]:>8.2f} {numbers[2]:>7.2f}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        kind = "with the last norm" if self.norm else "raw states"
        return (
            f"logit lens ({kind}) at the last token, {self.tokens[-1]!r}; answer {self.answers[-1]!r}, "
            f"settled at layer {self.labels()[int(self.settled[-1])]}\n{self.table()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it; tables are nested lists, `top` holds [text, probability] pairs."""
        top = [[[[*pair] for pair in self.top(row, at)] for at in range(len(self.tokens))] for row in range(len(self.rank))]
        plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        for name in ("top_tokens", "top_probabilities"):
            plain.pop(name)
        return {**plain, "rows": self.labels(), "top": top}

    def plot(self, shade: Shade = "probability", positions: Sequence[int] | None = None) -> Figure:
        """Heat map: tokens across, layers up, each state's most probable token in its cell. See `plots.plot_lens`."""
        from engram.plots.lenses import plot_lens

        return plot_lens(self, shade, positions)


@torch.no_grad()
def lens(lm: LanguageModel, text: str, *, norm: bool = True, target: str | None = None, k: int = 5) -> LogitLens:
    """Read every state of a text through the unembedding.

    Args:
        text: any text; a prompt up to the object to see where the answer comes up.
        norm: apply the model's last norm to every state first, so that the last row is the model's own output. False: the
            plain logit lens, states straight into the unembedding. A model's scaling and soft cap of logits apply to both.
        target: score this token at every position; of a target of several tokens, the first. Default: the token that
            really comes next in the text, and behind its end the model's own choice.
        k: how many of the most probable tokens are kept.
    Returns:
        Tables [n_layers + 1, tokens]. Distributions over the vocabulary are made for a few positions at a time and never
        kept; what is kept is n_layers + 1 states a token.
    Raises:
        SettingError: k is not between 1 and the size of the vocabulary.
        FactError: an empty text or target.
        UnsupportedModelError: the model is no causal one.
        NonFiniteError: the model's states are not finite.
    """
    require_causal(lm, "engram.lens")
    vocabulary = int(lm.model.config.vocab_size)
    if not 1 <= k <= vocabulary:
        raise SettingError(f"k={k}: how many tokens to keep, from 1 to the vocabulary's {vocabulary}")
    ids = lm.encode(text).ids
    states_ltd = residual_stream(lm, ids)
    answer_ids = answers_at(lm, text, ids, states_ltd[-1, -1], target)
    parts = [
        _read(lm, states_ltd[:, part], answer_ids[part], norm, k)
        for part in chunks_of_positions(len(ids), len(states_ltd) * vocabulary)
    ]
    tables = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    if not all(table.isfinite().all() for table in tables.values()):
        raise NonFiniteError(f"{lm.name} gives states that are not finite on {text[:60]!r}; try dtype=torch.float32")
    seen = tables["top_ids"].unique().tolist()
    return LogitLens(
        text, lm.name, norm, lm.token_strings(ids), lm.token_strings(answer_ids.tolist()), answer_ids,
        top_tokens=dict(zip(seen, lm.token_strings(seen), strict=True)), settled=settled(tables["top_ids"][..., 0]), **tables,
    )  # fmt: skip


def _read(lm: LanguageModel, states_ltd: Tensor, answer_ids: Tensor, norm: bool, k: int) -> dict[str, Tensor]:
    """The tables [rows, t] of a `LogitLens`, on the CPU."""
    log_ltv = log_probs(lm, states_ltd, norm=norm)
    final_tv = log_ltv[-1] if norm else log_probs(lm, states_ltd[-1])
    best = log_ltv.topk(k, -1)
    probability, rank = score(log_ltv, answer_ids)
    tables = {
        "top_ids": best.indices,
        "top_probabilities": best.values.exp(),
        "probability": probability,
        "rank": rank,
        "entropy": -(log_ltv.exp() * log_ltv).sum(-1),
        "kl": (final_tv.exp() * (final_tv - log_ltv)).sum(-1),
    }
    return {name: table.cpu() for name, table in tables.items()}


# -- what the readings in this folder share ---------------------------------------------------------------------------


def require_causal(lm: LanguageModel, what: str) -> None:
    """Refuse models in which a position's state does not speak of the next token."""
    kind = getattr(lm, "kind", "causal")
    if kind != "causal":
        raise UnsupportedModelError(
            f"{lm.name} is of kind {kind}: {what} reads states as predictions of the next token, which only a causal "
            "model makes at every position. Load a causal one."
        )


def checked(position: int, tokens: int) -> int:
    """A position counted from the text's start, where it may be given from its end.

    Raises:
        SettingError: the text does not have it.
    """
    if not -tokens <= position < tokens:
        raise SettingError(f"position={position}: the text has {tokens} tokens, numbered 0 to {tokens - 1} or from -1 down")
    return position % tokens


def residual_stream(lm: LanguageModel, ids: list[int]) -> Tensor:
    """The states of a text: what enters block 0, then what leaves each block; [n_layers + 1, t, d]."""
    names = [lm.parts.block_name(layer) for layer in range(lm.n_layers)]
    with record(lm.model, names[:1], names) as seen, torch.no_grad():
        body(lm)(torch.tensor([ids], device=lm.device), use_cache=False)
    states = [seen[f"{names[0]}:input"][0], *(seen[name][0] for name in names)]
    return torch.stack([state.to(states[-1].device) for state in states])


def answers_at(lm: LanguageModel, text: str, ids: list[int], last_state_d: Tensor, target: str | None) -> Tensor:
    """Id of the token to score at each position, [t] on the CPU: see `lens`."""
    if target is not None:
        return torch.tensor([lm.target_ids(text, target)[0]] * len(ids))
    return torch.tensor([*ids[1:], int(lm.parts.head(last_state_d).argmax())])


def chunks_of_positions(tokens: int, logits: int) -> Iterator[slice]:
    """Consecutive positions, as many at once as keep their logits small, of which each has so many."""
    step = max(1, _LOGITS_AT_ONCE // logits)
    for at in range(0, tokens, step):
        yield slice(at, at + step)


def log_probs(lm: LanguageModel, states: Tensor, *, norm: bool = True) -> Tensor:
    """Log-probabilities (nats) that the unembedding reads in states [..., d] -> [..., v], float32 or better."""
    logits = lm.parts.head(states, norm=norm)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def score(log_tv: Tensor, answer_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and rank (1 + how many tokens are more probable) of one token a position: [..., t, v] -> [..., t] twice."""
    ids_t1 = answer_ids.to(log_tv.device)[:, None].expand(*log_tv.shape[:-1], 1)
    answer_t1 = log_tv.gather(-1, ids_t1)
    return answer_t1[..., 0].exp(), 1 + (log_tv > answer_t1).sum(-1)


def settled(top_lt: Tensor) -> Tensor:
    """First row of each column from which on every entry equals the last one, [t]."""
    changes = top_lt != top_lt[-1]
    rows = torch.arange(1, len(top_lt) + 1, device=top_lt.device)[:, None]
    return (changes * rows).amax(0)
