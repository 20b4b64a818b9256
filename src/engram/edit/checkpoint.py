"""Edit a checkpoint on disk, and take edits out of it again to the last byte.

Only the bytes of the touched tensors change; every other byte and file is copied, unless another
dtype is wanted (stored_dtype.py). A record beside the weights (checkpoint_record.py) holds the
original tensors and the edits in force, so weights are always rebuilt from the originals: whatever
is taken out, and in whatever order, the rest is rounded once and exact.

A checkpoint of others is data: what it names is a regular file inside its folder, or an error.
Nothing is written but the new folder, whose files are new ones.
Refuses to know modules and tokenizers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from engram.checks import alternatives
from engram.edit.applied import applied
from engram.edit.changes import WeightChanges
from engram.edit.checkpoint_record import (
    HOME,
    NAME,
    AppliedEdit,
    Record,
    check_record,
    read_edits,
    write_record,
)
from engram.edit.folder_format import Storable, change_identity
from engram.edit.recipe import check_changes_weights
from engram.edit.safetensors_layout import DTYPES, TensorBytes, find, tensor_locations
from engram.edit.stack import Stack
from engram.edit.stored_dtype import growth, rewrite, widened
from engram.errors import BaseMismatchError, EngramFileError, NonFiniteError
from engram.files.atomic import atomic_folder, recover_folder, reserved
from engram.files.names import check_regular, inside
from engram.model.dequantised_gguf import checkpoint_of
from engram.model.named_models import NAMED_MODELS, place_of
from engram.model.whole_weights import check_numbers

if TYPE_CHECKING:
    from engram.model.language_model import LanguageModel


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
        source: a folder with safetensors weights, a name on the Hugging Face hub, a short name such
            as "pocket", or a GGUF file, of which the copy holds the dequantised weights.
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
    dtype = dtype or place_of(source).dtype
    with _local(source) as home:
        record = read_edits(home)
        edits = [*record.edits, AppliedEdit(edit.contents(), force)]
        return _rebuild(home, Path(folder), edits, record, dtype)


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
    with _local(source) as home:
        return _rebuild_without(edit, home, Path(folder))


def save_edited(
    changes: WeightChanges, lm: LanguageModel, folder: str | Path, *, force: bool = False
) -> Path:
    """Write a model in memory, edited, and its tokenizer as a checkpoint."""
    size = sum(weight.numel() * weight.element_size() for weight in lm.model.parameters())
    # Into the weights and never beside them: what is attached would not be in the saved tensors.
    with (
        reserved(folder, folder=True, needs=size),
        applied(changes, lm, how="weights", force=force),
        atomic_folder(folder) as fresh,
    ):
        try:
            lm.model.save_pretrained(fresh)
        except SafetensorError as error:  # a full disk is no OSError there
            raise OSError(str(error)) from error
        lm.tokenizer.save_pretrained(fresh)
    return Path(folder)


def _rebuild_without(edit: Storable | None, source: Path, folder: Path) -> Path:
    """Write `source` to `folder` without one of its edits, or without any."""
    record = read_edits(source)
    if not record.edits:
        raise EngramFileError(
            f"{source} has no edits to take out: there is no {HOME}/{NAME} that "
            "apply_to_checkpoint wrote"
        )
    rest: list[AppliedEdit] = []
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
    return _rebuild(source, folder, rest, record)


def _rebuild(
    source: Path,
    folder: Path,
    edits: Sequence[AppliedEdit],
    record: Record,
    dtype: str | None = None,
) -> Path:
    """Copy `source` to `folder`, with `edits` applied to the original weights."""
    # `realpath`, and not `resolve`, which raises at a circle of links: the writer refuses it.
    if Path(os.path.realpath(folder)).is_relative_to(source.resolve()):
        raise EngramFileError(
            f"{folder} is the checkpoint {source} itself or inside of it; choose a folder beside it"
        )
    locations, files = tensor_locations(source), _files(source)
    check_record(source, locations, record)
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
                write_record(fresh, edits, kept, stored | record.stored)
    return folder


def _originals(
    source: Path,
    locations: dict[str, TensorBytes],
    edits: Sequence[AppliedEdit],
    record: Record,
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
    name: str, original: Tensor, edits: Sequence[AppliedEdit], locations: dict[str, TensorBytes]
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


def _files(source: Path) -> list[str]:
    """Return the names of all files of a checkpoint but the record's.

    Raises:
        EngramFileError: a link that leaves the folder, a linked folder, a pipe, a device.
    """
    names = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if name.split("/")[0] == HOME or (path.is_dir() and not path.is_symlink()):
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


@contextmanager
def _local(source: str | Path) -> Iterator[Path]:
    """Give the folder of a checkpoint; dequantise a GGUF file, and fetch from the hub (PyTorch's
    files only) what is neither.
    """
    with checkpoint_of(place_of(source).path) as path:
        folder = recover_folder(path)
        yield folder if folder.is_dir() else _fetched(path)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=_OTHER_FRAMEWORKS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EngramFileError(
            f"{name!r} is neither a folder nor a model that the Hugging Face hub gives us "
            f"({type(error).__name__}). Expected a checkpoint's folder, a GGUF file, a hub name "
            f"such as 'openai-community/gpt2', or {alternatives(NAMED_MODELS)}"
        ) from error
