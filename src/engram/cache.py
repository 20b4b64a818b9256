"""Where results that took long are kept, and the name of the model that they are about.

Knows the folder, and everything of a model that its numbers depend on. Refuses to know what is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram.merging import beside, fingerprints

if TYPE_CHECKING:
    from engram.language_model import LanguageModel


def cache_folder(kind: str, given: str | Path | None = None) -> Path:
    """The folder of one kind of results, made if it is not there: in `given`, in $ENGRAM_CACHE, or in ~/.cache/engram."""
    folder = Path(given or os.environ.get("ENGRAM_CACHE") or Path.home() / ".cache/engram") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(*parts: str) -> str:
    """sha256 of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def identity(lm: LanguageModel) -> str:
    """Names a model by what it computes: equal weights, in one dtype, equal config and tokenizer; whatever it is called."""
    return identity_of(lm, fingerprints(lm.model))


def identity_of(lm: LanguageModel, prints: Mapping[str, str], *more: str) -> str:
    """The same of a part of the weights, by their fingerprints, together with whatever else a result depends on."""
    model = json.dumps([dict(prints), _config(lm)], sort_keys=True, default=str)
    return sha256_of(tokenizer_text(lm), model, *beside(lm.model), *more)


def tokenizer_text(lm: LanguageModel) -> str:
    """The tokenizer as JSON, without truncation and padding, which every call sets anew and leaves behind."""
    tokenizer = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: part for name, part in tokenizer.items() if name not in ("truncation", "padding")})


def _config(lm: LanguageModel) -> dict[str, Any]:
    """Without where it was loaded from and by which version of transformers."""
    config = lm.model.config.to_dict()
    return {name: value for name, value in config.items() if not name.startswith("_") and name != "transformers_version"}
