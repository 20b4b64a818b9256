"""Which matrices of a model a method changes: by role, or by the name in the family, in each block.

Knows names. Refuses to know what is done with the matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from engram import checks
from engram.checks import did_you_mean
from engram.errors import SettingError
from engram.model.language_model import LanguageModel

Layers = checks.Layers | Literal["all"]


def matrix_names(lm: LanguageModel, layers: Layers, targets: Iterable[str]) -> list[str]:
    """Return dotted names of the matrices `targets` in blocks `layers`, first block first.

    For example, of GPT-2 with layers [3, 4] and targets ["mlp_out"]:
    transformer.h.3.mlp.c_proj, transformer.h.4.mlp.c_proj.

    Args:
        layers: blocks from 0, or "all".
        targets: "mlp_out", the MLP's output matrix; "heads_out", the attention's; or the last part
            of a matrix's own name in the family, such as "q_proj".
    Raises:
        UnsupportedModelError: a layer or a role that the model does not have.
        SettingError: a target that names no matrix of the block.
    """
    chosen = range(lm.n_layers) if layers == "all" else sorted(set(layers))
    # each name once: a target can be given by its role and by its own name
    return list(
        dict.fromkeys(
            name for layer in chosen for target in targets for name in _in_block(lm, layer, target)
        )
    )


def _in_block(lm: LanguageModel, layer: int, target: str) -> list[str]:
    if target == "mlp_out" or lm.kind != "causal" or not 0 <= layer < lm.n_layers:
        return [lm.parts.mlp_out_name(layer)]  # raises with the reason where there is none
    if target == "heads_out":
        return [lm.parts.heads_out_name(layer)]
    matrices = [
        name
        for name, module in lm.parts.blocks[layer].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    # several, where a block has such a matrix more than once (of experts, of two attentions)
    names = [name for name in matrices if name.rpartition(".")[2] == target]
    if not names:
        known = [
            "mlp_out",
            "heads_out",
            *dict.fromkeys(name.rpartition(".")[2] for name in matrices),
        ]
        raise SettingError(
            f"targets: a block of model_type={lm.model.config.model_type!r} has "
            f"no matrix {target!r}{did_you_mean(target, known)}; it has {', '.join(known)}"
        )
    return [f"{lm.parts.block_name(layer)}.{name}" for name in names]
