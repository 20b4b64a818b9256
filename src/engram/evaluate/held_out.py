"""Held-out text: what the model makes of half a page of plain prose that has nothing to do with any
edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files

import torch
from torch import Tensor

from engram.model.language_model import LanguageModel


@dataclass(frozen=True)
class HeldOut:
    """Log-probabilities of every next token of the text.

    Args:
        log_p_pv: [p, v]; tokens_p: [p] what stands there.
    """

    log_p_pv: Tensor
    tokens_p: Tensor

    @classmethod
    def read(cls, lm: LanguageModel) -> HeldOut:
        """With the model as it is now."""
        rows, reads = pieces(lm)
        return cls.of(lm.logits_at([row[:-1] for row in rows], reads), rows)

    @classmethod
    def of(cls, logits: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> HeldOut:
        """From the logits [tokens - 1, v] of each piece."""
        log_p_pv = torch.cat(list(logits)).log_softmax(
            -1, dtype=torch.promote_types(logits[0].dtype, torch.float32)
        )
        return cls(
            log_p_pv,
            torch.tensor([token for row in rows for token in row[1:]], device=log_p_pv.device),
        )

    @cached_property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability, as `LanguageModel.perplexity` has it."""
        return float((-self.log_p_pv.gather(1, self.tokens_p[:, None]).double().mean()).exp())

    def kl(self, base: HeldOut) -> float:
        """Mean KL(this || base) of the next token, nats."""
        return float(
            (self.log_p_pv.exp() * (self.log_p_pv - base.log_p_pv)).sum(-1).clamp(min=0).mean()
        )


def pieces(lm: LanguageModel) -> tuple[list[list[int]], list[range]]:
    """The text in pieces as long as the model takes, and the positions at which the next token is
    known.
    """
    rows = lm.tokens.pieces(held_out_text(), lm.max_tokens)
    return rows, [range(len(row) - 1) for row in rows]


@cache
def held_out_text() -> str:
    """The bundled text, one paragraph a line."""
    return (files("engram.evaluate") / "held_out.txt").read_text(encoding="utf8").strip()
