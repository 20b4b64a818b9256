"""Rows of tokens whose state at the subject is shifted: logits where they are read, again and again
for other shifts.

Knows blocks, positions and which fact a row belongs to. Refuses to know losses. Replayed, only
blocks above the shift and positions from the subject's last token on are run, and the last block
only where logits are read; a model that cannot be replayed runs whole, and so do rows that, with
their subjects one below the other, are longer than the model takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from engram.engine.recording import Recording, base_model, record_run
from engram.engine.replayable import Engine, use_replay
from engram.engine.shared_prompts import record_shared_prefixes
from engram.engine.suffix import Suffix
from engram.model.language_model import LanguageModel
from engram.model.tokens import pad_right
from engram.modules.hooks import record, substitute

Site = Literal["mlp", "block", "attention+mlp"]  # which states of a block are shifted
Readouts = Mapping[
    str, tuple[str, Literal["in", "out"]]
]  # name -> (module, its input or its output)


def site_modules(
    lm: LanguageModel, site: Site, layer: int
) -> dict[str, tuple[str, Literal["in", "out"]]]:
    """The modules whose outputs are shifted, in order."""
    names = {
        "mlp": [lm.parts.mlp_out_name(layer)],
        "block": [lm.parts.block_name(layer)],
        "attention+mlp": [
            lm.parts.site_module_name("attention", layer),
            lm.parts.mlp_out_name(layer),
        ],
    }
    return {f"shifted {i}": (name, "out") for i, name in enumerate(names[site])}


@torch.no_grad()
def mlp_shift_reaches_block_output(lm: LanguageModel, layer: int, within: float = 0.1) -> bool:
    """Whether what is added to the MLP output matrix's output is added to the block's: not where a
    norm or a factor is in between.

    Args:
        within: largest part of a shift that may be lost or changed on the way.
    """
    block, ids_bt = lm.parts.block_name(layer), torch.tensor([[5, 6]], device=lm.device)

    def leaving(shift_d: Tensor) -> Tensor:
        shifted = {lm.parts.mlp_out(layer): lambda out: out + shift_d.to(out)}
        with record(lm.model, outputs=[block], stop=True) as seen, substitute(shifted):
            base_model(lm)(ids_bt, use_cache=False)
        return seen[block].float()

    plain_btd = leaving(torch.zeros(lm.d_model))
    shift_d = torch.linspace(-1, 1, lm.d_model, device=plain_btd.device) * plain_btd.abs().mean()
    missed_btd = leaving(shift_d) - plain_btd - shift_d
    return bool(missed_btd[0, -1].norm() < within * shift_d.norm())


def shifted_at(lm: LanguageModel, layer: int, site: Site, engine: Engine) -> Site:
    """Where a shift is added: an MLP's at the block's output where that is the same sum, so that
    the block need not be run again.
    """
    rounding = max(1e-4, 4 * torch.finfo(lm.dtype).eps)
    same = (
        site == "mlp"
        and use_replay(lm, engine)
        and mlp_shift_reaches_block_output(lm, layer, rounding)
    )
    return "block" if same else site


@dataclass(frozen=True)
class TokenRows:
    """Token rows of several facts.

    Attributes:
        ids: one list a row; lookup: the subject's last token in it; reads: positions whose logits
            are wanted.
        owner: which fact a row belongs to; rows of one fact stand together, and as many for each.
    """

    ids: list[list[int]]
    lookup: list[int]
    reads: list[list[int]]
    owner: list[int]

    @property
    def suffix(self) -> int:
        """Positions from the subject's last token to the end, of the longest row."""
        return max(len(row) - at for row, at in zip(self.ids, self.lookup, strict=True))

    @property
    def aligned(self) -> int:
        """Positions that let every row have as many behind its subject."""
        return max(self.lookup) + self.suffix

    def shared(self) -> tuple[list[int], int]:
        """How many tokens the first rows of all facts begin with in common, the second ones, and so
        on, as far as it is before their
        subjects' last tokens; and positions that hold any shared part and the longest rest. No
        tokens where it saves little."""
        of = self.owner.count(0)
        tokens = []
        for k in range(of):
            common = takewhile(lambda at: len(set(at)) == 1, zip(*self.ids[k::of], strict=False))
            tokens.append(min(sum(1 for _ in common), *self.lookup[k::of]))
        rest = max(len(row) - tokens[b % of] for b, row in enumerate(self.ids))
        length = max(self.aligned, max(tokens) + rest)
        saves = 4 * (of * length + len(self.ids) * rest) < 3 * len(self.ids) * self.aligned
        return tokens if saves else [], length

    def first_of_each(self) -> list[int]:
        """The first row of each fact."""
        return [self.owner.index(n) for n in range(self.owner[-1] + 1)]

    def of(self, facts: Sequence[int]) -> tuple[list[int], TokenRows]:
        """Numbers of the rows of some facts, and these rows."""
        place = {fact: i for i, fact in enumerate(facts)}
        rows = [row for row, owner in enumerate(self.owner) if owner in place]
        some = lambda values: [values[row] for row in rows]  # noqa: E731
        return rows, TokenRows(
            some(self.ids),
            some(self.lookup),
            some(self.reads),
            [place[self.owner[row]] for row in rows],
        )


class ShiftedRows:
    """Rows whose state at the subject can be shifted.

    Args:
        recording: of these rows, of blocks from `layer` on; None where the model runs whole.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: TokenRows,
        layer: int,
        site: Site,
        recording: Recording | None,
    ) -> None:
        self.lm, self.rows, self.layer, self.site, self.recording = lm, rows, layer, site, recording
        self.modules = [
            lm.model.get_submodule(name) for name, _ in site_modules(lm, site, layer).values()
        ]
        self.owner_b = torch.tensor(rows.owner)
        self.read_rows = torch.tensor([row for row, reads in enumerate(rows.reads) for _ in reads])

    @classmethod
    def recorded(
        cls,
        lm: LanguageModel,
        rows: TokenRows,
        layer: int,
        site: Site,
        engine: Engine,
        wanted: Readouts,
    ) -> tuple[ShiftedRows, dict[str, Tensor]]:
        """Run the rows once, unshifted; with what was wanted at each row's subject, [b, width]."""
        inputs = list(dict.fromkeys(name for name, side in wanted.values() if side == "in"))
        outputs = list(dict.fromkeys(name for name, side in wanted.values() if side == "out"))
        replays = use_replay(lm, engine) and rows.aligned <= lm.max_tokens
        every, (shared, length) = torch.arange(len(rows.ids)), rows.shared()
        if replays and shared and length <= lm.max_tokens:
            recording = record_shared_prefixes(
                lm, rows.ids, shared, layer=layer, length=length, inputs=inputs, outputs=outputs
            )
        else:
            shared = []
            recording = record_run(
                lm,
                pad_right(rows.ids, rows.aligned if replays else None),
                inputs=inputs,
                outputs=outputs,
            )

        def at_subject(name: str, side: str) -> Tensor:
            seen = recording.seen[f"{name}:input" if side == "in" and name in outputs else name]
            return seen.view(len(rows.ids), -1, seen.shape[-1])[every, rows.lookup]

        seen = {key: at_subject(*place) for key, place in wanted.items()}
        if replays and not shared:
            recording = recording.select(every, layer)
        return cls(lm, rows, layer, site, recording if replays else None), seen

    def only(self, facts: Sequence[int]) -> ShiftedRows:
        """The rows of some of the facts, which are renumbered."""
        numbers, rows = self.rows.of(facts)
        kept = (
            None
            if self.recording is None
            else self.recording.select(torch.tensor(numbers), self.layer)
        )
        return ShiftedRows(self.lm, rows, self.layer, self.site, kept)

    def logits(self, delta_nsd: Tensor) -> Tensor:
        """Logits [reads, v], row after row, with each fact's shifts added at its rows' subjects.

        Args:
            delta_nsd: [facts, shifted modules, d].
        """
        shift_bsd = delta_nsd[self.owner_b.to(delta_nsd.device)]
        return self._whole(shift_bsd) if self.recording is None else self._replayed(shift_bsd)

    # -- replayed ----------------------------------------------------------------------------------

    @cached_property
    def _suffix(self) -> Suffix:
        assert self.recording is not None
        return Suffix(self.recording, self.rows.lookup, self.rows.suffix)

    @cached_property
    def _alone(self) -> Suffix:
        assert self.recording is not None
        return (
            self._suffix if self.rows.suffix == 1 else Suffix(self.recording, self.rows.lookup, 1)
        )

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor]:
        """Places of the reads in the suffix, [b, r] padded with the last; and of each read in that."""
        columns = [
            [at - lookup for at in reads]
            for reads, lookup in zip(self.rows.reads, self.rows.lookup, strict=True)
        ]
        return pad_right(columns), torch.tensor([i for reads in columns for i in range(len(reads))])

    @cached_property
    def _unshifted(self) -> tuple[Tensor, Tensor]:
        """What enters the shifted block, or leaves it where that is shifted, at the subject; and
        what leaves it behind it.
        """
        entry = self.layer + (self.site == "block")
        return self._alone.states(entry), self._suffix.states(self.layer + 1)[:, 1:]

    def _replayed(self, shift_bsd: Tensor) -> Tensor:
        subject_b1d, after = self._unshifted
        if self.site == "block":
            subject_b1d = subject_b1d + shift_bsd.to(subject_b1d)
        else:
            with substitute(
                {module: _adding(shift_bsd[:, i]) for i, module in enumerate(self.modules)}
            ):
                subject_b1d = self._alone.block(self.layer, subject_b1d)
        hidden_bqd, top = torch.cat([subject_b1d, after], 1), self.lm.n_layers - 1
        columns_br, slots = self._columns
        short = self.layer < top and columns_br.shape[1] < hidden_bqd.shape[1]
        for above in range(self.layer + 1, self.lm.n_layers - short):
            hidden_bqd = self._suffix.block(above, hidden_bqd)
        if short:
            hidden_bqd = self._suffix.at_columns(top, hidden_bqd, columns_br)
        else:
            slots = columns_br[self.read_rows, slots]
        return self.lm.parts.head(hidden_bqd[self.read_rows, slots])

    # -- whole forward passes ----------------------------------------------------------------------

    def _whole(self, shift_bsd: Tensor) -> Tensor:
        lm, rows, ids_bt = self.lm, torch.arange(len(self.rows.ids)), pad_right(self.rows.ids)
        seen: dict[str, Tensor] = {}

        def at_subject(shift_bd: Tensor, out: Tensor) -> Tensor:
            placed = torch.zeros(
                *ids_bt.shape, shift_bd.shape[-1], dtype=out.dtype, device=out.device
            )
            placed[rows, self.rows.lookup] = shift_bd.to(out)
            return out + placed.view(out.shape)

        def keep(out: Tensor) -> Tensor:
            seen["last"] = out
            return out

        changes = {
            module: lambda out, i=i: at_subject(shift_bsd[:, i], out)
            for i, module in enumerate(self.modules)
        }
        with substitute(changes), substitute({lm.parts.blocks[-1]: keep}):
            base_model(lm)(ids_bt.to(lm.device), use_cache=False)
        positions = [at for reads in self.rows.reads for at in reads]
        return lm.parts.head(seen.pop("last")[self.read_rows, positions])


def _adding(shift_bd: Tensor) -> Callable[[Tensor], Tensor]:
    """out + shift, of a module called on one position a row."""
    return lambda out: out + shift_bd.to(out).view(out.shape)
