"""Context templates: short texts that a model samples, put before a prompt so that an edit holds wherever the prompt stands.

Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.1 and Appendix E.5; lengths as released.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engram.editors.sampling import sample_texts
from engram.language_model import LanguageModel

RELEASED = ((5, 10), (10, 10))  # (tokens with the start token, how many texts)


def sample_contexts(lm: LanguageModel, *, seed: int = 0, lengths: Sequence[tuple[int, int]] = RELEASED) -> tuple[str, ...]:
    """Templates with one `{}` each: the bare "{}", then texts that `lm` samples (top-k 5), each ended by ". ".

    Args:
        lengths: (tokens, count) pairs; `tokens` counts the start token too, as in the released code: 5 gives 4 new ones.
    """
    generator = torch.Generator().manual_seed(seed)
    templates = ["{}"]
    for tokens, count in lengths:
        for text in sample_texts(lm, count, tokens - 1, generator, top_k=5):
            templates.append(text.replace("{", "(").replace("}", ")") + ". {}")
    return tuple(templates)
