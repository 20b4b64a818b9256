"""Edits as folders: `edit.json` (facts, recipe, base, receipt), `deltas.safetensors` (factors) and,
for edits that have them, `keys.safetensors`. No pickle.

An in-context edit has no factors: its folder holds an `edit.json` of the kind "prompt" and nothing
else. `edit.json` has a checksum of its own contents and the digests of the other files, so that any
change since the save is noticed. This protects from damage, not from somebody who computes the
checksums again.

Knows the format, version 1, and the contents of a folder as one value. Refuses to know edits (they
build themselves from their contents) and models (whether an edit fits one is checked when it is
applied).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from safetensors import SafetensorError

from engram.checks import briefly
from engram.edit.changes import WeightChanges
from engram.edit.delta import Delta
from engram.edit.forms import PromptEditForm, WeightEditForm
from engram.edit.keys import Keys
from engram.errors import EngramError, EngramFileError
from engram.files.atomic import atomic_folder, recover_folder
from engram.files.checksums import stamped, verified
from engram.files.forms import parsed
from engram.files.names import inside, read_bytes

FORMAT_VERSION = 1
RECIPE, FACTORS, KEYS = "edit.json", "deltas.safetensors", "keys.safetensors"
_PROMPT = "prompt"  # kind of an edit without weights
LARGEST_WEIGHTS = 1 << 40  # bytes of a file of tensors that is read whole
_AGAIN = "Copy the edit again from its source"
_OURS = ("format_version", "kind", "owners", "sha256", "keys_sha256")  # not the edit's own


@dataclass(frozen=True)
class Contents:
    """What an edit's folder holds.

    Attributes:
        record: what `edit.json` says about the edit itself.
        deltas: empty for an in-context edit, and only for one.
        keys: of the facts; empty where the edit has none.
    """

    record: dict[str, Any]
    deltas: dict[str, Delta] = field(default_factory=dict)
    keys: Keys = field(default_factory=dict)

    @property
    def changes(self) -> WeightChanges:
        """The changes of weights by themselves."""
        return WeightChanges(self.deltas, self.record["base"])

    def __repr__(self) -> str:
        return f"Edit({len(self.record['facts'])} facts, {self.record['method']!r})"


class Storable(Protocol):
    """An edit of either kind."""

    @property
    def changes_weights(self) -> bool: ...

    def contents(self) -> Contents: ...


def save(edit: Storable, folder: str | Path) -> Path:
    """Write `edit` as a folder; an edit that was there is replaced.

    A save that is killed leaves the old edit or the new one, never half of one.

    Returns:
        The folder.
    Raises:
        EngramFileError: `folder` holds something else than an edit, or cannot be written.
    """
    with atomic_folder(folder, replaces=RECIPE) as fresh:
        write(edit.contents(), fresh)
    return Path(folder)


def write(contents: Contents, folder: Path) -> None:
    """Write the files of an edit into an existing folder."""
    kind = {} if contents.deltas else {"kind": _PROMPT}
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, **kind, **contents.record}
    if contents.deltas:
        factors = _factor_bytes(contents.deltas)
        record["owners"] = {name: delta.owners for name, delta in contents.deltas.items()}
        record["sha256"] = hashlib.sha256(factors).hexdigest()
        # The bytes that were hashed are the bytes that are written: nothing can come in between.
        (folder / FACTORS).write_bytes(factors)
    if contents.keys:
        keys = safetensors.torch.save(contents.keys)
        record["keys_sha256"] = hashlib.sha256(keys).hexdigest()
        (folder / KEYS).write_bytes(keys)
    (folder / RECIPE).write_text(
        json.dumps(stamped(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read(folder: str | Path) -> Contents:
    """Read what `save` wrote, after checking it: format version, types, checksums, shapes,
    finiteness.

    Raises:
        EngramFileError: missing, damaged, or of another format version.
    """
    folder = recover_folder(folder)
    record = _record(folder)
    own = {name: value for name, value in record.items() if name not in _OURS}
    if record.get("kind") == _PROMPT:
        return Contents(own)
    # The hash is checked before the bytes are parsed: a damaged file may parse to other numbers.
    factors = _whole(folder, FACTORS, record["sha256"])
    raw_keys = _whole(folder, KEYS, record["keys_sha256"]) if "keys_sha256" in record else None
    with damage_of(folder):
        tensors = safetensors.torch.load(factors)
        deltas = {
            name: Delta(tensors.pop(f"{name}.left"), tensors.pop(f"{name}.right", None), owners)
            for name, owners in record["owners"].items()
        }
        if tensors:
            raise ValueError(f"tensors of no delta: {', '.join(sorted(tensors))}")
        keys = {} if raw_keys is None else safetensors.torch.load(raw_keys)
        WeightChanges(deltas, own["base"])  # checks that they fit each other
        return Contents(own, deltas, keys)


def recipe_digest(folder: Path) -> str:
    """Return the sha256 of an edit's `edit.json`, which has the digests of all its other files.

    Raises:
        EngramFileError: it is not a regular file in `folder`. OSError: it cannot be read.
    """
    return hashlib.sha256(read_bytes(inside(folder, RECIPE))).hexdigest()


@contextmanager
def damage_of(folder: str | Path) -> Iterator[None]:
    """Raise what goes wrong within the block as damage of the edit in `folder`."""
    try:
        yield
    except EngramFileError:
        raise  # it says already which file is damaged
    except (
        SafetensorError,
        EngramError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        problem = f"no entry {error}" if isinstance(error, LookupError) else str(error)
        raise EngramFileError(f"the edit in {folder} is damaged: {problem}. {_AGAIN}") from error


def change_identity(deltas: Mapping[str, Delta]) -> str:
    """Return the sha256 of changes of weights, by which an edit is recognised in a checkpoint."""
    return hashlib.sha256(_factor_bytes(deltas)).hexdigest()


def _factor_bytes(deltas: Mapping[str, Delta]) -> bytes:
    """Return the deltas as a safetensors file; equal deltas give equal bytes."""
    # Fixed names and safetensors' own order: the sha256 is an identity, see `change_identity`.
    return safetensors.torch.save(
        {
            f"{name}.{side}": factor
            for name, delta in deltas.items()
            for side, factor in delta.factors().items()
        }
    )


def _whole(folder: Path, name: str, sha256: str) -> bytes:
    """Return a file's bytes, once they are those that were written."""
    try:
        data = read_bytes(inside(folder, name), limit=LARGEST_WEIGHTS)
    except OSError as error:
        raise EngramFileError(
            f"{folder / name} cannot be read ({error.strerror}); the edit is incomplete"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise EngramFileError(
            f"{folder / name} is damaged: its sha256 is not the one in {RECIPE}. {_AGAIN}"
        )
    return data


def _record(folder: Path) -> dict[str, Any]:
    """Return `edit.json` without its checksum, once it is what was written."""
    path = folder / RECIPE
    if not folder.is_dir():
        raise EngramFileError(
            f"{folder} is not a folder; expected one that Edit.save wrote ({RECIPE} and {FACTORS})"
        )
    try:
        text = read_bytes(inside(folder, RECIPE))
    except OSError as error:
        raise EngramFileError(
            f"{folder} holds no edit: {RECIPE} cannot be read ({error.strerror})"
        ) from error
    record: dict[str, Any] = parsed(dict[str, Any], text, path, advice=_AGAIN)
    # The version before anything else: another format's fields would be reported as damage.
    number = record.get("format_version")
    if type(number) is not int or number != FORMAT_VERSION:
        newer = type(number) is int and number > FORMAT_VERSION
        raise EngramFileError(
            f"{path} has format_version={briefly(number)}, this engram reads {FORMAT_VERSION}."
            + (
                " It was written by a newer engram: pip install --upgrade engram"
                if newer
                else " It is not an edit of ours"
            )
        )
    # The form before the checksum: its error names the field.
    parsed(PromptEditForm if "kind" in record else WeightEditForm, text, path, advice=_AGAIN)
    return verified(record, path)
