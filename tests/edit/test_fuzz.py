"""Any byte and any value of an edit's folder or of a checkpoint's record may be another one: what
is loaded is what was saved, or an error of ours.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.edit.checkpoint import revert_checkpoint
from engram.edit.edit import Edit, compose, load_edit
from engram.edit.prompt_edit import PromptEdit, Wording
from engram.edit.safetensors_layout import tensor_locations
from engram.errors import EngramError
from engram.files.checksums import stamped
from tests.edit.test_checkpoint import digests, stored
from tests.helpers.edit_samples import fact, random_edit, tiny

LM = tiny()
EDITS: dict[str, Any] = {
    "one": random_edit(LM).with_receipt({"passed": True, "answers": [1, 2.5, None]}),
    "composed": compose([random_edit(LM, (0, 2), seed=2), random_edit(LM, rank=2, seed=3)]),
    "prompt": PromptEdit(
        (fact(1),),
        "in-context",
        {"most": 4, "otherwise": "nearest", "reserve": 24, "encoder": "hidden"},
        (Wording("Tower 1 stands in City 1."),),
        "",
        {"model": "tiny", "model_type": "gpt2"},
    ),
}
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["", "../x", "/etc/passwd", "1", "\0", "float32", "prompt", "composed", 0, 1]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
damages = st.sampled_from(["flip", "delete", "insert", "cut"])


@pytest.fixture(scope="module", autouse=True)
def _without_notes() -> Iterator[None]:
    """Keep the notes about what has no checksum out of the log."""
    log = logging.getLogger("engram")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


@cache
def files_of(kind: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as home:
        folder = EDITS[kind].save(Path(home) / "edit")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def folder_of(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as home:
        for name, data in files.items():
            (Path(home) / name).write_bytes(data)
        yield Path(home)


def damaged(data: bytes, damage: str, at: int, byte: int) -> bytes:
    at %= len(data)
    return {
        "flip": data[:at] + bytes([data[at] ^ (byte or 1)]) + data[at + 1 :],
        "delete": data[:at] + data[at + 1 :],
        "insert": data[:at] + bytes([byte]) + data[at:],
        "cut": data[:at],
    }[damage]


def replaced(value: Any, picks: list[int], new: Any, delete: bool) -> Any:
    """Return a JSON value in which one value at any depth is another one, or gone."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return new
    key = keys[picks[0] % len(keys)]
    copied = dict(value) if isinstance(value, dict) else list(value)
    if len(picks) > 1 and isinstance(value[key], dict | list):
        copied[key] = replaced(value[key], picks[1:], new, delete)
    elif delete:
        del copied[key]
    else:
        copied[key] = new
    return copied


def result_of(call: Callable[[], Any]) -> Any:
    """Return what a call gives; None where it is an error of ours, of one line."""
    message = ""
    try:
        return call()
    except EngramError as error:
        message = str(error)
    assert message and "\n" not in message
    return None


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(EDITS)),
    st.integers(0, 2),
    damages,
    st.integers(0, 2**20),
    st.integers(0, 255),
)
def test_any_byte_of_an_edit(kind: str, file: int, damage: str, at: int, byte: int) -> None:
    files = files_of(kind)
    name = sorted(files)[file % len(files)]
    with folder_of({**files, name: damaged(files[name], damage, at, byte)}) as folder:
        assert result_of(lambda: load_edit(folder)) in (None, EDITS[kind])


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(sorted(EDITS)),
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    values,
    st.booleans(),
    st.booleans(),
)
def test_any_value_of_an_edit(
    kind: str, picks: list[int], new: Any, delete: bool, stamp: bool
) -> None:
    files = files_of(kind)
    record = replaced(json.loads(files["edit.json"]), picks, new, delete)
    text = json.dumps(stamped(record) if stamp else record)
    with folder_of({**files, "edit.json": text.encode()}) as folder:
        edit = result_of(lambda: load_edit(folder))
        if edit is None or not stamp:
            assert edit in (None, EDITS[kind])
            return
        # another edit then, but one that works
        assert load_edit(edit.save(folder / "again")) == edit
        for i in range(len(edit.facts)):
            result_of(lambda i=i: edit.without(i))


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint in float16, and the same edited in float32."""
    home = tmp_path_factory.mktemp("fuzz")
    source = stored(tiny(dtype=torch.float16), home / "source")
    one = random_edit(tiny(dtype=torch.float16))
    return source, one.to_checkpoint(source, home / "edited", dtype="float32")


def reverted(folder: Path) -> dict[str, str] | None:
    """Return the digests of what reverting gives; None where it is an error of ours."""
    back = result_of(lambda: digests(revert_checkpoint(folder, folder.parent / "back")))
    assert back is not None or not (folder.parent / "back").exists()
    return back


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), values, st.booleans(), st.booleans())
def test_any_value_of_a_record(
    edited: tuple[Path, Path], picks: list[int], new: Any, delete: bool, stamp: bool
) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(shutil.copytree(edited[1], Path(home) / "edited"))
        path = folder / "engram" / "record.json"
        record = replaced(json.loads(path.read_text()), picks, new, delete)
        path.write_text(json.dumps(stamped(record) if stamp else record))
        back = reverted(folder)
        assert stamp or back in (None, digests(edited[0]))


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.integers(0, 50), damages, st.integers(0, 2**20), st.integers(0, 255))
def test_any_byte_of_a_record(
    edited: tuple[Path, Path], file: int, damage: str, at: int, byte: int
) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(shutil.copytree(edited[1], Path(home) / "edited"))
        files = sorted(path for path in (folder / "engram").rglob("*") if path.is_file())
        path = files[file % len(files)]
        path.write_bytes(damaged(path.read_bytes(), damage, at, byte))
        assert reverted(folder) in (None, digests(edited[0]))


@settings(deadline=None, max_examples=200)
@given(damages, st.integers(0, 4000), st.integers(0, 255))
def test_any_byte_of_a_header(edited: tuple[Path, Path], damage: str, at: int, byte: int) -> None:
    data = (edited[1] / "model.safetensors").read_bytes()
    with folder_of({"model.safetensors": damaged(data, damage, at, byte)}) as folder:
        for place in (result_of(lambda: tensor_locations(folder)) or {}).values():
            assert len(place.read(folder)) == place.end - place.begin


@pytest.mark.parametrize("kind", EDITS)
def test_undamaged_edits_are_loaded(kind: str) -> None:
    with folder_of(files_of(kind)) as folder:
        loaded = load_edit(folder)
        assert loaded == EDITS[kind] and isinstance(loaded, Edit | PromptEdit)
