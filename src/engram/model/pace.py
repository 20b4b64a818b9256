"""How fast a model runs on this machine, from one short run: what guesses of time begin with."""

from __future__ import annotations

import time

import torch

from engram.errors import EngramError
from engram.model.language_model import LanguageModel
from engram.progress import Progress, shows_time

_WORDS = 64
_UNKNOWN = 1e-3  # seconds of a token: of a model that such a text does not fit


def seconds_per_token(lm: LanguageModel, progress: Progress) -> float:
    """Return about how long a forward pass takes for each of its tokens, among some dozens.

    It is measured where `progress` shows times; for any other callback it would be work for
    nothing, and the result is 1.
    """
    if not shows_time(progress):
        return 1.0
    try:
        cloze = lm.cloze(" ".join(["town"] * min(_WORDS, lm.max_tokens // 4)))
    except EngramError:
        return _UNKNOWN
    decoder = None if cloze.decoder_ids is None else [cloze.decoder_ids]
    seconds = []
    for _ in range(2):  # the first run is slower: memory is allocated, kernels are chosen
        began = time.monotonic()
        lm.logits_at([cloze.ids], [cloze.read], decoder)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        seconds.append(time.monotonic() - began)
    return max(1e-7, seconds[1] / max(1, len(cloze.ids)))
