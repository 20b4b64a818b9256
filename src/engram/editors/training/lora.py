"""LoRA as an editor: low-rank adapters on a few matrices, trained by the peft library until every
target is said.

Knows peft's adapters and how they come off again. The loop is tuning.py's. Sources: Hu et al. 2021,
arXiv:2106.09685; as a
rival of editors: the EasyEdit library (arXiv:2308.07269), whose settings are presets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from engram.edit.base import describe_base
from engram.edit.delta import Delta
from engram.edit.edit import Edit
from engram.editors.presets import preset, preset_layers
from engram.editors.training.loop import TuningConfig, descend, tasks
from engram.editors.training.matrices import Layers, matrix_names
from engram.editors.training.target_rows import fact_rows
from engram.engine.replayable import Engine
from engram.errors import SettingError, UnsupportedModelError
from engram.facts import Fact
from engram.model.language_model import LanguageModel
from engram.modules.frozen import frozen
from engram.modules.weights import is_transposed
from engram.progress import Progress, no_progress
from engram.settings import flat, read

_ADAPTER = "engram"


@dataclass(frozen=True)
class LoraEditConfig:
    """Settings of LoRA, with those of the training loop.

    Args:
        rank: of each adapter.
        alpha: an adapter's product counts alpha / rank times.
        dropout: share of an adapter's inputs that is zeroed in training; 0, ours, trains what is
            then used. With it, "argmax" is judged on the passes that were trained on.
        targets: which matrices of a block, see `matrix_names`.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("mlp_out",)
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        if self.rank < 1 or not targets:
            raise SettingError(
                f"rank={self.rank}, targets={targets}: need a rank of at least 1, and at least one target"
            )
        if not 0 <= self.dropout < 1:
            raise SettingError(f"dropout={self.dropout}: expected a share from 0 to below 1")


def lora(
    lm: LanguageModel,
    facts: Sequence[Fact],
    *,
    layers: Layers | None = None,
    locality: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    engine: Engine = "auto",
    progress: Progress = no_progress,
    **settings: Any,
) -> Edit:
    """Train low-rank adapters on all facts together; the model is given back as it was, module by
    module.

    Args:
        layers: blocks to adapt, from 0, or "all"; default: the preset of this model.
        locality: unrelated (text, answer) pairs that training shall leave alone, see
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
        UnsupportedModelError: the model wears adapters already.
    """
    settings = {**preset("lora", lm.name), **settings}
    usual = preset_layers(settings, lm.n_layers, "layers", count=3)
    layers = usual if layers is None else layers
    config = read(LoraEditConfig, settings, "lora", "layers, locality, seed, engine, progress")
    config = replace(config, tuning=config.tuning.settled(lm, seed))
    names = matrix_names(lm, layers, config.targets)
    lowest = 0 if layers == "all" else min(layers)
    rows = fact_rows(lm, facts, config.tuning.contexts, config.tuning.train_paraphrases)
    generator = torch.Generator().manual_seed(seed)
    with frozen(lm.model):
        wanted, staying = tasks(
            lm, rows, locality, lowest, config.tuning, generator, engine, progress
        )
        with adapted(lm, names, config, generator) as adapters:
            parameters = [parameter for each in adapters.values() for parameter in each]
            descent = descend(
                parameters, wanted, staying, config.tuning, generator=generator, progress=progress
            )
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
    """Matrices of `lm` wear peft's adapters in the block; afterwards the very modules that were
    there are back.

    Yields:
        name of a matrix -> its parameters A [r, in], small and random, and B [out, r], zero;
        float32 or better.
    Raises:
        UnsupportedModelError: the model wears adapters already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if hasattr(lm.model, "peft_config"):
        raise UnsupportedModelError(
            f"{lm.name} wears peft adapters already, which an edit would not describe; merge them into it first "
            "(merge_and_unload)"
        )
    homes = [
        (lm.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names
    ]
    plain = [lm.model.get_submodule(name) for name in names]
    precision = torch.float64 if lm.dtype == torch.float64 else torch.float32
    spec = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a fraction does no harm
        target_modules=list(names),
        fan_in_fan_out=is_transposed(plain[0]),
        init_lora_weights=False,
    )
    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # peft draws values, from the global generator, that are then replaced
            inject_adapter_in_model(spec, lm.model, adapter_name=_ADAPTER)
        yield {
            name: _parameters(lm.model.get_submodule(name), precision, config.dropout, generator)
            for name in names
        }
    finally:
        for (home, leaf), module in zip(homes, plain, strict=True):
            setattr(home, leaf, module)
        lm.model.__dict__.pop("peft_config", None)


def _parameters(
    layer: Any, precision: torch.dtype, dropout: float, generator: torch.Generator
) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of an adapted matrix with their usual first values (uniform within 1 / sqrt(in), and
    zero).
    """
    inner, outer = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    bound = inner.in_features**-0.5
    a_ri = (2 * torch.rand(inner.weight.shape, generator=generator, dtype=precision) - 1) * bound
    inner.weight = nn.Parameter(a_ri.to(inner.weight.device))
    outer.weight = nn.Parameter(torch.zeros_like(outer.weight, dtype=precision))
    if dropout:
        layer.lora_dropout[_ADAPTER] = _Dropout(dropout, generator)
    return inner.weight, outer.weight


class _Dropout(nn.Module):
    """Dropout that draws from the edit's own generator, whatever mode the model is in."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.share, self.generator = share, generator

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, generator=self.generator) >= self.share
        return x * kept.to(x) / (1 - self.share)
