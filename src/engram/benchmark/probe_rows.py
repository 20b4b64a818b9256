"""The probes of several records as rows of tokens, and what the logits of these rows say about each
probe.

Knows tokens and log-probabilities. Refuses to know where logits come from: one model or many (see
singly and together).
Definitions: Meng et al. 2022, arXiv:2202.05262, Sec. 3.4; a mean over an answer's tokens, as the
    released code takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from engram.batching import batches
from engram.benchmark.data.records import Record
from engram.benchmark.metrics.outcomes import Reading
from engram.knowledge.cloze_rows import ClozeRow, ClozeRows, check_not_nan
from engram.model.language_model import LanguageModel

COMPARED = (
    "neighbourhood",
    "neighbourhood+",
    "locality",
)  # kinds whose next token is compared with the unedited model's

_TOKENS, _LOGITS = (
    1024,
    1 << 25,
)  # of one forward on a CPU: with more, what blocks hand on no longer fits its cache

ProbeRef = tuple[int, int]  # (number of a record, number of its probe)


class _Need(NamedTuple):
    """A token whose log-probability is wanted: which read of the row, the token, and the answer it
    is part of.
    """

    read: int
    token: int
    answer: int


class ProbeRows:
    """What is asked of a model about some records, in the fewest rows: a prompt's answers share one
    wherever they can.

    Attributes:
        rows: token ids and where logits are read; owner: for each the number of its record.
    """

    def __init__(self, lm: LanguageModel, records: Sequence[Record]) -> None:
        self.records = records
        self.rows: list[ClozeRow] = []
        self.owner: list[int] = []
        self._needs: list[list[_Need]] = []
        self._compared: list[list[ProbeRef]] = []  # those whose next token is compared, by row
        self._sizes: list[int] = []  # tokens of each answer
        self._answers: dict[ProbeRef, list[int]] = {}  # its answers
        self._device = lm.device
        self._vocabulary = int(lm.model.config.get_text_config().vocab_size)
        cloze = ClozeRows(lm)
        for n, record in enumerate(records):
            prompts: dict[str, list[int]] = {}
            for p, probe in enumerate(record.probes):
                prompts.setdefault(probe.prompt, []).append(p)
            for prompt, probes in prompts.items():
                asked = [
                    (p, cloze.tokens(prompt, answer))
                    for p in probes
                    for answer in record.probes[p].answers
                ]
                rows, where = cloze.rows(prompt, [tokens for _, tokens in asked])
                first = len(self.rows)
                self.rows += rows
                self.owner += [n] * len(rows)
                self._needs += [[] for _ in rows]
                self._compared += [[(n, p) for p in probes if record.probes[p].kind in COMPARED]]
                self._compared += [[] for _ in rows[1:]]
                for (p, tokens), row in zip(asked, where, strict=True):
                    self._answers.setdefault((n, p), []).append(len(self._sizes))
                    self._needs[first + row] += [
                        _Need(i, token, len(self._sizes)) for i, token in enumerate(tokens)
                    ]
                    self._sizes.append(len(tokens))

    def batches(self) -> Iterator[list[int]]:
        """Numbers of rows of about one length, with no more tokens and logits in each batch than
        one forward should have.
        """
        tokens = _TOKENS if self._device.type == "cpu" else 4 * _TOKENS

        def length(i: int) -> int:
            return len(self.rows[i].ids)

        return batches(
            range(len(self.rows)),
            key=length,
            length=length,
            tokens=tokens,
            size=lambda i: len(self.rows[i].read) * self._vocabulary,
            total=_LOGITS,
        )

    def tally(self) -> AnswerScores:
        return AnswerScores(self)

    def answer_tokens(self, n: int, p: int) -> int:
        """Tokens of what a probe wants."""
        return self._sizes[self._answers[n, p][0]]


class AnswerScores:
    """What has been seen of the answers in one phase."""

    def __init__(self, questions: ProbeRows) -> None:
        self.of = questions
        self.log_p = torch.zeros(len(questions._sizes), dtype=torch.float64)
        self.hits = torch.zeros(len(questions._sizes), dtype=torch.float64)
        self.kl: dict[ProbeRef, float] = {}

    def add(
        self, batch: Sequence[int], logits_pv: Tensor, base: Mapping[ProbeRef, Tensor] | None = None
    ) -> dict[ProbeRef, Tensor]:
        """Take in the logits of a batch.

        Args:
            batch: numbers of rows; logits_pv: [all their reads, v].
            base: what this returned for the unedited model, of the same probes or of more.
        Returns:
            Log-probabilities [v] of the next token behind each probe whose next token is compared.
        """
        questions = self.of
        log_p_pv = logits_pv.log_softmax(
            -1, dtype=torch.promote_types(logits_pv.dtype, torch.float32)
        )
        best_p = log_p_pv.argmax(-1)
        starts = list(accumulate((len(questions.rows[i].read) for i in batch), initial=0))
        needed = [
            (start + need.read, need.token, need.answer)
            for i, start in zip(batch, starts, strict=False)
            for need in questions._needs[i]
        ]
        if needed:
            position, token, answer = torch.tensor(needed).unbind(1)
            there, token_there = position.to(log_p_pv.device), token.to(log_p_pv.device)
            self.log_p.index_add_(0, answer, log_p_pv[there, token_there].cpu().double())
            self.hits.index_add_(0, answer, (best_p[there] == token_there).cpu().double())
        compared = {
            place: log_p_pv[start]
            for i, start in zip(batch, starts, strict=False)
            for place in questions._compared[i]
        }
        if base is not None and compared:
            next_cv, base_cv = (
                torch.stack(list(compared.values())),
                torch.stack([base[place] for place in compared]),
            )
            kl_c = (next_cv.exp() * (next_cv - base_cv)).sum(-1).clamp(min=0)
            self.kl |= dict(zip(compared, kl_c.tolist(), strict=True))
        return compared

    def readings(self, said: Mapping[ProbeRef, str] | None = None) -> list[tuple[Reading, ...]]:
        """Of each record, one a probe.

        Raises:
            NonFiniteError: the model gave NaN.
        """
        check_not_nan(self.log_p)
        questions, out = self.of, []
        nll = [
            -total / size for total, size in zip(self.log_p.tolist(), questions._sizes, strict=True)
        ]
        share = [
            hits / size for hits, size in zip(self.hits.tolist(), questions._sizes, strict=True)
        ]
        for n, record in enumerate(questions.records):
            found = []
            for p in range(len(record.probes)):
                wanted, *unwanted = questions._answers[n, p]
                other = nll[unwanted[0]] if unwanted else None
                found.append(
                    Reading(
                        nll[wanted],
                        other,
                        share[wanted],
                        (said or {}).get((n, p)),
                        self.kl.get((n, p)),
                    )
                )
            out.append(tuple(found))
        return out
