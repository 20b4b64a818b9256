"""Fields of a record of a file, read one by one.

Knows types of JSON. What is wrong with a field is reported with file, line and name. Refuses to
know what a field means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engram.errors import FactError
from engram.files.json_records import is_text, shown


@dataclass(frozen=True)
class Fields:
    """An object of a file.

    Args:
        record: the parsed JSON.
        where: file and line.
        path: names that lead to it within the record.
    """

    record: Any
    where: str
    path: str = ""

    def wrong(self, name: str, expected: str) -> FactError:
        """Return the error of a field."""
        given = self.record.get(name) if isinstance(self.record, Mapping) else self.record
        return FactError(
            f"{self.where}: field {self.path + name!r} is {shown(given)}; expected {expected}"
        )

    def has(self, name: str) -> bool:
        """Tell whether the field exists and is not null."""
        return isinstance(self.record, Mapping) and self.record.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """Return words; without a default the field has to exist."""
        if default is not None and not self.has(name):
            return default
        value = self.record.get(name) if isinstance(self.record, Mapping) else None
        if not is_text(value):
            raise self.wrong(name, "text with words in it")
        return str(value)

    def texts(self, name: str, *, needed: bool = True) -> list[str]:
        """Return a list of texts; [] if it is missing and not needed."""
        if not needed and not self.has(name):
            return []
        value = self.record.get(name) if isinstance(self.record, Mapping) else None
        if not isinstance(value, list) or not all(is_text(text) for text in value):
            raise self.wrong(name, "a list of texts with words in them")
        return [str(text) for text in value]

    def inside(self, name: str) -> Fields:
        """Return the fields of an object within."""
        value = self.record.get(name) if isinstance(self.record, Mapping) else None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, self.where, f"{self.path}{name}.")

    def each(self, name: str, *, needed: bool = True) -> Iterator[Fields]:
        """Yield the fields of each object of a list within."""
        if not needed and not self.has(name):
            return
        value = self.record.get(name) if isinstance(self.record, Mapping) else None
        if not isinstance(value, list):
            raise self.wrong(name, "a list of objects")
        for number, element in enumerate(value):
            if not isinstance(element, Mapping):
                raise FactError(
                    f"{self.where}: field {f'{self.path}{name}[{number}]'!r} is {shown(element)}; "
                    "expected an object"
                )
            yield Fields(element, self.where, f"{self.path}{name}[{number}].")

    def id(self, name: str, default: str) -> str:
        """Return the number or text that names the record."""
        value = self.record.get(name) if isinstance(self.record, Mapping) else None
        if value is None:
            return default
        # True is an int in Python, and would become the id "True".
        if isinstance(value, bool) or not (isinstance(value, int) or is_text(value)):
            raise self.wrong(name, "a number or a text that names the record")
        return str(value)
