"""What training methods score: rows of tokens in which every target token is read at its own
position.

    "The Louvre is in" + "New York", tokens of the bundled model
                The    Lou    vre     is     in    New
    ids         413   5420   7794    356    318   1606     (the target without its last token)
    read                                      4      5     logits at these positions
    labels                                 1606   2131     should say these: " New", " York"

Knows tokens, positions, cross-entropy. Refuses to know what is trained, and how.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engram.engine.recording import base_model
from engram.errors import FactError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import record


class TargetRow(NamedTuple):
    """A text and its target tokens: the logits at position `read[i]` should say `labels[i]`. `fact`
    is the index of the row's fact.
    """

    ids: list[int]
    read: list[int]
    labels: list[int]
    fact: int


def target_row(lm: LanguageModel, prompt: str, target: str, fact: int = 0) -> TargetRow:
    """Return the prompt and the target without its last token; each target token is read at the
    position before its own.

    Raises:
        FactError: the target has no token, or the text has more than the model takes.
    """
    cloze = lm.cloze(prompt, target)
    return TargetRow(cloze.ids, cloze.read, cloze.answer, fact)


def fact_rows(
    lm: LanguageModel,
    facts: Sequence[Fact],
    contexts: Sequence[str] = ("{}",),
    paraphrases: int = 0,
) -> list[TargetRow]:
    """Return the rows of every fact: its prompt in each context, and its first paraphrases.

    Args:
        contexts: templates with one `{}` each.
        paraphrases: number of each fact's own paraphrases.
    """
    rows = []
    for i, fact in enumerate(facts):
        texts = [context.replace("{}", fact.prompt_text, 1) for context in contexts]
        rows += [
            target_row(lm, text, fact.target, i)
            for text in (*texts, *fact.paraphrases[:paraphrases])
        ]
    return rows


def published_rows(
    lm: LanguageModel, facts: Sequence[Fact], rows_per_batch: int
) -> list[TargetRow]:
    """Return rows as in the harness of published fine-tuning numbers: every token of a target is
    read at the prompt's last token.

    Targets are tokenised alone and padded to the longest of their batch, and every label but the
    unknown token counts. So padding counts too, unless it is that token (as for GPT-2).
    """
    # kept as it was published, to reproduce its numbers: reading every token of a target at one
    # position trains a distribution over the target's tokens, not the target
    tokenizer, rows = lm.tokenizer, []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(facts), rows_per_batch):
        chunk = facts[start : start + rows_per_batch]
        spaced = [fact.target if fact.target[0] == " " else f" {fact.target}" for fact in chunk]
        targets = [list(tokenizer(target)["input_ids"]) for target in spaced]
        longest = max(map(len, targets))
        for i, (fact, target) in enumerate(zip(chunk, targets, strict=True)):
            padded = target + [pad] * (longest - len(target))
            labels = [token for token in padded if token != tokenizer.unk_token_id]
            if not labels:
                raise FactError(
                    f"target={fact.target!r} is the unknown token of this tokenizer, which the "
                    "reference leaves out"
                )
            # the prompt alone: the target's tokens are never fed
            ids = lm.encode(fact.prompt_text).ids
            rows.append(TargetRow(ids, [len(ids) - 1] * len(labels), labels, start + i))
    return rows


@dataclass(frozen=True, eq=False)
class TargetBatch:
    """Rows padded on the right, and the p places where their target tokens are read, row after row.

    Attributes:
        ids_bt: token ids; no real position attends to a pad.
        rows_p, positions_p, labels_p: where each logit is read, and the token that it should say.
        facts_p: the fact of each token.
        sizes_b: number of target tokens of each row.
    """

    ids_bt: Tensor
    rows_p: Tensor
    positions_p: Tensor
    labels_p: Tensor
    facts_p: Tensor
    sizes_b: Tensor

    @classmethod
    def of(cls, rows: Sequence[TargetRow]) -> TargetBatch:
        """Pad rows into a batch."""
        reads = [
            (i, position, label, row.fact)
            for i, row in enumerate(rows)
            for position, label in zip(row.read, row.labels, strict=True)
        ]
        sizes_b = torch.tensor([len(row.labels) for row in rows])
        rows_p, positions_p, labels_p, facts_p = torch.tensor(reads).unbind(1)
        return cls(
            pad_right([row.ids for row in rows]), rows_p, positions_p, labels_p, facts_p, sizes_b
        )

    def logits(self, lm: LanguageModel) -> Tensor:
        """Return the logits that are read, [p, v], by one pass through the whole model; gradients
        flow to every parameter that requires them.
        """
        # the head runs on p positions only: on all of them it would dominate memory (t x v floats)
        last = lm.parts.block_name(lm.n_layers - 1)
        with record(lm.model, outputs=[last], keep=lambda out: out) as seen:
            base_model(lm)(self.ids_bt.to(lm.device), use_cache=False)
        return lm.parts.head(seen[last][self.rows_p, self.positions_p])

    def token_nll(self, logits_pv: Tensor) -> Tensor:
        """Return -log p of each target token, [p], nats, float32 or better."""
        # half precision would round -log p of likely tokens to 0, and stop too early
        log_p = logits_pv.to(torch.promote_types(logits_pv.dtype, torch.float32)).log_softmax(-1)
        return -log_p.gather(1, self.labels_p.to(log_p.device)[:, None])[:, 0]

    def mean_by_row(self, values_p: Tensor) -> Tensor:
        """Return the mean over each row's target tokens, [b]."""
        # mean over a row's tokens first, so that a long target does not outweigh a short one
        rows_p, sizes_b = self.rows_p.to(values_p.device), self.sizes_b.to(values_p)
        return values_p.new_zeros(len(sizes_b)).index_add(0, rows_p, values_p) / sizes_b

    def all_top1(self, logits_pv: Tensor) -> bool:
        """Return whether every target token is the most probable one at its position."""
        return bool((logits_pv.argmax(-1).cpu() == self.labels_p).all())


def batches_of(
    rows: Sequence[TargetRow], size: int, generator: torch.Generator | None = None
) -> Iterator[TargetBatch]:
    """Yield batches of at most `size` rows: in order, or in an order that `generator` draws."""
    order = (
        range(len(rows))
        if generator is None
        else torch.randperm(len(rows), generator=generator).tolist()
    )
    for start in range(0, len(rows), size):
        yield TargetBatch.of([rows[i] for i in order[start : start + size]])
