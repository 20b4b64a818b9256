"""Texts that a model writes: greedy answers and sampled texts, many rows at once.

Rows of about one length go through the model together with its own key and value cache, shorter
ones with pads on their left that nothing sees; where a family cannot do that (it is tried out),
rows of exactly one length. Knows rows. Refuses to know which model each row belongs to: `around`
applies the changes of a batch's rows.

Sampling as in the released code of Meng et al. 2022, arXiv:2202.05262: from the k most probable
tokens, without a stop at an end of text, to a length that includes the prompt; but with generators
of its own in place of the global one.
"""

from __future__ import annotations

import hashlib
import re
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

TOP_K = 5  # as in the released code


@dataclass(frozen=True)
class Writing:
    """One text to be continued.

    Args:
        ids: the prompt's tokens.
        new: tokens to write, at least 1.
        seed: of its draws; None: greedy.
    """

    ids: tuple[int, ...]
    new: int
    seed: int | None = None


def seed_of(*parts: object) -> int:
    """Return a seed that depends on `parts` alone: the same on every machine, in every order."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    # Shifted, since a torch generator takes a signed number of 64 bits; `hash` differs by process.
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def write(
    lm: LanguageModel,
    writings: Sequence[Writing],
    around: RowContext = no_edits,
    *,
    rows_per_batch: int = 512,
) -> list[list[int]]:
    """Return the new tokens of each row.

    Args:
        around: given the numbers of a batch's rows, applies what is in force for them.
    """
    out: list[list[int]] = [[] for _ in writings]
    for batch in _batches(writings, rows_per_batch, pads_on_the_left(lm)):
        with around(batch):
            for i, ids in zip(batch, _written(lm, [writings[i] for i in batch]), strict=True):
                out[i] = ids
    return out


def continuations(lm: LanguageModel, prompts: Sequence[str], tokens: int) -> list[str]:
    """Return the greedy continuation of each prompt, without the prompt, up to an end of text: what
    `lm.generate` writes, of all prompts together.

    Args:
        tokens: to write at most; a prompt that fills the context gets fewer, or none.
    """
    rows = [lm.prompt_ids(prompt) for prompt in prompts]
    room = [min(tokens, lm.max_tokens - len(ids)) for ids in rows]
    if lm.kind != "causal":  # its decoder writes; `write` continues rows
        return [
            lm.generate(prompt, new).removeprefix(prompt) if new > 0 else ""
            for prompt, new in zip(prompts, room, strict=True)
        ]
    writings = {
        i: Writing(tuple(ids), new)
        for i, (ids, new) in enumerate(zip(rows, room, strict=True))
        if new > 0
    }
    texts = [""] * len(prompts)
    for i, new in zip(writings, write(lm, list(writings.values())), strict=True):
        # What comes after an end belongs to another text; `write` writes a fixed number of tokens.
        texts[i] = lm.with_answer(prompts[i], _up_to_end(lm, new)).removeprefix(prompts[i])
    return texts


def _up_to_end(lm: LanguageModel, new: list[int]) -> list[int]:
    ends = getattr(lm.model.generation_config, "eos_token_id", None)
    known = {ends} if isinstance(ends, int) else set(ends or ())
    # With the end itself, as `generate` returns it: special tokens are not decoded.
    return new[: next((i + 1 for i, token in enumerate(new) if token in known), len(new))]


def _batches(writings: Sequence[Writing], limit: int, padded: bool) -> Iterator[list[int]]:
    """Split rows into batches of about one length, or of one length where none may be padded; those
    that write about as much are together.
    """
    lengths = [len(writing.ids) for writing in writings]

    def fits(batch: list[int], i: int) -> bool:
        shortest = lengths[batch[0]]
        return len(batch) < limit and lengths[i] <= (1.3 * shortest + 2 if padded else shortest)

    return batches(range(len(lengths)), fits, key=lambda i: (lengths[i], writings[i].new))


def _written(lm: LanguageModel, rows: Sequence[Writing]) -> list[list[int]]:
    """Return the new tokens of one batch.

    Example: prompts of 3 and 2 tokens, two new ones each; "-" is a pad, which nothing sees.

                  step 0    step 1
        row 0     a b c     d        -> d e      ids_bt of a step; the cache has the columns before
        row 1     - f g     h        -> h i
        position  0 1 2     3                    of row 0; row 1 counts -, 0, 1, 2
    """
    # A generator per row, so that a text does not depend on which rows it is written with.
    generators = [
        None if row.seed is None else torch.Generator().manual_seed(row.seed) for row in rows
    ]
    longest = max(len(row.ids) for row in rows)
    pads_b1 = torch.tensor([[longest - len(row.ids)] for row in rows], device=lm.device)
    ids_bt = torch.tensor(
        [[row.ids[0]] * (longest - len(row.ids)) + list(row.ids) for row in rows], device=lm.device
    )
    # A pad repeats the row's first token: it is masked, but has to be a token.
    cache, columns = None, []
    for step in range(max(row.new for row in rows)):
        real_bt = torch.arange(longest + step, device=lm.device)[None] >= pads_b1
        logits_bv, cache = _next(lm, ids_bt, real_bt, cache)
        # An edit may break a model: NaN is written as token 0 instead of ending the whole run.
        probabilities_bk, tokens_bk = _most_probable(logits_bv.nan_to_num(), TOP_K)
        picks = [
            0 if generator is None else int(torch.multinomial(p_k, 1, generator=generator))
            for p_k, generator in zip(probabilities_bk, generators, strict=True)
        ]
        ids_b1 = tokens_bk.gather(1, torch.tensor(picks)[:, None])
        columns.append(ids_b1[:, 0].tolist())
        ids_bt = ids_b1.to(lm.device)
    # Rows that want fewer tokens are written on to the batch's end and cut here.
    return [list(ids[: row.new]) for row, ids in zip(rows, zip(*columns, strict=True), strict=True)]


@torch.no_grad()
def sample_texts(
    lm: LanguageModel,
    limit: int,
    tokens: int,
    generator: torch.Generator,
    top_k: int | None = None,
    start: str | None = None,
) -> list[str]:
    """Sample `limit` texts of `tokens` tokens each, special tokens left out, white space made
    single.

    One generator draws for all rows, step by step, so a text depends on how many are drawn with it.

    Args:
        generator: on the CPU.
        top_k: sample among this many most probable tokens; default: from the whole distribution.
        start: text that they begin with, its tokens counted among `tokens`; default: the start
            token, which is not counted.
    """
    ids = [_start_token(lm)] if start is None else lm.encode(start).ids
    # All rows are as long, so nothing is padded and one cache serves the batch.
    cache, newest_bt = None, torch.tensor([ids] * limit, device=lm.device)
    columns = [] if start is None else [newest_bt.cpu()]
    for drawn in range(tokens if start is None else max(0, tokens - len(ids))):
        # All real: a start token may double as the pad.
        real_bt = torch.ones(limit, len(ids) + drawn, dtype=torch.bool, device=lm.device)
        logits_bv, cache = _next(lm, newest_bt, real_bt, cache)
        if top_k is None:
            pick_b1 = torch.multinomial(logits_bv.cpu().softmax(-1), 1, generator=generator)
        else:
            probabilities_bk, tokens_bk = _most_probable(logits_bv.cpu(), top_k)
            draw_b1 = torch.multinomial(probabilities_bk, 1, generator=generator)
            pick_b1 = tokens_bk.gather(1, draw_b1)
        columns.append(pick_b1)
        newest_bt = pick_b1.to(lm.device)
    texts = lm.tokenizer.batch_decode(torch.cat(columns, 1), skip_special_tokens=True)
    return [re.sub(r"\s+", " ", unicodedata.normalize("NFKD", text)).strip() for text in texts]


def _start_token(lm: LanguageModel) -> int:
    """Return what a text begins with: the tokenizer's first special token, if it has one."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = [getattr(lm.tokenizer, name) for name in names]
    return int(next((i for i in ids if i is not None), 0))


def _next(
    lm: LanguageModel, ids_bt: Tensor, real_bs: Tensor, cache: Cache | None
) -> tuple[Tensor, Cache | None]:
    """Return the logits [b, v] after the last of these tokens, float32, and the cache that has them
    too.

    Args:
        ids_bt: the tokens that the cache does not have yet.
        real_bs: [b, cached + t] which tokens are no pads.
    """
    settings: dict[str, Any] = {"logits_to_keep": 1} if lm.keeps_logits else {}
    # Position ids only where there are pads: some families do not take them.
    if not bool(real_bs.all()):
        positions_bs = real_bs.long().cumsum(1) - 1
        # Counted from a row's first real token; a pad's own position would be -1.
        settings["position_ids"] = positions_bs[:, -ids_bt.shape[1] :].clamp(min=0)
    read = lm.model(
        ids_bt, attention_mask=real_bs.long(), past_key_values=cache, use_cache=True, **settings
    )
    return read.logits[:, -1].float(), read.past_key_values


def _most_probable(logits_bv: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return probabilities among the k best tokens, and these tokens, [b, k] each on the CPU."""
    # Softmax after the cut: the same as cutting probabilities and dividing by their sum.
    best = logits_bv.topk(min(k, logits_bv.shape[-1]))
    return best.values.softmax(-1).cpu(), best.indices.cpu()


_PADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def pads_on_the_left(lm: LanguageModel) -> bool:
    """Return whether a row with pads in front is computed as it would be alone: tried once per
    model, then remembered.
    """
    if lm.model not in _PADS:
        # Tried and not looked up: no config says what a family does with pads, and one that takes
        # no cache or no position ids fails in a way of its own.
        try:
            _PADS[lm.model] = _try_padding(lm)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            _PADS[lm.model] = False
    return _PADS[lm.model]


def _try_padding(lm: LanguageModel) -> bool:
    vocabulary = int(lm.model.config.get_text_config().vocab_size)
    ids_t = (torch.arange(6, device=lm.device) * 31 + 5) % vocabulary
    both_bt = torch.stack([ids_t, torch.cat([ids_t[:1], ids_t[:1], ids_t[:4]])])
    real_bt = torch.ones_like(both_bt, dtype=torch.bool)
    real_bt[1, :2] = False
    first_bv, cache = _next(lm, both_bt, real_bt, None)
    longer_bt = torch.cat([real_bt, real_bt[:, -1:]], 1)
    second_bv, _ = _next(lm, ids_t[4:5].expand(2, 1), longer_bt, cache)
    alone = [lm.model(ids_t[None, :n], use_cache=False).logits[0, -1].float() for n in (4, 5)]
    # Padded and alone, one step from the prompt and one from the cache.
    tolerance = 1e-4 if torch.finfo(lm.dtype).eps < 1e-5 else 0.05
    return all(
        bool((padded_v - alone_v).norm() <= tolerance * alone_v.norm())
        for padded_v, alone_v in zip((first_bv[1], second_bv[1]), alone, strict=True)
    )


def normalised_text(lm: LanguageModel, ids: Sequence[int]) -> str:
    """Return a written text as it is scored: without end-of-text marks, compatibility characters
    folded, blank lines as spaces.
    """
    text = unicodedata.normalize("NFKD", str(lm.tokenizer.decode(list(ids))))
    for mark in lm.tokens.special_texts:
        text = text.replace(mark, "")
    return text.replace("\n\n", " ")
