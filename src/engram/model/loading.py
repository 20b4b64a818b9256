"""Load a language model: by a short name, from a folder, a GGUF file, or the Hugging Face hub.

What is loaded is what was asked for, or an error: files are checked before they are opened, weights
against the config, and numbers for being finite. Knows transformers' loaders and their errors.
Refuses to know what the model is used for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.peft_utils import find_adapter_config_file

from engram.checks import checked
from engram.errors import EngramError, EngramFileError, SettingError, UnsupportedModelError
from engram.model.checkpoint_files import CONVERT, check_config, check_folder
from engram.model.config_limits import check_sizes, check_tables, check_tokenizer
from engram.model.dequantised_gguf import checkpoint_of
from engram.model.language_model import LanguageModel
from engram.model.load_settings import (
    check_device_map,
    check_dtype,
    check_settings,
    of_config,
    of_loader,
    of_place,
)
from engram.model.named_models import NAMED_MODELS, Place, place_of
from engram.model.quiet import quietly
from engram.model.whole_weights import check_finite, check_names, check_stored
from engram.modules.layouts import AUTO_CLASSES
from engram.modules.resolve import kind_of
from engram.modules.weights import keep_differentiable, quantisation

log = logging.getLogger(__name__)

_REMOTE = (
    "refused. If you trust its author and have read it, pass allow_remote_code=True to engram.load"
)


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    allow_remote_code: bool = False,
    **settings: Any,
) -> LanguageModel:
    """Load a language model by name.

    Args:
        name: "pocket" (the bundled model), "smollm2" (a real one, see docs/real-models.md), a local
            folder, a GGUF file, or a causal, masked or encoder-decoder model of the Hugging Face
            hub; its config says which of them it is. A GGUF file is dequantised once, into the
            cache, and loaded from there in float32.
        dtype: e.g. torch.bfloat16 or "bfloat16"; default: as the checkpoint stores it (pocket:
            float32).
        device_map: passed on to transformers, e.g. "auto" or "cuda:0"; default: the CPU.
        allow_remote_code: whether Python code that comes with the checkpoint may be executed.
        settings: passed on to `from_pretrained` of the model's class, e.g. a `revision` or a
            `quantization_config` of transformers; or fields of the model's config.
    Raises:
        EngramError: nothing was found under that name, or it is not a language model.
        EngramFileError: a file is damaged, or config.json does not describe the weights.
        NonFiniteError: a weight is NaN or infinite.
        SettingError: a wrong dtype, device or setting; nothing was loaded.
    Example:
        >>> engram.load("pocket")
        LanguageModel('pocket', gpt2, 8 x 256, torch.float32)
    """
    checked("allow_remote_code", allow_remote_code, bool)
    check_settings(settings)
    check_device_map(device_map)
    place, name, dtype = _resolved(name, dtype)
    with _errors_of(name, advice=place.advice), quietly(), checkpoint_of(place.path) as path:
        source = _opened(path, name, settings, allow_remote_code)
        if source.is_plain:
            # Names and shapes first, on the meta device: transformers makes up what is missing, in
            # any size that a config names, before it reports it.
            check_device_map(device_map, _checked_shapes(source, name))
        # Of packed weights, names and shapes show only here, and random numbers cannot be packed.
        part = "" if source.is_plain else "its packed weights, maybe those of another config: "
        with _errors_of(name, part):
            model, info = source.read(dtype=dtype or "auto", device_map=device_map, **source.loader)
        check_names(info, name)
        check_finite(model, name)
    if settings.get("quantization_config") is not None:
        _check_quantised(model, name)
    _fuse_activations(model)
    keep_differentiable(model)
    _warn_if_slow(model, name)
    # What was resolved, and not what was given: a worker elsewhere gets the same dtype.
    loaded = {
        "name": name,
        "dtype": dtype,
        "device_map": device_map,
        "allow_remote_code": allow_remote_code,
        **settings,
    }
    return LanguageModel(model, source.tokenizer, name, loaded=loaded)


def load_shapes(
    name: str | Path, *, dtype: torch.dtype | str | None = None, allow_remote_code: bool = False
) -> LanguageModel:
    """Load a model without its weights, on the meta device: its shapes and no numbers. Only its
    config is read, and of weights in a folder their names and shapes.

    Args:
        name, dtype, allow_remote_code: as for `load`.
    Raises:
        EngramError: as for `load`.
    """
    checked("allow_remote_code", allow_remote_code, bool)
    place, name, dtype = _resolved(name, dtype)
    shapes_of = partial(checkpoint_of, weights=False)
    with _errors_of(name, advice=place.advice), quietly(), shapes_of(place.path) as path:
        source = _opened(path, name, {}, allow_remote_code, weights=False)
        if source.dtypes and source.is_plain:
            _checked_shapes(source, name)
        # Built from its config on the meta device: no memory, whatever the size.
        with torch.device("meta"):
            model = source.model_class.from_config(
                source.config,
                dtype=dtype or source.config.dtype or torch.float32,
                trust_remote_code=allow_remote_code,
            )
    return LanguageModel(model, source.tokenizer, name)


@dataclass(frozen=True)
class _Source:
    """A model whose small files are read, and whose weights are still to be."""

    path: str
    tokenizer: Any
    config: Any
    model_class: Any
    dtypes: dict[str, str]  # of the tensors in a folder's files; none: of the hub, or no weights
    place: dict[str, Any]  # settings: where its files are, whether their code may be executed
    loader: dict[str, Any]  # settings of the loader of weights

    @property
    def is_plain(self) -> bool:
        """Return whether the stored weights have the names and shapes of the model's."""
        packing = getattr(self.config, "quantization_config", None)
        # a way of packing that transformers does not know, it ignores
        return packing is None or not AutoHfQuantizer.supports_quant_method(packing)

    def read(self, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return the model with its weights, and transformers' report about them."""
        return self.model_class.from_pretrained(
            self.path,
            config=self.config,
            use_safetensors=True,
            output_loading_info=True,
            **self.place,
            **how,
        )


def _opened(
    path: str, name: str, settings: dict[str, Any], allow_remote_code: bool, *, weights: bool = True
) -> _Source:
    """Return a source of a model: its tokenizer and config are small, and most mistakes show in
    them.
    """
    place = {**of_place(settings), "trust_remote_code": allow_remote_code}
    dtypes: dict[str, str] = {}
    folder = Path(path)
    if os.path.lexists(folder) and not folder.is_dir():
        raise EngramFileError(f"{path} is no folder; expected a folder with a checkpoint's files")
    if adapter := find_adapter_config_file(path, **of_place(settings)):
        # transformers would load the model that the adapter names, from wherever that is
        raise EngramFileError(f"{path} is an adapter ({adapter}); load the model it belongs to")
    if folder.is_dir():
        folder = folder / place.get("subfolder", "")
        dtypes = check_folder(folder, weights=weights, variant=settings.get("variant"))
    else:
        stored, _ = PreTrainedConfig.get_config_dict(path, **of_place(settings))
        check_config(stored, f"config.json of {name}")
    config = AutoConfig.from_pretrained(path, **place)
    if changes := of_config(settings, {*config.to_dict(), *config.attribute_map}):
        config = AutoConfig.from_pretrained(path, **place, **changes)
    check_sizes(config, len(dtypes), f"config.json of {name}")
    if not allow_remote_code and "/" in str(attention := config._attn_implementation):
        raise SettingError(f"config.json names {attention!r}, code of the hub: {_REMOTE}")
    with _errors_of(name, "its tokenizer: "):
        tokenizer = AutoTokenizer.from_pretrained(path, **place)
    check_tokenizer(tokenizer, config, name)
    model_class = getattr(transformers, AUTO_CLASSES[kind_of(config)])
    return _Source(path, tokenizer, config, model_class, dtypes, place, of_loader(settings))


def _checked_shapes(source: _Source, name: str) -> PreTrainedModel:
    """Return the model on the meta device, where its names and shapes are those of the files."""
    # Also what a model computes when it is made, such as a mask of all positions by all positions.
    with torch.device("meta"):
        model, info = source.read(device_map="meta", ignore_mismatched_sizes=True)
    check_names(info, name)
    check_stored(model, source.dtypes, name)
    check_tables(model, f"config.json of {name}")
    return model


def _resolved(
    name: str | Path, dtype: torch.dtype | str | None
) -> tuple[Place, str, torch.dtype | None]:
    """Return where a model is, what it is called, and its dtype."""
    checked("name", name, str | os.PathLike)
    place = place_of(name)
    return place, str(name), check_dtype(dtype) or check_dtype(place.dtype)


@contextmanager
def _errors_of(name: str, part: str = "", advice: str = "") -> Iterator[None]:
    """Turn whatever the libraries of a loader raise into one line about the model, or a part."""
    try:
        yield
    except (EngramError, MemoryError):
        raise
    except Exception as error:  # their parsers raise errors of every kind on damaged files
        raise _not_loaded(name, part, advice, error) from error


def _not_loaded(name: str, part: str, advice: str, error: Exception) -> EngramError:
    if isinstance(error, StrictDataclassError) and error.__cause__:
        error = TypeError(f"config.json: {error.__cause__}")  # it has the same once more around it
    reason = shorten(str(error), 300, placeholder=" ...").rstrip(".")  # they write paragraphs
    if isinstance(error, KeyError):
        reason = f"no such name: {reason}"
    elif not isinstance(error, OSError | TypeError | ValueError) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    reason = part + reason
    if "trust_remote_code" in str(error):
        return SettingError(f"{name} has code of its own that it would execute: {_REMOTE}")
    if "`use_safetensors=True`" in str(error):
        return EngramFileError(
            f"{name} has no safetensors weights, and engram opens no pickled ones. {CONVERT}"
        )
    if Path(name).is_dir():
        return EngramFileError(
            f"{name} cannot be loaded: {reason}. Expected config.json, a tokenizer "
            "and safetensors weights, as transformers saves them"
        )
    return EngramError(
        f"no causal language model found as {name!r}, nor a masked or encoder-decoder one: "
        f"{reason}. Expected 'pocket', a folder with config.json and safetensors weights, a GGUF "
        f"file, a short name ({', '.join(NAMED_MODELS)}), or a name on the Hugging Face hub such "
        "as 'openai-community/gpt2-xl' (the hub needs a network connection the first time)"
        + (f". Or bring it here: {advice}" if advice else "")
    )


def _warn_if_slow(model: PreTrainedModel, name: str) -> None:
    """Warn of a dtype in which this CPU computes far slower than in float32."""
    dtypes = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if model.device.type != "cpu" or model.dtype not in dtypes:
        return
    # SmolLM2-135M, a training step on a CPU that has AMX: bfloat16 0.3 s, float16 0.4 s, float32
    # 0.5 s. Without its fp16 instructions: float16 25 s.
    fast = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtypes[model.dtype]}_supported", None)
    if fast is None or not fast():
        log.warning(
            "%s is in %s, which this CPU computes up to 50 times slower than float32; "
            "dtype='float32' takes twice the memory",
            name,
            str(model.dtype).removeprefix("torch."),
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
