"""The same cells through whole forward passes, for models that cannot be replayed; and which cells
cannot matter at all.

The slow way, and the independent one: tests hold the sweep against it. Knows one prompt at a time:
rows are (patch, sample). Refuses to know blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.locate.recorded_runs import Recorded
from engram.locate.row_changes import RowChanges
from engram.locate.rows import RowKind
from engram.locate.settings import PARTS, SITES, Patch
from engram.modules.hooks import substitute


def can_matter(runs: Recorded, fact: int, token: int, patch: Patch) -> bool:
    """Return False where replacing cannot change the score.

    A causal model's states before the first corrupted token are equal in both runs; and what leaves
    the last block, or is added to it, is read at some positions only. (A family's own sites may lie
    before tokens are mixed, as Mamba's projections do; and freezing to another run's outputs
    matters by itself.)
    """
    prompt = runs.rows.inputs[fact]
    if runs.lm.kind == "encoder-decoder" or runs.rows.config.patching.frozen_noise is not None:
        return True
    if runs.lm.kind == "causal" and token < min(prompt.corrupted):
        return False
    mixes_later = patch.first < runs.lm.n_layers - 1 or patch.site not in (*SITES, *PARTS)
    return mixes_later or token in prompt.read


@torch.no_grad()
def whole(runs: Recorded, token: int, patches: tuple[Patch, ...]) -> Tensor:
    """Return [patches] scores of one prompt's patches at one token, by one forward pass of
    patches x samples rows.
    """
    lm, samples = runs.lm, runs.rows.samples
    kinds: tuple[RowKind, ...] = ("base", "source", "frozen")
    rows = {kind: runs.rows.of_kind([0], kind) for kind in kinds}
    at = torch.full((samples,), token)
    # patches of one token do not touch each other's rows: one pass runs them all
    changes = RowChanges(lm, len(patches))
    for i, patch in enumerate(patches):
        for layer in range(lm.n_layers):
            if patch.first <= layer < patch.end:
                value = runs.states(patch.site, layer, rows["source"], at)
                changes.put((patch.site, layer), [i], token, value, patch.part)
            if patch.severed:
                # in all layers: below the state that is the run's own output, unless frozen_noise
                # gives another run's; replay begins at the state and could not tell them apart
                value = runs.states(patch.severed, layer, rows["frozen"], at)
                changes.put((patch.severed, layer), [i], token, value)
    hooks = changes.hooks()
    hooks["outputs"] |= runs.rows.embeddings("base")
    ids_bt = runs.rows.ids_bt[rows["base"]].repeat(len(patches), 1)
    decoder_bt = runs.rows.decoder_bt
    if decoder_bt is not None:
        decoder_bt = decoder_bt[rows["base"]].repeat(len(patches), 1)
    with substitute(**hooks):
        logits = runs.rows.logits(ids_bt, decoder_bt)
    # all rows are the batch's only prompt, whose answer they are scored by
    scores = runs.scorer(logits, torch.zeros(len(ids_bt), dtype=torch.long))
    return scores.view(len(patches), samples).mean(1).cpu()
