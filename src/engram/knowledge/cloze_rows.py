"""The fewest rows of tokens in which a model shows how probable answers are after a prompt.

Knows tokens, positions and batches. Refuses to know facts and ranks.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engram.batching import batches
from engram.engine.shared_prompts import Ids, can_share, shared_logits
from engram.errors import FactError, NonFiniteError
from engram.model.language_model import LanguageModel

_LOGITS = 1 << 25  # logits held at once: 128 MB in float32
_WORTHWHILE = 2  # rows per prompt; with fewer, computing prompts apart saves nothing
_LAST_WORD = re.compile(r"\S*\s*$")


class ClozeRow(NamedTuple):
    """One row of a forward pass: token ids, the positions whose logits are read, and the input of
    an encoder-decoder model's decoder.
    """

    ids: Ids
    read: Ids
    decoder: Ids = ()


class ClozeRows:
    """Rows for one model.

    It remembers how answers are cut into tokens; that can depend on a prompt's last word, not on
    more of it.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._tokens: dict[tuple[str, str], Ids] = {}
        self._shares = can_share(lm)  # until a batch shows that it does not hold

    def tokens(self, prompt: str, answer: str) -> Ids:
        """Return the tokens by which `answer` follows `prompt`, or fills its blank."""
        key = (_LAST_WORD.search(prompt)[0], answer)  # type: ignore[index]  # it always matches
        if key not in self._tokens:
            self._tokens[key] = tuple(self.lm.cloze(prompt, answer).answer)
        return self._tokens[key]

    def rows(self, prompt: str, answers: Sequence[Ids]) -> tuple[list[ClozeRow], list[int]]:
        """Return rows that show every token of every answer, and for each answer the number of its
        row, which shows the answer's tokens at its first reads.

        Causal and encoder-decoder models: one-token answers share the prompt's own row, or any row
        that continues it; two answers share theirs where all but their last tokens agree, or where
        one begins as the other does. Masked models: answers of as many tokens share a row with as
        many masks.

        Example: a prompt [1, 2, 3] and the answers [5], [5, 6], [5, 7], [9, 1, 2] of a causal
        model. The last token of an answer is predicted, never read:

            row  ids                read     shows
            0    1 2 3 5            2, 3     [5], [5, 6], [5, 7]
            1    1 2 3 9 1          2, 3, 4  [9, 1, 2]

            row of each answer: [0, 0, 0, 1]

        Raises:
            FactError: prompt and answer have more tokens than the model takes.
        """
        blank = self.lm.cloze(prompt)
        ids, at = tuple(blank.ids), blank.read[0]
        if self.lm.kind == "masked":
            # Masks do not see each other's answers: only their number matters.
            sizes = sorted({len(answer) for answer in answers})
            rows = [
                ClozeRow(ids[:at] + n * ids[at : at + 1] + ids[at + 1 :], tuple(range(at, at + n)))
                for n in sizes
            ]
            where = [sizes.index(len(answer)) for answer in answers]
        else:
            # An answer's last token is predicted, so only what comes before it has to be read.
            prefixes = _longest({answer[:-1] for answer in answers})
            reads = [tuple(range(at, at + len(prefix) + 1)) for prefix in prefixes]
            pairs = zip(prefixes, reads, strict=True)
            if blank.decoder_ids is None:
                rows = [ClozeRow(ids + prefix, read) for prefix, read in pairs]
            else:
                rows = [
                    ClozeRow(ids, read, (*blank.decoder_ids, *prefix)) for prefix, read in pairs
                ]
            # The first prefix that is not less begins with this one, see `_longest`.
            where = [bisect_left(prefixes, answer[:-1]) for answer in answers]
        longest = max(max(len(row.ids), len(row.decoder)) for row in rows)
        if longest > self.lm.max_tokens:
            raise FactError(
                f"prompt and answer have {longest} tokens, the model takes at most "
                f"{self.lm.max_tokens}: {prompt[:60]!r}..."
            )
        return rows, where

    def logits(self, rows: Sequence[ClozeRow]) -> Tensor:
        """Return the logits [positions, v] at all positions that the rows read, in the rows' order;
        equal rows are computed once.
        """
        # Facts with several right objects ask the same prompt once for each of them.
        distinct = list(dict.fromkeys(rows))
        logits = self._of_shared_prompts(distinct)
        if logits is None:
            decoder = (
                [row.decoder for row in distinct] if self.lm.kind == "encoder-decoder" else None
            )
            logits = self.lm.logits_at(
                [row.ids for row in distinct], [row.read for row in distinct], decoder
            )
        of_row = dict(zip(distinct, logits, strict=True))
        return torch.cat([of_row[row] for row in rows])

    def _of_shared_prompts(self, rows: Sequence[ClozeRow]) -> list[Tensor] | None:
        """Return the same through keys and values of each prompt, where many rows continue few
        prompts; else None.
        """
        continued = [(row.ids[: row.read[0] + 1], row.ids[row.read[0] + 1 :]) for row in rows]
        if not self._shares or len(rows) < _WORTHWHILE * len({head for head, _ in continued}):
            return None
        logits = shared_logits(self.lm, continued)
        self._shares = logits is not None
        return logits

    def log_probs(
        self, rows: Sequence[ClozeRow], reads: Sequence[Sequence[tuple[int, int, int]]], size: int
    ) -> Tensor:
        """Return sums of log-probabilities, with no more than a batch's logits in memory.

        Args:
            reads: for each row (which of its reads, token, slot): the token's log-probability is
                added to the slot.
            size: number of slots.
        Returns:
            [size] on the CPU.
        Raises:
            NonFiniteError: the model gave NaN.
        """
        # float64, so that adding up in batches costs no digits.
        total = torch.zeros(size, dtype=torch.float64)
        for batch in self._batches(rows):
            log_probs_pv = self.logits([rows[i] for i in batch]).log_softmax(-1)
            at, start = [], 0
            for i in batch:
                at += [(start + read, token, slot) for read, token, slot in reads[i]]
                start += len(rows[i].read)
            position, token, slot = torch.tensor(at).unbind(1)
            device = log_probs_pv.device
            total.index_add_(
                0, slot, log_probs_pv[position.to(device), token.to(device)].cpu().double()
            )
        check_not_nan(total)
        return total

    def top_answer(self, answer: Ids, best: Ids) -> str:
        """Return what the model answers instead of `answer`: its best tokens up to the first that
        differs.

        Later ones were read with the answer's tokens in front, which the model would not have
        written. A masked model's are independent of each other and taken whole.
        """
        same = next(
            (i for i, (a, b) in enumerate(zip(answer, best, strict=True)) if a != b),
            len(answer) - 1,
        )
        text = str(
            self.lm.tokenizer.decode(list(best if self.lm.kind == "masked" else best[: same + 1]))
        )
        return text.strip() or text

    def _batches(self, rows: Sequence[ClozeRow]) -> Iterator[list[int]]:
        return batches(
            range(len(rows)),
            key=lambda i: (rows[i].read[0], rows[i]),  # those of one prompt together
            size=lambda i: len(rows[i].read),
            total=_LOGITS // int(self.lm.model.config.get_text_config().vocab_size),
        )


def _longest(prefixes: Iterable[Ids]) -> list[Ids]:
    """Return the prefixes that no other one begins with, sorted; the first one that is not less
    than a given prefix begins with it.
    """
    # Sorted, a prefix comes directly before those that begin with it, so one look ahead is enough.
    ordered = sorted(prefixes)
    return [
        a
        for a, b in zip(ordered, [*ordered[1:], None], strict=True)
        if b is None or b[: len(a)] != a
    ]


def check_not_nan(values: Tensor) -> None:
    """Raise where a model gave NaN."""
    if values.isnan().any():
        raise NonFiniteError(
            "the model's logits are NaN, so nothing can be said about what it knows; try "
            "dtype=torch.float32"
        )
