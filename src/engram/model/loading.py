"""TODO model.loading"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.activations import NewGELUActivation

from engram.errors import EngramError, UnsupportedModelError
from engram.model.language_model import LanguageModel, log
from engram.modules.layouts import ModelKind
from engram.modules.resolve import kind_of
from engram.modules.weights import keep_differentiable, quantisation

_AUTO_CLASSES: dict[ModelKind, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> LanguageModel:
    """A language model by name.

    Args:
        name: "pocket" (the bundled model), a local folder, or a causal, masked or encoder-decoder
            model of the Hugging Face hub; which of them it is, its config says.
        dtype: e.g. torch.bfloat16 or "bfloat16"; default: as the checkpoint stores it (pocket:
            float32).
        device_map: passed on to transformers, e.g. "auto" or "cuda:0"; default: the CPU.
        trust_remote_code: whether the checkpoint may bring Python code that is then executed.
        options: passed on to `from_pretrained` of the model's class, e.g. a `quantization_config`
            of transformers.
    Raises:
        EngramError: nothing was found under that name, or it is not a language model.
    """
    where, shown = str(name), str(name)
    if shown == "pocket":
        from engram import pocket

        where, dtype = str(pocket.PATH), dtype or torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
        model = _AUTO_CLASSES[kind_of(config)].from_pretrained(
            where,
            dtype=dtype or "auto",
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(shown, error) from error
    if options.get("quantization_config") is not None:
        _check_quantised(model, shown)
    _fuse_activations(model)
    keep_differentiable(model)
    if model.dtype in (torch.float16, torch.bfloat16) and model.device.type == "cpu":
        log.warning(
            "%s is in %s, which many CPUs compute 100 times slower than float32; dtype='float32' takes twice the memory",
            shown,
            str(model.dtype).removeprefix("torch."),
        )
    lm = LanguageModel(model, tokenizer, name=shown)
    lm.loaded = {
        "name": shown,
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
        **options,
    }
    return lm


def load_shapes(
    name: str | Path, *, dtype: torch.dtype | str | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """A model without its weights, on the meta device: every shape is there and no number. Only its
    config is read.

    Args:
        name, dtype, trust_remote_code: as for `load`.
    Raises:
        EngramError: as for `load`.
    """
    where, shown = str(name), str(name)
    if shown == "pocket":
        from engram import pocket

        where, dtype = str(pocket.PATH), dtype or torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        wanted = dtype or config.dtype or torch.float32
        with torch.device("meta"):
            model = _AUTO_CLASSES[kind_of(config)].from_config(
                config, dtype=wanted, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(shown, error) from error
    return LanguageModel(model, tokenizer, name=shown)


def _not_found(shown: str, error: Exception) -> EngramError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return EngramError(
        f"no causal language model found as {shown!r}, nor a masked or encoder-decoder one: {reason}\n"
        "Expected 'pocket', a folder with config.json and safetensors weights, or a name on the Hugging Face hub "
        "such as 'openai-community/gpt2-xl' (the hub needs a network connection the first time)."
    )


def _check_quantised(model: nn.Module, shown: str) -> None:
    """Raise where nothing was quantised: torchao passes over `Conv1D` without a word, and so over
    the whole of a GPT-2.
    """
    if not any(quantisation(module) for module in model.modules() if isinstance(module, nn.Linear)):
        raise UnsupportedModelError(
            f"quantization_config left every matrix of {shown!r} in floating point: torchao packs nn.Linear and this family "
            "keeps its matrices as Conv1D, or the config leaves all of them out. bitsandbytes packs both kinds"
        )


def _fuse_activations(model: nn.Module) -> None:
    """Let PyTorch's fused tanh-GELU stand in for the eight elementwise steps it is written out in
    for GPT-2 and others.

    The same function to rounding (1e-7); on a CPU a tenth of a traced prompt's time was spent in
    those steps.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            home, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(home), leaf, nn.GELU(approximate="tanh"))
