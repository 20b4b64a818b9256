"""Fetch a published file once: with progress, resumed where it broke off, and checked when it is
used again.

Where no checksum is published, that of the first download is kept beside the file, and the file is
compared with it from then on.
"""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException
from pathlib import Path

from engram.errors import EngramError
from engram.files.names import inside, open_regular, read_text
from engram.progress import Progress, no_progress

_TRIES = 4
_CHUNK = 1 << 20
_LARGEST = 1 << 33  # bytes; the largest published file has half a gigabyte


def fetched(
    url: str, folder: Path, *, sha256: str | None = None, progress: Progress = no_progress
) -> Path:
    """Return the file of a URL in `folder`, downloaded if it is missing.

    Args:
        sha256: its checksum; None: that of the first download.
        progress: called with (name, bytes so far, bytes in all).
    Raises:
        EngramError: it could not be fetched, or is not what it was.
    """
    path = inside(folder, url.rpartition("/")[2])
    noted = path.with_name(path.name + ".sha256")
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngramError(
                f"{path.name} cannot be kept: {error}; set ENGRAM_CACHE to a folder that you may "
                "write to"
            ) from error
        part = path.with_name(path.name + ".part")
        _download(url, part, path.name, progress)
        # Of the whole file on disk, not summed up while it came: a resumed part came in another
        # session.
        digest = file_sha256(part)
        if sha256 is not None and digest != sha256:
            part.unlink()
            raise EngramError(
                f"{url} has sha256 {digest}, expected {sha256}: the file has changed or was "
                "damaged on its way. Try again"
            )
        # Checksum first, then the name: after a kill in between the file is fetched again, whereas
        # the other order would leave a file that nobody checks.
        noted.write_text(digest + "\n", encoding="utf8")
        part.replace(path)
        return path
    expected = sha256 or (read_text(noted).strip() if noted.is_file() else None)
    if expected is not None and (digest := file_sha256(path)) != expected:
        raise EngramError(
            f"{path} has sha256 {digest}, expected {expected}: it was changed. Delete it, and it "
            "is fetched again"
        )
    return path


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _download(url: str, part: Path, name: str, progress: Progress) -> None:
    """Download to `part`, after the bytes that it has; reconnect a few times.

    The server's name of the version is kept in a file beside it: if the file has changed since, the
    server sends all of it.
    """
    version = part.with_name(part.name + ".version")
    last: Exception | None = None
    for _ in range(_TRIES):
        have = part.stat().st_size if part.is_file() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        # Without If-Range a server whose file has changed would send the rest of the new one, and
        # the two halves would be joined.
        if have and version.is_file():
            headers["If-Range"] = read_text(version)
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                if answer.status != 206:  # the whole file, whatever was requested
                    have = 0
                    _note(version, answer.headers)
                # 0 without the header (chunked answers): then whatever came counts as all.
                total = have + int(answer.headers.get("Content-Length") or 0)
                _check_size(url, total)
                with part.open("ab" if have else "wb") as file:
                    while chunk := answer.read(_CHUNK):
                        file.write(chunk)
                        have += len(chunk)
                        _check_size(url, have)
                        progress(name, have, max(total, have))
            # A connection that breaks off ends the loop above without an error, so the length
            # decides.
            if have >= total:
                version.unlink(missing_ok=True)
                return
            last = EngramError(f"{have} of {total} bytes came")
        except urllib.error.HTTPError as error:
            if error.code == 416:  # no bytes after these: the part was whole, or of another file
                part.unlink(missing_ok=True)
            last = error
            error.close()
        except (OSError, HTTPException, ValueError) as error:
            last = error
    raise EngramError(
        f"{url} could not be fetched: {last or 'no answer'}. Try again (what came is kept), or "
        "download it by other means and give its path"
    )


def _check_size(url: str, size: int) -> None:
    if size > _LARGEST:
        raise EngramError(
            f"{url} has over {_LARGEST / 1e9:.0f} GB, more than any published data set; the "
            "rest was not fetched"
        )


def _note(version: Path, headers: Message) -> None:
    """Keep what identifies the version of a file byte by byte; a weak tag, W/"...", does not."""
    tag = headers.get("ETag") or ""
    named = tag if tag.startswith('"') else headers.get("Last-Modified")
    if named:
        version.write_text(named, encoding="utf8")
    else:
        version.unlink(missing_ok=True)
