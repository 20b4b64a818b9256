"""The engine: run again only the blocks and positions that a change can reach.

In a causal model a change at block l, position i is invisible to blocks below l and to positions
before i. So one run is recorded (what enters each block, keys and values, the arguments of each
block's call), and afterwards blocks are called one by one on the positions from i on, with the
recorded keys and values in front, for any number of rows at a time.

Example: 3 blocks, the 4 tokens "The tower is in", and a new state of "tower" (position 1) after
block 0. Letters are states [d] at a position; r is read from the recording, * is computed again.

    position          0     1     2     3
    leaves block 0    .     new   r     r      suffix.states(1), entry 0 replaced
    block 1           kv r  *     *     *      suffix.block(1, ...): 3 queries, 4 keys
    block 2           kv r  kv*   kv*   *      suffix.last_positions(2, ...): 1 query, 4 keys
    head                                *

A whole forward pass calls blocks on 12 states, the replay on 3 + 1, and of position 0 only keys
and values are read. Position 0 of block 0 was computed once, when the run was recorded.

Knows blocks and tensors. Refuses to know why states change: causal tracing and value optimisation
say what, this says how to compute the consequences exactly. What cannot be replayed (`replayable`
finds out by trying) runs through whole forward passes instead; both give the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache

from engram.engine.recording import (
    NotReplayableError,
    Recording,
    argument_for_rows,
    arguments_by_name,
    map_tensors,
)
from engram.modules.hooks import StopForward, first

log = logging.getLogger(__name__)


class _Prefix:
    """What a block gets as its cache: joins recorded keys and values with the new ones and stores
    nothing.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)

    def get_seq_length(self, *_: Any) -> int:
        return int(self.keys.shape[2])


class _CaptureKV(_Prefix):
    """Keeps the new keys and values too, apart from those that it joins them with."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.new_keys, self.new_values = keys, values
        return super().update(keys, values)


class _StopAfterKV(_Prefix):
    """Ends a block's forward as soon as its new keys and values are known, and keeps them."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = super().update(keys, values)
        raise StopForward


class _FullKV(_Prefix):
    """Has the keys and values of all positions already; those that the block computes again are
    ignored.
    """

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


@dataclass(frozen=True, eq=False)
class Positions:
    """Which recorded positions are queries, and which are the keys that they see.

    Rows may start at different positions. Their keys are then shifted to the right, so that all
    suffixes end at the end of the key axis. Two rows of 6 recorded positions, suffixes of length 2
    from positions 1 and 3 on:

        queries_bq  [[1, 2],           slots_bs  [[-2, -1, 0, 1, 2],     -1, -2: masked slots in
                     [3, 4]]                      [ 0,  1, 2, 3, 4]]     front of the short prefix

    Attributes:
        slots_bs: [b, s] recorded position of each key slot; below 0: none.
        queries_bq: [b, q] recorded position of each query.
        uniform: whether all rows have the same positions, in a row; no mask per row is needed then.
    """

    slots_bs: Tensor
    queries_bq: Tensor
    uniform: bool

    @classmethod
    def of_suffix(cls, starts: Sequence[int], length: int) -> Positions:
        """Return the `length` positions from each row's start on, and the slots up to their end."""
        start_b1, prefix = torch.tensor(starts)[:, None], max(starts)
        slots_bs = torch.arange(prefix + length) - (prefix - start_b1)
        return cls(slots_bs, start_b1 + torch.arange(length), min(starts) == prefix)

    @property
    def prefix(self) -> int:
        """Slots in front of the queries."""
        return self.slots_bs.shape[1] - self.queries_bq.shape[1]

    def columns(self, columns_br: Tensor, uniform: bool) -> Positions:
        """Return the same with only some of the queries."""
        return Positions(self.slots_bs, self.queries_bq.gather(1, columns_br), uniform)

    def argument(self, name: str, value: Any, states: Tensor) -> Any:
        """Return a recorded argument of a block as it would be for these queries alone.

        Args:
            states: whose dtype and device a mask gets.
        Raises:
            NotReplayableError: it is a tensor whose axes are not known.
        """
        if name == "attention_mask":
            return self._mask(value, states)
        if name in ("position_ids", "position_embeddings"):
            one_row = self.queries_bq[:1]
            return map_tensors(
                value,
                lambda x: take(x, one_row if self.uniform and len(x) == 1 else self.queries_bq),
            )
        if name == "cache_position" and isinstance(value, Tensor):
            if not self.uniform:
                raise NotReplayableError(
                    "cache_position is one list for all rows, and the rows start at different "
                    "positions"
                )
            return value[self.queries_bq[0].to(value.device)]
        # MPT counts distances from the last key, BLOOM's ALiBi from the first.
        slots = self.slots_bs.shape[1]
        if name == "position_bias" and isinstance(value, Tensor):
            return value[..., -slots:]
        if name == "alibi" and isinstance(value, Tensor):
            return value[..., :slots]
        if isinstance(value, Tensor):
            raise NotReplayableError(f"a block takes a tensor {name!r} whose axes are not known")
        return value

    def _mask(self, mask: Tensor | None, states: Tensor) -> Tensor | None:
        """Return the recorded attention mask for these queries, [b or 1, heads or 1, q, s]."""
        queries, slots = self.queries_bq, self.slots_bs
        if mask is None:  # plain causal attention, left to the kernel
            # One query sees every key, and without a prefix the kernel's own mask is right.
            if self.uniform and (queries.shape[1] == 1 or self.prefix == 0):
                return None
            hidden = (slots[:, None, :] < 0) | (slots[:, None, :] > queries[:, :, None])
            # A float mask: kernels would turn a boolean one into this at every call.
            mask = torch.zeros(hidden.shape, dtype=states.dtype).masked_fill_(hidden, -torch.inf)
            return (mask[:1] if self.uniform else mask)[:, None].to(states.device)
        if self.uniform:
            return mask[:, :, queries[0, 0] : queries[0, -1] + 1, : slots.shape[1]]
        # What this family writes where the first token would look at the last.
        hide = mask[0, 0, 0, -1]
        queries, slots = queries.to(mask.device), slots.to(mask.device)
        mask = mask.expand(len(queries), -1, -1, -1)
        rows = queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        mask = mask.gather(2, rows)  # (b, h, q, t)
        columns = slots.clamp(min=0)[:, None, None, :]
        mask = mask.gather(3, columns.expand(-1, mask.shape[1], mask.shape[2], -1))  # (b, h, q, s)
        return torch.where(slots[:, None, None, :] >= 0, mask, hide)


class Suffix:
    """`length` positions of recorded rows, from `starts` on, ready to be run through blocks again.

    Positions keep their true numbers; see `Positions` for rows that start at different ones.

    Args:
        starts: first position of the suffix, one for all rows or one per recorded row.
        length: positions in the suffix; starts + length may not pass the recorded length.
    """

    def __init__(self, recording: Recording, starts: int | Sequence[int], length: int) -> None:
        self.recording, self.length = recording, length
        rows, recorded = recording.hidden[-1].shape[:2]
        row_starts = [starts] * rows if isinstance(starts, int) else list(starts)
        assert len(row_starts) == rows and max(row_starts) + length <= recorded, (
            "suffix beyond what was recorded"
        )
        self.positions = Positions.of_suffix(row_starts, length)
        # Both are read many times per layer: a value search runs the same suffix at every step.
        self._ends: dict[int, Positions] = {}
        self._prefixes: dict[int, list[Tensor]] = {}
        # Per positions and layer; weak, since `at_columns` makes positions of its own at each call.
        self._arguments: WeakKeyDictionary[Positions, dict[int, dict[str, Any]]] = (
            WeakKeyDictionary()
        )

    def states(self, layer: int) -> Tensor:
        """Return what entered block `layer` at the suffix's positions when it was recorded,
        [b, q, d].
        """
        return take(self.recording.hidden[layer], self.positions.queries_bq)

    def block(self, layer: int, hidden_nqd: Tensor, rows_n: Tensor | None = None) -> Tensor:
        """Run block `layer` on changed states of the suffix.

        Args:
            hidden_nqd: [n, q, d] what enters the block.
            rows_n: [n] recorded row whose prefix each of them continues; default: the recorded
                rows, one each.
        Returns:
            [n, q, d] what leaves the block.
        """
        cache = _Prefix(*self._prefix_of(layer, rows_n))
        return self._call(layer, hidden_nqd, rows_n, cache, self.positions)

    def last_positions(
        self, layer: int, hidden_nqd: Tensor, rows_n: Tensor | None = None, count: int = 1
    ) -> Tensor:
        """Run `block` where only the last `count` positions are read: the others give keys and
        values and nothing else.

        Returns:
            [n, count, d]. Exact; at the other positions most of the block's work is not done.
        """
        if self.length == count:
            return self.block(layer, hidden_nqd, rows_n)
        if count not in self._ends:
            last_q = torch.arange(self.length - count, self.length)
            last_bq = last_q.expand(len(self.positions.queries_bq), -1)
            self._ends[count] = self.positions.columns(last_bq, self.positions.uniform)
        return self._read(layer, hidden_nqd, hidden_nqd[:, -count:], self._ends[count], rows_n)

    def at_columns(self, layer: int, hidden_bqd: Tensor, columns_br: Tensor) -> Tensor:
        """Run `block` of the recorded rows where only some columns of each are read: [b, r] places
        in the suffix -> [b, r, d].
        """
        rows_b1 = torch.arange(len(columns_br))[:, None]
        if any(buffer.dtype == torch.bool for buffer in self.recording.blocks[layer].buffers()):
            # A mask of the block's own (GPT-Neo's) takes queries for the last positions.
            return self.block(layer, hidden_bqd)[rows_b1, columns_br]
        positions = self.positions.columns(columns_br, uniform=False)
        return self._read(layer, hidden_bqd, hidden_bqd[rows_b1, columns_br], positions, None)

    def run_recording(self, hidden_nqd: Tensor, rows_n: Tensor, from_layer: int) -> Recording:
        """Run all blocks on new states of the suffix and record that run.

        Args:
            hidden_nqd: [n, q, d] what enters block 0.
            rows_n: [n] recorded row whose prefix each of them continues.
            from_layer: lowest block that is kept, as in `Recording.select`.
        Returns:
            The recording that a run of the n whole rows would give.
        """
        positions_nq = self.positions.queries_bq[rows_n]
        whole = self.recording.select(rows_n, from_layer)
        for layer in range(len(whole.keys)):
            # Blocks below `from_layer` run too, but nothing of them is kept.
            cache = _CaptureKV(*self._prefix_of(layer, rows_n))
            leaving_nqd = self._call(layer, hidden_nqd, rows_n, cache, self.positions)
            if layer >= from_layer:
                put(whole.hidden[layer], positions_nq, hidden_nqd)
                # (n, heads, t, size) -> (n, t, heads, size): `put` writes along the second axis
                new_keys, new_values = cache.new_keys, cache.new_values
                put(whole.keys[layer].transpose(1, 2), positions_nq, new_keys.transpose(1, 2))
                put(whole.values[layer].transpose(1, 2), positions_nq, new_values.transpose(1, 2))
            hidden_nqd = leaving_nqd
        put(whole.hidden[-1], positions_nq, hidden_nqd)
        return whole

    def _read(
        self,
        layer: int,
        hidden_nqd: Tensor,
        read_nrd: Tensor,
        positions: Positions,
        rows_n: Tensor | None,
    ) -> Tensor:
        """Run the block twice: up to the keys and values of all positions, then whole on a few."""
        # Keys and values of all positions cost a norm and two matrices. The rest, most of a block's
        # work, is done only where it is read.
        stopped = _StopAfterKV(*self._prefix_of(layer, rows_n))
        try:
            self._call(layer, hidden_nqd, rows_n, stopped, self.positions)
        except StopForward:
            full = _FullKV(stopped.keys, stopped.values)
            return self._call(layer, read_nrd, rows_n, full, positions)
        raise NotReplayableError(
            f"{type(self.recording.blocks[layer]).__name__} did not ask its cache for keys and "
            "values"
        )

    def _prefix_of(self, layer: int, rows_n: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return recorded keys and values in front of the suffix, [n, heads, prefix, head size]."""
        if layer not in self._prefixes:
            recorded = (self.recording.keys[layer], self.recording.values[layer])
            self._prefixes[layer] = [self._before(x) for x in recorded]
        keys, values = self._prefixes[layer]
        if rows_n is None:
            return keys, values
        return (
            keys.index_select(0, rows_n.to(keys.device)),
            values.index_select(0, rows_n.to(values.device)),
        )

    def _before(self, x_bhtk: Tensor) -> Tensor:
        prefix = self.positions.prefix
        if self.positions.uniform:
            return x_bhtk[:, :, :prefix]  # a view; rows with starts of their own need copies
        slots = self.positions.slots_bs[:, :prefix].clamp(min=0).to(x_bhtk.device)
        heads, size = x_bhtk.shape[1], x_bhtk.shape[3]
        return x_bhtk.gather(2, slots[:, None, :, None].expand(-1, heads, -1, size))

    def _call(
        self,
        layer: int,
        hidden_nqd: Tensor,
        rows_n: Tensor | None,
        cache: _Prefix,
        positions: Positions,
    ) -> Tensor:
        block, states = self.recording.blocks[layer], self.recording.hidden[-1]
        by_layer = self._arguments.setdefault(positions, {})
        if layer not in by_layer:
            by_layer[layer] = {
                name: positions.argument(name, value, states)
                for name, value in arguments_by_name(block, *self.recording.calls[layer]).items()
            }
        # The cache is found by type: families call it past_key_value, past_key_values, layer_past.
        arguments = {
            name: cache
            if isinstance(value, Cache)
            else argument_for_rows(name, value, rows_n, len(states))
            for name, value in by_layer[layer].items()
        }
        return first(block(hidden_nqd, **arguments))


def take(x_bt: Tensor, positions_bq: Tensor) -> Tensor:
    """Return the entries of x [b or 1, t, ...] at each row's positions, [b, q, ...]."""
    rows = torch.arange(len(positions_bq)).clamp(max=x_bt.shape[0] - 1)
    return x_bt[rows[:, None].to(x_bt.device), positions_bq.to(x_bt.device)]


def put(x_bt: Tensor, positions_bq: Tensor, new_bq: Tensor) -> None:
    """Write [b, q, ...] into x [b, t, ...] at each row's positions; the inverse of `take`."""
    rows_b1 = torch.arange(len(positions_bq))[:, None]
    x_bt[rows_b1, positions_bq] = new_bq.to(x_bt.device)
