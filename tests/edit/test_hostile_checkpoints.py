"""A checkpoint that somebody else made: its names, links, headers and records are data."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from engram.edit.checkpoint import revert_checkpoint
from engram.edit.safetensors_layout import tensor_locations
from engram.errors import EngramError, EngramFileError, NonFiniteError
from engram.files.checksums import stamped
from tests.edit.test_checkpoint import digests, stored
from tests.helpers.edit_samples import random_edit, tiny, weight_name

LM = tiny()
EDIT = random_edit(LM)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder with a checkpoint of shards in `source` and a victim beside it."""
    stored(LM, tmp_path / "source", "8KB")
    name = weight_name(LM, 1)
    weight = LM.model.get_parameter(name).detach()
    safetensors.torch.save_file({name: weight}, tmp_path / "victim.safetensors")
    return tmp_path


def index(source: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = source / "model.safetensors.index.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def only(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda record: record.update(weight_map={weight_name(LM, 1): name})


@pytest.mark.parametrize(
    "name",
    [
        "{home}/victim.safetensors",
        "../victim.safetensors",
        "a/../../victim.safetensors",
        "link.safetensors",
        "linked/victim.safetensors",
        "hard/../../victim.safetensors",
        "C:\\victim.safetensors",
        "~/victim.safetensors",
        "",
        ".",
        "pipe",
        "config.json",
        "engram/originals.safetensors",
        "\0",
    ],
)
def test_an_index_names_files_inside_its_folder_or_nothing_is_written(
    home: Path, name: str
) -> None:
    source = home / "source"
    (source / "link.safetensors").symlink_to(home / "victim.safetensors")
    (source / "linked").symlink_to(home)
    os.mkfifo(source / "pipe")
    index(source, only(name.format(home=home)))
    before = (home / "victim.safetensors").read_bytes()
    with pytest.raises(EngramFileError):
        EDIT.to_checkpoint(source, home / "out", force=True)
    assert (home / "victim.safetensors").read_bytes() == before
    assert not (home / "out").exists()


def test_a_hard_link_is_not_written_through(home: Path) -> None:
    source = home / "source"
    os.link(home / "victim.safetensors", source / "hard.safetensors")
    index(source, only("hard.safetensors"))
    before = (home / "victim.safetensors").read_bytes()
    out = EDIT.to_checkpoint(source, home / "out")
    assert (home / "victim.safetensors").read_bytes() == before
    assert (out / "hard.safetensors").read_bytes() != before
    assert (out / "hard.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize(
    "weight_map", [None, [], "model", {"a": 3}, {"a": None}, {"a": ["b"]}, {}], ids=str
)
def test_an_index_of_another_form_is_refused(home: Path, weight_map: object) -> None:
    index(home / "source", lambda record: record.update(weight_map=weight_map))
    with pytest.raises(EngramFileError):
        EDIT.to_checkpoint(home / "source", home / "out")


def test_an_index_nested_without_end_is_refused(home: Path) -> None:
    (home / "source" / "model.safetensors.index.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(EngramFileError, match=r"index.json is damaged.*recursion"):
        EDIT.to_checkpoint(home / "source", home / "out")


def test_a_tensor_in_two_files_is_refused(home: Path) -> None:
    source = home / "source"
    (source / "a.safetensors").write_bytes((home / "victim.safetensors").read_bytes())
    (source / "b.safetensors").symlink_to("a.safetensors")  # a link inside of the folder is fine
    index(source, lambda r: r.update(weight_map={"x": "a.safetensors", "y": "b.safetensors"}))
    with pytest.raises(EngramFileError, match=r"twice, in a.safetensors and b.safetensors"):
        EDIT.to_checkpoint(source, home / "out")


STRANGE: dict[str, Callable[[Path], object]] = {
    "a file outside": lambda folder: (folder / "notes.txt").symlink_to(
        folder.parent / "victim.safetensors"
    ),
    "a folder outside": lambda folder: (folder / "more").symlink_to(folder.parent),
    "nothing": lambda folder: (folder / "gone").symlink_to(folder.parent / "gone"),
    "itself": lambda folder: (folder / "circle").symlink_to("circle"),
    "a device": lambda folder: (folder / "null").symlink_to("/dev/null"),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "a pipe for weights": lambda folder: os.mkfifo(folder / "model.safetensors"),
    "a folder for weights": lambda folder: (folder / "model.safetensors").mkdir(),
    "a record elsewhere": lambda folder: (folder / "engram").symlink_to(folder.parent),
    "a record that is a pipe": lambda folder: os.mkfifo(folder / "engram"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_only_regular_files_of_the_folder_are_copied(home: Path, kind: str) -> None:
    STRANGE[kind](home / "source")
    with pytest.raises(EngramFileError):
        EDIT.to_checkpoint(home / "source", home / "out")
    assert not (home / "out").exists()


def test_snapshots_of_the_hubs_cache_are_copied(home: Path) -> None:
    cache = home / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "123"
    for i, path in enumerate(sorted((home / "source").rglob("*"))):
        link = snapshot / path.relative_to(home / "source")
        if path.is_dir():
            link.mkdir(parents=True)
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = cache / "blobs" / str(i)
        blob.write_bytes(path.read_bytes())
        blob.chmod(0o444)
        link.symlink_to(os.path.relpath(blob, link.parent))
    before = digests(cache)
    out = EDIT.to_checkpoint(snapshot, home / "out")
    assert digests(cache) == before and not any(path.is_symlink() for path in out.rglob("*"))
    assert digests(revert_checkpoint(out, home / "back")) == digests(home / "source")


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, tuple[Any, bytes]] = {
    "longer than the data": ({"a": A}, b"x" * 7),
    "shorter than the data": ({"a": A}, b"x" * 9),
    "overlapping": ({"a": A, "b": A | {"data_offsets": [4, 12]}}, b"x" * 12),
    "with a hole": ({"a": A, "b": A | {"data_offsets": [9, 17]}}, b"x" * 17),
    "negative": ({"a": A | {"data_offsets": [-8, 0]}}, b"x" * 8),
    "backwards": ({"a": A | {"data_offsets": [8, 0]}}, b"x" * 8),
    "huge offset": ({"a": A | {"data_offsets": [0, 2**62]}}, b"x" * 8),
    "larger than any": ({"a": A | {"data_offsets": [0, 2**70]}}, b"x" * 8),
    "fraction": ({"a": A | {"data_offsets": [0, 8.5]}}, b"x" * 8),
    "huge shape": ({"a": A | {"shape": [2**40, 2**40]}}, b"x" * 8),
    "another shape": ({"a": A | {"shape": [3]}}, b"x" * 8),
    "negative shape": ({"a": A | {"shape": [-2]}}, b"x" * 8),
    "another dtype": ({"a": A | {"dtype": "F64"}}, b"x" * 8),
    "unknown dtype": ({"a": A | {"dtype": "F31"}}, b"x" * 8),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
    "no object": ([], b""),
    "no entry": ({"a": 3}, b""),
    "no JSON": (b"{", b""),
    "no text": (b"\xff", b""),
    "deep": (b'{"a":' + b"[" * 100_000, b""),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(A).encode(),) * 2), b"x" * 8),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, kind: str) -> None:
    header, data = HEADERS[kind]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    with pytest.raises(EngramFileError, match="not a whole safetensors file"):
        tensor_locations(tmp_path)


@pytest.mark.parametrize("length", [0, 2**60, 2**63, 2**64 - 1])
def test_a_header_of_a_length_that_cannot_be_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(EngramFileError, match="not a whole safetensors file"):
        tensor_locations(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_a_cut_file_is_refused(home: Path, size: int) -> None:
    path = next((home / "source").glob("model-0*.safetensors"))
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(EngramFileError, match="not a whole safetensors file"):
        EDIT.to_checkpoint(home / "source", home / "out")


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object], stamp: bool) -> None:
    path = folder / "engram" / "record.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(stamped(record) if stamp else record))


RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "version true": lambda r: r.update(format_version=True),
    "version 1.0": lambda r: r.update(format_version=1.0),
    "version text": lambda r: r.update(format_version="1"),
    "newer": lambda r: r.update(format_version=2),
    "no version": lambda r: r.pop("format_version"),
    "no edits": lambda r: r.pop("edits"),
    "edits of another type": lambda r: r.update(edits={"0": 1}),
    "a row of another type": lambda r: r.update(edits=["edits/0"]),
    "forced text": lambda r: r["edits"][0].update(forced="no"),
    "forced null": lambda r: r["edits"][0].update(forced=None),
    "folder above": lambda r: r["edits"][0].update(folder="../../elsewhere"),
    "folder absolute": lambda r: r["edits"][0].update(folder="/elsewhere"),
    "folder linked": lambda r: r["edits"][0].update(folder="linked"),
    "folder null": lambda r: r["edits"][0].update(folder=None),
    "another edit": lambda r: r["edits"][0].update(sha256="0" * 64),
    "originals": lambda r: r.update(originals="0" * 64),
    "originals null": lambda r: r.update(originals=None),
    "now of another type": lambda r: r.update(now=[]),
    "now without a weight": lambda r: r.update(now={}),
    "now of another weight": lambda r: r.update(now={"x": "0" * 64}),
    "now a number": lambda r: r["now"].update(dict.fromkeys(r["now"], 1)),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_is_refused(home: Path, kind: str) -> None:
    out = EDIT.to_checkpoint(home / "source", home / "out")
    EDIT.save(home / "elsewhere")
    (out / "engram" / "linked").symlink_to(home / "elsewhere")
    rewritten(out, RECORDS[kind], stamp=True)
    with pytest.raises(EngramError):
        revert_checkpoint(out, home / "back")
    with pytest.raises(EngramError):
        random_edit(LM, seed=2).to_checkpoint(out, home / "more")


def test_a_change_in_the_record_that_forgot_the_checksum_is_noticed(home: Path) -> None:
    out = EDIT.to_checkpoint(home / "source", home / "out")
    rewritten(out, lambda r: r["edits"][0].update(forced=True), stamp=False)
    with pytest.raises(EngramFileError, match=r"record.json is damaged.*checksum"):
        revert_checkpoint(out, home / "back")


def test_an_edit_in_the_record_that_was_swapped_is_noticed(home: Path) -> None:
    out = EDIT.to_checkpoint(home / "source", home / "out")
    EDIT.with_receipt({"passed": False}).save(out / "engram" / "edits" / "0")
    with pytest.raises(EngramFileError, match=r"sha256 of edits/0/edit.json is not the recorded"):
        revert_checkpoint(out, home / "back")


def test_a_record_of_an_older_engram_is_read_with_a_note(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = EDIT.to_checkpoint(home / "source", home / "out")

    def older(record: dict[str, Any]) -> None:
        del record["checksum"], record["edits"][0]["sha256"]

    rewritten(out, older, stamp=False)
    assert digests(revert_checkpoint(out, home / "back")) == digests(home / "source")
    assert "record.json has no checksum (an older engram wrote it)" in caplog.text


@pytest.mark.parametrize(
    "original",
    [torch.ones(3, 3), torch.ones(24, 16, dtype=torch.float16), None],
    ids=["shape", "dtype", "none"],
)
def test_originals_that_do_not_fit_are_refused(home: Path, original: torch.Tensor | None) -> None:
    out = EDIT.to_checkpoint(home / "source", home / "out")
    raw = safetensors.torch.save({} if original is None else {weight_name(LM, 1): original})
    (out / "engram" / "originals.safetensors").write_bytes(raw)
    rewritten(out, lambda r: r.update(originals=hashlib.sha256(raw).hexdigest()), stamp=True)
    with pytest.raises(EngramFileError, match="has no original that fits it"):
        revert_checkpoint(out, home / "back")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("layer", [1, 2], ids=["edited", "another"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path, dtype: torch.dtype, layer: int, value: float
) -> None:
    lm = tiny(dtype=dtype)
    with torch.no_grad():
        lm.model.get_parameter(weight_name(lm, layer))[3, 4] = value
    stored(lm, tmp_path / "source")
    with pytest.raises(NonFiniteError, match=rf"{weight_name(lm, layer)} of .* holds 1 numbers"):
        EDIT.to_checkpoint(tmp_path / "source", tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    lm = tiny()
    (tmp_path / "source").mkdir()
    lm.model.config.save_pretrained(tmp_path / "source")
    torch.save(lm.model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(EngramFileError, match=r"pickle .pytorch_model.bin.*Convert them"):
        EDIT.to_checkpoint(tmp_path / "source", tmp_path / "out")
