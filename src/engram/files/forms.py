"""JSON that somebody else wrote, parsed into a form: types, ranges and finiteness in one place.

A form is a type: a dataclass or TypedDict whose annotations say what each field may be. Knows JSON
and forms. Refuses to know any form by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from annotated_types import Ge

from engram.checks import briefly, validated
from engram.errors import EngramError, EngramFileError
from engram.files.checksums import verified
from engram.files.names import read_bytes

Form = TypeVar("Form")


class _WithInfinity:
    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return {**handler(source), "allow_inf_nan": True}


# What a broken model may measure, such as a perplexity beyond all numbers; NaN is still refused.
Overflowing = Annotated[float, _WithInfinity(), Ge(0)]


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


def read_record(
    path: str | Path,
    form: type[Form] | Any,
    what: str,
    *,
    version: int,
    version_field: str = "format_version",
    advice: str = "",
) -> Form:
    """Return the contents of a JSON file of ours as a value of `form`, after comparing its version
    and its checksum.

    Args:
        what: of errors: what the file holds, such as "layer card".
        version: that this engram reads; its field is `version_field`.
        advice: of errors: what to do.
    Raises:
        EngramFileError: missing, damaged, or of another version; one line that says where.
    """
    where = f"the {what} {path}"
    try:
        text = read_bytes(path)
    except (OSError, EngramFileError) as error:
        raise EngramFileError(f"{where} cannot be read: {error}. {advice}") from error
    record: dict[str, Any] = parsed(dict[str, Any], text, where, advice=advice)
    # The version before anything else: another format's fields would be reported as damage.
    number = record.get(version_field)
    if number != version:
        newer = isinstance(number, int) and number > version
        raise EngramFileError(
            f"{where} has {version_field}={briefly(number)}, this engram reads {version}"
            + ("; pip install --upgrade engram" if newer else "")
            + f". {advice}"
        )
    # the form before the checksum, since its error names the field
    value: Form = parsed(form, text, where, advice=advice)
    verified(record, where)
    return value


def parsed_row(form: type[Form] | Any, row: Sequence[object], where: str | Path) -> Form:
    """Return a row of a database as a value of `form`, a NamedTuple that annotates its columns.

    SQLite keeps whatever it is given, so the types of a table's columns promise nothing.

    Raises:
        EngramFileError: one line that names the column, its value and what was expected.
    """

    def damaged(problem: str) -> EngramFileError:
        return EngramFileError(f"{where} is damaged: {problem}")

    hints: dict[str, Any] = _hints(form)  # type: ignore[arg-type]
    columns = zip(hints.items(), row, strict=True)
    return form(*(validated(hint, value, damaged, name=name) for (name, hint), value in columns))


@cache
def _hints(form: Any) -> dict[str, Any]:
    return get_type_hints(form, include_extras=True)
