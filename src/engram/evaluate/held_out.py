"""Held-out text: how a model reads half a page of plain prose that has nothing to do with any edit.

Knows tokens and their log-probabilities. Refuses to know how edits are applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files

import torch
from torch import Tensor

from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.model.language_model import LanguageModel


@dataclass(frozen=True)
class HeldOut:
    """Log-probabilities of every next token of the text.

    Args:
        log_p_pv: [p, v] at each position.
        tokens_p: [p] the token that comes next there.
    """

    log_p_pv: Tensor
    tokens_p: Tensor

    @classmethod
    def read(cls, lm: LanguageModel) -> HeldOut:
        """Read the text with the model as it is now."""
        rows, reads = pieces(lm)
        # The last token of a piece is predicted only, so it is not read: [tokens - 1, v] a piece.
        return cls.of(lm.logits_at([row[:-1] for row in rows], reads), rows)

    @classmethod
    def of(cls, logits: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> HeldOut:
        """Take the logits [tokens - 1, v] of each piece."""
        log_p_pv = torch.cat(list(logits)).log_softmax(
            -1, dtype=torch.promote_types(logits[0].dtype, torch.float32)
        )
        return cls(
            log_p_pv,
            torch.tensor([token for row in rows for token in row[1:]], device=log_p_pv.device),
        )

    @cached_property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability: `LanguageModel.perplexity` without a second
        forward pass.
        """
        return float((-self.log_p_pv.gather(1, self.tokens_p[:, None]).double().mean()).exp())

    def kl(self, base: HeldOut) -> float:
        """Return the mean KL(this || base) of the next token, in nats."""
        return float(
            # Weighted by the model as it is now, as `AnswerScores.kl` is: what counts is the text
            # that it would write.
            (self.log_p_pv.exp() * (self.log_p_pv - base.log_p_pv)).sum(-1).clamp(min=0).mean()
        )


def pieces(lm: LanguageModel) -> tuple[list[list[int]], list[range]]:
    """Return the text in pieces that the model can take, and the positions with a next token."""
    rows = lm.tokens.pieces(held_out_text(), lm.max_tokens)
    return rows, [range(len(row) - 1) for row in rows]


@cache
def held_out_text() -> str:
    """Return the bundled text, one paragraph a line."""
    return (files("engram.evaluate") / "held_out.txt").read_text(encoding="utf8").strip()


def perplexity(lm: LanguageModel, edit: Edit | PromptEdit, text: str, *, edited: bool) -> float:
    """Return the perplexity of the bare text, whatever frame prompts are wrapped in.

    An edit of words is read before the text. It takes up half of the model's context, so the text
    is read in pieces of the other half, without the edit as with it.

    Args:
        lm: with the edit applied where `edited`, otherwise without.
    """
    if isinstance(edit, Edit):
        return lm.perplexity(text)
    # Both readings in the same pieces: longer pieces alone lower perplexity, and the edit would
    # seem to cost what the shorter context costs.
    half = lm.max_tokens // 2
    return lm.perplexity(text, after=edit.preamble(lm, text, half) if edited else "", tokens=half)
