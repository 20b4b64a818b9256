"""Settings that published work used, by method and model: one TOML file per method, one table per
model.

Knows files, models' names, and which settings say the same thing. Refuses to know what they do.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal

from engram.model.named_models import canonical_name


def preset(method: str, model: str) -> dict[str, Any]:
    """Return the settings of `method` for a model: the file's defaults, overridden by the model's
    own table, or by the table "other" where it has none.

    Args:
        model: any name that a model is loaded by; `canonical_name` of it is looked up.
    """
    tables = _tables(method)
    own = tables.get(canonical_name(model), tables.get("other", {}))
    return overridden(tables["default"], own)


# Pairs of settings that say the same thing in two units; at most one of each pair is in force.
_SAME_THING = (
    ("null_threshold", "null_energy"),
    ("preservation", "relative_preservation"),
    ("ridge", "relative_ridge"),
)


def overridden(usual: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings `usual` with those of `own` in their place.

    A setting of `own` also takes the place of the one that says the same thing in another unit.
    """
    replaced = {name for pair in _SAME_THING if own.keys() & set(pair) for name in pair}
    return {name: value for name, value in usual.items() if name not in replaced} | dict(own)


def preset_layers(
    settings: dict[str, Any], n_layers: int, name: Literal["layer", "layers"], count: int = 1
) -> list[int]:
    """Pop `depth` and the setting `name` from `settings` and return the blocks that they say.

    Of 24 blocks, where `layer` and `layers` come before `depth`:

        layer = 5                 [5]
        layers = [3, 4, 5]        [3, 4, 5]
        layers = "all"            [0, 1, ..., 23]
        depth = 0.35              [8]                or [8, 9, 10] where `count` is 3
        depth = [0.125, 0.28]     [3, 4, 5, 6]       from one fraction of the blocks to the other

    Args:
        n_layers: blocks of the model.
        name: the method's own: "layer", or "layers" of one that changes several.
        count: blocks from a single `depth` on, for methods that change several.
    """
    depth = settings.pop("depth", 0.0)
    given = settings.pop(name, None)
    if given == "all":
        return list(range(n_layers))
    if given is not None:
        return [given] if name == "layer" else list(given)
    if isinstance(depth, Sequence):
        first, last = (int(fraction * n_layers) for fraction in depth)
        return list(range(first, last + 1))
    first = int(depth * n_layers)
    return [first, *range(first + 1, min(first + count, n_layers))]


def published(method: str) -> list[str]:
    """Return the models that have a table of their own."""
    return sorted(set(_tables(method)) - {"default", "other"})


def _tables(method: str) -> dict[str, Any]:
    """Return the tables of a method's file, or of the file that it is `like`."""
    file = files(__name__) / f"{method}.toml"
    if not file.is_file():  # a method without published numbers
        return {"default": {}}
    tables = tomllib.loads(file.read_text())
    return _tables(tables["like"]) if "like" in tables else tables
