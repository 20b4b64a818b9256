"""Which model is this: a digest of everything that its numbers depend on, edits in force included.

Knows weights, config, tokenizer and attached changes. Refuses to know what a result is about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engram.edit.in_force import attached_to
from engram.files.cache_folder import sha256_of
from engram.modules.fingerprints import fingerprints

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel


def identity(lm: LanguageModel) -> str:
    """Return a digest of what a model computes: equal for equal weights in one dtype, equal config
    and equal tokenizer, whatever the model is called.
    """
    return identity_of(lm, fingerprints(lm.model))


def identity_of(lm: LanguageModel, prints: Mapping[str, str], *more: str) -> str:
    """Return the same for a part of the weights, by their fingerprints, together with `more` that a
    result depends on.
    """
    # weights alone do not decide: the config scales logits, the tokenizer makes the ids
    model = json.dumps([dict(prints), _config(lm)], sort_keys=True, default=str)
    return sha256_of(tokenizer_text(lm), model, *attached_to(lm.model), *more)


def tokenizer_text(lm: LanguageModel) -> str:
    """Return the tokenizer as JSON without truncation and padding: every call sets them, and they
    stay set after it, so that they would make equal tokenizers differ.
    """
    return _without_settings(lm.tokenizer.backend_tokenizer.to_str())


@lru_cache(maxsize=2)  # of a vocabulary of 262,144 it takes half a second, for every layer of a C
def _without_settings(text: str) -> str:
    tokenizer = json.loads(text)
    return json.dumps(
        {name: part for name, part in tokenizer.items() if name not in ("truncation", "padding")}
    )


def _config(lm: LanguageModel) -> dict[str, Any]:
    """Return the config without where it was loaded from and by which version of transformers."""
    config = lm.model.config.to_dict()
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name != "transformers_version"
    }
