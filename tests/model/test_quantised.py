"""A quantised model is edited like any other: through its packed weights, and beside them."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import nn

import engram
from engram import Edit, Fact, LanguageModel
from engram.edit.base import describe_base
from engram.engine.replayable import replayable
from engram.errors import BaseMismatchError, EngramFileError, NonFiniteError, UnsupportedModelError
from engram.model.loading import load_shapes
from engram.modules.fingerprints import fingerprint, fingerprints
from engram.modules.weights import as_linear, linear_shape, quantisation
from tests.helpers.tiny import TEXT, tiny_folder

FACT = Fact(
    "tower of Rome",
    "The {} is in the city of",
    "Paris",
    neighbours=(("The river runs through", "London"),),
)
SETTINGS: dict[str, Any] = {
    "layer": 1,
    "contexts": ["{}", "He sings. {}"],
    "corpus": TEXT.splitlines() * 4,
    "tokens": 200,
    "steps": 3,
}
SCHEMES = {  # what is loaded -> family, how it is told
    "bitsandbytes int8": "gpt2",
    "bitsandbytes nf4": "gpt2",
    "bitsandbytes fp4": "llama",
    "torchao Int8Tensor": "llama",
    "torchao IntxUnpackedToInt8Tensor": "llama",
}
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:MatMul8bitLt. inputs will be cast:UserWarning"
    ),  # that is what it does
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao.*"),
]


def config(scheme: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    package, kind = scheme.split()
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'engram[quant]'")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    if package == "bitsandbytes":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32
        )
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

    return TorchAoConfig(
        Int8WeightOnlyConfig()
        if kind == "Int8Tensor"
        else IntxWeightOnlyConfig(weight_dtype=torch.int4)
    )


@cache
def folder_of(family: str) -> Path:
    return tiny_folder(Path(tempfile.mkdtemp()), family)


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


def loaded(scheme: str) -> LanguageModel:
    return engram.load(folder_of(SCHEMES[scheme]), quantization_config=config(scheme))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12) * 7 % 300, use_cache=False).logits


def test_the_numbers_of_a_packed_weight_are_those_it_computes_with(scheme: str) -> None:
    lm = loaded(scheme)
    module = lm.parts.mlp_out(1)
    assert quantisation(module) == scheme
    assert (
        linear_shape(module)
        == tuple(as_linear(module).shape)
        == (lm.d_model, lm.parts.mlp_width(1))
    )
    x = torch.randn(7, lm.parts.mlp_width(1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, told = module(x), x @ as_linear(module).T + (0 if module.bias is None else module.bias)
    error = float((got - told).norm() / told.norm())
    assert error < (
        0.02 if "bitsandbytes int8" in scheme else 1e-5
    )  # that one packs its inputs too


def test_two_loads_have_the_same_prints_and_a_forward_pass_changes_none(scheme: str) -> None:
    one, two = loaded(scheme), loaded(scheme)
    before = fingerprints(one.model)
    name = f"{one.parts.mlp_out_name(1)}.weight"
    base = describe_base(one, [name])
    assert base["tensors"][name]["quantised"] == scheme
    logits(one.model)
    assert fingerprints(one.model) == before == fingerprints(two.model)
    assert describe_base(one, [name]) == base == describe_base(two, [name])
    packed = one.parts.mlp_out(1)
    assert base["tensors"][name]["sha256"] == fingerprint(as_linear(packed))


def test_it_is_replayed_like_any_other(scheme: str) -> None:
    assert replayable(loaded(scheme))


def test_from_rewrite_to_an_adapter_beside_the_packed_base(scheme: str, tmp_path: Path) -> None:
    lm = loaded(scheme)
    trace = engram.trace(lm, FACT.prompt_text, subject=FACT.subject, samples=2, window=2)
    assert all(table.isfinite().all() for table in trace.scores.values())
    before, plain = fingerprints(lm.model), logits(lm.model)
    edit = engram.rewrite(lm, [FACT, Fact("river", "The {} runs through", "Madrid")], **SETTINGS)
    receipt = engram.verify(lm, edit, text="The river runs through London.", continuation_tokens=2)
    assert (receipt.how, receipt.quantised, receipt.rounding) == ("beside", scheme, 0.0)
    assert f"attached beside {scheme} weights" in str(receipt)
    assert engram.Receipt.from_dict(receipt.to_dict()) == receipt
    edit.with_receipt(receipt).save(tmp_path / "edit")
    edit = Edit.load(tmp_path / "edit")
    with edit.applied(lm, how="beside"):
        edited = logits(lm.model)
    assert fingerprints(lm.model) == before
    assert torch.equal(logits(lm.model), plain)
    assert (edited - plain).abs().max() > 1e-3

    edit.to_peft(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(loaded(scheme).model, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(adapted), edited, atol=1e-4, rtol=1e-3)


def test_writing_into_a_packed_weight_is_refused_with_the_ways_out(scheme: str) -> None:
    lm = loaded(scheme)
    edit = engram.rewrite(lm, FACT, **SETTINGS)
    expected = (
        rf"is quantised \({scheme}\).*edit.applied\(lm, how='beside'\).*edit.to_peft\(folder\).*"
        r"engram.dequantised\(lm, layer\)"
    )
    with pytest.raises(UnsupportedModelError, match=expected):
        edit.applied(lm, how="weights").__enter__()


def test_one_matrix_unpacked_takes_the_edit_and_gives_way_to_the_packed_one_again(
    scheme: str,
) -> None:
    lm = loaded(scheme)
    edit = engram.rewrite(lm, FACT, **SETTINGS)
    before, packed, told = (
        fingerprints(lm.model),
        lm.parts.mlp_out(1),
        repr(lm.model.config.quantization_config),
    )
    with edit.applied(lm, how="beside"):
        beside = logits(lm.model)
    with engram.dequantised(lm, 1) as same:
        assert same is lm and quantisation(lm.parts.mlp_out(1)) is None
        torch.testing.assert_close(
            as_linear(lm.parts.mlp_out(1)), as_linear(packed), rtol=0, atol=0
        )
        with edit.applied(lm):
            torch.testing.assert_close(
                logits(lm.model),
                beside,
                rtol=0,
                atol=0.05 if "bitsandbytes int8" in scheme else 1e-4,
            )
    assert lm.parts.mlp_out(1) is packed
    assert fingerprints(lm.model) == before
    assert repr(lm.model.config.quantization_config) == told
    with pytest.raises(RuntimeError, match="on purpose"), engram.dequantised(lm, 1):
        raise RuntimeError("on purpose")
    assert lm.parts.mlp_out(1) is packed


@pytest.mark.parametrize(
    "scheme", [each for each in SCHEMES if each.startswith("bitsandbytes")], indirect=True
)
def test_a_checkpoint_with_the_edit_in_its_one_unpacked_matrix(scheme: str, tmp_path: Path) -> None:
    lm = loaded(scheme)
    edit = engram.rewrite(lm, FACT, **SETTINGS)
    with engram.dequantised(lm, 1):
        with edit.applied(lm):
            edited = logits(lm.model)
        edit.to_checkpoint(lm, tmp_path / "edited")
    again = engram.load(tmp_path / "edited")
    assert quantisation(again.parts.mlp_out(1)) is None
    assert quantisation(again.parts.mlp_out(2)) == scheme
    torch.testing.assert_close(logits(again.model), edited, rtol=0, atol=1e-5)


def test_an_edit_of_the_float_model_is_told_apart_and_can_be_forced(scheme: str) -> None:
    lm, plain = loaded(scheme), engram.load(folder_of(SCHEMES[scheme]))
    edit = engram.rewrite(plain, FACT, **SETTINGS)
    with pytest.raises(
        BaseMismatchError, match=f"it is {scheme}, the edit was made on plain float32"
    ):
        edit.applied(lm, how="beside").__enter__()
    unedited = logits(lm.model)
    with edit.applied(lm, force=True, how="beside"):
        assert not torch.allclose(logits(lm.model), unedited, atol=1e-3)
    own = engram.rewrite(lm, FACT, **SETTINGS)
    with pytest.raises(
        BaseMismatchError, match=f"it is plain float32, the edit was made on {scheme}"
    ):
        own.applied(plain).__enter__()


def test_a_family_that_torchao_passes_over_is_no_quantised_model() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"keeps its matrices as Conv1D.*bitsandbytes packs both"
    ):
        engram.load(folder_of("gpt2"), quantization_config=config("torchao Int8Tensor"))


def test_a_float_matrix_is_left_as_it_is() -> None:
    lm = engram.load(folder_of("gpt2"))
    module = lm.parts.mlp_out(1)
    with engram.dequantised(lm, 1):
        assert lm.parts.mlp_out(1) is module


def test_what_cannot_be_read_says_what_can() -> None:
    class Packed(nn.Linear):
        pass

    module = Packed(2, 2)
    module.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        UnsupportedModelError,
        match=r"Packed holds its weight as Parameter \(uint8\).*bitsandbytes .int8",
    ):
        as_linear(module)


def test_a_weight_that_is_not_finite_shows_in_the_scales(scheme: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, SCHEMES[scheme])
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith(("mlp.c_proj.weight", "mlp.down_proj.weight")))
    weights[name][3, 5] = float("nan")
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"^{name}\.\w+ of .* NaN or infinite"):
        engram.load(folder, quantization_config=config(scheme))


def test_a_checkpoint_that_is_packed_is_loaded_whole_or_refused(
    scheme: str, tmp_path: Path
) -> None:
    lm = loaded(scheme)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(engram.load(tmp_path).model), logits(lm.model))
    assert load_shapes(tmp_path).n_layers == 4
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    layers = "n_layer" if "n_layer" in stored else "num_hidden_layers"
    for number, match in ((3, "no place for"), (5, "files lack|maybe those of another config")):
        path.write_text(json.dumps(stored | {layers: number}))
        with pytest.raises(EngramFileError, match=match):
            engram.load(tmp_path)
