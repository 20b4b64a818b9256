"""Context templates: short texts that a model samples, put before a prompt so that an edit holds wherever the prompt stands.

Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.1 and Appendix E.5, and arXiv:2210.07229; lengths as released.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engram.editors.sampling import sample_texts
from engram.language_model import LanguageModel

RELEASED = ((5, 10), (10, 10))  # (tokens with the start token, how many texts)


STARTED = ("The", "Therefore", "Because", "I", "You")  # MEMIT's, each continued to 10 tokens


def sample_contexts(
    lm: LanguageModel,
    *,
    seed: int = 0,
    lengths: Sequence[tuple[int, int]] = RELEASED,
    started: Sequence[str] = (),
) -> tuple[str, ...]:
    """Templates with one `{}` each: the bare "{}", then texts that `lm` samples (top-k 5), each ended by ". ".

    Args:
        lengths: (tokens, count) pairs; `tokens` counts the start token too, as in the released code: 5 gives 4 new ones.
        started: words that a text each begins with, instead of `lengths`; 10 tokens in all (MEMIT).
    """
    generator = torch.Generator().manual_seed(seed)
    if started:
        texts = [text for word in started for text in sample_texts(lm, 1, 10, generator, top_k=5, start=word)]
    else:
        texts = [text for tokens, count in lengths for text in sample_texts(lm, count, tokens - 1, generator, top_k=5)]
    return "{}", *(text.replace("{", "(").replace("}", ")") + ". {}" for text in texts)
