"""Two devices on a machine that has one: tensors that say they are elsewhere and refuse to meet
tensors of another place.

A `Placed` tensor holds its numbers on the CPU and calls itself one of `DEVICES`. An operation on
tensors of two places fails as it would on two GPUs; allowed is what CUDA allows: copying, CPU
tensors of no dimension, and CPU tensors as indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICES = (
    torch.device("lazy", 0),
    torch.device("lazy", 1),
)  # a type that autograd runs without a device's own thread
_ANY_PLACE = {
    torch.ops.aten.copy_.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.is_same_size.default,
}
_CPU_INDICES = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class Placed(Tensor):
    """A tensor that says it is on `place`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> Placed:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=place
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Made(TorchDispatchMode):
    """Tensors that are made on one of `DEVICES` are `Placed`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Lists become tensors in our sight: PyTorch makes them on the device itself, past every
    dispatch mode.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and "device" in kwargs:
            place = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(place)
        if func is Tensor.tolist and isinstance(args[0], Placed):
            return args[0].held.tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Placed):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (
                args[0],
                tuple(torch.tensor(i) if isinstance(i, list) else i for i in index),
                *args[2:],
            )
        return func(*args, **kwargs)


@contextmanager
def two_devices() -> Iterator[None]:
    """Within the block there are `DEVICES`."""
    with _Made(), _Lists():
        yield


def run(func: Any, args: Any, kwargs: Any) -> Any:
    seen: list[Tensor] = []
    tree_map_only(Tensor, seen.append, (args[:1] if func in _CPU_INDICES else args, kwargs))
    places = {
        each.device
        for each in seen
        if isinstance(each, Placed) or each.dim() > 0 or func in _CPU_INDICES
    }
    if func not in _ANY_PLACE and len(places) > 1:
        raise RuntimeError(f"{func} on tensors of different devices: {sorted(map(str, places))}")
    wanted = kwargs.get("device")
    place = (
        torch.device(wanted)
        if wanted is not None
        else next((e.device for e in seen if isinstance(e, Placed)), None)
    )
    args, kwargs = tree_map_only(Placed, lambda each: each.held, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    if func._schema.name.endswith("_") and seen and isinstance(seen[0], Placed):
        return seen[0]
    if place not in DEVICES:
        return out
    return tree_map_only(Tensor, lambda each: Placed(each, place), out)


def spread(first: list[nn.Module], second: list[nn.Module]) -> None:
    """Put modules on the two devices, and let each move what it is given to where it is, as
    accelerate's hooks do.
    """
    for place, modules in zip(DEVICES, (first, second), strict=True):
        for module in modules:
            for each in module.modules():
                for name, parameter in each._parameters.items():
                    if parameter is not None:
                        each._parameters[name] = nn.Parameter(
                            Placed(parameter.detach(), place), requires_grad=False
                        )
                for name, buffer in each._buffers.items():
                    if buffer is not None:
                        each._buffers[name] = Placed(buffer, place)

            module.forward = _moving(module.forward, place)


def _moving(forward: Callable[..., Any], place: torch.device) -> Callable[..., Any]:
    @wraps(forward)
    def moved(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda each: each.to(place), (args, kwargs))
        return forward(*args, **kwargs)

    return moved
