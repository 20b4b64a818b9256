"""Lay edits on a model in memory and take them off again, bit for bit.

Knows weights, how they are stored, and which edits lie on them at the moment. Refuses to know files and how
edits are made. Weights that cannot be written into take an edit beside them: see attaching.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from engram.delta import Delta
from engram.errors import BaseMismatchError, NonFiniteError, UnsupportedModelError
from engram.weights import in_memory, is_transposed, is_writable, quantisation, values

if TYPE_CHECKING:
    from engram.edit import Edit
    from engram.language_model import LanguageModel


def fingerprint(weight: Tensor, dtype: torch.dtype | None = None) -> str:
    """sha256 of a tensor's dtype, shape and bytes, as it is stored; first cast to `dtype` if given."""
    if hasattr(weight, "__tensor_flatten__"):  # a tensor made of several, as torchao packs them
        parts, context = weight.__tensor_flatten__()
        inside = [fingerprint(getattr(weight, part)) for part in parts if getattr(weight, part) is not None]
        return hashlib.sha256("\0".join([type(weight).__name__, str(context), *inside]).encode()).hexdigest()
    weight = weight.detach().to("cpu", dtype or weight.dtype).contiguous()
    digest = hashlib.sha256(f"{_name(weight.dtype)} {list(weight.shape)} ".encode())
    digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """`fingerprint` of the tensors of `model.state_dict()`, by name; those that are offloaded are brought in one by one.

    Hashed anew at every call: there is no cheaper sign that is sure to change with a weight (`.data` writes pass version counters
    by). sha256 runs at about 1.8 GB/s a thread and lets other threads run.

    Args:
        wanted: says of a name whether it is hashed; default: all.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if wanted(name)}
    with ThreadPoolExecutor() as threads:
        here = {name: threads.submit(fingerprint, tensor) for name, tensor in tensors.items() if not tensor.is_meta}
    prints = {name: done.result() for name, done in here.items()}
    for name in tensors.keys() - here.keys():
        home, _, leaf = name.rpartition(".")
        module = model.get_submodule(home)
        with in_memory(module):
            prints[name] = fingerprint(getattr(module, leaf))
    return {name: prints[name] for name in tensors}


def describe_base(lm: LanguageModel, names: Iterable[str]) -> dict[str, Any]:
    """What `Edit.base` holds about the weights that an edit is made on, as they are now.

    Of a quantised weight it describes the numbers that the packed integers stand for, in float32, and says how they were packed;
    so an edit that was made on it also fits the same weight unpacked (`quantised.dequantised`).

    Args:
        names: parameters that the edit changes, as in `lm.model.state_dict()`.
    Returns:
        {"model", "model_type", "tensors": {name: {"sha256", "dtype", "shape", "transposed"[, "quantised"]}}}.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name in names:
        module = home_of(lm, name)
        weight = values(module)
        tensors[name] = {
            "sha256": _with_beside(fingerprint(weight), module),
            "dtype": _name(weight.dtype),
            "shape": list(weight.shape),
            "transposed": is_transposed(module),
        }
        if (scheme := quantisation(module)) is not None:
            tensors[name]["quantised"] = scheme
    return {"model": lm.name, "model_type": lm.model.config.model_type, "tensors": tensors}


def editable(lm: LanguageModel) -> list[str]:
    """Names of all weights that an edit can be laid on: floating-point matrices of linear maps, in memory."""
    linear = {f"{name}.weight": each for name, each in lm.model.named_modules() if isinstance(each, nn.Linear | Conv1D)}
    weights = {name: lm.model.get_parameter(name) for name in linear}
    return [name for name, weight in weights.items() if weight.is_floating_point() and not weight.is_meta]


def edited(lm: LanguageModel) -> list[str]:
    """Names of the weights that edits lie on at the moment."""
    return [name for name, weight in lm.model.named_parameters() if weight in _LAID]


def merge(weight: Tensor, deltas: Iterable[Delta], *, transposed: bool) -> Tensor:
    """`weight` + deltas, summed in float32 (float64 where one is), rounded once into `weight`'s dtype.

    Args:
        weight: on the CPU, as stored: [out, in], or [in, out] where `transposed`; not changed.
    Raises:
        NonFiniteError: the sum does not fit the dtype.
    """
    deltas = list(deltas)
    wide = reduce(
        torch.promote_types,
        (delta.left.dtype for delta in deltas),
        torch.promote_types(weight.dtype, torch.float32),
    )
    total = weight.to(wide, copy=True)
    for delta in deltas:
        dense = delta.dense(wide)
        total += dense.T if transposed else dense
    merged = total.to(weight.dtype)
    if not merged.isfinite().all():
        raise NonFiniteError(
            f"the edited weight does not fit {_name(weight.dtype)} (largest {float(total.abs().max()):.3g})"
        )
    return merged


@dataclass(frozen=True)
class Stack:
    """A weight and the changes that lie on it: every one of them made on `base`, summed and rounded together.

    So edits made on one base give the same weight as their composition, and taking one off is exact in any
    order. An edit made on already edited weights starts a stack of its own, with those weights as base.

    Attributes:
        base: CPU tensor as stored.
        deltas: in the order they came.
    """

    base: Tensor
    transposed: bool
    deltas: tuple[Delta, ...] = ()

    def weight(self) -> Tensor:
        return merge(self.base, self.deltas, transposed=self.transposed) if self.deltas else self.base

    def with_delta(self, delta: Delta, made_on: Mapping[str, Any], *, force: bool = False) -> Stack:
        """This stack and one change more.

        Args:
            made_on: the edit's record of its base weight; it has to be this base, or this stack's weight.
                Both are compared in the recorded dtype, so an edit made in float32 on a float16 checkpoint
                fits the checkpoint too.
            force: lay the change on the present weight whatever it is.
        Raises:
            BaseMismatchError: neither of them.
        """
        dtype = getattr(torch, made_on["dtype"])
        if fingerprint(self.base, dtype) == made_on["sha256"]:
            return Stack(self.base, self.transposed, (*self.deltas, delta))
        now = self.weight()
        fits = list(now.shape) == list(made_on["shape"])
        if fits and (force or (self.deltas and fingerprint(now, dtype) == made_on["sha256"])):
            return Stack(now, self.transposed, (delta,))
        raise BaseMismatchError(_mismatch(self.base, dtype, made_on))


@dataclass
class _Layer:
    """One edit's change on one parameter: what to put back, and the stack while it lies there."""

    saved: Tensor
    stack: Stack


# parameter (by identity, so tied weights are one) -> its layers, first laid first
_LAID: MutableMapping[Tensor, list[_Layer]] = WeakTensorKeyDictionary()
# module -> the changes that lie beside its weight (see attaching), first laid first
BESIDE: MutableMapping[nn.Module, list[Delta]] = WeakKeyDictionary()


def _with_beside(sha256: str, module: nn.Module) -> str:
    """What an edit made now is made on: the weight, and what lies beside it."""
    factors = [fingerprint(factor) for delta in BESIDE.get(module, ()) for factor in delta.factors().values()]
    return hashlib.sha256(" ".join([sha256, *factors]).encode()).hexdigest() if factors else sha256


def beside(model: nn.Module) -> list[str]:
    """What lies beside the weights of a model, module by module: part of what it computes, and in none of its tensors."""
    lying = {name: BESIDE[module] for name, module in model.named_modules() if module in BESIDE}
    return [
        f"{name} {fingerprint(factor)}" for name, deltas in lying.items() for d in deltas for factor in d.factors().values()
    ]


def check_base(module: nn.Module, delta: Delta, made_on: Mapping[str, Any]) -> None:
    """Raise unless a change fits beside the weight as it is: what is compared, and when it fits, is as in `Stack.with_delta`.

    Raises:
        BaseMismatchError: neither the weight that the change was made on, nor that weight with the edits that lie there now.
    """
    dtype, weight = getattr(torch, made_on["dtype"]), values(module)
    layers = _LAID.get(weight)
    base = layers[-1].stack.base if layers else weight
    now = _with_beside(fingerprint(weight, dtype), module)
    if made_on["sha256"] not in (fingerprint(base, dtype), now):
        raise BaseMismatchError(_mismatch(base, dtype, made_on, quantisation(module)))


@contextmanager
def applied(edit: Edit, lm: LanguageModel, *, force: bool = False) -> Iterator[LanguageModel]:
    """Within the block `lm`'s weights are edited; however it ends, every bit of them comes back.

    Blocks nest. An edit made on the unedited model fits inside another edit's block (the result is their
    composition), and so does one made within that block. Weights are saved on the CPU and merged there, so a
    GPU needs no room.

    Args:
        force: apply also to weights the edit was not made on; their shape has to fit.
    Yields:
        `lm`.
    Raises:
        BaseMismatchError: the model's weights are not those the edit was made on; nothing is changed.
        NonFiniteError: an edited weight does not fit the model's dtype; nothing is changed.
    """
    laid: list[tuple[nn.Parameter, _Layer]] = []
    try:
        for name, delta in edit.deltas.items():
            weight, transposed = _weight(lm, name)
            layers = _LAID.get(weight, [])
            saved = weight.detach().to("cpu", copy=True)
            below = layers[-1].stack if layers else Stack(saved, transposed)
            try:
                stack = below.with_delta(delta, edit.base["tensors"][name], force=force)
                merged = stack.weight()
            except (BaseMismatchError, NonFiniteError) as error:
                raise type(error)(f"{name} of {lm.name!r}: {error}") from error
            layer = _Layer(saved, stack)
            laid.append((weight, layer))  # first: an interrupt from here on puts `saved` back
            _LAID[weight] = [*layers, layer]
            _write(weight, merged)
        yield lm
    finally:
        for weight, layer in reversed(laid):
            _lift(weight, layer)


def rounding_cost(edit: Edit, lm: LanguageModel) -> dict[str, float]:
    """||(W_edited - W) - delta|| / ||delta|| of each weight (Frobenius): the share that rounding once loses.

    About 1e-6 and less in float32; in half precision what it is depends on how small the change is against
    the weight. Measured on the unedited weights, also within an edit's block. The base is not checked, and
    `lm` is not changed.
    """
    costs = {}
    for name, delta in edit.deltas.items():
        weight, transposed = _weight(lm, name)
        layers = _LAID.get(weight)
        base = layers[0].saved if layers else weight.detach().cpu()
        wanted = delta.dense(torch.float64)
        change = merge(base, [delta], transposed=transposed).double() - base.double()
        norm = float(wanted.norm())
        costs[name] = float(((change.T if transposed else change) - wanted).norm()) / norm if norm else 0.0
    return costs


@torch.no_grad()
def _write(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value)


def _lift(weight: Tensor, layer: _Layer) -> None:
    """Take a layer off and put its bits back.

    A layer below another one (blocks left out of order) goes when that one goes, with its bits.
    """
    layers = _LAID.get(weight, [])
    at = next((i for i, each in enumerate(layers) if each is layer), None)
    if at is None or at == len(layers) - 1:
        _write(weight, layer.saved)
    else:
        layers[at + 1].saved = layer.saved
    rest = [each for each in layers if each is not layer]
    if rest:
        _LAID[weight] = rest
    else:
        _LAID.pop(weight, None)


def home_of(lm: LanguageModel, name: str) -> nn.Module:
    """The linear module whose weight is the parameter of that name.

    Raises:
        BaseMismatchError: no such parameter; UnsupportedModelError: not the weight of a linear map.
    """
    home, _, leaf = name.rpartition(".")
    try:
        module, _parameter = lm.model.get_submodule(home), lm.model.get_parameter(name)
    except AttributeError as error:
        raise BaseMismatchError(
            f"{lm.name!r} ({lm.model.config.model_type}) has no parameter {name!r}; expected a model of the "
            "family that the edit was made on (Edit.base names it)"
        ) from error
    if leaf != "weight":
        raise UnsupportedModelError(f"{name} cannot be edited; expected the weight matrix of a linear map")
    is_transposed(module)
    return module


def _weight(lm: LanguageModel, name: str) -> tuple[nn.Parameter, bool]:
    """The parameter of that name and whether it is stored [in, out]."""
    module = home_of(lm, name)
    if not is_writable(module):
        scheme = quantisation(module)
        how = f"is quantised ({scheme})" if scheme else "is offloaded (on the meta device between forward passes)"
        unpack = "; or unpack that one matrix for a while: engram.dequantised(lm, layer)" if scheme else ""
        raise UnsupportedModelError(
            f"{name} {how}, so no change can be written into it. Lay the edit beside it: edit.attached(lm), or ship it as "
            f"a LoRA adapter: edit.to_peft(folder){unpack}"
        )
    return lm.model.get_parameter(name), is_transposed(module)


def _mismatch(weight: Tensor, dtype: torch.dtype, made_on: Mapping[str, Any], packed: str | None = None) -> str:
    if packed != made_on.get("quantised"):
        here, there = packed or f"plain {_name(weight.dtype)}", made_on.get("quantised") or f"plain {made_on['dtype']}"
        return (
            f"not the weight that the edit was made on: it is {here}, the edit was made on {there}. Load the model that the edit "
            "names, in the way it was loaded then, or pass force=True to lay the edit on it all the same"
        )
    if list(weight.shape) != list(made_on["shape"]):
        return (
            f"its shape is {list(weight.shape)}, the edit was made on {made_on['shape']}. "
            "Load the model that the edit names"
        )
    coarser = torch.finfo(weight.dtype).eps > torch.finfo(dtype).eps
    hint = (
        f" (it is in {_name(weight.dtype)}, the edit was made in {made_on['dtype']}: rounding may be all)"
        if coarser
        else ""
    )
    return (
        f"not the weight that the edit was made on (sha256 {fingerprint(weight, dtype)[:12]}, expected "
        f"{made_on['sha256'][:12]}){hint}. Load the model that the edit names, or pass force=True to apply "
        "it all the same"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
