"""Checks of settings that every room needs, and the words of their messages.

A message says what was given, what was expected, and which known word is close to the given one.
Refuses to know any setting by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import cache, partial, wraps
from inspect import signature, unwrap
from json import loads
from re import findall
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from engram.errors import EngramError, SettingError

# Ranges that many settings have. NaN and infinity are refused everywhere, see `check_fields`.
Natural = Annotated[int, Ge(0), Lt(2**31)]
Count = Annotated[int, Ge(1), Lt(2**31)]  # steps, samples, tokens, rows
NonNegative = Annotated[float, Ge(0)]  # weights of penalties
Positive = Annotated[float, Gt(0)]  # rates and lengths
Share = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Lt(2**63)]  # what the generators of torch and numpy take
Texts = Annotated[tuple[str, ...], MinLen(1)]
Layers = Annotated[Sequence[int], MinLen(1)]  # numbers of blocks, from 0

_Function = TypeVar("_Function", bound=Callable[..., Any])


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
        raise error(f"{name}={briefly(value)}: expected {alternatives(known)}{more}{hint}")


def check_fields(config: Any, error: type[EngramError] = SettingError) -> None:
    """Raise unless every field of a frozen dataclass is of its annotated type and range.

    The annotations are the one place that says what a field may be. Strict: no text is taken for a
    number, no number for a truth value, and NaN and infinity are refused. Numbers of numpy become
    Python's, and lists become tuples where a tuple is annotated.

    Raises:
        SettingError: or another `error`; it names the field, its value and what was expected.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Passes:
        ...     steps: int = 20  # or Annotated[int, Ge(1)], with annotated_types
        ...     def __post_init__(self):
        ...         check_fields(self)
        >>> Passes(steps=1.5)
        Traceback (most recent call last):
        engram.errors.SettingError: steps=1.5: expected a whole number
    """
    hints = _hints(config.__class__)
    values = {name: getattr(config, name) for name in hints}
    # All fields in one pass: a quarter of the time, and CounterFact has half a million probes. One
    # by one after a failure, for the words of the message and for values that are converted first.
    values = _valid(config.__class__, values) or {
        name: checked(name, values[name], hint, error) for name, hint in hints.items()
    }
    for name, value in values.items():
        object.__setattr__(config, name, value)


def checked_call(function: _Function) -> _Function:
    """Return a public function that first checks its arguments by their annotations.

    Settings that it hands on (`**settings`) are checked where they are annotated. A missing or
    unknown argument is Python's own TypeError.

    Example:
        >>> @checked_call
        ... def take(rows: int, *, rate: Positive = 0.5) -> None: ...
        >>> take(3, rate=-1)
        Traceback (most recent call last):
        engram.errors.SettingError: rate=-1: expected above 0
    """
    parameters = signature(function)

    @wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        try:
            bound = parameters.bind(*args, **settings)
        except TypeError:
            return function(*args, **settings)  # which says it with the function's name
        check_arguments(function, bound.arguments)
        return function(*bound.args, **bound.kwargs)

    return cast("_Function", call)


def check_arguments(function: Callable[..., Any], given: MutableMapping[str, Any]) -> None:
    """Raise unless `given` are of the types that a function annotates; put them right in place.

    Args:
        given: arguments by name; those that the function does not name are left alone.
    Raises:
        SettingError: names the argument, its value and what was expected.
    """
    for name, hint in _argument_hints(function).items():
        if name in given:
            given[name] = checked(name, given[name], hint)


def checked(name: str, value: Any, hint: Any, error: type[EngramError] = SettingError) -> Any:
    """Return a value that is of an annotated type and range; see `check_fields`.

    Raises:
        SettingError: or another `error`: it is not.
    """
    if get_origin(hint) is Literal:
        one_of(name, value, get_args(hint), error=error)
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()  # the index of a largest effect is a number of numpy
    return validated(hint, value, error, name=name, joint=": ")


def validated(
    hint: Any,
    value: Any,
    error: Callable[[str], Exception],
    *,
    name: str = "",
    json: bool = False,
    joint: str = ", ",
) -> Any:
    """Return `value` as `hint` annotates it.

    Args:
        value: a Python value, or JSON text with `json`.
        error: makes the exception from one line about the first problem.
        name: of the value, for that line; joint: what stands between it and what was expected.
    """
    from pydantic import ValidationError  # not at the top: it takes 0.1 s, and `--help` needs none

    model = _model(hint)
    try:
        if json:
            return model.model_validate_json(value).root
        try:
            return model.model_validate(value).root
        except ValidationError:
            # Settings files have lists only. Strict tuples refuse them; what is in them counts.
            return model.model_validate(_tuples(value)).root
    except ValidationError as invalid:
        raise error(problem(invalid, value, name, json, joint)) from None
    except RecursionError:
        raise error(f"{name or 'it'} is nested too deep{joint}expected a plain value") from None


@cache
def _hints(config: type[Any]) -> dict[str, Any]:
    names = {field.name for field in fields(config)}
    hints = get_type_hints(config, include_extras=True)
    return {name: hint for name, hint in hints.items() if name in names}


def _valid(config: type[Any], values: dict[str, Any]) -> dict[str, Any] | None:
    """Return the values of all fields of a dataclass; None where one of them is not valid."""
    from pydantic import ValidationError

    try:
        return dict(_form(config).model_validate(values).root)  # type: ignore[arg-type]
    except (ValidationError, RecursionError):
        return None


@cache
def _form(config: type[Any]) -> Any:
    from typing_extensions import TypedDict  # typing's has no types at run time before 3.12

    typed_dict: Any = TypedDict
    return _model(typed_dict(config.__name__, _hints(config)))  # type: ignore[arg-type]


@cache
def _argument_hints(function: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(function, partial):
        function = function.func
    # What it returns, `self` and the names of `**settings` are no arguments to check.
    named = {
        name: parameter.annotation
        for name, parameter in signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.annotation is not parameter.empty
    }
    return get_type_hints(
        SimpleNamespace(__annotations__=named), unwrap(function).__globals__, include_extras=True
    )


@cache
def _model(hint: Any) -> Any:
    from pydantic import ConfigDict, RootModel

    # A root model and not a TypeAdapter: its configuration reaches the dataclasses inside.
    class Strict(RootModel):
        model_config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
        root: hint

    return Strict


def _tuples(value: Any) -> Any:
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()  # layers may come from an array
    return tuple(map(_tuples, value)) if isinstance(value, list | range) else value


_KINDS = {
    "an instance of Sequence": "a list",
    "an instance of Mapping": "an object",
    "an instance of Path": "a path",
}
_RANGES = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
    "too_short",
}

# pydantic's kinds of errors in our words; others keep pydantic's
_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "bytes_type": "bytes",
    "list_type": "a list",
    "tuple_type": "a list",
    "sequence_str": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "dataclass_type": "an object",
    "none_required": "nothing",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "literal_error": "{expected}",
    "is_instance_of": "an instance of {class}",
    "dataclass_exact_type": "an instance of {class_name}",
    "callable_type": "a function",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
}


def problem(invalid: Any, value: Any, name: str, json: bool = False, joint: str = ", ") -> str:
    """Return one line about the first problem that pydantic found.

    Args:
        invalid: its ValidationError.
        value: what was validated: a Python value, or JSON text with `json`.
        joint: stands between what was given and what was expected.
    """
    errors = invalid.errors(include_url=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"no JSON that can be read, {first['ctx']['error']}"
    if json:
        value = loads(value)  # pydantic has read it: it is JSON, and not deep
    paths = [_path(value, one["loc"], one["type"]) for one in errors]
    # A field of several types has one error for each of them. Of a list that is none of the other
    # types, the item that is wrong says more: facts[1]='Rome', for a fact or several.
    path = max((one for one in paths if one[: len(paths[0])] == paths[0]), key=len)
    same = [one for one, where in zip(errors, paths, strict=True) if where == path]
    first = same[0]
    # Of a right type and out of its range: the other types do not help.
    same = [one for one in same if one["type"] in _RANGES] or same
    label = _label(name, path)
    expected = " or ".join(dict.fromkeys(map(_expected, same)))
    if first["type"] == "literal_error":
        expected += did_you_mean(first["input"], findall(r"'(.*?)'", first["ctx"]["expected"]))
    if first["type"] == "missing":
        return f"{label} is missing"
    if first["type"] in ("value_error", "assertion_error"):
        return f"{label}: {expected}" if label else expected
    given = briefly(_at(value, path))
    return f"{f'{label}={given}' if label else given}{joint}expected {expected}"


def _expected(one: Mapping[str, Any]) -> str:
    if one["type"] in _WORDS:
        about = {
            name: f"{value:g}" if isinstance(value, float) else value
            for name, value in one.get("ctx", {}).items()
        }
        words = _WORDS[one["type"]].format_map(about)
        return _KINDS.get(words, words)
    text = str(one["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return " ".join(text.split())


def _path(value: Any, loc: Sequence[int | str], kind: str) -> tuple[int | str, ...]:
    """Return the keys and indices of a location; pydantic also puts names of types there."""
    path: list[int | str] = []
    for at, item in enumerate(loc):
        in_list = isinstance(value, list | tuple) and isinstance(item, int) and item < len(value)
        if in_list or (isinstance(value, Mapping) and item in value):
            value = value[item]
        elif not (kind == "missing" and at == len(loc) - 1):
            continue
        path.append(item)
    return tuple(path)


def _at(value: Any, path: Sequence[int | str]) -> Any:
    for item in path:
        value = value[item]
    return value


def _label(name: str, path: Sequence[int | str]) -> str:
    for item in path:
        name += f"[{item}]" if isinstance(item, int) else f".{item}" if name else item
    return _cut(name)


def briefly(value: object, length: int = 80) -> str:
    """Return the value as Python writes it, in one line, cut to `length` characters.

    Example:
        >>> briefly("a" * 100, length=10)
        "'aaaaaa..."
    """
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deep, a number of thousands of digits
        text = f"a {type(value).__name__}"
    return _cut(" ".join(text.split()), length)


def _cut(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


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
