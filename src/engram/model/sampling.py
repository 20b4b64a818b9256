"""Text that a model makes up by itself, from its start token on; the same for the same generator.

Knows next-token sampling and nothing of what the text is for. Source: the released code's sampler
(top-k, no stop at the end-of-text token), with a generator of its own in place of the global one.
"""

from __future__ import annotations

import re
import unicodedata

import torch

from engram.model.language_model import LanguageModel


@torch.no_grad()
def sample_texts(
    lm: LanguageModel,
    count: int,
    tokens: int,
    generator: torch.Generator,
    top_k: int | None = None,
    start: str | None = None,
) -> list[str]:
    """`count` texts of `tokens` sampled tokens each, special tokens left out, white space made
    single.

    Args:
        generator: on the CPU.
        top_k: sample among this many most probable tokens; default: from the whole distribution.
        start: text that they begin with, its tokens counted among `tokens`; default: the start
            token, which is not counted.
    """
    ids = [start_token(lm)] if start is None else lm.encode(start).ids
    past, newest = None, torch.tensor([ids] * count, device=lm.device)
    new: list[torch.Tensor] = [] if start is None else [newest.cpu()]
    for drawn in range(tokens if start is None else max(0, tokens - len(ids))):
        seen = torch.ones(
            count, len(ids) + drawn, dtype=torch.long, device=lm.device
        )  # a start token may double as the pad
        out = lm.model(newest, attention_mask=seen, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits_bv = out.logits[:, -1].float().cpu()
        if top_k is None:
            pick_b1 = torch.multinomial(logits_bv.softmax(-1), 1, generator=generator)
        else:
            best = logits_bv.topk(top_k)
            pick_b1 = best.indices.gather(
                1, torch.multinomial(best.values.softmax(-1), 1, generator=generator)
            )
        new.append(pick_b1)
        newest = pick_b1.to(lm.device)
    texts = lm.tokenizer.batch_decode(torch.cat(new, 1), skip_special_tokens=True)
    return [re.sub(r"\s+", " ", unicodedata.normalize("NFKD", text)).strip() for text in texts]


def start_token(lm: LanguageModel) -> int:
    """What a text begins with: the tokenizer's first special token, as far as it has one."""
    tokenizer = lm.tokenizer
    found = (
        t
        for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        if t is not None
    )
    return int(next(found, 0))
