"""Where results that took long are kept, and the name of the model that they are about.

Knows the folder, and everything of a model that its numbers depend on. Refuses to know what is
kept.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def cache_folder(kind: str, given: str | Path | None = None) -> Path:
    """The folder of one kind of results, made if it is not there: in `given`, in $ENGRAM_CACHE, or
    in ~/.cache/engram.
    """
    folder = Path(given or os.environ.get("ENGRAM_CACHE") or Path.home() / ".cache/engram") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(*parts: str) -> str:
    """sha256 of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
