"""Texts that a model writes, many rows at once: greedy answers, and sampled continuations with a generator a row.

Rows of one length go through the model together with its own key and value cache, so that no row is padded and each is computed
as it would be alone. Knows rows. Refuses to know which model each row belongs to: `around` lays the changes of a batch's rows.
Sampling as in the released code of Meng et al. 2022, arXiv:2202.05262: top 5, no stop at an end of text, a length that includes
the prompt; but with a seed a row.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.hooks import Around, nothing
from engram.language_model import LanguageModel

TOP_K = 5


@dataclass(frozen=True)
class Writing:
    """One text to be written on.

    Args:
        ids: the prompt's tokens; new: tokens to write, at least 1; seed: of its draws, None: greedy.
    """

    ids: tuple[int, ...]
    new: int
    seed: int | None = None


def seed_of(*parts: object) -> int:
    """A seed that is the same wherever and in whatever order it is asked for."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def write(
    lm: LanguageModel, writings: Sequence[Writing], around: Around = nothing, *, rows_at_once: int = 512
) -> list[list[int]]:
    """The new tokens of each.

    Args:
        around: given the numbers of the rows of a batch, lays what is in force for them.
    """
    out: list[list[int]] = [[] for _ in writings]
    for batch in _batches(writings, rows_at_once):
        with around(batch):
            for i, ids in zip(batch, _written(lm, [writings[i] for i in batch]), strict=True):
                out[i] = ids
    return out


def _batches(writings: Sequence[Writing], most: int) -> Iterator[list[int]]:
    """Rows of one length, those that write about as much together."""
    batch: list[int] = []
    for i in sorted(range(len(writings)), key=lambda i: (len(writings[i].ids), writings[i].new, i)):
        if batch and (len(batch) == most or len(writings[i].ids) != len(writings[batch[0]].ids)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _written(lm: LanguageModel, rows: Sequence[Writing]) -> list[list[int]]:
    generators = [None if row.seed is None else torch.Generator().manual_seed(row.seed) for row in rows]
    ids_bt = torch.tensor([row.ids for row in rows], device=lm.device)
    cache, done, length = None, [], ids_bt.shape[1]
    for step in range(max(row.new for row in rows)):
        seen_bt = torch.ones(len(rows), length + step, dtype=torch.long, device=lm.device)  # no token is a pad
        read = lm.model(ids_bt, attention_mask=seen_bt, past_key_values=cache, use_cache=True, **_last_only(lm))
        cache = read.past_key_values
        chosen_b = _chosen(read.logits[:, -1].float(), generators)
        done.append(chosen_b.tolist())
        ids_bt = chosen_b[:, None].to(lm.device)
    return [list(tokens[: row.new]) for row, tokens in zip(rows, zip(*done, strict=True), strict=True)]


def _last_only(lm: LanguageModel) -> dict[str, int]:
    return {"logits_to_keep": 1} if lm._keeps_logits else {}


def _chosen(logits_bv: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    best = logits_bv.topk(min(TOP_K, logits_bv.shape[-1]))
    values, indices = best.values.softmax(-1).cpu(), best.indices.cpu()
    places = [
        0 if generator is None else int(torch.multinomial(p, 1, generator=generator))
        for p, generator in zip(values, generators, strict=True)
    ]
    return indices[torch.arange(len(places)), torch.tensor(places)]


def spelled(lm: LanguageModel, ids: Sequence[int]) -> str:
    """A written text as it is scored: without end-of-text marks, compatibility characters folded, blank lines as spaces."""
    text = unicodedata.normalize("NFKD", str(lm.tokenizer.decode(list(ids))))
    for mark in lm.special_texts:
        text = text.replace(mark, "")
    return text.replace("\n\n", " ")
