"""Where results that took long are cached.

Knows the folder. Refuses to know what is in it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_folder(kind: str, given: str | Path | None = None) -> Path:
    """Return the folder of one kind of results, made if it is missing: in `given`, in
    $ENGRAM_CACHE, or in ~/.cache/engram.
    """
    folder = Path(given or os.environ.get("ENGRAM_CACHE") or Path.home() / ".cache/engram") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(*parts: str) -> str:
    """Return the sha256 of texts, with a zero byte between them."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
