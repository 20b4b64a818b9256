"""Probes as rows of tokens, and what the logits of these rows say about each probe.

Knows tokens and log-probabilities. Refuses to know where logits come from: one model, or a batch in
which every row carries an edit of its own.
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.4; the mean over an answer's tokens is that of
the released code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from engram.batching import batches
from engram.engine.shared_prompts import Ids
from engram.evaluate.probes import Probe, Reading
from engram.knowledge.cloze_rows import ClozeRow, ClozeRows, check_not_nan
from engram.model.language_model import LanguageModel

COMPARED = ("neighbourhood", "neighbourhood+", "locality")  # kinds with a KL to the unedited model
_TOKENS = 1024  # of a forward on a CPU: with more, what blocks pass on no longer fits the cache
_LOGITS = 1 << 25  # of a forward: 128 MB in float32

ProbeRef = tuple[int, int]  # (number of a group, number of a probe in it)


class Need(NamedTuple):
    """A token whose log-probability counts: at which read of its row, and for which answer."""

    read: int
    token: int
    answer: int


@dataclass(frozen=True)
class ProbeRow:
    """One row of a forward pass.

    Args:
        cloze: token ids, and where logits are read.
        group: number of the group whose probes it serves.
        needs: tokens that are looked up in its logits.
        compared: probes whose next token is compared with the unedited model's.
    """

    cloze: ClozeRow
    group: int
    needs: list[Need] = field(default_factory=list)
    compared: list[ProbeRef] = field(default_factory=list)


class ProbeRows:
    """All probes of some groups, in the fewest rows: answers to a prompt share one if they can.

    "The tower is in" with the answers " Rome" and " New York" is two answers and one row, since
    the first token of either is read at the prompt's end, and the second token of " New York" after
    its first:

        row 0   ids  The tower is in New      reads (3, 4)
                needs  (0, " Rome", answer 0)  (0, " New", answer 1)  (1, " York", answer 1)

    Answers that share no beginning need a second row, as " New York" and " San Marino" do.

    Attributes:
        groups: the probes, such as those of one record each.
        rows: see `ProbeRow`.
        answers: probe -> numbers of its answers, the wanted one first.
        sizes: number of tokens of each answer.
        ids: the tokens of each answer.
        cloze: puts prompts and answers to the model.
    """

    def __init__(self, lm: LanguageModel, groups: Sequence[Sequence[Probe]]) -> None:
        self.groups = groups
        self.rows: list[ProbeRow] = []
        self.answers: dict[ProbeRef, list[int]] = {}
        self.sizes: list[int] = []
        self.ids: list[Ids] = []
        self._tokens = _TOKENS if lm.device.type == "cpu" else 4 * _TOKENS
        self._vocabulary = int(lm.model.config.get_text_config().vocab_size)
        self.cloze = ClozeRows(lm)
        for group, probes in enumerate(groups):
            of_prompt: dict[str, list[int]] = {}
            for number, probe in enumerate(probes):
                of_prompt.setdefault(probe.prompt, []).append(number)
            # Never across groups: a row carries the edit of one record, even if another record has
            # the same prompt.
            for prompt, numbers in of_prompt.items():
                self._add(prompt, [(group, number) for number in numbers])

    def _add(self, prompt: str, refs: Sequence[ProbeRef]) -> None:
        """Add the rows of one prompt, which all these probes have."""
        cloze = self.cloze
        probes = [(ref, self.groups[ref[0]][ref[1]]) for ref in refs]
        answers = [
            (ref, cloze.tokens(prompt, answer)) for ref, probe in probes for answer in probe.answers
        ]
        clozes, row_of_answer = cloze.rows(prompt, [tokens for _, tokens in answers])
        rows = [ProbeRow(row, refs[0][0]) for row in clozes]
        # Every row begins with the prompt and reads at its end first, so any of them shows the next
        # token; the first one does it for all.
        rows[0].compared.extend(ref for ref, probe in probes if probe.kind in COMPARED)
        for (ref, tokens), row in zip(answers, row_of_answer, strict=True):
            number = len(self.sizes)
            rows[row].needs.extend(Need(i, token, number) for i, token in enumerate(tokens))
            self.answers.setdefault(ref, []).append(number)
            self.sizes.append(len(tokens))
            self.ids.append(tokens)
        self.rows += rows

    def batches(self) -> Iterator[list[ProbeRow]]:
        """Yield rows of about one length, as many as fit one forward's tokens and logits."""
        return batches(
            self.rows,
            key=lambda row: len(row.cloze.ids),
            length=lambda row: len(row.cloze.ids),
            tokens=self._tokens,
            size=lambda row: len(row.cloze.read) * self._vocabulary,
            total=_LOGITS,
        )

    def wanted_tokens(self, ref: ProbeRef) -> int:
        """Return the number of tokens of what a probe wants."""
        return self.sizes[self.answers[ref][0]]


class AnswerScores:
    """What the logits of one phase say about the answers of `ProbeRows`, summed batch by batch."""

    def __init__(self, rows: ProbeRows) -> None:
        self.of = rows
        # Sums over tokens in float64, so that the order in which a batch adds them leaves no trace.
        # The released code runs both answers after the prompt, each with its own copy of it; here
        # they share a row, which is exact under a causal mask and half the work.
        self.log_p = torch.zeros(len(rows.sizes), dtype=torch.float64)
        self.hits = torch.zeros(len(rows.sizes), dtype=torch.float64)
        # The most probable token at each place of an answer, the answer's own tokens before it.
        self.best: list[list[int]] = [[] for _ in rows.sizes]
        self.kl: dict[ProbeRef, float] = {}

    @classmethod
    def read(
        cls, lm: LanguageModel, rows: ProbeRows, base: Mapping[ProbeRef, Tensor] | None = None
    ) -> tuple[AnswerScores, dict[ProbeRef, Tensor]]:
        """Put all probes to the model as it is now; see `add` for `base` and the second result."""
        scores, compared = cls(rows), dict[ProbeRef, Tensor]()
        for batch in rows.batches():
            clozes = [row.cloze for row in batch]
            decoder = [row.decoder for row in clozes] if lm.kind == "encoder-decoder" else None
            logits = lm.logits_at(
                [row.ids for row in clozes], [row.read for row in clozes], decoder
            )
            compared |= scores.add(batch, torch.cat(logits), base)
        return scores, compared

    def add(
        self,
        batch: Sequence[ProbeRow],
        logits_pv: Tensor,
        base: Mapping[ProbeRef, Tensor] | None = None,
    ) -> dict[ProbeRef, Tensor]:
        """Take in the logits of a batch.

        Args:
            logits_pv: [all reads of the rows, v].
            base: what this returned for the unedited model, of the same probes or of more.
        Returns:
            Log-probabilities [v] of the next token after each probe of a kind in `COMPARED`.
        """
        log_p_pv = logits_pv.log_softmax(
            -1, dtype=torch.promote_types(logits_pv.dtype, torch.float32)
        )
        # [p], p counts the reads of all rows in the batch: row 2 of rows with 3, 1 and 2 reads
        # begins at p = 4.
        best_p = log_p_pv.argmax(-1)
        starts = list(accumulate((len(row.cloze.read) for row in batch), initial=0))[:-1]
        # one gather for the whole batch: a lookup a token would wait for the device each time
        lookups = [
            (start + need.read, need.token, need.answer)
            for row, start in zip(batch, starts, strict=True)
            for need in row.needs
        ]
        if lookups:
            position, token, answer = torch.tensor(lookups).unbind(1)
            best = best_p[position.to(best_p.device)].cpu()
            self.hits.index_add_(0, answer, (best == token).double())
            # A row's needs come in the order of an answer's tokens, and an answer has one row.
            for number, most_probable in zip(answer.tolist(), best.tolist(), strict=True):
                self.best[number].append(most_probable)
            position, token = position.to(log_p_pv.device), token.to(log_p_pv.device)
            self.log_p.index_add_(0, answer, log_p_pv[position, token].cpu().double())
        compared = {
            ref: log_p_pv[start]
            for row, start in zip(batch, starts, strict=True)
            for ref in row.compared
        }
        if base is not None and compared:
            next_cv = torch.stack(list(compared.values()))
            base_cv = torch.stack([base[ref] for ref in compared])
            # Clamped: of equal distributions rounding leaves a sum just below 0.
            # KL(now || unedited), in nats: the direction of CounterFact+, whose released number is
            # divided by v.
            kl_c = (next_cv.exp() * (next_cv - base_cv)).sum(-1).clamp(min=0)
            self.kl |= dict(zip(compared, kl_c.tolist(), strict=True))
        return compared

    def log_probs(self, ref: ProbeRef) -> list[float]:
        """Return the log-probability of each answer of a probe as a whole, the wanted one first."""
        return [float(self.log_p[answer]) for answer in self.of.answers[ref]]

    def says(self, ref: ProbeRef) -> bool:
        """Return whether greedy decoding writes what a probe wants: each of its tokens is the most
        probable one after those before it.
        """
        wanted = self.of.answers[ref][0]
        return int(self.hits[wanted]) == self.of.sizes[wanted]

    def said(self, ref: ProbeRef) -> str:
        """Return the beginning of what greedy decoding writes after a probe's prompt: one of the
        probe's answers, or the tokens up to the first that is in none of them.

        It costs nothing: no token is read that the answers' probabilities do not need as well.

        Example: the answers are " Rome" and " New York", and the most probable tokens are

            " New" after the prompt, " Orleans" after " New"   -> "New Orleans"
            " the" after the prompt                            -> "the"
        """
        texts = [
            self.of.cloze.top_answer(self.of.ids[answer], tuple(self.best[answer]))
            for answer in self.of.answers[ref]
        ]
        # Each is a beginning of the same text, read up to where the model leaves that answer.
        return max(texts, key=len)

    def readings(self, answers: Mapping[ProbeRef, str] | None = None) -> list[tuple[Reading, ...]]:
        """Return a reading for each probe of each group.

        Args:
            answers: greedy answers, where there are any.
        Raises:
            NonFiniteError: the model computed NaN.
        """
        # Here and not batch by batch: a check after each batch would wait for the device.
        check_not_nan(self.log_p)
        sizes = torch.tensor(self.of.sizes, dtype=torch.float64)
        # Mean per token, as released: the sum would prefer the shorter of two objects.
        nll, correct = (-self.log_p / sizes).tolist(), (self.hits / sizes).tolist()
        groups = []
        for group, probes in enumerate(self.of.groups):
            readings = []
            for ref in ((group, number) for number in range(len(probes))):
                wanted, *unwanted = self.of.answers[ref]
                other = nll[unwanted[0]] if unwanted else None
                answer = (answers or {}).get(ref)
                readings.append(
                    Reading(nll[wanted], other, correct[wanted], answer, self.kl.get(ref))
                )
            groups.append(tuple(readings))
        return groups
