"""A llama.cpp adapter holds an edit's factors exactly, under llama.cpp's names and in its order."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.edit.gguf_export import _IN_ORDER, _PAIRED
from engram.errors import (
    BaseMismatchError,
    EngramFileError,
    MissingExtraError,
    UnsupportedModelError,
)
from engram.modules.weights import is_transposed
from tests.helpers.edit_samples import FAMILIES, edit_of_ranks, fact, random_edit, tiny, weight_name
from tests.helpers.tiny import DENSE, tiny_lm

gguf = pytest.importorskip("gguf", reason="needs the package gguf, see the extra of that name")


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def write_base(path: Path, lm: Any, names: dict[str, str], architecture: str, **heads: int) -> Path:
    """Write the weights of a model under llama.cpp's names, rows as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    for key, count in heads.items():
        writer.add_uint32(f"{architecture}.attention.{key}", count)
    for name, tensor in names.items():
        module = lm.model.get_submodule(name.removesuffix(".weight"))
        weight = module.weight.detach().float()
        writer.add_tensor(
            tensor, (weight.T if is_transposed(module) else weight).contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("ranks", [(3, 3), (1, 4), (2, 0)], ids=["equal", "padded", "dense"])
@pytest.mark.parametrize("d_ff", [24, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_the_change(
    tmp_path: Path, family: str, d_ff: int, ranks: tuple[int, int]
) -> None:
    lm = tiny(family, d_ff=d_ff)
    edit = edit_of_ranks(lm, ranks)
    keys, tensors = read(edit.to_gguf(tmp_path / "edit.gguf"))
    assert tensors.keys() == {
        f"blk.{layer}.ffn_down.weight.lora_{side}" for layer in (1, 2) for side in "ab"
    }
    rank = max(delta.low_rank()[0].shape[1] for delta in edit.deltas.values())
    for layer, delta in zip((1, 2), edit.deltas.values(), strict=True):
        a, b = (tensors[f"blk.{layer}.ffn_down.weight.lora_{side}"] for side in "ab")
        assert a.dtype == b.dtype == torch.float32
        assert (b.shape, a.shape) == ((16, rank), (rank, d_ff))
        assert torch.equal(b.double() @ a.double(), delta.dense(torch.float64))
    # llama.cpp multiplies by alpha / rank
    assert keys["adapter.lora.alpha"] == rank
    assert (keys["general.type"], keys["adapter.type"]) == ("adapter", "lora")
    assert keys["general.architecture"] == family


def test_the_base_is_named_as_on_the_hub_and_never_by_a_path(tmp_path: Path) -> None:
    edit = random_edit(tiny("llama"))
    edit = replace(edit, base={**edit.base, "model": "owner/Model-1B"})
    keys, _ = read(edit.to_gguf(tmp_path / "edit.gguf"))
    assert keys["general.base_model.0.name"] == "Model-1B"
    assert keys["general.base_model.0.organization"] == "owner"
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/owner/Model-1B"
    edit = replace(edit, base={**edit.base, "model": str(tmp_path / "model")})
    keys, _ = read(edit.to_gguf(tmp_path / "edit.gguf"))
    assert keys["general.base_model.0.name"] == "model"
    assert str(tmp_path).encode() not in (tmp_path / "edit.gguf").read_bytes()


NOT_IN_LLAMA_CPP = {"codegen", "gpt_neo", "ministral", "opt"}


@pytest.mark.parametrize("family", DENSE)
def test_every_family_has_its_name_or_is_refused(tmp_path: Path, family: str) -> None:
    lm = tiny_lm(family)
    name = f"{lm.parts.mlp_out_name(2)}.weight"
    base = describe_base(lm, [name])
    edit = Edit((fact(0),), "m", {}, {name: Delta(*_factors(base, name))}, base)
    if base["model_type"] in NOT_IN_LLAMA_CPP:
        with pytest.raises(UnsupportedModelError, match=r"knows no architecture .*to_peft"):
            edit.to_gguf(tmp_path / "edit.gguf")
        assert not list(tmp_path.iterdir())
        return
    keys, tensors = read(edit.to_gguf(tmp_path / "edit.gguf"))
    assert tensors.keys() == {f"blk.2.ffn_down.weight.lora_{side}" for side in "ab"}
    assert keys["general.architecture"] in gguf.MODEL_ARCH_NAMES.values()


def _factors(base: dict[str, Any], name: str, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    described = base["tensors"][name]
    out, into = described["shape"][:: -1 if described["transposed"] else 1]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)


QUERY, KEY = (f"model.layers.1.self_attn.{side}_proj.weight" for side in "qk")


def attention_edit(lm: Any) -> Edit:
    base = describe_base(lm, [QUERY, KEY])
    deltas = {name: Delta(*_factors(base, name)) for name in (QUERY, KEY)}
    return Edit((fact(0),), "m", {}, deltas, base)


def test_queries_and_keys_of_llama_are_reordered_by_heads(tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    lm = tiny_lm("llama")
    config = lm.model.config
    heads = {"head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads}
    assert len({*heads.values()}) == 2, "else a mistake between the two would not be seen"
    names = {QUERY: "blk.1.attn_q.weight", KEY: "blk.1.attn_k.weight"}
    base = write_base(tmp_path / "base.gguf", lm, names, "llama", **heads)
    edit = attention_edit(lm)
    _, tensors = read(edit.to_gguf(tmp_path / "edit.gguf", base=base))
    # as transformers reads the same rows back from a GGUF file, by its own code
    back = LlamaTensorProcessor()._reverse_permute_weights
    for (name, tensor), kv in zip(names.items(), (None, heads["head_count_kv"]), strict=True):
        b, a = (tensors[f"{tensor}.lora_{side}"] for side in "ba")
        rows = torch.from_numpy(back(b.numpy(), heads["head_count"], kv))
        assert torch.equal(rows, edit.deltas[name].left)
        assert not torch.equal(b, rows) and torch.equal(a, edit.deltas[name].right)


def test_queries_without_the_number_of_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"attn_q.*by heads.*base='model.gguf'.*--base"):
        attention_edit(tiny_lm("llama")).to_gguf(tmp_path / "edit.gguf")
    assert not list(tmp_path.iterdir())


def test_queries_of_an_architecture_whose_order_is_not_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"not known here how llama\.cpp orders"):
        attention_edit(tiny_lm("granite")).to_gguf(tmp_path / "edit.gguf")


def test_the_others_keep_their_rows(tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import (
        GGUF_SUPPORTED_ARCHITECTURES,
        TENSOR_PROCESSORS,
        TensorProcessor,
    )

    edit = attention_edit(tiny_lm("qwen2"))
    _, tensors = read(edit.to_gguf(tmp_path / "edit.gguf"))
    assert torch.equal(tensors["blk.1.attn_k.weight.lora_b"], edit.deltas[KEY].left)
    # transformers reads the files of these and turns no queries or keys
    table = torch.arange(12.0).reshape(4, 3).numpy()
    for architecture in _IN_ORDER:
        assert architecture in GGUF_SUPPORTED_ARCHITECTURES
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
        rows = processor.process(table, "blk.1.attn_q.weight").weights
        assert (rows == table).all(), architecture
    assert all(architecture in TENSOR_PROCESSORS for architecture in _PAIRED)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_with_the_edited_weights_gives_no_warning(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    lm, other = tiny(family), tiny(family, seed=1)
    names = {weight_name(lm, 1): "blk.1.ffn_down.weight"}
    edit = random_edit(lm)
    base = write_base(tmp_path / "base.gguf", lm, names, family)
    with caplog.at_level(logging.WARNING):
        edit.to_gguf(tmp_path / "edit.gguf", base=base)
        assert caplog.text == ""
        base = write_base(tmp_path / "other.gguf", other, names, family)
        edit.to_gguf(tmp_path / "again.gguf", base=base)
    assert "is not the weight that the edit was computed on" in caplog.text
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "edit.gguf").read_bytes()


def test_another_base_is_refused(tmp_path: Path) -> None:
    lm = tiny("llama")
    edit, target = random_edit(lm), tmp_path / "edit.gguf"
    names = {weight_name(lm, 1): "blk.1.ffn_down.weight"}
    for base, message in (
        (write_base(tmp_path / "gpt2", lm, names, "gpt2"), r"'gpt2', the edit is of 'llama'"),
        (
            write_base(tmp_path / "wide", tiny("llama", d_ff=32), names, "llama"),
            r"is \[16, 24\] in the edited model; .*wide has \[16, 32\]",
        ),
        (write_base(tmp_path / "none", lm, {}, "llama"), "none has no such weight"),
    ):
        with pytest.raises(BaseMismatchError, match=message):
            edit.to_gguf(target, base=base)
    assert not target.exists()


@pytest.mark.parametrize("text", [b"", b"GGUF", b"GGUF" + bytes(60), b"no model at all" * 9])
def test_a_file_that_is_no_base_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "base.gguf").write_bytes(text)
    with pytest.raises(EngramFileError, match=r"^.*base.gguf (is no GGUF file|is damaged|cannot)"):
        random_edit(tiny()).to_gguf(tmp_path / "edit.gguf", base=tmp_path / "base.gguf")
    with pytest.raises(EngramFileError, match="cannot be read"):
        random_edit(tiny()).to_gguf(tmp_path / "edit.gguf", base=tmp_path / "missing.gguf")


def test_an_adapter_replaces_an_adapter_and_nothing_else(tmp_path: Path) -> None:
    lm = tiny()
    edit = random_edit(lm)
    first = edit.to_gguf(tmp_path / "edit.gguf").read_bytes()
    assert edit.to_gguf(tmp_path / "edit.gguf").read_bytes() == first
    model = write_base(tmp_path / "model.gguf", lm, {}, "gpt2")
    before = model.read_bytes()
    with pytest.raises(EngramFileError, match="is a GGUF file, and no adapter"):
        edit.to_gguf(model)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EngramFileError, match="is no GGUF file"):
        edit.to_gguf(tmp_path / "notes.txt")
    assert model.read_bytes() == before and (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"'gguf' is not installed.*engram\[gguf\]"):
        random_edit(tiny()).to_gguf(tmp_path / "edit.gguf")
