"""Who changes the prediction: attention or the MLP, block by block.

A block adds its attention's output to the residual stream and then its MLP's. Each of the states in
between is read through the unembedding as a lens does, and so is the MLP's output alone. Refuses to
know single neurons: see memories.

Sources: Geva et al. 2021, arXiv:2012.14913, Sec. 5 (the four kinds of layer); Geva et al. 2022,
    arXiv:2203.14680, Sec. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.checks import checked_call, position_in
from engram.engine.recording import base_model
from engram.errors import UnsupportedModelError
from engram.locate.lenses.vocabulary import (
    answers_at,
    chunks_of_positions,
    log_probs,
    require_causal,
    require_finite,
    score,
)
from engram.model.language_model import LanguageModel
from engram.modules.hooks import record
from engram.plots.words import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = ("entering", "middle", "mlp", "leaving")
KINDS = ("agreement", "residual", "mlp", "composition")


@dataclass(frozen=True)
class Refinement:
    """How the next token comes up over the blocks of one text.

    Tables are keyed by the point that is read: "entering" the block, "middle" (its attention
    added), "mlp" (the MLP's output alone), "leaving" (both added). Each is [n_layers, t] on the
    CPU. In a block whose attention and MLP run side by side (GPT-J, Falcon) the middle is a state
    that nothing reads; changes are attributed to attention first.

    Attributes:
        answers: the token scored at each position, see `lens`.
        top_ids: the most probable token.
        top_tokens: id -> text.
        probability, rank: of the answer; rank 1 is the most probable token.
    """

    text: str
    model: str
    norm: bool
    tokens: list[str]
    answers: list[str]
    top_ids: dict[str, Tensor]
    top_tokens: dict[int, str]
    probability: dict[str, Tensor]
    rank: dict[str, Tensor]

    @property
    def changed_by_attention(self) -> Tensor:
        """[n_layers, t] whether adding the attention's output changes the most probable token."""
        return self.top_ids["entering"] != self.top_ids["middle"]

    @property
    def changed_by_mlp(self) -> Tensor:
        """[n_layers, t] whether adding the MLP's output changes it."""
        return self.top_ids["middle"] != self.top_ids["leaving"]

    def kinds(self) -> dict[str, Tensor]:
        """Return the four kinds of Geva et al. 2021, Sec. 5.2, [n_layers, t] each; every cell is of
        exactly one kind.

        The top token after the MLP is that of: "residual": only the state before it; "mlp": only
        the MLP's output alone; "agreement": both; "composition": neither.
        """
        before = self.top_ids["leaving"] == self.top_ids["middle"]
        alone = self.top_ids["leaving"] == self.top_ids["mlp"]
        return {
            "agreement": before & alone,
            "residual": before & ~alone,
            "mlp": alone & ~before,
            "composition": ~alone & ~before,
        }

    def shares(self) -> dict[str, list[float]]:
        """Return shares of the positions, layer by layer: changed by attention, changed by the
        MLP, and the four kinds.
        """
        tables = {
            "changed by attention": self.changed_by_attention,
            "changed by MLP": self.changed_by_mlp,
            **self.kinds(),
        }
        return {name: table.double().mean(1).tolist() for name, table in tables.items()}

    @checked_call
    def top(self, point: str, layer: int, position: int = -1) -> str:
        """Return the most probable token at one point."""
        return self.top_tokens[
            int(self.top_ids[point][layer, position_in(position, len(self.tokens))])
        ]

    @checked_call
    def table(self, position: int = -1) -> str:
        """Return one position as text, block by block: the top token at each point, and the
        answer's probability after the block.
        """
        lines = [
            f"{'layer':>5}  {'entering':<14} {'+ attention':<14} {'MLP alone':<14} {'+ MLP':<14} "
            f"{'p(answer)':>9} {'rank':>6}"
        ]
        for layer in range(len(self.rank["leaving"])):
            tokens = " ".join(f"{self.top(point, layer, position)!r:<14.14}" for point in POINTS)
            p, rank = (
                float(table["leaving"][layer, position]) for table in (self.probability, self.rank)
            )
            lines.append(f"{layer:>5}  {tokens} {p:>9.3f} {int(rank):>6}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return shares over all positions, a line for each block."""
        shares = self.shares()
        lines = [
            f"{'':>5}  {'changed by':<17} MLP against the state before it",
            f"{'layer':>5}  {'attention':>9} {'MLP':>6}  ",
        ]
        lines[1] += " ".join(f"{kind:>11}" for kind in KINDS)
        for layer, (attention, mlp, *kinds) in enumerate(zip(*shares.values(), strict=True)):
            lines.append(
                f"{layer:>5}  {attention:>9.0%} {mlp:>6.0%}  "
                + " ".join(f"{share:>11.0%}" for share in kinds)
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()

    @checked_call
    def describe(self, position: int = -1) -> str:
        """Return `table` of one position, then `summary` over all."""
        position = position_in(position, len(self.tokens))
        return (
            f"at token {self.tokens[position]!r}; answer {self.answers[position]!r}\n"
            f"{self.table(position)}\n\nover all {len(self.tokens)} positions\n{self.summary()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON holds it; tables are lists of rows, `top` holds tokens."""
        plain = dict(vars(self))
        plain.pop("top_tokens")
        for name in ("top_ids", "probability", "rank"):
            plain[name] = {point: table.tolist() for point, table in plain[name].items()}
        plain["top"] = {
            point: [[self.top_tokens[i] for i in row] for row in rows]
            for point, rows in plain["top_ids"].items()
        }
        return {**plain, "shares": self.shares()}

    @checked_call
    def plot(self, position: int = -1) -> Figure:
        """Draw the answer's probability and rank along the residual stream at one position, and
        who changed the top token at all positions, block by block.
        """
        from engram.plots.lenses import Stream, StreamWords, plot_streams

        at = position_in(position, len(self.tokens))
        points = ("entering", "middle", "leaving")
        probability, rank = (
            Stream(*(table[point][:, at].numpy() for point in points))
            for table in (self.probability, self.rank)
        )
        attention, mlp = self.changed_by_attention, self.changed_by_mlp
        # three shares that exclude each other, since bars are stacked
        changes = {"attention": attention & ~mlp, "both": attention & mlp, "MLP": mlp & ~attention}
        return plot_streams(
            probability,
            rank,
            {part: table.double().mean(1).numpy() for part, table in changes.items()},
            StreamWords(
                self.answers[at].strip(),
                f"at token {self.tokens[at]!r}",
                f"at all {len(self.tokens)} positions",
                f"layer of {PurePath(self.model).name}",
                (
                    f"{shorten(self.text, 300)} → {shorten(self.answers[at].strip(), 40)}",
                    f"{PurePath(self.model).name}: who makes the prediction",
                ),
            ),
        )


@checked_call
@torch.no_grad()
def refinement(
    lm: LanguageModel, text: str, *, norm: bool = True, target: str | None = None
) -> Refinement:
    """Read the states around every MLP of a text.

    Args:
        norm, target: as in `lens`.
    Raises:
        FactError: an empty text or target.
        UnsupportedModelError: a block that is no plain sum of its input, attention and MLP (it
            norms the stream in between), or a model that is not causal.
        NonFiniteError: the model's states are not finite.

    Example:
        >>> steps = engram.refinement(lm, fact.prompt_text)
        >>> steps.probability["leaving"].shape == (lm.n_layers, len(steps.tokens))
        True
    """
    require_causal(lm, "engram.refinement")
    ids = lm.encode(text).ids
    stream_ltd, middle_ltd, mlp_ltd = _states(lm, ids)
    answer_ids = answers_at(lm, text, ids, stream_ltd[-1, -1], target)
    tables: dict[str, dict[str, Tensor]] = {"top_ids": {}, "probability": {}, "rank": {}}
    read = [_read(lm, states, answer_ids, norm) for states in (stream_ltd, middle_ltd, mlp_ltd)]
    # what leaves a block enters the next: three readings fill four columns
    for name, stream, middle, mlp in zip(tables, *read, strict=True):
        tables[name] = {
            "entering": stream[:-1],
            "middle": middle,
            "mlp": mlp,
            "leaving": stream[1:],
        }
    require_finite(lm, text, *tables["probability"].values())
    seen = torch.stack([*tables["top_ids"].values()]).unique().tolist()
    return Refinement(
        text,
        lm.name,
        norm,
        lm.token_strings(ids),
        lm.token_strings(answer_ids.tolist()),
        top_tokens=dict(zip(seen, lm.token_strings(seen), strict=True)),
        **tables,
    )


def _read(
    lm: LanguageModel, states_ltd: Tensor, answer_ids: Tensor, norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Most probable token, probability and rank of the answer, [l, t] on the CPU."""
    columns = []
    for part in chunks_of_positions(
        len(answer_ids), len(states_ltd) * int(lm.model.config.vocab_size)
    ):
        log_ltv = log_probs(lm, states_ltd[:, part], norm=norm)
        columns.append((log_ltv.argmax(-1), *score(log_ltv, answer_ids[part])))
    top, probability, rank = (torch.cat(pieces, 1).cpu() for pieces in zip(*columns, strict=True))
    return top, probability, rank


def _states(lm: LanguageModel, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual stream [l + 1, t, d], and for each block its middle and its MLP's
    contribution, [l, t, d].
    """
    parts, layout = lm.parts, lm.parts.layout
    if not (layout.attention and layout.mlp) or layout.attention == layout.mlp:
        raise UnsupportedModelError(
            f"the blocks of {lm.name} ({lm.model.config.model_type}) have no attention and MLP to "
            "tell apart; engram.lens works"
        )
    names = [parts.block_name(layer) for layer in range(lm.n_layers)]
    outputs = [f"{name}.{part}" for name in names for part in (layout.attention, layout.mlp)]
    with record(lm.model, names[:1], [*names, *outputs]) as seen:
        base_model(lm)(torch.tensor([ids], device=lm.device), use_cache=False)
    home = seen[names[-1]].device
    stream = torch.stack([seen[name][0].to(home) for name in (f"{names[0]}:input", *names)])
    # Granite scales both branches
    scale = float(getattr(lm.model.config, "residual_multiplier", 1.0))
    attention, mlp = (
        scale
        * torch.stack([seen[f"{name}.{part}"].view_as(seen[name])[0].to(home) for name in names])
        for part in (layout.attention, layout.mlp)
    )
    # from the far end, so that blocks whose parts run side by side have a middle too; then check
    # that attention's output leads there, which a norm on the stream would prevent
    middle = stream[1:] - mlp
    if not _close(stream[:-1] + attention, middle):
        raise UnsupportedModelError(
            f"the blocks of {lm.name} do more than add their attention and their MLP to the "
            "residual stream (they norm the stream in between), so the state between the two "
            "cannot be computed; engram.lens works"
        )
    return stream, middle, mlp


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether two sums are equal up to rounding; a norm in between changes far more."""
    # far above the rounding of a sum of two states, in float32 and in 8 bits of bfloat16
    tolerance = 1e-3 if torch.finfo(a.dtype).eps < 1e-5 else 0.05
    # states that are not finite are another error, raised by the caller with its own words
    return not (a.isfinite().all() and b.isfinite().all()) or bool(
        (a - b).float().norm() <= tolerance * b.float().norm().clamp(min=1e-6)
    )
