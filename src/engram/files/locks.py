"""One writer at a time: a lock between processes that ends with the process that holds it."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from engram.errors import EngramError, EngramFileError

# some network folders have no locks: there, as before locks, the last writer wins
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def locked(path: Path, wait: float, what: str | Path, advice: str) -> Iterator[None]:
    """Hold the lock at `path` for the length of the block; the lock of a killed process ends with
    it, and its file is removed with the block.

    Args:
        wait: seconds to wait for another process or thread.
        what, advice: of the error: what the lock is for, and what to do.
    Raises:
        EngramError: another one holds it still.
    """
    until = time.monotonic() + wait
    while True:
        with _lock_file(path) as file:
            _take(file, until, wait, what, advice)
            if not _is_at(file, path):
                continue  # its last holder removed it while we waited: it locks nothing any more
            try:
                file.truncate(0)
                # unbuffered: on a full disk a buffer would fail once more when the file is closed
                os.write(file.fileno(), str(os.getpid()).encode())
                yield
            finally:
                path.unlink(missing_ok=True)  # before the lock ends: nobody else can hold it yet
            return


def _lock_file(path: Path) -> IO[str]:
    """Open the file of a lock, made if it is missing; in a folder of others it may be anything."""
    # A link there may lead to any file, which would be emptied; a pipe would make us wait.
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    strange = EngramFileError(f"{path} is no regular file, so it cannot be a lock; remove it")
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | careful, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise strange from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise strange
    return os.fdopen(handle, "r+", errors="replace")


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _take(file: IO[str], until: float, wait: float, what: str | Path, advice: str) -> None:
    try:
        import fcntl  # not at the top: it does not exist on Windows, and only locking needs it
    except ImportError:
        return None
    # flock and not a file that exists: the kernel lets go of it when the process is killed.
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.02)
                continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        file.seek(0)
        raise EngramError(
            f"{what} is being written by process {file.read(20) or 'unknown'}"
            + f", for more than {wait:g} s now" * (wait > 0)
            + f". {advice}"
        )
