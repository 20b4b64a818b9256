"""A checkpoint may be written in a wider dtype; reverting gives every byte of the narrow one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import engram
from engram.edit.checkpoint import revert_checkpoint
from engram.errors import EngramError, EngramFileError, SettingError
from tests.edit.test_checkpoint import digests, loaded, stored
from tests.edit.test_hostile_checkpoints import rewritten
from tests.helpers.edit_samples import random_edit, same_bits, tiny, weight_name, weights


@pytest.mark.parametrize("shard", ["5GB", "8KB"], ids=["single", "shards"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wider_weights_are_the_same_numbers_and_come_back_to_the_last_byte(
    tmp_path: Path, dtype: torch.dtype, shard: str
) -> None:
    lm = tiny(dtype=dtype)
    source = stored(lm, tmp_path / "source", shard)
    lm.model.float()
    first, second = random_edit(lm, seed=1), random_edit(lm, (0, 2), seed=2)
    one = first.to_checkpoint(source, tmp_path / "one", dtype="float32")
    two = second.to_checkpoint(one, tmp_path / "two")
    for folder, edits in ((one, [first]), (two, [first, second])):
        with engram.compose(edits).applied(lm):
            for how in (torch.float32, "auto"):  # config.json says float32, too
                assert same_bits(loaded(folder, how), weights(lm))
    left = revert_checkpoint(two, tmp_path / "left", first)
    with second.applied(lm):
        assert same_bits(loaded(left, "auto"), weights(lm))
    for edited in (one, two, left):
        back = revert_checkpoint(edited, tmp_path / f"back of {edited.name}")
        assert digests(back) == digests(source)


def test_an_edited_checkpoint_may_be_widened(tmp_path: Path) -> None:
    lm = tiny(dtype=torch.float16)
    source = stored(lm, tmp_path / "source")
    one = random_edit(lm, seed=1).to_checkpoint(source, tmp_path / "one")
    two = random_edit(lm, seed=2).to_checkpoint(one, tmp_path / "two", dtype="float32")
    assert digests(revert_checkpoint(two, tmp_path / "back")) == digests(source)


def test_integers_and_odd_sizes_stay(tmp_path: Path) -> None:
    lm = tiny(dtype=torch.float16)
    source = stored(lm, tmp_path / "source")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    more = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "longs": torch.arange(3),
        "scalar": torch.tensor(1.5, dtype=torch.float16),
        "empty": torch.empty(0, dtype=torch.float16),
        "tiny": torch.tensor([6e-8, -0.0, 65504.0], dtype=torch.float16),  # a subnormal too
    }
    safetensors.torch.save_file(tensors | more, source / "model.safetensors")
    edited = random_edit(lm).to_checkpoint(source, tmp_path / "edited", dtype="float32")
    after = safetensors.torch.load_file(edited / "model.safetensors")
    for name, value in more.items():
        wide = value.float() if value.is_floating_point() else value
        assert after[name].dtype == wide.dtype and torch.equal(after[name], wide)
    assert digests(revert_checkpoint(edited, tmp_path / "back")) == digests(source)


def test_the_dtype_that_is_stored_changes_nothing(tmp_path: Path) -> None:
    lm = tiny()
    source = stored(lm, tmp_path / "source")
    for name, options in {"a": {}, "b": {"dtype": "float32"}}.items():
        random_edit(lm).to_checkpoint(source, tmp_path / name, **options)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(revert_checkpoint(tmp_path / "b", tmp_path / "back")) == digests(source)


@pytest.mark.parametrize(
    ("stored_as", "dtype", "message"),
    [
        (torch.float32, "float16", "is stored in float32, which float16 would round"),
        (torch.float32, "bfloat16", "is stored in float32, which bfloat16 would round"),
        (torch.float16, "bfloat16", "is stored in float16, which bfloat16 would round"),
        (torch.float16, "foo", "dtype='foo': expected 'float16', "),
        (torch.float16, "save", "dtype='save': expected 'float16', "),
        (torch.float16, 3, "dtype=3: expected 'float16', "),
    ],
)
def test_a_dtype_that_would_round_is_refused(
    tmp_path: Path, stored_as: torch.dtype, dtype: Any, message: str
) -> None:
    lm = tiny(dtype=stored_as)
    source = stored(lm, tmp_path / "source")
    with pytest.raises(SettingError, match=message):
        random_edit(lm).to_checkpoint(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_has_its_own_dtype(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="a model in memory is written in its own dtype"):
        random_edit(tiny()).to_checkpoint(tiny(), tmp_path / "out", dtype="float32")


def test_pocket_is_written_in_the_dtype_in_which_it_is_computed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = engram.load("pocket")
    edit = random_edit(lm)
    edited = edit.to_checkpoint("pocket", tmp_path / "edited")
    with caplog.at_level(logging.INFO), edit.applied(lm):
        assert same_bits(weights(engram.load(edited)), weights(lm))
    assert not caplog.records
    back = revert_checkpoint(edited, tmp_path / "back")
    assert digests(back) == digests(engram.pocket.PATH)


HEADERS: dict[str, Any] = {
    "no text": 3,
    "no JSON": "{",
    "no object": "[]",
    "deep": "[" * 100_000,
    "another shape": lambda h: h["a"].update(shape=[1]),
    "another name": lambda h: h.update(b=h.pop("a")),
    "a name less": lambda h: h.pop("a"),
    "unknown dtype": lambda h: h["a"].update(dtype="F31"),
    "offsets": lambda h: h["a"].update(data_offsets=[0, 2**62]),
    "offsets of text": lambda h: h["a"].update(data_offsets="ab"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header_in_the_record_is_refused(tmp_path: Path, kind: str) -> None:
    lm = tiny(dtype=torch.float16)
    source = stored(lm, tmp_path / "source")
    edited = random_edit(lm).to_checkpoint(source, tmp_path / "edited", dtype="float32")

    def change(record: dict[str, Any]) -> None:
        text, damage = record["stored"]["model.safetensors"], HEADERS[kind]
        if callable(damage):
            header = json.loads(text.replace(weight_name(lm, 1), "a"))
            damage(header)
            text = json.dumps(header).replace('"a"', json.dumps(weight_name(lm, 1)))
        record["stored"]["model.safetensors"] = text if callable(damage) else damage

    rewritten(edited, change, stamp=True)
    with pytest.raises(EngramError):
        revert_checkpoint(edited, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["../victim", "/victim", "notes/read me.txt", "other", ""])
def test_the_record_names_files_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    lm = tiny(dtype=torch.float16)
    edited = random_edit(lm).to_checkpoint(
        stored(lm, tmp_path / "source"), tmp_path / "edited", dtype="float32"
    )
    rewritten(edited, lambda r: r["stored"].update({name: "x"}), stamp=True)
    with pytest.raises(EngramFileError, match="is no file of this checkpoint"):
        revert_checkpoint(edited, tmp_path / "back")
