"""Edit a checkpoint on disk, and take edits out of it again to the last byte.

Only the bytes of the touched tensors change; every other byte and file is copied. A folder
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
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from engram import pocket
from engram.edit.applied import applied
from engram.edit.changes import WeightChanges
from engram.edit.folder_format import Contents, Storable, change_identity, read, write
from engram.edit.recipe import check_changes_weights
from engram.edit.safetensors_layout import TensorBytes, find, tensor_locations
from engram.edit.stack import Stack
from engram.errors import BaseMismatchError, EngramFileError, NonFiniteError
from engram.files.atomic import atomic_folder, recover_folder

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


@dataclass(frozen=True)
class _Applied:
    """An edit in force on a checkpoint; `forced` if its base was not checked."""

    edit: Contents
    forced: bool


@dataclass(frozen=True)
class _Record:
    """What engram did to a checkpoint: edits in order, original tensors, sha256 of the present
    ones.
    """

    edits: tuple[_Applied, ...] = ()
    originals: dict[str, Tensor] | None = None
    now: dict[str, str] | None = None


def apply_to_checkpoint(
    edit: Storable, source: str | Path, folder: str | Path, *, force: bool = False
) -> Path:
    """Write a copy of a checkpoint with `edit` in its weights.

    The delta is added in float32 and rounded once into the checkpoint's dtype. A checkpoint that
    engram has edited before takes further edits; those computed on the same base give the weights
    of their composition.

    Args:
        source: a folder with safetensors weights, a name on the Hugging Face hub, or "pocket".
        folder: the copy; must not exist, or be empty.
        force: apply also to weights on which the edit was not computed; their shape has to fit.
    Returns:
        `folder`.
    Raises:
        BaseMismatchError: the edit was computed on other weights, or something else has changed
            them since engram edited them.
        EngramFileError: no safetensors weights, a damaged checkpoint, or `folder` cannot be
            written; nothing is left there.
    """
    check_changes_weights(edit)
    source = _local(source)
    record = _read_record(source)
    return _rebuild(source, Path(folder), [*record.edits, _Applied(edit.contents(), force)], record)


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


def _rebuild(source: Path, folder: Path, edits: Sequence[_Applied], record: _Record) -> Path:
    """Copy `source` to `folder`, with `edits` applied to the original weights."""
    if folder.resolve().is_relative_to(source.resolve()):
        raise EngramFileError(
            f"{folder} is the checkpoint {source} itself or inside of it; choose a folder beside it"
        )
    locations = tensor_locations(source)
    _check_untouched(source, locations, record)
    # `source` holds edited values of what is recorded, and original ones of everything else.
    originals = dict(record.originals or {})
    for applied_edit in edits:
        for name in applied_edit.edit.deltas:
            place = find(name, locations)
            originals.setdefault(place.name, place.tensor(source))
    # Also of tensors that no remaining edit touches: they get their original bytes back.
    values = {
        name: _edited(name, original, edits, locations) for name, original in originals.items()
    }
    touched = {find(name, locations).name for one in edits for name in one.edit.deltas}
    # Asked before the first byte: a full disk after 50 GB would have cost minutes for nothing.
    _check_room(source, folder)
    with atomic_folder(folder) as fresh:
        _copy(source, fresh)
        for name, value in values.items():
            locations[name].write(fresh, value)
        if edits:
            _write_record(
                fresh, edits, {name: originals[name] for name in sorted(touched)}, locations
            )
    return folder


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


def _check_untouched(source: Path, locations: dict[str, TensorBytes], record: _Record) -> None:
    # Of the edited tensors only: to read all of a checkpoint would take longer than the edit.
    for name, digest in (record.now or {}).items():
        if name not in locations or _digest(locations[name].read(source)) != digest:
            raise BaseMismatchError(
                f"{name} of {source} is not as engram left it: something else has changed the "
                "checkpoint since. Start from the original checkpoint, or from a copy that only "
                "engram has edited"
            )


def _check_room(source: Path, folder: Path) -> None:
    needed = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    home = next(parent for parent in folder.resolve().parents if parent.exists())
    free = shutil.disk_usage(home).free
    if needed > free:
        raise EngramFileError(
            f"no room for {folder}: the checkpoint has {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB "
            "are free. Free some space, or choose a folder on another disk"
        )


def _copy(source: Path, fresh: Path) -> None:
    """Copy every file but the record, with fresh permissions (a cache may be read-only); links
    become files.
    """
    fresh = fresh.resolve()
    # copyfile and not copytree: a hub cache holds links to read-only blobs, and the copy has to be
    # written to.
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if inside.parts[0] == _HOME:
            continue
        if path.is_dir():
            (fresh / inside).mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, fresh / inside)


def _read_record(source: Path) -> _Record:
    home = source / _HOME
    if not home.exists():
        return _Record()
    try:
        record: dict[str, Any] = json.loads((home / _RECORD).read_text(encoding="utf-8"))
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"format_version={record['format_version']!r}, this engram reads {FORMAT_VERSION}"
            )
        edits = [_Applied(read(home / row["folder"]), row["forced"]) for row in record["edits"]]
        # Checked before they are parsed: damaged originals would be written back as the true ones.
        raw = (home / _ORIGINALS).read_bytes()
        if _digest(raw) != record["originals"]:
            raise ValueError(f"sha256 of {_ORIGINALS} is not the recorded one")
        return _Record(tuple(edits), safetensors.torch.load(raw), record["now"])
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise EngramFileError(
            f"{home} is not a whole record of edits ({error}), so the original weights are not "
            "known. Start from the original checkpoint"
        ) from error


def _write_record(
    fresh: Path,
    edits: Sequence[_Applied],
    originals: dict[str, Tensor],
    locations: dict[str, TensorBytes],
) -> None:
    home = fresh / _HOME
    entries = []
    for i, applied_edit in enumerate(edits):
        inside = f"{_EDITS}/{i}"
        (home / inside).mkdir(parents=True)
        write(applied_edit.edit, home / inside)
        entries.append({"folder": inside, "forced": applied_edit.forced})
    raw = safetensors.torch.save(originals)
    (home / _ORIGINALS).write_bytes(raw)
    # Read back from the copy, and not computed from memory: what is recorded is what is on disk.
    now = {name: _digest(locations[name].read(fresh)) for name in originals}
    record = {
        "format_version": FORMAT_VERSION,
        "edits": entries,
        "originals": _digest(raw),
        "now": now,
    }
    (home / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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
