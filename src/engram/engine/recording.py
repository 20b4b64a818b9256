"""One forward pass, recorded so that parts of it can be run again.

Knows blocks, their arguments and their caches. Refuses to know which parts are run again (see
suffix) and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from engram.model.language_model import LanguageModel
from engram.modules.hooks import Changes, record, substitute
from engram.modules.parts import takes


@dataclass
class Recording:
    """One forward pass over right-padded rows.

    Attributes:
        blocks: the model's blocks.
        hidden: n_layers + 1 tensors [b, t, d]; entry l enters block l, the last one leaves the last
            block.
        keys, values: per block one tensor [b, kv heads, t, head size], positions already encoded.
        calls: per block the (args, kwargs) that it was called with.
        seen: further inputs and outputs that the caller wanted, by module name.
    """

    blocks: Sequence[nn.Module]
    hidden: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    seen: dict[str, Tensor]

    def select(self, rows_n: Tensor, from_layer: int) -> Recording:
        """Return the recording of some rows and of the blocks from `from_layer` on, as copies.

        Blocks below keep empty tensors in their places, so that layers keep their numbers; `seen`
        is dropped. The memory of everything else can be freed.
        """
        recorded = len(self.hidden[-1])

        def chosen(layers: list[Tensor]) -> list[Tensor]:
            # clone: a view of no rows would keep the whole tensor alive
            return [x[:0].clone() for x in layers[:from_layer]] + [
                x.index_select(0, rows_n.to(x.device)) for x in layers[from_layer:]
            ]

        stand_in = DynamicCache()  # the run's own cache holds every row and block
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        # strict=False: a run `until` a block has fewer calls than the model has blocks.
        for block, (args, kwargs) in zip(self.blocks, self.calls, strict=False):
            arguments = {
                name: stand_in
                if isinstance(value, Cache)
                else argument_for_rows(name, value, rows_n, recorded)
                for name, value in arguments_by_name(block, args, kwargs).items()
            }
            calls.append(((), arguments))
        return Recording(
            self.blocks, chosen(self.hidden), chosen(self.keys), chosen(self.values), calls, {}
        )


class NotReplayableError(Exception):
    """A block takes an argument that we do not know how to cut to a suffix; the caller falls back
    to whole forward passes.
    """


def record_run(
    lm: LanguageModel,
    ids_bt: Tensor,
    *,
    changes: Changes | None = None,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    keep: Callable[[Tensor], Tensor] = Tensor.clone,
    until: int | None = None,
) -> Recording:
    """Run the model once and keep what replay needs.

    Args:
        ids_bt: [b, t] token ids, rows padded on the right (no real position sees a pad).
        changes: module -> function of its output, in force during the run; e.g. noise at the
            embedding.
        inputs, outputs: dotted names of modules whose input or output is recorded too, in `seen`.
        keep: what of them is kept, see `hooks.record`.
        until: last block that is run and recorded; default: all.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []
    cache = DynamicCache()
    # Families without attention (Mamba) take no cache; without keys they are not replayed either.
    caching = (
        {"past_key_values": cache, "use_cache": True}
        if takes(base_model(lm), "past_key_values")
        else {}
    )

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append((args[0] if args else kwargs["hidden_states"]).detach())
        calls.append((args, kwargs))

    # Hooks, since output_hidden_states normalises the last entry and leaves out the arguments.
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in lm.parts.blocks]
    last = lm.parts.block_name(lm.n_layers - 1 if until is None else until)
    try:
        with (
            torch.no_grad(),
            substitute(changes or {}),
            record(lm.model, inputs, outputs, keep=keep) as seen,
            record(lm.model, outputs=[last], stop=until is not None) as end,
        ):
            # Without the head: logits of all positions would be the largest tensor of the run.
            base_model(lm)(ids_bt.to(lm.device), **caching)
    finally:
        for handle in handles:
            handle.remove()
    layers: list[Any] = list(cache.layers)
    keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
    return Recording(lm.parts.blocks, [*entering, end[last]], keys, values, calls, seen)


def base_model(lm: LanguageModel) -> nn.Module:
    """Return the model without its unembedding."""
    return lm.model.base_model


def arguments_by_name(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a block's call except its hidden states, positional ones named.

    Raises:
        NotReplayableError: the block takes *args.
    """
    # By name, since families pass masks and positions now by position, now by keyword.
    target = signature(block.forward)
    bound = target.bind_partial(*args, **kwargs).arguments
    for name, parameter in target.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
        if parameter.kind is Parameter.VAR_POSITIONAL:
            raise NotReplayableError(f"{type(block).__name__} takes *{name}")
    bound.pop(next(iter(target.parameters)), None)
    return dict(bound)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to a tensor or to every tensor of a tuple; return anything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(map_tensors(v, change) for v in value)
    return change(value) if isinstance(value, Tensor) else value


def argument_for_rows(name: str, value: Any, rows_n: Tensor | None, recorded: int) -> Any:
    """Return a block's argument for n running rows: chosen by recorded row where it has an axis of
    rows, as it is where it has none.
    """

    if rows_n is None:
        return value

    def choose(x: Tensor) -> Tensor:
        if name == "alibi" and x.dim() == 3:  # rows and heads share an axis (BLOOM)
            return (
                x.view(recorded, -1, *x.shape[1:])
                .index_select(0, rows_n.to(x.device))
                .flatten(0, 1)
            )
        # One row for all, or no axis of rows: it is broadcast. The sizes alone cannot tell where as
        # many rows as tokens are recorded, so known exceptions go by their names.
        if name in ("position_bias", "cache_position") or x.shape[0] != recorded or recorded == 1:
            return x
        return x.index_select(0, rows_n.to(x.device))

    return map_tensors(value, choose)
