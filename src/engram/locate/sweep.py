"""Many cells of causal traces in one walk over the blocks, for any number of prompts.

Tokens that are equally far from what is read have suffixes of one length, whatever their prompts'
lengths, and go through the blocks together. A patch changes nothing before its first layer, so its
rows join the walk there, from recorded states; patches that have replaced the same layers so far
share their rows until their windows end at different layers.

Three layers, one token of each of two prompts (A and B), one sample; sites "residual" and "mlp"
with windows of two layers. Six patches: r0, r1, r2 replace what leaves one block; m0 replaces the
MLP of layer 0, m01 those of layers 0 and 1, m12 those of layers 1 and 2. Rows, two a state:

    layer  gathered, then through the block          opened after it        rows
    0      -                                         m0 = m01, r0           4
    1      m0 m01 r0  (m0's rows twice: there        m12 (so far m1), r1    6 + 4 = 10
           m01 begins to differ)
    2      m0 m01 r0 m12 r1                          r2                     10 + 2 = 12
    head   6 scores of A, 6 of B

A pass of its own for each patch and token would run all positions of 12 rows through 3 blocks: 36
row-blocks. Here 6 + 10 rows of suffixes go through one block each, and an opened MLP row computes
its block at one token only.

Knows blocks and rows; refuses to know what a score is for.
Source of what is computed: Meng et al. 2022, Sec. 2.2; how: DESIGN, "Causal tracing in one sweep".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engram.engine.attention import short_attention_in_eager
from engram.engine.suffix import Suffix
from engram.locate.recorded_runs import Recorded
from engram.locate.row_changes import RowChanges
from engram.locate.rows import RowKind
from engram.locate.settings import Patch
from engram.modules.hooks import substitute

_BUDGET = 1 << 29  # bytes of the widest tensors of one batch of rows
# Of a forward on a CPU, as in probe_rows: with more, what blocks pass on no longer fits the cache.
_CPU_TOKENS = 1024
_CPU_SCORED = 128  # rows whose logits are held at once


@dataclass(frozen=True)
class TracedToken:
    """One token of one prompt; `fact` is the prompt's number in the batch."""

    fact: int
    token: int


@dataclass(frozen=True)
class Group:
    """Tokens whose suffixes are equally long, and the patches that are made at each of them."""

    tokens: tuple[TracedToken, ...]
    patches: tuple[Patch, ...]


def suffix_length(runs: Recorded, traced: TracedToken) -> int:
    """Return the number of positions from the token to the last one that is read."""
    return runs.rows.inputs[traced.fact].read[-1] + 1 - traced.token


def chunks(runs: Recorded, group: Group, rows_per_batch: int | None) -> Iterator[Group]:
    """Yield parts of a group that keep the rows in memory below the limit: fewer tokens first, then
    fewer patches.
    """
    replays = runs.recording is not None
    length = suffix_length(runs, group.tokens[0]) if replays else runs.rows.ids_bt.shape[1]
    rows = rows_per_batch or affordable_rows(runs, length)
    n_tokens = max(1, rows // (runs.rows.samples * len(group.patches)))
    n_patches = max(1, rows // runs.rows.samples)
    # neighbours in this order share rows longest, so that a part of them stays small
    patches = sorted(
        group.patches, key=lambda p: (p.first, p.site, p.end, p.severed or "", p.part or (0, 0))
    )
    for t in range(0, len(group.tokens), n_tokens):
        for p in range(0, len(patches), n_patches):
            yield Group(group.tokens[t : t + n_tokens], tuple(patches[p : p + n_patches]))


def affordable_rows(runs: Recorded, length: int) -> int:
    """Return the number of rows of `length` tokens whose widest tensors fit in half a gigabyte, or
    in a quarter of an accelerator's free memory.
    """
    lm, budget = runs.lm, _BUDGET
    if lm.device.type == "cuda":
        # what torch's allocator holds without using it counts as taken for the driver, not for us
        unused = torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
        budget = max(budget, (torch.cuda.mem_get_info(lm.device)[0] + unused) // 4)
    config = lm.model.config.get_text_config()
    inner = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * lm.d_model
    )
    # the MLP's inner tensors and copies of the stream; keys and values span the whole row
    rows = runs.rows
    block = length * (4 * inner + 6 * lm.d_model) + 4 * rows.ids_bt.shape[1] * lm.d_model
    scored = rows.read.shape[1] if rows.decoder_bt is None else rows.decoder_bt.shape[1]
    head = 2 * scored * int(config.vocab_size)
    return int(max(rows.samples, budget // (max(block, head) * lm.dtype.itemsize)))


@torch.no_grad()
def sweep(runs: Recorded, group: Group) -> Tensor:
    """Return [patches, tokens] scores, all in one walk over the blocks: see the table above."""
    with short_attention_in_eager(runs.lm):
        return _sweep(runs, group)


class RowTable:
    """The rows that walk through the blocks: for each state [tokens * samples, q, d] of them.

    A state is a patch cut off at a layer, see `_until`.
    """

    def __init__(self) -> None:
        self.states: list[Patch] = []
        self.hidden_nqd = torch.empty(0)

    def gather(self, sources: Sequence[Patch], states: Sequence[Patch]) -> None:
        """Let the rows of `sources`, which may repeat, be the rows of `states`; drop all others."""
        index = {state: i for i, state in enumerate(self.states)}
        at = [index[source] for source in sources]
        if at != list(range(len(self.states))):  # a copy of all rows is not free
            by_state = self.hidden_nqd.unflatten(0, (len(self.states), -1))
            self.hidden_nqd = by_state[at].flatten(0, 1)
        self.states = list(states)

    def append(self, states: Sequence[Patch], hidden_nqd: Tensor) -> None:
        """Add rows of new states."""
        rows = torch.cat([self.hidden_nqd, hidden_nqd]) if self.states else hidden_nqd
        self.hidden_nqd = rows
        self.states += states


def _sweep(runs: Recorded, group: Group) -> Tensor:
    walk, table = _Walk(runs, group), RowTable()
    last = runs.lm.n_layers - 1
    for layer in range(min(p.first for p in group.patches), last + 1):
        cut = dict.fromkeys(_until(p, layer) for p in group.patches if p.first <= layer)
        ongoing = [state for state in cut if state.first < layer]
        opening = [state for state in cut if state.first == layer]
        if ongoing:
            table.gather([_until(state, layer - 1) for state in ongoing], ongoing)
            table.hidden_nqd = walk.through(layer, table.hidden_nqd, ongoing)
        if opening:
            opened_nqd = walk.open(layer, opening)
            if layer == last:  # like the rows that went through it, see `_Walk.through`
                opened_nqd = opened_nqd[:, -walk.read :]
            table.append(opening, opened_nqd)
    facts_n = walk.facts.repeat(len(table.states))
    # Logits of all rows would be the largest tensor of the walk, several times over in the scorer.
    at_once = _CPU_SCORED if table.hidden_nqd.device.type == "cpu" else len(facts_n)
    parts = zip(table.hidden_nqd.split(at_once), facts_n.split(at_once), strict=True)
    scores = torch.cat([runs.scorer(runs.lm.parts.head(part), facts) for part, facts in parts])
    scores = scores.view(len(table.states), len(group.tokens), runs.rows.samples).mean(2)
    index = {state: i for i, state in enumerate(table.states)}
    return scores[[index[_until(p, last)] for p in group.patches]].cpu()


def _until(patch: Patch, layer: int) -> Patch:
    """Return what of a patch has been done once block `layer` has run: patches that agree on it
    share their rows.
    """
    return patch if patch.end <= layer + 1 else replace(patch, end=layer + 1)


class _Walk:
    """One group of tokens on its way through the blocks."""

    def __init__(self, runs: Recorded, group: Group) -> None:
        assert runs.recording is not None
        self.runs, rows, tokens = runs, runs.rows, group.tokens
        facts, at = [t.fact for t in tokens], [t.token for t in tokens]
        kinds: tuple[RowKind, ...] = ("base", "source", "frozen")
        self.rows = {kind: rows.of_kind(facts, kind) for kind in kinds}
        self.facts = torch.tensor(facts).repeat_interleave(rows.samples)
        self.tokens = torch.tensor(at).repeat_interleave(rows.samples)
        self.read = rows.read.shape[1]
        # a suffix starts somewhere in every recorded row; of prompts that are not traced, anywhere
        starts = dict.fromkeys(range(len(rows.inputs)), at[0]) | dict(zip(facts, at, strict=True))
        by_row = [starts[f] for f in range(len(rows.inputs)) for _ in range(rows.per_prompt)]
        self.length = suffix_length(runs, tokens[0])
        self.suffix = Suffix(runs.recording, by_row, self.length)
        self.alone = Suffix(runs.recording, by_row, 1) if self.length > 1 else self.suffix
        # States whose rows go through a block together.
        self.at_once = max(1, _CPU_TOKENS // (self.length * len(self.facts)))
        if runs.lm.device.type != "cpu":
            self.at_once = len(group.patches)

    def through(self, layer: int, hidden_nqd: Tensor, states: list[Patch]) -> Tensor:
        """Run one block on all rows, see `_part_through`; on a CPU a few states at a time."""
        starts = range(0, len(states), self.at_once)
        parts = zip(hidden_nqd.split(self.at_once * len(self.facts)), starts, strict=True)
        return torch.cat(
            [
                self._part_through(layer, part_nqd, states[start : start + self.at_once])
                for part_nqd, start in parts
            ]
        )

    def _part_through(self, layer: int, hidden_nqd: Tensor, states: list[Patch]) -> Tensor:
        """Run one block; windows that are still open and severed modules get their recorded
        outputs.
        """
        rows_n = self.rows["base"].repeat(len(states))
        if layer == self.runs.lm.n_layers - 1 and self.length > self.read:
            # nothing but the end is read: neither replaced nor computed elsewhere
            return self.suffix.last_positions(layer, hidden_nqd, rows_n, self.read)
        with substitute(**self._changes(layer, states).hooks()):
            return self.suffix.block(layer, hidden_nqd, rows_n)

    def open(self, layer: int, states: list[Patch]) -> Tensor:
        """Return rows in which `layer` is the first one replaced: the patched run's recorded states
        after it, except at the token itself.
        """
        base = self.rows["base"]
        after_rqd = self.suffix.states(layer + 1)[base]
        out = after_rqd.repeat(len(states), 1, 1)
        by_state = out.unflatten(0, (len(states), -1))
        modules = [i for i, state in enumerate(states) if state.site != "residual"]
        if modules:
            # the block itself runs, at that one token, with one module's output replaced: families
            # norm, scale or gate that output in their own ways, so nothing is assumed about how it
            # reaches the residual stream, and rounding is that of a whole pass
            before_n1d = self.alone.states(layer)[base].repeat(len(modules), 1, 1)
            with substitute(**self._changes(layer, [states[i] for i in modules]).hooks()):
                token_n1d = self.alone.block(layer, before_n1d, base.repeat(len(modules)))
            by_state[modules, :, 0] = token_n1d[:, 0].unflatten(0, (len(modules), -1))
        residual = [i for i, state in enumerate(states) if state.site == "residual"]
        if residual:
            by_state[residual, :, 0] = self.runs.states(
                "residual", layer, self.rows["source"], self.tokens
            )
        return out

    def _changes(self, layer: int, states: list[Patch]) -> RowChanges:
        changes = RowChanges(self.runs.lm, len(states))
        jobs: dict[tuple[str, RowKind, tuple[int, int] | None], list[int]] = {}
        for i, state in enumerate(states):
            if state.site != "residual" and state.first <= layer < state.end:
                jobs.setdefault((state.site, "source", state.part), []).append(i)
            # the residual state replaced what its own block computed: nothing there to freeze
            if state.severed and (state.site != "residual" or state.first < layer):
                jobs.setdefault((state.severed, "frozen", None), []).append(i)
        values: dict[tuple[str, RowKind], Tensor] = {}
        for (site, kind, part), chosen in jobs.items():
            if (site, kind) not in values:
                values[site, kind] = self.runs.states(site, layer, self.rows[kind], self.tokens)
            changes.put((site, layer), chosen, 0, values[site, kind], part)
        return changes
