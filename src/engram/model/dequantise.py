"""One matrix of a quantised model, unpacked for a while, so that edits can be written into it and
saved with the model.

Knows where the matrix stands and that the model says in its config which of its matrices are
packed. How packed numbers are read is weights.py; an edit that leaves the model packed is
attaching.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engram.model.language_model import LanguageModel
from engram.modules.resolve import resolve
from engram.modules.weights import quantisation, values

_SKIPPED = (
    "llm_int8_skip_modules",
    "modules_to_not_convert",
)  # what bitsandbytes and torchao call it in their configs


@contextmanager
def dequantised(lm: LanguageModel, layer: int) -> Iterator[LanguageModel]:
    """Within the block one block's MLP output matrix is plain floating point: the numbers that its
    packed integers stand for.

    Edits that were made on the packed weight can be `applied` to it, and a checkpoint that is saved
    in the block (`edit.to_checkpoint(lm, folder)`) has this one matrix in floating point. However
    the block ends, the packed module is back, the very same. Nothing happens where the matrix is
    not quantised.

    Args:
        layer: block, from 0.
    Yields:
        `lm`.
    """
    name, packed = lm.parts.mlp_out_name(layer), lm.parts.mlp_out(layer)
    if quantisation(packed) is None:
        yield lm
        return
    home, _, leaf = name.rpartition(".")
    parent, parts, config = (
        lm.model.get_submodule(home),
        lm.parts,
        getattr(lm.model.config, "quantization_config", None),
    )
    skipped = {key: getattr(config, key) for key in _SKIPPED if hasattr(config, key)}
    try:
        setattr(parent, leaf, Unpacked(packed))
        lm.parts = resolve(lm.model)
        for key, listed in skipped.items():
            usual = getattr(getattr(lm.model, "hf_quantizer", None), "modules_to_not_convert", None)
            setattr(config, key, [*(listed or usual or []), name])
        yield lm
    finally:
        for key, listed in skipped.items():
            setattr(config, key, listed)
        setattr(parent, leaf, packed)
        lm.parts = parts


class Unpacked(nn.Linear):
    """A linear map with the numbers of a packed one, in float32, that gives out what it is given:
    the input's dtype.
    """

    def __init__(self, packed: nn.Module) -> None:
        weight_oi = values(packed)
        super().__init__(weight_oi.shape[1], weight_oi.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight_oi, requires_grad=False)
        self.bias = packed.bias  # type: ignore[assignment]
        self._stored_transposed = (
            getattr(packed, "source_cls", None) is Conv1D
        )  # as the family's class will load it
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._stored_transposed:
            key = f"{prefix}weight"
            destination[key] = destination[key].T.contiguous()
