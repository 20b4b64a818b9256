"""TODO modules.fingerprints"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engram.modules.weights import in_memory

if TYPE_CHECKING:
    pass


def fingerprint(weight: Tensor, dtype: torch.dtype | None = None) -> str:
    """sha256 of a tensor's dtype, shape and bytes, as it is stored; first cast to `dtype` if given."""
    if hasattr(weight, "__tensor_flatten__"):  # a tensor made of several, as torchao packs them
        parts, context = weight.__tensor_flatten__()
        inside = [
            fingerprint(getattr(weight, part))
            for part in parts
            if getattr(weight, part) is not None
        ]
        return hashlib.sha256(
            "\0".join([type(weight).__name__, str(context), *inside]).encode()
        ).hexdigest()
    weight = weight.detach().to("cpu", dtype or weight.dtype).contiguous()
    digest = hashlib.sha256(f"{_name(weight.dtype)} {list(weight.shape)} ".encode())
    digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(
    model: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, str]:
    """`fingerprint` of the tensors of `model.state_dict()`, by name; those that are offloaded are
    brought in one by one.

    Hashed anew at every call: there is no cheaper sign that is sure to change with a weight
        (`.data` writes pass version counters
    by). sha256 runs at about 1.8 GB/s a thread and lets other threads run.

    Args:
        wanted: says of a name whether it is hashed; default: all.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if wanted(name)}
    with ThreadPoolExecutor() as threads:
        here = {
            name: threads.submit(fingerprint, tensor)
            for name, tensor in tensors.items()
            if not tensor.is_meta
        }
    prints = {name: done.result() for name, done in here.items()}
    for name in tensors.keys() - here.keys():
        home, _, leaf = name.rpartition(".")
        module = model.get_submodule(home)
        with in_memory(module):
            prints[name] = fingerprint(getattr(module, leaf))
    return {name: prints[name] for name in tensors}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
