"""Many cells of causal traces in one walk over the blocks, for any number of prompts.

A strand is one token of one prompt. Strands that end equally far from what is read have suffixes of
one length, whatever their prompts' lengths, and go through the blocks together. Knows blocks and
rows; refuses to know what a score is for.
Source of what is computed: Meng et al. 2022, Sec. 2.2; how: DESIGN, "Causal tracing in one sweep".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engram.engine.attention import short_attention_in_eager
from engram.engine.suffix import Suffix
from engram.locate.recorded_runs import RowChanges, Runs
from engram.locate.settings import Patch
from engram.modules.hooks import substitute


@dataclass(frozen=True)
class TracedToken:
    """One token of one prompt, by its number in the batch."""

    fact: int
    token: int


@dataclass(frozen=True)
class Group:
    """Strands whose suffixes are equally long, and the patches that are made at each of them."""

    strands: tuple[TracedToken, ...]
    patches: tuple[Patch, ...]


def suffix_length(runs: Runs, strand: TracedToken) -> int:
    """Positions from the strand's token to the last one that is read."""
    return runs.questions[strand.fact].read[-1] + 1 - strand.token


def chunks(runs: Runs, group: Group, rows_per_batch: int | None) -> Iterator[Group]:
    """Parts of a group that keep the rows in memory below the limit: fewer strands first, then
    fewer patches.
    """
    replays = runs.recording is not None
    tokens = suffix_length(runs, group.strands[0]) if replays else runs.ids_bt.shape[1]
    rows = rows_per_batch or affordable_rows(runs, tokens)
    at_once = max(1, rows // (runs.samples * len(group.patches)))
    size = max(1, rows // runs.samples)
    patches = sorted(
        group.patches, key=lambda p: (p.first, p.site, p.end, p.severed or "", p.part or (0, 0))
    )
    for s in range(0, len(group.strands), at_once):
        for p in range(0, len(patches), size):
            yield Group(group.strands[s : s + at_once], tuple(patches[p : p + size]))


def affordable_rows(runs: Runs, tokens: int) -> int:
    """Rows of so many tokens whose widest tensors fit in half a gigabyte, or in a quarter of an
    accelerator's free memory.
    """
    lm, budget = runs.lm, 1 << 29
    if lm.device.type == "cuda":
        unused = torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
        budget = max(budget, (torch.cuda.mem_get_info(lm.device)[0] + unused) // 4)
    config = lm.model.config.get_text_config()
    inner = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * lm.d_model
    )
    block = tokens * (4 * inner + 6 * lm.d_model) + 4 * runs.ids_bt.shape[1] * lm.d_model
    scored = runs.read.shape[1] if runs.decoder_bt is None else runs.decoder_bt.shape[1]
    head = 2 * scored * int(config.vocab_size)
    return int(max(runs.samples, budget // (max(block, head) * lm.dtype.itemsize)))


def sweep(runs: Runs, group: Group) -> Tensor:
    """[patches, strands] scores, all in one walk over the blocks."""
    with torch.no_grad(), short_attention_in_eager(runs.lm):
        return _sweep(runs, group)


def _sweep(runs: Runs, group: Group) -> Tensor:
    """See `sweep`.

    Rows are (state, strand, sample): patches that have had the same layers replaced so far share a
    state, and part where their windows end. A state opens at its first layer, from recorded states:
    until there its run is the patched run as it is.
    """
    walk = _Walk(runs, group)
    states: dict[Patch, int] = {}  # where each stands among the rows
    hidden_nqd = torch.empty(0)
    for layer in range(min(p.first for p in group.patches), runs.lm.n_layers):
        wanted = list(dict.fromkeys(_until(p, layer) for p in group.patches if p.first <= layer))
        going = [state for state in wanted if state.first < layer]
        opening = [state for state in wanted if state.first == layer]
        if going:
            source = [states[_until(state, layer - 1)] for state in going]
            if source != list(range(len(states))):
                hidden_nqd = hidden_nqd.unflatten(0, (len(states), -1))[source].flatten(0, 1)
            hidden_nqd = walk.through(layer, hidden_nqd, going)
        if opening:
            opened = walk.open(layer, opening)
            if layer == runs.lm.n_layers - 1:
                opened = opened[:, -walk.read :]
            hidden_nqd = torch.cat([hidden_nqd, opened]) if going else opened
        states = {state: i for i, state in enumerate([*going, *opening])}
    logits = runs.lm.parts.head(hidden_nqd)
    scores = runs.metric(logits, walk.facts.repeat(len(states)))
    scores = scores.view(len(states), len(group.strands), runs.samples).mean(2)
    return scores[[states[_until(p, runs.lm.n_layers - 1)] for p in group.patches]].cpu()


def _until(patch: Patch, layer: int) -> Patch:
    """What of a patch has been done once block `layer` has run: patches that agree on it share
    their rows.
    """
    return patch if patch.end <= layer + 1 else replace(patch, end=layer + 1)


class _Walk:
    """One group of strands on its way through the blocks."""

    def __init__(self, runs: Runs, group: Group) -> None:
        assert runs.recording is not None
        self.runs, strands = runs, group.strands
        facts = [strand.fact for strand in strands]
        self.rows = {kind: runs.rows(facts, kind) for kind in ("base", "source", "frozen")}
        self.facts = torch.tensor(facts).repeat_interleave(runs.samples)
        self.tokens = torch.tensor([strand.token for strand in strands]).repeat_interleave(
            runs.samples
        )
        self.read = runs.read.shape[1]
        starts = dict.fromkeys(
            range(len(runs.questions)), strands[0].token
        )  # of prompts without a strand: any will do
        starts |= {strand.fact: strand.token for strand in strands}
        each = [starts[f] for f in range(len(runs.questions)) for _ in range(runs.per_fact)]
        self.length = suffix_length(runs, strands[0])
        self.suffix = Suffix(runs.recording, each, self.length)
        self.alone = Suffix(runs.recording, each, 1) if self.length > 1 else self.suffix

    def through(self, layer: int, hidden_nqd: Tensor, states: list[Patch]) -> Tensor:
        """One block on all open rows, with windows that are still open and severed modules put in
        place.
        """
        rows_n = self.rows["base"].repeat(len(states))
        if layer == self.runs.lm.n_layers - 1 and self.length > self.read:
            # nothing but the end is read: neither replaced nor computed elsewhere
            return self.suffix.last_positions(layer, hidden_nqd, rows_n, self.read)
        with substitute(**self._changes(layer, states).hooks()):
            return self.suffix.block(layer, hidden_nqd, rows_n)

    def open(self, layer: int, states: list[Patch]) -> Tensor:
        """Rows in which `layer` is the first one replaced: the patched run's states after it, but
        for the token itself.
        """
        base = self.rows["base"]
        after_rqd = self.suffix.states(layer + 1)[base]
        out = after_rqd.repeat(len(states), 1, 1)
        by_state = out.unflatten(0, (len(states), -1))
        modules = [i for i, state in enumerate(states) if state.site != "residual"]
        if (
            modules
        ):  # the block's own arithmetic at that token, with one module's output put in place
            before_n1d = self.alone.states(layer)[base].repeat(len(modules), 1, 1)
            with substitute(**self._changes(layer, [states[i] for i in modules]).hooks()):
                token_n1d = self.alone.block(layer, before_n1d, base.repeat(len(modules)))
            by_state[modules, :, 0] = token_n1d[:, 0].unflatten(0, (len(modules), -1))
        whole = [i for i, state in enumerate(states) if state.site == "residual"]
        if whole:
            by_state[whole, :, 0] = self.runs.states(
                "residual", layer, self.rows["source"], self.tokens
            )
        return out

    def _changes(self, layer: int, states: list[Patch]) -> RowChanges:
        changes = RowChanges(self.runs, len(states))
        jobs: dict[tuple[str, str, tuple[int, int] | None], list[int]] = {}
        for i, state in enumerate(states):
            if state.site != "residual" and state.first <= layer < state.end:
                jobs.setdefault((state.site, "source", state.part), []).append(i)
            if state.severed and (state.site != "residual" or state.first < layer):
                jobs.setdefault((state.severed, "frozen", None), []).append(i)
        values: dict[tuple[str, str], Tensor] = {}
        for (site, kind, part), chosen in jobs.items():
            if (site, kind) not in values:
                values[site, kind] = self.runs.states(site, layer, self.rows[kind], self.tokens)
            changes.put(site, layer, chosen, 0, values[site, kind], part)
        return changes
