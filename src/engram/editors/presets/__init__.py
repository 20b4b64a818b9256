"""Settings that published work used, by method and model: one TOML file a method, one table a
model.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any


def preset(method: str, model: str) -> dict[str, Any]:
    """The settings of `method` for a model: the file's defaults, overridden by the model's own
    table where it has one.

    Args:
        model: a hub name, a folder or "pocket"; its last part is looked up, in lower case.
    """
    tables = _tables(method)
    name = model.rstrip("/").rpartition("/")[2].lower()
    own, usual = tables.get(name, {}), dict(tables["default"])
    for one, other in (
        ("null_threshold", "null_energy"),
        ("preservation", "relative_preservation"),
    ):
        if one in own:  # two ways to say one thing
            usual.pop(other, None)
    return {**usual, **own}


def published(method: str) -> list[str]:
    """The models that have a table of their own."""
    return sorted(set(_tables(method)) - {"default"})


def _tables(method: str) -> dict[str, Any]:
    """The tables of a method's file, which may say that it has those of another one."""
    tables = tomllib.loads((files(__name__) / f"{method}.toml").read_text())
    return _tables(tables["like"]) if "like" in tables else tables
