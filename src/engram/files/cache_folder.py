"""Where results that took long are cached.

A cache that cannot be written costs time and nothing else: that is logged once, and work goes on.
Knows the folder. Refuses to know what is in it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram.errors import EngramError

log = logging.getLogger(__name__)


def cache_folder(kind: str, given: str | Path | None = None) -> Path:
    """Return the folder of one kind of results, made if it is missing and can be made: in `given`,
    in $ENGRAM_CACHE, or in ~/.cache/engram.
    """
    folder = Path(given or os.environ.get("ENGRAM_CACHE") or Path.home() / ".cache/engram") / kind
    with written_if_possible(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


_reported: set[Path] = set()  # folders of which it was said that they cannot be written


@contextmanager
def written_if_possible(folder: Path) -> Iterator[None]:
    """Write to a cache's folder within the block; where that fails, say so once and go on."""
    try:
        yield
    except (EngramError, OSError, sqlite3.Error) as error:
        if folder not in _reported:
            _reported.add(folder)
            log.warning(
                "%s cannot be written: %s. What is computed is used, but not kept", folder, error
            )


def sha256_of(*parts: str) -> str:
    """Return the sha256 of texts, with a zero byte between them."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
