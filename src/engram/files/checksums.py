"""Checksums of JSON contents: one letter that changed since they were written is noticed.

Protects from damage, and from a change by hand that forgot the rest. Does not protect from somebody
who computes the checksum again: for that, compare the file with one from a source you trust.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram.errors import EngramFileError

log = logging.getLogger(__name__)

FIELD = "checksum"


def checksum(record: Mapping[str, Any]) -> str:
    """Return the sha256 of a record's contents, whatever the order of its keys and its spaces."""
    rest = {name: value for name, value in record.items() if name != FIELD}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def stamped(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with its checksum.

    Example:
        >>> from engram.files.checksums import stamped, verified
        >>> record = stamped({"target": "Rome"})
        >>> verified(record, "edit.json")
        {'target': 'Rome'}
        >>> verified(record | {"target": "Pome"}, "edit.json")
        Traceback (most recent call last):
        engram.errors.EngramFileError: edit.json is damaged: its contents are not those that were \
written (another checksum). Copy it again from its source
    """
    return {**record, FIELD: checksum(record)}


def verified(record: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """Return the record without its checksum, after comparing it; a record of an older engram,
    which has none, passes with a note in the log.

    Args:
        record: as JSON gives it.
        where: the file, for the message.
    Raises:
        EngramFileError: the contents changed since they were written.
    """
    if FIELD not in record:
        note_unchecked(where)
    elif record[FIELD] != checksum(record):
        raise EngramFileError(
            f"{where} is damaged: its contents are not those that were written (another "
            "checksum). Copy it again from its source"
        )
    return {name: value for name, value in record.items() if name != FIELD}


_noted: set[str] = set()  # a run file of an older engram has thousands of rows


def note_unchecked(where: str | Path) -> None:
    """Log, once a file, that it is of an older engram, which wrote no checksum."""
    if str(where) not in _noted:
        _noted.add(str(where))
        log.warning("%s has no checksum (an older engram wrote it): not checked for damage", where)
