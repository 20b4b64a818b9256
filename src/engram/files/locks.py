"""One writer at a time: a lock between processes that ends with the process that holds it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from engram.errors import EngramError


@contextmanager
def locked(path: Path, wait: float, what: str | Path, advice: str) -> Iterator[None]:
    """Hold the lock at `path` for the length of the block; the lock of a killed process ends with
    it.

    Args:
        wait: seconds to wait for another process or thread.
        what, advice: of the error: what the lock is for, and what to do.
    Raises:
        EngramError: another one holds it still.
    """
    with path.open("a+") as file:
        _take(file, time.monotonic() + wait, wait, what, advice)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _take(file: IO[str], until: float, wait: float, what: str | Path, advice: str) -> None:
    import fcntl  # not at the top: it does not exist on Windows, and only locking needs it

    # flock and not a file that exists: the kernel lets go of it when the process is killed.

    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.02)
                continue
        file.seek(0)
        raise EngramError(
            f"{what} is being written by process {file.read() or 'unknown'}, for more than "
            f"{wait:g} s now. {advice}"
        )
