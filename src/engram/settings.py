"""Flat settings, as callers and presets give them, read into a config and the configs inside it.

A caller writes `engram.trace(lm, ..., samples=3, window=5)`; `samples` and `window` belong to two
different configs inside `TraceConfig`, and `read` puts each where it belongs.
Knows dataclasses. Refuses to know what a setting means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from engram.checks import did_you_mean
from engram.errors import SettingError

Config = TypeVar("Config")


def check_names(config: type[Any], names: Iterable[str], method: str, also: str) -> None:
    """Raise an error for a setting that neither `config` nor a config inside it has.

    Args:
        method: for the message.
        also: names that the method takes beside these, for the message.
    Raises:
        SettingError: there is no such setting; the message names the nearest one and all others.
    """
    inner = _inner(config)
    # Of a config inside, its settings are known and its own name is not: callers write flat.
    known = {f.name for part in (config, *inner.values()) for f in fields(part)} - set(inner)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, [*known, *also.split(", ")])
            raise SettingError(
                f"{method} has no setting {name!r}{hint}; it has {', '.join(sorted(known))}, "
                f"and {also}"
            )


def read(
    config: type[Config], settings: Mapping[str, Any], method: str, also: str = "seed, progress"
) -> Config:
    """Return a config from flat settings; a field that is itself a config takes those that are its
    own.

    Args:
        method, also: see `check_names`.
    Raises:
        SettingError: no config has such a setting.
    """
    check_names(config, settings, method, also)
    inner = _inner(config)
    parts = {name: part(**_own(part, settings)) for name, part in inner.items()}
    own = {name: value for name, value in _own(config, settings).items() if name not in inner}
    return config(**parts, **own)


def flat(config: Any) -> dict[str, Any]:
    """Return the settings of a config as `read` takes them."""
    # A config inside is poured out: settings are stored and printed as callers write them.
    values = asdict(config)
    for name in _inner(type(config)):
        values |= values.pop(name)
    return values


def _own(config: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: settings[f.name] for f in fields(config) if f.name in settings}


def _inner(config: type[Any]) -> dict[str, Any]:
    # Not `field.type`: it is text where annotations are postponed.
    hints = get_type_hints(config)
    return {f.name: hints[f.name] for f in fields(config) if is_dataclass(hints[f.name])}
