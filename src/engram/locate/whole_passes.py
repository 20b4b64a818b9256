"""The same cells through whole forward passes, for models that cannot be replayed; and which cells
cannot matter at all.

Knows one prompt at a time: rows are (patch, sample). Refuses to know blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.locate.recorded_runs import RowChanges, Runs
from engram.locate.settings import PARTS, SITES, Patch
from engram.modules.hooks import substitute


def can_matter(runs: Runs, fact: int, token: int, patch: Patch) -> bool:
    """False where replacing cannot change the score: a causal model's states in front of the first
    corrupted token are equal
    in both runs, and what leaves the last block, or is added to it, is read at some positions only.
    (A family's own sites may lie before tokens are mixed, as Mamba's projections do; and freezing
    to another run's outputs matters by itself.)"""
    question = runs.questions[fact]
    if runs.lm.kind == "encoder-decoder" or runs.config.frozen_noise is not None:
        return True
    if runs.lm.kind == "causal" and token < min(question.corrupted):
        return False
    mixes_later = patch.first < runs.lm.n_layers - 1 or patch.site not in (*SITES, *PARTS)
    return mixes_later or token in question.read


@torch.no_grad()
def whole(runs: Runs, token: int, patches: tuple[Patch, ...]) -> Tensor:
    """[patches] scores of one prompt's patches at one token, by one forward pass of patches x
    samples rows.
    """
    lm, samples = runs.lm, runs.samples
    rows = {kind: runs.rows([0], kind) for kind in ("base", "source", "frozen")}
    at = torch.full((samples,), token)
    changes = RowChanges(runs, len(patches))
    for i, patch in enumerate(patches):
        for layer in range(lm.n_layers):
            if patch.first <= layer < patch.end:
                value = runs.states(patch.site, layer, rows["source"], at)
                changes.put(patch.site, layer, [i], token, value, patch.part)
            if patch.severed:
                changes.put(
                    patch.severed,
                    layer,
                    [i],
                    token,
                    runs.states(patch.severed, layer, rows["frozen"], at),
                )
    hooks = changes.hooks()
    hooks["outputs"] |= runs.embeddings("base")
    ids_bt = runs.ids_bt[rows["base"]].repeat(len(patches), 1)
    decoder_bt = (
        None if runs.decoder_bt is None else runs.decoder_bt[rows["base"]].repeat(len(patches), 1)
    )
    with substitute(**hooks):
        logits = runs.logits(ids_bt, decoder_bt)
    scores = runs.metric(logits, torch.zeros(len(ids_bt), dtype=torch.long))
    return scores.view(len(patches), samples).mean(1).cpu()
