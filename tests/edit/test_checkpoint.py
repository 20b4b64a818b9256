"""Checkpoints on disk: only touched bytes change, and every byte comes back."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from engram.edit.checkpoint import revert_checkpoint
from engram.edit.edit import Edit, compose
from engram.errors import BaseMismatchError, EngramFileError, UnsupportedModelError
from tests.helpers.edit_samples import FAMILIES, random_edit, same_bits, tiny, weight_name, weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stored(lm: Any, folder: Path, shard: str = "5GB") -> Path:
    lm.model.save_pretrained(folder, max_shard_size=shard)
    (folder / "notes").mkdir()
    (folder / "notes" / "read me.txt").write_text("kept as it is")
    return folder


def recorded(folder: Path) -> list[Edit]:
    """Return the edits in the record that engram keeps inside the checkpoint's folder."""
    return [Edit.load(each) for each in sorted((folder / "engram" / "edits").glob("*"))]


def loaded(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict())


@pytest.mark.parametrize("shard", ["5GB", "8KB"], ids=["single", "shards"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_apply_then_revert_leaves_every_byte(
    tmp_path: Path, family: str, dtype: torch.dtype, shard: str
) -> None:
    lm = tiny(family, dtype)
    source = stored(lm, tmp_path / "source", shard)
    assert len(list(source.glob("*.safetensors"))) > 1 or shard == "5GB"
    edit = random_edit(lm, (0, 2), rank=2)
    before = digests(source)
    edited = edit.to_checkpoint(source, tmp_path / "edited")
    assert digests(source) == before
    with edit.applied(lm):
        assert same_bits(loaded(edited, dtype), weights(lm))
    changed = {file for file, digest in digests(edited).items() if before.get(file) != digest}
    assert {file for file in changed if not file.startswith("engram/")} < set(before)
    assert recorded(edited) == [edit] and recorded(source) == []
    assert digests(revert_checkpoint(edited, tmp_path / "reverted")) == before


def test_only_the_touched_bytes_change(tmp_path: Path) -> None:
    lm = tiny("llama")
    source = stored(lm, tmp_path / "source")
    edited = random_edit(lm).to_checkpoint(source, tmp_path / "edited")
    old, new = ((folder / "model.safetensors").read_bytes() for folder in (source, edited))
    differing = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    assert (
        differing
        and differing[-1] - differing[0] < lm.model.get_parameter(weight_name(lm, 1)).numel() * 4
    )


@pytest.mark.parametrize("prefixed", [False, True], ids=["without", "with"])
def test_names_may_lack_or_have_a_prefix(tmp_path: Path, prefixed: bool) -> None:
    lm = tiny()
    source = stored(lm, tmp_path / "source")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    renamed = {
        f"model.{name}" if prefixed else name.removeprefix("transformer."): value
        for name, value in tensors.items()
    }
    safetensors.torch.save_file(renamed, source / "model.safetensors")
    edit = random_edit(lm)
    edited = edit.to_checkpoint(source, tmp_path / "edited")
    after = safetensors.torch.load_file(edited / "model.safetensors")
    name = weight_name(lm, 1)
    with edit.applied(lm):
        short = f"model.{name}" if prefixed else name.removeprefix("transformer.")
        assert torch.equal(after[short], lm.model.get_parameter(name))
    assert digests(revert_checkpoint(edited, tmp_path / "back")) == digests(source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edits_come_out_in_any_order_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    lm = tiny(dtype=dtype)
    source = stored(lm, tmp_path / "0")
    a, b, c = (
        random_edit(lm, layers, seed=seed) for seed, layers in enumerate([(0, 1), (1, 2), (1,)], 1)
    )
    one = a.to_checkpoint(source, tmp_path / "a")
    two = b.to_checkpoint(one, tmp_path / "ab")
    three = c.to_checkpoint(two, tmp_path / "abc")
    with a.applied(lm), b.applied(lm), c.applied(lm):
        assert same_bits(loaded(three, dtype), weights(lm))
    without_a = revert_checkpoint(three, tmp_path / "bc", a)
    only_c = revert_checkpoint(without_a, tmp_path / "c", b)
    assert recorded(without_a) == [b, c]
    with c.applied(lm):
        assert same_bits(loaded(only_c, dtype), weights(lm))
    assert digests(revert_checkpoint(only_c, tmp_path / "none", c)) == digests(source)
    assert digests(revert_checkpoint(three, tmp_path / "none too")) == digests(source)
    assert digests(revert_checkpoint(three, tmp_path / "ab again", c)) == digests(two)


def test_an_edit_that_others_rest_on_comes_out_after_them(tmp_path: Path) -> None:
    lm = tiny()
    source = stored(lm, tmp_path / "0")
    a = random_edit(lm, seed=1)
    with a.applied(lm):
        b = random_edit(lm, seed=2)
        with b.applied(lm):
            both = weights(lm)
    two = b.to_checkpoint(a.to_checkpoint(source, tmp_path / "a"), tmp_path / "ab")
    assert same_bits(loaded(two, torch.float32), both)
    with pytest.raises(BaseMismatchError, match="not the weight that the edit was made on"):
        revert_checkpoint(two, tmp_path / "b", a)
    assert digests(revert_checkpoint(two, tmp_path / "a again", b)) == digests(tmp_path / "a")


def test_an_edit_made_in_float32_rounds_once_into_a_half_precision_checkpoint(
    tmp_path: Path,
) -> None:
    lm = tiny(dtype=torch.float16)
    source = stored(lm, tmp_path / "0")
    lm.model.float()
    edit = random_edit(lm)
    edited = edit.to_checkpoint(source, tmp_path / "1")
    with edit.applied(lm):
        expected = lm.model.get_parameter(weight_name(lm, 1)).half()
    assert torch.equal(loaded(edited, torch.float16)[weight_name(lm, 1)], expected)


def test_other_weights_are_refused_unless_forced(tmp_path: Path) -> None:
    source = stored(tiny(seed=3), tmp_path / "0")
    edit = random_edit(tiny())
    with pytest.raises(
        BaseMismatchError, match=r"transformer.h.1.mlp.c_proj.weight with Edit.*not the weight"
    ):
        edit.to_checkpoint(source, tmp_path / "1")
    assert not (tmp_path / "1").exists()
    forced = edit.to_checkpoint(source, tmp_path / "1", force=True)
    assert digests(revert_checkpoint(forced, tmp_path / "2")) == digests(source)


def test_a_checkpoint_changed_by_something_else_is_refused(tmp_path: Path) -> None:
    lm = tiny()
    edit = random_edit(lm)
    edited = edit.to_checkpoint(stored(lm, tmp_path / "0"), tmp_path / "1")
    tensors = safetensors.torch.load_file(edited / "model.safetensors")
    tensors[weight_name(lm, 1)] += 1
    safetensors.torch.save_file(tensors, edited / "model.safetensors", metadata={"format": "pt"})
    for change in (
        lambda: revert_checkpoint(edited, tmp_path / "2"),
        lambda: edit.to_checkpoint(edited, tmp_path / "2"),
    ):
        with pytest.raises(BaseMismatchError, match="is not as engram left it"):
            change()
    assert not (tmp_path / "2").exists()


def test_what_is_not_there_cannot_be_reverted(tmp_path: Path) -> None:
    lm = tiny()
    source = stored(lm, tmp_path / "0")
    with pytest.raises(EngramFileError, match="has no edits to take out"):
        revert_checkpoint(source, tmp_path / "1")
    edited = random_edit(lm, seed=1).to_checkpoint(source, tmp_path / "1")
    with pytest.raises(EngramFileError, match="does not hold Edit"):
        revert_checkpoint(edited, tmp_path / "2", random_edit(lm, seed=2))
    (edited / "engram" / "originals.safetensors").write_bytes(b"")
    with pytest.raises(EngramFileError, match="not a whole record of edits"):
        revert_checkpoint(edited, tmp_path / "2")


@pytest.mark.parametrize("disk", ["full", "fills up"])
def test_a_full_disk_leaves_no_half_folder(
    tmp_path: Path, disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny()
    source = stored(lm, tmp_path / "0")
    usage = namedtuple("usage", "total used free")

    def copyfile(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if disk == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    else:
        monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(EngramFileError, match=r"needs .* are free there|No space left on device"):
        random_edit(lm).to_checkpoint(source, tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_disk_that_fills_up_under_a_model_in_memory_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny()

    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(lm.model, "save_pretrained", fails)
    with pytest.raises(EngramFileError, match="No space left on device"):
        random_edit(lm).to_checkpoint(lm, tmp_path / "1")
    assert not list(tmp_path.iterdir())


def test_folders_in_use_are_refused(tmp_path: Path) -> None:
    lm = tiny()
    source = stored(lm, tmp_path / "0")
    for folder in (source, source / "inside"):
        with pytest.raises(EngramFileError, match="itself or inside of it"):
            random_edit(lm).to_checkpoint(source, folder)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "file").touch()
    with pytest.raises(EngramFileError, match="holds other files; expected an empty folder"):
        random_edit(lm).to_checkpoint(source, tmp_path / "1")


def test_weights_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    lm = tiny()
    edit = random_edit(lm)
    source = tmp_path / "0"
    source.mkdir()
    with pytest.raises(EngramFileError, match=r"holds no model.safetensors"):
        edit.to_checkpoint(source, tmp_path / "1")
    (source / "pytorch_model.bin").touch()
    with pytest.raises(
        EngramFileError, match=r"weights as pickle .pytorch_model.bin.*Convert them"
    ):
        edit.to_checkpoint(source, tmp_path / "1")
    (source / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(EngramFileError, match="not a whole safetensors file"):
        edit.to_checkpoint(source, tmp_path / "1")
    safetensors.torch.save_file(
        {weight_name(lm, 1): torch.ones(24, 16, dtype=torch.int8)}, source / "model.safetensors"
    )
    with pytest.raises(
        UnsupportedModelError, match=r"stored as I8.*Edit the unquantised checkpoint"
    ):
        edit.to_checkpoint(source, tmp_path / "1")
    safetensors.torch.save_file({"other.weight": torch.ones(2)}, source / "model.safetensors")
    with pytest.raises(
        EngramFileError,
        match=r"no tensor 'transformer.h.1.mlp.c_proj.weight' .its tensors: other.weight",
    ):
        edit.to_checkpoint(source, tmp_path / "1")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(EngramFileError, match=r"index.json is damaged"):
        edit.to_checkpoint(source, tmp_path / "1")


def test_an_unknown_name_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuses(name: str, **options: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuses)
    with pytest.raises(EngramFileError, match="'no/such' is neither a folder nor a model"):
        random_edit(tiny()).to_checkpoint("no/such", tmp_path / "1")


def test_links_in_a_cache_become_files(tmp_path: Path) -> None:
    lm = tiny()
    blobs = stored(lm, tmp_path / "blobs")
    cache = tmp_path / "snapshots" / "revision"
    cache.mkdir(parents=True)
    for path in blobs.iterdir():
        if path.is_file():
            path.chmod(0o444)
            (cache / path.name).symlink_to(path)
    before = digests(blobs)
    edited = random_edit(lm).to_checkpoint(cache, tmp_path / "edited")
    assert not any(path.is_symlink() for path in edited.rglob("*"))
    assert digests(blobs) == before


def test_a_model_in_memory_becomes_an_edited_checkpoint(tmp_path: Path) -> None:
    lm = tiny("llama")

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    lm.tokenizer = Tokenizer()
    edit = compose([random_edit(lm, seed=1), random_edit(lm, (0,), seed=2)])
    before = weights(lm)
    folder = edit.to_checkpoint(lm, tmp_path / "edited")
    with edit.applied(lm):
        assert same_bits(loaded(folder, torch.float32), weights(lm))
    assert same_bits(weights(lm), before)
    assert (folder / "tokenizer.json").is_file()
    source = stored(lm, tmp_path / "source")
    assert same_bits(
        loaded(edit.to_checkpoint(source, tmp_path / "again"), torch.float32),
        loaded(folder, torch.float32),
    )
