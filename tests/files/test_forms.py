"""JSON of others, parsed: one line that names the field, its value and what was expected."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Le
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import EngramFileError, FactError
from engram.files.forms import parsed, read_json


@dataclass(frozen=True)
class Part:
    share: Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class Form:
    name: str
    steps: Annotated[int, Ge(1)] = 3
    layer: int | Literal["auto"] | None = None
    parts: tuple[Part, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)


def test_a_form_is_read() -> None:
    text = '{"name": "a", "layer": "auto", "parts": [{"share": 1}], "newer": 1}'
    assert parsed(Form, text, "f.json") == Form("a", layer="auto", parts=(Part(1.0),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON that can be read, EOF while parsing an object at line 1 column 1"),
        ("[" * 100_000, "no JSON that can be read, recursion limit exceeded"),
        (b'{"name": "\xff"}', "no JSON that can be read"),
        ('{"name": "\\ud800"}', "no JSON that can be read"),
        ("3", "3, expected an object"),
        ("null", "None, expected an object"),
        ("{}", "name is missing"),
        ('{"name": 3}', "name=3, expected a text"),
        ('{"name": "a", "steps": true}', "steps=True, expected a whole number"),
        ('{"name": "a", "steps": 1.5}', "steps=1.5, expected a whole number"),
        ('{"name": "a", "steps": "1"}', "steps='1', expected a whole number"),
        ('{"name": "a", "steps": null}', "steps=None, expected a whole number"),
        ('{"name": "a", "steps": 0}', "steps=0, expected at least 1"),
        ('{"name": "a", "layer": "x"}', "layer='x', expected a whole number or 'auto'"),
        ('{"name": "a", "parts": 3}', "parts=3, expected a list"),
        ('{"name": "a", "parts": [{"share": 2}]}', r"parts[0].share=2, expected at most 1"),
        ('{"name": "a", "parts": [{"share": 1}, {}]}', r"parts[1].share is missing"),
        ('{"name": "a", "parts": [{"share": NaN}]}', "share=nan, expected a finite number"),
        ('{"name": "a", "limits": {"b": 1e999}}', "limits.b=inf, expected a finite number"),
        ('{"name": "a", "limits": {"b": -Infinity}}', "limits.b=-inf, expected a finite number"),
    ],
)
def test_what_is_wrong_is_named(text: str | bytes, message: str) -> None:
    with pytest.raises(EngramFileError) as caught:
        parsed(Form, text, "f.json", advice="Copy it again")
    assert str(caught.value).startswith("f.json is damaged: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith(". Copy it again")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_the_error_may_be_of_another_class() -> None:
    with pytest.raises(FactError, match="line 3 is damaged"):
        parsed(Form, "3", "f.jsonl, line 3", error=FactError)


@given(st.text() | st.binary())
def test_any_text_is_a_form_or_an_error_of_ours(text: str | bytes) -> None:
    with pytest.raises(EngramFileError, match=r"^f is damaged: "):
        parsed(Form, text, "f")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"name": "a"}')
    assert read_json(path, Form) == Form("a")
    path.write_text('{"name": 3}')
    with pytest.raises(EngramFileError, match=r"f.json is damaged: name=3, expected a text"):
        read_json(path, Form)
