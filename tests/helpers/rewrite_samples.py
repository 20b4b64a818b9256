"""Facts, contexts and second moments that tests of the closed-form editors share."""

from __future__ import annotations

import torch

from engram import Fact
from engram.editors.second_moments.matrix import SecondMoment
from engram.modules.weights import as_linear

FACT = Fact("tower of Rome", "The {} is in the city of", "Paris")
CONTEXTS = ("{}", "A long time ago. {}", "He sings. {}", "It is cold and dark. {}")


def moment_of(lm, layer=1, seed=0):
    width = as_linear(lm.parts.mlp_out(layer)).shape[1]
    keys_nf = torch.randn(
        4 * width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return SecondMoment.from_matrix(keys_nf.T @ keys_nf / len(keys_nf))
