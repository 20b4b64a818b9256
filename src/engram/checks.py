"""Checks of settings that every room needs, and the words of their messages.

A message says what was given, what was expected, and which known word is close to the given one.
Refuses to know any setting by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from engram.errors import EngramError, SettingError


def one_of(
    name: str,
    value: object,
    known: Iterable[str],
    *,
    more: str = "",
    error: type[EngramError] = SettingError,
) -> None:
    """Raise unless `value` is one of `known`.

    Args:
        name: the setting, as the caller spells it.
        more: what else may be given, for the end of the list: ", or a list of texts".
        error: class of the error.
    Raises:
        SettingError: or another `error`: the value is not known.
    Example:
        >>> one_of("stop", "los", ["loss", "argmax"])
        Traceback (most recent call last):
        engram.errors.SettingError: stop='los': expected 'loss' or 'argmax' (did you mean 'loss'?)
    """
    known = list(known)  # read three times, and may be an iterator
    if value not in known:
        hint = did_you_mean(value, known)
        raise error(f"{name}={value!r}: expected {alternatives(known)}{more}{hint}")


def check_choices(config: Any) -> None:
    """Raise unless every field of a config that is a Literal holds one of its values.

    The type says the choices, so that no second list of them can differ from it.

    Raises:
        SettingError: see `one_of`.
    """
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            one_of(name, getattr(config, name), get_args(hint))


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known word nearest to `word`, "" where none is near.

    Example:
        >>> did_you_mean("rmoe", ["rome", "memit"])
        " (did you mean 'rome'?)"
        >>> did_you_mean("xyz", ["rome", "memit"])
        ''
    """
    near = get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def alternatives(known: Iterable[str]) -> str:
    """Return the words as an English list.

    Example:
        >>> alternatives(["loss", "argmax", "never"])
        "'loss', 'argmax' or 'never'"
    """
    *first, last = map(repr, known)
    return f"{', '.join(first)} or {last}" if first else last


def position_in(position: int, tokens: int) -> int:
    """Return a position counted from a text's start, where it may be given from its end.

    Raises:
        SettingError: the text has no such position.
    Example:
        >>> position_in(-1, tokens=5)
        4
    """
    if not -tokens <= position < tokens:
        raise SettingError(
            f"position={position}: the text has {tokens} tokens, numbered 0 to {tokens - 1} "
            "or from -1 down"
        )
    return position % tokens
