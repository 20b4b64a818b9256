"""The engine: run again only the blocks and positions that a change can reach.

In a causal model a change at block l, position i is invisible to blocks before l and to positions before i. So one run is
recorded (what enters each block, keys and values, the arguments each block was called with), and afterwards blocks are
called one by one on positions i.. only, with the recorded keys and values in front, any number of rows at a time.

Knows blocks and tensors. Refuses to know why states change: causal tracing and value optimisation say what, this says how
to compute the consequences exactly. What cannot be replayed (`replayable` finds out by trying) runs through whole forward
passes instead; both give the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from engram.errors import UnsupportedModelError
from engram.hooks import Changes, StopForward, first, record, substitute
from engram.language_model import LanguageModel, pad_right

log = logging.getLogger(__name__)

Engine = Literal["auto", "replay", "whole"]


@dataclass
class Recording:
    """One forward pass over right-padded rows, kept so that parts of it can be run again.

    Attributes:
        hidden: n_layers + 1 tensors [b, t, d]; entry l enters block l, the last one leaves the last block.
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
        """The same of some rows, and of blocks from `layer` on; what is below is let go. `seen` is dropped."""
        recorded = len(self.hidden[-1])

        def some(kept: list[Tensor]) -> list[Tensor]:
            return [x[:0].clone() for x in kept[:layer]] + [x.index_select(0, rows_n.to(x.device)) for x in kept[layer:]]

        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        stand_in = DynamicCache()  # the one of the run holds every row and block
        for block, (args, kwargs) in zip(lm.parts.blocks, self.calls, strict=False):
            named = {
                name: stand_in if isinstance(value, Cache) else value
                for name, value in _by_name(block, args, kwargs).items()
            }
            calls.append(((), {name: _for_rows(name, value, rows_n, recorded) for name, value in named.items()}))
        return Recording(some(self.hidden), some(self.keys), some(self.values), calls, {})


def record_alike(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    shared: Sequence[int],
    *,
    layer: int,
    length: int,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Recording:
    """`record_run` of rows of which each begins like one of the first ones: what they begin with is run once.

    Args:
        rows: token ids; row b begins like row b % len(shared).
        shared: tokens that all rows which begin alike have in common; exact where they really are.
        layer: lowest block that is kept, see `Recording.narrowed`.
        length: that rows are padded to, on the right; at least any shared part and the longest rest behind each other.
        inputs, outputs: as in `record_run`. In `seen` there is nothing at the shared positions but zeros.
    """
    kinds, firsts = torch.arange(len(rows)) % len(shared), rows[: len(shared)]
    rest = max(len(row) - shared[b % len(shared)] for b, row in enumerate(rows))
    begun = record_run(lm, pad_right(firsts, length))
    suffix, entry = Suffix(lm, begun, shared, rest), lm.parts.block_name(0)
    with torch.no_grad(), record(lm.model, inputs=[entry], stop=True) as entering:
        body(lm)(pad_right(rows, length).to(lm.device))
    rows_b1, places_bq = torch.arange(len(rows))[:, None], suffix.positions_bq[kinds]

    def put(kept_btx: Tensor, made_bqx: Tensor) -> None:
        kept_btx[rows_b1, places_bq] = made_bqx.to(kept_btx.device)

    hidden_bqd = _take(entering[entry], places_bq)
    whole = begun.narrowed(lm, kinds, layer)
    with torch.no_grad(), record(lm.model, inputs, outputs) as seen:
        for number in range(lm.n_layers):
            new = _Noting(*suffix._prefix_of(number, kinds))
            after_bqd = suffix._call(number, hidden_bqd, kinds, new)
            if number >= layer:
                put(whole.hidden[number], hidden_bqd)
                put(whole.keys[number].transpose(1, 2), new.new_keys.transpose(1, 2))
                put(whole.values[number].transpose(1, 2), new.new_values.transpose(1, 2))
            hidden_bqd = after_bqd
    put(whole.hidden[-1], hidden_bqd)
    for name, part in seen.items():
        part_bqx = part.view(len(rows), rest, -1)
        whole.seen[name] = part_bqx.new_zeros(len(rows), length, part_bqx.shape[-1])
        put(whole.seen[name], part_bqx)
    return whole


class NotReplayableError(Exception):
    """A block takes an argument that we do not know how to cut to a suffix; the caller falls back to whole forwards."""


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
        changes: module -> function of its output, in force during the run; e.g. noise at the embedding.
        inputs, outputs, keep: dotted names of modules whose input or output is wanted on top, and what is kept of them,
            see `hooks.record`.
        until: last block that is run; default: all. What stands above it is not in the recording then.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []
    cache = DynamicCache()
    caching = (
        {"past_key_values": cache, "use_cache": True} if "past_key_values" in signature(body(lm).forward).parameters else {}
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
            body(lm)(ids_bt.to(lm.device), **caching)
    finally:
        for handle in handles:
            handle.remove()
    hidden = [*entering, end[last]]
    layers: list[Any] = list(cache.layers)
    return Recording(hidden, [layer.keys for layer in layers], [layer.values for layer in layers], calls, seen)


def body(lm: LanguageModel) -> nn.Module:
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


class _Prefix:
    """Stands where a block expects its cache: joins recorded keys and values with the new ones and stores nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)

    def get_seq_length(self, *_: Any) -> int:
        return int(self.keys.shape[2])


class _Noting(_Prefix):
    """Keeps the new keys and values beside those that it joins them with."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.new_keys, self.new_values = keys, values
        return super().update(keys, values)


class _Catch(_Prefix):
    """Ends a block's forward as soon as its new keys and values are known, and keeps them."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = super().update(keys, values)
        raise StopForward


class _Whole(_Prefix):
    """Holds the keys and values of all positions already; those that the block makes once more are not looked at."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class Suffix:
    """`length` positions of recorded rows, from `starts` on, ready to be run through blocks again.

    Rows may start at different positions: their recorded keys are then shifted so that all suffixes stand at the end of
    the key axis, and slots in front of a short prefix are masked. Positions keep their true numbers.

    Args:
        starts: first position of the suffix, one for all rows or one a recorded row.
        length: positions in the suffix; starts + length may not pass the recorded length.
    """

    def __init__(self, lm: LanguageModel, recording: Recording, starts: int | Sequence[int], length: int) -> None:
        self.blocks, self.recording, self.length = lm.parts.blocks, recording, length
        rows, recorded = recording.hidden[-1].shape[:2]
        each = [starts] * rows if isinstance(starts, int) else list(starts)
        assert len(each) == rows and max(each) + length <= recorded, "suffix beyond what was recorded"
        self.prefix = max(each)
        start_b = torch.tensor(each)
        # recorded position of each key slot
        self.slots_bs = torch.arange(self.prefix + length) - (self.prefix - start_b[:, None])
        self.positions_bq = start_b[:, None] + torch.arange(length)
        self.uniform = min(each) == self.prefix
        self._cut: dict[int, dict[str, Any]] = {}  # by layer: its recorded arguments, for these positions
        self._ends: dict[int, Suffix] = {}
        self._prefixes: dict[int, list[Tensor]] = {}

    def states(self, layer: int) -> Tensor:
        """What entered block `layer` at the suffix's positions when it was recorded, [b, q, d]."""
        return _take(self.recording.hidden[layer], self.positions_bq)

    def block(self, layer: int, hidden_nqd: Tensor, rows_n: Tensor | None = None) -> Tensor:
        """Run block `layer` on changed states of the suffix.

        Args:
            hidden_nqd: [n, q, d] what enters the block.
            rows_n: [n] recorded row whose prefix each of them continues; default: the recorded rows, one each.
        Returns:
            [n, q, d] what leaves the block.
        """
        return self._call(layer, hidden_nqd, rows_n, _Prefix(*self._prefix_of(layer, rows_n)))

    def last_positions(self, layer: int, hidden_nqd: Tensor, rows_n: Tensor | None = None, count: int = 1) -> Tensor:
        """Like `block`, where only the last `count` positions are read: the others give keys and values and nothing else.

        Returns:
            [n, count, d]. Exact; at the other positions most of the block's work is not done.
        """
        if self.length == count:
            return self.block(layer, hidden_nqd, rows_n)
        if count not in self._ends:
            last_bq = torch.arange(self.length - count, self.length).expand(len(self.positions_bq), -1)
            self._ends[count] = self._at(last_bq, self.uniform)
        return self._read(layer, hidden_nqd, hidden_nqd[:, -count:], self._ends[count], rows_n)

    def at_columns(self, layer: int, hidden_bqd: Tensor, columns_br: Tensor) -> Tensor:
        """Like `block` of the recorded rows, read only at some columns of each: [b, r] places in the suffix -> [b, r, d]."""
        rows_b1 = torch.arange(len(columns_br))[:, None]
        if any(buffer.dtype == torch.bool for buffer in self.blocks[layer].buffers()):
            return self.block(layer, hidden_bqd)[
                rows_b1, columns_br
            ]  # a mask of its own (GPT-Neo's) takes queries for the last ones
        return self._read(layer, hidden_bqd, hidden_bqd[rows_b1, columns_br], self._at(columns_br, False), None)

    def _read(self, layer: int, hidden_nqd: Tensor, read_nrd: Tensor, part: Suffix, rows_n: Tensor | None) -> Tensor:
        caught = _Catch(*self._prefix_of(layer, rows_n))
        try:
            self._call(layer, hidden_nqd, rows_n, caught)
        except StopForward:
            return part._call(layer, read_nrd, rows_n, _Whole(caught.keys, caught.values))
        raise NotReplayableError(f"{type(self.blocks[layer]).__name__} did not ask its cache for keys and values")

    def _at(self, columns_br: Tensor, uniform: bool) -> Suffix:
        """These positions of the suffix, as queries to all of its keys."""
        part = object.__new__(Suffix)
        positions_br = self.positions_bq.gather(1, columns_br)
        part.__dict__.update(self.__dict__, _cut={}, positions_bq=positions_br, length=columns_br.shape[1], uniform=uniform)
        part.prefix = self.slots_bs.shape[1] - part.length
        return part

    def _prefix_of(self, layer: int, rows_n: Tensor | None) -> tuple[Tensor, Tensor]:
        """Recorded keys and values in front of the suffix, [n, heads, prefix, head size]."""
        if layer not in self._prefixes:
            self._prefixes[layer] = [self._before(self.recording.keys[layer]), self._before(self.recording.values[layer])]
        keys, values = self._prefixes[layer]
        if rows_n is None:
            return keys, values
        return keys.index_select(0, rows_n.to(keys.device)), values.index_select(0, rows_n.to(values.device))

    def _before(self, kept: Tensor) -> Tensor:
        if self.uniform:
            return kept[:, :, : self.prefix]
        slots = self.slots_bs[:, : self.prefix].clamp(min=0).to(kept.device)
        return kept.gather(2, slots[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3]))

    def _call(self, layer: int, hidden_nqd: Tensor, rows_n: Tensor | None, cache: _Prefix) -> Tensor:
        if layer not in self._cut:
            arguments = _by_name(self.blocks[layer], *self.recording.calls[layer])
            self._cut[layer] = {name: self._cut_to_suffix(name, value) for name, value in arguments.items()}
        recorded = self.recording.hidden[-1].shape[0]
        arguments = {
            name: cache if isinstance(value, Cache) else _for_rows(name, value, rows_n, recorded)
            for name, value in self._cut[layer].items()
        }
        return first(self.blocks[layer](hidden_nqd, **arguments))

    def _cut_to_suffix(self, name: str, value: Any) -> Any:
        """One recorded argument of a block as it would be for the suffix alone."""
        if name == "attention_mask":
            return self._mask(value)
        if name in ("position_ids", "position_embeddings"):
            return _each(
                value, lambda x: _take(x, self.positions_bq[:1] if self.uniform and len(x) == 1 else self.positions_bq)
            )
        if name == "cache_position" and isinstance(value, Tensor):
            if not self.uniform:
                raise NotReplayableError(
                    "cache_position is one list for all rows, and the rows start at different positions"
                )
            return value[self.positions_bq[0].to(value.device)]
        if name in ("alibi", "position_bias") and isinstance(value, Tensor):
            return (
                value[..., -self.slots_bs.shape[1] :] if name == "position_bias" else value[..., : self.slots_bs.shape[1]]
            )
        if isinstance(value, Tensor):
            raise NotReplayableError(f"a block takes a tensor {name!r} whose axes are not known")
        return value

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """The recorded attention mask for queries of the suffix, [b or 1, heads or 1, q, prefix + q]."""
        queries, slots = self.positions_bq, self.slots_bs
        if mask is None:  # plain causal attention, left to the kernel
            if self.uniform and (self.length == 1 or self.prefix == 0):
                return None
            hidden = (slots[:, None, :] < 0) | (slots[:, None, :] > queries[:, :, None])
            states = self.recording.hidden[-1]  # a float mask: kernels would turn a boolean one into this at every call
            mask = torch.zeros(hidden.shape, dtype=states.dtype).masked_fill_(hidden, -torch.inf)
            return (mask[:1] if self.uniform else mask)[:, None].to(states.device)
        if self.uniform:
            return mask[:, :, queries[0, 0] : queries[0, -1] + 1, : slots.shape[1]]
        hide = mask[0, 0, 0, -1]  # what this family writes where the first token would look at the last
        queries, slots = queries.to(mask.device), slots.to(mask.device)
        mask = mask.expand(len(queries), -1, -1, -1)
        mask = mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, slots.clamp(min=0)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        return torch.where(slots[:, None, None, :] >= 0, mask, hide)


def _take(x_bt: Tensor, positions_bq: Tensor) -> Tensor:
    """Entries of x [b or 1, t, ...] at each row's positions, [b, q, ...]."""
    rows = torch.arange(len(positions_bq)).clamp(max=x_bt.shape[0] - 1)
    return x_bt[rows[:, None].to(x_bt.device), positions_bq.to(x_bt.device)]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to a tensor or to every tensor of a tuple; anything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(_each(v, change) for v in value)
    return change(value) if isinstance(value, Tensor) else value


def _for_rows(name: str, value: Any, rows_n: Tensor | None, recorded: int) -> Any:
    """An argument for n running rows: chosen by recorded row where it has a row axis, broadcast where it has none."""

    if rows_n is None:
        return value

    def choose(x: Tensor) -> Tensor:
        if name == "alibi" and x.dim() == 3:  # rows and heads share an axis (BLOOM)
            return x.view(recorded, -1, *x.shape[1:]).index_select(0, rows_n.to(x.device)).flatten(0, 1)
        if name in ("position_bias", "cache_position") or x.shape[0] != recorded or recorded == 1:
            return x
        return x.index_select(0, rows_n.to(x.device))

    return _each(value, choose)


# -- can it be replayed? ---------------------------------------------------------------------------------------------

_REPLAYABLE: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def use_replay(lm: LanguageModel, engine: Engine) -> bool:
    """Whether to replay: as told, or for "auto" wherever it gives the model's own numbers (see `replayable`).

    Raises:
        UnsupportedModelError: told to, and the model cannot be replayed.
    """
    if engine == "replay" and not replayable(lm):
        raise UnsupportedModelError(
            f"engine='replay': {lm.name} (model_type={lm.model.config.model_type!r}) cannot be replayed; leave out engine, and "
            "it runs through whole forward passes"
        )
    return engine != "whole" and replayable(lm)


def replayable(lm: LanguageModel) -> bool:
    """Whether replay gives this model's own numbers: tried once per model on a few tokens, then remembered.

    The try covers rows with different starts, the short last block and the head; a family that surprises us is found
    out here and runs through whole forward passes.
    """
    known = _REPLAYABLE.setdefault(lm.model, {})
    key = (getattr(lm.model.config, "_attn_implementation", None), lm.dtype)
    if key not in known:
        try:
            known[key] = _try(lm)
        except (NotReplayableError, StopForward, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            log.debug("%s cannot be replayed: %s", lm.name, error)
            known[key] = False
        if not known[key]:
            log.debug("%s runs through whole forward passes", lm.name)
    return known[key]


@torch.no_grad()
def _try(lm: LanguageModel) -> bool:
    vocabulary = int(lm.model.config.vocab_size)
    ids_bt = (torch.arange(14).view(2, 7) * 31 + 5) % vocabulary
    recording = record_run(lm, ids_bt)
    tolerance = 1e-3 if torch.finfo(lm.dtype).eps < 1e-5 else 0.1

    def close(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).float().norm() <= tolerance * b.float().norm().clamp(min=1e-6))

    for starts in (3, [2, 4]):
        suffix = Suffix(lm, recording, starts, 3)
        for layer in range(lm.n_layers):
            entering, leaving = suffix.states(layer), suffix.states(layer + 1)
            if not close(suffix.block(layer, entering), leaving):
                return False
            if not close(suffix.last_positions(layer, entering), leaving[:, -1:]):
                return False
            columns_br, rows_b1 = torch.tensor([[0, 1], [2, 0]]), torch.arange(2)[:, None]
            if not close(suffix.at_columns(layer, entering, columns_br), leaving[rows_b1, columns_br]):
                return False
    return close(lm.parts.head(recording.hidden[-1]), lm.model(ids_bt.to(lm.device), use_cache=False).logits)
