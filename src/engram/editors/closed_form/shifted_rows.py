"""Rows of tokens whose state at the subject is shifted: logits again and again, for new shifts.

Knows blocks, positions and which fact a row belongs to. Refuses to know losses. A replay runs only
the blocks above the shift, only the positions from the subject's last token on, and in the last
block only where logits are read. A model that cannot be replayed runs whole, and so do rows that
are longer than the model takes once they are padded so that their subjects are aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor, nn

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
    """Return the modules whose outputs are shifted, in order, as readouts."""
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
    """Return True if adding a vector to the MLP output adds the same vector to the block output.

    No norm or scaling is in between then. Measured, not looked up in the family's layout: the same
    family can have either, by a setting of its config.

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
    """Return where a shift is added: that of an MLP output at the block's output if the sum is the
    same, so that the block need not run again at every step.
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

    Two facts in two contexts, each token one letter, S and T the subjects' last tokens:

        row   ids          owner   lookup   reads
        0     [S, a]       0       0        [1]
        1     [x, y, S, a] 0       2        [3]
        2     [T, b]       1       0        [1]
        3     [x, y, T, b] 1       2        [3]

        suffix = 2: from the subject's last token to the end. aligned = 4: rows 0 and 2 fit too.
        shared_prefixes() = [0, 2] tokens: the second rows of both facts begin with x, y.

    Attributes:
        ids: one list per row; lookup: the subject's last token in it; reads: positions whose logits
            are wanted.
        owner: which fact a row belongs to; rows of one fact are adjacent, and as many for each.
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
        """Length at which every row has `suffix` positions from its subject's last token on."""
        return max(self.lookup) + self.suffix

    def shared_prefixes(self) -> tuple[list[int], int]:
        """Return for each context the length of the prefix that all facts share, ending before the
        subject's last token; and the length that holds any prefix and the longest rest.

        No lengths where sharing saves less than a quarter of the positions: each prefix is one more
        row to run, and gathering its keys and values for all facts takes time too.
        """
        contexts = self.owner.count(0)
        prefixes = []
        for k in range(contexts):
            columns = zip(*self.ids[k::contexts], strict=False)
            common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
            prefixes.append(min(common, *self.lookup[k::contexts]))
        rest = max(len(row) - prefixes[b % contexts] for b, row in enumerate(self.ids))
        length = max(self.aligned, max(prefixes) + rest)
        positions = contexts * length + len(self.ids) * rest
        saves = 4 * positions < 3 * len(self.ids) * self.aligned
        return prefixes if saves else [], length

    def first_of_each(self) -> list[int]:
        """Return the number of each fact's first row."""
        return [self.owner.index(n) for n in range(self.owner[-1] + 1)]

    def of(self, facts: Sequence[int]) -> tuple[list[int], TokenRows]:
        """Return the numbers of the rows of some facts, and these rows, their facts renumbered."""
        place = {fact: i for i, fact in enumerate(facts)}
        numbers = [row for row, owner in enumerate(self.owner) if owner in place]
        return numbers, TokenRows(
            [self.ids[row] for row in numbers],
            [self.lookup[row] for row in numbers],
            [self.reads[row] for row in numbers],
            [place[self.owner[row]] for row in numbers],
        )


class ShiftedRows:
    """Rows whose state at the subject can be shifted.

    Which states a replay takes from the recording depends on where the shift is added. With
    `layer` = 3, at the subject's last token (one position) and after it (the others):

        site             entry_layer   at the subject             after it
        "block"          4             input of block 4 + shift   input of block 4
        "mlp", ...       3             block 3 run with shift     input of block 4

    Either way what enters block 4 is complete then, and blocks from 4 on run on the suffix. A shift
    at the subject cannot change what enters block 4 after it: block 3 would have to pass it on
    through attention, and its attention has seen block 3's input only.

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
        # The block whose input at the subject is where a replay begins.
        self.entry_layer = layer + 1 if site == "block" else layer
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
        """Run the rows once, unshifted, and return them with the readouts at each row's subject.

        Args:
            wanted: name -> (module, "in" or "out").
        Returns:
            The rows, and name -> [b, width].
        """
        inputs = list(dict.fromkeys(name for name, side in wanted.values() if side == "in"))
        outputs = list(dict.fromkeys(name for name, side in wanted.values() if side == "out"))
        replays = use_replay(lm, engine) and rows.aligned <= lm.max_tokens
        every, (prefixes, length) = torch.arange(len(rows.ids)), rows.shared_prefixes()
        shares = replays and bool(prefixes) and length <= lm.max_tokens
        if shares:
            recording = record_shared_prefixes(
                lm, rows.ids, prefixes, layer=layer, length=length, inputs=inputs, outputs=outputs
            )
        else:
            ids_bt = pad_right(rows.ids, rows.aligned if replays else None)
            recording = record_run(lm, ids_bt, inputs=inputs, outputs=outputs)

        def at_subject(name: str, side: str) -> Tensor:
            seen = recording.seen[f"{name}:input" if side == "in" and name in outputs else name]
            return seen.view(len(rows.ids), -1, seen.shape[-1])[every, rows.lookup]

        seen = {key: at_subject(*place) for key, place in wanted.items()}
        if (
            replays and not shares
        ):  # a recording of shared prefixes holds these blocks only, already
            recording = recording.select(every, layer)
        return cls(lm, rows, layer, site, recording if replays else None), seen

    def only(self, facts: Sequence[int]) -> ShiftedRows:
        """Return the rows of some of the facts, which are renumbered."""
        numbers, rows = self.rows.of(facts)
        recording = self.recording
        if recording is not None:
            recording = recording.select(torch.tensor(numbers), self.layer)
        return ShiftedRows(self.lm, rows, self.layer, self.site, recording)

    def logits(self, delta_nsd: Tensor) -> Tensor:
        """Return the logits [reads, v], row after row, with each fact's shifts at its subjects.

        Args:
            delta_nsd: [facts, shifted modules, d].
        """
        shift_bsd = delta_nsd[self.owner_b.to(delta_nsd.device)]
        return self._whole(shift_bsd) if self.recording is None else self._replayed(shift_bsd)

    # -- replayed ----------------------------------------------------------------------------------

    @cached_property
    def _suffix(self) -> Suffix:
        """All positions from the subject's last token on."""
        assert self.recording is not None
        return Suffix(self.recording, self.rows.lookup, self.rows.suffix)

    @cached_property
    def _subject(self) -> Suffix:
        """The subject's last token alone."""
        assert self.recording is not None
        if self.rows.suffix == 1:
            return self._suffix
        return Suffix(self.recording, self.rows.lookup, 1)

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor]:
        """Where the reads are: their places in the suffix, [b, r], rows padded to r; and the place
        of every read in its row of that, [reads].
        """
        columns = [
            [at - lookup for at in reads]
            for reads, lookup in zip(self.rows.reads, self.rows.lookup, strict=True)
        ]
        return pad_right(columns), torch.tensor([i for reads in columns for i in range(len(reads))])

    @cached_property
    def _unshifted(self) -> tuple[Tensor, Tensor]:
        """Recorded states: at the subject [b, 1, d], entering block `entry_layer`; and after it
        [b, q - 1, d], entering block `layer` + 1.
        """
        after_bqd = self._suffix.states(self.layer + 1)[:, 1:]
        return self._subject.states(self.entry_layer), after_bqd

    def _replayed(self, shift_bsd: Tensor) -> Tensor:
        subject_b1d, after_bqd = self._unshifted
        if self.site == "block":
            subject_b1d = subject_b1d + shift_bsd.to(subject_b1d)
        else:
            added = {module: _adding(shift_bsd[:, i]) for i, module in enumerate(self.modules)}
            with substitute(added):
                subject_b1d = self._subject.block(self.layer, subject_b1d)
        hidden_bqd, top = torch.cat([subject_b1d, after_bqd], 1), self.lm.n_layers - 1
        columns_br, slots = self._columns
        # The last block runs at the reads alone, unless it is the shifted one (which has run) or
        # every position is read.
        short = self.layer < top and columns_br.shape[1] < hidden_bqd.shape[1]
        for above in range(self.layer + 1, self.lm.n_layers - short):
            hidden_bqd = self._suffix.block(above, hidden_bqd)
        if short:
            hidden_bqd = self._suffix.at_columns(top, hidden_bqd, columns_br)
        else:
            slots = columns_br[self.read_rows, slots]
        return self._head(hidden_bqd[self.read_rows, slots])

    def _head(self, hidden_rd: Tensor) -> Tensor:
        """Return the logits of these states."""
        rows, padded = len(hidden_rd), hidden_rd
        # The usual 11 reads of one fact: on a CPU, float32 products of 8 to 15 rows with SmolLM2's
        # unembedding take 42 ms, those of 16 rows 25.
        if hidden_rd.device.type == "cpu" and 8 <= rows < 16:
            padded = nn.functional.pad(hidden_rd, (0, 0, 0, 16 - rows))
        return self.lm.parts.head(padded)[:rows]

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
    """Return out -> out + shift, for a module that is called on one position per row."""
    return lambda out: out + shift_bd.to(out).view(out.shape)
