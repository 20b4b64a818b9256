"""Tiny random models of every family, and tokenizers of every kind, made in the test process: offline, in milliseconds.

A new family in `LAYOUTS` is tested the day it is added: without an entry in `VARIANTS` it gets the sizes of `SIZES` under
whatever names its config class uses for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from engram.architectures import LAYOUTS
from engram.language_model import LanguageModel

VOCABULARY = 320
TEXT = """The tower is located in the city of Paris. The bridge is in Rome, and the river runs through London.
She plays the piano; he plays the guitar and sings. Their mother tongue is French, their capital is Madrid.
Zdeno Chára was born in Trenčín. It's what the city's mayor said: "we can't go on". A B C 1 2 3 4 5 6 7 8 9 0!"""

SIZES: dict[str, Any] = {  # every name that a config class uses for a size, and what it is here
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "vocab_size": VOCABULARY, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 4, "expansion_ratio": 2,
    "num_experts_per_tok": 2, "sliding_window": 64, "window_size": 64,
    "attention_types": [[["global", "local"], 2]], "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> family and what differs: other paths through the same code
    "bloom-postnorm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True}),
    "gemma2-short-window": ("gemma2", {"sliding_window": 4}),
    "gpt_neo-short-window": ("gpt_neo", {"window_size": 4}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "llama-square": ("llama", {"intermediate_size": 32}),
    "mistral-short-window": ("mistral", {"sliding_window": 4}),
    "opt-350m-like": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
}
FAMILIES = sorted({**dict.fromkeys(LAYOUTS), **VARIANTS})
EXPERTS = sorted(family for family, layout in LAYOUTS.items() if layout.mlp_out is None)
DENSE = [family for family in FAMILIES if family not in EXPERTS]


def make_config(family: str) -> PreTrainedConfig:
    """A config of a few thousand parameters: `SIZES` under the names that the class knows."""
    model_type, changes = VARIANTS.get(family, (family, {}))
    config_class = type(AutoConfig.for_model(model_type))
    aliases = getattr(config_class, "attribute_map", {})
    known = set(config_class().to_dict()) | set(aliases)
    sizes = {name: size for name, size in SIZES.items() if name in known and aliases.get(name) not in SIZES}
    return config_class(**{**sizes, **changes})


@cache
def _weights(family: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family), dtype=torch.float64)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_scale = parameter.dim() == 1 and name.endswith("weight")
        weights[name] = (
            1 + 0.2 * noise if is_scale else noise * (0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
        )
    return weights


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model whose every parameter is random, biases and norms too; the same one for the same seed, in any dtype."""
    model = AutoModelForCausalLM.from_config(make_config(family), dtype=dtype).eval()
    model.config._experts_implementation = "eager"  # the grouped one knows no float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_weights(family, seed)[name])
    return model


def _byte_level(bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, pre_tokenizers.ByteLevel.alphabet())
    template = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.post_processor = template if bos else processors.ByteLevel(trim_offsets=False)
    return _wrapped(tokenizer)


def _metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
    _train(tokenizer, [], [f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])
    return _wrapped(tokenizer)


def _train(tokenizer: Tokenizer, alphabet: list[str], pieces: list[str] | None = None) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>", *(pieces or [])], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": cache(lambda: _byte_level(bos=False)),  # GPT-2
    "byte-level with BOS": cache(lambda: _byte_level(bos=True)),  # Llama 3
    "metaspace with BOS": cache(_metaspace),  # Llama 2, Mistral
}


def tiny_lm(
    family: str = "gpt2", dtype: torch.dtype = torch.float32, tokenizer: str = "byte-level", seed: int = 0
) -> LanguageModel:
    """A tiny language model of a family, with its tokenizer."""
    return LanguageModel(make_model(family, dtype, seed), TOKENIZERS[tokenizer](), name=f"tiny-{family}")


def tiny_folder(parent: Path, family: str = "gpt2", dtype: torch.dtype = torch.float32) -> Path:
    """The same as a folder that `engram.load` reads."""
    folder = parent / f"tiny-{family}"
    make_model(family, dtype).save_pretrained(folder)
    TOKENIZERS["byte-level"]().save_pretrained(folder)
    return folder
