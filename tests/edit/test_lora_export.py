"""An exported adapter does to the unchanged base what the edit does."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from engram.edit.edit import compose
from engram.edit.lora_export import _module
from engram.errors import EngramFileError, UnsupportedModelError
from tests.helpers.edit_samples import FAMILIES, edit_of_ranks, random_edit, tiny, weights

IDS = torch.arange(20).reshape(2, 10) % 60


@pytest.mark.parametrize("ranks", [(3, 3), (1, 4), (2, 0)], ids=["equal", "padded", "dense"])
@pytest.mark.parametrize("d_ff", [24, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_gives_the_edited_logits(
    tmp_path: Path, family: str, d_ff: int, ranks: tuple[int, int]
) -> None:
    lm = tiny(family, d_ff=d_ff)
    edit = edit_of_ranks(lm, ranks)
    with edit.applied(lm), torch.no_grad():
        expected = lm.model(IDS).logits
    edit.to_peft(tmp_path / "adapter")
    with torch.no_grad():
        unedited = lm.model(IDS).logits
        adapted = PeftModel.from_pretrained(lm.model, str(tmp_path / "adapter"))
        torch.testing.assert_close(adapted(IDS).logits, expected, rtol=0, atol=1e-5)
        assert (expected - unedited).abs().max() > 1e-3
        with adapted.disable_adapter():
            assert torch.equal(adapted(IDS).logits, unedited)
    wrapped = {
        name.split(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith("lora_A")
    }
    assert wrapped == {f"base_model.model.{name.removesuffix('.weight')}" for name in edit.deltas}


def test_merging_the_adapter_gives_the_edited_weights(tmp_path: Path) -> None:
    lm = tiny("gpt2")
    edit = compose([random_edit(lm, seed=1), random_edit(lm, (0,), seed=2)])
    with edit.applied(lm):
        expected = weights(lm)
    edit.to_peft(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(lm.model, str(tmp_path / "adapter")).merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_an_adapter_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    edit = random_edit(tiny())
    edit.to_peft(tmp_path / "adapter")
    edit.to_peft(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    edit.save(tmp_path / "edit")
    with pytest.raises(EngramFileError, match=r"expected a folder with adapter_config.json"):
        edit.to_peft(tmp_path / "edit")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("pocket", "pocket"),
        ("gpt2", "gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("/home/me/models/gpt2", "gpt2"),
        ("/home/me/models/gpt2/", "gpt2"),
        ("./gpt2", "gpt2"),
        ("../../models/gpt2", "gpt2"),
        ("~/gpt2", "gpt2"),
        ("C:\\models\\gpt2", "gpt2"),
        ("/c/models--openai-community--gpt2/snapshots/607a", "openai-community/gpt2"),
        (".", "gpt2"),
        ("/", "gpt2"),
    ],
)
def test_the_base_is_named_as_on_the_hub_and_never_by_a_path(
    tmp_path: Path, model: str, name: str
) -> None:
    edit = random_edit(tiny())
    edit = replace(edit, base={**edit.base, "model": model})
    edit.to_peft(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == name
    assert "/home" not in text and str(tmp_path) not in text


def test_a_folder_of_this_machine_that_looks_like_a_hub_name_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    edit = random_edit(tiny())
    edit = replace(edit, base={**edit.base, "model": "models/gpt2"})
    config = json.loads((edit.to_peft("adapter") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "gpt2"


def test_free_space_is_tried_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(EngramFileError, match="are free there"):
        random_edit(tiny()).to_peft(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_only_matrices_of_modules_can_be_exported() -> None:
    with pytest.raises(UnsupportedModelError, match="is not the weight of a module"):
        _module("transformer.h.0.mlp.c_proj.bias")
