"""Tiny random models of every family, and tokenizers of every kind, made in the test process:
offline, in milliseconds.

A new family in `LAYOUTS` is tested the day it is added: without an entry in `VARIANTS` it gets the
sizes of `SIZES` under whatever names its config class uses for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from engram.model.language_model import LanguageModel
from engram.modules.layouts import AUTO_CLASSES, LAYOUTS, Layout

VOCABULARY = 320
TEXT = """\
The tower is located in the city of Paris. The bridge is in Rome, and the river runs through London.
She plays the piano; he plays the guitar and sings. Their mother tongue is French, their \
capital is Madrid.
Zdeno Chára was born in Trenčín. It's what the city's mayor said: "we can't go on". A B C \
1 2 3 4 5 6 7 8 9 0!"""

LETTERS = sorted(
    set(TEXT) - set(" \n")
)  # vocabularies written out where the library's trainer breaks ties by chance
WORDS = sorted(set(re.findall(r"\w\w+", TEXT)) - {"Madrid"})  # Paris is one token, Madrid several

SIZES: dict[str, Any] = {  # every name that a config class uses for a size, and what it is here
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "dim"), 32),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
        ),
        4,
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "expansion_ratio": 2,
    "d_kv": 8,
    "state_size": 8,
    "n_groups": 2,
    "chunk_size": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 64,
    "window_size": 64,
    "attention_types": [[["global", "local"], 2]],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

VARIANTS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # name -> family and what differs: other paths through the same code
    "bart-base-like": ("bart", {"scale_embedding": True, "forced_bos_token_id": 1}),
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
    "t5-v1.1-like": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8}),
}
EVERY = sorted({**dict.fromkeys(LAYOUTS), **VARIANTS})


def layout_of(family: str) -> Layout:
    """Return the row of a family, or of the family that a variant is one of."""
    return LAYOUTS[VARIANTS.get(family, (family, {}))[0]]


MASKED = [family for family in EVERY if layout_of(family).kind == "masked"]
ENCODER_DECODER = [family for family in EVERY if layout_of(family).kind == "encoder-decoder"]
STATE_SPACE = [
    family
    for family in EVERY
    if layout_of(family).kind == "causal" and layout_of(family).attention is None
]
FAMILIES = [
    f for f in EVERY if layout_of(f).kind == "causal" and layout_of(f).attention
]  # causal transformers, replayable
EXPERTS = [family for family in FAMILIES if layout_of(family).mlp_out is None]
DENSE = [family for family in FAMILIES if family not in EXPERTS]
# each of a kind of its own
EXAMPLES = ("gpt2", "llama", "gptj", "bloom", "gemma2", "mixtral", "mamba", "bert", "t5")


def crossed(families: Iterable[str], *values: Any) -> list[Any]:
    """Return every family with every value, for `parametrize`; `make test` runs every family with
    the first value, and only some of them with the others.
    """
    return [
        pytest.param(family, value, marks=[pytest.mark.slow] * (i > 0 and family not in EXAMPLES))
        for family in families
        for i, value in enumerate(values)
    ]


def mostly_slow(families: Iterable[str]) -> list[Any]:
    """Return every family, for `parametrize`; `make test` runs only those of EXAMPLES."""
    return [
        pytest.param(family, marks=[pytest.mark.slow] * (family not in EXAMPLES))
        for family in families
    ]


def make_config(family: str) -> PreTrainedConfig:
    """Return a config of a few thousand parameters: `SIZES` under the names that the class
    knows.
    """
    model_type, changes = VARIANTS.get(family, (family, {}))
    if (
        layout_of(family).kind == "encoder-decoder"
    ):  # which not every config class names until a checkpoint sets it
        changes = {"decoder_start_token_id": 0, **changes}
    config_class = type(AutoConfig.for_model(model_type))
    aliases = getattr(config_class, "attribute_map", {})
    known = set(config_class().to_dict()) | set(aliases)
    sizes = {
        name: size
        for name, size in SIZES.items()
        if name in known and aliases.get(name) not in SIZES
    }
    return config_class(**{**sizes, **changes})


@cache
def _weights(family: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = _blank(family, torch.float64)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_scale = parameter.dim() == 1 and name.endswith("weight")
        weights[name] = (
            1 + 0.2 * noise
            if is_scale
            else noise * (0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
        )
    return weights


def _blank(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose weights are still to be set, of the class that loads its kind."""
    return getattr(transformers, AUTO_CLASSES[layout_of(family).kind]).from_config(
        make_config(family), dtype=dtype
    )


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a model whose every parameter is random, biases and norms too; the same one for the
    same seed, in any dtype.
    """
    model = _blank(family, dtype).eval()
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
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
    )
    _train(tokenizer, [], [f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    return _wrapped(tokenizer)


def _word_piece() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*specials, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=around
    )
    names = dict(
        zip(
            ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
            specials,
            strict=True,
        )
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )


def _byte_level_with_mask(lstrip: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    mask = AddedToken("<mask>", lstrip=lstrip, special=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", mask],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 1), add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=mask,
        clean_up_tokenization_spaces=False,
    )


def _unigram() -> PreTrainedTokenizerFast:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -6.0),
        *((letter, -9.0) for letter in LETTERS),
    ]
    tokenizer = Tokenizer(
        models.Unigram([*pieces, *((f"▁{word}", -4.0) for word in WORDS)], unk_id=2)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<extra_id_0>", "<extra_id_1>"],
        clean_up_tokenization_spaces=False,
    )


def _train(tokenizer: Tokenizer, alphabet: list[str], pieces: list[str] | None = None) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>", *(pieces or [])],
        initial_alphabet=alphabet,
        show_progress=False,
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
MASKING: dict[
    str, Callable[[], PreTrainedTokenizerFast]
] = {  # tokenizers of models that are asked with a blank
    "word piece": cache(_word_piece),  # BERT
    "byte-level with mask": cache(lambda: _byte_level_with_mask(lstrip=True)),  # RoBERTa, BART
    "byte-level with greedless mask": cache(
        lambda: _byte_level_with_mask(lstrip=False)
    ),  # the space in front stays a token
    "unigram with sentinels": cache(_unigram),  # T5
}


def usual_tokenizer(family: str) -> str:
    """Which of `TOKENIZERS` and `MASKING` the family's checkpoints have the like of."""
    model_type, _ = VARIANTS.get(family, (family, {}))
    of_a_kind = {
        "masked": "word piece",
        "encoder-decoder": "unigram with sentinels",
        "causal": "byte-level",
    }
    return (
        "byte-level with mask"
        if model_type in ("roberta", "bart")
        else of_a_kind[layout_of(family).kind]
    )


def tiny_lm(
    family: str = "gpt2",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
    seed: int = 0,
) -> LanguageModel:
    """Return a tiny language model of a family, with its tokenizer."""
    made = {**TOKENIZERS, **MASKING}[tokenizer or usual_tokenizer(family)]()
    return LanguageModel(make_model(family, dtype, seed), made, name=f"tiny-{family}")


def tiny_folder(parent: Path, family: str = "gpt2", dtype: torch.dtype = torch.float32) -> Path:
    """Write the same to a folder that `engram.load` reads."""
    folder = parent / f"tiny-{family}"
    make_model(family, dtype).save_pretrained(folder)
    {**TOKENIZERS, **MASKING}[usual_tokenizer(family)]().save_pretrained(folder)
    return folder


PARTLY_FLOAT32 = {
    **dict.fromkeys(
        ("bloom", "bloom-postnorm", "codegen", "gemma2", "gemma2-short-window", "gptj", "mpt"),
        "softmax",
    ),
    **dict.fromkeys(("gpt_neo", "gpt_neo-short-window"), "queries, keys and softmax"),
    **dict.fromkeys(EXPERTS, "router"),
}
