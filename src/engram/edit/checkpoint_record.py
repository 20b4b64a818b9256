"""What engram did to a checkpoint, kept in a folder `engram/` beside its weights.

    engram/record.json               the edits in order, digests of the tensors as they are now
    engram/originals.safetensors     the edited tensors before any edit
    engram/edits/0/, engram/edits/1/ each edit as `Edit.save` writes it

`record.json` has a checksum of its own contents and the digests of everything beside it, so that
damage is noticed. Somebody who computes them again may put other originals there: reverting a
checkpoint of others gives what they say it was.

Knows the record, version 1. Refuses to know how a checkpoint is rebuilt from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import TypedDict

from engram.edit.folder_format import LARGEST_WEIGHTS, RECIPE, Contents, read, recipe_digest, write
from engram.edit.safetensors_layout import DTYPES, TensorBytes, find, tensor_locations
from engram.edit.stored_dtype import CONFIG, Texts
from engram.errors import BaseMismatchError, EngramFileError
from engram.files.checksums import stamped
from engram.files.forms import read_record
from engram.files.names import inside, read_bytes
from engram.model.checkpoint_files import INDEX

FORMAT_VERSION = 1
HOME, NAME = "engram", "record.json"  # folder of the record, inside the checkpoint's, and its file
_ORIGINALS, _EDITS = "originals.safetensors", "edits"


class _Row(TypedDict):
    folder: str  # inside the record's
    forced: bool
    sha256: NotRequired[str]  # of its edit.json


class _Form(TypedDict):
    format_version: int
    edits: list[_Row]
    originals: str
    now: dict[str, str]
    stored: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class AppliedEdit:
    """An edit in force on a checkpoint; `forced` if its base was not checked."""

    edit: Contents
    forced: bool


@dataclass(frozen=True)
class Record:
    """What engram did to a checkpoint: edits in order, original tensors, sha256 of the present
    ones; and where it was written in another dtype, see stored_dtype, the texts of before.
    """

    edits: tuple[AppliedEdit, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    stored: Texts = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)


def check_record(source: Path, locations: Mapping[str, TensorBytes], record: Record) -> None:
    """Raise unless the weights are as the record says.

    Raises:
        BaseMismatchError: something else changed them. EngramFileError: the record is not of this
            checkpoint.
    """
    # Of the edited tensors only: to read all of a checkpoint would take longer than the edit.
    for name, digest in record.now.items():
        if name not in locations or _digest(locations[name].read(source)) != digest:
            raise BaseMismatchError(
                f"{name} of {source} is not as engram left it: something else has changed the "
                "checkpoint since. Start from the original checkpoint, or from a copy that only "
                "engram has edited"
            )
    edited = {find(name, locations).name for one in record.edits for name in one.edit.deltas}
    for name in record.now.keys() | record.originals.keys() | edited:
        place, original = locations.get(name), record.originals.get(name)
        if (
            place is None
            or original is None
            or name not in record.now
            or (original.dtype, tuple(original.shape)) != (DTYPES.get(place.dtype), place.shape)
        ):
            raise _no_record(source / HOME, f"{name!r} has no original that fits it")
    files = {place.file for place in locations.values()}
    if strange := record.stored.keys() - files - {CONFIG, INDEX}:
        raise _no_record(source / HOME, f"{min(strange)!r} is no file of this checkpoint")


def read_edits(source: Path) -> Record:
    """Return the record of a checkpoint; an empty one where it has none.

    Raises:
        EngramFileError: damaged, or of another format version.
    """
    home = source / HOME
    if not os.path.lexists(home):
        return Record()
    try:
        path = inside(source, f"{HOME}/{NAME}")
        record: _Form = read_record(path, _Form, "record", version=FORMAT_VERSION)
        edits = [_applied_edit(home, row) for row in record["edits"]]
        # Checked before they are parsed: damaged originals would be written back as the true ones.
        raw = read_bytes(inside(home, _ORIGINALS), limit=LARGEST_WEIGHTS)
        if _digest(raw) != record["originals"]:
            raise ValueError(f"sha256 of {_ORIGINALS} is not the recorded one")
        originals = safetensors.torch.load(raw)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise _no_record(home, error) from error
    return Record(tuple(edits), originals, record.get("stored", {}), record["now"])


def _applied_edit(home: Path, row: _Row) -> AppliedEdit:
    folder = inside(home, row["folder"])
    # A folder without its digest is of an older engram.
    if row.get("sha256", digest := recipe_digest(folder)) != digest:
        raise ValueError(f"sha256 of {row['folder']}/{RECIPE} is not the recorded one")
    return AppliedEdit(read(folder), row["forced"])


def _no_record(home: Path, problem: object) -> EngramFileError:
    return EngramFileError(
        f"{home} is not a whole record of edits ({problem}), so the original weights are not "
        "known. Start from the original checkpoint"
    )


def write_record(
    fresh: Path, edits: Sequence[AppliedEdit], originals: Mapping[str, Tensor], stored: Texts
) -> None:
    """Write the record of an edited checkpoint, whose weights are written already."""
    home = fresh / HOME
    entries = []
    for i, applied_edit in enumerate(edits):
        name = f"{_EDITS}/{i}"
        (home / name).mkdir(parents=True)
        write(applied_edit.edit, home / name)
        row = {"folder": name, "forced": applied_edit.forced}
        entries.append(row | {"sha256": recipe_digest(home / name)})
    raw = safetensors.torch.save(dict(originals))
    (home / _ORIGINALS).write_bytes(raw)
    # Read back from the copy, and not computed from memory: what is recorded is what is on disk.
    locations = tensor_locations(fresh)
    now = {name: _digest(locations[name].read(fresh)) for name in originals}
    record = {
        "format_version": FORMAT_VERSION,
        "edits": entries,
        "originals": _digest(raw),
        "now": now,
        **({"stored": stored} if stored else {}),
    }
    (home / NAME).write_text(json.dumps(stamped(record), indent=1) + "\n", encoding="utf-8")


def _digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()
