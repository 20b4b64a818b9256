"""Edits as folders: `edit.json` (facts, recipe, base, receipt), `deltas.safetensors` (factors) and,
of edits that have them,
`keys.safetensors`. No pickle.

An in-context edit has no factors: its folder holds an `edit.json` of the kind "prompt" and nothing
else.

Knows the format, version 1. Refuses to know models: whether an edit fits one is checked when it is
applied.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch

from engram.edit.edit import Edit
from engram.edit.prompt_edit import PromptEdit
from engram.errors import EngramFileError
from engram.files.whole_folders import atomic_folder

FORMAT_VERSION = 1


RECIPE, FACTORS, KEYS = "edit.json", "deltas.safetensors", "keys.safetensors"


PROMPT = "prompt"  # kind of an edit without weights


_FIELDS = ("method", "settings", "seed", "base", "versions", "diagnostics", "receipt")


def save(edit: Edit | PromptEdit, folder: str | Path) -> Path:
    """Keep `edit` as a folder; an edit that was there is replaced.

    A save that is killed leaves the old edit or the new one, never half of one.

    Returns:
        The folder.
    Raises:
        EditFileError: `folder` holds something else than an edit, or cannot be written.
    """
    with atomic_folder(folder, replaces=RECIPE) as fresh:
        write(edit, fresh)
    return Path(folder)


def write(edit: Edit | PromptEdit, folder: Path) -> None:
    """The files of `edit` into an existing folder."""
    if isinstance(edit, PromptEdit):
        _write_recipe(folder, {"format_version": FORMAT_VERSION, "kind": PROMPT, **edit.to_dict()})
        return
    factors = factor_bytes(edit)
    recipe: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "facts": [fact.to_dict() for fact in edit.facts],
    }
    recipe |= {name: getattr(edit, name) for name in _FIELDS}
    recipe["owners"] = {name: delta.owners for name, delta in edit.deltas.items()}
    recipe["sha256"] = hashlib.sha256(factors).hexdigest()
    (folder / FACTORS).write_bytes(factors)
    if edit.keys:
        keys = safetensors.torch.save(edit.keys)
        recipe["keys_sha256"] = hashlib.sha256(keys).hexdigest()
        (folder / KEYS).write_bytes(keys)
    _write_recipe(folder, recipe)


def _write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    (folder / RECIPE).write_text(
        json.dumps(recipe, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _damaged(folder: Path, error: Exception) -> EngramFileError:
    problem = f"no entry {error}" if isinstance(error, LookupError) else str(error)
    return EngramFileError(
        f"the edit in {folder} is damaged: {problem}. Take it from where it came once more"
    )


def factor_bytes(edit: Edit) -> bytes:
    """The deltas as a safetensors file; the same edit gives the same bytes."""
    tensors = {
        f"{name}.{side}": factor
        for name, delta in edit.deltas.items()
        for side, factor in delta.factors().items()
    }
    return safetensors.torch.save(tensors)


def change_identity(edit: Edit) -> str:
    """sha256 of what an edit does to weights, by which it is recognised in an edited checkpoint."""
    return hashlib.sha256(factor_bytes(edit)).hexdigest()


def _whole(path: Path, sha256: Any) -> bytes:
    """A file's bytes, once they are those that were written."""
    try:
        found = path.read_bytes()
    except OSError as error:
        raise EngramFileError(
            f"{path} cannot be read ({error.strerror}); the edit is incomplete"
        ) from error
    if hashlib.sha256(found).hexdigest() != sha256:
        raise EngramFileError(
            f"{path} is damaged: its sha256 is not the one in {RECIPE}. Take it from where it came once more"
        )
    return found


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE
    if not folder.is_dir():
        raise EngramFileError(
            f"{folder} is not a folder; expected one that Edit.save wrote ({RECIPE} and {FACTORS})"
        )
    try:
        recipe: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngramFileError(
            f"{folder} holds no edit: {RECIPE} cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise EngramFileError(
            f"{path} is damaged: {error}. Take the edit from where it came once more"
        ) from error
    recipe = recipe if isinstance(recipe, dict) else {}
    found = recipe.get("format_version")
    if found != FORMAT_VERSION:
        newer = isinstance(found, int) and found > FORMAT_VERSION
        raise EngramFileError(
            f"{path} has format_version={found!r}, this engram reads {FORMAT_VERSION}."
            + (
                " It was written by a newer engram: pip install --upgrade engram"
                if newer
                else " It is not an edit of ours"
            )
        )
    return dict(recipe)
