"""Hold a model still while something beside its weights is trained.

Knows flags and modes of modules. Refuses to know what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no gradient reach the model's parameters inside the block, and let it evaluate.

    Gradients are enabled, also for a caller inside `torch.no_grad()`, since what is trained in the
    block needs them. Every flag and mode is put back, however the block ends.
    """
    # remembered one by one: a caller may have frozen some of the parameters already
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False).eval()
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
