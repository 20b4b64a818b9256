"""TODO engine.recording"""

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


@dataclass
class Recording:
    """One forward pass over right-padded rows, kept so that parts of it can be run again.

    Attributes:
        hidden: n_layers + 1 tensors [b, t, d]; entry l enters block l, the last one leaves the last
            block.
        keys, values: one tensor [b, kv heads, t, head size] a block, positions already encoded.
        calls: the (args, kwargs) that each block was called with.
        seen: the tensors that were asked for on top, by module name.
    """

    hidden: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    seen: dict[str, Tensor]

    def narrowed(self, lm: LanguageModel, rows_n: Tensor, layer: int) -> Recording:
        """The same of some rows, and of blocks from `layer` on; what is below is let go. `seen` is
        dropped.
        """
        recorded = len(self.hidden[-1])

        def some(kept: list[Tensor]) -> list[Tensor]:
            return [x[:0].clone() for x in kept[:layer]] + [
                x.index_select(0, rows_n.to(x.device)) for x in kept[layer:]
            ]

        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        stand_in = DynamicCache()  # the one of the run holds every row and block
        for block, (args, kwargs) in zip(lm.parts.blocks, self.calls, strict=False):
            named = {
                name: stand_in if isinstance(value, Cache) else value
                for name, value in _by_name(block, args, kwargs).items()
            }
            calls.append(
                (
                    (),
                    {
                        name: _for_rows(name, value, rows_n, recorded)
                        for name, value in named.items()
                    },
                )
            )
        return Recording(some(self.hidden), some(self.keys), some(self.values), calls, {})


class NotReplayableError(Exception):
    """A block takes an argument that we do not know how to cut to a suffix; the caller falls back
    to whole forwards.
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
        inputs, outputs, keep: dotted names of modules whose input or output is wanted on top, and
            what is kept of them, see `hooks.record`.
        until: last block that is run; default: all. What stands above it is not in the recording
            then.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []
    cache = DynamicCache()
    caching = (
        {"past_key_values": cache, "use_cache": True}
        if "past_key_values" in signature(base_model(lm).forward).parameters
        else {}
    )

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append((args[0] if args else kwargs["hidden_states"]).detach())
        calls.append((args, kwargs))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in lm.parts.blocks]
    last = lm.parts.block_name(lm.n_layers - 1 if until is None else until)
    try:
        with (
            torch.no_grad(),
            substitute(changes or {}),
            record(lm.model, inputs, outputs, keep=keep) as seen,
            record(lm.model, outputs=[last], stop=until is not None) as end,
        ):
            base_model(lm)(ids_bt.to(lm.device), **caching)
    finally:
        for handle in handles:
            handle.remove()
    hidden = [*entering, end[last]]
    layers: list[Any] = list(cache.layers)
    return Recording(
        hidden, [layer.keys for layer in layers], [layer.values for layer in layers], calls, seen
    )


def base_model(lm: LanguageModel) -> nn.Module:
    """The model without its unembedding."""
    return lm.model.base_model


def _by_name(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block's call but for its hidden states, positional ones named."""
    target = signature(block.forward)
    bound = target.bind_partial(*args, **kwargs).arguments
    for name, parameter in target.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
        if parameter.kind is Parameter.VAR_POSITIONAL:
            raise NotReplayableError(f"{type(block).__name__} takes *{name}")
    bound.pop(next(iter(target.parameters)), None)
    return dict(bound)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to a tensor or to every tensor of a tuple; anything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(_each(v, change) for v in value)
    return change(value) if isinstance(value, Tensor) else value


def _for_rows(name: str, value: Any, rows_n: Tensor | None, recorded: int) -> Any:
    """An argument for n running rows: chosen by recorded row where it has a row axis, broadcast
    where it has none.
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
        if name in ("position_bias", "cache_position") or x.shape[0] != recorded or recorded == 1:
            return x
        return x.index_select(0, rows_n.to(x.device))

    return _each(value, choose)
