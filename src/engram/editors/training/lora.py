"""LoRA as an editor: low-rank adapters of the peft library on a few matrices, trained until every
target is the most probable answer.

Knows peft's adapters and how they are removed again. The loop is loop.py's. Sources: Hu et al.
2021, arXiv:2106.09685; as a baseline for editors: the EasyEdit library (arXiv:2308.07269), whose
settings are presets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from engram.checks import Count, Positive, Seed, Texts, check_fields, checked_call
from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.editors.presets import preset, preset_layers
from engram.editors.training.loop import TrainingLoop, TuningConfig
from engram.editors.training.matrices import Layers, matrix_names
from engram.editors.training.target_rows import fact_rows, target_row
from engram.engine.replayable import Engine
from engram.errors import SettingError, UnsupportedModelError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.modules.frozen import frozen
from engram.modules.weights import is_transposed, linear_shape
from engram.progress import Progress, no_progress
from engram.settings import flat, read

_ADAPTER = "engram"


@dataclass(frozen=True)
class LoraEditConfig:
    """Settings of LoRA, with those of the training loop.

    Args:
        rank: of each adapter.
        alpha: an adapter's product is scaled by alpha / rank.
        dropout: share of an adapter's inputs that is zeroed in training; the default, 0, trains
            exactly what is used afterwards. With dropout, stop="argmax" judges the trained passes.
        targets: which matrices of a block, see `matrix_names`.
    """

    rank: Count = 8
    alpha: Positive = 32.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    targets: str | Texts = ("mlp_out",)
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))


@checked_call
def lora(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    layers: Layers | None = None,
    locality: Sequence[tuple[str, str]] = (),
    seed: Seed = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **settings: Any,
) -> Edit:
    """Train low-rank adapters on all facts together; afterwards the model has its own modules back.

    Args:
        layers: blocks to adapt, from 0, or "all"; default: the preset of this model.
        locality: unrelated (text, answer) pairs whose answers training should keep, see
            `TuningConfig.locality_loss`.
        seed: of the adapters' first values, the batches and the dropout.
        engine: "replay", "whole" forward passes, or by itself.
        progress: called with (what is done, done, total).
        settings: the fields of LoraEditConfig and TuningConfig.
    Returns:
        An Edit whose deltas are (alpha / rank) B A; `to_peft` makes an adapter of it again.
    Raises:
        SettingError: an unknown setting; FactError: a fact that cannot be worked with;
            NonFiniteError: the training diverged;
        UnsupportedModelError: the model has adapters already.
    """
    settings = {**preset("lora", lm.name), **settings}
    usual = preset_layers(settings, lm.n_layers, "layers", count=3)
    layers = usual if layers is None else layers
    config = read(LoraEditConfig, settings, "lora", "layers, locality, seed, engine, progress")
    config = replace(config, tuning=config.tuning.settled(lm, seed))
    names = matrix_names(lm, layers, config.targets)
    sides = min(min(linear_shape(lm.model.get_submodule(name))) for name in names)
    if config.rank > sides:
        raise SettingError(
            f"rank={config.rank}: expected at most {sides}, the smaller side of the smallest matrix"
        )
    # what is below the lowest adapted block is computed once for each batch
    lowest = 0 if layers == "all" else min(layers)
    rows = fact_rows(lm, facts, config.tuning.contexts, config.tuning.train_paraphrases)
    generator = torch.Generator().manual_seed(seed)
    loop = TrainingLoop(lm, lowest, config.tuning, generator, engine, progress)
    with frozen(lm.model):
        targets = loop.task(rows)
        unrelated = loop.task([target_row(lm, text, answer) for text, answer in locality])
        with adapted(lm, names, config, generator) as adapters:
            parameters = [parameter for pair in adapters.values() for parameter in pair]
            descent = loop.descend(parameters, targets, unrelated)
    # peft scales the product at every forward pass; a delta holds the scaled product
    scale = config.alpha / config.rank
    deltas = {
        f"{name}.weight": Delta(scale * b_or.detach(), a_ri.detach())
        for name, (a_ri, b_or) in adapters.items()
    }
    recipe = {
        "layers": layers if layers == "all" else list(layers),
        **flat(config),
        "locality": [list(pair) for pair in locality],
    }
    return Edit(
        tuple(facts),
        "lora",
        recipe,
        deltas,
        describe_base(lm, deltas),
        seed=seed,
        diagnostics=descent.diagnostics(),
    )


@contextmanager
def adapted(
    lm: LanguageModel, names: Sequence[str], config: LoraEditConfig, generator: torch.Generator
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Put peft's adapters on matrices of `lm` inside the block; afterwards the original modules are
    back.

    Yields:
        name of a matrix -> its parameters A [r, in], small and random, and B [out, r], zero;
        float32 or better.
    Raises:
        UnsupportedModelError: the model has adapters already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if hasattr(lm.model, "peft_config"):
        raise UnsupportedModelError(
            f"{lm.name} has peft adapters already, which an edit would not describe; merge them "
            "into it first (merge_and_unload)"
        )
    parents = [
        (lm.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names
    ]
    plain = [lm.model.get_submodule(name) for name in names]
    precision = torch.float64 if lm.dtype == torch.float64 else torch.float32
    spec = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a fraction does no harm
        target_modules=list(names),
        fan_in_fan_out=is_transposed(plain[0]),
        init_lora_weights=False,  # values come from the edit's own generator, see `_parameters`
    )
    try:
        # peft draws values from the global generator; `_parameters` then replaces them
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(spec, lm.model, adapter_name=_ADAPTER)
        yield {
            name: _parameters(lm.model.get_submodule(name), precision, config.dropout, generator)
            for name in names
        }
    finally:
        # peft's own unload would leave copies; setting the attributes puts the same objects back
        for (parent, leaf), module in zip(parents, plain, strict=True):
            setattr(parent, leaf, module)
        lm.model.__dict__.pop("peft_config", None)


def _parameters(
    layer: Any, precision: torch.dtype, dropout: float, generator: torch.Generator
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of an adapted matrix with their usual first values: uniform within
    1 / sqrt(in), and zero.
    """
    inner, outer = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    bound = inner.in_features**-0.5
    # B is zero, so the first pass is the unedited model's whatever A is
    a_ri = (2 * torch.rand(inner.weight.shape, generator=generator, dtype=precision) - 1) * bound
    inner.weight = nn.Parameter(a_ri.to(inner.weight.device))
    outer.weight = nn.Parameter(torch.zeros_like(outer.weight, dtype=precision))
    if dropout:
        layer.lora_dropout[_ADAPTER] = _Dropout(dropout, generator)
    return inner.weight, outer.weight


class _Dropout(nn.Module):
    """Dropout from the edit's own generator, in every mode of the model: a frozen model evaluates,
    and torch's dropout would be off.
    """

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.share, self.generator = share, generator

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape, generator=self.generator) >= self.share
        return x * mask.to(x) / (1 - self.share)
