"""Every way to damage a little of a JSON file: values of every wrong type, missing keys, flipped
bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from engram.errors import EngramError

HUGE = "1e999 as a number"  # JSON has no name for it, and json.dumps no way to write it
WRONG = (None, True, -1, 1.5, float("nan"), HUGE, "a", [], {}, 2**70)


def damaged_texts(record: Any) -> Iterator[tuple[str, str]]:
    """Yield (what was done, JSON text): each value replaced in turn by every wrong one, each key
    left out, and lists in lists without end.
    """
    for path in list(_paths(record)):
        for wrong in WRONG:
            if path:
                yield f"{path} = {wrong!r}", _text(_with(record, path, wrong))
            else:
                yield f"all = {wrong!r}", _text(wrong)
        if path and isinstance(path[-1], str):
            yield f"{path} left out", _text(_with(record, path, leave_out=True))
    yield "nested", "[" * 100_000
    first = next(iter(record))
    yield "nested inside", json.dumps({**record, first: 0}).replace(": 0", ": " + "[" * 100_000, 1)


def flipped(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield copies of `data` with one bit of one byte changed, and copies that were cut short."""
    draw = random.Random(seed)
    for _ in range(count):
        at = draw.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    for at in (0, 1, len(data) // 2, len(data) - 2):
        yield data[:at]


def check_equal_or_refused(load: Callable[[], Any], expected: Any, path: Path, how: str) -> bool:
    """Check that loading gives an equal value, or an error of ours in one line that names the file.

    Returns:
        Whether it was refused.
    """
    try:
        value = load()
    except EngramError as error:
        text = str(error)
        assert path.name in text and "\n" not in text, f"{how}: {text}"
        return True
    except BaseException as error:
        pytest.fail(f"{how}: {type(error).__name__}: {error}")
    assert value == expected, f"{how} goes unnoticed"
    return False


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]  # the others are alike
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def _with(record: Any, path: tuple[Any, ...], wrong: Any = None, leave_out: bool = False) -> Any:
    record = inner = deepcopy(record)
    for key in path[:-1]:
        inner = inner[key]
    if leave_out:
        del inner[path[-1]]
    else:
        inner[path[-1]] = wrong
    return record


def _text(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False).replace(f'"{HUGE}"', "1e999")
