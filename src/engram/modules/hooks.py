"""Read and change what flows through a model's modules, for the length of a `with` block.

Knows modules and tensors; every hook's lifetime is owned by a context manager. Refuses to know
layers, tokens or methods. Names are looked up before the first hook is placed, so a misspelt one
leaves no hook on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput


class StopForward(Exception):  # noqa: N818  control flow, not an error
    """Ends a forward pass once everything wanted has been seen; `record` raises and catches it."""


def first(output: Any) -> Tensor:
    """Return the tensor of a module's output, which may be a tuple (or transformers' record of
    outputs) that starts with it.
    """
    return output[0] if isinstance(output, tuple | ModelOutput) else output


def with_first(output: Any, tensor: Tensor) -> Any:
    """Return `output` with its tensor replaced."""
    if isinstance(output, ModelOutput):
        return type(output)(**{**output, next(iter(output)): tensor})
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


@contextmanager
def record(
    model: nn.Module,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    stop: bool = False,
    keep: Callable[[Tensor], Tensor] = Tensor.clone,
) -> Iterator[dict[str, Tensor]]:
    """Collect what enters and leaves modules during the forward passes of the block.

    Args:
        inputs: dotted names of modules whose first input is wanted.
        outputs: dotted names of modules whose (first) output is wanted.
        stop: end the forward pass, and the `with` block, as soon as every tensor has been seen.
        keep: what is kept of each tensor; a copy by default, since some families go on to add to
            these tensors in place.
    Yields:
        name -> tensor of the latest pass. A module that is in both lists yields its input under
        "name:input".
    Raises:
        AttributeError: a name that is not in the model; nothing has been hooked then.
    Source: the idea is Bau's nethook (baukit).
    """
    seen: dict[str, Tensor] = {}
    wanted = len(inputs) + len(outputs)
    # a misspelt name fails here, before any hook exists
    modules = {name: model.get_submodule(name) for name in (*inputs, *outputs)}

    def note(key: str, tensor: Tensor) -> None:
        seen[key] = keep(tensor)
        if stop and len(seen) == wanted:
            raise StopForward

    with ExitStack() as stack:
        for name in inputs:
            key = f"{name}:input" if name in outputs else name
            # some families pass the states by keyword: then they are the first one
            stack.enter_context(
                modules[name].register_forward_pre_hook(
                    lambda m, args, named, key=key: note(
                        key, args[0] if args else next(iter(named.values()))
                    ),
                    with_kwargs=True,
                )
            )
        for name in outputs:
            stack.enter_context(
                modules[name].register_forward_hook(
                    lambda m, a, out, key=name: note(key, first(out))
                )
            )
        try:
            yield seen
        except StopForward:
            if not stop:
                raise


Changes = Mapping[nn.Module, Callable[[Tensor], Tensor]]


@contextmanager
def substitute(outputs: Changes, inputs: Changes | None = None) -> Iterator[None]:
    """Replace the (first) output of each module by `outputs[module](output)` inside the block, and
    its first input by `inputs[module](input)`.
    """
    with ExitStack() as stack:
        for module, change in (inputs or {}).items():
            stack.enter_context(
                module.register_forward_pre_hook(lambda m, args, f=change: (f(args[0]), *args[1:]))
            )
        for module, change in outputs.items():
            stack.enter_context(
                module.register_forward_hook(
                    lambda m, a, out, f=change: with_first(out, f(first(out)))
                )
            )
        yield


@contextmanager
def overlay(module: nn.Module, left_bor: Tensor, right_bri: Tensor) -> Iterator[None]:
    """Give every row of the batch its own low-rank change of one linear module: out[b] += left[b]
    (right[b] x[b]).

    The change is computed and added in the factors' precision and rounded once into the output's
    dtype, on the device where the module runs. Two rows of one token, d_in = 2, d_out = 1, rank 1:

        row   x        right    left    right x   added to out
        0     (1, 2)   (1, 0)   (3)     1         3
        1     (1, 2)   (0, 1)   (3)     2         6

    Args:
        module: a linear map with input [b, t, i] and output [b, t, o].
        left_bor: [b, o, r] and right_bri: [b, r, i], the factors of each row's change; r may be
            padded with zeros. With b = 1 all rows of the batch have that one change.
    """

    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        nonlocal left_bor, right_bri
        # moved once, at the first pass: only then is it known where the module runs
        left_bor, right_bri = left_bor.to(out.device), right_bri.to(out.device)
        x_bti = args[0].reshape(len(left_bor), -1, right_bri.shape[-1]).to(right_bri)
        # Right to left: [b, t, r] in between, and never the matrices [b, o, i].
        change_bto = (x_bti @ right_bri.mT) @ left_bor.mT
        return (out + change_bto.reshape(out.shape)).to(out.dtype)

    with module.register_forward_hook(add):
        yield


# owners of a batch's rows -> the block in which each row is computed with its owner's changes
RowContext = Callable[[Sequence[int]], AbstractContextManager[None]]


def no_edits(owners: Sequence[int]) -> AbstractContextManager[None]:
    """Compute every row of the batch with the model as it is."""
    return nullcontext()


def per_row_edits(changes: Mapping[nn.Module, tuple[Tensor, Tensor] | Tensor]) -> RowContext:
    """Return a block in which every row of a batch is computed with its owner's changes.

    Args:
        changes: linear module -> the factors [owners, o, r] and [owners, r, i] of low-rank changes,
            see `overlay`; or the changes themselves, [owners, o, i], which are multiplied owner by
            owner.
    """

    @contextmanager
    def around(owners: Sequence[int]) -> Iterator[None]:
        # One batch holds rows of several edits: factors are gathered by owner, a row each.
        with ExitStack() as stack:
            for module, change in changes.items():
                if isinstance(change, Tensor):
                    stack.enter_context(_dense_overlay(module, change, owners))
                    continue
                at = torch.tensor(owners, device=change[0].device)
                stack.enter_context(overlay(module, change[0][at], change[1][at]))
            yield

    return around


@contextmanager
def _dense_overlay(module: nn.Module, change_noi: Tensor, owners: Sequence[int]) -> Iterator[None]:
    rows = {
        owner: [b for b, row_owner in enumerate(owners) if row_owner == owner]
        for owner in dict.fromkeys(owners)
    }

    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x_bti = args[0].reshape(len(owners), -1, change_noi.shape[2])
        sum_bto = out.reshape(len(owners), -1, change_noi.shape[1]).to(
            torch.promote_types(out.dtype, change_noi.dtype), copy=True
        )
        # One product per owner: [b, o, i] copies of a dense change would not fit in memory.
        for owner, at in rows.items():
            sum_bto[at] += x_bti[at].to(sum_bto) @ change_noi[owner].to(sum_bto).T
        return sum_bto.reshape(out.shape).to(out.dtype)

    with module.register_forward_hook(add):
        yield


@contextmanager
def overlay_weight(module: nn.Module, delta_oi: Tensor) -> Iterator[None]:
    """Add to a linear module's output what a change of its weight would: out += x delta^T.
    Gradients reach `delta_oi`.
    """

    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + (args[0].to(delta_oi.dtype) @ delta_oi.T).to(out.dtype)

    with module.register_forward_hook(add):
        yield
