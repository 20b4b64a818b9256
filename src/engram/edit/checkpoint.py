"""Edit a checkpoint on disk, and take edits out of it again to the last byte.

Only the bytes of the touched tensors change; every other byte and file is copied, unless another
dtype is wanted (stored_dtype.py). A folder
`engram/` beside the weights holds the original tensors and the edits in force, so weights are
always rebuilt from the originals: whatever is taken out, and in whatever order, the rest is rounded
once and exact.

    model.safetensors                original bytes, but for the edited tensors
    engram/record.json               the edits in order, digests of the tensors as they are now
    engram/originals.safetensors     the edited tensors before any edit
    engram/edits/0/, engram/edits/1/ each edit as `Edit.save` writes it

Refuses to know modules and tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import TypedDict

from engram import pocket
from engram.edit.applied import applied
from engram.edit.changes import WeightChanges
from engram.edit.folder_format import (
    LARGEST_WEIGHTS,
    RECIPE,
    Contents,
    Storable,
    change_identity,
    read,
    recipe_digest,
    write,
)
from engram.edit.recipe import check_changes_weights
from engram.edit.safetensors_layout import DTYPES, TensorBytes, find, tensor_locations
from engram.edit.stack import Stack
from engram.edit.stored_dtype import CONFIG, Texts, growth, rewrite, widened
from engram.errors import BaseMismatchError, EngramFileError, NonFiniteError
from engram.files.atomic import atomic_folder, recover_folder, reserved
from engram.files.checksums import stamped, verified
from engram.files.forms import parsed
from engram.files.names import check_regular, inside, read_bytes
from engram.model.checkpoint_files import INDEX
from engram.model.whole_weights import check_numbers

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel


FORMAT_VERSION = 1
_HOME = "engram"  # folder of the record, inside the checkpoint's
_RECORD, _ORIGINALS, _EDITS = "record.json", "originals.safetensors", "edits"
# not fetched from the hub: a repository may hold each weight four times over
_OTHER_FRAMEWORKS = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*.onnx*",
    "onnx/*",
    "*.gguf",
]


class _Row(TypedDict):
    folder: str  # inside the record's
    forced: bool
    sha256: NotRequired[str]  # of its edit.json


class _RecordForm(TypedDict):
    format_version: int
    edits: list[_Row]
    originals: str
    now: dict[str, str]
    stored: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class _Applied:
    """An edit in force on a checkpoint; `forced` if its base was not checked."""

    edit: Contents
    forced: bool


@dataclass(frozen=True)
class _Record:
    """What engram did to a checkpoint: edits in order, original tensors, sha256 of the present
    ones; and where it was written in another dtype, see stored_dtype, the texts of before.
    """

    edits: tuple[_Applied, ...] = ()
    originals: dict[str, Tensor] = field(default_factory=dict)
    stored: Texts = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)


def apply_to_checkpoint(
    edit: Storable,
    source: str | Path,
    folder: str | Path,
    *,
    force: bool = False,
    dtype: str | None = None,
) -> Path:
    """Write a copy of a checkpoint with `edit` in its weights.

    The delta is added in float32 and rounded once into the checkpoint's dtype. A checkpoint that
    engram has edited before takes further edits; those computed on the same base give the weights
    of their composition.

    Args:
        source: a folder with safetensors weights, a name on the Hugging Face hub, or "pocket".
        folder: the copy; must not exist, or be empty.
        force: apply also to weights on which the edit was not computed; their shape has to fit.
        dtype: in which to write all weights, such as "float32"; it has to hold each of them
            exactly. Default: as they are stored, and every other byte is copied; pocket, which is
            computed in float32, is written in float32.
    Returns:
        `folder`.
    Raises:
        BaseMismatchError: the edit was computed on other weights, or something else has changed
            them since engram edited them.
        EngramFileError: no safetensors weights, a damaged checkpoint, or `folder` cannot be
            written; nothing is left there.
        SettingError: a dtype that would round the weights.
    """
    check_changes_weights(edit)
    if str(source) == "pocket":
        dtype = dtype or "float32"
    source = _local(source)
    record = _read_record(source)
    edits = [*record.edits, _Applied(edit.contents(), force)]
    return _rebuild(source, Path(folder), edits, record, dtype)


def revert_checkpoint(source: str | Path, folder: str | Path, edit: Storable | None = None) -> Path:
    """Write a copy of an edited checkpoint without its edits: every byte of the original.

    Args:
        source: folder that `apply_to_checkpoint` wrote.
        folder: the copy; must not exist, or be empty.
        edit: take out only this one, and rebuild the weights from the originals and the others;
            default: all.
    Raises:
        EngramFileError: the checkpoint has no edits of ours, not this one, or its record is
            damaged.
        BaseMismatchError: the weights were changed by something else since, or another edit was
            made on top of `edit`.
    """
    source = _local(source)
    record = _read_record(source)
    if not record.edits:
        raise EngramFileError(
            f"{source} has no edits to take out: there is no {_HOME}/{_RECORD} that "
            "apply_to_checkpoint wrote"
        )
    rest: list[_Applied] = []
    if edit is not None:
        gone = change_identity(edit.contents().deltas)
        # By the change itself: a receipt or a fact's neighbours may have come since.
        identities = [change_identity(one.edit.deltas) for one in record.edits]
        if gone not in identities:
            raise EngramFileError(
                f"{source} does not hold {edit!r}; it holds {[one.edit for one in record.edits]}"
            )
        # An edit may be in force twice; the later one goes, since others may rest on the earlier.
        last = len(identities) - 1 - identities[::-1].index(gone)
        rest = [*record.edits[:last], *record.edits[last + 1 :]]
    return _rebuild(source, Path(folder), rest, record)


def save_edited(
    changes: WeightChanges, lm: LanguageModel, folder: str | Path, *, force: bool = False
) -> Path:
    """Write a model in memory, edited, and its tokenizer as a checkpoint."""
    # Into the weights and never beside them: what is attached would not be in the saved tensors.
    with applied(changes, lm, how="weights", force=force), atomic_folder(folder) as fresh:
        lm.model.save_pretrained(fresh)
        lm.tokenizer.save_pretrained(fresh)
    return Path(folder)


def _rebuild(
    source: Path, folder: Path, edits: Sequence[_Applied], record: _Record, dtype: str | None = None
) -> Path:
    """Copy `source` to `folder`, with `edits` applied to the original weights."""
    if folder.resolve().is_relative_to(source.resolve()):
        raise EngramFileError(
            f"{folder} is the checkpoint {source} itself or inside of it; choose a folder beside it"
        )
    locations, files = tensor_locations(source), _files(source)
    _check_record(source, locations, record)
    stored, texts = widened(source, locations, dtype) if dtype else ({}, {})
    if not edits:
        texts = record.stored  # back to the dtype before the first edit
    size = sum((source / name).stat().st_size for name in files)
    # Tried before the first tensor is read: a full disk after 50 GB would have cost minutes.
    with reserved(folder, folder=True, needs=size + (growth(locations, dtype) if dtype else 0)):
        for place in locations.values():
            if place.dtype in DTYPES:  # one at a time: they may be larger than memory together
                check_numbers(place.tensor(source), f"{place.name} of {source}")
        originals = _originals(source, locations, edits, record, dtype)
        # Also of tensors that no remaining edit touches: they get their original bytes back.
        values = {
            name: _edited(name, original, edits, locations) for name, original in originals.items()
        }
        touched = {find(name, locations).name for one in edits for name in one.edit.deltas}
        with atomic_folder(folder) as fresh:
            _copy(source, fresh, [name for name in files if name not in texts])
            rewrite(source, fresh, texts, locations, values)
            for name, value in values.items():
                if locations[name].file not in texts:
                    locations[name].write(fresh, value)
            if edits:
                kept = {name: originals[name] for name in sorted(touched)}
                _write_record(fresh, edits, kept, stored | record.stored)
    return folder


def _originals(
    source: Path,
    locations: dict[str, TensorBytes],
    edits: Sequence[_Applied],
    record: _Record,
    dtype: str | None,
) -> dict[str, Tensor]:
    """Return the tensors that edits change or have changed as they are without, in `dtype`."""
    # `source` holds edited values of what is recorded, and original ones of everything else.
    originals = dict(record.originals)
    for one in edits:
        for name in one.edit.deltas:
            place = find(name, locations)
            originals.setdefault(place.name, place.tensor(source))
    return {
        name: original.to(getattr(torch, dtype)) if dtype else original
        for name, original in originals.items()
    }


def _edited(
    name: str, original: Tensor, edits: Sequence[_Applied], locations: dict[str, TensorBytes]
) -> Tensor:
    """Return tensor `name` of the checkpoint with all edits applied."""
    # One stack for all edits, so that those computed on one base are rounded once, together.
    stack = None
    for applied_edit in edits:
        for parameter, delta in applied_edit.edit.deltas.items():
            if find(parameter, locations).name != name:
                continue
            made_on = applied_edit.edit.changes.made_on(parameter)
            stack = stack or Stack(original, made_on["transposed"])
            try:
                stack = stack.with_delta(delta, made_on, force=applied_edit.forced)
            except BaseMismatchError as error:
                raise BaseMismatchError(f"{name} with {applied_edit.edit!r}: {error}") from error
    try:
        return stack.weight() if stack else original
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}") from error


def _check_record(source: Path, locations: dict[str, TensorBytes], record: _Record) -> None:
    """Raise unless the weights are as the record says."""
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
            raise _no_record(source / _HOME, f"{name!r} has no original that fits it")
    files = {place.file for place in locations.values()}
    if strange := record.stored.keys() - files - {CONFIG, INDEX}:
        raise _no_record(source / _HOME, f"{min(strange)!r} is no file of this checkpoint")


def _files(source: Path) -> list[str]:
    """Return the names of all files of a checkpoint but the record's.

    Raises:
        EngramFileError: a link that leaves the folder, a linked folder, a pipe, a device.
    """
    names = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if name.split("/")[0] == _HOME or (path.is_dir() and not path.is_symlink()):
            continue
        check_regular(inside(source, name))
        names.append(name)
    return names


def _copy(source: Path, fresh: Path, names: Sequence[str]) -> None:
    """Copy files with fresh permissions (a cache may be read-only); links become files."""
    # copyfile and not copytree: a hub cache holds links to read-only blobs, and the copy has to be
    # written to. It reads and writes bytes, so that no file of the copy is shared with another one.
    for name in names:
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, fresh / name)


def _read_record(source: Path) -> _Record:
    home = source / _HOME
    if not os.path.lexists(home):
        return _Record()
    try:
        path = inside(source, f"{_HOME}/{_RECORD}")
        text = read_bytes(path)
        record = verified(parsed(dict[str, Any], text, path), path)
        if (number := record.get("format_version")) != FORMAT_VERSION:
            raise ValueError(f"format_version={number!r}, this engram reads {FORMAT_VERSION}")
        form: _RecordForm = parsed(_RecordForm, text, path)
        edits = [_applied_edit(home, row) for row in form["edits"]]
        # Checked before they are parsed: damaged originals would be written back as the true ones.
        raw = read_bytes(inside(home, _ORIGINALS), limit=LARGEST_WEIGHTS)
        if _digest(raw) != form["originals"]:
            raise ValueError(f"sha256 of {_ORIGINALS} is not the recorded one")
        return _Record(
            tuple(edits), safetensors.torch.load(raw), form.get("stored", {}), form["now"]
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _no_record(home, error) from error


def _applied_edit(home: Path, row: _Row) -> _Applied:
    folder = inside(home, row["folder"])
    # A folder without its digest is of an older engram.
    if row.get("sha256", digest := recipe_digest(folder)) != digest:
        raise ValueError(f"sha256 of {row['folder']}/{RECIPE} is not the recorded one")
    return _Applied(read(folder), row["forced"])


def _no_record(home: Path, problem: object) -> EngramFileError:
    return EngramFileError(
        f"{home} is not a whole record of edits ({problem}), so the original weights are not "
        "known. Start from the original checkpoint"
    )


def _write_record(
    fresh: Path, edits: Sequence[_Applied], originals: dict[str, Tensor], stored: Texts
) -> None:
    home = fresh / _HOME
    entries = []
    for i, applied_edit in enumerate(edits):
        name = f"{_EDITS}/{i}"
        (home / name).mkdir(parents=True)
        write(applied_edit.edit, home / name)
        row = {"folder": name, "forced": applied_edit.forced}
        entries.append(row | {"sha256": recipe_digest(home / name)})
    raw = safetensors.torch.save(originals)
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
    (home / _RECORD).write_text(json.dumps(stamped(record), indent=1) + "\n", encoding="utf-8")


def _digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def _local(source: str | Path) -> Path:
    """Return the folder of a checkpoint; fetch it from the hub (PyTorch's files only) if it is not
    a folder.
    """
    if str(source) == "pocket":
        return Path(pocket.PATH)
    if (folder := recover_folder(source)).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), ignore_patterns=_OTHER_FRAMEWORKS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EngramFileError(
            f"{str(source)!r} is neither a folder nor a model that the Hugging Face hub gives us "
            f"({type(error).__name__}). Expected a checkpoint's folder, a hub name such as "
            "'openai-community/gpt2', or 'pocket'"
        ) from error
