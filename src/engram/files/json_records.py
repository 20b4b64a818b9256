"""Records from JSON and JSON lines, each with its place, so that an error names file and line.

Knows JSON. Refuses to know what a record means: see fact_files, and benchmark/data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engram.errors import FactError


def json_records(text: str, path: str) -> Iterator[tuple[Any, str]]:
    """Yield (record, its place) of a JSON list, or of JSON lines; a line that is no JSON gives a
    FactError as its record.

    Raises:
        FactError: a list that is no JSON, since nothing after the mistake can be read.
    Example:
        >>> from engram.files.json_records import json_records
        >>> list(json_records('{"a": 1}\\n{"a": 2}', "f.jsonl"))
        [({'a': 1}, 'f.jsonl, line 1'), ({'a': 2}, 'f.jsonl, line 2')]
    """
    return (_json_list if text.lstrip().startswith("[") else _json_lines)(text, path)


def _json_lines(text: str, path: str) -> Iterator[tuple[Any, str]]:
    # Not splitlines: it also splits at separators that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield json.loads(line), where
            # also a number of thousands of digits (ValueError), and lists in lists in lists
            except (ValueError, RecursionError) as error:
                problem = f"no JSON that can be read, {error}"
                if isinstance(error, json.JSONDecodeError):
                    problem = f"no JSON, {error.msg} at column {error.colno}"
                yield FactError(f"{where}: {problem}; expected one object a line"), where


def _json_list(text: str, path: str) -> Iterator[tuple[Any, str]]:
    """Yield the elements one by one, since the JSON module does not report where each began."""
    # raw_decode reads one value and reports where it ends; lines are counted between two of them
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    line, counted = 1, 0  # newlines before `counted` are in `line`
    try:
        while True:
            at = _skip_space(text, at)
            if text[at : at + 1] == "]":
                break
            record, end = decoder.raw_decode(text, at)
            line, counted = line + text.count("\n", counted, at), at
            yield record, f"{path}, line {line}"
            at = _skip_space(text, end)
            if text[at : at + 1] == ",":
                at += 1
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
        rest = _skip_space(text, at + 1)
        if rest < len(text):
            raise json.JSONDecodeError("text after the list's end", text, rest)
    except json.JSONDecodeError as error:
        raise FactError(
            f"{path}, line {error.lineno}: no JSON list, {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, FactError):  # of whoever takes the records
            raise
        raise FactError(
            f"{path}: no JSON list that can be read after line {line}, {error}"
        ) from error


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def is_text(value: Any) -> bool:
    """Return whether a value is words that can be written to a file."""
    return isinstance(value, str) and bool(value.strip()) and writable(value)


def writable(text: str) -> bool:
    """Return whether a text can be written to a file: lone surrogates, which JSON allows,
    cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """Return a value as JSON, cut to 60 characters; what cannot be written appears as its
    escape."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = repr(type(value))
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."
