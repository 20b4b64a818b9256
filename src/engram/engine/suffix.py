"""The engine: run again only the blocks and positions that a change can reach.

In a causal model a change at block l, position i is invisible to blocks before l and to positions
before i. So one run is recorded (what enters each block, keys and values, the arguments each block
was called with), and afterwards blocks are called one by one on positions i.. only, with the
recorded keys and values in front, any number of rows at a time.

Knows blocks and tensors. Refuses to know why states change: causal tracing and value optimisation
say what, this says how to compute the consequences exactly. What cannot be replayed (`replayable`
finds out by trying) runs through whole forward passes instead; both give the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from engram.engine.recording import NotReplayableError, Recording, _by_name, _each, _for_rows
from engram.model.language_model import LanguageModel
from engram.modules.hooks import StopForward, first

log = logging.getLogger(__name__)


class _Prefix:
    """Stands where a block expects its cache: joins recorded keys and values with the new ones and
    stores nothing.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)

    def get_seq_length(self, *_: Any) -> int:
        return int(self.keys.shape[2])


class _CaptureKV(_Prefix):
    """Keeps the new keys and values beside those that it joins them with."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.new_keys, self.new_values = keys, values
        return super().update(keys, values)


class _StopAfterKV(_Prefix):
    """Ends a block's forward as soon as its new keys and values are known, and keeps them."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = super().update(keys, values)
        raise StopForward


class _FullKV(_Prefix):
    """Holds the keys and values of all positions already; those that the block makes once more are
    not looked at.
    """

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class Suffix:
    """`length` positions of recorded rows, from `starts` on, ready to be run through blocks again.

    Rows may start at different positions: their recorded keys are then shifted so that all suffixes
        stand at the end of
    the key axis, and slots in front of a short prefix are masked. Positions keep their true
    numbers.

    Args:
        starts: first position of the suffix, one for all rows or one a recorded row.
        length: positions in the suffix; starts + length may not pass the recorded length.
    """

    def __init__(
        self, lm: LanguageModel, recording: Recording, starts: int | Sequence[int], length: int
    ) -> None:
        self.blocks, self.recording, self.length = lm.parts.blocks, recording, length
        rows, recorded = recording.hidden[-1].shape[:2]
        each = [starts] * rows if isinstance(starts, int) else list(starts)
        assert len(each) == rows and max(each) + length <= recorded, (
            "suffix beyond what was recorded"
        )
        self.prefix = max(each)
        start_b = torch.tensor(each)
        # recorded position of each key slot
        self.slots_bs = torch.arange(self.prefix + length) - (self.prefix - start_b[:, None])
        self.positions_bq = start_b[:, None] + torch.arange(length)
        self.uniform = min(each) == self.prefix
        self._cut: dict[
            int, dict[str, Any]
        ] = {}  # by layer: its recorded arguments, for these positions
        self._ends: dict[int, Suffix] = {}
        self._prefixes: dict[int, list[Tensor]] = {}

    def states(self, layer: int) -> Tensor:
        """What entered block `layer` at the suffix's positions when it was recorded, [b, q, d]."""
        return _take(self.recording.hidden[layer], self.positions_bq)

    def block(self, layer: int, hidden_nqd: Tensor, rows_n: Tensor | None = None) -> Tensor:
        """Run block `layer` on changed states of the suffix.

        Args:
            hidden_nqd: [n, q, d] what enters the block.
            rows_n: [n] recorded row whose prefix each of them continues; default: the recorded
                rows, one each.
        Returns:
            [n, q, d] what leaves the block.
        """
        return self._call(layer, hidden_nqd, rows_n, _Prefix(*self._prefix_of(layer, rows_n)))

    def last_positions(
        self, layer: int, hidden_nqd: Tensor, rows_n: Tensor | None = None, count: int = 1
    ) -> Tensor:
        """Like `block`, where only the last `count` positions are read: the others give keys and
        values and nothing else.

        Returns:
            [n, count, d]. Exact; at the other positions most of the block's work is not done.
        """
        if self.length == count:
            return self.block(layer, hidden_nqd, rows_n)
        if count not in self._ends:
            last_bq = torch.arange(self.length - count, self.length).expand(
                len(self.positions_bq), -1
            )
            self._ends[count] = self._at(last_bq, self.uniform)
        return self._read(layer, hidden_nqd, hidden_nqd[:, -count:], self._ends[count], rows_n)

    def at_columns(self, layer: int, hidden_bqd: Tensor, columns_br: Tensor) -> Tensor:
        """Like `block` of the recorded rows, read only at some columns of each: [b, r] places in
        the suffix -> [b, r, d].
        """
        rows_b1 = torch.arange(len(columns_br))[:, None]
        if any(buffer.dtype == torch.bool for buffer in self.blocks[layer].buffers()):
            return self.block(layer, hidden_bqd)[
                rows_b1, columns_br
            ]  # a mask of its own (GPT-Neo's) takes queries for the last ones
        return self._read(
            layer, hidden_bqd, hidden_bqd[rows_b1, columns_br], self._at(columns_br, False), None
        )

    def _read(
        self, layer: int, hidden_nqd: Tensor, read_nrd: Tensor, part: Suffix, rows_n: Tensor | None
    ) -> Tensor:
        caught = _StopAfterKV(*self._prefix_of(layer, rows_n))
        try:
            self._call(layer, hidden_nqd, rows_n, caught)
        except StopForward:
            return part._call(layer, read_nrd, rows_n, _FullKV(caught.keys, caught.values))
        raise NotReplayableError(
            f"{type(self.blocks[layer]).__name__} did not ask its cache for keys and values"
        )

    def _at(self, columns_br: Tensor, uniform: bool) -> Suffix:
        """These positions of the suffix, as queries to all of its keys."""
        part = object.__new__(Suffix)
        positions_br = self.positions_bq.gather(1, columns_br)
        part.__dict__.update(
            self.__dict__,
            _cut={},
            positions_bq=positions_br,
            length=columns_br.shape[1],
            uniform=uniform,
        )
        part.prefix = self.slots_bs.shape[1] - part.length
        return part

    def _prefix_of(self, layer: int, rows_n: Tensor | None) -> tuple[Tensor, Tensor]:
        """Recorded keys and values in front of the suffix, [n, heads, prefix, head size]."""
        if layer not in self._prefixes:
            self._prefixes[layer] = [
                self._before(self.recording.keys[layer]),
                self._before(self.recording.values[layer]),
            ]
        keys, values = self._prefixes[layer]
        if rows_n is None:
            return keys, values
        return keys.index_select(0, rows_n.to(keys.device)), values.index_select(
            0, rows_n.to(values.device)
        )

    def _before(self, kept: Tensor) -> Tensor:
        if self.uniform:
            return kept[:, :, : self.prefix]
        slots = self.slots_bs[:, : self.prefix].clamp(min=0).to(kept.device)
        return kept.gather(2, slots[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3]))

    def _call(
        self, layer: int, hidden_nqd: Tensor, rows_n: Tensor | None, cache: _Prefix
    ) -> Tensor:
        if layer not in self._cut:
            arguments = _by_name(self.blocks[layer], *self.recording.calls[layer])
            self._cut[layer] = {
                name: self._cut_to_suffix(name, value) for name, value in arguments.items()
            }
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
                value,
                lambda x: _take(
                    x, self.positions_bq[:1] if self.uniform and len(x) == 1 else self.positions_bq
                ),
            )
        if name == "cache_position" and isinstance(value, Tensor):
            if not self.uniform:
                raise NotReplayableError(
                    "cache_position is one list for all rows, and the rows start at different positions"
                )
            return value[self.positions_bq[0].to(value.device)]
        if name in ("alibi", "position_bias") and isinstance(value, Tensor):
            return (
                value[..., -self.slots_bs.shape[1] :]
                if name == "position_bias"
                else value[..., : self.slots_bs.shape[1]]
            )
        if isinstance(value, Tensor):
            raise NotReplayableError(f"a block takes a tensor {name!r} whose axes are not known")
        return value

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """The recorded attention mask for queries of the suffix, [b or 1, heads or 1, q, prefix +
        q].
        """
        queries, slots = self.positions_bq, self.slots_bs
        if mask is None:  # plain causal attention, left to the kernel
            if self.uniform and (self.length == 1 or self.prefix == 0):
                return None
            hidden = (slots[:, None, :] < 0) | (slots[:, None, :] > queries[:, :, None])
            states = self.recording.hidden[
                -1
            ]  # a float mask: kernels would turn a boolean one into this at every call
            mask = torch.zeros(hidden.shape, dtype=states.dtype).masked_fill_(hidden, -torch.inf)
            return (mask[:1] if self.uniform else mask)[:, None].to(states.device)
        if self.uniform:
            return mask[:, :, queries[0, 0] : queries[0, -1] + 1, : slots.shape[1]]
        hide = mask[
            0, 0, 0, -1
        ]  # what this family writes where the first token would look at the last
        queries, slots = queries.to(mask.device), slots.to(mask.device)
        mask = mask.expand(len(queries), -1, -1, -1)
        mask = mask.gather(
            2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        )
        mask = mask.gather(
            3, slots.clamp(min=0)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        )
        return torch.where(slots[:, None, None, :] >= 0, mask, hide)


def _take(x_bt: Tensor, positions_bq: Tensor) -> Tensor:
    """Entries of x [b or 1, t, ...] at each row's positions, [b, q, ...]."""
    rows = torch.arange(len(positions_bq)).clamp(max=x_bt.shape[0] - 1)
    return x_bt[rows[:, None].to(x_bt.device), positions_bq.to(x_bt.device)]
