"""Every row of the table is true of the library's own models; what has no row is found or
explained.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    ElectraConfig,
    ElectraForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import engram
from engram import Fact
from engram.errors import UnsupportedModelError
from engram.modules.hooks import record, substitute
from engram.modules.layouts import LAYOUTS
from engram.modules.resolve import kind_of, resolve
from engram.modules.weights import as_linear, is_transposed
from tests.helpers.tiny import (
    DENSE,
    ENCODER_DECODER,
    EVERY,
    EXPERTS,
    FAMILIES,
    MASKED,
    STATE_SPACE,
    make_model,
    tiny_lm,
)

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
    "mixtral",
    "bert",
    "roberta",
    "distilbert",
    "t5",
    "bart",
    "mamba",
    "mamba2",
    "falcon_mamba",
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
        assert (
            seen[lm.parts.mlp_out_name(layer)].shape[-1]
            == as_linear(lm.parts.mlp_out(layer)).shape[1]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_what_a_block_adds_to_the_residual_stream(family):
    """Block output - block input = attention + MLP, but for the families that norm the stream in
    between or scale a branch.
    """
    if family in ("opt-350m-like", "bloom-postnorm", "granite"):
        pytest.skip("the block norms its stream, or scales its branches")
    lm = tiny_lm(family, torch.float64)
    block, layout = lm.parts.block_name(2), lm.parts.layout
    names = [f"{block}.{layout.attention}", f"{block}.{layout.mlp}"]
    with record(lm.model, [block], [block, *names]) as seen, torch.no_grad():
        lm.model(torch.tensor([[1, 2, 3, 4]]))
    shape = seen[block].shape
    added = seen[block] - seen[f"{block}:input"]
    torch.testing.assert_close(
        added, seen[names[0]].view(shape) + seen[names[1]].view(shape), atol=1e-5, rtol=1e-5
    )


def ask(lm):
    """Return the recorded tensors of one forward pass, [1, 4, ...], and its logits."""
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return lm.model(
            ids, **({"decoder_input_ids": ids[:, :2]} if lm.kind == "encoder-decoder" else {})
        ).logits


@pytest.mark.parametrize("family", [*MASKED, *(f for f in ENCODER_DECODER if "bart" in f)])
def test_attention_and_mlp_are_what_is_added_where_the_stream_is_normalised_after_each_half(family):
    lm = tiny_lm(family, torch.float64)
    block, layout = lm.parts.block_name(2), lm.parts.layout
    names = [f"{block}.{layout.attention}", f"{block}.{layout.mlp}"]
    norms = [m for n, m in lm.parts.blocks[2].named_modules() if isinstance(m, nn.LayerNorm)]
    with record(lm.model, [block], [block, *names]) as seen:
        ask(lm)
    half = norms[0](seen[f"{block}:input"] + seen[names[0]])
    torch.testing.assert_close(seen[block], norms[1](half + seen[names[1]]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", [f for f in ENCODER_DECODER if "bart" not in f])
def test_attention_and_mlp_are_what_a_t5_block_adds(family):
    lm = tiny_lm(family, torch.float64)
    block, layout = lm.parts.block_name(2), lm.parts.layout
    names = [f"{block}.{layout.attention}", f"{block}.{layout.mlp}"]
    with record(lm.model, [block], [block, *names]) as seen:
        ask(lm)
    torch.testing.assert_close(
        seen[block], seen[f"{block}:input"] + seen[names[0]] + seen[names[1]], atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("family", STATE_SPACE)
def test_the_mixer_is_what_a_state_space_block_adds(family):
    lm = tiny_lm(family, torch.float64)
    block = lm.parts.block_name(2)
    with record(lm.model, [block], [block, f"{block}.mixer"]) as seen:
        ask(lm)
    added = (
        seen[block] - seen[f"{block}:input"]
    )  # the stream is float32 here, whatever the model's dtype
    torch.testing.assert_close(
        added, seen[f"{block}.mixer"], atol=1e-5, rtol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("family", EVERY)
def test_every_site_has_one_vector_a_token_and_what_is_put_there_matters(family):
    """Sites that the forward pass goes around (it may use a module's weight without calling it)
    would change nothing.
    """
    lm = tiny_lm(family)
    clean = ask(lm)
    for site in lm.parts.site_names():
        name = lm.parts.site_module_name(site, 1)
        with record(lm.model, outputs=[name]) as seen:
            ask(lm)
        assert seen[name].reshape(1, 4, -1).shape[-1] >= 4
        with substitute(
            {
                lm.model.get_submodule(name): lambda out: out.index_fill(
                    out.dim() - 2, torch.tensor([1]), 0.5
                )
            }
        ):
            assert not torch.allclose(ask(lm), clean, atol=1e-6), f"{site} is not in the path"


@pytest.mark.parametrize("family", ["mamba", "llama"])
def test_a_site_that_a_family_has_not_is_refused_with_those_that_it_has(family):
    has = {"mamba": "residual, mixer, in_proj, x_proj", "llama": "residual, mlp, attention"}[family]
    missing = {"mamba": "mlp", "llama": "mixer"}[family]
    with pytest.raises(
        UnsupportedModelError, match=f"model_type='{family}' has no site '{missing}'; it has {has}"
    ):
        tiny_lm(family).parts.site_module_name(missing, 0)


@pytest.mark.parametrize("family", [*MASKED, *(f for f in ENCODER_DECODER)])
def test_the_heads_stand_side_by_side_in_front_of_the_matrix_that_mixes_them(family):
    lm = tiny_lm(family)
    name = lm.parts.heads_out_name(1)
    with record(lm.model, inputs=[name]) as seen:
        ask(lm)
    assert seen[name].shape == (1, 4, as_linear(lm.model.get_submodule(name)).shape[1])
    assert seen[name].shape[-1] % lm.parts.n_heads == 0


def test_a_state_space_model_has_no_heads():
    with pytest.raises(
        UnsupportedModelError, match="model_type='mamba' has no heads that can be distinguished"
    ):
        tiny_lm("mamba").parts.heads_out_name(0)


@pytest.mark.parametrize("resized", [False, True], ids=["as loaded", "resized"])
@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_a_hook_on_the_embedding_reaches_the_encoder_only(family, resized):
    """Resizing a vocabulary leaves both stacks with one module; each gets its own again, with the
    same weight.
    """
    lm = tiny_lm(family)
    if resized:
        lm.model.resize_token_embeddings(330, mean_resizing=False)
        encoder, decoder = (
            lm.model.get_submodule(n) for n in (lm.parts.layout.embed, decoder_embedding(lm))
        )
        assert encoder is decoder
        lm.parts = resolve(lm.model)
        assert lm.parts.embed.weight is lm.model.get_submodule(decoder_embedding(lm)).weight
    with record(lm.model, outputs=[decoder_embedding(lm), lm.parts.layout.embed]) as clean:
        logits = ask(lm)
    with substitute({lm.parts.embed: torch.zeros_like}), record(lm.model, outputs=[*clean]) as seen:
        corrupted = ask(lm)
    assert torch.equal(seen[decoder_embedding(lm)], clean[decoder_embedding(lm)])
    assert not seen[lm.parts.layout.embed].any() and clean[lm.parts.layout.embed].any()
    assert not torch.allclose(logits, corrupted, atol=1e-6)


def decoder_embedding(lm):
    return lm.parts.layout.embed.replace("encoder", "decoder")


@pytest.mark.parametrize("family", ENCODER_DECODER)
def test_an_encoders_states_have_no_logits(family):
    with pytest.raises(
        UnsupportedModelError,
        match="the states of its encoder's blocks have no logits of their own",
    ):
        tiny_lm(family).parts.head(torch.zeros(1, 32))


@pytest.mark.parametrize("family", [*FAMILIES, *STATE_SPACE, *MASKED])
def test_the_head_is_the_models_own(family):
    lm = tiny_lm(family, torch.float64)
    last = lm.parts.block_name(lm.n_layers - 1)
    with record(lm.model, outputs=[last]) as seen, torch.no_grad():
        logits = lm.model(torch.tensor([[1, 2, 3, 4]])).logits
        mine = lm.parts.head(seen[last])
    tolerance = (
        1e-5 if family in STATE_SPACE else 1e-6
    )  # whose logits are float32 whatever the model's dtype
    torch.testing.assert_close(mine, logits, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_have_no_single_matrix(family):
    with pytest.raises(
        UnsupportedModelError, match=r"one MLP output matrix per expert.*choose a dense model"
    ):
        tiny_lm(family).parts.mlp_out(0)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        *(
            (
                family,
                "is a masked model: editing is offered for causal ones only.*choose a causal model",
            )
            for family in MASKED
        ),
        *(
            (family, "is an encoder-decoder model: editing is offered for causal ones only")
            for family in ENCODER_DECODER
        ),
        *(
            (family, "is a state-space model: its blocks have no MLP.*choose a transformer")
            for family in STATE_SPACE
        ),
    ],
)
def test_families_that_are_not_edited_say_why(family, why):
    lm = tiny_lm(family)
    with pytest.raises(UnsupportedModelError, match=why):
        lm.parts.mlp_out_name(0)
    with pytest.raises(UnsupportedModelError, match=why):
        engram.rewrite(lm, Fact("tower", "The {} is in", "Paris"))


@pytest.mark.parametrize(
    ("config", "names", "kind"),
    [
        (LlamaConfig(), ["LlamaForCausalLM"], "causal"),
        (LlamaConfig(), ["LlamaModel"], "causal"),
        (BertConfig(), ["BertForMaskedLM"], "masked"),
        (BertConfig(), ["BertForPreTraining"], "masked"),
        (BertConfig(is_decoder=True), ["BertLMHeadModel"], "causal"),
        (BertConfig(), None, "masked"),
        (make_model("t5").config, ["T5ForConditionalGeneration"], "encoder-decoder"),
    ],
)
def test_the_kind_is_that_of_the_class_or_of_the_config(config, names, kind):
    assert kind_of(config, names) == kind


def test_a_model_loaded_as_another_kind_than_its_row_says_is_refused():
    model = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True))
    with pytest.raises(
        UnsupportedModelError,
        match=r"BertLMHeadModel is a causal model, but model_type='bert' is offered as a masked "
        r"one",
    ):
        resolve(model)


def test_a_masked_family_without_a_row_is_not_guessed():
    with pytest.raises(
        UnsupportedModelError,
        match=r"no layout for model_type='electra'; masked families with one: bert, distilbert, "
        r"roberta\. .*add one row",
    ):
        resolve(ElectraForMaskedLM(ElectraConfig(**SMALL)))


def test_orientation_is_the_modules_type_even_where_the_matrix_is_square():
    linear, conv = nn.Linear(4, 4, bias=False), Conv1D(4, 4)
    assert not is_transposed(linear) and is_transposed(conv)
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x)[0], as_linear(linear) @ x[0])
    torch.testing.assert_close(conv(x)[0] - conv.bias, as_linear(conv) @ x[0])
    with pytest.raises(UnsupportedModelError, match="cannot tell how Embedding stores its weight"):
        is_transposed(nn.Embedding(2, 2))


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


class StrangerConfig(LlamaConfig):
    model_type = "stranger"


def stranger() -> LlamaForCausalLM:
    return LlamaForCausalLM(StrangerConfig(**SMALL, bos_token_id=0, eos_token_id=0)).eval()


def test_a_family_without_a_row_is_found_in_its_module_tree(caplog):
    parts = resolve(stranger())
    assert "no row for model_type='stranger'; found in its module tree" in caplog.text
    assert parts.layout == LAYOUTS["llama"]


def test_an_ambiguous_family_gets_the_row_to_add():
    model = stranger()
    model.model.norm2 = nn.LayerNorm(32)
    with pytest.raises(
        UnsupportedModelError,
        match=r"no layout for model_type='stranger'.*'stranger': Layout\(blocks='model.layers'",
    ):
        resolve(model)


def test_a_layer_that_does_not_exist():
    with pytest.raises(
        UnsupportedModelError, match="layer=4 does not exist; this model has layers 0 to 3"
    ):
        resolve(make_model("gpt2")).mlp_out_name(4)
