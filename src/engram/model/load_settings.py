"""What `load` may be given, checked before anything is read: dtype, devices, and the settings that
are passed on to transformers.

Refuses to know checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from textwrap import shorten
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from engram.checks import alternatives, briefly, checked, did_you_mean, one_of
from engram.errors import SettingError

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_Name = str | os.PathLike[str]

# of the place where a model is found: the tokenizer and the config are read from there too
_HUB = {
    "cache_dir": _Name | None,
    "code_revision": str | None,
    "force_download": bool,
    "local_files_only": bool,
    "proxies": dict[str, str] | None,
    "revision": str | None,
    "subfolder": str | None,
    "token": str | bool | None,
}
_LOADER = {
    "attn_implementation": str | None,
    "disable_mmap": bool | None,
    "experts_implementation": str | None,
    "max_memory": dict[str | int, str | int] | None,
    "offload_buffers": bool,
    "offload_folder": _Name | None,
    "quantization_config": QuantizationConfigMixin | dict[str, Any] | None,
    "variant": str | None,
}
_INSTEAD = {
    "trust_remote_code": "it is called allow_remote_code here, and asks for a True of its own",
    "torch_dtype": "it is called dtype",
    "tokenizer": "it is read from the model's folder",
    "use_safetensors": "only safetensors are read",
    "weights_only": "only safetensors are read",
    "ignore_mismatched_sizes": "weights that do not fit the config are refused",
}


def check_dtype(dtype: object) -> torch.dtype | None:
    """Return a dtype that a model can compute in; None for that of the checkpoint.

    Raises:
        SettingError: no floating point of torch.
    Example:
        >>> check_dtype("float64x")
        Traceback (most recent call last):
        engram.errors.SettingError: dtype='float64x': expected 'float32', 'bfloat16', 'float16', \
'float64' or 'auto' (did you mean 'float64'?)
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    one_of("dtype", name, [*_DTYPES, "auto"])
    return None if name == "auto" else getattr(torch, str(name))


def check_device_map(device_map: object, model: nn.Module | None = None) -> None:
    """Raise unless a model can be spread over devices as `device_map` says.

    Args:
        device_map: for transformers: a device, a way to spread ("auto"), or the device of each
            module by its name.
        model: whose modules a device map may name; without one, names are not checked.
    Raises:
        SettingError: no such device here, or no such module.
    """
    if device_map is None or (isinstance(device_map, str) and device_map in _AUTOMATIC):
        return
    if not isinstance(device_map, Mapping):
        _check_device("device_map", device_map)
        return
    if not device_map:
        raise SettingError("device_map={}: expected a device for each module")
    # a name stands for all below it, "" for the whole model
    known = set() if model is None else {"", *dict(model.named_modules()), *model.state_dict()}
    for name, device in device_map.items():
        if known and name not in known:
            raise SettingError(
                f"device_map names {briefly(name)}, and the model has no such module"
                f"{did_you_mean(name, known)}"
            )
        if device != "disk":
            _check_device(f"device_map[{briefly(name)}]", device)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise unless the settings that are not left to a model's config can be passed on.

    Raises:
        SettingError: of the wrong type, or one that `load` decides by itself.
    """
    for name, value in settings.items():
        if name in _INSTEAD:
            raise SettingError(f"{name}={briefly(value)}: not a setting of load: {_INSTEAD[name]}")
        if name in _HUB or name in _LOADER:
            checked(name, value, {**_HUB, **_LOADER}[name])
    implementations = {
        "attn_implementation": ALL_ATTENTION_FUNCTIONS,
        "experts_implementation": ALL_EXPERTS_FUNCTIONS,
    }
    for name, known in implementations.items():
        if settings.get(name) is not None:
            one_of(name, settings[name], ["eager", *known.valid_keys()])
    with _wrong("max_memory", settings):
        for size in (settings.get("max_memory") or {}).values():
            convert_file_size_to_int(size)
    with _wrong("quantization_config", settings):
        if isinstance(packing := settings.get("quantization_config"), dict):
            AutoQuantizationConfig.from_dict(packing)


@contextmanager
def _wrong(name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Turn what other libraries say of a setting's value into a line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = shorten(str(error), 200, placeholder=" ...")
        raise SettingError(f"{name}={briefly(settings[name])}: {reason}") from error


def of_place(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that say where the files of a model are."""
    return {name: settings[name] for name in _HUB if settings.get(name) is not None}


def of_loader(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the loader of weights."""
    return {name: value for name, value in settings.items() if name in _LOADER}


def of_config(settings: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return the settings that change a model's config.

    Args:
        known: names of the config's fields.
    Raises:
        SettingError: neither the config's nor the loader's.
    """
    known = set(known)
    given = {name: value for name, value in settings.items() if name not in {**_HUB, **_LOADER}}
    for name in given.keys() - known:
        near = did_you_mean(name, [*known, *_HUB, *_LOADER])
        raise SettingError(
            f"{name}={briefly(given[name])}: not a setting of load nor a field of the model's "
            f"config{near}; the loader's are {alternatives([*_HUB, *_LOADER])}"
        )
    return given


def _check_device(name: str, device: object) -> None:
    here = ["cpu:0"]
    if torch.accelerator.is_available() and (kind := torch.accelerator.current_accelerator()):
        here += [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
    place = None
    if isinstance(device, str | torch.device):
        with suppress(RuntimeError):  # no name of a device
            place = torch.device(device)
    elif isinstance(device, int) and not isinstance(device, bool) and 0 <= device < len(here) - 1:
        place = torch.device(here[1 + device])  # a number is an accelerator's
    if place is None or f"{place.type}:{place.index or 0}" not in here:
        automatic = f"; or {alternatives(_AUTOMATIC)}" if name == "device_map" else ""
        raise SettingError(
            f"{name}={briefly(device)}: no such device here; expected one of {', '.join(here)}"
            f"{automatic}"
        )
