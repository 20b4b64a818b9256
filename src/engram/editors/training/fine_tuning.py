"""Fine-tuning of one block's MLP output matrix: FT, FT+L within a box, FT-W with weight decay,
LocFT-BF in mini-batches.

    ft        no bounds
    ft-l      every entry of the change stays within [-norm_constraint, norm_constraint]
    ft-w      weight decay pulls the matrix to zero
    locft-bf  mini-batches of all facts in every epoch, "breadth first"

Every target token is scored at its own position, which published comparisons did not do;
`reference=True` scores as they did. Knows one matrix and its rows of text. The loop is loop.py's.
Sources: Zhu et al. 2020, arXiv:2012.00363, as used for comparison by Meng et al. 2022; LocFT-BF:
    Yang et al. 2025, arXiv:2509.22072.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from engram.checks import Positive, Seed, check_fields, checked_call
from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.editors.presets import preset, preset_layers
from engram.editors.training.loop import TrainingLoop, TuningConfig
from engram.editors.training.target_rows import fact_rows, published_rows, target_row
from engram.engine.replayable import Engine
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.modules.frozen import frozen
from engram.modules.hooks import overlay_weight
from engram.modules.weights import as_linear
from engram.progress import Progress, no_progress
from engram.settings import flat, read


@dataclass(frozen=True)
class FineTuningConfig:
    """Settings of fine-tuning, with those of the training loop.

    Args:
        norm_constraint: largest change of an entry of the matrix; None: no limit.
        reference: work as the harness of published FT numbers: every token of a target is read at
            the prompt's last position, as if each were the first; batches come in order; batches
            with a loss below `stop_loss` are skipped, and training stops after an epoch whose mean
            is below it. The harness also trained the matrix's bias, which an Edit cannot hold and
            which stays unchanged here.
    """

    norm_constraint: Positive | None = None
    reference: bool = False
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reference:
            object.__setattr__(self, "tuning", replace(self.tuning, stop="loss"))


@checked_call
def fine_tune(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    method: str = "ft",
    layer: int | None = None,
    locality: Sequence[tuple[str, str]] = (),
    seed: Seed = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **settings: Any,
) -> Edit:
    """Train one block's MLP output matrix on all facts together; the model itself is not changed.

    What is below the block is computed once. The change is dense: Adam's steps have no low rank.

    Args:
        method: name of the presets: "ft", "ft-l", "ft-w" or "locft-bf".
        layer: block to train, from 0; default: the preset of this model.
        locality: unrelated (text, answer) pairs whose answers training should keep, see
            `TuningConfig.locality_loss`.
        seed: of the batches.
        engine: "replay", "whole" forward passes, or by itself.
        progress: called with (what is done, done, total).
        settings: the fields of FineTuningConfig and TuningConfig.
    Raises:
        SettingError: an unknown setting; FactError: a fact that cannot be worked with;
            NonFiniteError: the training diverged.
    """
    settings = {**preset(method, lm.name), **settings}
    (usual,) = preset_layers(settings, lm.n_layers, "layer")
    config = read(FineTuningConfig, settings, method, "layer, locality, seed, engine, progress")
    config = replace(config, tuning=config.tuning.settled(lm, seed))
    layer = usual if layer is None else layer
    weight = f"{lm.parts.mlp_out_name(layer)}.weight"
    module, tuning = lm.parts.mlp_out(layer), config.tuning
    if config.reference:
        # no generator: the harness takes batches in the order of the facts, every epoch
        rows, generator = published_rows(lm, facts, tuning.rows_per_batch), None
    else:
        rows = fact_rows(lm, facts, tuning.contexts, tuning.train_paraphrases)
        generator = torch.Generator().manual_seed(seed)

    # half precision would lose Adam's small steps: the change is added up in float32 or better
    precision = torch.float64 if lm.dtype == torch.float64 else torch.float32
    start_oi = as_linear(module).detach().to(precision)
    # the change is the parameter, not the weight: the model's own weight stays as it is, and the
    # box of FT+L is a clamp around zero
    delta_oi = torch.zeros_like(start_oi, requires_grad=True)

    def clamp() -> None:
        if config.norm_constraint is not None:
            delta_oi.clamp_(-config.norm_constraint, config.norm_constraint)

    loop = TrainingLoop(lm, layer, tuning, generator, engine, progress)
    with frozen(lm.model):
        targets = loop.task(rows)
        unrelated = loop.task([target_row(lm, text, answer) for text, answer in locality])
        with overlay_weight(module, delta_oi):
            descent = loop.descend(
                [delta_oi],
                targets,
                unrelated,
                # decay pulls the edited weight to zero, not the change: that would undo the edit
                decayed=lambda delta: start_oi + delta,
                after_step=clamp,
            )
    recipe = {"layer": layer, **flat(config), "locality": [list(pair) for pair in locality]}
    diagnostics = descent.diagnostics() | {
        "norm_ratio": float(delta_oi.detach().norm() / start_oi.norm())
    }
    deltas = {weight: Delta(delta_oi.detach())}
    return Edit(
        tuple(facts),
        method,
        recipe,
        deltas,
        describe_base(lm, [weight]),
        seed=seed,
        diagnostics=diagnostics,
    )


ft = partial(fine_tune, method="ft")  # without bounds
ft_l = partial(fine_tune, method="ft-l")  # every entry of the change within `norm_constraint`
ft_w = partial(fine_tune, method="ft-w")  # with weight decay, as in Meng et al. 2023 (MEMIT)
locft_bf = partial(fine_tune, method="locft-bf")  # epochs of mini-batches over all facts
