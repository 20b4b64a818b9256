"""An edit as a LoRA adapter of the peft library: the base stays as it is, the adapter can be
switched off.

Knows peft's file layout. Refuses to know models: the changes say themselves which weights are
stored [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engram.edit.changes import WeightChanges
from engram.errors import UnsupportedModelError
from engram.files.atomic import atomic_folder, reserved
from engram.model.named_models import NAMED_MODELS

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def to_peft(changes: WeightChanges, folder: str | Path) -> Path:
    """Write a LoRA adapter that does to the base what `changes` do:
    `PeftModel.from_pretrained(base, folder)`.

    B = left, A = right and alpha = rank, so peft's scaling is 1. All weights have the largest rank
    among them, the others padded with zeros. The adapter adds its output to the base's instead of
    rounding into the weight, so on a half-precision base it is closer to the computed change than
    the merged edit is.

    Returns:
        The folder; an existing adapter is replaced.
    Raises:
        UnsupportedModelError: a change of something else than a weight matrix.
        EngramFileError: `folder` holds something else than an adapter, or cannot be written.
    """
    from peft import LoraConfig

    factors, rank = padded_factors(changes)
    tensors: dict[str, Tensor] = {}
    for name, (right, left) in factors.items():
        module = f"base_model.model.{_module(name)}"
        tensors[f"{module}.lora_A.weight"] = right
        tensors[f"{module}.lora_B.weight"] = left
    config = LoraConfig(
        base_model_name_or_path=public_name(changes.base),
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=[_module(name) for name in factors],
        # One flag for all modules; a family stores all of its matrices alike.
        fan_in_fan_out=any(weight["transposed"] for weight in changes.base["tensors"].values()),
    )
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    with (
        reserved(folder, folder=True, replaces=_CONFIG, needs=len(data)),
        atomic_folder(folder, replaces=_CONFIG) as fresh,
    ):
        config.save_pretrained(str(fresh))
        (fresh / _WEIGHTS).write_bytes(data)
    return Path(folder)


def padded_factors(changes: WeightChanges) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Return (parameter name -> (A [rank, in], B [out, rank]) in float32, the largest rank)."""
    # One rank for all: a rank per module would need peft's `rank_pattern` of regular expressions,
    # and llama.cpp's files have one alpha.
    factors = {name: delta.low_rank() for name, delta in changes.deltas.items()}
    rank = max(left.shape[1] for left, _ in factors.values())
    padded = {
        name: (_padded(right.float(), rank, dim=0), _padded(left.float(), rank, dim=1))
        for name, (left, right) in factors.items()
    }
    return padded, rank


def public_name(base: Mapping[str, Any]) -> str:
    """Return the name by which others find a base model: as on the hub, never a path of this
    machine.
    """
    # "openai-community/gpt2", "pocket"
    model = str(base["model"])
    if (named := NAMED_MODELS.get(model)) and named.hub:
        return named.hub
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) and not Path(model).is_dir():
        return model
    folders = [part for part in re.split(r"[/\\]", model) if part.strip("~.")]
    # the hub's cache: .../models--openai-community--gpt2/snapshots/607a30d783df
    for part in folders:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return folders[-1] if folders else str(base["model_type"])


def _module(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or not module:
        raise UnsupportedModelError(
            f"{name!r} is not the weight of a module, a LoRA adapter cannot hold its change"
        )
    return module


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    # Zeros on both sides: their product adds nothing, whatever the rank.
    return torch.cat([factor, factor.new_zeros(shape)], dim).contiguous()
