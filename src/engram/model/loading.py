"""Load a language model: from a folder, from the Hugging Face hub, or the bundled pocket model.

Knows transformers' loaders and their errors. Refuses to know what the model is used for.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.activations import NewGELUActivation

from engram.errors import EngramError, UnsupportedModelError
from engram.model.language_model import LanguageModel
from engram.modules.layouts import AUTO_CLASSES
from engram.modules.resolve import kind_of
from engram.modules.weights import keep_differentiable, quantisation

log = logging.getLogger(__name__)


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> LanguageModel:
    """Load a language model by name.

    Args:
        name: "pocket" (the bundled model), a local folder, or a causal, masked or encoder-decoder
            model of the Hugging Face hub; its config says which of them it is.
        dtype: e.g. torch.bfloat16 or "bfloat16"; default: as the checkpoint stores it (pocket:
            float32).
        device_map: passed on to transformers, e.g. "auto" or "cuda:0"; default: the CPU.
        trust_remote_code: whether the checkpoint may bring Python code that is then executed.
        settings: passed on to `from_pretrained` of the model's class, e.g. a `quantization_config`
            of transformers.
    Raises:
        EngramError: nothing was found under that name, or it is not a language model.
    Example:
        >>> engram.load("pocket")
        LanguageModel('pocket', gpt2, 8 x 256, torch.float32)
    """
    path, name, dtype = _resolved(name, dtype)
    try:
        # Tokenizer and config first: they are small, and most mistakes show in them.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **settings)
        model = _class_for(config).from_pretrained(
            path,
            dtype=dtype or "auto",
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            **settings,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(name, error) from error
    if settings.get("quantization_config") is not None:
        _check_quantised(model, name)
    _fuse_activations(model)
    keep_differentiable(model)
    if model.dtype in (torch.float16, torch.bfloat16) and model.device.type == "cpu":
        log.warning(
            "%s is in %s, which many CPUs compute 100 times slower than float32; dtype='float32' "
            "takes twice the memory",
            name,
            str(model.dtype).removeprefix("torch."),
        )
    # What was resolved, and not what was given: a worker elsewhere gets the same dtype.
    loaded = {
        "name": name,
        "dtype": dtype,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
        **settings,
    }
    return LanguageModel(model, tokenizer, name, loaded=loaded)


def load_shapes(
    name: str | Path, *, dtype: torch.dtype | str | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """Load a model without its weights, on the meta device: its shapes and no numbers. Only its
    config is read.

    Args:
        name, dtype, trust_remote_code: as for `load`.
    Raises:
        EngramError: as for `load`.
    """
    path, name, dtype = _resolved(name, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        # Built from its config on the meta device: no memory, whatever the size.
        with torch.device("meta"):
            model = _class_for(config).from_config(
                config,
                dtype=dtype or config.dtype or torch.float32,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(name, error) from error
    return LanguageModel(model, tokenizer, name)


def _class_for(config: Any) -> Any:
    """Return the class of transformers that loads a model with this config."""
    return getattr(transformers, AUTO_CLASSES[kind_of(config)])


def _resolved(
    name: str | Path, dtype: torch.dtype | str | None
) -> tuple[str, str, torch.dtype | str | None]:
    """Return where a model lies, what it is called, and its dtype."""
    if str(name) != "pocket":
        return str(name), str(name), dtype
    from engram import pocket

    # Stored in a smaller dtype to keep the package small; computed in float32.
    return str(pocket.PATH), "pocket", dtype or torch.float32


def _not_found(name: str, error: Exception) -> EngramError:
    # The first line only: transformers adds paragraphs about tokens and caches.
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return EngramError(
        f"no causal language model found as {name!r}, nor a masked or encoder-decoder one: "
        f"{reason}\nExpected 'pocket', a folder with config.json and safetensors weights, or a "
        "name on the Hugging Face hub such as 'openai-community/gpt2-xl' (the hub needs a network "
        "connection the first time)."
    )


def _check_quantised(model: nn.Module, name: str) -> None:
    """Raise where nothing was quantised: torchao skips `Conv1D` silently, and so the whole of a
    GPT-2.
    """
    if not any(quantisation(module) for module in model.modules() if isinstance(module, nn.Linear)):
        raise UnsupportedModelError(
            f"quantization_config left every matrix of {name!r} in floating point: torchao packs "
            "nn.Linear and this family keeps its matrices as Conv1D, or the config leaves all of "
            "them out. bitsandbytes packs both kinds"
        )


def _fuse_activations(model: nn.Module) -> None:
    """Replace the tanh-GELU that GPT-2 and others write out in eight elementwise steps by PyTorch's
    fused one.

    The same function to rounding (1e-7); on a CPU a tenth of a traced prompt's time was spent in
    those steps.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.GELU(approximate="tanh"))
