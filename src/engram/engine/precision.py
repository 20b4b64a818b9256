"""In which precision a float32 model's matrix products are computed.

Knows torch's setting. Refuses to know what is computed. With "bfloat16" the factors of each product
are rounded to 8 bits of mantissa and the sums are kept in float32, as are norms, softmax and the
residual stream; the model's weights stay as they are. Processors without such instructions compute
in float32 all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Matmul = Literal["float32", "bfloat16"]


@contextmanager
def matmul_in(precision: Matmul) -> Iterator[None]:
    """Compute matrix products of float32 tensors in this precision for the length of the block.

    "float32" leaves the setting that the caller has made.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if precision == "bfloat16":
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
