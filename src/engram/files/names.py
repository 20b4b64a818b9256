"""Names that a file gives, and files that somebody else wrote: data, never trusted.

A checkpoint's index, a ledger or an edit names other files. Such a name leads to a regular file
inside the folder of the file that gives it, or to an error. Knows paths. Refuses to know what is
in the files.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path, PurePosixPath, PureWindowsPath

from engram.checks import briefly
from engram.errors import EngramFileError

_LARGEST = 1 << 30  # bytes of a file that is read whole and is not weights


def inside(folder: str | Path, name: object) -> Path:
    """Return the path of `name`, as a file gives it, inside `folder`.

    Args:
        folder: as the user gave it: it may itself be a link.
        name: a relative name, with `/` between its parts.
    Raises:
        EngramFileError: no name, an absolute one, one with `..`, or a link that leaves the folder.
            (Snapshots of the Hugging Face cache are links into its `blobs`: those are followed.)
    Example:
        >>> from engram.files.names import inside
        >>> inside("checkpoint", "../victim.safetensors")
        Traceback (most recent call last):
        engram.errors.EngramFileError: '../victim.safetensors' is no name of a file inside \
checkpoint; the file that names it was changed or damaged
    """
    refused = EngramFileError(
        f"{briefly(name)} is no name of a file inside {folder}; the file that names it was changed "
        "or damaged"
    )
    if not isinstance(name, str) or not name or "\0" in name:
        raise refused
    for flavour in (PurePosixPath, PureWindowsPath):  # one answer, whatever the system
        parts = flavour(name)
        if parts.is_absolute() or parts.drive or parts.root or ".." in parts.parts:
            raise refused
    folder = Path(folder)
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, too long a name
        raise refused from error
    if not target.is_relative_to(home) and not _is_blob_of(home, target):
        raise EngramFileError(f"{path} is a link that leaves its folder; expected a regular file")
    return path


def _is_blob_of(snapshot: Path, target: Path) -> bool:
    """Return whether `target` is where the hub's cache keeps the contents of this snapshot."""
    # models--owner--name/snapshots/REVISION/config.json -> models--owner--name/blobs/HASH
    for folder in (snapshot, *snapshot.parents):
        if folder.parent.name == "snapshots":
            return target.parent == folder.parent.parent / "blobs"
    return False


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file to read its bytes; a pipe never makes us wait.

    Raises:
        EngramFileError: a folder, a pipe, a device. OSError: it cannot be opened.
    """
    # Opened first and looked at then: what is at the name cannot change in between.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        raise EngramFileError(f"{path} is {_kind(kind)}; expected a regular file")
    return os.fdopen(handle, "rb")


def check_regular(path: str | Path) -> None:
    """Raise unless `path` is a regular file, before another library opens it by its name.

    Raises:
        EngramFileError: a folder, a pipe, a device. OSError: it cannot be opened.
    """
    open_regular(path).close()


def read_bytes(path: str | Path, limit: int = _LARGEST) -> bytes:
    """Return the bytes of a regular file.

    Args:
        limit: bytes; a larger file is refused, since its contents would fill the memory.
    Raises:
        EngramFileError: see `open_regular`, or larger. OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise EngramFileError(
                f"{path} has {size / 1e6:,.0f} MB; expected at most {limit / 1e6:,.0f} MB"
            )
        return file.read()


def read_text(path: str | Path, limit: int = _LARGEST, encoding: str = "utf-8") -> str:
    """Return the text of a regular file.

    Raises:
        EngramFileError: see `read_bytes`, or no text in this encoding. OSError: it cannot be read.
    """
    try:
        return read_bytes(path, limit).decode(encoding)
    except UnicodeDecodeError as error:
        raise EngramFileError(f"{path} is no text in {encoding}: {error}") from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")
