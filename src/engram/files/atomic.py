"""Write a file or a folder whole or not at all, even if the process is killed or the disk is full.

`reserved` tries an output's name before the work and holds it for one writer; `atomic_file` and
`atomic_folder` write to a temporary name beside it and rename that.
Knows names and renames. Refuses to know what is in them.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from engram.checks import alternatives
from engram.errors import EngramFileError
from engram.files.locks import locked

log = logging.getLogger(__name__)

_WAIT_S = 60.0  # for another writer of the same name to finish
_FAILED = (OSError, SafetensorError)  # what writers raise on a full disk
_TEMPORARY = ".{name}.new-"  # and random letters
_reservations: dict[Path, int] = {}  # name -> the thread of this process that holds it


@contextmanager
def reserved(
    path: str | Path,
    *,
    folder: bool = False,
    parents: bool = False,
    replaces: str | None = None,
    endings: Collection[str] = (),
    needs: int = 0,
    wait: float = 0.0,
) -> Iterator[Path]:
    """Try an output's name before the work, and hold it for this thread until the block ends.

    Whatever can be known now is an error now and not after an hour: the ending, what is at that
    name, whether a file can be written beside it, free space, another writer. `atomic_file` and
    `atomic_folder` inside the block write under the same reservation.
    What killed writers of this name left is removed, since nobody else can be writing it.

    Args:
        folder: a folder is to be written, with its parents. A link to a folder is followed.
        parents: folders above that are missing are made, and removed if nothing came of it.
        replaces: see `atomic_folder`.
        endings: those that a file's name may have, such as ".png"; empty: any.
        needs: bytes that will be written.
        wait: seconds to wait for another writer.
    Yields:
        The absolute path.
    Raises:
        EngramFileError: it could not be written. EngramError: another one is writing it.
    """
    path = Path(path).absolute()
    if endings and path.suffix.lower() not in endings:
        raise EngramFileError(
            f"{path.name!r} ends in {path.suffix!r}; expected a name that ends in "
            f"{alternatives(sorted(endings))}"
        )
    with ExitStack() as stack:
        try:
            if folder and path.is_symlink():
                path = path.resolve()  # else the link would be replaced, and what it leads to stay
            if folder or parents:
                stack.enter_context(_parents_of(path))
            _refuse_strangers(path, folder, replaces)
            stack.enter_context(_one_writer(path, wait))
            _check_space(path, needs)
        except (OSError, RuntimeError) as error:  # `resolve` of a circle of links raises the latter
            raise _unwritable(path, error) from error
        yield path


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
    with reserved(path, wait=_WAIT_S) as path:
        try:
            handle, name = tempfile.mkstemp(prefix=_temporary(path), dir=path.parent)
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
        except _FAILED as error:
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
    with reserved(folder, folder=True, replaces=replaces, wait=_WAIT_S) as folder:
        try:
            fresh = Path(tempfile.mkdtemp(prefix=_temporary(folder), dir=folder.parent))
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            yield fresh
            fresh.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner only
            # Contents before the rename: after a power cut, a name may else point to empty files.
            for path in [*fresh.rglob("*"), fresh]:
                _sync(path)
            _replace(folder, fresh)
        except _FAILED as error:
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


def _refuse_strangers(path: Path, folder: bool, replaces: str | None) -> None:
    """Raise if something is at `path` that a result may not replace."""
    if not os.path.lexists(path):
        return
    if not folder:
        # A device too: replacing /dev/null would take it from the whole machine.
        if path.exists() and not path.is_file():
            raise EngramFileError(
                f"{path} is a folder, a pipe or a device; expected the name of a file to write"
            )
        return
    if not path.is_dir():
        raise EngramFileError(f"{path} is a file; expected the name of a folder to write")
    if any(path.iterdir()) and not (replaces and (path / replaces).is_file()):
        wanted = "an empty folder, or none"
        if replaces:
            wanted = f"a folder with {replaces}, which would be replaced, or none"
        raise EngramFileError(
            f"{path} holds other files; expected {wanted}. Choose another name, or move it away"
        )


@contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the folders above `path`; those that are empty when the block ends are removed."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # the first one that is not empty
            for parent in missing:
                parent.rmdir()


@contextmanager
def _one_writer(path: Path, wait: float) -> Iterator[None]:
    """Hold `path` for this thread, unless it holds it already, and remove what the killed left."""
    thread = threading.get_ident()
    if _reservations.get(path) == thread:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, wait, path, "Wait until it is done, or write to another name"):
        _reservations[path] = thread
        try:
            _sweep(path)
            # Tried with a name of the same length: a disk may have room for the lock only.
            with tempfile.NamedTemporaryFile(prefix=_temporary(path), dir=path.parent):
                pass
            yield
        finally:
            del _reservations[path]


def _sweep(path: Path) -> None:
    for left in path.parent.glob(glob.escape(_temporary(path)) + "*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    if path.is_dir() and (aside := _aside(path)).exists():
        shutil.rmtree(aside, ignore_errors=True)  # `path` is whole: nobody needs the old one


def _check_space(path: Path, needs: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needs:
        raise EngramFileError(
            f"{path} needs {needs / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free there; free "
            "some space, or choose another folder"
        )


def _temporary(path: Path) -> str:
    return _TEMPORARY.format(name=path.name)


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


def _unwritable(path: Path, error: Exception) -> EngramFileError:
    # The words alone: names in them are those of locks and temporary files.
    why = getattr(error, "strerror", None) or error
    return EngramFileError(
        f"could not write {path}: {why}. What was there before is unchanged; free some space, or "
        "choose a folder that exists and that you may write to"
    )
