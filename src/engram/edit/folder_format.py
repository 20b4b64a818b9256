"""Edits as folders: `edit.json` (facts, recipe, base, receipt), `deltas.safetensors` (factors) and,
for edits that have them, `keys.safetensors`. No pickle.

An in-context edit has no factors: its folder holds an `edit.json` of the kind "prompt" and nothing
else. Knows the format, version 1, and the contents of a folder as one value. Refuses to know edits
(they build themselves from their contents) and models (whether an edit fits one is checked when it
is applied).
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

from engram.edit.changes import WeightChanges
from engram.edit.delta import Delta
from engram.edit.keys import Keys
from engram.errors import EngramError, EngramFileError
from engram.files.atomic import atomic_folder, recover_folder

FORMAT_VERSION = 1
RECIPE, FACTORS, KEYS = "edit.json", "deltas.safetensors", "keys.safetensors"
_PROMPT = "prompt"  # kind of an edit without weights
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
    record = {"format_version": FORMAT_VERSION, **kind, **contents.record}
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
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read(folder: str | Path) -> Contents:
    """Read what `save` wrote, after checking it: format version, hash, shapes, finiteness.

    Raises:
        EngramFileError: missing, damaged, or of another format version.
    """
    folder = recover_folder(folder)
    record = _record(folder)
    own = {name: value for name, value in record.items() if name not in _OURS}
    if record.get("kind") == _PROMPT:
        return Contents(own)
    factors = _whole(folder / FACTORS, record.get("sha256"))
    raw_keys = _whole(folder / KEYS, record["keys_sha256"]) if "keys_sha256" in record else None
    # The hash is checked before the bytes are parsed: a damaged file may parse to other numbers.
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
        raise EngramFileError(
            f"the edit in {folder} is damaged: {problem}. Copy it again from its source"
        ) from error


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


def _whole(path: Path, sha256: Any) -> bytes:
    """Return a file's bytes, once they are those that were written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngramFileError(
            f"{path} cannot be read ({error.strerror}); the edit is incomplete"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise EngramFileError(
            f"{path} is damaged: its sha256 is not the one in {RECIPE}. Copy it again from its "
            "source"
        )
    return data


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE
    if not folder.is_dir():
        raise EngramFileError(
            f"{folder} is not a folder; expected one that Edit.save wrote ({RECIPE} and {FACTORS})"
        )
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngramFileError(
            f"{folder} holds no edit: {RECIPE} cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise EngramFileError(
            f"{path} is damaged: {error}. Copy the edit again from its source"
        ) from error
    record = record if isinstance(record, dict) else {}
    # The version before anything else: another format's fields would be reported as damage.
    number = record.get("format_version")
    if number != FORMAT_VERSION:
        newer = isinstance(number, int) and number > FORMAT_VERSION
        raise EngramFileError(
            f"{path} has format_version={number!r}, this engram reads {FORMAT_VERSION}."
            + (
                " It was written by a newer engram: pip install --upgrade engram"
                if newer
                else " It is not an edit of ours"
            )
        )
    return dict(record)
