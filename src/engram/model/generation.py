"""Texts that a model writes, many rows at once: greedy answers, and sampled continuations with a
generator a row.

Rows of about one length go through the model together with its own key and value cache, shorter
ones behind pads that nothing sees; where a family cannot do that (it is tried out), rows of just
one length. Knows rows. Refuses to know which model each row belongs
to: `around` lays the changes of a batch's rows. Sampling as in the released code of Meng et al.
    2022, arXiv:2202.05262: top 5, no
stop at an end of text, a length that includes the prompt; but with a seed a row.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from engram.batching import batches
from engram.model.language_model import LanguageModel
from engram.modules.hooks import RowContext, no_edits

TOP_K = 5


@dataclass(frozen=True)
class Writing:
    """One text to be written on.

    Args:
        ids: the prompt's tokens; new: tokens to write, at least 1; seed: of its draws, None:
            greedy.
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
    lm: LanguageModel,
    writings: Sequence[Writing],
    around: RowContext = no_edits,
    *,
    rows_per_batch: int = 512,
) -> list[list[int]]:
    """The new tokens of each.

    Args:
        around: given the numbers of the rows of a batch, lays what is in force for them.
    """
    out: list[list[int]] = [[] for _ in writings]
    for batch in _batches(writings, rows_per_batch, pads_on_the_left(lm)):
        with around(batch):
            for i, ids in zip(batch, _written(lm, [writings[i] for i in batch]), strict=True):
                out[i] = ids
    return out


def _batches(writings: Sequence[Writing], limit: int, padded: bool) -> Iterator[list[int]]:
    """Rows of about one length, or of one length where none may be padded; those that write about
    as much together.
    """
    lengths = [len(writing.ids) for writing in writings]

    def fits(batch: list[int], i: int) -> bool:
        shortest = lengths[batch[0]]
        return len(batch) < limit and lengths[i] <= (1.3 * shortest + 2 if padded else shortest)

    return batches(range(len(lengths)), fits, key=lambda i: (lengths[i], writings[i].new))


def _written(lm: LanguageModel, rows: Sequence[Writing]) -> list[list[int]]:
    generators = [
        None if row.seed is None else torch.Generator().manual_seed(row.seed) for row in rows
    ]
    longest = max(len(row.ids) for row in rows)
    pads_b1 = torch.tensor([[longest - len(row.ids)] for row in rows], device=lm.device)
    ids_bt = torch.tensor(
        [[row.ids[0]] * (longest - len(row.ids)) + list(row.ids) for row in rows], device=lm.device
    )
    cache, done = None, []
    for step in range(max(row.new for row in rows)):
        at_1t = torch.arange(longest + step, device=lm.device)[None]
        logits_bv, cache = _next(
            lm, ids_bt, at_1t >= pads_b1, (at_1t - pads_b1)[:, -ids_bt.shape[1] :], cache
        )
        chosen_b = _chosen(logits_bv, generators)
        done.append(chosen_b.tolist())
        ids_bt = chosen_b[:, None].to(lm.device)
    return [
        list(tokens[: row.new]) for row, tokens in zip(rows, zip(*done, strict=True), strict=True)
    ]


def _next(
    lm: LanguageModel, ids_bt: Tensor, real_bt: Tensor, places_bt: Tensor, cache: Cache | None
) -> tuple[Tensor, Cache | None]:
    """Logits [b, v] behind the last of these tokens, and the cache that holds them too.

    Args:
        real_bt: [b, cached + t] which tokens are no pads; places_bt: [b, t] the place of each in
            its text.
    """
    options: dict[str, Any] = {"logits_to_keep": 1} if lm._keeps_logits else {}
    if not bool(real_bt.all()):
        options["position_ids"] = places_bt.clamp(min=0)
    read = lm.model(
        ids_bt, attention_mask=real_bt.long(), past_key_values=cache, use_cache=True, **options
    )
    return read.logits[:, -1].float().nan_to_num(), read.past_key_values


_PADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def pads_on_the_left(lm: LanguageModel) -> bool:
    """Whether a row that stands behind pads is computed as it would be alone: tried once a model,
    then remembered.
    """
    if lm.model not in _PADS:
        try:
            _PADS[lm.model] = _try_padding(lm)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            _PADS[lm.model] = False
    return _PADS[lm.model]


def _try_padding(lm: LanguageModel) -> bool:
    ids_t = (torch.arange(6, device=lm.device) * 31 + 5) % int(
        lm.model.config.get_text_config().vocab_size
    )
    both_bt = torch.stack([ids_t, torch.cat([ids_t[:1], ids_t[:1], ids_t[:4]])])
    real_bt = torch.ones_like(both_bt, dtype=torch.bool)
    real_bt[1, :2] = False
    places_bt = torch.arange(6, device=lm.device)[None] - torch.tensor([[0], [2]], device=lm.device)
    more_b1 = ids_t[4:5].expand(2, 1)
    after_bt = torch.cat([real_bt, real_bt[:, -1:]], 1)
    first_bv, cache = _next(lm, both_bt, real_bt, places_bt, None)
    second_bv, _ = _next(lm, more_b1, after_bt, places_bt[:, -1:] + 1, cache)
    alone = [lm.model(ids_t[None, :n], use_cache=False).logits[0, -1].float() for n in (4, 5)]
    tolerance = 1e-4 if torch.finfo(lm.dtype).eps < 1e-5 else 0.05
    return all(
        bool((got_v - wanted_v).norm() <= tolerance * wanted_v.norm())
        for got_v, wanted_v in zip((first_bv[1], second_bv[1]), alone, strict=True)
    )


def _chosen(logits_bv: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    best = logits_bv.topk(min(TOP_K, logits_bv.shape[-1]))
    values, indices = best.values.softmax(-1).cpu(), best.indices.cpu()
    places = [
        0 if generator is None else int(torch.multinomial(p, 1, generator=generator))
        for p, generator in zip(values, generators, strict=True)
    ]
    return indices[torch.arange(len(places)), torch.tensor(places)]


def normalised_text(lm: LanguageModel, ids: Sequence[int]) -> str:
    """A written text as it is scored: without end-of-text marks, compatibility characters folded,
    blank lines as spaces.
    """
    text = unicodedata.normalize("NFKD", str(lm.tokenizer.decode(list(ids))))
    for mark in lm.special_texts:
        text = text.replace(mark, "")
    return text.replace("\n\n", " ")
