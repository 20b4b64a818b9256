"""JSON that somebody else wrote, parsed into a form: types, ranges and finiteness in one place.

A form is a type: a dataclass or TypedDict whose annotations say what each field may be. Knows JSON
and forms. Refuses to know any form by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from engram.checks import validated
from engram.errors import EngramError, EngramFileError
from engram.files.names import read_bytes

Form = TypeVar("Form")


def parsed(
    form: type[Form] | Any,
    text: str | bytes,
    where: str | Path,
    *,
    error: type[EngramError] = EngramFileError,
    advice: str = "",
) -> Form:
    """Return JSON text as a value of `form`.

    Strict: no text is taken for a number and no number for a truth value, and NaN and infinity are
    refused. Fields that a form does not name are ignored, so that newer files can be read.

    Args:
        form: a dataclass, a TypedDict, or any other annotation. A range is written as
            `Annotated[int, Ge(1)]`, with annotated_types.
        where: the file, or the file and the line, for the message.
        advice: what to do, for the message: "Copy it again from its source".
    Raises:
        EngramFileError: or another `error`: no JSON, or not of this form; one line that names the
            field, its value and what was expected.
    Example:
        >>> from engram.files.forms import parsed
        >>> parsed(dict[str, int], '{"a": 1.5}', "limits.json")
        Traceback (most recent call last):
        engram.errors.EngramFileError: limits.json is damaged: a=1.5, expected a whole number
    """
    return validated(
        form,
        text,
        lambda problem: error(f"{where} is damaged: {problem}" + f". {advice}" * bool(advice)),
        json=True,
    )


def read_json(
    path: str | Path,
    form: type[Form] | Any,
    *,
    error: type[EngramError] = EngramFileError,
    advice: str = "",
) -> Form:
    """Return the contents of a JSON file as a value of `form`; see `parsed`.

    Raises:
        EngramFileError: no regular file, or not of this form. OSError: it cannot be read.
    """
    return parsed(form, read_bytes(path), path, error=error, advice=advice)
