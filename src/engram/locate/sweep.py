"""All cells of a causal trace in one walk over the blocks, and the same through whole forward passes.

Knows the clean and the corrupted runs of one prompt and which states are put back where. Refuses to know what a score is
for: see causal_trace. Source of what is computed: Meng et al. 2022, Sec. 2.2; how: DESIGN, "Causal tracing in one sweep".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engram.hooks import substitute
from engram.language_model import LanguageModel
from engram.replay import Recording, Suffix, body, record_run

Site = Literal["residual", "mlp", "attention"]


@dataclass(frozen=True)
class Cell:
    """One entry of a table: `site` restored at `token` in layers [first, end), shown at `column`."""

    site: Site
    token: int
    column: int
    first: int
    end: int


class Runs:
    """The clean run (row 0) and the corrupted runs (rows 1..), recorded in one forward pass."""

    def __init__(
        self, lm: LanguageModel, ids: list[int], target: list[int], corrupted: list[int], noise_snd: Tensor, replace: bool
    ) -> None:
        self.lm, self.samples, self.corrupted = lm, len(noise_snd), corrupted
        self.noise, self.replace = noise_snd, replace
        self.ids_bt = torch.tensor([ids + target[:-1]]).expand(self.samples + 1, -1)
        self.read = list(range(len(ids) - 1, self.ids_bt.shape[1]))  # positions whose next token is scored
        self.rows = torch.arange(1, self.samples + 1)
        names = [
            n for layer in range(lm.n_layers) for n in (self.site_name("mlp", layer), self.site_name("attention", layer))
        ]
        self.recording: Recording = record_run(
            lm,
            self.ids_bt,
            changes={lm.parts.embed: lambda out: self.corrupt(out, clean=1)},
            outputs=list(dict.fromkeys(names)),
        )
        with torch.no_grad():
            last_bnd = self.recording.hidden[-1][:, self.read]
            self.answer = target or [int(lm.parts.head(last_bnd[:1]).argmax())]
            probabilities = self.probability(last_bnd)
        self.high_score, self.low_score = float(probabilities[0]), float(probabilities[1:].mean())

    def site_name(self, site: Site, layer: int) -> str:
        block, layout = self.lm.parts.block_name(layer), self.lm.parts.layout
        return block if site == "residual" else f"{block}.{layout.mlp if site == 'mlp' else layout.attention}"

    def module(self, site: Site, layer: int) -> nn.Module:
        return self.lm.model.get_submodule(self.site_name(site, layer))

    def corrupt(self, embedded_btd: Tensor, clean: int = 0) -> Tensor:
        """Embeddings with noise on the subject, in all rows but the first `clean`; the others are whole sets of samples."""
        at = torch.tensor(self.corrupted, device=embedded_btd.device)
        out, noise = embedded_btd.clone(), self.noise.to(embedded_btd.device)
        rows = out[clean:]
        noise = noise.repeat(len(rows) // self.samples, 1, 1)
        rows[:, at] = (noise if self.replace else rows[:, at].double() + noise).to(out.dtype)
        return out

    def clean(self, site: Site, layer: int, token: int) -> Tensor:
        """[d] the state of the clean run."""
        if site == "residual":
            return self.recording.hidden[layer + 1][0, token]
        seen = self.recording.seen[self.site_name(site, layer)]
        return seen.view(*self.ids_bt.shape, -1)[0, token]

    def probability(self, hidden_bnd: Tensor) -> Tensor:
        """[b] probability of the whole answer, from the last block's output at the positions that are read."""
        logits = self.lm.parts.head(hidden_bnd)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        answer = torch.tensor(self.answer, device=logits.device)
        log_p = logits.gather(-1, answer.expand(len(logits), -1)[..., None])[..., 0] - logits.logsumexp(-1)
        return log_p.sum(-1).exp()

    def can_matter(self, cell: Cell) -> bool:
        """False where restoring cannot change the score: in front of the subject nothing was corrupted, and the last
        block's output is read at the end only."""
        if cell.token < min(self.corrupted):
            return False
        return cell.first < self.lm.n_layers - 1 or cell.token in self.read


def chunks(lm: LanguageModel, cells: list[Cell], run: Runs, rows_per_chunk: int | None) -> Iterator[list[Cell]]:
    """Cells of one token at a time, at most so many as keep the rows in memory below the limit."""
    by_token: dict[int, list[Cell]] = {}
    for cell in cells:
        by_token.setdefault(cell.token, []).append(cell)
    for token, group in by_token.items():
        group = sorted(group, key=lambda cell: (cell.first, cell.site, cell.end))
        rows = rows_per_chunk or _affordable_rows(lm, run, run.ids_bt.shape[1] - token)
        size = max(1, rows // run.samples)
        yield from (group[at : at + size] for at in range(0, len(group), size))


def _affordable_rows(lm: LanguageModel, run: Runs, suffix: int) -> int:
    """Rows whose widest tensors fit in half a gigabyte, or in a quarter of an accelerator's free memory."""
    budget = 1 << 29
    if lm.device.type == "cuda":
        budget = max(budget, torch.cuda.mem_get_info(lm.device)[0] // 4)
    config = lm.model.config
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * lm.d_model
    block = suffix * (4 * inner + 6 * lm.d_model) + 4 * run.ids_bt.shape[1] * lm.d_model
    head = 2 * len(run.read) * int(config.vocab_size)
    return int(max(run.samples, budget // (max(block, head) * lm.dtype.itemsize)))


State = tuple[Site, int, int]  # (site, first, end): what has been restored so far; cells that agree on it share rows


@torch.no_grad()
def sweep(run: Runs, cells: list[Cell]) -> list[float]:
    """Scores of cells of one token, all in one walk over the blocks.

    Rows are (state, sample): cells that have had the same layers restored so far share a row, and part where their windows
    end. A state opens at its first layer, from recorded states: until there its run is the corrupted run.
    """
    lm, token = run.lm, cells[0].token
    suffix = Suffix(lm, run.recording, token, run.ids_bt.shape[1] - token)
    alone = Suffix(lm, run.recording, token, 1)
    begin, n_layers = min(cell.first for cell in cells), lm.n_layers
    open_states: list[State] = []
    hidden_nqd = run.recording.hidden[0].new_empty(0)
    for layer in range(begin, n_layers):
        wanted = _states_after(cells, layer)
        going = [(s, a, e) for s, a, e in wanted if a < layer]
        if going:
            source = [open_states.index((s, a, min(e, layer))) for s, a, e in going]
            if source != list(range(len(open_states))):
                hidden_nqd = hidden_nqd.unflatten(0, (len(open_states), -1))[source].flatten(0, 1)
            restored: list[tuple[Site, int]] = [
                (s, i) for i, (s, _, e) in enumerate(going) if e > layer and s != "residual"
            ]
            hidden_nqd = _through(run, suffix, layer, hidden_nqd, restored)
        opening = [state for state in wanted if state[1] == layer]
        if opening:
            opened = _open(run, suffix, alone, layer, opening)
            if layer == n_layers - 1:
                opened = opened[:, -len(run.read) :]
            hidden_nqd = torch.cat([hidden_nqd, opened]) if going else opened
        open_states = [*going, *opening]
    scores = run.probability(hidden_nqd).unflatten(0, (len(open_states), -1)).mean(1).tolist()
    return [scores[open_states.index((cell.site, cell.first, min(cell.end, n_layers)))] for cell in cells]


def _states_after(cells: list[Cell], layer: int) -> list[State]:
    """The different states there are once block `layer` has run."""
    return list(dict.fromkeys((c.site, c.first, min(c.end, layer + 1)) for c in cells if c.first <= layer))


def _through(run: Runs, suffix: Suffix, layer: int, hidden_nqd: Tensor, restored: list[tuple[Site, int]]) -> Tensor:
    """One block on all open rows; `restored` lists (site, state number) whose module output is put back to clean."""
    token = int(suffix.positions_bq[0, 0])
    rows_n = run.rows.repeat(len(hidden_nqd) // run.samples)
    last = layer == run.lm.n_layers - 1
    if last and token not in run.read:  # nothing but the end is read: neither restored nor computed elsewhere
        return suffix.last_positions(layer, hidden_nqd, rows_n, len(run.read))
    with substitute(_restore(run, layer, token, restored, len(rows_n))):
        return suffix.block(layer, hidden_nqd, rows_n)


def _open(run: Runs, suffix: Suffix, alone: Suffix, layer: int, opening: list[State]) -> Tensor:
    """Rows in which `layer` is the first one restored: the corrupted run's states after it, but for the token itself."""
    token = int(suffix.positions_bq[0, 0])
    after_sqd = suffix.states(layer + 1)[1:]
    out = after_sqd.repeat(len(opening), 1, 1)
    modules = [(i, site) for i, (site, _, _) in enumerate(opening) if site != "residual"]
    states = out.unflatten(0, (len(opening), -1))
    if modules:  # the block's own arithmetic at that token, with one module's output put back
        before_nd = alone.states(layer)[1:].repeat(len(modules), 1, 1)
        restored: list[tuple[Site, int]] = [(site, at) for at, (_, site) in enumerate(modules)]
        with substitute(_restore(run, layer, token, restored, len(before_nd))):
            token_n1d = alone.block(layer, before_nd, run.rows.repeat(len(modules)))
        states[[i for i, _ in modules], :, 0] = token_n1d[:, 0].unflatten(0, (len(modules), -1))
    for i, (site, _, _) in enumerate(opening):
        if site == "residual":
            states[i, :, 0] = run.clean(site, layer, token)
    return out


def _restore(
    run: Runs, layer: int, token: int, restored: list[tuple[Site, int]], rows: int
) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Hooks that put the clean output at the suffix's first position into the rows of the given states."""

    def change(site: Site) -> Callable[[Tensor], Tensor]:
        states = [i for s, i in restored if s == site]

        def put(out: Tensor) -> Tensor:
            changed = out.clone()
            # rows and tokens may share an axis
            view = changed.view(rows // run.samples, run.samples, -1, changed.shape[-1])
            view[states, :, 0] = run.clean(site, layer, token)
            return changed

        return put

    return {run.module(site, layer): change(site) for site in dict.fromkeys(s for s, _ in restored)}


@torch.no_grad()
def whole(run: Runs, cells: list[Cell]) -> list[float]:
    """Scores of cells by whole forward passes, samples x cells rows at once: for models that cannot be replayed."""
    lm, shape = run.lm, (len(cells), run.samples, run.ids_bt.shape[1], -1)
    by_module: dict[tuple[Site, int], list[tuple[int, Cell]]] = {}
    for i, cell in enumerate(cells):
        for layer in range(cell.first, cell.end):
            by_module.setdefault((cell.site, layer), []).append((i, cell))

    def change(site: Site, layer: int, chosen: list[tuple[int, Cell]]) -> Callable[[Tensor], Tensor]:
        def put(out: Tensor) -> Tensor:
            changed = out.clone()
            view = changed.view(shape)
            for i, cell in chosen:
                view[i, :, cell.token] = run.clean(site, layer, cell.token)
            return changed

        return put

    seen: dict[str, Any] = {}
    last = lm.parts.blocks[-1]
    changes: dict[nn.Module, Callable[[Tensor], Tensor]] = {lm.parts.embed: run.corrupt}
    changes |= {run.module(site, layer): change(site, layer, chosen) for (site, layer), chosen in by_module.items()}
    with substitute(changes), substitute({last: lambda out: seen.setdefault("last", out)}):
        body(lm)(run.ids_bt[:1].expand(len(cells) * run.samples, -1).to(lm.device), use_cache=False)
    return run.probability(seen["last"][:, run.read]).view(len(cells), -1).mean(1).tolist()
