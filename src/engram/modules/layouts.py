"""Where a model family keeps the parts that we read and write: one row per family.

Knows dotted module names, keyed by `config.model_type`. Refuses to know what is done with the
parts: hooks, replay and editors get them by role (parts.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

log = logging.getLogger(__name__)


ModelKind = Literal["causal", "masked", "encoder-decoder"]


AUTO_CLASSES: dict[ModelKind, str] = {  # the class of transformers that loads a model of a kind
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class Layout:
    """Dotted names of the parts; those below a block are relative to it.

    Where a family normalises a module's output before it joins the residual stream (Gemma 2, OLMo
    2), `attention` and `mlp` name that norm: its output is the contribution that causal tracing
    restores. Where it normalises the stream itself after each half (BERT, BART), they name what is
    added just before. Of an encoder-decoder model, all names are the encoder's.
    """

    blocks: str  # list of blocks
    embed: str  # token embedding, before positions are added
    norm: str  # last norm before the unembedding; absent in some checkpoints
    # module whose (first) output is the attention's contribution to the residual stream
    attention: str | None
    mlp: str | None  # module whose output is the MLP's contribution
    mlp_out: str | None  # matrix that gets edited: d_ff -> d_model; None: editing is not offered
    # matrix that mixes the heads' outputs: its input is all heads side by side
    heads_out: str | None = None
    project_out: str | None = None  # map from the last norm to a smaller unembedding
    # more places to trace: name -> module with output [b, t, any]
    sites: Mapping[str, str] = field(default_factory=dict)
    kind: ModelKind = "causal"
    head: tuple[str, ...] = ()  # a masked model's modules from the last block to the logits


_LLAMA = Layout(
    "model.layers",
    "model.embed_tokens",
    "model.norm",
    "self_attn",
    "mlp",
    "mlp.down_proj",
    "self_attn.o_proj",
)


_GPT2 = Layout(
    "transformer.h",
    "transformer.wte",
    "transformer.ln_f",
    "attn",
    "mlp",
    "mlp.c_proj",
    "attn.c_proj",
)


# attention and MLP modules add the residual themselves, their last matrices do not
_BLOOM = Layout(
    "transformer.h",
    "transformer.word_embeddings",
    "transformer.ln_f",
    "self_attention.dense",
    "mlp.dense_4h_to_h",
    "mlp.dense_4h_to_h",
    "self_attention.dense",
)


# a norm after each half of a block: its output is what joins the residual stream
_SANDWICH = replace(_LLAMA, attention="post_attention_layernorm", mlp="post_feedforward_layernorm")


# one MLP output matrix per expert, so there is no single one to edit
_MOE = replace(_LLAMA, mlp_out=None)


# state-space models: no attention and no MLP; the mixer's parts are sites of their own
_MAMBA = Layout(
    "backbone.layers",
    "backbone.embeddings",
    "backbone.norm_f",
    attention=None,
    mlp=None,
    mlp_out=None,
    sites={"mixer": "mixer", "in_proj": "mixer.in_proj", "x_proj": "mixer.x_proj"},
)


# names of the encoder, whose states are traced; layer.0 is self-attention, layer.1 the MLP
_T5 = Layout(
    "encoder.block",
    "encoder.embed_tokens",
    "encoder.final_layer_norm",
    "layer.0.SelfAttention",
    "layer.1.DenseReluDense",
    None,
    "layer.0.SelfAttention.o",
    kind="encoder-decoder",
)


# norms come after each half, so there is no last norm; what is added just before them is traced
_BERT = Layout(
    "bert.encoder.layer",
    "bert.embeddings.word_embeddings",
    "",
    "attention.output.dense",
    "output.dense",
    None,
    "attention.output.dense",
    kind="masked",
    head=("cls",),
)


LAYOUTS: dict[str, Layout] = {  # key: model.config.model_type, never a checkpoint's name
    "bart": Layout(
        "model.encoder.layers",
        "model.encoder.embed_tokens",
        "",
        "self_attn",
        "fc2",
        None,
        "self_attn.out_proj",
        kind="encoder-decoder",
    ),
    "bert": _BERT,
    "bloom": _BLOOM,
    "codegen": replace(_GPT2, mlp_out="mlp.fc_out", heads_out="attn.out_proj"),
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "distilbert": Layout(
        "distilbert.transformer.layer",
        "distilbert.embeddings.word_embeddings",
        "",
        "attention.out_lin",
        "ffn.lin2",
        None,
        "attention.out_lin",
        kind="masked",
        head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    ),
    "falcon": replace(_BLOOM, attention="self_attention", mlp="mlp"),
    "falcon_mamba": _MAMBA,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "glm": _LLAMA,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, heads_out="attn.attention.out_proj"),
    "gpt_neox": Layout(
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        "attention",
        "mlp",
        "mlp.dense_4h_to_h",
        "attention.dense",
    ),
    "gptj": replace(_GPT2, mlp_out="mlp.fc_out", heads_out="attn.out_proj"),
    "granite": _LLAMA,
    "granitemoe": replace(_MOE, mlp="block_sparse_moe"),
    "llama": _LLAMA,
    "mamba": _MAMBA,
    "mamba2": replace(
        _MAMBA, sites={"mixer": "mixer", "in_proj": "mixer.in_proj", "gated_norm": "mixer.norm"}
    ),
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MOE,
    "mpt": Layout(
        "transformer.blocks",
        "transformer.wte",
        "transformer.norm_f",
        "attn",
        "ffn.down_proj",
        "ffn.down_proj",
        "attn.out_proj",
    ),
    "mt5": _T5,
    "nemotron": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _SANDWICH,
    "olmo3": _SANDWICH,
    "olmoe": _MOE,
    "opt": Layout(
        "model.decoder.layers",
        "model.decoder.embed_tokens",
        "model.decoder.final_layer_norm",
        "self_attn",
        "fc2",
        "fc2",
        "self_attn.out_proj",
        project_out="model.decoder.project_out",
    ),
    "phi": replace(
        _LLAMA, norm="model.final_layernorm", mlp_out="mlp.fc2", heads_out="self_attn.dense"
    ),
    "phi3": _LLAMA,
    "phimoe": _MOE,
    "qwen2": _LLAMA,
    "qwen2_moe": _MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "roberta": replace(
        _BERT,
        blocks="roberta.encoder.layer",
        embed="roberta.embeddings.word_embeddings",
        head=("lm_head",),
    ),
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": replace(_LLAMA, mlp_out="mlp.c_proj"),
    "t5": _T5,
    "umt5": _T5,
}
