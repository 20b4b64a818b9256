"""Tiny GGUF files, written by the package `gguf` from the tiny Llama: no download is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.tiny import TOKENIZERS, make_model

gguf = pytest.importorskip("gguf", reason="needs the package gguf, see the extra of that name")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Return the weights of a Llama under llama.cpp's names and in its order of rows."""
    config, result = model.config, {}
    for name, weight in model.state_dict().items():
        module, array = name.removesuffix(".weight"), weight.numpy()
        if module.startswith("model.layers."):
            _, _, block, module = module.split(".", 3)
            heads = {
                "self_attn.q_proj": config.num_attention_heads,
                "self_attn.k_proj": config.num_key_value_heads,
            }.get(module)
            if heads:  # its rotation pairs neighbours, where transformers pairs halves
                rows, columns = array.shape
                halves = array.reshape(heads, 2, rows // heads // 2, columns)
                array = halves.swapaxes(1, 2).reshape(rows, columns)
            result[f"blk.{block}.{NAMES[module]}.weight"] = np.ascontiguousarray(array)
        else:
            result[f"{NAMES[module]}.weight"] = array
    return result


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    quantised: str = "F32",
    fields: Mapping[str, Any] | None = None,
    changes: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write the tiny Llama and its tokenizer as a GGUF file.

    Args:
        quantised: kind of the matrices whose rows its blocks fit.
        fields: of the header, beside or instead of the usual ones; None leaves one out.
        changes: tensors beside or instead of the model's; None leaves one out.
    """
    model = make_model("llama")
    config, kind = model.config, gguf.GGMLQuantizationType[quantised]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, architecture)
    header = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": 10000.0,
        "vocab_size": config.vocab_size,
    }
    named = {f"{architecture}.{name}": value for name, value in header.items()}
    for name, value in {"general.name": "tiny", **named, **_tokenizer(), **(fields or {})}.items():
        if value is not None:
            add(writer, name, value)
    for name, array in {**tensors(model), **(changes or {})}.items():
        if array is None:
            continue
        if array.ndim == 2 and array.shape[1] % block == 0:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, name: str, value: Any) -> None:
    """Add a field of the type that llama.cpp's converter gives such a value."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(name, value)


def _tokenizer() -> dict[str, Any]:
    backend = json.loads(TOKENIZERS["byte-level"]().backend_tokenizer.to_str())
    vocabulary = sorted(backend["model"]["vocab"].items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [3, *[1] * (len(vocabulary) - 1)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
