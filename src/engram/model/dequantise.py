"""One matrix of a quantised model, unpacked for a while, so that edits can be written into it and
saved with the model.

Knows where the matrix is, and that the model's config lists which of its matrices are not packed.
How packed numbers are read is weights' business; an edit that leaves the model packed is
attached's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engram.checks import checked_call
from engram.model.language_model import LanguageModel
from engram.modules.resolve import resolve
from engram.modules.weights import quantisation, values

# names of that list in the configs of bitsandbytes and torchao
_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")


@checked_call
@contextmanager
def dequantised(lm: LanguageModel, layer: int) -> Iterator[LanguageModel]:
    """Unpack one block's MLP output matrix within the `with` block: plain floating point with the
    numbers that its packed integers mean.

    Edits that were computed on the packed weight can be `applied` to it, and a checkpoint that is
    saved in the block (`edit.to_checkpoint(lm, folder)`) has this one matrix in floating point.
    However the block ends, the packed module is back, the same object. Nothing happens where the
    matrix is not quantised.

    Args:
        layer: block, from 0.
    Yields:
        `lm`.
    Example:
        >>> with engram.dequantised(lm, layer=2):  # pocket is not quantised: nothing to do
        ...     lm.dtype
        torch.float32
    """
    name, packed = lm.parts.mlp_out_name(layer), lm.parts.mlp_out(layer)
    if quantisation(packed) is None:
        yield lm
        return
    owner, _, leaf = name.rpartition(".")
    parent, parts = lm.model.get_submodule(owner), lm.parts
    config = getattr(lm.model.config, "quantization_config", None)
    skipped = {key: getattr(config, key) for key in _SKIPPED if hasattr(config, key)}
    try:
        setattr(parent, leaf, Unpacked(packed))
        lm.parts = resolve(lm.model)  # it holds modules, and would still have the packed one
        for key, listed in skipped.items():
            # Without a list of its own, the quantiser spared its usual modules, such as the head:
            # a list of this one name would have them packed when the checkpoint is loaded.
            usual = getattr(getattr(lm.model, "hf_quantizer", None), "modules_to_not_convert", None)
            setattr(config, key, [*(listed or usual or []), name])
        yield lm
    finally:
        for key, listed in skipped.items():
            setattr(config, key, listed)
        setattr(parent, leaf, packed)
        lm.parts = parts


class Unpacked(nn.Linear):
    """A linear map with a packed one's numbers, in float32; its output has the input's dtype."""

    def __init__(self, packed: nn.Module) -> None:
        weight_oi = values(packed)
        super().__init__(weight_oi.shape[1], weight_oi.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight_oi, requires_grad=False)
        self.bias = packed.bias  # type: ignore[assignment]
        # as the family's class will load it
        self._stored_transposed = getattr(packed, "source_cls", None) is Conv1D
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
