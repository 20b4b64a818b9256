"""Digests of weights: whether two tensors are the same, bit for bit.

Knows tensors, also offloaded ones and those that are packed in several. Refuses to know what a
weight is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from engram.files.cache_folder import sha256_of
from engram.modules.weights import in_memory


def fingerprint(weight: Tensor, dtype: torch.dtype | None = None) -> str:
    """Return the sha256 of a tensor's dtype, shape and bytes as stored; cast to `dtype` first if
    given.
    """
    if hasattr(weight, "__tensor_flatten__"):  # a tensor made of several, as torchao packs them
        parts, context = weight.__tensor_flatten__()
        inside = [
            fingerprint(getattr(weight, part))
            for part in parts
            if getattr(weight, part) is not None
        ]
        return sha256_of(type(weight).__name__, str(context), *inside)
    weight = weight.detach().to("cpu", dtype or weight.dtype).contiguous()
    # dtype and shape count: equal bytes in another dtype or layout are other weights
    digest = hashlib.sha256(f"{dtype_name(weight.dtype)} {list(weight.shape)} ".encode())
    digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def quick_fingerprint(weight: Tensor) -> str:
    """Return a digest of a tensor's dtype, shape and sums of its rows, in a tenth of the time.

    Sums of the bits read as whole numbers, so that no change of a single entry is rounded away. Two
    changes of a row could cancel: nobody's training does that, somebody's intent could. So this is
    for caches of what costs little where it is wrong, and never says that an edit fits a model.
    """
    if hasattr(weight, "__tensor_flatten__") or weight.nbytes % 8 or not weight.dim():
        return fingerprint(weight)
    about = f"{dtype_name(weight.dtype)} {list(weight.shape)}"
    weight = weight.detach().contiguous()
    if (weight.shape[-1] * weight.itemsize) % 8:
        weight = weight.reshape(-1)
    sums = weight.view(torch.int64).sum(-1).cpu()
    return sha256_of(about, fingerprint(sums))


def fingerprints(
    model: nn.Module, wanted: Callable[[str], bool] = lambda name: True, quick: bool = False
) -> dict[str, str]:
    """Return a digest of each tensor of `model.state_dict()`, by name; offloaded ones are
    brought into memory one by one.

    They are hashed again at every call: no cheaper sign is sure to change with a weight (`.data`
    writes do not raise version counters). sha256 runs at about 1.8 GB/s per thread and lets other
    threads run.

    Args:
        wanted: whether the tensor of a name is hashed; default: all.
        quick: by `quick_fingerprint`.
    """
    of = quick_fingerprint if quick else fingerprint
    tensors = {name: tensor for name, tensor in model.state_dict().items() if wanted(name)}
    with ThreadPoolExecutor() as threads:
        here = {
            name: threads.submit(of, tensor)
            for name, tensor in tensors.items()
            if not tensor.is_meta
        }
    prints = {name: done.result() for name, done in here.items()}
    for name in tensors.keys() - here.keys():
        home, _, leaf = name.rpartition(".")
        module = model.get_submodule(home)
        with in_memory(module):
            prints[name] = of(getattr(module, leaf))
    return {name: prints[name] for name in tensors}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name: "float32"."""
    return str(dtype).removeprefix("torch.")
