"""Flat settings, as callers and presets give them, made into a method's config; those of the value
optimisation go to it.

Knows dataclasses. Refuses to know what a setting means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, cast, get_type_hints

from engram.checks import did_you_mean
from engram.errors import SettingError

Config = TypeVar("Config")


def read(
    config: type[Config], knobs: Mapping[str, Any], method: str, also: str = "seed, progress"
) -> Config:
    """`config` from flat settings; a field that is itself a config takes those that are its own.

    Args:
        method: for the message.
        also: names that the method takes beside these, for the message.
    Raises:
        SettingError: a setting that neither has.
    """
    inner = _inner(config)
    own = {f.name for f in fields(cast("Any", config))} - set(inner)
    known = own.union(*({f.name for f in fields(each)} for each in inner.values()))
    for name in knobs:
        if name not in known:
            hint = did_you_mean(name, [*known, *also.split(", ")])
            raise SettingError(
                f"{method} has no setting {name!r}{hint}; it has {', '.join(sorted(known))}, and {also}"
            )
    parts = {
        name: each(**{f.name: knobs[f.name] for f in fields(each) if f.name in knobs})
        for name, each in inner.items()
    }
    return config(**parts, **{name: value for name, value in knobs.items() if name in own})


def flat(config: Any) -> dict[str, Any]:
    """The settings of a config as `read` takes them."""
    values = asdict(config)
    for name in _inner(type(config)):
        values |= values.pop(name)
    return values


def _inner(config: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {f.name: hints[f.name] for f in fields(config) if is_dataclass(hints[f.name])}
