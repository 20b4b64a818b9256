"""Lenses: what the model would predict if it stopped after this layer.

The residual stream, after the embedding and after every block, is read by the model's own
unembedding. Knows states and the vocabulary. Refuses to know causes: what a lens can read there
need not be what later layers use; see engram.locate.tracing.

Source: nostalgebraist, "interpreting GPT: the logit lens", LessWrong 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from engram.checks import checked_call, one_of, position_in
from engram.errors import SettingError
from engram.locate.lenses.vocabulary import (
    answers_at,
    chunks_of_positions,
    log_probs,
    require_causal,
    require_finite,
    residual_stream,
    score,
    settled,
)
from engram.model.language_model import LanguageModel
from engram.plots.words import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from engram.plots.lenses import Scale

Shade = Literal["probability", "answer", "rank", "entropy", "kl"]
_SHADES: dict[str, tuple[str, str, Scale]] = {  # what colours mean -> its name, colours, scale
    "probability": ("p(top token)", "Purples", "share"),
    "answer": ("p(next token)", "Purples", "share"),
    "rank": ("rank of next token", "Purples_r", "rank"),
    "entropy": ("entropy (nats)", "YlOrBr", "linear"),
    # the embedding is far from the output: the square root keeps the other rows apart
    "kl": ("KL to output (nats)", "YlOrBr", "root"),
}


@dataclass(frozen=True)
class LogitLens:
    """What every state of one text predicts as the next token.

    Tables have a row for every point of the residual stream: row 0 is the embedding, row l + 1 what
    leaves block l (see `labels`). Columns are the text's tokens. Tensors are on the CPU, float32
    (float64 for a float64 model).

    Attributes:
        norm: whether the model's last norm was applied before the unembedding.
        tokens: the text's t tokens.
        answers: the token scored at each position: the text's next one, after its end the model's
            own choice; or the target.
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
        """Return a name for each row: "in" for the embedding, then the number of the block left."""
        return ["in", *map(str, range(self.n_layers))]

    @checked_call
    def top(self, row: int, position: int = -1) -> list[tuple[str, float]]:
        """Return the k most probable tokens of one state with their probabilities."""
        position = position_in(position, len(self.tokens))
        ids, probabilities = (
            self.top_ids[row, position].tolist(),
            self.top_probabilities[row, position].tolist(),
        )
        return [(self.top_tokens[i], p) for i, p in zip(ids, probabilities, strict=True)]

    @checked_call
    def table(self, position: int = -1) -> str:
        """Return one position as text, the embedding first: its best token, the answer."""
        lines = [
            f"{'layer':>5}  {'top token':<16} {'p':>6}   {'p(answer)':>9} {'rank':>6} "
            f"{'entropy':>8} {'KL':>7}"
        ]
        for row, label in enumerate(self.labels()):
            token, p = self.top(row, position)[0]
            numbers = [
                float(table[row, position]) for table in (self.probability, self.entropy, self.kl)
            ]
            lines.append(
                f"{label:>5}  {token!r:<16.16} {p:>6.3f}   {numbers[0]:>9.3f} "
                f"{int(self.rank[row, position]):>6} {numbers[1]:>8.2f} {numbers[2]:>7.2f}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        kind = "with the last norm" if self.norm else "raw states"
        return (
            f"logit lens ({kind}) at the last token, {self.tokens[-1]!r}; answer "
            f"{self.answers[-1]!r}, settled at layer "
            f"{self.labels()[int(self.settled[-1])]}\n{self.table()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it; tables are nested lists, `top` holds
        [text, probability] pairs.
        """
        top = [
            [[[*pair] for pair in self.top(row, at)] for at in range(len(self.tokens))]
            for row in range(len(self.rank))
        ]
        plain = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        # `top` holds both; JSON has no integer keys
        for name in ("top_tokens", "top_probabilities"):
            plain.pop(name)
        return {**plain, "rows": self.labels(), "top": top}

    @checked_call
    def plot(self, shade: Shade = "probability", positions: Sequence[int] | None = None) -> Figure:
        """Draw a heat map: tokens across, layers up, each state's most probable token in its cell.

        Bold: the token is the one that comes next (written above its column). Above the line the
        top token never changes again.

        Args:
            shade: what colours mean: "probability" of the top token; "answer" or "rank":
                probability or rank of the next token; "entropy" of the distribution; "kl": its
                distance from the model's output.
            positions: tokens to draw; default: all.
        Raises:
            SettingError: another shade, or a position that the text does not have.
        """
        from engram.plots.lenses import TokenTable, plot_token_table

        one_of("shade", shade, _SHADES)
        bar_label, colours, scale = _SHADES[shade]
        tokens, rows = len(self.tokens), range(len(self.rank))
        columns = [
            position_in(at, tokens) for at in (range(tokens) if positions is None else positions)
        ]
        numbers = {
            "probability": self.top_probabilities[..., 0],
            "answer": self.probability,
            "rank": self.rank,
            "entropy": self.entropy,
            "kl": self.kl,
        }[shade]
        kind = "last norm applied" if self.norm else "raw states"
        name = PurePath(self.model).name
        return plot_token_table(
            TokenTable(
                numbers[:, columns].numpy(),
                cells=[[self.top(row, at)[0][0] for at in columns] for row in rows],
                bold=(self.top_ids[..., 0] == self.answer_ids)[:, columns].numpy(),
                line=self.settled[columns].tolist(),
                rows=self.labels(),
                below=[self.tokens[at] for at in columns],
                above=[self.answers[at] for at in columns],
                x_label=f"logit lens of {name}, {kind}; above the line the top token stays",
                bar_label=bar_label,
                colours=colours,
                scale=scale,
                heading=(
                    f"{shorten(self.text, 300)} → {shorten(self.answers[-1].strip(), 40)}",
                    f"{name}: the most probable next token of each state",
                ),
            )
        )


@checked_call
@torch.no_grad()
def lens(
    lm: LanguageModel, text: str, *, norm: bool = True, target: str | None = None, k: int = 5
) -> LogitLens:
    """Read every state of a text through the unembedding.

    Args:
        text: any text; a prompt up to the object to see where the answer comes up.
        norm: apply the model's last norm to every state first, so that the last row is the model's
            own output. False: the plain logit lens, states straight into the unembedding. A model's
            scaling and soft cap of logits apply to both.
        target: score this token at every position; of a target of several tokens, the first.
            Default: the token that really comes next in the text, and after its end the model's
                own choice.
        k: number of the most probable tokens that are kept.
    Returns:
        Tables [n_layers + 1, tokens]. Distributions over the vocabulary are made for a few
        positions at a time and never kept; what is kept is n_layers + 1 states a token.
    Raises:
        SettingError: k is not between 1 and the size of the vocabulary.
        FactError: an empty text or target.
        UnsupportedModelError: the model is no causal one.
        NonFiniteError: the model's states are not finite.

    Example:
        >>> lens = engram.lens(lm, fact.prompt_text)
        >>> lens.rank.shape == (lm.n_layers + 1, len(lens.tokens))
        True
        >>> lens.top(row=lm.n_layers)[0][0] == lens.answers[-1]
        True
    """
    require_causal(lm, "engram.lens")
    vocabulary = int(lm.model.config.vocab_size)
    if not 1 <= k <= vocabulary:
        raise SettingError(
            f"k={k}: the number of tokens to keep, from 1 to the vocabulary's {vocabulary}"
        )
    ids = lm.encode(text).ids
    states_ltd = residual_stream(lm, ids)
    answer_ids = answers_at(lm, text, ids, states_ltd[-1, -1], target)
    # all layers of a few positions: 13 layers of GPT-2's vocabulary are 2.6 MB a position
    parts = [
        _read(lm, states_ltd[:, part], answer_ids[part], norm, k)
        for part in chunks_of_positions(len(ids), len(states_ltd) * vocabulary)
    ]
    tables = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    require_finite(lm, text, *tables.values())
    seen = tables["top_ids"].unique().tolist()
    return LogitLens(
        text,
        lm.name,
        norm,
        lm.token_strings(ids),
        lm.token_strings(answer_ids.tolist()),
        answer_ids,
        top_tokens=dict(zip(seen, lm.token_strings(seen), strict=True)),
        settled=settled(tables["top_ids"][..., 0]),
        **tables,
    )


def _read(
    lm: LanguageModel, states_ltd: Tensor, answer_ids: Tensor, norm: bool, k: int
) -> dict[str, Tensor]:
    """Return the tables [rows, t] of a `LogitLens`, on the CPU."""
    # without the norm readings mislead: on pocket raw states give 0.86 and more to their top token
    # in every layer, and it is right in 5 % of facts in the first three
    log_ltv = log_probs(lm, states_ltd, norm=norm)
    # raw states are compared with the model's output all the same, which has the norm
    final_tv = log_ltv[-1] if norm else log_probs(lm, states_ltd[-1])
    best = log_ltv.topk(k, -1)
    probability, rank = score(log_ltv, answer_ids)
    tables = {
        "top_ids": best.indices,
        "top_probabilities": best.values.exp(),
        "probability": probability,
        "rank": rank,
        # from log-probabilities, which stay finite where a probability rounds to zero
        "entropy": -(log_ltv.exp() * log_ltv).sum(-1),
        "kl": (final_tv.exp() * (final_tv - log_ltv)).sum(-1),
    }
    return {name: table.cpu() for name, table in tables.items()}
