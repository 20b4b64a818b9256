"""Every row of the table is true of the library's own models; what has no row is found or explained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from engram.architectures import LAYOUTS, as_linear, is_transposed, resolve
from engram.errors import UnsupportedModelError
from engram.hooks import record
from tests.tiny import DENSE, EXPERTS, FAMILIES, make_model, tiny_lm

PROMISED = [
    "gpt2",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "opt",
    "bloom",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "falcon",
    "olmo2",
    "stablelm",
    "starcoder2",
    "granite",
    "cohere",
]


def test_the_promised_families_have_rows():
    assert not set(PROMISED) - set(LAYOUTS)


@pytest.mark.parametrize("family", DENSE)
def test_mlp_out_maps_d_ff_to_d_model(family):
    lm = tiny_lm(family)
    for layer in range(lm.n_layers):
        assert as_linear(lm.parts.mlp_out(layer)).shape[0] == lm.d_model
        with record(lm.model, inputs=[lm.parts.mlp_out_name(layer)]) as seen, torch.no_grad():
            lm.model(torch.tensor([[1, 2, 3]]))
        assert seen[lm.parts.mlp_out_name(layer)].shape[-1] == as_linear(lm.parts.mlp_out(layer)).shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_what_a_block_adds_to_the_residual_stream(family):
    """Block output - block input = attention + MLP, but for the families that norm the stream in between or scale a branch."""
    if family in ("opt-350m-like", "bloom-postnorm", "granite"):
        pytest.skip("the block norms its stream, or scales its branches")
    lm = tiny_lm(family, torch.float64)
    block, layout = lm.parts.block_name(2), lm.parts.layout
    names = [f"{block}.{layout.attention}", f"{block}.{layout.mlp}"]
    with record(lm.model, [block], [block, *names]) as seen, torch.no_grad():
        lm.model(torch.tensor([[1, 2, 3, 4]]))
    shape = seen[block].shape
    added = seen[block] - seen[f"{block}:input"]
    torch.testing.assert_close(added, seen[names[0]].view(shape) + seen[names[1]].view(shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_models_own(family):
    lm = tiny_lm(family, torch.float64)
    last = lm.parts.block_name(lm.n_layers - 1)
    with record(lm.model, outputs=[last]) as seen, torch.no_grad():
        logits = lm.model(torch.tensor([[1, 2, 3, 4]])).logits
        mine = lm.parts.head(seen[last])
    torch.testing.assert_close(mine, logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_have_no_single_matrix(family):
    with pytest.raises(UnsupportedModelError, match=r"one MLP output matrix per expert.*choose a dense model"):
        tiny_lm(family).parts.mlp_out(0)


def test_orientation_is_the_modules_type_even_where_the_matrix_is_square():
    linear, conv = nn.Linear(4, 4, bias=False), Conv1D(4, 4)
    assert not is_transposed(linear) and is_transposed(conv)
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x)[0], as_linear(linear) @ x[0])
    torch.testing.assert_close(conv(x)[0] - conv.bias, as_linear(conv) @ x[0])
    with pytest.raises(UnsupportedModelError, match="cannot tell how Embedding stores its weight"):
        is_transposed(nn.Embedding(2, 2))


class StrangerConfig(LlamaConfig):
    model_type = "stranger"


def stranger() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    return LlamaForCausalLM(StrangerConfig(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def test_a_family_without_a_row_is_found_in_its_module_tree(caplog):
    parts = resolve(stranger())
    assert "no row for model_type='stranger'; found in its module tree" in caplog.text
    assert parts.layout == LAYOUTS["llama"]


def test_an_ambiguous_family_gets_the_row_to_add():
    model = stranger()
    model.model.norm2 = nn.LayerNorm(32)
    with pytest.raises(
        UnsupportedModelError, match=r"no layout for model_type='stranger'.*'stranger': Layout\(blocks='model.layers'"
    ):
        resolve(model)


def test_a_layer_that_does_not_exist():
    with pytest.raises(UnsupportedModelError, match="layer=4 does not exist; this model has layers 0 to 3"):
        resolve(make_model("gpt2")).mlp_out_name(4)
