"""Write a file or a folder whole or not at all, even if the process is killed or the disk is full.

Knows names and renames. Refuses to know what is in them.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engram.errors import EngramFileError

log = logging.getLogger(__name__)

_STALE_S = 3600.0  # temporary names this old belong to a writer that was killed


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; the file replaces `path` when the block ends well, and
    vanishes otherwise.

    A writer killed at any moment leaves the old file or the new one.

    Args:
        path: in a folder that exists.
    Raises:
        EngramFileError: it cannot be written (disk full, no permission, no such folder).
    """
    path = Path(path).absolute()
    try:
        _sweep(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.new-", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _unwritable(path, error) from error
    fresh = Path(name)
    try:
        yield fresh
        fresh.chmod(0o666 & ~_umask())  # mkstemp's files are for their owner only
        _sync(fresh)
        fresh.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path, replaces: str | None = None) -> Iterator[Path]:
    """Give a temporary folder to write into; it becomes `folder` when the block ends well, and
    vanishes otherwise.

    A writer killed at any moment leaves the old folder or the new one. A folder cannot be replaced
    in one step everywhere, so the old one is renamed first, to a name that `recover_folder` finds:

        1. write .edit.new-x1y2     killed here: edit is the old one
        2. edit -> .edit.old        killed here: recover_folder gives .edit.old
        3. .edit.new-x1y2 -> edit   killed here: edit is the new one
        4. remove .edit.old

    Args:
        folder: where the result goes; its parents are made.
        replaces: file by which a folder that may be replaced is known; None: only an empty folder
            may exist.
    Raises:
        EngramFileError: something else is at `folder`, or it cannot be written (disk full, no
            permission).
    """
    folder = Path(folder).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(folder, replaces)
        _sweep(folder)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner only
        # Contents before the rename: after a power cut, a name may else point to empty files.
        for path in [*fresh.rglob("*"), fresh]:
            _sync(path)
        _replace(folder, fresh)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def recover_folder(folder: str | Path) -> Path:
    """Return `folder`, or where its old contents are if a writer was killed between two renames."""
    folder = Path(folder).absolute()
    aside = _aside(folder)
    if not folder.exists() and aside.exists():
        log.warning(
            "%s was being replaced when its writer was killed; using the old contents in %s",
            folder,
            aside,
        )
        return aside
    return folder


def _replace(folder: Path, fresh: Path) -> None:
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)  # `folder` is whole: nobody needs the old one
        folder.rename(aside)
    try:
        fresh.rename(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_strangers(folder: Path, replaces: str | None) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise EngramFileError(f"{folder} is a file; expected the name of a folder to write")
    if any(folder.iterdir()) and not (replaces and (folder / replaces).is_file()):
        wanted = "an empty folder, or none"
        if replaces:
            wanted = f"a folder with {replaces}, which would be replaced, or none"
        raise EngramFileError(
            f"{folder} holds other files; expected {wanted}. Choose another name, or move it away"
        )


def _sweep(target: Path) -> None:
    """Remove what writers of `target` left that were killed an hour ago or more."""
    for path in target.parent.glob(f".{target.name}.new-*"):
        if time.time() - path.stat().st_mtime > _STALE_S:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.old"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # it can only be read by setting it
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _unwritable(path: Path, error: OSError) -> EngramFileError:
    return EngramFileError(
        f"could not write {path}: {error}. What was there before is unchanged; free some space, or "
        "choose a folder that exists and that you may write to"
    )
