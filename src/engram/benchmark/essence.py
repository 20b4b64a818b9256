"""Essence drift: how well the model reads texts about the subject, which an edit of one fact should
leave as readable as before.

Knows which tokens are read and what their logits say. Refuses to know where logits come from (see
phase).
Source: Meng et al. 2022, arXiv:2202.05262, released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engram.benchmark.data.records import Record, References
from engram.benchmark.metrics.outcomes import MeasureConfig, Outcome
from engram.model.language_model import LanguageModel

TOKENS = 100  # of the texts, joined; as released


def essence_ids(
    lm: LanguageModel, record: Record, config: MeasureConfig, references: References | None
) -> list[int] | None:
    """Return the tokens of the texts about the subject among the record's references.

    Logits are needed at all of these but the last. The references are about entities that have the
    *new* object, so the subject is seldom among them.

    Returns:
        At least two tokens; None without such a text, without `config.texts`, or for a model that
        does not read from left to right.
    """
    if references is None or record.references is None or not config.texts or lm.kind != "causal":
        return None
    subjects = {fact.subject for fact in record.facts}
    texts = [
        snippet.text
        for snippet in references.snippets.get(record.references, ())
        if snippet.name in subjects
    ]
    ids = (
        # Quiet, since the tokenizer warns of texts that are too long for the model before the cut.
        list(lm.tokenizer(" ".join(texts), verbose=False)["input_ids"])[
            : min(TOKENS, lm.max_tokens)
        ]
        if texts
        else []
    )
    return ids if len(ids) > 1 else None


def with_essence(outcome: Outcome, ids: Sequence[int], logits_pv: Tensor) -> Outcome:
    """Return the outcome with both perplexities of the texts.

    Of T tokens the first is not predicted: the perplexity is exp of the mean over T - 1 tokens. The
    released code divides by T.

    Args:
        ids: see `essence_ids`.
        logits_pv: [T - 1, v] after each of them but the last.
    """
    # At least float32: bfloat16 would round each of the hundred terms to 8 bits.
    log_p_pv = logits_pv.log_softmax(-1, dtype=torch.promote_types(logits_pv.dtype, torch.float32))
    total = (
        -log_p_pv.gather(1, torch.tensor(ids[1:], device=log_p_pv.device)[:, None]).double().sum()
    )
    ours, published = ((total / count).exp().item() for count in (len(ids) - 1, len(ids)))
    return replace(outcome, essence=ours, essence_published=published)
