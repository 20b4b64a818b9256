"""The tables of a batch of traces, while they are filled.

Knows which cell belongs to which patch. Refuses to know how a cell is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engram.errors import NonFiniteError
from engram.locate.recorded_runs import Recorded
from engram.locate.settings import EffectTable, Patch, TraceConfig, default_window
from engram.locate.sweep import Group, TracedToken, suffix_length
from engram.locate.trace import CausalTrace
from engram.locate.trace_input import TraceInput, TracePrompt
from engram.locate.whole_passes import can_matter


class TraceTables:
    """Scores of every prompt's cells, [rows, patches]: the patches of all its tables side by side.

    Cells begin as the score of the unpatched run, which cells that cannot matter keep.
    """

    def __init__(self, runs: Recorded, plan: Sequence[EffectTable]) -> None:
        self.runs, self.plan = runs, plan
        self.patches = [patch for table in plan for patch in table.patches]
        unpatched_f = runs.unpatched()
        # so cells before the subject equal the baseline bit for bit, and cost nothing
        self.scores = [
            unpatched_f[f].float().repeat(len(prompt.rows), len(self.patches))
            for f, prompt in enumerate(runs.rows.inputs)
        ]
        self.exact = [torch.ones_like(table, dtype=torch.bool) for table in self.scores]
        self.screened = False
        # columns are equal where a window spans all layers of a small model
        self._columns: dict[Patch, list[int]] = {}
        for column, patch in enumerate(self.patches):
            self._columns.setdefault(patch, []).append(column)

    def add_estimates(self, effects: list[Tensor]) -> None:
        """Add estimated changes, [rows, patches] of each prompt, to cells that can matter."""
        for f, effect in enumerate(effects):
            alive = self._can_matter(f)
            self.scores[f] = torch.where(alive, self.scores[f] + effect.float(), self.scores[f])
            self.exact[f] = ~alive  # that a cell cannot matter is known, not estimated

    def _can_matter(self, fact: int) -> Tensor:
        """Return [rows, patches] whether a cell can differ from the unpatched run."""
        rows = self.runs.rows.inputs[fact].rows
        return torch.tensor(
            [[can_matter(self.runs, fact, token, p) for p in self.patches] for token in rows]
        )

    def groups(self, screen: int | None) -> list[Group]:
        """Return the cells to compute exactly: tokens of one suffix length that share their
        patches.

        Args:
            screen: only the N cells of each prompt whose estimates changed most.
        """
        self.screened = screen is not None
        groups: dict[tuple[int, tuple[Patch, ...]], list[TracedToken]] = {}
        for f, prompt in enumerate(self.runs.rows.inputs):
            wanted = self._can_matter(f)
            if screen is not None:
                change = (self.scores[f] - self.runs.unpatched()[f].float()).abs()
                change = change.masked_fill(~wanted, -1)
                chosen = torch.zeros_like(wanted).flatten()
                chosen[change.flatten().topk(min(screen, change.numel())).indices] = True
                wanted &= chosen.view_as(wanted)
            # tokens that need the same patches go through the blocks together; after a screen they
            # differ from token to token, so that groups are small
            for token, columns in zip(prompt.rows, wanted.tolist(), strict=True):
                # equal windows, as a window over all layers gives, are computed once
                patches = dict.fromkeys(
                    p for p, want in zip(self.patches, columns, strict=True) if want
                )
                if patches:
                    traced = TracedToken(f, token)
                    key = (suffix_length(self.runs, traced), tuple(patches))
                    groups.setdefault(key, []).append(traced)
        return [Group(tuple(tokens), patches) for (_, patches), tokens in groups.items()]

    def add_exact(self, group: Group, scores_pt: Tensor) -> None:
        """Write [patches, tokens] scores of a group into their cells."""
        for t, traced in enumerate(group.tokens):
            row = self.runs.rows.inputs[traced.fact].rows.index(traced.token)
            for p, patch in enumerate(group.patches):
                self.scores[traced.fact][row, self._columns[patch]] = scores_pt[p, t].float()
                self.exact[traced.fact][row, self._columns[patch]] = True

    def traces(self) -> list[CausalTrace]:
        """Return the filled tables as traces.

        Raises:
            NonFiniteError: a score is not finite.
        """
        return [self._trace(f, prompt) for f, prompt in enumerate(self.runs.rows.inputs)]

    def _trace(self, fact: int, prompt: TraceInput) -> CausalTrace:
        runs, lm, config = self.runs, self.runs.lm, self.runs.rows.config
        scores, exact, at = {}, {}, 0
        for table in self.plan:
            cut = slice(at, at + len(table.patches))
            # a view would keep the flat table of all sites in memory
            scores[table.name] = self.scores[fact][:, cut].unflatten(1, table.shape).contiguous()
            exact[table.name] = self.exact[fact][:, cut].unflatten(1, table.shape).contiguous()
            at += len(table.patches)
        low, high = float(runs.corrupted[fact]), float(runs.clean[fact])
        finite = all(table.isfinite().all() for table in scores.values())
        if not finite or not torch.tensor([low, high]).isfinite().all():
            raise NonFiniteError(
                f"{lm.name} gives probabilities that are not finite on {prompt.prompt.text!r}; "
                "try dtype=torch.float32"
            )
        tokens = lm.token_strings(prompt.ids)
        return CausalTrace(
            prompt.prompt.text,
            prompt.prompt.subject,
            str(lm.tokenizer.decode(runs.scorer.answers[fact])),
            [tokens[i] for i in prompt.rows],
            prompt.rows,
            prompt.span,
            prompt.corrupted,
            scores,
            low,
            high,
            config.patching.window or default_window(lm.n_layers),
            runs.rows.samples,
            lm.name,
            last=prompt.read[0] if lm.kind != "encoder-decoder" else len(prompt.ids) - 1,
            settings=described(config, prompt.prompt),
            method="screened" if self.screened else config.estimation.method,
            exact=exact if self.screened else {},
        )


def described(config: TraceConfig, prompt: TracePrompt | None = None) -> dict[str, Any]:
    """Return the settings that change what the numbers mean, as JSON holds them."""
    subject, patching, noise = config.subject, config.patching, config.subject.noise
    about = {
        "corruption": subject.corruption,
        "replace": subject.replace,
        "seed": subject.seed,
        "extra_tokens": subject.extra_tokens,
        "occurrence": subject.occurrence,
        "direction": patching.direction,
        "effect": patching.effect,
        "metric": config.metric,
        "correction": config.estimation.correction,
        "screen": config.estimation.screen,
        "noise": "given" if isinstance(noise, Tensor) else noise,
        "severed": list(patching.severed),
        "neurons": [list(pair) for pair in patching.neurons],
    }
    if config.matmul != "float32":  # left out otherwise, as older runs have no such setting
        about["matmul"] = config.matmul
    if prompt is not None:
        about |= {"foil": prompt.foil, "other_subject": prompt.other_subject}
    return about
