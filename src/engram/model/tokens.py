"""TODO model.tokens"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engram.errors import FactError

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel
from collections.abc import Sequence

import torch
from torch import Tensor


def continuation_ids(lm: LanguageModel, text: str, more: str) -> list[int]:
    """Tokens by which `more` follows `text`.

    They are read off the joint tokenisation, so that a tokenizer which treats a word differently at
    the start of a text is no trap; where the two would merge into one token, `more` is tokenised
    alone.

    Raises:
        FactError: no tokens.
    """
    head, joint = lm.encode(text), lm.encode(text + more)
    at = len(head.ids)
    if (
        joint.ids[:at] != head.ids
    ):  # white space at the end of a text may be cut otherwise where the text goes on
        at = next((i for i, (a, b) in enumerate(joint.offsets) if b > len(text)), len(joint.ids))
        at = (
            at
            if joint.offsets[at : at + 1] and joint.offsets[at][0] >= len(text)
            else len(joint.ids)
        )
    ids = joint.ids[at:] or _tokens(lm, more)
    if not ids:
        raise FactError(f"target={more!r} gives no tokens")
    return ids


def spaced(target: str) -> str:
    return target if target[:1].isspace() else " " + target


def _encode(lm: LanguageModel, text: str) -> tuple[list[int], list[tuple[int, int]], str]:
    """(ids, offsets, text) with every special token, whose offsets are (0, 0)."""
    batch: Any = lm.tokenizer(text, return_offsets_mapping=True, verbose=False)
    return list(batch["input_ids"]), [(int(a), int(b)) for a, b in batch["offset_mapping"]], text


def _tokens(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Encoding:
    """A tokenised text: `offsets[i]` are the characters (start, end) of `text` that token `ids[i]`
    stands for.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


def pad_right(rows: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """Rows of token ids as one [b, t] tensor, shorter ones filled with their last token, which no
    real position can see.
    """
    length = max(len(row) for row in rows) if length is None else length
    return torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows])
