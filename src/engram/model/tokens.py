"""Text into token ids and back, as one model's tokenizer does it.

Knows a fast tokenizer and how many tokens fit. Refuses to know models, prompts and what tokens are
for (see cloze).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engram.checks import briefly
from engram.errors import FactError, UnsupportedModelError
from engram.files.json_records import writable


@dataclass(frozen=True)
class Encoding:
    """A tokenised text: `offsets[i]` are the characters (start, end) of `text` that token `ids[i]`
    covers; (0, 0) for special tokens.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokens:
    """A tokenizer and the number of tokens that its model takes.

    Args:
        tokenizer: a fast one (offset mappings are how subjects are located).
        max_tokens: longest sequence of the model.
    Raises:
        UnsupportedModelError: a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer and reports no character offsets, "
                "by which subjects are located; load the fast one (use_fast=True, or convert it "
                "with tokenizers)"
            )
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def encode(self, text: str) -> Encoding:
        """Return the tokens of `text` with special tokens in front, but none after it.

        A start token that the text itself has, as a chat template's does, is not doubled.

        Raises:
            FactError: no token is left, or more than the model takes.
        """
        batch = self._tokenised(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids = list(batch["input_ids"])
        offsets = [(int(a), int(b)) for a, b in batch["offset_mapping"]]
        special = list(batch["special_tokens_mask"])
        # Some tokenizers append an end-of-text. One that the text itself has covers characters.
        while special and special[-1] and offsets[-1][0] == offsets[-1][1]:
            ids.pop(), offsets.pop(), special.pop()
        if (
            len(ids) > 1
            and ids[0] == ids[1]
            and special[0]
            and offsets[0][0] == offsets[0][1] < offsets[1][1]
        ):
            ids, offsets = ids[1:], offsets[1:]
        if not ids:
            raise FactError(f"text {text!r} gives no tokens")
        self.check_length(ids, text)
        return Encoding(text, ids, offsets)

    def _tokenised(self, text: str, **options: Any) -> Any:
        if not writable(text):  # letters of an argument or of JSON that are none
            raise FactError(f"{briefly(text)} is no text that a model can read; write it again")
        return self.tokenizer(text, **options)

    def encode_all(self, text: str) -> Encoding:
        """Return the tokens of `text` with every special token, of any length."""
        batch = self._tokenised(text, return_offsets_mapping=True, verbose=False)
        offsets = [(int(a), int(b)) for a, b in batch["offset_mapping"]]
        return Encoding(text, list(batch["input_ids"]), offsets)

    def bare_ids(self, text: str) -> list[int]:
        """Return the tokens of `text` without special tokens."""
        return list(self._tokenised(text, add_special_tokens=False, verbose=False)["input_ids"])

    def check_length(self, ids: Sequence[int], text: str) -> None:
        """Raise where `text` has more tokens than the model takes."""
        if len(ids) > self.max_tokens:
            raise FactError(
                f"text of {len(ids)} tokens, the model takes at most {self.max_tokens}: "
                f"{text[:60]!r}..."
            )

    def continuation_ids(self, text: str, continuation: str) -> list[int]:
        """Return the tokens by which `continuation` follows `text`.

        They are read off the joint tokenisation, since a tokenizer may treat a word differently at
        the start of a text; where the two would merge into one token, `continuation` is tokenised
        alone.

        Raises:
            FactError: no tokens.
        """
        # Tokenising the two apart and joining the ids is wrong for SentencePiece: it would put a
        # space in front of the second text.
        head, joint = self.encode(text), self.encode(text + continuation)
        at = len(head.ids)
        if joint.ids[:at] != head.ids:
            # White space at the end of a text may be cut otherwise where the text goes on.
            ends = [end for _, end in joint.offsets]
            at = next((i for i, end in enumerate(ends) if end > len(text)), len(joint.ids))
            if not (joint.offsets[at : at + 1] and joint.offsets[at][0] >= len(text)):
                at = len(joint.ids)
        ids = joint.ids[at:] or self.bare_ids(continuation)
        if not ids:
            raise FactError(f"target={continuation!r} gives no tokens")
        return ids

    def pieces(self, text: str, size: int) -> list[list[int]]:
        """Return the ids of a text of any length in pieces of `size`; one token is no piece."""
        ids = list(self._tokenised(text, verbose=False)["input_ids"])
        # A last piece of one token has nothing to predict.
        return [part for at in range(0, len(ids), size) if len(part := ids[at : at + size]) > 1]

    def strings(self, ids: Iterable[int]) -> list[str]:
        """Return each token decoded alone, for display."""
        return [str(self.tokenizer.decode([i])) for i in ids]

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Special tokens as they are written in a text."""
        # Also those that only a chat template uses, which `all_special_tokens` may lack.
        added = self.tokenizer.added_tokens_decoder.values()
        special = [str(token) for token in added if token.special]
        return tuple(dict.fromkeys([*self.tokenizer.all_special_tokens, *special]))


def spaced(target: str) -> str:
    """Return `target` with one leading space, unless it starts with white space."""
    return target if target[:1].isspace() else " " + target


def pad_right(rows: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """Return rows of token ids as one [b, t] tensor, shorter ones filled with their last token,
    which no real position can see.
    """
    length = max(len(row) for row in rows) if length is None else length
    return torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in rows])
