"""The numbers of a linear map's weight, however it is stored: plain, packed by a quantiser, or
offloaded to RAM or disk.

Knows one module. Refuses to know layers, edits and callers. Packed weights are read where
bitsandbytes (int8, fp4, nf4) or torchao packed them; their numbers are those that the packed
integers represent, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engram.errors import UnsupportedModelError


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weight is stored [in, out] (GPT-2's `Conv1D`); by type, since a square
    matrix fits both ways.
    """
    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise UnsupportedModelError(
        f"cannot tell how {type(module).__name__} stores its weight; expected nn.Linear or "
        "transformers' Conv1D"
    )


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear map, from its sizes: its weight may be packed or offloaded."""
    if is_transposed(module):
        weight: Any = module.weight
        return int(weight.shape[1]), int(weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def as_linear(module: nn.Module) -> Tensor:
    """Return a module's weight as [out, in], whichever way it is stored: a view where it is plain,
    a copy in float32 where it is packed.
    """
    weight = values(module)
    return weight.T if is_transposed(module) else weight


def quantisation(module: nn.Module) -> str | None:
    """Return how a module's weight is packed, such as "bitsandbytes nf4"; None if it is plain
    floating point.

    Raises:
        UnsupportedModelError: packed in a way that cannot be read here.
    """
    # by the name of the type: neither library has to be installed to recognise it
    weight: Any = module.weight
    kind = type(weight).__name__
    if type(weight).__module__.startswith("torchao."):
        return f"torchao {kind}"
    if kind == "Int8Params":
        return "bitsandbytes int8"
    if kind == "Params4bit":
        return f"bitsandbytes {weight.quant_type}"
    if weight.is_floating_point():
        return None
    raise UnsupportedModelError(
        f"{type(module).__name__} holds its weight as {kind} "
        f"({str(weight.dtype).removeprefix('torch.')}), which cannot be read; "
        "expected floating point, bitsandbytes (int8, fp4, nf4) or torchao. Load the model with "
        "one of them, or unquantised"
    )


def is_writable(module: nn.Module) -> bool:
    """Return whether the weight is plain numbers in memory: a change can be written into it."""
    return quantisation(module) is None and not module.weight.is_meta


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Bring the module's own tensors into memory for the length of the block, if accelerate has
    offloaded them.

    Raises:
        UnsupportedModelError: they have no numbers at all (a model made on the meta device).
    """
    from accelerate.utils import align_module_device

    with align_module_device(module):
        if any(tensor.is_meta for tensor in module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"the weight of {type(module).__name__} is on the meta device and has no numbers; "
                "load the model with its weights"
            )
        yield


@torch.no_grad()
def values(module: nn.Module) -> Tensor:
    """Return the weight's numbers as stored: the weight itself where it is plain and in memory,
    else a copy; packed ones in float32.

    Raises:
        UnsupportedModelError: packed in a way that cannot be read, or without numbers.
    """
    kind = quantisation(module)
    if is_writable(module):
        return module.weight  # type: ignore[return-value]
    with in_memory(module):
        weight: Any = module.weight
        if kind is None:
            return weight.detach().clone()
        if kind.startswith("torchao"):
            return weight.dequantize().float()
        # state_dict() also undoes the packing for AVX-512 that bitsandbytes does at a first pass
        stored = module.state_dict()
        # int8 rows are scaled by their largest absolute value, SCB, to -127 .. 127
        if kind == "bitsandbytes int8":
            return stored["weight"].float() * (stored["SCB"].float()[:, None] / 127)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()


def numbers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of what a module stores itself; of a packed weight, its scales.

    Packed integers are always finite: a weight that is not shows in the scales.
    """
    offloaded = any(tensor.is_meta for tensor in module.parameters(recurse=False))
    with in_memory(module) if offloaded else nullcontext():
        stored: list[tuple[str, Any]] = [
            *module.named_parameters(recurse=False),
            *(
                (name, buffer)
                for name, buffer in module.named_buffers(recurse=False)
                if name not in module._non_persistent_buffers_set
            ),
        ]
        for name, tensor in stored:
            state = getattr(tensor, "quant_state", None)
            scales = [
                (f"{name}.{scale}", value)
                for owner in (tensor, state, getattr(state, "state2", None))
                for scale in ("SCB", "absmax", "offset", "scale")
                if isinstance(value := getattr(owner, scale, None), Tensor)
            ]
            yield from scales or [(name, tensor)]


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for AVX-512 on a CPU.

    Gradients do not pass through its kernel for them, and packing rounds their scales to bfloat16
    at the first forward pass, after which the model is another one.
    """
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
