"""TODO edit.files"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError

from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.edit.folder_format import _FIELDS, FACTORS, KEYS, PROMPT, _damaged, _recipe, _whole
from engram.edit.prompt_edit import PromptEdit
from engram.errors import EngramError
from engram.facts import Fact
from engram.files.whole_folders import recover_folder

if TYPE_CHECKING:
    pass
from engram.edit.checkpoint import _local, _read_record


def load(folder: str | Path) -> Edit | PromptEdit:
    """Read what `save` wrote, after checking it: format version, hash, shapes, finiteness.

    Raises:
        EditFileError: missing, damaged, or of another format version.
    """
    folder = recover_folder(folder)
    recipe = _recipe(folder)
    if recipe.get("kind") == PROMPT:
        return _prompt_edit(folder, recipe)
    factors = _whole(folder / FACTORS, recipe.get("sha256"))
    raw_keys = _whole(folder / KEYS, recipe["keys_sha256"]) if "keys_sha256" in recipe else None
    try:
        tensors = safetensors.torch.load(factors)
        deltas = {
            name: Delta(tensors.pop(f"{name}.left"), tensors.pop(f"{name}.right", None), owners)
            for name, owners in recipe["owners"].items()
        }
        if tensors:
            raise ValueError(f"tensors of no delta: {', '.join(sorted(tensors))}")
        facts = tuple(Fact.from_dict(record) for record in recipe["facts"])
        keys = {} if raw_keys is None else safetensors.torch.load(raw_keys)
        return Edit(
            facts=facts, deltas=deltas, keys=keys, **{name: recipe[name] for name in _FIELDS}
        )
    except (
        SafetensorError,
        EngramError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise _damaged(folder, error) from error


def _prompt_edit(folder: Path, recipe: dict[str, Any]) -> PromptEdit:
    try:
        return PromptEdit.from_dict(
            {
                name: value
                for name, value in recipe.items()
                if name not in ("format_version", "kind")
            }
        )
    except (EngramError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, error) from error


def edits_in(source: str | Path) -> list[Edit]:
    """The edits that lie on a checkpoint, in the order they came; none where engram never touched
    it.
    """
    return [each.edit for each in _read_record(_local(source)).edits]
